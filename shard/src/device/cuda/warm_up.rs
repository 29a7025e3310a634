//! First calls of libraries, in which they load code and connect GPUs: made where nobody waits for a step, since they may take
//! longer than a step may be silent. They work in the memory of the staging ring, which has the same size at all ranks.

use super::cublas_lt::Product;
use super::device::CudaDevice;
use super::driver::Address;
use crate::device::{DType, Result};

/// Products by cuBLASLt: rows of each, and the inputs and outputs of all.
const ROWS: [usize; 3] = [16, 128, 512];
const COLS: usize = 256;

/// Elements of sums by NCCL, which has other ways for messages of a few kilobytes, of some hundred, and of megabytes.
const ELEMENTS: [usize; 3] = [2 << 10, 128 << 10, 2 << 20];

impl CudaDevice {
    /// Multiplies.
    ///
    /// # Errors
    /// The library or the GPU fails.
    pub(super) fn warm_up_products(&self) -> Result<()> {
        let Some(library) = self.cublas_lt.as_ref().filter(|_| !self.is_repeatable) else { return Ok(()) };
        let weight = self.scratch()?;
        let (inputs, outputs, dtype) = (COLS, COLS, DType::Bf16);
        let after = |at: Address, rows: usize| at + (rows * COLS * dtype.size_bytes()) as Address;
        let x = after(weight, outputs);
        for rows in ROWS {
            let y = after(x, rows);
            library.multiply(&Product { x, weight, bias: None, y, rows, inputs, outputs, dtype })?;
            self.gpu.synchronize()?;
            self.progress.pieces_of(0).count();
        }
        Ok(())
    }

    /// Sums over the ranks, as all of them have to at the same time.
    ///
    /// # Errors
    /// The group fell apart, or the GPU failed.
    pub(super) fn warm_up_sums(&self) -> Result<()> {
        if !self.with_group(|group| Ok(group.uses_nccl()))? {
            return Ok(());
        }
        let at = self.scratch()?;
        for elements in ELEMENTS {
            self.with_group(|group| group.all_reduce_sum(at, elements))?;
            self.brought.record()?;
            self.wait(&self.brought)?;
            self.progress.pieces_of(0).count();
        }
        Ok(())
    }

    /// Memory that holds nothing yet, of zeros.
    fn scratch(&self) -> Result<Address> {
        let (address, bytes) = self.staging.place();
        self.gpu.fill(address, 0, bytes)?;
        Ok(address)
    }
}
