//! What comes into the scheduler: its configuration, sequences, and the reasons to refuse them.

use std::fmt;

use super::vision::VisionCosts;
use crate::limits::MAX_SECONDS_PER_GRID_T;

/// Identifies a sequence for as long as the server runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Identifies a block of a cache on the shards. Keys and values, and features, are numbered separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// Hash of a medium's pixels and grid.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MediaHash(pub [u8; 32]);

/// Sequences of different keys share no keys and values, whatever they have in common: it stands for whose they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrefixKey(pub [u8; 32]);

/// A moment, in milliseconds since any fixed one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millis(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for MediaHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What the scheduler may hand out, and the bounds of its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Blocks of keys and values that every rank has.
    pub kv_blocks: u32,
    /// Tokens in one of them.
    pub kv_block_tokens: u32,
    /// Blocks of vision features that every rank has. 0 where no media are served.
    pub feature_blocks: u32,
    /// Tokens in one of them.
    pub feature_block_tokens: u32,
    /// What vision encoding costs.
    pub vision: VisionCosts,
    /// The most tokens that one step computes, decodes, prompts and vision together.
    pub max_step_tokens: u32,
    /// The most sequences that run at once.
    pub max_step_sequences: u32,
    /// The most sequences that wait, forks included. Sequences that lost their blocks may come on top, so that at most
    /// `max_waiting + max_step_sequences` are alive.
    pub max_waiting: u32,
    /// The most tokens of one sequence, prompt and answer together.
    pub max_context_tokens: u32,
    /// Whether sequences begin with blocks that others left.
    pub prefix_cache: bool,
}

impl SchedulerConfig {
    /// The most tokens that a sequence can ever have: the context, or all of the cache where that is smaller.
    pub fn capacity_tokens(&self) -> u32 {
        self.max_context_tokens.min(self.kv_blocks.saturating_mul(self.kv_block_tokens))
    }
}

/// A sequence to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct NewSequence {
    /// Its id, never used before.
    pub id: SeqId,
    /// The prompt, media expanded to their runs of pad tokens.
    pub token_ids: Vec<u32>,
    /// The prompt's media in order.
    pub media: Vec<Medium>,
    /// How its tokens are drawn.
    pub sampling: SamplingParams,
    /// The most tokens to generate, at least 1. Reduced to what is left of [`SchedulerConfig::capacity_tokens`].
    pub max_new_tokens: u32,
    /// Tokens that end it.
    pub end_token_ids: Vec<u32>,
    /// Higher goes first: each step is worth ten seconds of waiting.
    pub priority: i32,
    /// Whose blocks it may begin with.
    pub prefix_key: PrefixKey,
    /// Ids of further sequences with this prompt, which is computed once for all. They are like this one, but drawn as its next
    /// branches.
    pub forks: Vec<SeqId>,
}

/// A picture or video in a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Medium {
    /// What it is found by.
    pub hash: MediaHash,
    /// Index of its first pad token.
    pub first_token: u32,
    /// Number of its pad tokens, as many for each temporal patch.
    pub num_tokens: u32,
    /// Patches in time, height and width.
    pub grid: [u32; 3],
    /// Seconds between temporal patches; 0 for a picture.
    pub seconds_per_grid_t: f64,
}

impl Medium {
    /// Whether its temporal patches stand at seconds that a video may have. Others would be positions that no shard takes,
    /// and a step that a shard refuses is the end of all.
    pub fn is_timely(&self) -> bool {
        let last = f64::from(self.grid[0].max(2) - 1) * self.seconds_per_grid_t;
        // Not a number is in no range.
        (0.0..=MAX_SECONDS_PER_GRID_T).contains(&last)
    }

    /// Index after its last pad token.
    pub fn end_token(&self) -> u32 {
        self.first_token + self.num_tokens
    }
}

/// How tokens are drawn. The scheduler only hands it on.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Below 1e-5: greedy.
    pub temperature: f32,
    /// Draw from this many most probable tokens; 0 is all.
    pub top_k: u32,
    /// Draw from the fewest of these that have this part of their probability; 1 is all.
    pub top_p: f32,
    /// Draw from tokens at least this fraction as probable as the most probable; 0 is all.
    pub min_p: f32,
    /// 1 is none.
    pub repetition_penalty: f32,
    /// 0 is none.
    pub presence_penalty: f32,
    /// 0 is none.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, `(token, bias)`.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the noise.
    pub seed: u64,
    /// Which of several answers to one prompt.
    pub branch: u32,
    /// Log-probabilities: none, or the chosen token's and of this many alternatives.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    /// Greedy, and nothing else.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
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

/// Why a sequence is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many wait as may wait. Later there may be room.
    #[error("{waiting} sequences wait already, and at most {max_waiting} may")]
    QueueFull {
        /// How many wait.
        waiting: u32,
        /// How many may.
        max_waiting: u32,
    },
    /// There are more sequences with one prompt than may ever wait.
    #[error("{sequences} sequences would wait, and at most {max_waiting} may")]
    TooManyForks {
        /// The sequence and its forks.
        sequences: u32,
        /// How many may wait.
        max_waiting: u32,
    },
    /// There is no room for one token after the prompt, ever.
    #[error(
        "a prompt of {prompt_tokens} tokens leaves no room to generate: the capacity is {capacity_tokens} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// See [`SchedulerConfig::capacity_tokens`].
        capacity_tokens: u32,
    },
    /// The features of its media do not fit together, ever.
    #[error("media need {needed_blocks} blocks of features, and there are {feature_blocks}")]
    TooManyFeatures {
        /// Blocks of features that the sequence's different media need.
        needed_blocks: u32,
        /// Blocks that there are.
        feature_blocks: u32,
    },
    /// The prompt has no token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No token is asked for.
    #[error("max_new_tokens is 0")]
    NoNewTokens,
    /// A medium has no tokens, or some that belong to no temporal patch, lies outside of the prompt, or overlaps the one before.
    #[error("medium {index} does not stand at its own place in the prompt")]
    MisplacedMedium {
        /// Which of the media.
        index: usize,
    },
    /// A medium's temporal patches are further apart than those of any video.
    #[error("medium {index} has times that no video has")]
    UntimelyMedium {
        /// Which of the media.
        index: usize,
    },
    /// The id is in use.
    #[error("sequence {0} exists already")]
    DuplicateId(SeqId),
}
