//! What a step asks of a rank, what a rank answers, and how a step can be wrong.
//!
//! These are the domain's own types: protobuf ends at the service. Plans carry no token that a rank drew itself.

use std::fmt;

use thiserror::Error;

use crate::device::{DeviceError, Truncation};

/// Id of a sequence, given by the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence {}", self.0)
    }
}

/// Hash of a medium's pixels and grid.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MediaHash(pub [u8; 32]);

impl fmt::Debug for MediaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for MediaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to tell media apart in a message.
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Shape of a medium in patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Temporal patches.
    pub t: u32,
    /// Patches down.
    pub h: u32,
    /// Patches across.
    pub w: u32,
}

impl Grid {
    /// Patches in all.
    pub fn num_patches(self) -> u64 {
        u64::from(self.t).saturating_mul(u64::from(self.h)).saturating_mul(u64::from(self.w))
    }

    /// Time, height and width.
    pub fn to_array(self) -> [u32; 3] {
        [self.t, self.h, self.w]
    }
}

/// One step, the same for every rank. Done in the order: releases, evictions, admissions, encodes, copies, chunks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Sequences that leave.
    pub releases: Vec<SeqId>,
    /// Media whose features are no longer kept, complete or not, nor pixels that still wait.
    pub evictions: Vec<MediaHash>,
    /// Sequences that enter.
    pub admissions: Vec<Admission>,
    /// Vision encoding to do.
    pub encodes: Vec<Encode>,
    /// Blocks of keys and values to copy, `(source, target)`.
    pub copies: Vec<(u32, u32)>,
    /// Tokens to compute.
    pub chunks: Vec<Chunk>,
}

/// A sequence that enters.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// Its id.
    pub id: SeqId,
    /// Its prompt and, after a preemption or on a replay, what it had generated.
    pub token_ids: Vec<u32>,
    /// How many of these are the prompt.
    pub num_prompt_tokens: usize,
    /// Media of the prompt, in order.
    pub media: Vec<MediaSpan>,
    /// How its tokens are drawn.
    pub sampling: Sampling,
    /// How many of its first tokens have keys and values already.
    pub num_computed_tokens: usize,
    /// The blocks that these lie in: full ones, which are shared, and at last one of its own that a copy of this step fills.
    pub blocks: Vec<u32>,
}

/// Where a medium stands in a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct MediaSpan {
    /// The medium.
    pub hash: MediaHash,
    /// Index of its first token.
    pub first_token: usize,
    /// Its shape.
    pub grid: Grid,
    /// Seconds between temporal patches of a video; `None` for a picture.
    pub seconds_per_grid_t: Option<f64>,
}

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// `None` is greedy.
    pub temperature: Option<f32>,
    /// Which tokens may be drawn; `None`: all. None with a greedy draw.
    pub truncation: Option<Truncation>,
    /// 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens of the answer.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens of the answer, times their count.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, `(token, bias)`.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the noise.
    pub seed: u64,
    /// Which of several answers to one prompt.
    pub branch: u32,
    /// How many of the most probable tokens to report; `None`: no log-probabilities.
    pub logprobs: Option<usize>,
}

impl Default for Sampling {
    /// Greedy, and nothing else.
    fn default() -> Self {
        Self {
            temperature: None,
            truncation: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            branch: 0,
            logprobs: None,
        }
    }
}

/// A piece of the vision encoding of a medium. One medium is in work at a time, its pieces in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Encode {
    /// The medium, whose pixels wait.
    pub hash: MediaHash,
    /// Blocks of the feature cache that its features go to, in order; none but with the first piece.
    pub feature_blocks: Vec<u32>,
    /// How far the work is, in the units of [`crate::model::stages`].
    pub from: u64,
    /// How far it is to get.
    pub to: u64,
}

/// Tokens of one sequence to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// The sequence.
    pub id: SeqId,
    /// Index of the first token, which is how many are computed.
    pub start: usize,
    /// How many.
    pub length: usize,
    /// Blocks that its table grows by.
    pub new_blocks: Vec<u32>,
    /// Draw up to this many tokens after the chunk; 0 where known tokens go on.
    pub max_new_tokens: usize,
}

/// What a rank answers to a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// Hash of the replicated state: final hidden rows, drawn tokens, lengths of sequences.
    pub state_hash: u64,
    /// Tokens drawn, in the order of the chunks that asked for them.
    pub sampled: Vec<Sampled>,
    /// Microseconds of vision encoding.
    pub vision_us: u64,
    /// Microseconds of the whole step.
    pub step_us: u64,
}

/// Tokens drawn for a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The sequence.
    pub id: SeqId,
    /// The tokens, in order.
    pub tokens: Vec<SampledToken>,
    /// Why no token follows these where one was asked for. The sequence is to be released. It counts a token all the same, so that
    /// a step that is on its way already can be done, for nothing.
    pub failure: Option<DrawFailure>,
}

/// Why no token could be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrawFailure {
    /// The model gave a logit that is infinite or not a number.
    LogitsNotFinite,
}

/// A token drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub token_id: u32,
    /// Its log-probability by the model's own distribution, if asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens and their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a step could not be done.
#[derive(Debug, Error)]
pub enum StepError {
    /// The step is wrong: a fault of the server.
    #[error("{field}: {fault}")]
    Invalid {
        /// Path of the field, as in `chunks[2].new_blocks[0]`.
        field: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// The device failed, or another rank did.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl StepError {
    /// A fault of `field`.
    pub fn invalid(field: impl Into<String>, fault: Fault) -> Self {
        Self::Invalid { field: field.into(), fault }
    }
}

/// What is wrong with a field of a step.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Fault {
    /// A sequence that never entered, or left.
    #[error("{0} is unknown")]
    UnknownSequence(SeqId),
    /// A sequence that entered already, or occurs twice.
    #[error("{0} occurs twice")]
    RepeatedSequence(SeqId),
    /// A medium of which neither pixels nor features are here.
    #[error("medium {0} is unknown")]
    UnknownMedium(MediaHash),
    /// A medium that has features already.
    #[error("medium {0} is encoded already")]
    RepeatedMedium(MediaHash),
    /// A medium that is not the one in work.
    #[error("medium {0} is not in work")]
    NotInWork(MediaHash),
    /// A medium that is in work while another one is to begin.
    #[error("medium {0} is still in work")]
    StillInWork(MediaHash),
    /// A medium whose tokens are computed before its features are.
    #[error("medium {0} is not encoded")]
    NotEncoded(MediaHash),
    /// A medium in a prompt with another grid than its pixels have.
    #[error("medium {hash} has the grid {actual:?}")]
    OtherGrid {
        /// The medium.
        hash: MediaHash,
        /// The grid that came with its pixels.
        actual: Grid,
    },
    /// An index or a count past its bound.
    #[error("{value} is not below {bound}")]
    OutOfRange {
        /// The value.
        value: u64,
        /// Its bound, exclusive.
        bound: u64,
    },
    /// A number other than the one that must stand here.
    #[error("is {actual}, must be {expected}")]
    Mismatch {
        /// What is there.
        actual: u64,
        /// What must be there.
        expected: u64,
    },
    /// Too many or too few of something.
    #[error("has {actual}, needs {least} to {most}")]
    Count {
        /// How many there are.
        actual: u64,
        /// How few there may be.
        least: u64,
        /// How many there may be.
        most: u64,
    },
    /// A block that belongs to a sequence or a medium already, or is given twice.
    #[error("block {0} is taken")]
    TakenBlock(u32),
    /// A block that nobody holds.
    #[error("block {0} is free")]
    FreeBlock(u32),
    /// A block that several sequences hold, which nobody may write.
    #[error("block {0} is shared")]
    SharedBlock(u32),
    /// A block without the keys and values that are to be read from it.
    #[error("block {block} has keys and values of {actual} tokens, needs {needed}")]
    NotComputed {
        /// The block.
        block: u32,
        /// Tokens computed in it, from its first.
        actual: u32,
        /// Tokens that are needed.
        needed: u32,
    },
    /// A grid that cannot be cut into tokens.
    #[error("the grid {grid:?} is empty or no multiple of the merge size {merge_size}")]
    UnevenGrid {
        /// The grid.
        grid: Grid,
        /// Patches on a side of a token.
        merge_size: u32,
    },
    /// A number outside of what has a meaning.
    #[error("{0} is out of range")]
    Number(f64),
    /// A hash of the wrong length.
    #[error("has {0} bytes, must have 32")]
    HashLength(usize),
    /// A field that must be there.
    #[error("is missing")]
    Missing,
    /// Media that do not fit the sequence.
    #[error(transparent)]
    Positions(#[from] crate::model::positions::PositionError),
}

/// Checks that `value` is below `bound`.
pub(crate) fn below(value: u64, bound: u64) -> Result<(), Fault> {
    if value < bound { Ok(()) } else { Err(Fault::OutOfRange { value, bound }) }
}

/// Checks that `actual` is within `least..=most`.
pub(crate) fn count(actual: usize, least: usize, most: usize) -> Result<(), Fault> {
    if (least..=most).contains(&actual) {
        return Ok(());
    }
    Err(Fault::Count { actual: actual as u64, least: least as u64, most: most as u64 })
}

/// Names the field of a fault.
pub(crate) trait InField<T> {
    /// Turns a fault into an error of the field that `field` names.
    fn in_field(self, field: impl FnOnce() -> String) -> Result<T, StepError>;
}

impl<T> InField<T> for Result<T, Fault> {
    fn in_field(self, field: impl FnOnce() -> String) -> Result<T, StepError> {
        self.map_err(|fault| StepError::invalid(field(), fault))
    }
}
