//! How full a scheduler is, and what it has done.

use super::Scheduler;

/// How full the scheduler is.
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
    /// How often a sequence lost its blocks so far.
    pub num_preemptions: u64,
    /// Tokens of all sequences so far when they began.
    pub tokens_begun: u64,
    /// Of these, tokens that others had computed.
    pub tokens_found: u64,
}

impl Scheduler {
    /// How full the scheduler is.
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
            num_preemptions: self.num_preemptions,
            tokens_begun: self.tokens_begun,
            tokens_found: self.tokens_found,
        }
    }
}
