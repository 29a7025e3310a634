//! Causal attention over the paged cache.
#![allow(unsafe_code)]

use std::ops::Range;

use super::instruction_set::{InstructionSet, Kernel};
use super::kv_cache::KvCache;
use super::memory::SharedPtr;
use super::online_softmax::{Element, RowStates, TILE_TOKENS, Tile, state_len};
use super::pool::Pool;
use super::scratch::{SCRATCH_LEN, Scratch};
use super::simd::Simd;
use crate::device::{AttentionHeads, DType, SequenceRows};

/// Most rows (a token and a query head) of a task: enough to share the reading of keys and values.
const MAX_TASK_ROWS: usize = 96;

/// A call's arguments.
#[derive(Clone, Copy)]
pub struct PagedAttention<'a> {
    /// `[rows, (num_query + 2 num_kv) * head_dim]`, rotated.
    pub qkv: &'a [f32],
    pub heads: &'a AttentionHeads,
    pub cache: &'a KvCache,
    pub layer: usize,
    pub sequences: &'a [SequenceRows],
}

impl PagedAttention<'_> {
    /// Writes `[rows, num_query * head_dim]`.
    pub fn run(self, set: InstructionSet, pool: &Pool, scratch: &Scratch, out: &mut [f32]) {
        let heads = self.heads;
        self.cache.check_heads(heads);
        if heads.num_query() == 0 || heads.head_dim == 0 {
            return;
        }
        let out_cols = heads.num_query() * heads.head_dim;
        let qkv_cols = out_cols + 2 * heads.num_kv * heads.head_dim;
        for sequence in self.sequences {
            let num_tokens = sequence.num_computed_tokens + sequence.rows.len();
            assert!(
                sequence.block_table.len() * TILE_TOKENS >= num_tokens,
                "a sequence of {num_tokens} tokens has {} blocks",
                sequence.block_table.len()
            );
            assert!(sequence.rows.end * qkv_cols <= self.qkv.len(), "rows beyond the queries");
            assert!(sequence.rows.end * out_cols <= out.len(), "rows beyond the result");
        }
        let max_rows = (1..=MAX_TASK_ROWS)
            .rev()
            .find(|&rows| state_len(rows, heads.head_dim) <= SCRATCH_LEN)
            .expect("scratch holds the state of a row");
        let tasks = self.tasks(max_rows);
        let out = SharedPtr::new(out);
        pool.run(tasks.len(), &|index, thread| {
            let task = &tasks[index];
            // SAFETY: a thread runs one task at a time, and tasks write disjoint rows and heads of `out`.
            let scratch = unsafe { scratch.of_thread(thread) };
            set.run(AttentionTask { call: self, task, scratch, out });
        });
    }

    /// Cuts the rows of each sequence, for each run of query heads that share a kv head.
    fn tasks(&self, max_rows: usize) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (sequence, rows) in self.sequences.iter().enumerate() {
            let mut query = 0;
            while query < self.heads.num_query() {
                let kv_head = self.heads.kv_of_query[query];
                let sharing = self.heads.kv_of_query[query..].iter().take_while(|&&kv| kv == kv_head).count();
                let sharing = sharing.min(max_rows);
                let tokens = max_rows / sharing;
                // The last tokens see most: they go first, so that no thread is left with them at the end.
                for tile in (0..rows.rows.len().div_ceil(tokens)).rev() {
                    let start = tile * tokens;
                    let tokens = start..(start + tokens).min(rows.rows.len());
                    tasks.push(Task { sequence, kv_head, queries: query..query + sharing, tokens });
                }
                query += sharing;
            }
        }
        tasks
    }
}

/// Some tokens of a sequence (counted from the first row of the step) and query heads that share a kv head.
struct Task {
    sequence: usize,
    kv_head: usize,
    queries: Range<usize>,
    tokens: Range<usize>,
}

struct AttentionTask<'a> {
    call: PagedAttention<'a>,
    task: &'a Task,
    scratch: &'a mut [f32],
    out: SharedPtr<f32>,
}

impl Kernel for AttentionTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        match self.call.cache.dtype {
            DType::F32 => self.run_with::<S, f32>(),
            DType::Bf16 => self.run_with::<S, u16>(),
        }
    }
}

impl AttentionTask<'_> {
    #[inline(always)]
    fn run_with<S: Simd, E: Element>(self) {
        let PagedAttention { qkv, heads, cache, layer, sequences } = self.call;
        let Task { sequence, kv_head, ref queries, ref tokens } = *self.task;
        let sequence = &sequences[sequence];
        let head_dim = heads.head_dim;
        let cols = (heads.num_query() + 2 * heads.num_kv) * head_dim;
        let sharing = queries.len();
        // Row `i` is token `i / sharing` and query head `i % sharing`.
        let rows = tokens.len() * sharing;
        let place =
            |row: usize| (sequence.rows.start + tokens.start + row / sharing, queries.start + row % sharing);
        let position = |row: usize| sequence.num_computed_tokens + tokens.start + row / sharing;
        let query = |row: usize| {
            let (row, head) = place(row);
            &qkv[row * cols + head * head_dim..][..head_dim]
        };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (mut states, _) = RowStates::new::<S>(self.scratch, rows, head_dim, scale, query);
        let num_tokens = position(rows - 1) + 1;
        let cached = cache.region.as_ptr().cast::<E>().cast_const();
        for tile in 0..num_tokens.div_ceil(TILE_TOKENS) {
            let start = tile * TILE_TOKENS;
            let block = sequence.block_table[tile] as usize;
            // SAFETY: `head_start` asserts that the block is in the cache, which no one writes during the call; regions
            // may be read a vector beyond their end.
            unsafe {
                let keys = cached.add(cache.head_start(layer, block, kv_head));
                let tile = Tile {
                    keys,
                    values: keys.add(head_dim * TILE_TOKENS),
                    value_stride: head_dim,
                    num_tokens: (num_tokens - start).min(TILE_TOKENS),
                };
                states.attend::<S, E>(tile, |row| (position(row) + 1).saturating_sub(start).min(TILE_TOKENS));
            }
        }
        for row in 0..rows {
            let (to_row, head) = place(row);
            let start = (to_row * heads.num_query() + head) * head_dim;
            // SAFETY: this row and head are this task's alone, and within the result as `run` asserts.
            states.finish::<S>(row, unsafe { self.out.slice(start, head_dim) });
        }
    }
}

#[cfg(test)]
mod tests;
