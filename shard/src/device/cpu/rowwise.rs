//! Operations on one row, or one head of a row, at a time.

use super::instruction_set::Kernel;
use super::simd::{LANES, Simd, gelu, silu};

/// Adds `residual`, if there is one, to a row in place, and writes its RMS norm:
/// `normed = v / sqrt(mean(v^2) + epsilon) * weight`.
pub struct ResidualNorm<'a> {
    /// `[rows, cols]`, where `cols` is the length of `weight`.
    pub sum: &'a mut [f32],
    /// As `sum`.
    pub residual: Option<&'a [f32]>,
    /// As `sum`.
    pub normed: &'a mut [f32],
    /// One element per column.
    pub weight: &'a [f32],
    /// Added to the mean.
    pub epsilon: f32,
}

impl Kernel for ResidualNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let cols = self.weight.len();
        let rows = self.sum.chunks_exact_mut(cols).zip(self.normed.chunks_exact_mut(cols));
        for (row, (sum, normed)) in rows.enumerate() {
            if let Some(residual) = self.residual {
                let residual = &residual[row * cols..(row + 1) * cols];
                for (x, r) in sum.chunks_mut(LANES).zip(residual.chunks(LANES)) {
                    let v = S::add(S::load_slice(x), S::load_slice(r));
                    S::store_slice(x, v);
                }
            }
            norm_row::<S>(sum, normed, self.weight, self.epsilon);
        }
    }
}

/// The RMS norm of rows that are sums already.
pub struct RmsNorm<'a> {
    /// `[rows, cols]`, where `cols` is the length of `weight`.
    pub x: &'a [f32],
    /// As `x`.
    pub normed: &'a mut [f32],
    /// One element per column.
    pub weight: &'a [f32],
    /// Added to the mean.
    pub epsilon: f32,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let cols = self.weight.len();
        let rows = self.x.chunks_exact(cols).zip(self.normed.chunks_exact_mut(cols));
        rows.for_each(|(x, normed)| norm_row::<S>(x, normed, self.weight, self.epsilon));
    }
}

#[inline(always)]
fn norm_row<S: Simd>(row: &[f32], normed: &mut [f32], weight: &[f32], epsilon: f32) {
    let mut squares = S::splat(0.0);
    for x in row.chunks(LANES) {
        let x = S::load_slice(x);
        squares = S::fma(x, x, squares);
    }
    let mean = S::reduce_add(squares) / row.len() as f32;
    let factor = S::splat(1.0 / (mean + epsilon).sqrt());
    for ((x, w), y) in row.chunks(LANES).zip(weight.chunks(LANES)).zip(normed.chunks_mut(LANES)) {
        S::store_slice(y, S::mul(S::mul(S::load_slice(x), factor), S::load_slice(w)));
    }
}

/// `silu(gate) * up` of rows `[gate | up]`.
pub struct GatedSilu<'a> {
    /// `[rows, 2 cols]`.
    pub gate_up: &'a [f32],
    /// `[rows, cols]`.
    pub out: &'a mut [f32],
    /// Columns of `out`.
    pub cols: usize,
}

impl Kernel for GatedSilu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let rows = self.gate_up.chunks_exact(2 * self.cols).zip(self.out.chunks_exact_mut(self.cols));
        for (gate_up, out) in rows {
            let (gate, up) = gate_up.split_at(self.cols);
            let columns = gate.chunks(LANES).zip(up.chunks(LANES)).zip(out.chunks_mut(LANES));
            for ((gate, up), out) in columns {
                S::store_slice(out, S::mul(silu::<S>(S::load_slice(gate)), S::load_slice(up)));
            }
        }
    }
}

/// `gelu(x)`, with the error function, in place.
pub struct Gelu<'a>(pub &'a mut [f32]);

impl Kernel for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        for x in self.0.chunks_mut(LANES) {
            let y = gelu::<S>(S::load_slice(x));
            S::store_slice(x, y);
        }
    }
}

/// Rotates the first `num_heads` heads of each row in place: with halves `a` and `b` of a head,
/// `(a, b) -> (a cos - b sin, b cos + a sin)`.
pub struct Rotary<'a> {
    /// `[rows, cols]`.
    pub x: &'a mut [f32],
    /// Columns of `x`.
    pub cols: usize,
    /// Heads that are rotated, from the first column on.
    pub num_heads: usize,
    /// Columns of a head, an even number.
    pub head_dim: usize,
    /// `[rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
}

impl Kernel for Rotary<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        let half = self.head_dim / 2;
        let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
        for (row, (cos, sin)) in self.x.chunks_exact_mut(self.cols).zip(angles) {
            for head in row[..self.num_heads * self.head_dim].chunks_exact_mut(self.head_dim) {
                let (first, second) = head.split_at_mut(half);
                let pairs = first.chunks_mut(LANES).zip(second.chunks_mut(LANES));
                for ((first, second), (cos, sin)) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
                    let (a, b) = (S::load_slice(first), S::load_slice(second));
                    let (cos, sin) = (S::load_slice(cos), S::load_slice(sin));
                    S::store_slice(first, S::sub(S::mul(a, cos), S::mul(b, sin)));
                    S::store_slice(second, S::add(S::mul(b, cos), S::mul(a, sin)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
