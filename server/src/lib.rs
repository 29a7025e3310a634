//! The frontend of Lockstep: gRPC services, chat template, tokenizer, media, scheduler, shard fan-out, detokenizer.
//!
//! Nothing here touches a weight or a tensor, and nothing is `unsafe`.

#![forbid(unsafe_code)]

pub mod api;
pub mod budget;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod connections;
pub mod deadline;
pub mod demo;
pub mod engine;
#[doc(hidden)]
pub mod fuzzing;
pub mod generation;
#[cfg(test)]
mod goldens;
pub mod limits;
pub mod media;
pub mod metrics;
pub mod model_info;
pub mod output;
pub mod prompt;
pub mod request;
pub mod scheduler;
pub mod serve;
pub mod shards;
pub mod telemetry;
pub mod warmup;
mod workers;
