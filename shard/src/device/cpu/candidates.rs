//! What a slice of the vocabulary offers at one row of logits.

use super::instruction_set::{InstructionSet, Kernel};
use super::simd::{LANES, Simd, exp};
use crate::device::{Candidate, RowSampling};
use crate::runner::noise::{MAX_GUMBEL, gumbel};

/// Logits that are looked at as one piece. Fixed, so that sums do not depend on threads.
pub const PIECE_LEN: usize = 8192;

/// One row of logits, `first_id` and on.
pub struct RowLogits<'a> {
    logits: &'a [f32],
    first_id: u32,
    sampling: &'a RowSampling<'a>,
    /// Ids of this slice that the penalty touches, ascending.
    penalized: Vec<u32>,
}

impl<'a> RowLogits<'a> {
    /// `logits` are those of tokens, without padding.
    pub fn new(logits: &'a [f32], first_id: u32, sampling: &'a RowSampling<'a>) -> Self {
        let ids = u64::from(first_id)..u64::from(first_id) + logits.len() as u64;
        let inside = |&id: &u32| ids.contains(&u64::from(id));
        let mut penalized: Vec<u32> = if sampling.repetition_penalty == 1.0 {
            Vec::new()
        } else {
            sampling.penalized_ids.iter().copied().filter(inside).collect()
        };
        penalized.sort_unstable();
        penalized.dedup();
        Self { logits, first_id, sampling, penalized }
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
        let end_id = first_id + logits.len() as u32;
        let penalized = &self.penalized[self.penalized.partition_point(|&id| id < first_id)..];
        for &id in penalized.iter().take_while(|&&id| id < end_id) {
            let logit = logits[(id - first_id) as usize];
            let penalty = self.sampling.repetition_penalty;
            let logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            scores[(id - first_id) as usize] = logit * factor;
        }
        let noise_key = self.sampling.temperature.map(|_| self.sampling.noise_key);
        let (score, index) = set.run(BestScore { scores, first_id, noise_key });
        let top = match self.sampling.logprobs {
            Some(count) if count > 0 => set.run(Top { logits, first_id, count }),
            _ => Vec::new(),
        };
        Candidate {
            score,
            token_id: first_id + index as u32,
            logit: logits.get(index).copied().unwrap_or(f32::NEG_INFINITY),
            max_logit,
            sum_exp,
            top,
        }
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
        };
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
        }
        all.top.sort_unstable_by(better);
        all.top.truncate(self.sampling.logprobs.unwrap_or(0));
        all
    }
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
