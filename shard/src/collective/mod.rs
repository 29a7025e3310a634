//! How ranks meet: all-reduce, all-gather and barrier.

pub mod alone;
pub mod api;
mod barrier;
pub mod shared_memory;

pub use alone::Alone;
pub use api::*;
pub use shared_memory::{Aborter, DEFAULT_SLOT_BYTES, JoinError, SharedMemory, required_bytes};
