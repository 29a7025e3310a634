//! `attention.cu`.

use std::ops::Range;

use anyhow::Result;
use half::bf16;

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, ROUNDING, compare, same_bits, to_f64, unwritten},
};

const BLOCK_TOKENS: usize = 32;
const TILE_ROWS: usize = 16;
const WARPS_PER_BLOCK: usize = 4;

/// What turns a product of a query and a key into a power of two.
pub fn scale(head_dim: usize) -> f32 {
    std::f32::consts::LOG2_E / (head_dim as f32).sqrt()
}

/// Attention of one query, and for each column the tolerance: the result is rounded, and so is each weight before it meets
/// its value.
fn attend(query: &[f64], keys: &[&[f64]], values: &[&[f64]]) -> (Vec<f64>, Vec<f64>) {
    let dot = |key: &&[f64]| query.iter().zip(*key).map(|(q, k)| q * k).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (query.len() as f64).sqrt()).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..query.len())
        .map(|column| {
            let terms = weights.iter().zip(values).map(|(weight, value)| weight * value[column] / sum);
            let size = terms.clone().map(f64::abs).sum::<f64>();
            let result = terms.sum::<f64>();
            (result, ROUNDING * (result.abs() + size) + 1e-5)
        })
        .unzip()
}

/// A call of attention over the cache.
pub struct Paged<'a> {
    pub head_dim: usize,
    /// Query heads that share each head of keys and values.
    pub sharing: &'a [usize],
    /// Rows of each sequence, and its tokens before them.
    pub sequences: &'a [(usize, usize)],
    /// Neither is used where contexts are not cut.
    pub split_tokens: usize,
    pub run_tokens: usize,
}

/// The buffers of a call, and what is to come out.
pub struct PagedCase {
    pub qkv: Vec<bf16>,
    pub cache: Vec<bf16>,
    pub block_tables: Vec<u32>,
    pub sequences: Vec<u32>,
    pub query_offsets: Vec<u32>,
    pub visible: Vec<u32>,
    pub expected: Vec<f64>,
    pub tolerance: Vec<f64>,
}

impl Paged<'_> {
    pub fn num_query(&self) -> usize {
        self.sharing.iter().sum()
    }

    /// `(sequence, first pair)` of each tile of so many pairs.
    pub fn tiles(&self, tile_pairs: usize) -> Vec<u32> {
        let most_sharing = *self.sharing.iter().max().expect("a head");
        let pairs = |rows: usize| (0..rows * most_sharing).step_by(tile_pairs);
        let sequences = self.sequences.iter().enumerate();
        sequences
            .flat_map(|(i, (rows, _))| pairs(*rows).flat_map(move |pair| [i as u32, pair as u32]))
            .collect()
    }

    /// Draws the numbers. Slots of the cache that no token is in are not numbers, so that a kernel that reads one shows.
    pub fn case(&self, seed: u64) -> PagedCase {
        let (head_dim, num_kv, num_query) = (self.head_dim, self.sharing.len(), self.num_query());
        let mut numbers = Numbers::new(seed);
        let num_rows = self.sequences.iter().map(|(rows, _)| rows).sum::<usize>();
        let cols = (num_query + 2 * num_kv) * head_dim;
        let qkv = numbers.bf16(num_rows * cols, 2.0);
        let queries = to_f64(&qkv);
        let num_blocks: usize =
            self.sequences.iter().map(|(rows, computed)| (rows + computed).div_ceil(BLOCK_TOKENS)).sum();
        let blocks = numbers.order(num_blocks + 2);
        let mut case = PagedCase {
            cache: unwritten(blocks.len() * num_kv * 2 * BLOCK_TOKENS * head_dim),
            block_tables: blocks[..num_blocks].to_vec(),
            sequences: Vec::new(),
            query_offsets: vec![0],
            visible: Vec::new(),
            expected: vec![0.0; num_rows * num_query * head_dim],
            tolerance: vec![0.0; num_rows * num_query * head_dim],
            qkv,
        };
        for &sharing in self.sharing {
            case.query_offsets.push(case.query_offsets[case.query_offsets.len() - 1] + sharing as u32);
        }
        let (mut first_row, mut first_block) = (0, 0);
        for &(rows, computed) in self.sequences {
            let num_tokens = computed + rows;
            case.sequences.extend([first_row, rows, computed, first_block].map(|number| number as u32));
            case.visible.extend((computed..num_tokens).map(|position| position as u32 + 1));
            let mut query = 0;
            for (kv_head, &sharing) in self.sharing.iter().enumerate() {
                let keys = numbers.bf16(num_tokens * head_dim, 1.0);
                let values = numbers.bf16(num_tokens * head_dim, 1.0);
                for token in 0..num_tokens {
                    let block = blocks[first_block + token / BLOCK_TOKENS] as usize;
                    for (kind, from) in [&keys, &values].into_iter().enumerate() {
                        let place = (block * num_kv + kv_head) * 2 + kind;
                        let to = (place * BLOCK_TOKENS + token % BLOCK_TOKENS) * head_dim;
                        case.cache[to..to + head_dim].copy_from_slice(&from[token * head_dim..][..head_dim]);
                    }
                }
                let (keys, values) = (to_f64(&keys), to_f64(&values));
                let keys: Vec<&[f64]> = keys.chunks(head_dim).collect();
                let values: Vec<&[f64]> = values.chunks(head_dim).collect();
                for row in 0..rows {
                    for head in query..query + sharing {
                        let from = (first_row + row) * cols + head * head_dim;
                        let seen = computed + row + 1;
                        let (expected, tolerance) =
                            attend(&queries[from..from + head_dim], &keys[..seen], &values[..seen]);
                        let to = ((first_row + row) * num_query + head) * head_dim;
                        case.expected[to..to + head_dim].copy_from_slice(&expected);
                        case.tolerance[to..to + head_dim].copy_from_slice(&tolerance);
                    }
                }
                query += sharing;
            }
            first_row += rows;
            first_block += num_tokens.div_ceil(BLOCK_TOKENS);
        }
        case
    }

    /// Numbers of which nothing but errors of rounding is left, so that another order of sums shows: all tokens weigh the same, and
    /// values of very different sizes come twice, once negated, at any places.
    fn case_of_errors(&self, seed: u64) -> PagedCase {
        let (head_dim, num_kv) = (self.head_dim, self.sharing.len());
        let (mut case, mut numbers) = (self.case(seed), Numbers::new(seed));
        case.qkv.fill(bf16::ZERO);
        for sequence in case.sequences.chunks_exact(4) {
            let (num_tokens, table) = ((sequence[1] + sequence[2]) as usize, sequence[3] as usize);
            for kv_head in 0..num_kv {
                let order = numbers.order(num_tokens);
                for pair in order.chunks_exact(2) {
                    let sizes = numbers.u32(head_dim);
                    let values = numbers.bf16(head_dim, 1.0);
                    for (&token, sign) in pair.iter().zip([1.0, -1.0]) {
                        let (block, slot) = (token as usize / BLOCK_TOKENS, token as usize % BLOCK_TOKENS);
                        let place = (case.block_tables[table + block] as usize * num_kv + kv_head) * 2 + 1;
                        let to = &mut case.cache[(place * BLOCK_TOKENS + slot) * head_dim..][..head_dim];
                        for ((to, value), size) in to.iter_mut().zip(&values).zip(&sizes) {
                            *to = bf16::from_f32(sign * value.to_f32() * ((size % 30) as f32).exp2());
                        }
                    }
                }
            }
        }
        case
    }

    /// Both ways, for many rows and for few: within the tolerance, and with the same bits, whatever the pieces. Each sequence has
    /// pieces of all lengths in turn, beside others that have other ones.
    fn check(&self, program: &Program, seed: u64) -> Result<()> {
        let what = format!(
            "heads of {}, {:?} queries sharing, sequences {:?}, splits of {}, runs of {}",
            self.head_dim, self.sharing, self.sequences, self.split_tokens, self.run_tokens
        );
        let case = self.case(seed);
        let many = self.many_rows(&case, program, seed)?;
        compare(&what, &many, &case.expected, |i| case.tolerance[i])?;
        self.check_pieces(&what, &case, &many, program, seed)?;
        let case = self.case_of_errors(seed);
        let many = self.many_rows(&case, program, seed)?;
        self.check_pieces(&format!("{what}, rounding errors"), &case, &many, program, seed)
    }

    fn check_pieces(
        &self,
        what: &str,
        case: &PagedCase,
        many: &[bf16],
        program: &Program,
        seed: u64,
    ) -> Result<()> {
        let lengths = [BLOCK_TOKENS, self.split_tokens, self.run_tokens];
        for turn in 0..lengths.len() {
            let few = self.few_rows(case, program, seed + 1, |sequence| lengths[(sequence + turn) % 3])?;
            same_bits(&format!("{what}: few rows and many, turn {turn}"), &few, many)?;
        }
        Ok(())
    }

    fn many_rows(&self, case: &PagedCase, program: &Program, seed: u64) -> Result<Vec<bf16>> {
        let tiles = self.tiles(TILE_ROWS);
        let num_tiles = tiles.len() / 2;
        let grid = [num_tiles.div_ceil(WARPS_PER_BLOCK), self.sharing.len(), 1];
        let block = WARPS_PER_BLOCK * 32;
        let mut outputs = Launch::new(format!("paged_attention_{}", self.head_dim), grid, block, seed)
            .input(&case.qkv)
            .input(&case.cache)
            .input(&case.block_tables)
            .input(&case.sequences)
            .input(&tiles)
            .u32(num_tiles)
            .input(&case.query_offsets)
            .u32(self.num_query())
            .u32(self.sharing.len())
            .u32(self.split_tokens)
            .u32(self.run_tokens)
            .f32(scale(self.head_dim))
            .output(&unwritten(case.expected.len()))
            .run(program)?;
        Ok(outputs.take())
    }

    fn few_rows(
        &self,
        case: &PagedCase,
        program: &Program,
        seed: u64,
        piece_tokens: impl Fn(usize) -> usize,
    ) -> Result<Vec<bf16>> {
        let (num_rows, num_query) = (case.visible.len(), self.num_query());
        let pieces = self.pieces(case, seed, piece_tokens);
        let grid = [pieces.pieces.len() / 4, self.sharing.len(), 1];
        let mut outputs = Launch::new(format!("paged_attention_split_{}", self.head_dim), grid, 32, seed)
            .input(&case.qkv)
            .input(&case.cache)
            .input(&case.block_tables)
            .input(&pieces.sequences)
            .input(&pieces.pieces)
            .input(&pieces.rows)
            .input(&case.query_offsets)
            .u32(num_query)
            .u32(self.sharing.len())
            .u32(self.split_tokens)
            .f32(scale(self.head_dim))
            .output(&vec![f32::NAN; pieces.num_places * num_query * self.head_dim])
            .output(&vec![f32::NAN; pieces.num_places * num_query * 2])
            .run(program)?;
        let (partial, stats): (Vec<f32>, Vec<f32>) = (outputs.take(), outputs.take());
        let kernel = format!("paged_attention_combine_{}", self.head_dim);
        let grid = [num_rows, num_query, self.head_dim.div_ceil(32)];
        let threads = [32, 96, 512][seed as usize % 3];
        let mut outputs = Launch::new(kernel, grid, threads, seed)
            .input(&partial)
            .input(&stats)
            .input(&pieces.rows)
            .u32(self.split_tokens)
            .u32(self.run_tokens)
            .output(&unwritten(case.expected.len()))
            .run(program)?;
        Ok(outputs.take())
    }

    /// The pieces of all sequences in any order, some empty ones among them. The last sequence's rows come first among those that
    /// are cut, and each row's places after one that nobody writes to.
    fn pieces(&self, case: &PagedCase, seed: u64, piece_tokens: impl Fn(usize) -> usize) -> Pieces {
        let (mut sequences, mut rows, mut num_places) = (case.sequences.clone(), Vec::new(), 0);
        let mut pieces = vec![[0; 4]; 3];
        let most_sharing = *self.sharing.iter().max().expect("a head");
        for (index, sequence) in sequences.chunks_exact_mut(4).enumerate().rev() {
            let (first_row, num_rows, tokens) = (sequence[0], sequence[1], piece_tokens(index));
            let num_tokens = sequence[1] + sequence[2];
            sequence[0] = (rows.len() / 4) as u32;
            for row in first_row..first_row + num_rows {
                rows.extend([row, case.visible[row as usize], num_places + 1, tokens as u32]);
                num_places += 1 + num_tokens.div_ceil(tokens as u32);
            }
            for pair in (0..num_rows as usize * most_sharing).step_by(TILE_ROWS) {
                let first_tokens = (0..num_tokens).step_by(tokens);
                pieces.extend(first_tokens.map(|first| [index as u32, pair as u32, first, tokens as u32]));
            }
        }
        let order = Numbers::new(seed).order(pieces.len());
        let pieces = order.iter().flat_map(|&piece| pieces[piece as usize]).collect();
        Pieces { sequences, rows, pieces, num_places: num_places as usize }
    }
}

/// How a call is cut into pieces, as the kernels get it.
struct Pieces {
    sequences: Vec<u32>,
    rows: Vec<u32>,
    pieces: Vec<u32>,
    num_places: usize,
}

/// One head width over contexts that end before, at and after the ends of tiles, splits and runs, decoded and in chunks.
pub fn check_paged(program: &Program, head_dim: usize, seed: u64) -> Result<()> {
    for (sharing, sequences, split_tokens, run_tokens) in [
        (&[3][..], &[(1, 0)][..], 32, 64),
        (&[3, 2][..], &[(1, 0), (1, 31), (1, 32), (1, 300)][..], 64, 128),
        (&[2, 1][..], &[(5, 0), (1, 70), (13, 121)][..], 64, 256),
        (&[20][..], &[(3, 126)][..], 128, 128),
    ] {
        Paged { head_dim, sharing, sequences, split_tokens, run_tokens }.check(program, seed)?;
    }
    Ok(())
}

/// Windows of vision, of some of whose rows the queries attend.
pub fn check_vision(program: &Program, head_dim: usize, seed: u64) -> Result<()> {
    for (num_heads, cu_seqlens, rows) in
        [(2, &[0, 16, 17, 64, 64, 70][..], 0..70), (1, &[0, 100][..], 33..90), (1, &[5, 9][..], 0..12)]
    {
        Windows { head_dim, num_heads, cu_seqlens, rows }.check(program, seed)?;
    }
    Ok(())
}

/// A call of attention inside windows, on some of whose rows the queries attend.
pub struct Windows<'a> {
    pub head_dim: usize,
    pub num_heads: usize,
    pub cu_seqlens: &'a [usize],
    pub rows: Range<usize>,
}

/// The buffers of a call, and what is to come out.
pub struct WindowCase {
    pub qkv: Vec<bf16>,
    pub tiles: Vec<u32>,
    pub expected: Vec<f64>,
    pub tolerance: Vec<f64>,
}

impl Windows<'_> {
    /// Draws the numbers. Tiles are of so many rows.
    pub fn case(&self, tile_rows: usize, seed: u64) -> WindowCase {
        let Windows { head_dim, num_heads, cu_seqlens, rows } = self;
        let cols = num_heads * head_dim;
        let num_rows = rows.end.max(cu_seqlens[cu_seqlens.len() - 1]);
        let qkv = Numbers::new(seed).bf16(num_rows * 3 * cols, 2.0);
        let exact = to_f64(&qkv);
        let part = |row: usize, part: usize, head: usize| {
            &exact[(row * 3 + part) * cols + head * head_dim..][..*head_dim]
        };
        // A row of no window stays what it was: 0, exactly.
        let (expected, tolerance) =
            (vec![0.0; rows.len() * cols], vec![f64::MIN_POSITIVE; rows.len() * cols]);
        let mut case = WindowCase { tiles: Vec::new(), expected, tolerance, qkv };
        for window in cu_seqlens.windows(2) {
            let (start, end) = (window[0].max(rows.start), window[1].min(rows.end));
            for first in (start..end).step_by(tile_rows) {
                case.tiles.extend([window[0], window[1], first, end].map(|number| number as u32));
            }
            for row in start..end {
                for head in 0..*num_heads {
                    let keys: Vec<&[f64]> =
                        (window[0]..window[1]).map(|token| part(token, 1, head)).collect();
                    let values: Vec<&[f64]> =
                        (window[0]..window[1]).map(|token| part(token, 2, head)).collect();
                    let (results, tolerances) = attend(part(row, 0, head), &keys, &values);
                    let to = (row - rows.start) * cols + head * head_dim;
                    case.expected[to..to + head_dim].copy_from_slice(&results);
                    case.tolerance[to..to + head_dim].copy_from_slice(&tolerances);
                }
            }
        }
        case
    }

    /// Whether what came out is right.
    pub fn compare(&self, case: &WindowCase, got: &[bf16]) -> Result<()> {
        let Windows { head_dim, num_heads, cu_seqlens, rows } = self;
        let what = format!("{num_heads} heads of {head_dim}, windows {cu_seqlens:?}, rows {rows:?}");
        compare(&what, got, &case.expected, |i| case.tolerance[i])
    }

    fn check(&self, program: &Program, seed: u64) -> Result<()> {
        let case = self.case(TILE_ROWS, seed);
        let num_tiles = case.tiles.len() / 4;
        let grid = [num_tiles.div_ceil(WARPS_PER_BLOCK), self.num_heads, 1];
        let kernel = format!("vision_attention_{}", self.head_dim);
        let mut outputs = Launch::new(kernel, grid, WARPS_PER_BLOCK * 32, seed)
            .input(&case.qkv)
            .input(&case.tiles)
            .u32(num_tiles)
            .u32(self.rows.start)
            .f32(scale(self.head_dim))
            .output(&vec![bf16::ZERO; case.expected.len()])
            .run(program)?;
        self.compare(&case, &outputs.take::<bf16>())
    }
}

#[test]
fn paged_attention_is_the_same_decoded_and_in_a_prompt() {
    for head_dim in [32, 64, 80, 128] {
        check_paged(Program::of(Source::Attention), head_dim, head_dim as u64).unwrap();
    }
}

#[test]
fn paged_attention_has_the_shapes_of_the_models() {
    for (sharing, sequences) in [
        (&[7][..], &[(1, 1000), (1, 517), (1, 0)][..]),
        (&[7, 7][..], &[(40, 3), (1, 300)][..]),
        (&[4][..], &[(1, 5000), (1, 1023), (1, 1024)][..]),
    ] {
        let call = Paged { head_dim: 128, sharing, sequences, split_tokens: 128, run_tokens: 1024 };
        call.check(Program::of(Source::Attention), 3).unwrap();
    }
}

/// More runs than `combine` has in shared memory at a time.
#[test]
fn a_long_context_is_the_same_in_any_pieces() {
    let sequences = &[(1, 131_071), (1, 131_072), (1, 0)];
    let call = Paged { head_dim: 32, sharing: &[1], sequences, split_tokens: 128, run_tokens: 1024 };
    call.check(Program::of(Source::Attention), 5).unwrap();
}

/// Sequences of any lengths and rows, each cut in its own way.
#[test]
fn any_mix_of_sequences_is_cut_in_any_way() {
    for seed in 0..8 {
        let mut numbers = Numbers::new(seed);
        let drawn = numbers.u32(20);
        let sequences: Vec<(usize, usize)> = drawn
            .chunks(2)
            .take(2 + drawn[19] as usize % 8)
            // Most of them decode, and some of those are at the end of a tile.
            .map(|draw| match draw[0] % 4 {
                0 => (1 + draw[0] as usize / 4 % 9, draw[1] as usize % 100),
                1 => (1, draw[1] as usize % 20 * BLOCK_TOKENS),
                _ => (1, draw[1] as usize % 700),
            })
            .collect();
        let sharing: &[usize] = [&[1][..], &[7], &[2, 3], &[4, 4]][seed as usize % 4];
        let call = Paged { head_dim: 32, sharing, sequences: &sequences, split_tokens: 64, run_tokens: 256 };
        call.check(Program::of(Source::Attention), seed).unwrap();
    }
}

/// A row in a chunk, in a chunk that begins later, and alone.
#[test]
fn a_rows_bits_do_not_depend_on_the_chunk() {
    fn call(sequences: &[(usize, usize)]) -> Paged<'_> {
        Paged { head_dim: 64, sharing: &[3, 1], sequences, split_tokens: 64, run_tokens: 64 }
    }
    let program = Program::of(Source::Attention);
    let whole = call(&[(50, 60)]);
    let case = whole.case(9);
    let expected = whole.many_rows(&case, program, 1).unwrap();
    let (out_cols, qkv_cols) = (4 * 64, (4 + 2 * 2) * 64);
    for skipped in [1, 23, 49] {
        let sequences = [(50 - skipped, 60 + skipped)];
        let later = call(&sequences);
        let mut part = later.case(9);
        part.qkv = case.qkv[skipped * qkv_cols..].to_vec();
        part.cache.clone_from(&case.cache);
        part.block_tables.clone_from(&case.block_tables);
        let got = later.many_rows(&part, program, 2).unwrap();
        same_bits(&format!("without {skipped} rows"), &got, &expected[skipped * out_cols..]).unwrap();
        let got = later.few_rows(&part, program, 3, |_| 32).unwrap();
        same_bits(&format!("without {skipped} rows, cut"), &got, &expected[skipped * out_cols..]).unwrap();
    }
}

#[test]
fn vision_attends_inside_windows() {
    for head_dim in [32, 64, 80, 128] {
        check_vision(Program::of(Source::Attention), head_dim, 1).unwrap();
    }
}
