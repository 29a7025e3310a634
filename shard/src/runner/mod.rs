//! From steps to batches and back: what a rank remembers of sequences, media and blocks, and how it runs a step.

pub mod blocks;
pub mod features;
pub mod media;
pub mod noise;
pub mod plan;
pub mod run;
pub mod sequence;
pub mod setup;
pub mod state;
pub mod step;

pub use media::MediaStore;
pub use plan::MemoryPlan;
pub use run::Runner;
pub use setup::Setup;
pub use step::{Step, StepError, StepResult};
