//! What a device does for the model: about fifteen fused operations, and the memory that they work in.

mod adjustments;
pub mod angles;
pub mod api;
pub mod cpu;
pub mod cuda;
pub mod patches;
pub mod plan;
pub mod ranges;

pub use angles::Angles;
pub use api::*;
