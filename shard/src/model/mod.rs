//! The model, as the paper has it.

pub mod positions;
