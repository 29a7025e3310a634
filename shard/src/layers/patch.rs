//! The patch embedding, its rows split over ranks.

use crate::device::{Device, HostMatrix, PatchLayout, Result};
use crate::layers::partition::{self, ColumnRange, Parallel};
use crate::weights::{Loader, RowSlice};

/// Patches that are embedded at a time, so that a large picture's pixels never stand in memory as floats at
/// once.
const CHUNK_PATCHES: usize = 4096;

/// Rows of zeros that are copied from the host, to be copied many times on the device.
const ZERO_ROWS: usize = 128;

/// A convolution whose stride is its kernel: a linear layer over the values of a patch. Every rank has all of
/// it (it is a few megabytes) and embeds its share of the patches.
pub struct PatchEmbed<D: Device> {
    linear: D::Linear,
    hidden_size: usize,
    parallel: Parallel,
}

impl<D: Device> PatchEmbed<D> {
    /// Loads `{prefix}.weight`, `[hidden_size, kernel..]`.
    pub fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        hidden_size: usize,
        kernel: [usize; 4],
        parallel: Parallel,
    ) -> Result<Self> {
        let name = format!("{prefix}.weight");
        let [channels, frames, height, width] = kernel;
        let shape = [hidden_size, channels, frames, height, width];
        let slice = RowSlice { name: &name, shape: &shape, rows: 0..hidden_size, padded_rows: hidden_size };
        let values = kernel.iter().product();
        let cols = ColumnRange { cols: 0..values, padded: values };
        let matrix: HostMatrix = loader.matrix(&[slice], cols.cols, cols.padded)?;
        Ok(Self { linear: loader.device.pack_linear(matrix, None)?, hidden_size, parallel })
    }

    /// Patches of `pixels` in `order`: `-> [patches, hidden]`, one addend of as many as there are ranks. Rows
    /// of other ranks are zero, so that the sum is exact.
    pub fn forward(
        &self,
        device: &D,
        pixels: &[u8],
        layout: &PatchLayout,
        order: &[u32],
    ) -> Result<D::Tensor> {
        let mine = partition::rows(order.len(), self.parallel);
        let mut out = device.empty(order.len(), self.hidden_size)?;
        for start in mine.clone().step_by(CHUNK_PATCHES) {
            let end = mine.end.min(start + CHUNK_PATCHES);
            let patches = device.patches(pixels, layout, &order[start..end])?;
            device.copy_rows(&device.linear(&patches, &self.linear)?, &mut out, start)?;
        }
        for others in [0..mine.start, mine.end..order.len()] {
            if others.is_empty() {
                continue;
            }
            let rows = others.len().min(ZERO_ROWS);
            let zeros = device.upload(rows, self.hidden_size, &vec![0.0; rows * self.hidden_size])?;
            for start in others.clone().step_by(rows) {
                // The last copy may overlap the one before.
                device.copy_rows(&zeros, &mut out, start.min(others.end - rows))?;
            }
        }
        Ok(out)
    }
}
