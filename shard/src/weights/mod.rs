//! Checkpoints: reading the slices of a rank.

pub mod checkpoint;
pub mod loader;
pub mod random;
mod sums;

pub use checkpoint::{Checkpoint, CheckpointError, CheckpointFault};
pub use loader::{Loader, Progress, RowSlice};
