//! Which vector instructions the kernels use, and the one place where a kernel is compiled for each of them.
#![allow(unsafe_code)]

use std::fmt;

#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Portable, Simd};

/// Vector instructions that the kernels can be run with, fastest first.
///
/// All but [`InstructionSet::Avx512Bf16`] give the same bits: they do the same fused operations on 16 lanes in the same
/// order. `Avx512Bf16` rounds the activations of bf16 linear layers to bf16 and adds their products in its own order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InstructionSet {
    /// AVX-512F, with products of bf16 pairs (`vdpbf16ps`) in bf16 linear layers.
    Avx512Bf16,
    /// AVX-512F.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// No particular instructions.
    Portable,
}

impl InstructionSet {
    /// Those that this processor has, fastest first; never empty.
    pub fn available() -> Vec<Self> {
        [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable]
            .into_iter()
            .filter(|set| set.is_available())
            .collect()
    }

    /// The fastest that this processor has.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let available = match self {
            Self::Avx512Bf16 => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"),
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let available = self == Self::Portable;
        available
    }

    /// Its name in logs and in the greeting between ranks.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Runs a kernel, compiled for these instructions.
    ///
    /// # Panics
    /// When this processor does not have them.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self.is_available(), "this processor has no {self}");
        match self {
            // SAFETY: the processor has these instructions, as asserted above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { run_avx512_bf16(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { run_avx2(kernel) },
            _ => kernel.run::<Portable>(),
        }
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A computation written once over [`Simd`]. Implementations of `run` must be `#[inline(always)]`, and so must all that
/// it calls with vectors, or they are not compiled for the instructions that they use.
pub(super) trait Kernel {
    /// What it returns.
    type Output;
    /// Runs it.
    fn run<S: Simd>(self) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16,avx2,fma")]
fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<false>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}
