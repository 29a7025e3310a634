//! Attention of some rows over one tile of tokens after another, without ever holding all scores.
//!
//! A row's largest score, sum and weighted values are carried from tile to tile. Each row's numbers depend only on its own
//! query and on the tokens that it sees, in order; rows share nothing but the reading of keys and values.
#![allow(unsafe_code)]
// Rows and vectors of a register tile are counted, in all of its arrays at once.
#![allow(clippy::needless_range_loop)]

use super::simd::{LANES, Simd, exp};

/// Tokens of a tile.
pub const TILE_TOKENS: usize = crate::device::KV_BLOCK_TOKENS;
/// Most rows of a register tile, over all instruction sets.
const MAX_TILE_ROWS: usize = 12;

const _: () = assert!(TILE_TOKENS == 2 * LANES);

/// An element of keys and values.
pub trait Element: Copy + 'static {
    /// Reads 16 elements.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 elements.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: as this function's.
        unsafe { S::load(p) }
    }
}

/// The bits of a bf16.
impl Element for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: as this function's.
        unsafe { S::load_bf16(p) }
    }
}

/// Keys `[head_dim][TILE_TOKENS]` and values `[tokens][value_stride]` of one tile.
#[derive(Clone, Copy)]
pub struct Tile<E> {
    /// First key.
    pub keys: *const E,
    /// First value.
    pub values: *const E,
    /// Elements from a token's values to the next token's; after the last, 16 more must be readable.
    pub value_stride: usize,
    /// Tokens whose values may be read.
    pub num_tokens: usize,
}

/// What rows carry from tile to tile, in scratch memory.
pub struct RowStates<'a> {
    /// Queries, `[register tile][head_dim][rows of the tile]`, scaled.
    queries: &'a mut [f32],
    /// Weighted values, `[row][padded head_dim]`.
    sums: &'a mut [f32],
    largest: &'a mut [f32],
    weights: &'a mut [f32],
    rows: usize,
    head_dim: usize,
}

/// Elements of scratch that so many rows take.
pub fn state_len(rows: usize, head_dim: usize) -> usize {
    rows.next_multiple_of(MAX_TILE_ROWS) * (head_dim + head_dim.next_multiple_of(LANES) + 2)
}

impl<'a> RowStates<'a> {
    /// Rows that have seen no token yet. `query(row)` are the queries, to be multiplied by `scale`.
    /// Returns what is left of the scratch, too.
    #[inline(always)]
    pub fn new<'q, S: Simd>(
        scratch: &'a mut [f32],
        rows: usize,
        head_dim: usize,
        scale: f32,
        query: impl Fn(usize) -> &'q [f32],
    ) -> (Self, &'a mut [f32]) {
        let padded_rows = rows.next_multiple_of(MAX_TILE_ROWS);
        let query_len = padded_rows * head_dim;
        for start in (0..rows).step_by(S::TILE_ROWS) {
            // Each line of 16 is written over the end of the one before it, and the last one over the sums, which are
            // set afterwards.
            let to = &mut scratch[start * head_dim..query_len + LANES];
            let tile_rows = (rows - start).min(S::TILE_ROWS);
            transpose_rows::<S>(to, S::TILE_ROWS, head_dim, tile_rows, scale, |row| query(start + row));
        }
        let (queries, rest) = scratch.split_at_mut(query_len);
        let (sums, rest) = rest.split_at_mut(padded_rows * head_dim.next_multiple_of(LANES));
        let (largest, rest) = rest.split_at_mut(padded_rows);
        let (weights, rest) = rest.split_at_mut(padded_rows);
        sums.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        weights.fill(0.0);
        (Self { queries, sums, largest, weights, rows, head_dim }, rest)
    }

    /// Shows a tile to the rows: row `i` sees its first `visible(i)` tokens. A row that sees none keeps its numbers, but
    /// must have seen some token before.
    ///
    /// # Safety
    /// The tile must be readable as its fields say, and `visible` at most its `num_tokens`.
    #[inline(always)]
    pub unsafe fn attend<S: Simd, E: Element>(&mut self, tile: Tile<E>, visible: impl Fn(usize) -> usize) {
        let mut start = 0;
        while start < self.rows {
            let rows = (self.rows - start).min(S::TILE_ROWS);
            let last_visible = visible(start + rows - 1).max(visible(start));
            if last_visible > 0 {
                macro_rules! with_rows {
                    ($($rows:literal),*) => {
                        match rows {
                            // SAFETY: as this function's.
                            $($rows => unsafe { self.attend_rows::<S, E, $rows>(tile, start, &visible) },)*
                            _ => unreachable!("a register tile has at most 12 rows"),
                        }
                    };
                }
                if S::TILE_ROWS <= 4 {
                    with_rows!(1, 2, 3, 4);
                } else {
                    with_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12);
                }
            }
            start += rows;
        }
    }

    #[inline(always)]
    unsafe fn attend_rows<S: Simd, E: Element, const R: usize>(
        &mut self,
        tile: Tile<E>,
        start: usize,
        visible: &impl Fn(usize) -> usize,
    ) {
        let head_dim = self.head_dim;
        let stride = head_dim.next_multiple_of(LANES);
        let queries = self.queries[start * head_dim..][..S::TILE_ROWS * head_dim].as_ptr();
        let sums = self.sums[start * stride..][..R * stride].as_mut_ptr();
        let mut probabilities = [[0.0_f32; TILE_TOKENS]; R];
        let mut here_weights = [0.0_f32; R];
        let mut growth = [0.0_f32; LANES];

        // SAFETY: the queries are `[head_dim][TILE_ROWS]` and the keys `[head_dim][TILE_TOKENS]`.
        let scores = unsafe {
            let zeros = [[S::splat(0.0); 2]; R];
            multiply::<S, E, R, 2>(zeros, queries, [1, S::TILE_ROWS], tile.keys, TILE_TOKENS, head_dim)
        };
        let hidden = S::splat(f32::NEG_INFINITY);
        for r in 0..R {
            let row = start + r;
            let seen = visible(row);
            let low = S::keep_first(scores[r][0], seen, hidden);
            let high = S::keep_first(scores[r][1], seen.saturating_sub(LANES), hidden);
            let before = self.largest[row];
            let here = S::reduce_max(S::max(low, high));
            let largest = if here > before { here } else { before };
            let shift = S::splat(largest);
            let (low, high) = (exp::<S>(S::sub(low, shift)), exp::<S>(S::sub(high, shift)));
            S::store_slice(&mut probabilities[r][..LANES], low);
            S::store_slice(&mut probabilities[r][LANES..], high);
            growth[r] = before - largest;
            self.largest[row] = largest;
            here_weights[r] = S::reduce_add(S::add(low, high));
        }
        // What was summed before shrinks by this; by exactly 1 where the largest score stayed.
        let mut factors = [0.0_f32; LANES];
        S::store_slice(&mut factors, exp::<S>(S::load_slice(&growth)));
        for r in 0..R {
            let weight = &mut self.weights[start + r];
            *weight = *weight * factors[r] + here_weights[r];
        }
        let mut d = 0;
        while d < stride {
            // SAFETY: the sums are `[R][stride]`; values may be read for `num_tokens`, 16 beyond their ends.
            unsafe {
                if d + 2 * LANES <= stride {
                    accumulate::<S, E, R, 2>(sums.add(d), stride, &factors, &probabilities, tile, d);
                    d += 2 * LANES;
                } else {
                    accumulate::<S, E, R, 1>(sums.add(d), stride, &factors, &probabilities, tile, d);
                    d += LANES;
                }
            }
        }
    }

    /// Writes the weighted mean of the values that row `row` saw.
    #[inline(always)]
    pub fn finish<S: Simd>(&self, row: usize, to: &mut [f32]) {
        let stride = self.head_dim.next_multiple_of(LANES);
        let scale = S::splat(1.0 / self.weights[row]);
        for (x, to) in self.sums[row * stride..][..stride].chunks(LANES).zip(to.chunks_mut(LANES)) {
            // Adding zero makes a negative zero positive: hidden tokens may have changed the sign of a sum of nothing.
            S::store_slice(to, S::fma(S::load_slice(x), scale, S::splat(0.0)));
        }
    }
}

/// Writes `to[d * stride + i] = row(i)[d] * scale` for `i` in `0..rows`, at most 16; writes zeros or what comes later to
/// the other elements of each line of 16.
#[inline(always)]
pub fn transpose_rows<'r, S: Simd>(
    to: &mut [f32],
    stride: usize,
    head_dim: usize,
    rows: usize,
    scale: f32,
    row: impl Fn(usize) -> &'r [f32],
) {
    for start in (0..head_dim).step_by(LANES) {
        let end = head_dim.min(start + LANES);
        let vectors =
            std::array::from_fn(
                |i| {
                    if i < rows { S::load_slice(&row(i)[start..end]) } else { S::splat(0.0) }
                },
            );
        let columns = S::transpose(vectors);
        for (d, column) in (start..end).zip(columns) {
            S::store_slice(&mut to[d * stride..][..LANES], S::mul(column, S::splat(scale)));
        }
    }
}

/// Rescales `R` rows of sums and adds the tile's values, weighted, for `P` vectors of the head from `d` on.
#[inline(always)]
unsafe fn accumulate<S: Simd, E: Element, const R: usize, const P: usize>(
    sums: *mut f32,
    stride: usize,
    factors: &[f32; LANES],
    probabilities: &[[f32; TILE_TOKENS]; R],
    tile: Tile<E>,
    d: usize,
) {
    // SAFETY: as the caller's.
    unsafe {
        let mut acc = [[S::splat(0.0); P]; R];
        for r in 0..R {
            for p in 0..P {
                acc[r][p] = S::mul(S::load(sums.add(r * stride + p * LANES)), S::splat(factors[r]));
            }
        }
        let x = probabilities.as_ptr().cast::<f32>();
        let values = tile.values.add(d);
        let acc =
            multiply::<S, E, R, P>(acc, x, [TILE_TOKENS, 1], values, tile.value_stride, tile.num_tokens);
        for r in 0..R {
            for p in 0..P {
                S::store(sums.add(r * stride + p * LANES), acc[r][p]);
            }
        }
    }
}

/// `acc[r][p] += sum over k of x[r * x_strides[0] + k * x_strides[1]] * w[k * w_stride + 16 p ..]`, in the order of `k`.
#[inline(always)]
unsafe fn multiply<S: Simd, E: Element, const R: usize, const P: usize>(
    mut acc: [[S::V; P]; R],
    x: *const f32,
    x_strides: [usize; 2],
    w: *const E,
    w_stride: usize,
    len: usize,
) -> [[S::V; P]; R] {
    for k in 0..len {
        // SAFETY: as the caller's.
        unsafe {
            let w: [S::V; P] = std::array::from_fn(|p| E::load::<S>(w.add(k * w_stride + p * LANES)));
            for r in 0..R {
                let x = S::splat(*x.add(r * x_strides[0] + k * x_strides[1]));
                for p in 0..P {
                    acc[r][p] = S::fma(x, w[p], acc[r][p]);
                }
            }
        }
    }
    acc
}
