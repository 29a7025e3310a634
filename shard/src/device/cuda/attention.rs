//! How the rows of a step are shared out to the warps of attention.
//!
//! `kernels/attention.cu` says what the numbers mean. A sequence with a tile's rows or fewer, as one that decodes, has its context
//! split over warps, as long as there is room for what the splits give; the others' warps go over all of theirs. Both give the
//! same bits. Where there are kernels of warpgroups (`kernels/attention_sm90.cu`) and other bits are no harm, these take the
//! sequences that have rows enough for them.

use crate::device::{KV_BLOCK_TOKENS, SequenceRows};

/// Tokens of a split. Bits depend on it: it is the same for all contexts.
pub const SPLIT_TOKENS: usize = 256;

/// Pairs of a row and a query head that a warp attends with.
pub const TILE_PAIRS: usize = 16;

/// What a block of warpgroups attends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Pairs of a row and a query head, or rows of a window, and also the tokens that the block goes over at a time.
    pub rows: usize,
}

/// Two warpgroups.
pub const WIDE: Tile = Tile { rows: 128 };

/// A single one: for windows that have no more rows and tokens.
pub const WINDOW: Tile = Tile { rows: 64 };

impl Tile {
    /// Threads of the block: a warpgroup of 128 for each 64 rows.
    pub fn threads(self) -> usize {
        2 * self.rows
    }

    /// Its dynamic shared memory: the queries and three tiles of keys and values, at a multiple of 1024 bytes.
    pub fn shared_bytes(self, head_dim: usize) -> usize {
        7 * self.rows * head_dim * size_of::<half::bf16>() + 1024
    }
}

/// Pairs of a sequence that half fill a block of warpgroups. For fewer most of its products would be for nothing.
const MIN_WIDE_PAIRS: usize = 64;

/// Splits of all rows that there is room for.
pub const MAX_SPLITS: usize = 4096;

/// Words that everything begins at multiples of, as vectors of four.
const VECTOR: usize = 4;

/// Where in the words of a step its parts are, and how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Its first word.
    pub start: usize,
    /// How many elements, of whatever kind.
    pub count: usize,
}

/// The sequences whose contexts are split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// For each sequence four words, rows counted among `rows`.
    pub sequences: Part,
    /// The work of a warp, two words.
    pub tiles: Part,
    /// Which rows of the step they are.
    pub rows: Part,
    /// How many tokens each of these sees.
    pub visible: Part,
    /// Splits of the longest context.
    pub num_splits: usize,
}

/// Sequences whose contexts are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// For each sequence four words.
    pub sequences: Part,
    /// The work of a warp or of a block, two words.
    pub tiles: Part,
}

/// The rows of a step as the GPU gets them: one run of words, and what is where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepWords {
    /// All of them.
    pub words: Vec<u32>,
    /// Tokens of the rows.
    pub token_ids: Part,
    /// Slots of the rows.
    pub slots: Part,
    /// Blocks of all sequences.
    pub block_tables: Part,
    /// Sequences whose contexts are split.
    pub split: Split,
    /// Those that warpgroups attend with.
    pub wide: Whole,
    /// And the others.
    pub whole: Whole,
}

impl StepWords {
    /// Shares out the rows of a step. `most_sharing` is the most query heads that share keys and values; `is_wide` says that
    /// warpgroups may attend.
    ///
    /// # Panics
    /// A sequence has too few blocks.
    pub fn new(
        token_ids: &[u32],
        slots: &[u32],
        sequences: &[SequenceRows],
        most_sharing: usize,
        is_wide: bool,
    ) -> Self {
        let mut step = Self::default();
        step.token_ids = step.push(token_ids, 1);
        step.slots = step.push(slots, 1);
        let mut tables = Vec::new();
        let mut starts = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let num_tokens = sequence.num_computed_tokens + sequence.rows.len();
            let num_blocks = num_tokens.div_ceil(KV_BLOCK_TOKENS);
            assert!(sequence.block_table.len() >= num_blocks, "blocks of a sequence of {num_tokens} tokens");
            starts.push(tables.len());
            tables.extend_from_slice(&sequence.block_table[..num_blocks]);
        }
        let (mut split, mut wide, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        let (mut split_rows, mut num_splits) = (0, 0);
        for (sequence, &start) in sequences.iter().zip(&starts) {
            let splits = (sequence.num_computed_tokens + sequence.rows.len()).div_ceil(SPLIT_TOKENS);
            let rows = split_rows + sequence.rows.len();
            let pairs = sequence.rows.len() * most_sharing;
            let fits = rows * num_splits.max(splits) <= MAX_SPLITS;
            if fits && pairs <= TILE_PAIRS.max(most_sharing) {
                (split_rows, num_splits) = (rows, num_splits.max(splits));
                split.push((sequence, start));
            } else if is_wide && pairs >= MIN_WIDE_PAIRS {
                wide.push((sequence, start));
            } else {
                whole.push((sequence, start));
            }
        }
        // Few numbers of them, so that steps are often alike; what is beyond a context has nothing to do.
        let rounded = num_splits.next_power_of_two();
        let num_splits = if split_rows * rounded <= MAX_SPLITS { rounded } else { num_splits };
        step.push_split(&split, most_sharing, num_splits);
        step.wide = step.push_whole(&wide, most_sharing, WIDE.rows);
        step.whole = step.push_whole(&whole, most_sharing, TILE_PAIRS);
        // Last, so that where the others are follows from their numbers.
        step.block_tables = step.push(&tables, 1);
        step
    }

    /// The most words of a step of so many rows and sequences, each of up to `max_blocks` blocks.
    pub fn max_words(rows: usize, sequences: usize, max_blocks: usize, most_sharing: usize) -> usize {
        let tiles = rows * most_sharing.div_ceil(TILE_PAIRS) + rows * most_sharing / TILE_PAIRS + sequences;
        // Tokens, slots, split rows and what these see; blocks; sequences and tiles; and the gaps between all of them.
        4 * rows + sequences * max_blocks + 4 * sequences + 2 * tiles + 12 * VECTOR
    }

    fn push(&mut self, words: &[u32], words_each: usize) -> Part {
        let start = self.words.len().next_multiple_of(VECTOR);
        self.words.resize(start, 0);
        self.words.extend_from_slice(words);
        Part { start, count: words.len() / words_each }
    }

    fn push_split(&mut self, sequences: &[(&SequenceRows, usize)], most_sharing: usize, num_splits: usize) {
        let (mut rows, mut visible) = (Vec::new(), Vec::new());
        let mut of_sequences = Vec::new();
        for (sequence, table) in sequences {
            let computed = sequence.num_computed_tokens;
            of_sequences.extend(words([rows.len(), sequence.rows.len(), computed, *table]));
            rows.extend(sequence.rows.clone().map(|row| row as u32));
            visible.extend((0..sequence.rows.len()).map(|row| (computed + row + 1) as u32));
        }
        let tiles = tiles(sequences, most_sharing, TILE_PAIRS);
        self.split = Split {
            sequences: self.push(&of_sequences, 4),
            tiles: self.push(&tiles, 2),
            rows: self.push(&rows, 1),
            visible: self.push(&visible, 1),
            num_splits,
        };
    }

    fn push_whole(
        &mut self,
        sequences: &[(&SequenceRows, usize)],
        most_sharing: usize,
        tile_pairs: usize,
    ) -> Whole {
        let of_sequences: Vec<u32> = sequences
            .iter()
            .flat_map(|(sequence, table)| {
                words([sequence.rows.start, sequence.rows.len(), sequence.num_computed_tokens, *table])
            })
            .collect();
        let tiles = tiles(sequences, most_sharing, tile_pairs);
        Whole { sequences: self.push(&of_sequences, 4), tiles: self.push(&tiles, 2) }
    }
}

fn words(numbers: [usize; 4]) -> [u32; 4] {
    numbers.map(|number| number as u32)
}

/// `(sequence, first pair)` of each tile. The last tokens see most and come first, so that the longest work does not begin last.
fn tiles(sequences: &[(&SequenceRows, usize)], most_sharing: usize, tile_pairs: usize) -> Vec<u32> {
    let mut tiles = Vec::new();
    for (index, (sequence, _)) in sequences.iter().enumerate() {
        let pairs = (0..sequence.rows.len() * most_sharing).step_by(tile_pairs);
        tiles.extend(pairs.rev().flat_map(|pair| [index as u32, pair as u32]));
    }
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(rows: std::ops::Range<usize>, num_computed_tokens: usize, first_block: u32) -> SequenceRows {
        let num_blocks = (num_computed_tokens + rows.len()).div_ceil(KV_BLOCK_TOKENS) as u32;
        SequenceRows {
            rows,
            num_computed_tokens,
            // One more than it needs yet.
            block_table: (first_block..=first_block + num_blocks).collect(),
        }
    }

    fn part(step: &StepWords, part: Part, words_each: usize) -> &[u32] {
        &step.words[part.start..part.start + part.count * words_each]
    }

    #[test]
    fn sequences_that_decode_are_split_and_chunks_are_not() {
        let sequences = [sequence(0..1, 600, 0), sequence(1..41, 0, 50), sequence(41..43, 31, 90)];
        let ids: Vec<u32> = (0..43).collect();
        let step = StepWords::new(&ids, &ids, &sequences, 7, false);
        assert_eq!(part(&step, step.token_ids, 1), ids);
        assert_eq!(part(&step, step.slots, 1), ids);
        assert_eq!(step.block_tables.count, 19 + 2 + 2);
        assert_eq!(part(&step, step.split.sequences, 4), [0, 1, 600, 0, 1, 2, 31, 21]);
        assert_eq!(part(&step, step.split.rows, 1), [0, 41, 42]);
        assert_eq!(part(&step, step.split.visible, 1), [601, 32, 33]);
        assert_eq!(part(&step, step.split.tiles, 2), [0, 0, 1, 0]);
        assert_eq!(step.split.num_splits, 4);
        assert_eq!(part(&step, step.whole.sequences, 4), [1, 40, 0, 19]);
        let first_pairs: Vec<u32> = part(&step, step.whole.tiles, 2).chunks(2).map(|tile| tile[1]).collect();
        assert_eq!(first_pairs, (0..280).step_by(16).rev().collect::<Vec<u32>>());
        for part in [step.slots, step.split.sequences, step.split.tiles, step.whole.sequences] {
            assert!(part.start.is_multiple_of(VECTOR));
        }
        assert!(step.words.len() <= StepWords::max_words(43, 3, 20, 7));
    }

    #[test]
    fn splits_stay_within_their_room() {
        let tokens = SPLIT_TOKENS * MAX_SPLITS / 2;
        let sequences = [sequence(0..1, tokens - 1, 0), sequence(1..2, 5, 0), sequence(2..3, 9, 0)];
        let step = StepWords::new(&[0; 3], &[0; 3], &sequences, 4, false);
        assert_eq!(part(&step, step.split.rows, 1), [0, 1]);
        assert_eq!(part(&step, step.whole.sequences, 4)[..2], [2, 1]);
    }

    #[test]
    fn a_row_whose_queries_fill_several_tiles_is_split_all_the_same() {
        let step = StepWords::new(&[0], &[0], &[sequence(0..1, 40, 0)], 20, true);
        assert_eq!(part(&step, step.split.tiles, 2), [0, 16, 0, 0]);
        assert_eq!(step.whole, Whole { sequences: step.whole.sequences, tiles: step.whole.tiles });
        assert_eq!((step.whole.sequences.count, step.whole.tiles.count), (0, 0));
        assert!(step.words.len() <= StepWords::max_words(1, 1, 2, 20));
    }

    #[test]
    fn sequences_with_rows_enough_go_to_warpgroups() {
        let sequences = [sequence(0..1, 600, 0), sequence(1..41, 0, 50), sequence(41..50, 31, 90)];
        let ids: Vec<u32> = (0..50).collect();
        let step = StepWords::new(&ids, &ids, &sequences, 7, true);
        assert_eq!(part(&step, step.split.sequences, 4), [0, 1, 600, 0]);
        assert_eq!(part(&step, step.wide.sequences, 4), [1, 40, 0, 19]);
        assert_eq!(part(&step, step.wide.tiles, 2), [0, 256, 0, 128, 0, 0]);
        assert_eq!(part(&step, step.whole.sequences, 4), [41, 9, 31, 21]);
        assert_eq!(part(&step, step.whole.tiles, 2), [0, 48, 0, 32, 0, 16, 0, 0]);
        assert!(step.words.len() <= StepWords::max_words(50, 3, 20, 7));
        let narrow = StepWords::new(&ids, &ids, &sequences, 7, false);
        assert_eq!((narrow.wide.sequences.count, narrow.whole.sequences.count), (0, 2));
    }

    #[test]
    fn a_row_of_many_queries_that_decodes_is_split_all_the_same() {
        let step = StepWords::new(&[0], &[0], &[sequence(0..1, 40, 0)], 64, true);
        assert_eq!((step.split.sequences.count, step.wide.sequences.count), (1, 0));
    }
}
