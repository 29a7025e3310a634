//! The group of shards: starting, loading, and running steps on all ranks together.
//!
//! [`Group::start`] runs one process for each rank and loads the model into all of them; [`Group::run`] gives every
//! rank the same plan and waits for all answers. Pixels and questions about memory go through a [`GroupHandle`], beside
//! the steps. A process that ends is noticed at once, wherever the group waits, and reported with its last words.
//!
//! A group that failed is not repaired: it is shut down, and another one may be started.

mod config;
mod convert;
mod error;
mod group;
mod pixels;
mod process;
mod rank;
mod types;

#[cfg(test)]
mod tests;

pub use self::{
    config::{DType, DeviceKind, GroupConfig, Placement},
    error::{GroupError, RankError, RankFault, StartError},
    group::{Group, GroupHandle},
    types::{LoadProgress, MemoryPlan, ModelDescription, ResidentMemory},
};
