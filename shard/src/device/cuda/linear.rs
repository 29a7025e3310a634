//! Products with matrices of weights: few rows by kernels that read the weights at the speed of memory, more by cuBLASLt, and
//! by Lockstep's own tensor-core kernels where that is not installed, or bits must not depend on the number of rows.
#![allow(unsafe_code)]

use super::arena::Tensor;
use super::cublas_lt::Product;
use super::device::CudaDevice;
use super::driver::{Address, DeviceBuffer};
use super::kernels::{Argument, MAX_GEMV_ROWS, count, launch};
use crate::device::{Activations, DType, Result};

/// Threads of a block that multiplies few rows, and its outputs.
const GEMV_THREADS: usize = 128;
const GEMV_OUTPUTS: usize = 4;

/// Dynamic shared memory of the kernels for many rows.
pub const GEMM_SHARED_BYTES: usize = 48 << 10;

/// A matrix of weights, `[out, in]` of bf16, and a bias.
pub struct Linear {
    pub(super) weight: DeviceBuffer,
    pub(super) bias: Option<Bias>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// A bias, of one element per output: in f32, as Lockstep's own kernels take it, and in bf16, as cuBLASLt does.
pub struct Bias {
    pub(super) single: DeviceBuffer,
    pub(super) half: DeviceBuffer,
}

/// The rows and outputs that a block of a kernel for many rows computes, and its threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    rows: usize,
    outputs: usize,
    threads: usize,
}

/// The kernels' tiles, in the order of [`Kernels::gemm`](super::kernels::Kernels).
const TILES: [Tile; 3] = [
    Tile { rows: 16, outputs: 32, threads: 64 },
    Tile { rows: 64, outputs: 64, threads: 128 },
    Tile { rows: 128, outputs: 128, threads: 256 },
];

/// Which kernel multiplies so many rows: all give the same bits.
fn tile_of(rows: usize) -> usize {
    TILES[..2].iter().take_while(|tile| tile.rows < rows).count()
}

impl CudaDevice {
    /// `x W^T + bias`, in elements of `dtype`.
    pub(super) fn multiply(&self, x: &Tensor, linear: &Linear, dtype: DType) -> Result<Tensor> {
        let out = self.arena.tensor(x.rows(), linear.outputs, dtype)?;
        self.multiply_to(x, linear, &out)?;
        Ok(out)
    }

    /// The same, to `out`.
    pub(super) fn multiply_to(&self, x: &Tensor, linear: &Linear, out: &Tensor) -> Result<()> {
        assert_eq!(x.cols(), linear.inputs, "inputs of a linear layer");
        let dtype = out.dtype();
        if out.bytes() == 0 {
            return Ok(());
        }
        // Few rows wait for the weights, whoever multiplies them.
        if x.rows() <= MAX_GEMV_ROWS && !self.is_repeatable {
            return self.multiply_few(x, linear, out);
        }
        // The library has no bias of bf16 for results that are not, and no products of no inputs, which ranks without heads have.
        let is_for_library = linear.inputs > 0 && (dtype == DType::Bf16 || linear.bias.is_none());
        match &self.cublas_lt {
            Some(library) if !self.is_repeatable && is_for_library => {
                self.progress.pieces_of(0).count();
                library.multiply(&Product {
                    x: x.address(),
                    weight: linear.weight.address(),
                    bias: linear.bias.as_ref().map(|bias| bias.half.address()),
                    y: out.address(),
                    rows: x.rows(),
                    inputs: linear.inputs,
                    outputs: linear.outputs,
                    dtype,
                })
            }
            _ => self.multiply_many(x, linear, out),
        }
    }

    fn multiply_few(&self, x: &Tensor, linear: &Linear, out: &Tensor) -> Result<()> {
        let grid = [linear.outputs.div_ceil(GEMV_OUTPUTS), 1, 1];
        let (index, bias) = (x.rows() - 1, bias_address(linear));
        let (inputs, outputs) = (count(linear.inputs), count(linear.outputs));
        let (x, weight, y) = (x.address(), linear.weight.address(), out.address());
        match out.dtype() {
            DType::Bf16 => {
                let no_residual: Address = 0;
                let function = &self.kernels.gemv[index];
                launch!(self, function, grid, GEMV_THREADS, x, weight, bias, no_residual, inputs, outputs, y)
            }
            DType::F32 => {
                let function = &self.kernels.gemv_f32[index];
                launch!(self, function, grid, GEMV_THREADS, x, weight, bias, inputs, outputs, y)
            }
        }
    }

    fn multiply_many(&self, x: &Tensor, linear: &Linear, out: &Tensor) -> Result<()> {
        let index = tile_of(x.rows());
        let tile = TILES[index];
        let functions = match out.dtype() {
            DType::Bf16 => &self.kernels.gemm,
            DType::F32 => &self.kernels.gemm_f32,
        };
        launch!(
            self,
            &functions[index],
            [x.rows().div_ceil(tile.rows), linear.outputs.div_ceil(tile.outputs), 1],
            tile.threads;
            GEMM_SHARED_BYTES,
            x.address(),
            linear.weight.address(),
            bias_address(linear),
            count(x.rows()),
            count(linear.inputs),
            count(linear.outputs),
            out.address(),
        )
    }
}

/// Where a bias of f32 is, or 0.
fn bias_address(linear: &Linear) -> Address {
    linear.bias.as_ref().map_or(0, |bias| bias.single.address())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_tile_that_holds_all_rows_is_chosen() {
        let chosen = [1, 16, 17, 64, 65, 5000].map(|rows| TILES[tile_of(rows)].rows);
        assert_eq!(chosen, [16, 16, 64, 64, 128, 128]);
    }
}
