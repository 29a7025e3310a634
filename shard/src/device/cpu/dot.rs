//! How a linear layer multiplies: the formats of weights and activations, and the products of one pair of inputs.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use half::bf16;

use super::simd::{LANES, Simd};

/// The products of two neighbouring inputs with 16 outputs, and what they are made of.
pub trait Dot {
    /// Vectors of 16 outputs.
    type S: Simd;
    /// An element of the weights.
    type Weight: Copy;
    /// Two neighbouring activations.
    type Pair: Copy + Default;
    /// Two activations, each in all lanes.
    type Inputs: Copy;
    /// Weights of two inputs and 16 outputs.
    type Weights: Copy;

    /// Activations as the products want them.
    fn pair(x0: f32, x1: f32) -> Self::Pair;
    /// Reads two activations into all lanes.
    ///
    /// # Safety
    /// `x` must be valid for reads.
    unsafe fn splat(x: *const Self::Pair) -> Self::Inputs;
    /// Reads the weights of two inputs and 16 outputs.
    ///
    /// # Safety
    /// `p` must be valid for reads of 32 elements.
    unsafe fn load(p: *const Self::Weight) -> Self::Weights;
    /// Adds the products of the two inputs to `acc`.
    fn accumulate(acc: <Self::S as Simd>::V, x: Self::Inputs, w: Self::Weights) -> <Self::S as Simd>::V;
}

/// Activations in f32, weights of `W`: a fused multiply-add for one input after the other.
pub struct Fma<S, W>(PhantomData<(S, W)>);

/// With weights in bf16.
pub type FmaBf16<S> = Fma<S, u16>;

/// With weights in f32.
pub type FmaF32<S> = Fma<S, f32>;

/// A weight that is multiplied in f32.
pub trait FmaWeight: Copy {
    /// Reads the weights of two inputs and 16 outputs.
    ///
    /// # Safety
    /// `p` must be valid for reads of 32 elements.
    unsafe fn load_two<S: Simd>(p: *const Self) -> (S::V, S::V);
}

/// The bits of a bf16.
impl FmaWeight for u16 {
    #[inline(always)]
    unsafe fn load_two<S: Simd>(p: *const u16) -> (S::V, S::V) {
        // SAFETY: as this function's.
        unsafe { S::load_bf16_pairs(p) }
    }
}

impl FmaWeight for f32 {
    #[inline(always)]
    unsafe fn load_two<S: Simd>(p: *const f32) -> (S::V, S::V) {
        // SAFETY: as this function's.
        unsafe { (S::load(p), S::load(p.add(LANES))) }
    }
}

/// Activations rounded to bf16, weights in bf16: the instruction for pairs.
pub struct PairBf16<S>(PhantomData<S>);

impl<S: Simd, W: FmaWeight> Dot for Fma<S, W> {
    type S = S;
    type Weight = W;
    type Pair = [f32; 2];
    type Inputs = (S::V, S::V);
    type Weights = (S::V, S::V);

    #[inline(always)]
    fn pair(x0: f32, x1: f32) -> [f32; 2] {
        [x0, x1]
    }
    /// Reads each activation by itself: that is a broadcast from memory, which costs no arithmetic port.
    #[inline(always)]
    unsafe fn splat(x: *const [f32; 2]) -> Self::Inputs {
        let x = x.cast::<f32>();
        // SAFETY: as this function's.
        unsafe { (S::splat(*x), S::splat(*x.add(1))) }
    }
    #[inline(always)]
    unsafe fn load(p: *const W) -> Self::Weights {
        // SAFETY: as this function's.
        unsafe { W::load_two::<S>(p) }
    }
    #[inline(always)]
    fn accumulate(acc: S::V, x: Self::Inputs, w: Self::Weights) -> S::V {
        S::fma(x.1, w.1, S::fma(x.0, w.0, acc))
    }
}

/// Two activations rounded to bf16, the first in the low half, as a lane of f32.
#[inline(always)]
pub fn bf16_pair(x0: f32, x1: f32) -> f32 {
    let (low, high) = (bf16::from_f32(x0).to_bits(), bf16::from_f32(x1).to_bits());
    f32::from_bits(u32::from(low) | u32::from(high) << 16)
}

impl<S: Simd> Dot for PairBf16<S> {
    type S = S;
    type Weight = u16;
    type Pair = f32;
    type Inputs = S::V;
    type Weights = S::V;

    #[inline(always)]
    fn pair(x0: f32, x1: f32) -> f32 {
        bf16_pair(x0, x1)
    }
    #[inline(always)]
    unsafe fn splat(x: *const f32) -> S::V {
        // SAFETY: as this function's.
        S::splat(unsafe { *x })
    }
    #[inline(always)]
    unsafe fn load(p: *const u16) -> S::V {
        // SAFETY: as this function's.
        unsafe { S::load(p.cast()) }
    }
    #[inline(always)]
    fn accumulate(acc: S::V, x: S::V, w: S::V) -> S::V {
        S::dot_bf16(acc, x, w)
    }
}
