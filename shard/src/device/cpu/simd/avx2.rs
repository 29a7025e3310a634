//! Vectors as two registers of AVX2.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{LANES, Simd};

/// Vectors as two registers: lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub struct Avx2;

/// Two registers.
#[derive(Clone, Copy)]
pub struct Pair(__m256, __m256);

/// An expression of intrinsics.
macro_rules! intrinsics {
    ($e:expr) => {
        // SAFETY: `InstructionSet::run` names this type only on processors with AVX2 and FMA.
        unsafe { $e }
    };
}

/// The tree of `Simd::reduce_add`, by halves.
macro_rules! reduce {
    ($x:expr, $op256:ident, $op128:ident, $op_one:ident) => {
        intrinsics!({
            let x: Pair = $x;
            let x = $op256(x.0, x.1);
            let x = $op128(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = $op128(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32($op_one(x, _mm_shuffle_ps::<1>(x, x)))
        })
    };
}

/// Lane `i` of register `j` becomes lane `j` of register `i`.
#[inline(always)]
fn transpose8(rows: [__m256; 8]) -> [__m256; 8] {
    intrinsics!({
        // 2 x 2 elements, then 4 x 4, within each half of the registers, then the halves.
        let mut pairs = rows;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut fours = rows;
        for i in [0, 4] {
            fours[i] = _mm256_shuffle_ps::<0x44>(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm256_shuffle_ps::<0xee>(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm256_shuffle_ps::<0x44>(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm256_shuffle_ps::<0xee>(pairs[i + 1], pairs[i + 3]);
        }
        let mut columns = rows;
        for c in 0..4 {
            columns[c] = _mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]);
            columns[4 + c] = _mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]);
        }
        columns
    })
}

impl Simd for Avx2 {
    const TILE_ROWS: usize = 4;
    type V = Pair;

    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        intrinsics!(Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)))
    }
    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(Pair(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }
    #[inline(always)]
    fn select_less(x: Self::V, bound: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        intrinsics!(Pair(
            _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(x.0, bound.0)),
            _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(x.1, bound.1)),
        ))
    }
    #[inline(always)]
    fn keep_first(x: Self::V, count: usize, other: Self::V) -> Self::V {
        intrinsics!({
            let count = _mm256_set1_epi32(count.min(LANES) as i32);
            let low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
            let low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low));
            let high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high));
            Pair(_mm256_blendv_ps(other.0, x.0, low), _mm256_blendv_ps(other.1, x.1, high))
        })
    }
    #[inline(always)]
    fn add_exponent(x: Self::V, magic: Self::V) -> Self::V {
        intrinsics!({
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(magic.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(magic.1));
            Pair(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.0), low)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.1), high)),
            )
        })
    }
    #[inline(always)]
    fn reduce_add(x: Self::V) -> f32 {
        reduce!(x, _mm256_add_ps, _mm_add_ps, _mm_add_ss)
    }
    #[inline(always)]
    fn reduce_max(x: Self::V) -> f32 {
        reduce!(x, _mm256_max_ps, _mm_max_ps, _mm_max_ss)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: as this function's.
        unsafe { Pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::V) {
        // SAFETY: as this function's.
        unsafe {
            _mm256_storeu_ps(p, x.0);
            _mm256_storeu_ps(p.add(8), x.1);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: as this function's.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: as this function's.
        unsafe {
            let low = _mm256_loadu_si256(p.cast());
            let high = _mm256_loadu_si256(p.add(16).cast());
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let first = Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            );
            let second = Pair(
                _mm256_castsi256_ps(_mm256_and_si256(low, mask)),
                _mm256_castsi256_ps(_mm256_and_si256(high, mask)),
            );
            (first, second)
        }
    }
    #[inline(always)]
    fn transpose(rows: [Pair; LANES]) -> [Pair; LANES] {
        let low_low = transpose8(std::array::from_fn(|i| rows[i].0));
        let low_high = transpose8(std::array::from_fn(|i| rows[8 + i].0));
        let high_low = transpose8(std::array::from_fn(|i| rows[i].1));
        let high_high = transpose8(std::array::from_fn(|i| rows[8 + i].1));
        std::array::from_fn(|i| {
            if i < 8 { Pair(low_low[i], low_high[i]) } else { Pair(high_low[i - 8], high_high[i - 8]) }
        })
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        intrinsics!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
}
