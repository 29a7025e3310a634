//! Products with matrices of weights: few rows by kernels that read the weights at the speed of memory, more by cuBLASLt, and
//! by Lockstep's own tensor-core kernels where that is not installed, or bits must not depend on the number of rows.
#![allow(unsafe_code)]

use super::arena::Tensor;
use super::cublas_lt::Product;
use super::device::{CudaDevice, THREADS};
use super::driver::{Address, DeviceBuffer, Function};
use super::kernels::{Argument, MAX_GEMV_ROWS, count, launch};
use crate::device::{Activations, DType, Result};

/// Threads of a block that multiplies few rows, and its outputs: those of half as many columns where these have a gate and an up.
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
        if self.are_few(x) {
            let functions = match dtype {
                DType::Bf16 => &self.kernels.gemv,
                DType::F32 => &self.kernels.gemv_f32,
            };
            return self.multiply_few(functions, x, linear, linear.outputs, out);
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

    /// `silu(gate) * up` of `x W^T + bias`, of which the first half are gates.
    pub(super) fn multiply_gated(&self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        let columns = linear.outputs / 2;
        if !self.are_few(x) || x.rows() * columns == 0 {
            return self.activate_gated(&self.multiply(x, linear, DType::Bf16)?);
        }
        assert_eq!((x.cols(), linear.outputs % 2), (linear.inputs, 0), "inputs and outputs of gate and up");
        let out = self.tensor(x.rows(), columns)?;
        self.multiply_few(&self.kernels.gated_gemv, x, linear, columns, &out)?;
        Ok(out)
    }

    /// `silu(gate) * up` of what was multiplied before.
    pub(super) fn activate_gated(&self, gate_up: &Tensor) -> Result<Tensor> {
        assert_eq!(gate_up.cols() % 2, 0, "columns of gate and up");
        let (rows, columns) = (gate_up.rows(), gate_up.cols() / 2);
        let out = self.tensor(rows, columns)?;
        if out.bytes() > 0 {
            let (function, grid) = (&self.kernels.gated_silu, Self::element_blocks(rows * columns));
            let (gate_up, rows, columns) = (gate_up.address(), count(rows), count(columns));
            launch!(self, function, grid, THREADS, gate_up, rows, columns, out.address())?;
        }
        Ok(out)
    }

    /// Few rows wait for the weights, whoever multiplies them.
    fn are_few(&self, x: &Tensor) -> bool {
        x.rows() <= MAX_GEMV_ROWS && !self.is_repeatable
    }

    /// By the kernel for so many rows. Of its results a row has `columns`.
    fn multiply_few(
        &self,
        functions: &[Function],
        x: &Tensor,
        linear: &Linear,
        columns: usize,
        out: &Tensor,
    ) -> Result<()> {
        launch!(
            self,
            &functions[x.rows() - 1],
            [linear.outputs.div_ceil(GEMV_OUTPUTS), 1, 1],
            GEMV_THREADS,
            x.address(),
            linear.weight.address(),
            bias_address(linear),
            count(linear.inputs),
            count(columns),
            out.address(),
        )
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
