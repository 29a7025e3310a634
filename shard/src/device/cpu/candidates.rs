//! What a slice of the vocabulary offers at one row of logits.

use super::instruction_set::{InstructionSet, Kernel};
use super::simd::{LANES, Simd, exp};
use crate::device::adjustments::Adjustments;
use crate::device::{Candidate, Offer, Offered, RowSampling};
use crate::runner::noise::{MAX_GUMBEL, gumbel};

/// Logits that are looked at as one piece. Fixed, so that sums do not depend on threads.
pub const PIECE_LEN: usize = 8192;

/// Terms that are added in f32 before their sum joins one in f64.
const RUN_LEN: usize = 16 * LANES;

/// One row of logits, `first_id` and on.
pub struct RowLogits<'a> {
    logits: &'a [f32],
    first_id: u32,
    sampling: &'a RowSampling<'a>,
    adjustments: Adjustments<'a>,
}

impl<'a> RowLogits<'a> {
    /// `logits` are those of tokens, without padding.
    pub fn new(logits: &'a [f32], first_id: u32, sampling: &'a RowSampling<'a>) -> Self {
        let ids = u64::from(first_id)..u64::from(first_id) + logits.len() as u64;
        Self { logits, first_id, sampling, adjustments: Adjustments::new(sampling, ids) }
    }

    /// Pieces of this row.
    pub fn num_pieces(&self) -> usize {
        self.logits.len().div_ceil(PIECE_LEN)
    }

    /// What piece `piece` offers. `scratch` has room for [`PIECE_LEN`] elements.
    pub fn piece(&self, set: InstructionSet, piece: usize, scratch: &mut [f32]) -> Candidate {
        let start = piece * PIECE_LEN;
        let logits = &self.logits[start..self.logits.len().min(start + PIECE_LEN)];
        let first_id = self.first_id + start as u32;
        let (max_logit, sum_exp) = set.run(MaxAndSum(logits));

        let scores = &mut scratch[..logits.len()];
        let factor = self.sampling.temperature.map_or(1.0, |temperature| 1.0 / temperature);
        for (score, &logit) in scores.iter_mut().zip(logits) {
            *score = logit * factor;
        }
        for (index, logit) in self.adjustments.of(first_id, logits) {
            scores[index] = logit * factor;
        }
        if self.sampling.num_offered > 0 {
            // Numbers whose differences are numbers, and one zero only, so that all comparisons see the same ties.
            scores.iter_mut().for_each(|score| *score = (*score + 0.0).clamp(f32::MIN, f32::MAX));
        }
        let noise_key = self.sampling.temperature.map(|_| self.sampling.noise_key);
        let (score, index) = set.run(BestScore { scores, first_id, noise_key });
        let top = match self.sampling.logprobs {
            Some(count) if count > 0 => set.run(Top { logits, first_id, count }),
            _ => Vec::new(),
        };
        let offer = (self.sampling.num_offered > 0).then(|| self.offer(set, logits, scores, first_id));
        Candidate {
            score,
            token_id: first_id + index as u32,
            logit: logits.get(index).copied().unwrap_or(f32::NEG_INFINITY),
            max_logit,
            sum_exp,
            top,
            offer,
        }
    }

    /// The best of `scores`, which are scaled `logits` of token `first_id` and on. Overwrites them.
    fn offer(&self, set: InstructionSet, logits: &[f32], scores: &mut [f32], first_id: u32) -> Offer {
        let best = set.run(Top { logits: scores, first_id, count: self.sampling.num_offered });
        let offered = best.iter().map(|&(token_id, scaled)| {
            let index = (token_id - first_id) as usize;
            // What is left are the others.
            scores[index] = f32::NEG_INFINITY;
            Offered { token_id, scaled, logit: logits[index] }
        });
        let best: Vec<Offered> = offered.collect();
        let tail_sum_exp = set.run(SumExp { logits: scores, largest: best[0].scaled });
        Offer { best, num_ids: logits.len(), tail_sum_exp }
    }

    /// What the row offers, from its pieces in order.
    pub fn merge(&self, pieces: Vec<Candidate>) -> Candidate {
        let mut all = Candidate {
            score: f32::NEG_INFINITY,
            token_id: self.first_id,
            logit: self.logits.first().copied().unwrap_or(f32::NEG_INFINITY),
            max_logit: f32::NEG_INFINITY,
            sum_exp: 0.0,
            top: Vec::new(),
            offer: None,
        };
        let mut offers = Vec::new();
        for piece in pieces {
            // The pieces come in the order of ids, so that the first of equal scores has the smallest id.
            if piece.score > all.score {
                (all.score, all.token_id, all.logit) = (piece.score, piece.token_id, piece.logit);
            }
            if piece.max_logit.is_nan() {
                return Candidate {
                    score: f32::NAN,
                    max_logit: f32::NAN,
                    sum_exp: f32::NAN,
                    top: Vec::new(),
                    ..all
                };
            }
            let max_logit = all.max_logit.max(piece.max_logit);
            let share = |sum: f32, max: f32| if sum == 0.0 { 0.0 } else { sum * (max - max_logit).exp() };
            all.sum_exp = share(all.sum_exp, all.max_logit) + share(piece.sum_exp, piece.max_logit);
            all.max_logit = max_logit;
            all.top.extend(piece.top);
            offers.extend(piece.offer);
        }
        all.top.sort_unstable_by(better);
        all.top.truncate(self.sampling.logprobs.unwrap_or(0));
        let num_offered = self.sampling.num_offered;
        all.offer = (num_offered > 0).then(|| join(&offers, num_offered));
        all
    }
}

/// What a row of logits offers, looked at by this thread alone.
pub fn whole_row(logits: &[f32], first_id: u32, sampling: &RowSampling<'_>) -> Candidate {
    let (set, row) = (InstructionSet::detect(), RowLogits::new(logits, first_id, sampling));
    let mut scratch = vec![0.0; PIECE_LEN];
    row.merge((0..row.num_pieces()).map(|piece| row.piece(set, piece, &mut scratch)).collect())
}

/// The `num_offered` best of all offers, which are in the order of ids. What is not among them joins the tail.
fn join(offers: &[Offer], num_offered: usize) -> Offer {
    let num_ids = offers.iter().map(|offer| offer.num_ids).sum();
    let mut best: Vec<Offered> = offers.iter().flat_map(|offer| offer.best.iter().copied()).collect();
    // Each offer is sorted, which a stable sort makes use of.
    best.sort_by(Offered::best_first);
    let others = best.split_off(num_offered.min(best.len()));
    let Some(largest) = best.first().map(|token| token.scaled) else { return Offer::default() };
    let weight = |scaled: f32| (f64::from(scaled) - f64::from(largest)).exp();
    let tails: f64 = offers.iter().map(|offer| offer.tail_sum_exp * weight(offer.best[0].scaled)).sum();
    let tail_sum_exp = tails + others.iter().map(|token| weight(token.scaled)).sum::<f64>();
    Offer { best, num_ids, tail_sum_exp }
}

/// Order of [`Candidate::top`]: larger logits first, then smaller ids.
fn better(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The largest logit and the sum of `exp(logit - largest)`; not numbers unless all logits are finite.
struct MaxAndSum<'a>(&'a [f32]);

impl Kernel for MaxAndSum<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self) -> (f32, f32) {
        let lowest = S::splat(f32::NEG_INFINITY);
        let (mut max, mut finite) = (lowest, S::splat(0.0));
        for x in self.0.chunks(LANES) {
            let (len, x) = (x.len(), S::load_slice(x));
            max = S::max(S::keep_first(x, len, lowest), max);
            // A maximum may pass over what is not a number; the difference is zero for finite numbers only.
            finite = S::add(finite, S::sub(x, x));
        }
        if S::reduce_add(finite).is_nan() {
            return (f32::NAN, f32::NAN);
        }
        let max = S::reduce_max(max);
        let mut sum = S::splat(0.0);
        for x in self.0.chunks(LANES) {
            let x = S::keep_first(S::load_slice(x), x.len(), lowest);
            sum = S::add(sum, exp::<S>(S::sub(x, S::splat(max))));
        }
        (max, S::reduce_add(sum))
    }
}

/// The sum of `exp(logit - largest)`, where no logit is larger. A logit of negative infinity adds nothing.
struct SumExp<'a> {
    logits: &'a [f32],
    largest: f32,
}

impl Kernel for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self) -> f64 {
        let (lowest, largest) = (S::splat(f32::NEG_INFINITY), S::splat(self.largest));
        let mut sum = 0.0;
        for run in self.logits.chunks(RUN_LEN) {
            let mut of_run = S::splat(0.0);
            for x in run.chunks(LANES) {
                let x = S::keep_first(S::load_slice(x), x.len(), lowest);
                of_run = S::add(of_run, exp::<S>(S::sub(x, largest)));
            }
            sum += f64::from(S::reduce_add(of_run));
        }
        sum
    }
}

/// The largest score, with noise if there is a key, and the first index that has it.
struct BestScore<'a> {
    scores: &'a [f32],
    first_id: u32,
    noise_key: Option<u64>,
}

impl Kernel for BestScore<'_> {
    type Output = (f32, usize);

    #[inline(always)]
    fn run<S: Simd>(self) -> (f32, usize) {
        let noise = self.noise_key;
        let perturbed = |index: usize| {
            let id = self.first_id + index as u32;
            self.scores[index] + noise.map_or(0.0, |key| gumbel(key, id))
        };
        let mut best = (f32::NEG_INFINITY, 0);
        let consider = |best: &mut (f32, usize), index: usize| {
            let score = perturbed(index);
            if score > best.0 || (score == best.0 && index < best.1) {
                *best = (score, index);
            }
        };
        // The largest score before noise is a good first bound: most others cannot reach it with any noise.
        let mut largest = (f32::NEG_INFINITY, 0);
        for (chunk, x) in self.scores.chunks(LANES).enumerate() {
            let max = S::reduce_max(S::keep_first(S::load_slice(x), x.len(), S::splat(f32::NEG_INFINITY)));
            if max > largest.0 {
                let lane = x.iter().position(|&x| x == max).unwrap_or(0);
                largest = (max, chunk * LANES + lane);
            }
        }
        if largest.0 == f32::NEG_INFINITY {
            return best;
        }
        consider(&mut best, largest.1);
        if noise.is_none() {
            // Without noise no score can grow, and the first of the largest was taken.
            return best;
        }
        for (chunk, x) in self.scores.chunks(LANES).enumerate() {
            // Rounding keeps the order, so that what is skipped could not even have drawn level.
            if x.len() == LANES && S::reduce_max(S::load_slice(x)) + MAX_GUMBEL < best.0 {
                continue;
            }
            for (lane, &score) in x.iter().enumerate() {
                if score + MAX_GUMBEL >= best.0 {
                    consider(&mut best, chunk * LANES + lane);
                }
            }
        }
        best
    }
}

/// The `count` largest logits with their ids, best first.
struct Top<'a> {
    logits: &'a [f32],
    first_id: u32,
    count: usize,
}

impl Kernel for Top<'_> {
    type Output = Vec<(u32, f32)>;

    #[inline(always)]
    fn run<S: Simd>(self) -> Vec<(u32, f32)> {
        let count = self.count.min(self.logits.len());
        if count == self.logits.len() {
            // All of them: to find the place of each one by one would take the square of their number.
            let mut all: Vec<(u32, f32)> = (self.first_id..).zip(self.logits.iter().copied()).collect();
            all.sort_unstable_by(better);
            return all;
        }
        let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
        for (chunk, x) in self.logits.chunks(LANES).enumerate() {
            let full = top.len() == count;
            // Ids ascend, so that an equal logit that comes later does not displace one that is there.
            if full && x.len() == LANES && S::reduce_max(S::load_slice(x)) <= top[count - 1].1 {
                continue;
            }
            for (lane, &logit) in x.iter().enumerate() {
                let entry = (self.first_id + (chunk * LANES + lane) as u32, logit);
                if top.len() == count && better(&top[count - 1], &entry).is_lt() {
                    continue;
                }
                let place = top.partition_point(|other| better(other, &entry).is_lt());
                top.insert(place, entry);
                top.truncate(count);
            }
        }
        top
    }
}

#[cfg(test)]
mod tests;
