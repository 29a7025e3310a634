//! What a device does for the model: about fifteen fused operations, and the memory that they work in.

pub mod api;
pub mod cpu;
pub mod plan;
pub mod ranges;

pub use api::*;
