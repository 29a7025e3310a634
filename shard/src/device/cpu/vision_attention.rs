//! Attention without a mask, inside windows of any length.
#![allow(unsafe_code)]

use std::ops::Range;

use super::instruction_set::{InstructionSet, Kernel};
use super::memory::SharedPtr;
use super::online_softmax::{RowStates, TILE_TOKENS, Tile, state_len, transpose_rows};
use super::pool::Pool;
use super::scratch::{SCRATCH_LEN, Scratch};
use super::simd::{LANES, Simd};

/// Most rows of a task: with so many, turning keys into tiles costs little beside using them.
const MAX_TASK_ROWS: usize = 240;

/// A call's arguments.
#[derive(Clone)]
pub struct VisionAttention<'a> {
    /// `[rows, 3 * num_heads * head_dim]`, rotated.
    pub qkv: &'a [f32],
    pub num_heads: usize,
    pub head_dim: usize,
    /// Window `i` is rows `cu_seqlens[i]..cu_seqlens[i + 1]`.
    pub cu_seqlens: &'a [u32],
    /// Rows whose queries attend.
    pub rows: Range<usize>,
}

/// Scratch of one tile of keys and values.
fn tile_len(head_dim: usize) -> usize {
    TILE_TOKENS * (head_dim + head_dim.next_multiple_of(LANES))
}

impl VisionAttention<'_> {
    /// Writes `[rows.len(), num_heads * head_dim]`; rows outside all windows become zero.
    pub fn run(self, set: InstructionSet, pool: &Pool, scratch: &Scratch, out: &mut [f32]) {
        let cols = self.num_heads * self.head_dim;
        if cols == 0 {
            return;
        }
        let num_rows = self.qkv.len() / (3 * cols);
        assert!(self.rows.end <= num_rows, "rows {:?} of {num_rows}", self.rows);
        assert_eq!(out.len(), self.rows.len() * cols, "results of rows {:?}", self.rows);
        assert!(self.cu_seqlens.is_sorted(), "windows overlap: {:?}", self.cu_seqlens);
        let mut covered = self.rows.start;
        for window in self.cu_seqlens.windows(2) {
            let (start, end) = (window[0] as usize, window[1] as usize);
            assert!(end <= num_rows, "window {start}..{end} of {num_rows} rows");
            // As far as `rows` reach.
            let (from, to) = (start.clamp(covered, self.rows.end), end.clamp(covered, self.rows.end));
            out[(covered - self.rows.start) * cols..(from - self.rows.start) * cols].fill(0.0);
            covered = to;
        }
        out[(covered - self.rows.start) * cols..].fill(0.0);
        let max_rows = (1..=MAX_TASK_ROWS)
            .rev()
            .find(|&rows| state_len(rows, self.head_dim) + tile_len(self.head_dim) <= SCRATCH_LEN)
            .expect("scratch holds a tile and the state of a row");
        let mut tasks = Vec::new();
        for window in self.cu_seqlens.windows(2) {
            let window = window[0] as usize..window[1] as usize;
            let rows = window.start.max(self.rows.start)..window.end.min(self.rows.end);
            let pieces = rows.len().div_ceil(max_rows);
            for piece in 0..pieces {
                let start = rows.start + rows.len() * piece / pieces;
                let end = rows.start + rows.len() * (piece + 1) / pieces;
                tasks.extend((0..self.num_heads).map(|head| (window.clone(), start..end, head)));
            }
        }
        let out = SharedPtr::new(out);
        pool.run(tasks.len(), &|index, thread| {
            let (window, rows, head) = tasks[index].clone();
            // SAFETY: a thread runs one task at a time, and tasks write disjoint rows and heads of `out`.
            let scratch = unsafe { scratch.of_thread(thread) };
            set.run(WindowTask { call: &self, window, rows, head, scratch, out });
        });
    }
}

/// Some rows of a window, and one head.
struct WindowTask<'a> {
    call: &'a VisionAttention<'a>,
    window: Range<usize>,
    rows: Range<usize>,
    head: usize,
    scratch: &'a mut [f32],
    out: SharedPtr<f32>,
}

impl Kernel for WindowTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let &VisionAttention { qkv, num_heads, head_dim, .. } = self.call;
        let cols = num_heads * head_dim;
        // Part 0 is the queries, 1 the keys, 2 the values.
        let part =
            |row: usize, part: usize| &qkv[(3 * row + part) * cols + self.head * head_dim..][..head_dim];
        let scale = 1.0 / (head_dim as f32).sqrt();
        let first = self.rows.start;
        let num_rows = self.rows.len();
        let query = |row: usize| part(first + row, 0);
        let (mut states, rest) = RowStates::new::<S>(self.scratch, num_rows, head_dim, scale, query);
        let stride = head_dim.next_multiple_of(LANES);
        let (keys, rest) = rest.split_at_mut(TILE_TOKENS * head_dim);
        let values = &mut rest[..TILE_TOKENS * stride];
        for start in self.window.clone().step_by(TILE_TOKENS) {
            let num_tokens = (self.window.end - start).min(TILE_TOKENS);
            for token in 0..num_tokens {
                values[token * stride..][..head_dim].copy_from_slice(part(start + token, 2));
            }
            for half in (0..num_tokens).step_by(LANES) {
                let key = |token: usize| part(start + half + token, 1);
                let count = (num_tokens - half).min(LANES);
                transpose_rows::<S>(&mut keys[half..], TILE_TOKENS, head_dim, count, 1.0, key);
            }
            let tile =
                Tile { keys: keys.as_ptr(), values: values.as_ptr(), value_stride: stride, num_tokens };
            // SAFETY: the tile was written above; its values are padded to whole vectors.
            unsafe { states.attend::<S, f32>(tile, |_| num_tokens) };
        }
        for row in 0..num_rows {
            let start = (first + row - self.call.rows.start) * cols + self.head * head_dim;
            // SAFETY: this row and head are this task's alone, and within the result as `run` asserts.
            states.finish::<S>(row, unsafe { self.out.slice(start, head_dim) });
        }
    }
}

#[cfg(test)]
mod tests;
