//! `x W^T + bias`, for one row or thousands, over packed weights.
//!
//! Each output element is the bias plus the sums of blocks of [`BLOCK_INPUTS`] inputs, each block summed from zero in the
//! order of the inputs. That order holds for any number of rows, so a row's result never depends on its company; and
//! sums of sums round less than one long chain.
#![allow(unsafe_code)]
// Rows and panels of a register tile are counted, in all of its arrays at once.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::dot::{Dot, FmaBf16, FmaF32, PairBf16};
use super::instruction_set::{InstructionSet, Kernel};
use super::memory::SharedPtr;
use super::packed::PackedLinear;
use super::pool::Pool;
use super::scratch::{SCRATCH_LEN, Scratch};
use super::simd::{LANES, Simd};
use crate::device::DType;
use crate::progress::Counter;

/// Inputs of one partial sum: with them, a tile of activations and one of weights stay in the first-level cache.
pub const BLOCK_INPUTS: usize = 256;
/// Pairs from a row of packed activations to the next. The odd part spreads rows over the sets of the cache.
const ROW_PAIRS: usize = BLOCK_INPUTS / 2 + 8;
/// Most rows that are packed at a time: a multiple of every register tile, and no more than the second-level cache holds.
const BLOCK_ROWS: usize = 192;
/// Up to so many rows, panels are read in wider groups from their start to their end.
const FEW_ROWS: usize = 4;
/// Fewer products than this, some microseconds, are not worth another thread.
const MIN_TASK_PRODUCTS: usize = 1 << 16;
/// How far ahead few rows ask for weights.
const PREFETCH_BYTES: usize = 1024;

const _: () = assert!(BLOCK_ROWS * ROW_PAIRS * 2 <= SCRATCH_LEN);

/// `out = x W^T + bias`, over all threads.
pub fn linear(
    set: InstructionSet,
    pool: &Pool,
    scratch: &Scratch,
    x: &[f32],
    weight: &PackedLinear,
    out: &mut [f32],
) {
    let rows = out.len() / weight.outputs.max(1);
    if rows == 0 || weight.outputs == 0 {
        return;
    }
    assert_eq!(x.len(), rows * weight.inputs);
    assert_eq!(out.len(), rows * weight.outputs);
    let (plan, progress) = (Plan::new(rows, weight, pool.num_threads()), pool.progress());
    let out = SharedPtr::new(out);
    pool.run(plan.num_tasks(), &|task, thread| {
        let (rows, panels) = plan.task(task);
        // SAFETY: a thread runs one task at a time, and tasks write disjoint parts of `out`.
        let scratch = unsafe { scratch.of_thread(thread) };
        let pieces = progress.pieces_of(thread);
        set.run(LinearTask { x, weight, out, rows, panels, scratch, pieces });
    });
}

/// How a call is cut into tasks: blocks of rows, and runs of panels. Results do not depend on it.
struct Plan {
    rows: usize,
    panels: usize,
    panels_per_task: usize,
}

impl Plan {
    fn new(rows: usize, weight: &PackedLinear, num_threads: usize) -> Self {
        let panels = weight.outputs.div_ceil(LANES);
        let row_blocks = rows.div_ceil(BLOCK_ROWS);
        let runs = if num_threads == 1 { 1 } else { (4 * num_threads).div_ceil(row_blocks) };
        let panel_products = LANES * weight.inputs.max(1) * rows.min(BLOCK_ROWS);
        let worthwhile = MIN_TASK_PRODUCTS.div_ceil(panel_products);
        let panels_per_task = panels.div_ceil(runs).max(worthwhile).next_multiple_of(8);
        Self { rows, panels, panels_per_task }
    }

    fn num_tasks(&self) -> usize {
        self.rows.div_ceil(BLOCK_ROWS) * self.panels.div_ceil(self.panels_per_task)
    }

    fn task(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let row_blocks = self.rows.div_ceil(BLOCK_ROWS);
        let (row, panel) = (task % row_blocks * BLOCK_ROWS, task / row_blocks * self.panels_per_task);
        (row..(row + BLOCK_ROWS).min(self.rows), panel..(panel + self.panels_per_task).min(self.panels))
    }
}

/// Some rows and some panels, by one thread.
struct LinearTask<'a> {
    x: &'a [f32],
    weight: &'a PackedLinear,
    out: SharedPtr<f32>,
    rows: Range<usize>,
    panels: Range<usize>,
    scratch: &'a mut [f32],
    /// Counts groups of panels: a task of many rows and all of a layer's outputs takes seconds.
    pieces: &'a Counter,
}

impl Kernel for LinearTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        match self.weight.dtype {
            DType::F32 => self.run_with::<FmaF32<S>>(),
            DType::Bf16 if S::HAS_BF16_DOT => self.run_with::<PairBf16<S>>(),
            DType::Bf16 => self.run_with::<FmaBf16<S>>(),
        }
    }
}

impl LinearTask<'_> {
    #[inline(always)]
    fn run_with<D: Dot>(self) {
        let inputs = self.weight.inputs;
        let num_rows = self.rows.len();
        let blocks = inputs.div_ceil(BLOCK_INPUTS).max(1);
        let block_pairs = num_rows * ROW_PAIRS;
        let capacity = size_of_val(self.scratch) / size_of::<D::Pair>();
        let packed = self.scratch.as_mut_ptr().cast::<D::Pair>();
        let first_row = self.rows.start;
        let x = |row: usize| &self.x[(first_row + row) * inputs..(first_row + row + 1) * inputs];
        let tiles = Tiles {
            weight: self.weight.weight.as_ptr().cast::<D::Weight>(),
            panel_len: self.weight.panel_len(),
            bias: &self.weight.bias,
            // SAFETY: the rows of this task are rows of `out`.
            out: unsafe { self.out.get().add(first_row * self.weight.outputs) },
            outputs: self.weight.outputs,
            inputs,
        };
        if num_rows <= FEW_ROWS && blocks * block_pairs <= capacity {
            // All of a group's weights in one go: the memory is read in long runs.
            for block in 0..blocks {
                // SAFETY: `blocks * block_pairs` pairs fit, as tested above.
                unsafe { pack::<D>(packed.add(block * block_pairs), num_rows, block, inputs, x) };
            }
            let width = if D::S::TILE_ROWS < 8 { 4 / num_rows.next_power_of_two() } else { 8 };
            let width = if num_rows > 2 { width.min(4) } else { width };
            for group in groups(self.panels, width) {
                for block in 0..blocks {
                    // SAFETY: the block was packed above; the group is one of this task's.
                    unsafe {
                        tiles.run::<D>(packed.add(block * block_pairs), num_rows, block, group.clone())
                    };
                }
                self.pieces.count();
            }
            return;
        }
        let tile_count = num_rows.div_ceil(D::S::TILE_ROWS);
        let width = if D::S::TILE_ROWS < 8 { 1 } else { 2 };
        for block in 0..blocks {
            // SAFETY: a block of rows fits by the assertion on `BLOCK_ROWS`.
            unsafe { pack::<D>(packed, num_rows, block, inputs, x) };
            for group in groups(self.panels.clone(), width) {
                for tile in 0..tile_count {
                    let start = num_rows * tile / tile_count;
                    let end = num_rows * (tile + 1) / tile_count;
                    // SAFETY: the rows were packed above; the group is one of this task's.
                    unsafe {
                        let tiles = tiles.skip_rows(start);
                        tiles.run::<D>(packed.add(start * ROW_PAIRS), end - start, block, group.clone());
                    }
                }
                self.pieces.count();
            }
        }
    }
}

/// `panels` in groups of `width`, and what is left one by one.
#[inline(always)]
fn groups(panels: Range<usize>, width: usize) -> impl Iterator<Item = Range<usize>> {
    let whole = panels.len() / width.max(1) * width;
    let singles = panels.start + whole..panels.end;
    (panels.start..singles.start)
        .step_by(width.max(1))
        .map(move |panel| panel..panel + width)
        .chain(singles.map(|panel| panel..panel + 1))
}

/// Packs one block of inputs of all rows, an odd last input with a zero.
///
/// # Safety
/// `to` must have room for `rows * ROW_PAIRS` pairs.
#[inline(always)]
unsafe fn pack<'x, D: Dot>(
    to: *mut D::Pair,
    rows: usize,
    block: usize,
    inputs: usize,
    x: impl Fn(usize) -> &'x [f32],
) {
    let range = block * BLOCK_INPUTS..((block + 1) * BLOCK_INPUTS).min(inputs);
    for row in 0..rows {
        let x = &x(row)[range.clone()];
        for (pair, x) in x.chunks(2).enumerate() {
            let value = D::pair(x[0], x.get(1).copied().unwrap_or(0.0));
            // SAFETY: a block has at most `ROW_PAIRS` pairs.
            unsafe { to.add(row * ROW_PAIRS + pair).write(value) };
        }
    }
}

/// What all register tiles of a task share.
#[derive(Clone, Copy)]
struct Tiles<'a, W> {
    weight: *const W,
    panel_len: usize,
    bias: &'a [f32],
    /// First output of the first row.
    out: *mut f32,
    outputs: usize,
    inputs: usize,
}

impl<W: Copy> Tiles<'_, W> {
    /// The same, with a later first row.
    #[inline(always)]
    unsafe fn skip_rows(self, row: usize) -> Self {
        // SAFETY: the caller gives a row of the task.
        Self { out: unsafe { self.out.add(row * self.outputs) }, ..self }
    }

    /// Adds block `block` for `rows` packed rows and the panels of a group, whatever tile that is.
    #[inline(always)]
    unsafe fn run<D: Dot<Weight = W>>(
        self,
        x: *const D::Pair,
        rows: usize,
        block: usize,
        group: Range<usize>,
    ) {
        macro_rules! tile {
            ($(($rows:literal, $panels:literal)),*) => {
                match (rows, group.len()) {
                    // SAFETY: as this function's; the arm has the rows and panels that were asked for.
                    $(($rows, $panels) => unsafe { self.tile::<D, $rows, $panels>(x, block, group.start) },)*
                    _ => unreachable!("no register tile of {rows} rows and {} panels", group.len()),
                }
            };
        }
        if D::S::TILE_ROWS < 8 {
            tile!((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1));
        } else {
            tile!(
                (1, 1),
                (1, 2),
                (1, 8),
                (2, 1),
                (2, 2),
                (2, 8),
                (3, 1),
                (3, 2),
                (3, 4),
                (4, 1),
                (4, 2),
                (4, 4),
                (5, 1),
                (5, 2),
                (6, 1),
                (6, 2),
                (7, 1),
                (7, 2),
                (8, 1),
                (8, 2),
                (9, 1),
                (9, 2),
                (10, 1),
                (10, 2),
                (11, 1),
                (11, 2),
                (12, 1),
                (12, 2)
            );
        }
    }

    /// Adds block `block` for `R` packed rows and `P` panels, summed in registers.
    #[inline(always)]
    unsafe fn tile<D: Dot<Weight = W>, const R: usize, const P: usize>(
        self,
        x: *const D::Pair,
        block: usize,
        panel: usize,
    ) {
        let start = block * BLOCK_INPUTS;
        let pairs = (self.inputs - start).min(BLOCK_INPUTS).div_ceil(2);
        let mut acc = [[D::S::splat(0.0); P]; R];
        // SAFETY: the panels are panels of the weight, each with all its inputs; `x` has `R` packed rows.
        unsafe {
            let weight = self.weight.add(panel * self.panel_len + start * LANES);
            for pair in 0..pairs {
                let mut w = [D::load(weight.add(pair * 2 * LANES)); P];
                for p in 0..P {
                    let at = weight.add(p * self.panel_len + pair * 2 * LANES);
                    w[p] = D::load(at);
                    if R <= FEW_ROWS {
                        D::S::prefetch(at.cast::<u8>().wrapping_add(PREFETCH_BYTES));
                    }
                }
                for r in 0..R {
                    let x = D::splat(x.add(r * ROW_PAIRS + pair));
                    for p in 0..P {
                        acc[r][p] = D::accumulate(acc[r][p], x, w[p]);
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    let first = (panel + p) * LANES;
                    let len = (self.outputs - first).min(LANES);
                    let out = std::slice::from_raw_parts_mut(self.out.add(r * self.outputs + first), len);
                    let before = if block == 0 {
                        D::S::load_slice(&self.bias[first..first + LANES])
                    } else {
                        D::S::load_slice(out)
                    };
                    D::S::store_slice(out, D::S::add(before, acc[r][p]));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
