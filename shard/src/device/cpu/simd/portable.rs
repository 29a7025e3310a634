//! Vectors as arrays. On aarch64 the compiler turns them into NEON.
#![allow(unsafe_code)]

use super::{LANES, Simd};

/// Vectors as arrays, with correctly rounded fused multiply-add on any processor.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn reduce(x: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let x: [f32; 8] = std::array::from_fn(|i| f(x[i], x[i + 8]));
    let x: [f32; 4] = std::array::from_fn(|i| f(x[i], x[i + 4]));
    f(f(x[0], x[2]), f(x[1], x[3]))
}

impl Simd for Portable {
    const TILE_ROWS: usize = 4;
    type V = [f32; LANES];

    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn select_less(x: Self::V, bound: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] < bound[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn keep_first(x: Self::V, count: usize, other: Self::V) -> Self::V {
        std::array::from_fn(|i| if i < count { x[i] } else { other[i] })
    }
    #[inline(always)]
    fn add_exponent(x: Self::V, magic: Self::V) -> Self::V {
        map2(x, magic, |x, magic| f32::from_bits(x.to_bits().wrapping_add(magic.to_bits() << 23)))
    }
    #[inline(always)]
    fn reduce_add(x: Self::V) -> f32 {
        reduce(x, |a, b| a + b)
    }
    #[inline(always)]
    fn reduce_max(x: Self::V) -> f32 {
        reduce(x, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: as this function's.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::V) {
        // SAFETY: as this function's.
        unsafe { p.cast::<Self::V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: as this function's.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: as this function's.
        let pairs = unsafe { p.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        (
            pairs.map(|pair| f32::from_bits(u32::from(pair[0]) << 16)),
            pairs.map(|pair| f32::from_bits(u32::from(pair[1]) << 16)),
        )
    }
}
