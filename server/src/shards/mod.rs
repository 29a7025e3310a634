//! The group of shards: starting, loading, and running steps on all ranks together.
//!
//! [`Group::start`] runs one process for each rank, or takes those that run elsewhere, and loads the model into all of them; [`Group::send`] gives every rank the
//! same plan, [`Group::receive`] waits until all have answered the first one. Questions about memory go through a
//! [`GroupHandle`], beside the steps.
//!
//! A process that ends, a rank that is silent, ranks that diverge are noticed wherever the group waits. Then
//! [`Group::diagnose`] says what happened, and [`Group::restart`] puts the group together again: ranks at fault are started anew
//! (or, elsewhere, reached again), the others keep their weights.

mod config;
mod convert;
mod elsewhere;
mod error;
mod group;
mod hosted;
mod meeting;
mod pixels;
mod process;
mod rank;
mod restart;
mod types;
mod watchdog;

#[cfg(test)]
mod tests;

pub use self::{
    config::{DType, DeviceKind, GpuConfig, GroupConfig, Placement, ShardSource, Sums},
    error::{Broken, GroupError, RankError, RankFault, StartError},
    group::{Group, GroupHandle},
    types::{LoadProgress, MemoryPlan, ModelDescription, ResidentMemory},
};
