//! How the rows of a step are shared out to the warps of attention.
//!
//! `kernels/attention.cu` says what the numbers mean. A sequence with a tile's rows or fewer, as one that decodes, has its context
//! cut into pieces of work, as long as there is room for what they give; the others' warps go over all of theirs. Both give the
//! same bits. Where there are kernels of warpgroups (`kernels/attention_sm90.cu`) and other bits are no harm, these take the
//! sequences that have rows enough for them.
//!
//! # How long a piece is
//!
//! The result of a context is a tree: tiles of [`KV_BLOCK_TOKENS`] are merged to splits of [`SPLIT_TOKENS`], these to runs of
//! [`RUN_TOKENS`], and runs to the whole, always in the same order. A piece is a node of it, and a warp's work for a head of keys and
//! values. Pieces of any of the three lengths give the same bits, so that each step has the length that suits it: the longest that is
//! no longer than a [`SHARES`]th of all that the step reads. What that comes to for the 7B model on an H200, which has 132
//! processors of five such warps (shared memory for two tiles each):
//!
//! - From 2,048 tokens on that a step reads for four heads of keys and values, or 8,192 for the one that a rank of four has, there
//!   are 256 pieces or more, and at most eight times as many. A warp has a tile of 16 KB on its way while it works on another; the
//!   two warps of a processor have more on the way than the 25 KB that it takes to read 4.8 TB/s at a latency of 0.7 us.
//! - Below, pieces are tiles, the least that a warp works on. One context of 1,024 tokens is 128 of them with four heads. With
//!   one head it is 32, 512 KB in all, which take as long as one tile takes.
//! - What a piece gives is 3.6 KB, written once and read once. Of the 64 KB that a split has read it is a twentieth, of the 512 KB of
//!   a run less than a hundredth. Of a tile's it is a quarter, but in steps only that read less than 17 MB a layer, and it stays in the
//!   second-level cache.
//!
//! A context has pieces by its own length, so what is bounded is their sum ([`max_pieces`]). Where it would be more, pieces are longer.

use crate::device::{KV_BLOCK_TOKENS, SequenceRows};

/// Tokens of a split. Bits depend on it: it is the same for all contexts.
pub const SPLIT_TOKENS: usize = 128;

/// Tokens of a run. Bits depend on it, too.
pub const RUN_TOKENS: usize = 1024;

/// What pieces may have, from the shortest.
const PIECE_TOKENS: [usize; 3] = [KV_BLOCK_TOKENS, SPLIT_TOKENS, RUN_TOKENS];

/// A run of a row is a warp's to combine, up to so many at a time.
const MAX_COMBINE_WARPS: usize = 16;

/// No piece is longer than one of so many equal shares of a step, unless it is a tile.
const SHARES: usize = 256;

/// The most pieces of all rows that there is ever room for: 128 contexts of 131,072 tokens in runs.
const MAX_PIECES: usize = 16384;

/// Pieces of all rows, where there are so many rows of so many tokens: of the longest ones for the longest contexts, or of shorter
/// ones for so many tokens that longer ones are not yet taken.
pub fn max_pieces(rows: usize, context_tokens: usize, num_kv: usize) -> usize {
    let shorter = PIECE_TOKENS.windows(2).map(|lengths| SHARES * lengths[1] / lengths[0] / num_kv.max(1));
    let most =
        shorter.fold(rows * context_tokens.div_ceil(RUN_TOKENS), |most, pieces| most.max(pieces + rows));
    most.min(MAX_PIECES)
}

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
    /// The work of a warp for each head of keys and values, four words. Those at the end have nothing to do.
    pub pieces: Part,
    /// For each row four words.
    pub rows: Part,
    /// Warps that make a result of a row's pieces.
    pub combine_warps: usize,
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

/// What the work of a step depends on beside its sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// Heads of keys and values.
    pub num_kv: usize,
    /// The most query heads that share one of them.
    pub most_sharing: usize,
    /// Pieces of all rows that there is room for.
    pub max_pieces: usize,
    /// Whether warpgroups may attend.
    pub is_wide: bool,
}

impl Sharing {
    /// Whether a sequence's context is cut into pieces where there is room.
    fn is_cut(&self, sequence: &SequenceRows) -> bool {
        sequence.rows.len() * self.most_sharing <= TILE_PAIRS.max(self.most_sharing)
    }

    /// Tiles of pairs that the rows of a sequence are.
    fn tiles(&self, sequence: &SequenceRows) -> usize {
        (sequence.rows.len() * self.most_sharing).div_ceil(TILE_PAIRS)
    }

    /// Tokens of the pieces of a step.
    fn piece_tokens(&self, sequences: &[SequenceRows]) -> usize {
        let cut = || sequences.iter().filter(|sequence| self.is_cut(sequence));
        let read: usize = cut().map(|sequence| self.tiles(sequence) * num_tokens(sequence)).sum();
        let share = read * self.num_kv / SHARES;
        let shortest = PIECE_TOKENS.iter().rposition(|&tokens| tokens <= share).unwrap_or(0);
        let fits = |&tokens: &usize| {
            cut().map(|sequence| places(sequence, tokens)).sum::<usize>() <= self.max_pieces
        };
        PIECE_TOKENS[shortest..].iter().copied().find(fits).unwrap_or(RUN_TOKENS)
    }
}

/// Tokens of a sequence when a step is done.
fn num_tokens(sequence: &SequenceRows) -> usize {
    sequence.num_computed_tokens + sequence.rows.len()
}

/// Pieces of so many tokens that the rows of a sequence have.
fn places(sequence: &SequenceRows, piece_tokens: usize) -> usize {
    sequence.rows.len() * num_tokens(sequence).div_ceil(piece_tokens)
}

impl StepWords {
    /// Shares out the rows of a step.
    ///
    /// # Panics
    /// A sequence has too few blocks.
    pub fn new(token_ids: &[u32], slots: &[u32], sequences: &[SequenceRows], sharing: Sharing) -> Self {
        let most_sharing = sharing.most_sharing;
        let mut step = Self::default();
        step.token_ids = step.push(token_ids, 1);
        step.slots = step.push(slots, 1);
        let mut tables = Vec::new();
        let mut starts = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let num_tokens = num_tokens(sequence);
            let num_blocks = num_tokens.div_ceil(KV_BLOCK_TOKENS);
            assert!(sequence.block_table.len() >= num_blocks, "blocks of a sequence of {num_tokens} tokens");
            starts.push(tables.len());
            tables.extend_from_slice(&sequence.block_table[..num_blocks]);
        }
        let (mut split, mut wide, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        let (piece_tokens, mut num_places) = (sharing.piece_tokens(sequences), 0);
        for (sequence, &start) in sequences.iter().zip(&starts) {
            let end = num_places + places(sequence, piece_tokens);
            if sharing.is_cut(sequence) && end <= sharing.max_pieces {
                num_places = end;
                split.push((sequence, start));
            } else if sharing.is_wide && sequence.rows.len() * most_sharing >= MIN_WIDE_PAIRS {
                wide.push((sequence, start));
            } else {
                whole.push((sequence, start));
            }
        }
        step.push_split(&split, most_sharing, piece_tokens);
        step.wide = step.push_whole(&wide, most_sharing, WIDE.rows);
        step.whole = step.push_whole(&whole, most_sharing, TILE_PAIRS);
        // Last, so that where the others are follows from their numbers.
        step.block_tables = step.push(&tables, 1);
        step
    }

    /// The most words of a step of so many rows and sequences, each of up to `max_blocks` blocks.
    pub fn max_words(rows: usize, sequences: usize, max_blocks: usize, sharing: Sharing) -> usize {
        let tiles_of_row = sharing.most_sharing.div_ceil(TILE_PAIRS);
        let tiles = rows * tiles_of_row + rows * sharing.most_sharing / TILE_PAIRS + sequences;
        let pieces = (sharing.max_pieces * tiles_of_row).next_power_of_two();
        // Tokens and slots; split rows; blocks; sequences, tiles and pieces; and the gaps between all of them.
        6 * rows + sequences * max_blocks + 4 * sequences + 2 * tiles + 4 * pieces + 12 * VECTOR
    }

    fn push(&mut self, words: &[u32], words_each: usize) -> Part {
        let start = self.words.len().next_multiple_of(VECTOR);
        self.words.resize(start, 0);
        self.words.extend_from_slice(words);
        Part { start, count: words.len() / words_each }
    }

    fn push_split(&mut self, sequences: &[(&SequenceRows, usize)], most_sharing: usize, piece_tokens: usize) {
        let (mut of_sequences, mut rows, mut pieces) = (Vec::new(), Vec::new(), Vec::new());
        let (mut place, mut longest) = (0, 0);
        for (index, (sequence, table)) in sequences.iter().enumerate() {
            let (computed, num_rows) = (sequence.num_computed_tokens, sequence.rows.len());
            let first_tokens = (0..num_tokens(sequence)).step_by(piece_tokens);
            longest = longest.max(num_tokens(sequence));
            of_sequences.extend(words([rows.len() / 4, num_rows, computed, *table]));
            for (i, row) in sequence.rows.clone().enumerate() {
                rows.extend(words([row, computed + i + 1, place, piece_tokens]));
                place += first_tokens.len();
            }
            for pair in (0..num_rows * most_sharing).step_by(TILE_PAIRS) {
                pieces
                    .extend(first_tokens.clone().flat_map(|token| words([index, pair, token, piece_tokens])));
            }
        }
        // Few numbers of them, so that steps are often alike.
        let rounded = if pieces.is_empty() { 0 } else { (pieces.len() / 4).next_power_of_two() };
        pieces.resize(4 * rounded, 0);
        self.split = Split {
            sequences: self.push(&of_sequences, 4),
            pieces: self.push(&pieces, 4),
            rows: self.push(&rows, 4),
            combine_warps: longest.div_ceil(RUN_TOKENS).next_power_of_two().min(MAX_COMBINE_WARPS),
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

    const SHARING: Sharing = Sharing { num_kv: 1, most_sharing: 7, max_pieces: 1000, is_wide: false };

    #[test]
    fn sequences_that_decode_are_cut_and_chunks_are_not() {
        let sequences = [sequence(0..1, 100, 0), sequence(1..41, 0, 50), sequence(41..43, 31, 90)];
        let ids: Vec<u32> = (0..43).collect();
        let step = StepWords::new(&ids, &ids, &sequences, SHARING);
        assert_eq!(part(&step, step.token_ids, 1), ids);
        assert_eq!(part(&step, step.slots, 1), ids);
        assert_eq!(step.block_tables.count, 4 + 2 + 2);
        assert_eq!(part(&step, step.split.sequences, 4), [0, 1, 100, 0, 1, 2, 31, 6]);
        assert_eq!(part(&step, step.split.rows, 4), [0, 101, 0, 32, 41, 32, 4, 32, 42, 33, 6, 32]);
        let pieces =
            [[0, 0, 0, 32], [0, 0, 32, 32], [0, 0, 64, 32], [0, 0, 96, 32], [1, 0, 0, 32], [1, 0, 32, 32]];
        assert_eq!(part(&step, step.split.pieces, 4), [&pieces.concat()[..], &[0; 8]].concat());
        assert_eq!(part(&step, step.whole.sequences, 4), [1, 40, 0, 4]);
        let first_pairs: Vec<u32> = part(&step, step.whole.tiles, 2).chunks(2).map(|tile| tile[1]).collect();
        assert_eq!(first_pairs, (0..280).step_by(16).rev().collect::<Vec<u32>>());
        for part in [step.slots, step.split.sequences, step.split.pieces, step.whole.sequences] {
            assert!(part.start.is_multiple_of(VECTOR));
        }
        assert!(step.words.len() <= StepWords::max_words(43, 3, 20, SHARING));
    }

    /// A step in which each context gets its next token.
    fn decode(contexts: impl IntoIterator<Item = usize>, sharing: Sharing) -> StepWords {
        let row = |(i, tokens): (usize, usize)| sequence(i..i + 1, tokens - 1, 0);
        let sequences: Vec<SequenceRows> = contexts.into_iter().enumerate().map(row).collect();
        let ids = vec![0; sequences.len()];
        StepWords::new(&ids, &ids, &sequences, sharing)
    }

    /// How many pieces of what length a step has that are not empty.
    fn pieces(step: &StepWords) -> (usize, usize) {
        let pieces = part(step, step.split.pieces, 4).chunks(4).filter(|piece| piece[3] > 0);
        (pieces.clone().count(), pieces.map(|piece| piece[3] as usize).max().unwrap_or(0))
    }

    fn of_7b(world_size: usize, rows: usize, tokens: usize) -> Sharing {
        let num_kv = (4 / world_size).max(1);
        Sharing { num_kv, most_sharing: 7, max_pieces: max_pieces(rows, tokens, num_kv), is_wide: true }
    }

    #[test]
    fn the_processors_of_a_gpu_have_a_piece_each() {
        const PROCESSORS: usize = 132;
        const MIB: usize = 1 << 20;
        for (world_size, batch, tokens, blocks, length) in [
            (1, 1, 1024, 128, 32),
            (1, 8, 1024, 256, 128),
            (1, 32, 1024, 1024, 128),
            (1, 1, 32_768, 1024, 128),
            (1, 8, 32_768, 1024, 1024),
            (1, 32, 32_768, 4096, 1024),
            // As many as there are tiles.
            (4, 1, 1024, 32, 32),
            (4, 8, 1024, 256, 32),
            (4, 32, 1024, 256, 128),
            (4, 1, 32_768, 256, 128),
            (4, 8, 32_768, 256, 1024),
            (4, 32, 32_768, 1024, 1024),
            (4, 128, 131_072, 16_384, 1024),
        ] {
            let what = format!("{world_size} GPUs, {batch} x {tokens} tokens");
            let sharing = of_7b(world_size, batch, tokens);
            let step = decode(vec![tokens; batch], sharing);
            let (num_pieces, longest) = pieces(&step);
            assert_eq!((num_pieces * sharing.num_kv, longest), (blocks, length), "{what}");
            assert!(blocks * 100 >= PROCESSORS * 96 || longest == KV_BLOCK_TOKENS, "{what}");
            assert_eq!(step.split.rows.count, batch, "{what}");
            // Of a piece there are weighted values, a largest score and a sum for each of a rank's query heads.
            let (heads, bytes_of_head) = (28 / world_size, (128 + 2) * size_of::<f32>());
            let most = if batch == 128 { 58 } else { 30 };
            assert!(num_pieces <= sharing.max_pieces, "{what}");
            assert!(
                sharing.max_pieces * heads * bytes_of_head < most * MIB,
                "{what}: {}",
                sharing.max_pieces
            );
        }
    }

    #[test]
    fn no_context_makes_the_others_pieces_longer_than_its_share() {
        // Alone, the long one has as many; one warp of a short one is done long before.
        let step = decode([131_072].into_iter().chain([1024; 31]), of_7b(1, 32, 131_072));
        assert_eq!(pieces(&step), (128 + 31, RUN_TOKENS));
        assert_eq!(step.split.rows.count, 32);
        let step = decode([8192].into_iter().chain([100; 31]), of_7b(1, 32, 131_072));
        assert_eq!(pieces(&step), (64 + 31, SPLIT_TOKENS));
    }

    /// Any mix of lengths: every row is cut, the pieces are bounded, and there are enough where there are tokens enough.
    #[test]
    fn pieces_fill_a_gpu_and_stay_within_their_room() {
        let mut state = 1_u64;
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % bound
        };
        for _ in 0..300 {
            let (batch, magnitude) = (1 + below(48), 1 << below(16));
            let contexts: Vec<usize> = (0..batch).map(|_| 1 + below(magnitude)).collect();
            let sharing = of_7b([1, 4][below(2)], batch, 32_768);
            let step = decode(contexts.iter().copied(), sharing);
            let (num_pieces, longest) = pieces(&step);
            let what = format!("{contexts:?}: {num_pieces} pieces of {longest}");
            assert_eq!(step.split.rows.count, batch, "{what}");
            assert!(num_pieces <= sharing.max_pieces, "{what}");
            assert!(num_pieces * sharing.num_kv >= SHARES || longest == KV_BLOCK_TOKENS, "{what}");
            assert!(step.words.len() <= StepWords::max_words(batch, batch, 1024, sharing), "{what}");
        }
    }

    #[test]
    fn pieces_beyond_their_room_are_longer_and_then_none() {
        let sharing = Sharing { max_pieces: 4, ..SHARING };
        let contexts =
            |first: usize| [sequence(0..1, first - 1, 0), sequence(1..2, 5, 0), sequence(2..3, 9, 0)];
        let new = |first| StepWords::new(&[0; 3], &[0; 3], &contexts(first), sharing);
        assert_eq!(pieces(&new(64)), (4, KV_BLOCK_TOKENS));
        assert_eq!(pieces(&new(65)), (3, SPLIT_TOKENS));
        assert_eq!(pieces(&new(2048)), (4, RUN_TOKENS));
        let step = new(2049);
        assert_eq!(pieces(&step), (4, RUN_TOKENS));
        assert_eq!(part(&step, step.split.rows, 4)[..8], [0, 2049, 0, 1024, 1, 6, 3, 1024]);
        assert_eq!(part(&step, step.whole.sequences, 4)[..2], [2, 1]);
    }

    #[test]
    fn a_row_whose_queries_fill_several_tiles_is_cut_all_the_same() {
        let sharing = Sharing { most_sharing: 20, is_wide: true, ..SHARING };
        let step = StepWords::new(&[0], &[0], &[sequence(0..1, 40, 0)], sharing);
        let expected = [[0, 0, 0, 32], [0, 0, 32, 32], [0, 16, 0, 32], [0, 16, 32, 32]];
        assert_eq!(part(&step, step.split.pieces, 4), expected.concat());
        assert_eq!((step.whole.sequences.count, step.whole.tiles.count), (0, 0));
        assert!(step.words.len() <= StepWords::max_words(1, 1, 2, sharing));
        let step =
            StepWords::new(&[0], &[0], &[sequence(0..1, 40, 0)], Sharing { most_sharing: 64, ..sharing });
        assert_eq!((step.split.sequences.count, step.wide.sequences.count), (1, 0));
    }

    #[test]
    fn sequences_with_rows_enough_go_to_warpgroups() {
        let sequences = [sequence(0..1, 600, 0), sequence(1..41, 0, 50), sequence(41..50, 31, 90)];
        let ids: Vec<u32> = (0..50).collect();
        let step = StepWords::new(&ids, &ids, &sequences, Sharing { is_wide: true, ..SHARING });
        assert_eq!(part(&step, step.split.sequences, 4), [0, 1, 600, 0]);
        assert_eq!(part(&step, step.wide.sequences, 4), [1, 40, 0, 19]);
        assert_eq!(part(&step, step.wide.tiles, 2), [0, 256, 0, 128, 0, 0]);
        assert_eq!(part(&step, step.whole.sequences, 4), [41, 9, 31, 21]);
        assert_eq!(part(&step, step.whole.tiles, 2), [0, 48, 0, 32, 0, 16, 0, 0]);
        assert!(step.words.len() <= StepWords::max_words(50, 3, 20, SHARING));
        let narrow = StepWords::new(&ids, &ids, &sequences, SHARING);
        assert_eq!((narrow.wide.sequences.count, narrow.whole.sequences.count), (0, 2));
    }
}
