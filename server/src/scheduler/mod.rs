//! The scheduler: a pure, synchronous state machine over sequences, blocks and features.
//!
//! [`Scheduler::submit`] takes a sequence in, [`Scheduler::schedule`] says what the shards do next, and
//! [`Scheduler::apply`] takes what came of it. Time and ids come in as arguments; there is no clock, no channel and no
//! randomness here, so that a whole history can be replayed in a test.
//!
//! There is no prefill phase and no decode phase. Every sequence has tokens computed and tokens known, and a step gives
//! each some of the difference under one budget. A sequence that lost its blocks only has fewer tokens computed. Media are
//! encoded under the same budget, in pieces.

mod core;
mod features;
mod kv;
mod plan;
mod pool;
mod prefix;
mod sequence;
mod types;
mod vision;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;

pub use self::{
    core::{Scheduler, Stats, Totals},
    plan::{
        Admission, BlockCopy, Chunk, DrawFailure, Encode, Event, FinishReason, Sampled, SampledToken,
        StepPlan, StepResult, TokenProbability,
    },
    types::{
        BlockId, MediaHash, Medium, Millis, NewSequence, PrefixKey, SamplingParams, SchedulerConfig, SeqId,
        SubmitError,
    },
    vision::VisionCosts,
};
