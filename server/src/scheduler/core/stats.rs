//! How full a scheduler is, and what it has done.

use super::Scheduler;
use crate::scheduler::types::{Medium, SeqId};

/// How full the scheduler is, and what it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait, those that lost their blocks included.
    pub waiting: u32,
    /// Blocks of keys and values that are free.
    pub kv_free: u32,
    /// Of these, blocks that are kept for sequences with the same beginning.
    pub kv_kept: u32,
    /// Blocks of keys and values that belong to a sequence.
    pub kv_held: u32,
    /// Blocks of keys and values.
    pub kv_total: u32,
    /// Blocks of features that are free.
    pub features_free: u32,
    /// Blocks of features kept for later.
    pub features_cached: u32,
    /// Blocks of features that sequences refer to.
    pub features_held: u32,
    /// Blocks of features.
    pub features_total: u32,
    /// What it has done.
    pub totals: Totals,
}

/// What a scheduler has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Steps whose results came.
    pub steps: u64,
    /// Tokens that were drawn and told.
    pub tokens: u64,
    /// How often a sequence lost its blocks.
    pub preemptions: u64,
    /// How often everything was taken back, because the shards forgot it.
    pub replays: u64,
    /// Tokens of prompts that were looked up in the prefix cache, when they began.
    pub prefix_tokens_looked_up: u64,
    /// Of these, tokens that others had computed.
    pub prefix_tokens_found: u64,
    /// Media of prompts that were looked up in the cache of features, when the prompts began. Those that the prefix cache has are not.
    pub media_looked_up: u64,
    /// Of these, media that were encoded for others.
    pub media_found: u64,
}

impl Scheduler {
    /// How full the scheduler is, and what it has done. Cheap enough for every step.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            kv_free: self.kv.num_free(),
            kv_kept: self.kv.num_kept(),
            kv_held: self.kv.num_held(),
            kv_total: self.kv.total(),
            features_free: self.features.num_free(),
            features_cached: self.features.num_cached(),
            features_held: self.features.num_held(),
            features_total: self.features.total(),
            totals: self.totals,
        }
    }

    /// Counts what a sequence that begins for the first time has found. What it finds when it comes back is its own, and would make
    /// the caches look better the less room they have.
    pub(super) fn count_lookups(&mut self, id: SeqId) {
        let (sequence, totals) = (&self.sequences[&id], &mut self.totals);
        if self.config.prefix_cache {
            totals.prefix_tokens_looked_up += u64::from(sequence.num_prompt_tokens);
            totals.prefix_tokens_found += u64::from(sequence.num_computed_tokens);
        }
        let is_encoded = |medium: &&Medium| self.features.is_encoded(&medium.hash);
        totals.media_looked_up += sequence.reserved.len() as u64;
        totals.media_found += sequence.reserved.iter().filter(is_encoded).count() as u64;
    }
}
