//! In which order the vision tower sees patches, and which of them attend to each other.

use crate::config::VisionConfig;

/// The order of a medium's patches inside the tower.
///
/// Patches that become one token are neighbours; tokens of one attention window are neighbours; windows go
/// row by row over each frame.
#[derive(Debug, PartialEq, Eq)]
pub struct WindowOrder {
    /// For each row of the tower, its patch, counted row by row over `[t, h, w]`.
    pub patches: Vec<u32>,
    /// For each row of the tower, the row and the column of its patch in the frame.
    pub positions: Vec<[u32; 2]>,
    /// For each token that the tower gives, its place row by row over the merged grid.
    pub tokens: Vec<u32>,
    /// Where windows begin, and the end.
    pub cu_window_seqlens: Vec<u32>,
    /// Where frames begin, and the end.
    pub cu_seqlens: Vec<u32>,
}

impl WindowOrder {
    /// The order of a medium of `grid` patches in time, height and width. Height and width divide by the
    /// merge size.
    pub fn new(config: &VisionConfig, [t, h, w]: [usize; 3]) -> Self {
        let merge = config.spatial_merge_size;
        // Tokens on a side of a window.
        let side = config.window_size / merge / config.patch_size;
        let (token_rows, token_cols) = (h / merge, w / merge);
        let mut order = Self {
            patches: Vec::with_capacity(t * h * w),
            positions: Vec::with_capacity(t * h * w),
            tokens: Vec::with_capacity(t * token_rows * token_cols),
            cu_window_seqlens: vec![0],
            cu_seqlens: vec![0],
        };
        for frame in 0..t {
            for top in (0..token_rows).step_by(side) {
                for left in (0..token_cols).step_by(side) {
                    for row in top..token_rows.min(top + side) {
                        for col in left..token_cols.min(left + side) {
                            order.tokens.push(((frame * token_rows + row) * token_cols + col) as u32);
                            order.push_patches(frame * h * w, w, [row * merge, col * merge], merge);
                        }
                    }
                    order.cu_window_seqlens.push(order.patches.len() as u32);
                }
            }
            order.cu_seqlens.push(order.patches.len() as u32);
        }
        order
    }

    /// Pushes the patches of one token.
    fn push_patches(&mut self, first_of_frame: usize, w: usize, [top, left]: [usize; 2], merge: usize) {
        for row in top..top + merge {
            for col in left..left + merge {
                self.patches.push((first_of_frame + row * w + col) as u32);
                self.positions.push([row as u32, col as u32]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows of 2 x 2 tokens, tokens of 2 x 2 patches.
    fn config() -> VisionConfig {
        VisionConfig {
            depth: 1,
            hidden_size: 16,
            intermediate_size: 16,
            num_heads: 1,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 56,
            out_hidden_size: 16,
            fullatt_block_indexes: Vec::new(),
            tokens_per_second: 2,
            rope_theta: 10_000.0,
        }
    }

    #[test]
    fn windows_at_the_edge_are_smaller() {
        // 3 x 3 tokens: windows of 2x2, 2x1, 1x2 and 1x1. The same as the reference's
        // get_vision_window_index.
        let order = WindowOrder::new(&config(), [1, 6, 6]);
        assert_eq!(order.tokens, [0, 1, 3, 4, 2, 5, 6, 7, 8]);
        assert_eq!(order.cu_window_seqlens, [0, 16, 24, 32, 36]);
        assert_eq!(order.cu_seqlens, [0, 36]);
        // Token 1 is at column 1 of the tokens, so its patches are at columns 2 and 3.
        assert_eq!(order.patches[4..8], [2, 3, 8, 9]);
        assert_eq!(order.positions[4..8], [[0, 2], [0, 3], [1, 2], [1, 3]]);
    }

    #[test]
    fn frames_follow_each_other_and_every_patch_comes_once() {
        let order = WindowOrder::new(&config(), [3, 4, 8]);
        assert_eq!(order.cu_seqlens, [0, 32, 64, 96]);
        assert_eq!(order.cu_window_seqlens, [0, 16, 32, 48, 64, 80, 96]);
        let mut patches = order.patches.clone();
        patches.sort_unstable();
        assert!(patches.into_iter().eq(0..96));
        assert_eq!(order.tokens[8..16], [8, 9, 12, 13, 10, 11, 14, 15]);
    }
}
