//! `sampling.cu` and `selection.cu`, against the CPU device.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use anyhow::{Result, ensure};
use lockstep_shard::{
    collective::Alone,
    device::{
        Candidate, Device, Offered, RowSampling,
        cpu::{CpuDevice, CpuOptions},
    },
    layers::draw::best,
    progress::Progress,
    runner::noise::gumbel,
};

use super::{
    emulator::{Element, Launch, Program, Source},
    numbers::Numbers,
};

const PIECE: usize = 2048;
const PIECE_THREADS: usize = 256;
const WARP: usize = 32;
const LIST: usize = 256;
const MERGE_THREADS: usize = 1024;

const FIRST_ID: u32 = 3000;
/// Columns of padding. They hold what is not a number, which would spoil all if it were looked at.
const PADDING: usize = 19;

/// Rows of logits of the tokens from [`FIRST_ID`] on.
struct Slice<'a> {
    logits: Vec<f32>,
    num_ids: usize,
    rows: Vec<RowSampling<'a>>,
}

impl Slice<'_> {
    fn stride(&self) -> usize {
        self.logits.len() / self.rows.len()
    }

    fn num_pieces(&self) -> usize {
        self.num_ids.div_ceil(PIECE)
    }

    /// What the CPU device finds.
    fn expected(&self) -> Vec<Candidate> {
        let options = CpuOptions {
            threads: 1,
            cpus: Vec::new(),
            workspace_bytes: 16 << 20,
            instruction_set: None,
            collective: Box::new(Alone),
            progress: Arc::new(Progress::new(1)),
        };
        let device = CpuDevice::new(options).expect("a device");
        let logits =
            device.upload(self.rows.len(), self.stride(), &self.logits).expect("room for the logits");
        device.candidates(&logits, FIRST_ID, self.num_ids, &self.rows).expect("candidates")
    }

    /// The parameters of all rows, and the adjustments of the slice's tokens.
    fn parameters(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut parameters, mut adjustments) = (Vec::new(), Vec::new());
        let mut num_adjustments = 0;
        for row in &self.rows {
            let own = adjustments_of(row, FIRST_ID..FIRST_ID + self.num_ids as u32);
            row.noise_key.append(&mut parameters);
            row.temperature.map_or(1.0, |temperature| 1.0 / temperature).append(&mut parameters);
            let flags = u32::from(row.temperature.is_some()) | u32::from(row.num_offered > 0) << 1;
            flags.append(&mut parameters);
            for penalty in [row.repetition_penalty, row.presence_penalty, row.frequency_penalty] {
                penalty.append(&mut parameters);
            }
            for number in [num_adjustments, own.len() as u32, 0] {
                number.append(&mut parameters);
            }
            num_adjustments += own.len() as u32;
            for (id, (bias, is_repeated, count)) in own {
                id.append(&mut adjustments);
                bias.append(&mut adjustments);
                u32::from(is_repeated).append(&mut adjustments);
                count.append(&mut adjustments);
            }
        }
        (parameters, adjustments)
    }

    /// Of each row: score, token, logit, largest logit and sum, as bits.
    fn candidates(&self, program: &Program, seed: u64) -> Result<Vec<[u32; 5]>> {
        let (parameters, adjustments) = self.parameters();
        let (rows, num_pieces) = (self.rows.len(), self.num_pieces());
        let mut outputs = Launch::new("candidate_pieces", [num_pieces, rows, 1], PIECE_THREADS, seed)
            .input(&self.logits)
            .u64(self.stride())
            .u32(FIRST_ID as usize)
            .u32(self.num_ids)
            .input(&parameters)
            .input(&adjustments)
            .output(&vec![u32::MAX; num_pieces * rows * 4])
            .run(program)?;
        let mut outputs = Launch::new("merge_candidates", [rows, 1, 1], WARP, seed)
            .input(&self.logits)
            .u64(self.stride())
            .u32(FIRST_ID as usize)
            .input(&outputs.take::<u32>())
            .u32(num_pieces)
            .output(&vec![u32::MAX; rows * 5])
            .run(program)?;
        Ok(outputs.take::<u32>().as_chunks().0.to_vec())
    }

    /// Of each request (row, count, whether logits are scaled): the best tokens, and the sum over the others.
    fn selections(
        &self,
        program: &Program,
        requests: &[[u32; 3]],
        seed: u64,
    ) -> Result<Vec<(Vec<Offered>, f64)>> {
        let (parameters, adjustments) = self.parameters();
        let num_pieces = self.num_pieces();
        let num_lists = num_pieces * requests.len();
        let mut outputs = Launch::new("select_pieces", [num_pieces, requests.len(), 1], PIECE_THREADS, seed)
            .input(&self.logits)
            .u64(self.stride())
            .u32(FIRST_ID as usize)
            .u32(self.num_ids)
            .input(&parameters)
            .input(&adjustments)
            .input(requests.as_flattened())
            .output(&vec![0_u64; num_lists * LIST])
            .output(&vec![f64::NAN; num_lists])
            .run(program)?;
        let (lists, tails): (Vec<u64>, Vec<f64>) = (outputs.take(), outputs.take());
        let mut outputs = Launch::new("merge_lists", [requests.len(), 1, 1], MERGE_THREADS, seed)
            .input(&self.logits)
            .u64(self.stride())
            .u32(FIRST_ID as usize)
            .input(requests.as_flattened())
            .input(&lists)
            .input(&tails)
            .u32(num_pieces)
            .output(&vec![u32::MAX; requests.len() * LIST * 3])
            .output(&vec![f64::NAN; requests.len()])
            .run(program)?;
        let (best, tails): (Vec<u32>, Vec<f64>) = (outputs.take(), outputs.take());
        let lists = best.chunks(LIST * 3).zip(tails);
        let results = lists.zip(requests).map(|((words, tail), request)| {
            let count = self.num_ids.min(request[1] as usize);
            let (tokens, beyond) = words.split_at(count * 3);
            ensure!(beyond.iter().all(|word| *word == u32::MAX), "more tokens than were asked for");
            let token = |&[token_id, scaled, logit]: &[u32; 3]| Offered {
                token_id,
                scaled: f32::from_bits(scaled),
                logit: f32::from_bits(logit),
            };
            Ok((tokens.as_chunks().0.iter().map(token).collect(), tail))
        });
        results.collect()
    }
}

/// What the tokens `ids` meet, each once: bias, whether it is repeated, occurrences.
fn adjustments_of(row: &RowSampling<'_>, ids: Range<u32>) -> BTreeMap<u32, (f32, bool, u32)> {
    let mut tokens: BTreeMap<u32, (f32, bool, u32)> = BTreeMap::new();
    for &(id, bias) in row.logit_bias {
        tokens.entry(id).or_default().0 += bias;
    }
    if row.repetition_penalty != 1.0 {
        row.penalized_ids.iter().for_each(|&id| tokens.entry(id).or_default().1 = true);
    }
    for &(id, count) in row.answer_counts {
        tokens.entry(id).or_default().2 += count;
    }
    tokens.retain(|id, _| ids.contains(id));
    tokens
}

/// What the rows of a slice meet.
struct Lists {
    bias: Vec<(u32, f32)>,
    lowest: Vec<(u32, f32)>,
    largest: Vec<(u32, f32)>,
    penalized: Vec<u32>,
    counts: Vec<(u32, u32)>,
}

impl Lists {
    fn new(num_ids: usize) -> Self {
        let end = FIRST_ID + num_ids as u32;
        // Both sides of the edges of pieces, and tokens of others' slices.
        let edges: Vec<u32> =
            (FIRST_ID..=end).step_by(PIECE).chain([end]).flat_map(|id| [id - 1, id]).collect();
        let penalized: Vec<u32> = (FIRST_ID - 10..end + 10).step_by(3).collect();
        let bias = edges.iter().enumerate().map(|(i, &id)| (id, 5.0 + (i * 7 % 5) as f32));
        Self {
            bias: bias.rev().collect(),
            lowest: (FIRST_ID..FIRST_ID + 100).map(|id| (id, f32::MIN)).collect(),
            largest: vec![(end - 1, f32::MAX), (FIRST_ID, f32::MAX)],
            counts: penalized.iter().rev().step_by(2).map(|&id| (id, 1 + id % 4)).collect(),
            penalized,
        }
    }

    /// Rows that have little in common. There are few levels in the logits of every other one, and so many ties.
    fn rows(&self) -> Vec<RowSampling<'_>> {
        let greedy = RowSampling::default;
        let drawn = |noise_key| RowSampling { temperature: Some(0.7), noise_key, ..greedy() };
        let penalized = RowSampling {
            logit_bias: &self.bias,
            penalized_ids: &self.penalized,
            repetition_penalty: 1.3,
            answer_counts: &self.counts,
            presence_penalty: 0.4,
            frequency_penalty: 0.3,
            ..greedy()
        };
        let extreme = |logit_bias| RowSampling { logit_bias, temperature: Some(0.01), ..greedy() };
        vec![
            greedy(),
            RowSampling { logprobs: Some(20), ..greedy() },
            RowSampling { logprobs: Some(1), ..drawn(7) },
            RowSampling { num_offered: 256, logprobs: Some(0), ..drawn(u64::MAX) },
            penalized.clone(),
            RowSampling { logprobs: Some(5), num_offered: 20, ..penalized.clone() },
            RowSampling { temperature: Some(1.7), noise_key: 11, num_offered: 256, ..penalized },
            extreme(&self.lowest),
            extreme(&self.largest),
            RowSampling { num_offered: 256, ..extreme(&self.lowest) },
            RowSampling { num_offered: 50, ..extreme(&self.largest) },
        ]
    }
}

/// Less than a piece, whole pieces, and more pieces than are merged at the same time.
const NUM_IDS: [usize; 6] = [1, 100, 700, PIECE, 2 * PIECE, 5 * PIECE + 77];

fn slice<'a>(lists: &'a Lists, num_ids: usize, seed: u64) -> Slice<'a> {
    let rows = lists.rows();
    let mut numbers = Numbers::new(seed);
    let mut logits = Vec::new();
    for row in 0..rows.len() {
        let own = numbers.f32(num_ids, 10.0).into_iter();
        // One zero only: which of two is larger is not told.
        logits.extend(own.map(|x| if row % 2 == 0 { (x * 4.0).round() / 4.0 + 0.0 } else { x }));
        logits.extend([f32::NAN; PADDING]);
    }
    Slice { logits, num_ids, rows }
}

fn is_close(got: f64, expected: f64) -> bool {
    (got - expected).abs() <= 1e-5 * expected
}

/// The draws: the CPU's, bit for bit but for sums; and all bits alike in any order of threads and blocks.
pub fn check_candidates(program: &Program, seed: u64) -> Result<()> {
    for num_ids in NUM_IDS {
        let lists = Lists::new(num_ids);
        let slice = slice(&lists, num_ids, seed);
        let got = slice.candidates(program, seed)?;
        ensure!(got == slice.candidates(program, seed + 1)?, "{num_ids} columns: not repeatable");
        for (row, (got, expected)) in got.iter().zip(slice.expected()).enumerate() {
            let [score, token_id, logit, max_logit, sum_exp] = *got;
            let got = (f32::from_bits(score), token_id, f32::from_bits(logit), f32::from_bits(max_logit));
            let wanted = (expected.score, expected.token_id, expected.logit, expected.max_logit);
            ensure!(got == wanted, "row {row} of {num_ids}: {got:?}, not {wanted:?}");
            let sum_exp = f32::from_bits(sum_exp);
            ensure!(
                is_close(f64::from(sum_exp), f64::from(expected.sum_exp)),
                "row {row} of {num_ids}: {sum_exp}, not {}",
                expected.sum_exp
            );
        }
    }
    Ok(())
}

/// The best tokens, exactly the CPU's; and how probable the others are.
pub fn check_selections(program: &Program, seed: u64) -> Result<()> {
    for num_ids in NUM_IDS {
        let lists = Lists::new(num_ids);
        let slice = slice(&lists, num_ids, seed);
        let (mut requests, mut wanted) = (Vec::new(), Vec::new());
        // The last rows come first: a request's row is not its place.
        for (row, candidate) in slice.expected().into_iter().enumerate().rev() {
            if let Some(offer) = candidate.offer {
                requests.push([row as u32, slice.rows[row].num_offered as u32, 1]);
                wanted.push((offer.best, offer.tail_sum_exp));
            }
            if !candidate.top.is_empty() {
                requests.push([row as u32, slice.rows[row].logprobs.unwrap_or(0) as u32, 0]);
                let top = candidate.top.into_iter();
                wanted.push((
                    top.map(|(token_id, logit)| Offered { token_id, scaled: logit, logit }).collect(),
                    0.0,
                ));
            }
        }
        let got = slice.selections(program, &requests, seed)?;
        ensure!(got == slice.selections(program, &requests, seed + 1)?, "{num_ids} columns: not repeatable");
        for ((request, got), wanted) in requests.iter().zip(got).zip(wanted) {
            ensure!(got.0.len() == wanted.0.len(), "{request:?} of {num_ids}: {} tokens", got.0.len());
            for (place, (got, wanted)) in got.0.iter().zip(&wanted.0).enumerate() {
                ensure!(got == wanted, "{request:?} of {num_ids}, place {place}: {got:?}, not {wanted:?}");
            }
            let (tail, expected) = (got.1, wanted.1);
            ensure!(is_close(tail, expected), "{request:?} of {num_ids}: {tail}, not {expected}");
        }
    }
    Ok(())
}

/// Rows of which every other has a logit that is not finite.
fn half_finite(seed: u64) -> Slice<'static> {
    let num_ids = 2 * PIECE + 1;
    let faults = [
        (0, f32::NAN),
        (PIECE - 1, f32::INFINITY),
        (PIECE, f32::NEG_INFINITY),
        (2 * PIECE, f32::NAN),
        (100, -f32::NAN),
    ];
    let mut numbers = Numbers::new(seed);
    let stride = num_ids + PADDING;
    let mut logits = numbers.f32(2 * faults.len() * stride, 10.0);
    for (fault, (col, value)) in faults.into_iter().enumerate() {
        logits[2 * fault * stride + col] = value;
    }
    let rows = vec![RowSampling::default(); 2 * faults.len()];
    Slice { logits, num_ids, rows }
}

/// One logit that is not finite spoils its row, wherever it is, and no other.
pub fn check_not_finite(program: &Program, seed: u64) -> Result<()> {
    let slice = half_finite(seed);
    for (row, (got, expected)) in slice.candidates(program, seed)?.iter().zip(slice.expected()).enumerate() {
        for (word, expected) in [(0, expected.score), (3, expected.max_logit), (4, expected.sum_exp)] {
            let number = f32::from_bits(got[word]);
            ensure!(expected.is_nan() == (row % 2 == 0), "the CPU's row {row}: {expected}");
            ensure!(number.is_nan() == expected.is_nan(), "row {row}: {number}, not {expected}");
        }
    }
    Ok(())
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key under which token `id` has noise from these bits: the steps of SplitMix64 backwards.
fn key_of_bits(bits: u64, id: u32) -> u64 {
    // The inverse of an odd factor modulo 2^64 is a power of it.
    let inverse =
        |factor: u64| (0..6).fold(factor, |x, _| x.wrapping_mul(2_u64.wrapping_sub(factor.wrapping_mul(x))));
    let z = bits ^ bits >> 31 ^ bits >> 62;
    let z = z.wrapping_mul(inverse(0x94d0_49bb_1331_11eb));
    let z = z ^ z >> 27 ^ z >> 54;
    let z = z.wrapping_mul(inverse(0xbf58_476d_1ce4_e5b9));
    let z = z ^ z >> 30 ^ z >> 60;
    z.wrapping_sub(GOLDEN.wrapping_mul(u64::from(id) + 1))
}

/// The noise itself is the CPU's, bit for bit, from any bits; and a token whose noise lifts it above all others is drawn.
pub fn check_noise(program: &Program, seed: u64) -> Result<()> {
    let mut numbers = Numbers::new(seed);
    let words = numbers.u32(2 * 64);
    let random = words.as_chunks::<2>().0.iter().map(|&[low, high]| u64::from(high) << 32 | u64::from(low));
    // The ends, and the middle, where the logarithm's own argument changes sides.
    let ends = (0..64).step_by(3).flat_map(|shift| [u64::MAX >> shift, !(u64::MAX >> shift), 1 << shift]);
    let bits: Vec<u64> = random.chain(ends).collect();
    let last = FIRST_ID + 1;
    let rows: Vec<_> = bits
        .iter()
        .map(|&bits| RowSampling {
            temperature: Some(1.0),
            noise_key: key_of_bits(bits, last),
            ..RowSampling::default()
        })
        .collect();
    let largest = gumbel(key_of_bits(u64::MAX, last), last);
    ensure!((36.7..36.74).contains(&largest), "the largest noise is {largest}");
    for lead in [-100.0, 0.0, 2.0, 30.0] {
        let logits: Vec<f32> = rows.iter().flat_map(|_| [lead, 0.0, f32::NAN]).collect();
        let slice = Slice { logits, num_ids: 2, rows: rows.clone() };
        for ((row, got), bits) in slice.rows.iter().zip(slice.candidates(program, seed)?).zip(&bits) {
            let scores = [lead + gumbel(row.noise_key, FIRST_ID), gumbel(row.noise_key, last)];
            let index = usize::from(scores[1] > scores[0]);
            let expected = (scores[index], FIRST_ID + index as u32);
            let got = (f32::from_bits(got[0]), got[1]);
            ensure!(got == expected, "bits {bits:x}, lead {lead}: {got:?}, not {expected:?}");
        }
    }
    Ok(())
}

#[test]
fn tokens_are_drawn_as_on_the_cpu() {
    for seed in 0..2 {
        check_candidates(Program::of(Source::Sampling), seed).unwrap();
    }
}

#[test]
fn the_best_tokens_are_those_of_the_cpu() {
    for seed in 0..2 {
        check_selections(Program::of(Source::Selection), seed).unwrap();
    }
}

#[test]
fn a_logit_that_is_not_finite_shows() {
    check_not_finite(Program::of(Source::Sampling), 1).unwrap();
    // The best tokens of such a row mean nothing, but nothing is read or written beyond a buffer.
    let slice = half_finite(1);
    let rows = 0..slice.rows.len() as u32;
    let requests: Vec<[u32; 3]> = rows.flat_map(|row| [[row, 256, 1], [row, 3, 0]]).collect();
    slice.selections(Program::of(Source::Selection), &requests, 1).unwrap();
}

#[test]
fn noise_is_that_of_the_cpu() {
    check_noise(Program::of(Source::Sampling), 1).unwrap();
}

/// Candidates of a row, one of each rank: of few different scores and tokens, so that many are alike, and some of them no numbers.
fn of_ranks(numbers: &mut Numbers, world_size: usize) -> Vec<Candidate> {
    const SCORES: [f32; 8] =
        [-1.5, 0.0, 2.5, 2.5, f32::INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NAN];
    // In every other row scores are few more than that, so that they are all low, or not numbers, now and then.
    let first = numbers.u32(1)[0] as usize % 2 * 5;
    let candidate = |words: &[u32]| {
        let score = SCORES[first + words[0] as usize % (SCORES.len() - first)];
        let is_spoiled = words[1].is_multiple_of(12);
        Candidate {
            score,
            token_id: words[2] % 5,
            logit: 1.0,
            max_logit: if is_spoiled { f32::NAN } else { f32::NEG_INFINITY },
            sum_exp: 1.0,
            top: Vec::new(),
            offer: None,
        }
    };
    numbers.u32(3 * world_size).chunks_exact(3).map(candidate).collect()
}

/// Rows take the tokens that hosts choose of the ranks' candidates, or 0 where they choose none, and the other rows keep theirs.
pub fn check_feed(program: &Program, seed: u64) -> Result<()> {
    for world_size in 1..=8 {
        // More than a block has threads.
        const ROWS: usize = 100;
        let mut numbers = Numbers::new(seed + world_size as u64);
        let of_rows: Vec<_> = (0..ROWS).map(|_| of_ranks(&mut numbers, world_size)).collect();
        let words = |Candidate { score, token_id, logit, max_logit, sum_exp, .. }: &Candidate| {
            [score.to_bits(), *token_id, logit.to_bits(), max_logit.to_bits(), sum_exp.to_bits()]
        };
        let of_rank = |rank: usize| of_rows.iter().flat_map(move |of_ranks| words(&of_ranks[rank]));
        let candidates: Vec<u32> = (0..world_size).flat_map(of_rank).collect();
        let pairs: Vec<[u32; 2]> = (0..ROWS as u32).map(|i| [2 * i, 99 - i]).collect();
        let before: Vec<u32> = (1000..1201).collect();
        let mut outputs = Launch::new("feed_tokens", [1, 1, 1], 64, seed)
            .input(pairs.as_flattened())
            .u32(pairs.len())
            .input(&candidates)
            .u32(world_size)
            .u32(ROWS)
            .output(&before)
            .run(program)?;
        let mut expected = before;
        for [row, candidate] in pairs {
            let of_ranks: Vec<_> = of_rows[candidate as usize].iter().collect();
            expected[row as usize] = best(&of_ranks).map_or(0, |choice| choice.token_id);
        }
        let fed = outputs.take::<u32>();
        let differs = fed.iter().zip(&expected).position(|(fed, expected)| fed != expected);
        ensure!(differs.is_none(), "{world_size} ranks: row {differs:?} has another token");
    }
    Ok(())
}

#[test]
fn rows_take_the_tokens_that_hosts_choose() {
    check_feed(Program::of(Source::Sampling), 1).unwrap();
}
