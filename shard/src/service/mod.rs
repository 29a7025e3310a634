//! The gRPC service of a shard: load once, take pixels, run steps, and go from epoch to epoch.

pub mod convert;
pub mod gate;
pub mod listen;
pub mod load;
pub mod options;
pub mod rpc;
pub mod status;
pub mod trace;
pub mod worker;

pub use listen::ListenAddress;
pub use rpc::Shard;
