//! What goes out of the scheduler: plans for the shards and events for the engine; and what comes back from the shards.

use super::types::{BlockId, MediaHash, Medium, Millis, SamplingParams, SeqId};

/// What all ranks do in one step.
///
/// A shard applies `releases` and `evictions` first, then `admissions`, then `encodes`, then `copies`, then `chunks`. Blocks given
/// back by the first two may be given out again by the same plan.
///
/// No field depends on the value of a token that is not known yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Number of the step, from 0, without gaps.
    pub step: u64,
    /// Sequences that enter.
    pub admissions: Vec<Admission>,
    /// Vision encoding to do, at most one piece of each medium. Only the last one may leave its medium incomplete.
    pub encodes: Vec<Encode>,
    /// Tokens to compute. At most one for each sequence.
    pub chunks: Vec<Chunk>,
    /// Blocks of keys and values to copy.
    pub copies: Vec<BlockCopy>,
    /// Sequences that leave: for good, or until they are admitted again because they lost their blocks.
    pub releases: Vec<SeqId>,
    /// Media whose features are no longer kept, complete or not.
    pub evictions: Vec<MediaHash>,
}

impl StepPlan {
    /// Whether there is nothing to tell the shards.
    pub fn is_empty(&self) -> bool {
        self.admissions.is_empty()
            && self.encodes.is_empty()
            && self.chunks.is_empty()
            && self.copies.is_empty()
            && self.releases.is_empty()
            && self.evictions.is_empty()
    }
}

/// A sequence that enters the shards.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// Its id.
    pub id: SeqId,
    /// All its tokens: the prompt, and what it has generated if it was there before.
    pub token_ids: Vec<u32>,
    /// How many of these are the prompt.
    pub num_prompt_tokens: u32,
    /// The prompt's media in order.
    pub media: Vec<Medium>,
    /// How its tokens are drawn.
    pub sampling: SamplingParams,
    /// How many of its first tokens have keys and values already.
    pub num_computed_tokens: u32,
    /// The blocks that these lie in. Full ones are shared, and never written again. A last one that is not full is its own,
    /// and filled by a copy of this step.
    pub blocks: Vec<BlockId>,
}

/// A piece of the vision encoding of a medium. Work is counted in units of one token in one stage of the tower: temporal
/// patch, stage, token.
///
/// The pixels must be at the shards before the plan with the first piece, and are gone from there after the last one, or
/// when the medium is evicted: then they are needed again. So they are best sent when a plan asks for the first piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encode {
    /// The sequence on whose behalf; others may share the features.
    pub id: SeqId,
    /// The medium.
    pub hash: MediaHash,
    /// Blocks that its features go to; none but with the first piece.
    pub feature_blocks: Vec<BlockId>,
    /// How far the work is.
    pub from: u64,
    /// How far it is to get.
    pub to: u64,
}

impl Encode {
    /// Whether the work on the medium begins with this piece.
    pub fn is_first(&self) -> bool {
        self.from == 0
    }
}

/// Tokens of one sequence to compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub id: SeqId,
    /// Index of the first token: how many are computed already.
    pub start: u32,
    /// How many.
    pub length: u32,
    /// Blocks that its table grows by.
    pub new_blocks: Vec<BlockId>,
    /// Tokens to draw after the chunk, at most; 0 where known tokens follow.
    pub max_new_tokens: u32,
}

/// A copy of one block of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// From.
    pub source: BlockId,
    /// To.
    pub target: BlockId,
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// Number of the step.
    pub step: u64,
    /// Tokens drawn, for every chunk that asked for some.
    pub sampled: Vec<Sampled>,
    /// Microseconds that the vision encoding took.
    pub vision_us: u64,
    /// Microseconds that the whole step took.
    pub step_us: u64,
}

/// Tokens drawn for one sequence: at least one, or a failure; at most as many as the chunk asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The sequence.
    pub id: SeqId,
    /// The tokens in order.
    pub tokens: Vec<SampledToken>,
    /// Why no token follows these.
    pub failure: Option<DrawFailure>,
}

/// Why no token could be drawn for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrawFailure {
    /// The forward is broken for this sequence.
    #[error("the model's logits are not finite: no token can be drawn")]
    LogitsNotFinite,
}

/// One token drawn.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub token_id: u32,
    /// Natural logarithm of its probability, if asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens, best first, if asked for.
    pub top: Vec<TokenProbability>,
}

/// A token and its log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenProbability {
    /// The token.
    pub token_id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What happened to a sequence. Events of one sequence come in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It left the queue for the first time.
    Scheduled {
        /// The sequence.
        id: SeqId,
        /// When the step was planned.
        at: Millis,
    },
    /// A piece of one of its media was encoded. Media found in the cache make no event.
    Encoded {
        /// The sequence.
        id: SeqId,
        /// The medium.
        hash: MediaHash,
        /// Microseconds that the piece took.
        vision_us: u64,
    },
    /// Its prompt is computed: the first token follows.
    PrefillDone {
        /// The sequence.
        id: SeqId,
        /// When the result came.
        at: Millis,
    },
    /// It has one more token. An end token is told like any other.
    Token {
        /// The sequence.
        id: SeqId,
        /// The token.
        token: SampledToken,
    },
    /// It ended by itself. A cancelled sequence has no event.
    Finished {
        /// The sequence.
        id: SeqId,
        /// Why.
        reason: FinishReason,
        /// When the result came.
        at: Millis,
    },
    /// No token could be drawn for it. It has left, like one that finished.
    Failed {
        /// The sequence.
        id: SeqId,
        /// Why.
        failure: DrawFailure,
        /// When the result came.
        at: Millis,
    },
}

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// One of its end tokens was drawn: this one.
    StopToken(u32),
    /// It has as many tokens as it may have.
    Length,
}
