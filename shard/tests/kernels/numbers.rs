//! Seeded numbers, and comparing results with what they should be.

use std::fmt::Display;

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

/// What kernels give.
pub trait Number: Copy + Display + Into<f64> {
    /// Its bits.
    fn bits(self) -> u32;
}

impl Number for bf16 {
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Number for f32 {
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

/// `x W^T + bias` of `num_rows` rows, and for each the sum of what was added without signs.
pub fn products(
    x: &[bf16],
    weight: &[bf16],
    bias: Option<&[f32]>,
    [num_rows, num_inputs, num_outputs]: [usize; 3],
) -> (Vec<f64>, Vec<f64>) {
    let (x, weight) = (to_f64(x), to_f64(weight));
    let mut results = (Vec::new(), Vec::new());
    for row in 0..num_rows {
        let row = &x[row * num_inputs..][..num_inputs];
        for output in 0..num_outputs {
            let weight = &weight[output * num_inputs..][..num_inputs];
            let bias = bias.map_or(0.0, |bias| f64::from(bias[output]));
            let terms = row.iter().zip(weight).map(|(x, w)| x * w);
            results.0.push(terms.clone().sum::<f64>() + bias);
            results.1.push(terms.map(f64::abs).sum::<f64>() + bias.abs());
        }
    }
    results
}

/// RMS norms of rows, with an epsilon of 1e-6.
pub fn norms(sums: &[f64], weight: &[f32]) -> Vec<f64> {
    let rows = sums.chunks(weight.len());
    rows.flat_map(|row| {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        row.iter().zip(weight).map(move |(x, &w)| x / (mean + 1e-6).sqrt() * f64::from(w))
    })
    .collect()
}

/// Exactly.
pub fn to_f64(x: &[bf16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// Whether each number is within its tolerance; an error says which is off most.
pub fn compare<T: Number>(
    what: &str,
    got: &[T],
    expected: &[f64],
    tolerance: impl Fn(usize) -> f64,
) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} numbers, not {}", got.len(), expected.len());
    let mut worst = (0.0, 0);
    for (index, (&got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got.into() - expected).abs();
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
pub fn same_bits<T: Number>(what: &str, got: &[T], expected: &[T]) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} numbers, not {}", got.len(), expected.len());
    let differs = got.iter().zip(expected).position(|(got, expected)| got.bits() != expected.bits());
    if let Some(index) = differs {
        anyhow::bail!("{what}: element {index} is {}, not {}", got[index], expected[index]);
    }
    Ok(())
}
