//! From steps to batches and back.

pub mod noise;
