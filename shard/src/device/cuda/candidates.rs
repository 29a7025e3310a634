//! What a rank's slice of the vocabulary offers at rows of logits: the launches, and what they mean.
//!
//! `kernels/sampling.cu` has the form of all that goes there and comes back. A row that wants more tokens than the kernels list,
//! as one does whose draw the best of all ranks do not settle, comes to the host, where the CPU's code looks at it.
//!
//! **Candidates of all ranks.** Where ranks reach one another's memory, each GPU gathers the candidates of all, and the next step
//! takes its tokens from there; hosts read them a step later and meet nowhere. So no host waits for another one, which may
//! have begun the next step and wait in it for this rank. Whether candidates are gathered follows from the rows alone,
//! and the gather belongs to the step that they are of: it is in the same place among the ranks' sums, whether or not a rank
//! begins the next step before it tells of this one. Lists of tokens are not gathered, and then hosts meet before the next step.
#![allow(unsafe_code)]

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use super::arena::Tensor;
use super::device::CudaDevice;
use super::driver::{Address, DeviceBuffer, Event, Gpu, PinnedBuffer};
use super::kernels::{Argument, MAX_RANKS, count, launch};
use crate::device::adjustments::Adjustments;
use crate::device::{Activations, Candidate, DeviceError, Offer, Offered, Result, RowSampling, Told, cpu};

/// Tokens of a piece of a row, and threads that look at it.
const PIECE: usize = 2048;
const PIECE_THREADS: usize = 256;
/// The most tokens that are listed, and threads that join lists.
const LIST: usize = 256;
const MERGE_THREADS: usize = 1024;
/// Threads that give tokens to rows.
const FEED_THREADS: usize = 64;

/// Rows that are looked at together, and lists that are made together. Memory is planned for so many.
const MAX_ROWS: usize = 64;
const MAX_LISTS: usize = 16;

/// Bytes of what kernels write: of a piece, a row, a listed token, and the sum beside a list.
const PIECE_BYTES: usize = 16;
const ROW_BYTES: usize = 20;
const TOKEN_BYTES: usize = 12;
const TAIL_BYTES: usize = 8;

/// Bits of a row's parameters.
const HAS_NOISE: u32 = 1;
const IS_OFFERED: u32 = 2;

/// Memory to sample in.
pub struct Sampling {
    pieces: DeviceBuffer,
    rows: DeviceBuffer,
    /// The same of all ranks.
    gathered: DeviceBuffer,
    lists: DeviceBuffer,
    tails: DeviceBuffer,
    best: DeviceBuffer,
    best_tails: DeviceBuffer,
    /// For candidates that are told later, by turns.
    returned: [Returned; TURNS],
    /// For those that are told at once, while others may be on their way.
    told: Returned,
    turn: Cell<usize>,
    begun: Cell<Begun>,
}

/// Where the GPU has the candidates that were begun last.
#[derive(Clone, Copy, Default)]
struct Begun {
    at: Address,
    num_ranks: usize,
    num_rows: usize,
}

/// Where candidates come to, and when they are there.
struct Returned {
    pinned: RefCell<PinnedBuffer>,
    come: Event,
}

/// Candidates of a step may be read when those of the next are under way.
const TURNS: usize = 2;

/// Candidates, or where they are to come.
pub enum Candidates {
    /// They are there.
    Ready(Vec<Candidate>),
    /// They are on their way.
    Coming(Coming),
}

/// Candidates of rows that were looked at together.
pub struct Coming {
    /// None of those that are told at once.
    turn: Option<usize>,
    /// Of how many ranks they are: this one, or all.
    num_ranks: usize,
    num_rows: usize,
    num_ids: usize,
    lists: Vec<List>,
}

/// Bytes of the GPU that each buffer takes that sampling from so many tokens is done in.
pub fn sampling_bytes(num_ids: usize) -> [usize; 7] {
    let pieces = num_ids.div_ceil(PIECE);
    [
        MAX_ROWS * pieces * PIECE_BYTES,
        MAX_ROWS * ROW_BYTES,
        MAX_RANKS * MAX_ROWS * ROW_BYTES,
        MAX_LISTS * pieces * LIST * size_of::<u64>(),
        MAX_LISTS * pieces * TAIL_BYTES,
        MAX_LISTS * LIST * TOKEN_BYTES,
        MAX_LISTS * TAIL_BYTES,
    ]
}

/// Bytes that come back of one list.
const LIST_BYTES: usize = LIST * TOKEN_BYTES + TAIL_BYTES;
/// Bytes that come back of [`MAX_ROWS`] rows, each with two lists; or with none, which is less, of as many ranks as there may be.
pub const RETURNED_BYTES: usize = MAX_ROWS * (ROW_BYTES + 4 + 2 * LIST_BYTES);
/// Places of so many bytes, all pinned.
pub const RETURNED_PLACES: usize = TURNS + 1;

impl Sampling {
    /// Memory to sample from up to `num_ids` tokens in.
    ///
    /// # Errors
    /// There is none.
    pub fn new(gpu: &Rc<Gpu>, num_ids: usize) -> Result<Self> {
        let [pieces, rows, gathered, lists, tails, best, best_tails] = sampling_bytes(num_ids);
        let buffer = |bytes| DeviceBuffer::new(gpu, bytes, "sampling");
        let returned = || {
            let pinned = RefCell::new(PinnedBuffer::new(gpu, RETURNED_BYTES)?);
            Ok::<_, DeviceError>(Returned { pinned, come: Event::new(gpu)? })
        };
        Ok(Self {
            pieces: buffer(pieces)?,
            rows: buffer(rows)?,
            gathered: buffer(gathered)?,
            lists: buffer(lists)?,
            tails: buffer(tails)?,
            best: buffer(best)?,
            best_tails: buffer(best_tails)?,
            returned: [returned()?, returned()?],
            told: returned()?,
            turn: Cell::new(0),
            begun: Cell::default(),
        })
    }
}

impl Sampling {
    fn place(&self, turn: Option<usize>) -> &Returned {
        turn.map_or(&self.told, |turn| &self.returned[turn])
    }
}

/// A list of a row's best tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct List {
    row: usize,
    count: usize,
    /// Whether they are ordered by their logits after penalties and temperature.
    scales: bool,
}

/// Rows that are looked at together.
struct Rows<'a, 'b> {
    logits: &'a Tensor,
    /// The first of them.
    first_row: usize,
    first_id: u32,
    num_ids: usize,
    sampling: &'a [RowSampling<'b>],
}

impl Rows<'_, '_> {
    fn address(&self) -> Address {
        self.logits.row_address(self.first_row)
    }

    fn num_pieces(&self) -> usize {
        self.num_ids.div_ceil(PIECE)
    }

    /// Parameters of all rows, of ten words each, and what changes single logits, of four each.
    fn parameters(&self) -> (Vec<[u32; 10]>, Vec<[u32; 4]>) {
        let ids = u64::from(self.first_id)..u64::from(self.first_id) + self.num_ids as u64;
        let mut adjustments = Vec::new();
        let rows =
            self.sampling.iter().map(|sampling| {
                let first = adjustments.len();
                let own = Adjustments::new(sampling, ids.clone());
                adjustments.extend(own.tokens().iter().map(|token| {
                    [token.id, token.bias.to_bits(), u32::from(token.is_repeated), token.count]
                }));
                let factor = sampling.temperature.map_or(1.0, |temperature| 1.0 / temperature);
                let has_noise = if sampling.temperature.is_some() { HAS_NOISE } else { 0 };
                let is_offered = if sampling.num_offered > 0 { IS_OFFERED } else { 0 };
                [
                    sampling.noise_key as u32,
                    (sampling.noise_key >> 32) as u32,
                    factor.to_bits(),
                    has_noise | is_offered,
                    sampling.repetition_penalty.to_bits(),
                    sampling.presence_penalty.to_bits(),
                    sampling.frequency_penalty.to_bits(),
                    first as u32,
                    (adjustments.len() - first) as u32,
                    0,
                ]
            });
        let rows = rows.collect();
        (rows, adjustments)
    }

    fn lists(&self) -> Vec<List> {
        let mut lists = Vec::new();
        for (row, sampling) in self.sampling.iter().enumerate() {
            let top = sampling.logprobs.unwrap_or(0);
            for (count, scales) in [(top, false), (sampling.num_offered, true)] {
                if count > 0 {
                    lists.push(List { row, count, scales });
                }
            }
        }
        lists
    }
}

impl CudaDevice {
    /// See [`Device::candidates`](crate::device::Device::candidates).
    pub(super) fn offered(
        &self,
        logits: &Tensor,
        first_id: u32,
        num_ids: usize,
        rows: &[RowSampling<'_>],
    ) -> Result<Candidates> {
        let wants_more =
            |row: &RowSampling<'_>| row.num_offered > LIST || row.logprobs.is_some_and(|top| top > LIST);
        let are_together =
            !rows.iter().any(wants_more) && self.rows_together(rows, &wants_more) == rows.len();
        let is_gathered = are_together && !rows.iter().any(has_lists) && self.gathers()?;
        if num_ids == 0 && !is_gathered {
            let nothing = rows.iter().map(|row| cpu::whole_row(&[], first_id, row));
            return Ok(Candidates::Ready(nothing.collect()));
        }
        if are_together {
            let rows = Rows { logits, first_row: 0, first_id, num_ids, sampling: rows };
            let turn = self.sampling.turn.get();
            self.sampling.turn.set((turn + 1) % TURNS);
            return Ok(Candidates::Coming(self.begin_offers(&rows, Some(turn), is_gathered)?));
        }
        let mut candidates = Vec::with_capacity(rows.len());
        while candidates.len() < rows.len() {
            let first_row = candidates.len();
            if wants_more(&rows[first_row]) {
                candidates.push(self.offered_by_host(
                    logits,
                    first_row,
                    first_id,
                    num_ids,
                    &rows[first_row],
                )?);
                continue;
            }
            let len = self.rows_together(&rows[first_row..], &wants_more);
            let sampling = &rows[first_row..first_row + len];
            let rows = Rows { logits, first_row, first_id, num_ids, sampling };
            let coming = self.begin_offers(&rows, None, false)?;
            candidates.extend(self.wait_for(&coming)?.swap_remove(0));
        }
        Ok(Candidates::Ready(candidates))
    }

    /// Candidates, which are waited for.
    pub(super) fn told(&self, candidates: Candidates) -> Result<Told> {
        match candidates {
            Candidates::Ready(candidates) => Ok(Told::Own(candidates)),
            Candidates::Coming(coming) => {
                let mut of_ranks = self.wait_for(&coming)?;
                let is_gathered = coming.num_ranks > 1;
                Ok(if is_gathered { Told::OfRanks(of_ranks) } else { Told::Own(of_ranks.swap_remove(0)) })
            }
        }
    }

    /// What comes of each rank.
    fn wait_for(&self, coming: &Coming) -> Result<Vec<Vec<Candidate>>> {
        let Returned { pinned, come } = self.sampling.place(coming.turn);
        self.wait(come)?;
        let returned = pinned.borrow();
        Ok((0..coming.num_ranks).map(|rank| decode(coming, rank, returned.as_slice())).collect())
    }

    /// Whether the next step can take its tokens from these candidates: all ranks' are where it finds them.
    pub(super) fn are_fed(&self, candidates: &Candidates) -> bool {
        let Candidates::Coming(coming) = candidates else { return false };
        self.with_group(|group| Ok(group.host().world_size() == coming.num_ranks)).unwrap_or(false)
    }

    /// Whether candidates can be read without waiting.
    pub(super) fn are_there(&self, candidates: &Candidates) -> Result<bool> {
        match candidates {
            Candidates::Ready(_) => Ok(true),
            Candidates::Coming(coming) => {
                // A group that falls apart is noticed by whoever waits.
                self.with_group(|group| group.check())?;
                let has_come = self.sampling.place(coming.turn).come.has_come()?;
                if !has_come {
                    self.gpu.look();
                }
                Ok(has_come)
            }
        }
    }

    /// Has rows of a step take the tokens of the candidates that were begun last, `(row, candidate)`.
    pub(super) fn feed(&self, token_ids: Address, drawn: &[(u32, u32)]) -> Result<()> {
        let pairs: Vec<[u32; 2]> = drawn.iter().map(|&(row, candidate)| [row, candidate]).collect();
        let Begun { at, num_ranks, num_rows } = self.sampling.begun.get();
        launch!(
            self,
            &self.kernels.feed_tokens,
            [1, 1, 1],
            FEED_THREADS,
            self.staging.put(&pairs)?,
            count(pairs.len()),
            at,
            count(num_ranks),
            count(num_rows),
            token_ids,
        )
    }

    /// How many of the first rows are looked at together: as many as there is room for, also for what changes their logits.
    fn rows_together(&self, rows: &[RowSampling<'_>], ends: &dyn Fn(&RowSampling<'_>) -> bool) -> usize {
        let mut adjustments = 0;
        let fits = |row: &&RowSampling<'_>| {
            adjustments += row.logit_bias.len() + row.penalized_ids.len() + row.answer_counts.len();
            !ends(row) && adjustments <= self.sizes.max_pairs() / 2
        };
        rows.iter().take(MAX_ROWS).take_while(fits).count().max(1)
    }

    /// The whole row comes to the host.
    fn offered_by_host(
        &self,
        logits: &Tensor,
        row: usize,
        first_id: u32,
        num_ids: usize,
        sampling: &RowSampling<'_>,
    ) -> Result<Candidate> {
        let bytes = self.bring(logits.row_address(row), num_ids * size_of::<f32>())?;
        let logits: Vec<f32> = bytes.as_chunks().0.iter().map(|logit| f32::from_le_bytes(*logit)).collect();
        Ok(cpu::whole_row(&logits, first_id, sampling))
    }

    /// Has the stream look at rows and bring what they offer, or what those of all ranks do.
    fn begin_offers(&self, rows: &Rows<'_, '_>, turn: Option<usize>, is_gathered: bool) -> Result<Coming> {
        let (parameters, adjustments) = rows.parameters();
        let inputs = [self.staging.put(&parameters)?, self.staging.put(&adjustments)?];
        let (num_rows, sampling) = (rows.sampling.len(), &self.sampling);
        let own = if rows.num_ids == 0 { self.no_candidates(rows)? } else { self.look_at(rows, inputs)? };
        let begun = if is_gathered {
            let at = sampling.gathered.address();
            let num_ranks = self.gather_words(own, num_rows * ROW_BYTES / size_of::<u32>(), at)?;
            Begun { at, num_ranks, num_rows }
        } else {
            Begun { at: own, num_ranks: 1, num_rows }
        };
        sampling.begun.set(begun);
        let Begun { at, num_ranks, .. } = begun;
        let Returned { pinned, come } = sampling.place(turn);
        let mut returned = pinned.borrow_mut();
        returned.receive(at, 0, num_ranks * num_rows * ROW_BYTES)?;
        let lists = rows.lists();
        for (i, lists) in lists.chunks(MAX_LISTS).enumerate() {
            let place = lists_start() + i * MAX_LISTS * LIST_BYTES;
            self.list(rows, lists, inputs, (&mut returned, place))?;
        }
        come.record()?;
        Ok(Coming { turn, num_ranks, num_rows, num_ids: rows.num_ids, lists })
    }

    /// The candidates of rows, from logits.
    fn look_at(&self, rows: &Rows<'_, '_>, [parameters, adjustments]: [Address; 2]) -> Result<Address> {
        let (num_rows, num_pieces) = (rows.sampling.len(), rows.num_pieces());
        let (stride, sampling) = (rows.logits.cols() as u64, &self.sampling);
        launch!(
            self,
            &self.kernels.candidate_pieces,
            [num_pieces, num_rows, 1],
            PIECE_THREADS,
            rows.address(),
            stride,
            rows.first_id,
            count(rows.num_ids),
            parameters,
            adjustments,
            sampling.pieces.address(),
        )?;
        launch!(
            self,
            &self.kernels.merge_candidates,
            [num_rows, 1, 1],
            32,
            rows.address(),
            stride,
            rows.first_id,
            sampling.pieces.address(),
            count(num_pieces),
            sampling.rows.address(),
        )?;
        Ok(sampling.rows.address())
    }

    /// The candidates of a rank without vocabulary, in the form of the others.
    fn no_candidates(&self, rows: &Rows<'_, '_>) -> Result<Address> {
        let lowest = f32::NEG_INFINITY.to_bits();
        let nothing = [lowest, rows.first_id, lowest, lowest, 0];
        self.staging.put(&vec![nothing; rows.sampling.len()])
    }

    /// Has the stream make lists and bring them to `place`.
    fn list(
        &self,
        rows: &Rows<'_, '_>,
        lists: &[List],
        [parameters, adjustments]: [Address; 2],
        (returned, place): (&mut PinnedBuffer, usize),
    ) -> Result<()> {
        let requests: Vec<[u32; 3]> =
            lists.iter().map(|list| [list.row as u32, list.count as u32, u32::from(list.scales)]).collect();
        let requests = self.staging.put(&requests)?;
        let (stride, sampling) = (rows.logits.cols() as u64, &self.sampling);
        launch!(
            self,
            &self.kernels.select_pieces,
            [rows.num_pieces(), lists.len(), 1],
            PIECE_THREADS,
            rows.address(),
            stride,
            rows.first_id,
            count(rows.num_ids),
            parameters,
            adjustments,
            requests,
            sampling.lists.address(),
            sampling.tails.address(),
        )?;
        launch!(
            self,
            &self.kernels.merge_lists,
            [lists.len(), 1, 1],
            MERGE_THREADS,
            rows.address(),
            stride,
            rows.first_id,
            requests,
            sampling.lists.address(),
            sampling.tails.address(),
            count(rows.num_pieces()),
            sampling.best.address(),
            sampling.best_tails.address(),
        )?;
        let bytes = lists.len() * LIST * TOKEN_BYTES;
        returned.receive(sampling.best.address(), place, bytes)?;
        returned.receive(sampling.best_tails.address(), place + bytes, lists.len() * TAIL_BYTES)
    }
}

fn has_lists(row: &RowSampling<'_>) -> bool {
    row.num_offered > 0 || row.logprobs.is_some_and(|top| top > 0)
}

/// Where lists begin in what comes back.
fn lists_start() -> usize {
    (MAX_ROWS * ROW_BYTES).next_multiple_of(8)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn number(bytes: &[u8], at: usize) -> f32 {
    f32::from_bits(word(bytes, at))
}

/// The candidates of one rank of those that come.
fn decode(coming: &Coming, rank: usize, bytes: &[u8]) -> Vec<Candidate> {
    let Coming { num_rows, num_ids, ref lists, .. } = *coming;
    let candidate = |row: usize| {
        let at = (rank * num_rows + row) * ROW_BYTES;
        Candidate {
            score: number(bytes, at),
            token_id: word(bytes, at + 4),
            logit: number(bytes, at + 8),
            max_logit: number(bytes, at + 12),
            sum_exp: number(bytes, at + 16),
            top: Vec::new(),
            offer: None,
        }
    };
    let mut candidates: Vec<Candidate> = (0..num_rows).map(candidate).collect();
    for (index, list) in lists.iter().enumerate() {
        let candidate = &mut candidates[list.row];
        if candidate.max_logit.is_nan() {
            // Nothing else means anything then.
            continue;
        }
        let (chunk, within) = (index / MAX_LISTS, index % MAX_LISTS);
        let in_chunk = MAX_LISTS.min(lists.len() - chunk * MAX_LISTS);
        let start = lists_start() + chunk * MAX_LISTS * LIST_BYTES;
        let tokens = (0..list.count.min(num_ids)).map(|place| {
            let at = start + (within * LIST + place) * TOKEN_BYTES;
            Offered { token_id: word(bytes, at), scaled: number(bytes, at + 4), logit: number(bytes, at + 8) }
        });
        if !list.scales {
            candidate.top = tokens.map(|token| (token.token_id, token.logit)).collect();
            continue;
        }
        let best: Vec<Offered> = tokens.collect();
        let at = start + in_chunk * LIST * TOKEN_BYTES + within * TAIL_BYTES;
        let tail = u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32;
        candidate.offer = Some(Offer { best, num_ids, tail_sum_exp: f64::from_bits(tail) });
    }
    candidates
}
