//! A sequence as the scheduler sees it.

use super::{
    prefix::Names,
    types::{BlockId, Medium, Millis, NewSequence, SamplingParams, SeqId},
};

/// What a step of priority is worth, in milliseconds of waiting.
const PRIORITY_MS: i64 = 10_000;

/// Who goes before whom: who came first, where each step of priority is a head start. So nobody waits for ever behind those of
/// higher priority who keep coming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Order {
    /// When it came, in milliseconds, less its head start.
    pub since: i64,
    pub arrival: u64,
    pub id: SeqId,
}

/// A sequence between its submission and its release.
#[derive(Debug)]
pub(super) struct Sequence {
    pub order: Order,
    /// The prompt and what came after it, as far as it is known.
    pub token_ids: Vec<u32>,
    pub num_prompt_tokens: u32,
    /// Tokens that are drawn by the plans in flight, and not known yet.
    pub num_drawing: u32,
    /// Tokens whose keys and values are in its blocks, when the plans given out so far have run.
    pub num_computed_tokens: u32,
    pub block_table: Vec<BlockId>,
    /// Of the blocks that its known tokens fill.
    pub names: Names,
    pub media: Vec<Medium>,
    pub sampling: SamplingParams,
    /// The most tokens that it may have, with the prompt.
    pub max_tokens: u32,
    pub end_token_ids: Vec<u32>,
    /// The sequence that computes its prompt, which it then begins with. None once it has begun, or computes the prompt itself.
    pub leader: Option<SeqId>,
    /// Whether it was in a plan before.
    pub scheduled: bool,
    /// Its media that are reserved: those that it needed when it began.
    pub reserved: Vec<Medium>,
    /// Whether the shards know it, when the plans given out so far have run: it runs then, and must be released there.
    pub admitted: bool,
}

impl Sequence {
    /// A sequence that comes at `now`, as number `arrival`. `capacity_tokens` bounds what it may ask for.
    pub fn new(new: NewSequence, now: Millis, arrival: u64, capacity_tokens: u32) -> Self {
        let num_prompt_tokens = new.token_ids.len() as u32;
        Self {
            order: Order { since: now.0 as i64 - i64::from(new.priority) * PRIORITY_MS, arrival, id: new.id },
            token_ids: new.token_ids,
            num_prompt_tokens,
            num_drawing: 0,
            num_computed_tokens: 0,
            block_table: vec![],
            names: Names::new(new.prefix_key),
            media: new.media,
            sampling: new.sampling,
            max_tokens: num_prompt_tokens.saturating_add(new.max_new_tokens).min(capacity_tokens),
            end_token_ids: new.end_token_ids,
            leader: None,
            scheduled: false,
            reserved: vec![],
            admitted: false,
        }
    }

    /// Tokens that it has when the plans given out so far have run.
    pub fn num_tokens(&self) -> u32 {
        self.token_ids.len() as u32 + self.num_drawing
    }

    /// Whether no token is left to draw, so that nothing more is to be computed.
    pub fn is_complete(&self) -> bool {
        self.num_tokens() >= self.max_tokens
    }

    /// Whether exactly the token drawn last is to be computed.
    pub fn is_decoding(&self) -> bool {
        self.num_computed_tokens >= self.num_prompt_tokens
            && self.num_computed_tokens + 1 == self.num_tokens()
    }

    /// Forgets what the shards have of it: it is computed again from its first token.
    pub fn restart(&mut self) -> Vec<BlockId> {
        self.num_computed_tokens = 0;
        self.admitted = false;
        std::mem::take(&mut self.block_table)
    }

    /// Blocks missing for the first `num_tokens` tokens.
    pub fn blocks_missing(&self, num_tokens: u32, block_tokens: u32) -> u32 {
        num_tokens.div_ceil(block_tokens).saturating_sub(self.block_table.len() as u32)
    }
}
