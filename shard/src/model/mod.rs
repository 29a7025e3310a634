//! The model, as the paper has it.

pub mod generation;
pub mod positions;
pub mod rope;
pub mod stages;
pub mod text;
pub mod vision;
pub mod windows;

pub use generation::{LoadError, Model};
pub use text::Batch;
pub use vision::{FramePiece, Normalization, VisionFrame};

pub use crate::layers::{Drawn, Parallel};
