//! One tensor-parallel rank of Lockstep: weights, model, cache of keys and values, sampler, collectives, devices.
//!
//! A shard knows nothing of users, text, deadlines, or other ranks' data.

mod check;
mod checksum;
pub mod collective;
pub mod config;
pub mod device;
pub mod entry;
pub mod layers;
pub mod model;
pub mod process;
pub mod progress;
pub mod runner;
pub mod service;
pub mod weights;

pub use check::{Checked, Facts, check_folder};
pub use entry::{ShardArgs, build_id, serve, serve_with};
