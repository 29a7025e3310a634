//! Vectors as one register of AVX-512.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{LANES, Simd};

/// Vectors as one register; `BF16` says whether the processor multiplies pairs of bf16.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>;

/// An expression of intrinsics.
macro_rules! intrinsics {
    ($e:expr) => {
        // SAFETY: `InstructionSet::run` names this type only on processors with AVX-512F.
        unsafe { $e }
    };
}

/// The tree of `Simd::reduce_add`, by halves.
macro_rules! reduce {
    ($x:expr, $op256:ident, $op128:ident, $op_one:ident) => {
        intrinsics!({
            let x: __m512 = $x;
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
            let x = $op256(_mm512_castps512_ps256(x), high);
            let x = $op128(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = $op128(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32($op_one(x, _mm_shuffle_ps::<1>(x, x)))
        })
    };
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    const TILE_ROWS: usize = 12;
    const HAS_BF16_DOT: bool = BF16;
    type V = __m512;

    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        intrinsics!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        intrinsics!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn select_less(x: Self::V, bound: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        intrinsics!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, bound), no, yes))
    }
    #[inline(always)]
    fn keep_first(x: Self::V, count: usize, other: Self::V) -> Self::V {
        let mask = ((1u32 << count.min(LANES)) - 1) as u16;
        intrinsics!(_mm512_mask_blend_ps(mask, other, x))
    }
    #[inline(always)]
    fn add_exponent(x: Self::V, magic: Self::V) -> Self::V {
        intrinsics!({
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(magic));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), exponent))
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
    fn dot_bf16(acc: Self::V, x: Self::V, w: Self::V) -> Self::V {
        assert!(BF16);
        // SAFETY: with `BF16`, the type is named only on processors with AVX512-BF16; the vectors are only bits.
        unsafe {
            let pairs = std::mem::transmute::<[__m512; 2], [__m512bh; 2]>([x, w]);
            _mm512_dpbf16_ps(acc, pairs[0], pairs[1])
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: as this function's.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::V) {
        // SAFETY: as this function's.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: as this function's.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: as this function's.
        unsafe {
            let pairs = _mm512_loadu_si512(p.cast());
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            (
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, high)),
            )
        }
    }
    #[inline(always)]
    fn transpose(rows: [Self::V; LANES]) -> [Self::V; LANES] {
        intrinsics!({
            // 2 x 2 elements, then 4 x 4, within each quarter of the registers.
            let mut pairs = rows;
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            let pairs = pairs.map(|pair| _mm512_castps_pd(pair));
            let mut fours = rows;
            for i in (0..LANES).step_by(4) {
                fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i], pairs[i + 2]));
                fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i], pairs[i + 2]));
                fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + 1], pairs[i + 3]));
                fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + 1], pairs[i + 3]));
            }
            // Quarters of registers: quarter `q` of `fours[4 g + c]` is rows `4 g..` of column `4 q + c`.
            let mut columns = rows;
            for c in 0..4 {
                let even_low = _mm512_shuffle_f32x4::<0x88>(fours[c], fours[4 + c]);
                let odd_low = _mm512_shuffle_f32x4::<0xdd>(fours[c], fours[4 + c]);
                let even_high = _mm512_shuffle_f32x4::<0x88>(fours[8 + c], fours[12 + c]);
                let odd_high = _mm512_shuffle_f32x4::<0xdd>(fours[8 + c], fours[12 + c]);
                columns[c] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
                columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
                columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even_low, even_high);
                columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high);
            }
            columns
        })
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        intrinsics!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
}
