//! What a kernel may do with a vector.
#![allow(unsafe_code)]

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Operations on vectors of [`LANES`] lanes of f32.
///
/// The types that implement it use instructions that a processor may lack. They are named only by
/// [`InstructionSet::run`](super::super::instruction_set::InstructionSet::run), which has checked the processor, so that
/// the operations without pointers can be safe functions.
pub trait Simd: Copy + 'static {
    /// Rows of a register tile: how many rows of activations share one read of the weights.
    const TILE_ROWS: usize;
    /// Whether [`Simd::dot_bf16`] is one instruction, so that bf16 linear layers should use it.
    const HAS_BF16_DOT: bool = false;
    /// The vector.
    type V: Copy;

    /// `x` in all lanes.
    fn splat(x: f32) -> Self::V;
    /// `a + b`.
    fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: `b` where either is not a number.
    fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: `b` where either is not a number.
    fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `if x < bound { yes } else { no }` in each lane.
    fn select_less(x: Self::V, bound: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// `x` in the first `count` lanes, `other` in the rest. All lanes when `count` is [`LANES`] or more.
    fn keep_first(x: Self::V, count: usize, other: Self::V) -> Self::V;
    /// `x` with the low bits of `magic`, read as an integer, added to its exponent: see [`super::exp`].
    fn add_exponent(x: Self::V, magic: Self::V) -> Self::V;
    /// Sum of the lanes: lane `i` and `i + 8` first, then `i + 4`, `i + 2`, `i + 1`.
    fn reduce_add(x: Self::V) -> f32;
    /// Largest lane, in the order of [`Simd::reduce_add`].
    fn reduce_max(x: Self::V) -> f32;
    /// Adds the products of pairs of bf16, one pair in the halves of each lane; see `vdpbf16ps`.
    #[inline(always)]
    fn dot_bf16(_acc: Self::V, _x: Self::V, _w: Self::V) -> Self::V {
        unreachable!("only for instruction sets that have it")
    }

    /// Reads 16 elements.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 elements.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Writes 16 elements.
    ///
    /// # Safety
    /// `p` must be valid for writes of 16 elements.
    unsafe fn store(p: *mut f32, x: Self::V);
    /// Reads 16 elements of bf16.
    ///
    /// # Safety
    /// `p` must be valid for reads of 16 elements.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// Reads 16 pairs of bf16; returns the first elements of the pairs, and the second ones.
    ///
    /// # Safety
    /// `p` must be valid for reads of 32 elements.
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self::V, Self::V);
    /// Lane `i` of vector `j` becomes lane `j` of vector `i`.
    #[inline(always)]
    fn transpose(rows: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut elements = [[0.0; LANES]; LANES];
        for (elements, row) in elements.iter_mut().zip(rows) {
            Self::store_slice(elements, row);
        }
        std::array::from_fn(|i| {
            let column: [f32; LANES] = std::array::from_fn(|j| elements[j][i]);
            Self::load_slice(&column)
        })
    }
    /// Asks for the cache line at `p`, which need not be valid.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}

    /// The first elements of `from`, at most 16; zeros in the other lanes.
    #[inline(always)]
    fn load_slice(from: &[f32]) -> Self::V {
        if from.len() >= LANES {
            // SAFETY: the slice has 16 elements.
            unsafe { Self::load(from.as_ptr()) }
        } else {
            let mut lanes = [0.0; LANES];
            lanes[..from.len()].copy_from_slice(from);
            // SAFETY: the array has 16 elements.
            unsafe { Self::load(lanes.as_ptr()) }
        }
    }
    /// Writes the first lanes to `to`, at most 16.
    #[inline(always)]
    fn store_slice(to: &mut [f32], x: Self::V) {
        if to.len() >= LANES {
            // SAFETY: the slice has 16 elements.
            unsafe { Self::store(to.as_mut_ptr(), x) }
        } else {
            let mut lanes = [0.0; LANES];
            // SAFETY: the array has 16 elements.
            unsafe { Self::store(lanes.as_mut_ptr(), x) };
            let len = to.len();
            to.copy_from_slice(&lanes[..len]);
        }
    }
}
