//! Vectors of 16 lanes of f32, in three implementations that give the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod math;
mod portable;
mod vector;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use math::{exp, gelu, silu};
pub use portable::Portable;
pub use vector::{LANES, Simd};

#[cfg(test)]
mod tests;
