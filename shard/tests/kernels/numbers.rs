//! Seeded numbers, and comparing results with what they should be.

use anyhow::{Result, ensure};
use half::bf16;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};

/// The largest relative error of rounding once to bf16, and a little for the arithmetic in f32 before it.
pub const ROUNDING: f64 = 1.01 / 256.0;

/// A seeded source of numbers.
pub struct Numbers(SmallRng);

impl Numbers {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// Numbers in -bound..bound.
    pub fn f32(&mut self, len: usize, bound: f32) -> Vec<f32> {
        (0..len).map(|_| self.0.random_range(-bound..bound)).collect()
    }

    /// Numbers in -bound..bound, rounded.
    pub fn bf16(&mut self, len: usize, bound: f32) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.0.random_range(-bound..bound))).collect()
    }

    /// Bytes.
    pub fn u8(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.0.random()).collect()
    }

    /// Any bits.
    pub fn u32(&mut self, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.0.random()).collect()
    }

    /// The numbers below `len` in some order.
    pub fn order(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        order.shuffle(&mut self.0);
        order
    }
}

/// What is in a buffer before a kernel writes it, so that an element that it leaves out shows.
pub fn unwritten(len: usize) -> Vec<bf16> {
    vec![bf16::NAN; len]
}

/// Exactly.
pub fn to_f64(x: &[bf16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// Whether each number is within its tolerance; an error says which is off most.
pub fn compare(what: &str, got: &[bf16], expected: &[f64], tolerance: impl Fn(usize) -> f64) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} numbers, not {}", got.len(), expected.len());
    let mut worst = (0.0, 0);
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got.to_f64() - expected).abs();
        // What is exact may have no tolerance to be measured by.
        let off = if difference == 0.0 { 0.0 } else { difference / tolerance(index) };
        // What is not a number is off most.
        if off.is_nan() || off > worst.0 {
            worst = (if off.is_nan() { f64::INFINITY } else { off }, index);
        }
    }
    let (off, index) = worst;
    ensure!(
        off <= 1.0,
        "{what}: element {index} is {}, not {}: {off:.2} times the tolerance",
        got[index],
        expected[index]
    );
    Ok(())
}

/// Whether all bits are the same.
pub fn same_bits(what: &str, got: &[bf16], expected: &[bf16]) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} numbers, not {}", got.len(), expected.len());
    let differs = got.iter().zip(expected).position(|(got, expected)| got.to_bits() != expected.to_bits());
    if let Some(index) = differs {
        anyhow::bail!("{what}: element {index} is {}, not {}", got[index], expected[index]);
    }
    Ok(())
}
