//! A sequence as the scheduler sees it.

use std::cmp::Reverse;

use super::types::{BlockId, Medium, NewSequence, SamplingParams, SeqId};

/// Who goes before whom: higher priority first, then who came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Order {
    pub priority: Reverse<i32>,
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
    pub media: Vec<Medium>,
    pub sampling: SamplingParams,
    /// The most tokens that it may have, with the prompt.
    pub max_tokens: u32,
    pub end_token_ids: Vec<u32>,
    /// The sequence that computes its prompt, which it then begins with. None once it has begun, or computes the prompt itself.
    pub leader: Option<SeqId>,
    /// Whether it was in a plan before.
    pub scheduled: bool,
    /// Whether its media are reserved.
    pub reserved: bool,
    /// Whether the shards know it, when the plans given out so far have run: it runs then, and must be released there.
    pub admitted: bool,
}

impl Sequence {
    /// `capacity_tokens` bounds what the sequence may ask for.
    pub fn new(new: NewSequence, arrival: u64, capacity_tokens: u32) -> Self {
        let num_prompt_tokens = new.token_ids.len() as u32;
        Self {
            order: Order { priority: Reverse(new.priority), arrival, id: new.id },
            token_ids: new.token_ids,
            num_prompt_tokens,
            num_drawing: 0,
            num_computed_tokens: 0,
            block_table: vec![],
            media: new.media,
            sampling: new.sampling,
            max_tokens: num_prompt_tokens.saturating_add(new.max_new_tokens).min(capacity_tokens),
            end_token_ids: new.end_token_ids,
            leader: None,
            scheduled: false,
            reserved: false,
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
