//! In which order the vision tower sees the patches of a temporal patch, and which of them attend to each other.

use std::ops::Range;

use crate::config::VisionConfig;

/// The order of the patches of one temporal patch inside the tower.
///
/// Patches that become one token are neighbours; tokens of one attention window are neighbours; windows go
/// row by row.
#[derive(Debug, PartialEq, Eq)]
pub struct WindowOrder {
    /// For each row of the tower, its patch, counted row by row over `[h, w]`.
    pub patches: Vec<u32>,
    /// For each row of the tower, the row and the column of its patch.
    pub positions: Vec<[u32; 2]>,
    /// For each token that the tower gives, its place row by row over the merged grid.
    pub tokens: Vec<u32>,
    /// The tokens where windows begin, and the end.
    pub cu_window_tokens: Vec<u32>,
}

impl WindowOrder {
    /// The order of `h` times `w` patches. Both divide by the merge size.
    pub fn new(config: &VisionConfig, [h, w]: [usize; 2]) -> Self {
        let merge = config.spatial_merge_size;
        let side = window_side(config);
        let (token_rows, token_cols) = (h / merge, w / merge);
        let mut order = Self {
            patches: Vec::with_capacity(h * w),
            positions: Vec::with_capacity(h * w),
            tokens: Vec::with_capacity(token_rows * token_cols),
            cu_window_tokens: vec![0],
        };
        for top in (0..token_rows).step_by(side) {
            for left in (0..token_cols).step_by(side) {
                for row in top..token_rows.min(top + side) {
                    for col in left..token_cols.min(left + side) {
                        order.tokens.push((row * token_cols + col) as u32);
                        order.push_patches(w, [row * merge, col * merge], merge);
                    }
                }
                order.cu_window_tokens.push(order.tokens.len() as u32);
            }
        }
        order
    }

    /// Runs of whole windows, of at most `most` tokens each but for a window that has more: those windows whose first token
    /// lies in `tokens`. For neighbouring ranges of tokens, every window lies in one of them.
    pub fn runs(&self, tokens: Range<usize>, most: usize) -> Vec<Range<usize>> {
        let (end, starts) = self.cu_window_tokens.split_last().expect("an order has an end");
        let from = |token: usize| starts.partition_point(|&start| (start as usize) < token);
        let ends = starts[1.min(starts.len())..].iter().chain([end]);
        let windows = starts.iter().zip(ends).map(|(&start, &end)| start as usize..end as usize);
        let (first, last) = (from(tokens.start), from(tokens.end));
        let mut runs: Vec<Range<usize>> = Vec::new();
        for window in windows.take(last).skip(first) {
            match runs.last_mut() {
                Some(run) if window.end - run.start <= most => run.end = window.end,
                _ => runs.push(window),
            }
        }
        runs
    }

    /// Where the windows of a run of them begin, and the end, counted in rows of the run.
    pub fn cu_seqlens(&self, run: &Range<usize>) -> Vec<u32> {
        let rows_per_token = (self.patches.len() / self.tokens.len().max(1)) as u32;
        let starts =
            self.cu_window_tokens.iter().filter(|&&start| (run.start..=run.end).contains(&(start as usize)));
        starts.map(|&start| (start - run.start as u32) * rows_per_token).collect()
    }

    /// Pushes the patches of one token.
    fn push_patches(&mut self, w: usize, [top, left]: [usize; 2], merge: usize) {
        for row in top..top + merge {
            for col in left..left + merge {
                self.patches.push((row * w + col) as u32);
                self.positions.push([row as u32, col as u32]);
            }
        }
    }
}

/// Tokens on a side of a window.
pub fn window_side(config: &VisionConfig) -> usize {
    config.window_size / config.spatial_merge_size / config.patch_size
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
        let order = WindowOrder::new(&config(), [6, 6]);
        assert_eq!(order.tokens, [0, 1, 3, 4, 2, 5, 6, 7, 8]);
        assert_eq!(order.cu_window_tokens, [0, 4, 6, 8, 9]);
        // Token 1 is at column 1 of the tokens, so its patches are at columns 2 and 3.
        assert_eq!(order.patches[4..8], [2, 3, 8, 9]);
        assert_eq!(order.positions[4..8], [[0, 2], [0, 3], [1, 2], [1, 3]]);
    }

    #[test]
    fn every_patch_comes_once() {
        let order = WindowOrder::new(&config(), [4, 8]);
        let mut patches = order.patches.clone();
        patches.sort_unstable();
        assert!(patches.into_iter().eq(0..32));
        assert_eq!(order.tokens, [0, 1, 4, 5, 2, 3, 6, 7]);
    }

    #[test]
    fn a_window_belongs_to_the_range_that_has_its_first_token() {
        let order = WindowOrder::new(&config(), [6, 6]);
        let runs = |tokens, most| -> Vec<[usize; 2]> {
            order.runs(tokens, most).into_iter().map(|run| [run.start, run.end]).collect()
        };
        assert_eq!(runs(0..9, 100), [[0, 9]]);
        assert_eq!(runs(0..9, 4), [[0, 4], [4, 8], [8, 9]]);
        assert_eq!(runs(0..9, 1), [[0, 4], [4, 6], [6, 8], [8, 9]], "a window is never cut");
        assert_eq!((runs(1..4, 100), runs(4..5, 100)), (vec![], vec![[4, 6]]));
        assert_eq!(runs(5..9, 100), [[6, 9]]);
        assert_eq!((order.cu_seqlens(&(4..8)), order.cu_seqlens(&(0..4))), (vec![0, 8, 16], vec![0, 16]));
        for cut in 0..=9 {
            let parts = [order.runs(0..cut, 100), order.runs(cut..9, 100)].concat();
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, 9));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "{parts:?}");
        }
    }
}
