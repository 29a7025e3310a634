//! In which stages the vision tower works on a medium, so that this work can be done in pieces.
//!
//! Attention never crosses from one temporal patch of a medium to another, so the tower takes these one after the other,
//! and within one stage after stage. The work on a medium is counted in units of one token in one stage, in the order in
//! which it is done: temporal patch, stage, token (in the tower's order of windows). So how far it is, is one number.

use std::ops::Range;

use crate::config::VisionConfig;

/// What is done with all tokens of a temporal patch before anything else is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A block whose attention stays within windows.
    Windowed {
        /// Which block.
        block: usize,
    },
    /// The first half of a block whose attention spans the temporal patch: queries, keys and values of all rows.
    Project {
        /// Which block.
        block: usize,
    },
    /// Its second half: attention to all rows, and the rest of the block.
    Attend {
        /// Which block.
        block: usize,
    },
}

/// The stages of a tower. The patch embedding belongs to the first, the merger to the last.
pub fn stages(config: &VisionConfig) -> Vec<Stage> {
    let of_block = |block| {
        if config.fullatt_block_indexes.contains(&block) {
            vec![Stage::Project { block }, Stage::Attend { block }]
        } else {
            vec![Stage::Windowed { block }]
        }
    };
    (0..config.depth).flat_map(of_block).collect()
}

/// At how many tokens in a temporal patch attending to all of them costs as much as the linear layers of a block.
///
/// A row meets `4 h^2 + 3 h m` weights in these (queries, keys, values and output of width `h`; gate, up and down of width
/// `m`), and `2 h` numbers of every row that it attends to (its key and its value): as many with `(4 h + 3 m) / 2` rows,
/// of which a token has as many as it merges patches.
pub fn attention_tokens(config: &VisionConfig) -> usize {
    ((4 * config.hidden_size + 3 * config.intermediate_size) / (2 * config.merge_unit())).max(1)
}

/// The parts of `work` on a medium by its temporal patches, each of which is `frame_units` units: the temporal patch, and
/// the work on it alone.
pub fn by_frame(work: Range<u64>, frame_units: u64) -> impl Iterator<Item = (usize, Range<usize>)> {
    let frames = work.start / frame_units..work.end.div_ceil(frame_units);
    frames.map(move |frame| {
        let first = frame * frame_units;
        let within = |unit: u64| (unit.clamp(first, first + frame_units) - first) as usize;
        (frame as usize, within(work.start)..within(work.end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_falls_into_temporal_patches_without_a_gap() {
        let parts = |work| by_frame(work, 10).collect::<Vec<_>>();
        assert_eq!(parts(0..10), [(0, 0..10)]);
        assert_eq!(parts(3..25), [(0, 3..10), (1, 0..10), (2, 0..5)]);
        assert_eq!(parts(20..21), [(2, 0..1)]);
        assert_eq!(parts(29..30), [(2, 9..10)]);
    }
}
