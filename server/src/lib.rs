//! The frontend of Lockstep: gRPC services, chat template, tokenizer, media, scheduler, shard fan-out, detokenizer.
//!
//! Nothing here touches a weight or a tensor, and nothing is `unsafe`.

#![forbid(unsafe_code)]

pub mod checkpoint;
#[cfg(test)]
mod goldens;
pub mod media;
pub mod output;
pub mod prompt;
pub mod scheduler;
pub mod shards;
pub mod workers;
