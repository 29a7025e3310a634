//! Attention inside the windows of vision: which kernel, how the rows are shared out, and the launches.
#![allow(unsafe_code)]

use std::ops::Range;

use super::arena::Tensor;
use super::attention::{TILE_PAIRS, Tile, WIDE, WINDOW};
use super::device::CudaDevice;
use super::kernels::{Argument, count, launch};
use super::paged::{ATTENTION_WARPS, scale};
use crate::device::{Activations, Result};

impl CudaDevice {
    /// See [`Device::vision_attention`](crate::device::Device::vision_attention).
    pub(super) fn attend_windows(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        head_dim: usize,
        cu_seqlens: &[u32],
        rows: Range<usize>,
    ) -> Result<Tensor> {
        assert_eq!(qkv.cols(), 3 * num_heads * head_dim, "columns of qkv");
        assert!(rows.end <= qkv.rows(), "rows {rows:?} of {}", qkv.rows());
        let out = self.tensor(rows.len(), num_heads * head_dim)?;
        if out.bytes() == 0 {
            return Ok(out);
        }
        let (first_row, scale) = (count(rows.start), scale(head_dim));
        let kernels = self.kernels.attention(head_dim)?;
        let max_tiles = self.sizes.max_pairs() / 2;
        if let Some(wide) = kernels.wide.as_ref().filter(|_| self.is_wide(head_dim)) {
            let tile = tile_of(cu_seqlens);
            let function = if tile == WINDOW { &wide.window } else { &wide.vision };
            let shared_bytes = tile.shared_bytes(head_dim);
            for tiles in window_tiles(cu_seqlens, rows, tile.rows).chunks(max_tiles) {
                let (grid, at) = ([tiles.len(), num_heads, 1], self.staging.put(tiles)?);
                let (qkv, out) = (qkv.address(), out.address());
                launch!(self, function, grid, tile.threads(); shared_bytes, qkv, at, first_row, scale, out)?;
            }
            return Ok(out);
        }
        for tiles in window_tiles(cu_seqlens, rows, TILE_PAIRS).chunks(max_tiles) {
            launch!(
                self,
                &kernels.vision,
                [tiles.len().div_ceil(ATTENTION_WARPS), num_heads, 1],
                ATTENTION_WARPS * 32,
                qkv.address(),
                self.staging.put(tiles)?,
                count(tiles.len()),
                first_row,
                scale,
                out.address(),
            )?;
        }
        Ok(out)
    }
}

/// What blocks of warpgroups attend with: one warpgroup where that is enough for every window.
fn tile_of(cu_seqlens: &[u32]) -> Tile {
    let longest = cu_seqlens.windows(2).map(|ends| (ends[1] - ends[0]) as usize).max().unwrap_or(0);
    if longest <= WINDOW.rows { WINDOW } else { WIDE }
}

/// The tiles of attention inside windows, of up to `tile_rows` rows: for each first row and end of its window, then the first of
/// its rows and the end of the window's rows whose queries attend, of those in `rows`.
fn window_tiles(cu_seqlens: &[u32], rows: Range<usize>, tile_rows: usize) -> Vec<[u32; 4]> {
    let (first, end) = (rows.start as u32, rows.end as u32);
    let windows = cu_seqlens.windows(2).map(|ends| (ends[0], ends[1]));
    windows
        .flat_map(|(start, stop)| {
            let (from, to) = (start.max(first), stop.min(end));
            (from..to.max(from)).step_by(tile_rows).map(move |row| [start, stop, row, to])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_windows_cover_the_rows_that_attend() {
        assert_eq!(
            window_tiles(&[0, 16, 17, 64], 0..64, 16)[..3],
            [[0, 16, 0, 16], [16, 17, 16, 17], [17, 64, 17, 64]]
        );
        assert_eq!(window_tiles(&[0, 100], 33..50, 16), [[0, 100, 33, 50], [0, 100, 49, 50]]);
        assert_eq!(window_tiles(&[0, 16, 32], 20..20, 16), [[0_u32; 4]; 0]);
        assert_eq!(window_tiles(&[0, 16, 32], 18..20, 16), [[16, 32, 18, 20]]);
        assert_eq!(window_tiles(&[0, 200], 10..200, 128), [[0, 200, 10, 200], [0, 200, 138, 200]]);
    }

    #[test]
    fn windows_that_one_warpgroup_covers_have_one() {
        assert_eq!(tile_of(&[0, 64, 128, 140]), WINDOW);
        assert_eq!(tile_of(&[0, 64, 129]), WIDE);
        assert_eq!(tile_of(&[0]), WINDOW);
    }
}
