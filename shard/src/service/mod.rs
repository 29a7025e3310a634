//! The gRPC service of a shard: load, take pixels, run steps, and go from epoch to epoch.

pub mod convert;
pub mod gate;
pub mod gpu;
pub mod listen;
pub mod load;
pub mod options;
mod phase;
pub mod rpc;
pub mod status;
pub mod trace;
pub mod worker;

pub use listen::{InvalidAddress, ListenAddress};
pub use rpc::Shard;
