//! From the candidates of all ranks to one token.

use std::cmp::Ordering;

use crate::device::{Candidate, Offer, Offered, RowSampling};

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token_id: u32,
    /// Its log-probability in the model's own distribution, where log-probabilities were asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens and their log-probabilities, best first, smaller id first on a tie.
    pub top: Vec<(u32, f32)>,
}

/// A token to draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token_id: u32,
    /// Its logit in the model's own distribution.
    pub logit: f32,
}

/// How many tokens a rank tells of a row, the same on all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Places in [`Candidate::top`].
    pub top: usize,
    /// Places in [`Offer::best`]; 0 where there is no offer.
    pub offered: usize,
}

/// Stands for a place that a rank with a short vocabulary cannot fill.
const NO_TOKEN: u32 = u32::MAX;
const FIXED_WORDS: usize = 5;
const TOP_WORDS: usize = 2;
const OFFER_WORDS: usize = 3;
const OFFERED_WORDS: usize = 3;

impl Places {
    /// What the candidates of `row` have.
    pub fn of(row: &RowSampling<'_>) -> Self {
        Self { top: row.logprobs.unwrap_or(0), offered: row.num_offered }
    }

    fn words(self) -> usize {
        let offer = if self.offered > 0 { OFFER_WORDS + OFFERED_WORDS * self.offered } else { 0 };
        FIXED_WORDS + TOP_WORDS * self.top + offer
    }
}

/// Candidates as bytes; how many depends on `places`, one for each row, only, as a gather needs.
pub fn encode(candidates: &[Candidate], places: &[Places]) -> Vec<u8> {
    let words = places.iter().map(|places| places.words()).sum::<usize>();
    let mut bytes = Vec::with_capacity(words * size_of::<u32>());
    let mut put = |word: u32| bytes.extend(word.to_le_bytes());
    for (candidate, places) in candidates.iter().zip(places) {
        let Candidate { score, token_id, logit, max_logit, sum_exp, top, offer } = candidate;
        [score.to_bits(), *token_id, logit.to_bits(), max_logit.to_bits(), sum_exp.to_bits()]
            .into_iter()
            .for_each(&mut put);
        for place in 0..places.top {
            let (id, logit) = top.get(place).copied().unwrap_or((NO_TOKEN, f32::NEG_INFINITY));
            [id, logit.to_bits()].into_iter().for_each(&mut put);
        }
        if places.offered == 0 {
            continue;
        }
        let (offer, nothing) = (offer.as_ref(), Offered { token_id: NO_TOKEN, scaled: 0.0, logit: 0.0 });
        let tail = offer.map_or(0.0, |offer| offer.tail_sum_exp).to_bits();
        let num_ids = offer.map_or(0, |offer| offer.num_ids) as u32;
        [num_ids, tail as u32, (tail >> 32) as u32].into_iter().for_each(&mut put);
        for place in 0..places.offered {
            let Offered { token_id, scaled, logit } =
                offer.and_then(|offer| offer.best.get(place)).copied().unwrap_or(nothing);
            [token_id, scaled.to_bits(), logit.to_bits()].into_iter().for_each(&mut put);
        }
    }
    bytes
}

/// The reverse of [`encode`].
///
/// # Panics
/// When `bytes` is not what `encode` gives for `places`: ranks of one group disagree about the step.
pub fn decode(bytes: &[u8], places: &[Places]) -> Vec<Candidate> {
    let (words, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "candidates are whole words");
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    let mut word = || words.next().expect("every rank offers a candidate for every row");
    places
        .iter()
        .map(|places| {
            let (score, token_id) = (f32::from_bits(word()), word());
            let [logit, max_logit, sum_exp] = [(); 3].map(|()| f32::from_bits(word()));
            let top = (0..places.top)
                .map(|_| (word(), f32::from_bits(word())))
                .filter(|&(id, _)| id != NO_TOKEN)
                .collect();
            let offer = (places.offered > 0).then(|| {
                let num_ids = word() as usize;
                let tail_sum_exp = f64::from_bits(u64::from(word()) | u64::from(word()) << 32);
                let best = (0..places.offered)
                    .map(|_| {
                        let (token_id, scaled) = (word(), f32::from_bits(word()));
                        Offered { token_id, scaled, logit: f32::from_bits(word()) }
                    })
                    .filter(|token| token.token_id != NO_TOKEN)
                    .collect();
                Offer { best, num_ids, tail_sum_exp }
            });
            Candidate { score, token_id, logit, max_logit, sum_exp, top, offer }
        })
        .collect()
}

/// The best of all ranks' candidates for one row: the highest score, the smallest token on a tie. `None` where a logit of
/// any rank is infinite or not a number, or no score is above negative infinity: then there is nothing to draw from.
///
/// # Panics
/// When there is no candidate.
pub fn best(candidates: &[&Candidate]) -> Option<Choice> {
    let best = candidates
        .iter()
        .min_by(|a, b| better(a.score, b.score).then(a.token_id.cmp(&b.token_id)))
        .expect("there is at least one rank");
    let finite = candidates.iter().all(|one| !one.max_logit.is_nan());
    // Of finite logits, a score may be infinite where penalty or temperature are extreme.
    let is_there = finite && !best.score.is_nan() && best.score != f32::NEG_INFINITY;
    is_there.then_some(Choice { token_id: best.token_id, logit: best.logit })
}

/// A token that was chosen, with the log-probabilities that `logprobs` asks for.
///
/// The log-probability is `logit - ln(sum(exp(logits)))` over the whole vocabulary, the sum taken over ranks
/// in their order, in f64.
pub fn drawn(choice: Choice, candidates: &[&Candidate], logprobs: Option<usize>) -> Drawn {
    let Choice { token_id, logit } = choice;
    let Some(num_top) = logprobs else {
        return Drawn { token_id, logprob: None, top: Vec::new() };
    };
    let max_logit = candidates.iter().map(|one| f64::from(one.max_logit)).fold(f64::NEG_INFINITY, f64::max);
    let sum_exp: f64 = candidates
        .iter()
        .filter(|one| one.sum_exp > 0.0)
        .map(|one| f64::from(one.sum_exp) * (f64::from(one.max_logit) - max_logit).exp())
        .sum();
    let log_sum_exp = max_logit + sum_exp.ln();
    let logprob = |logit: f32| (f64::from(logit) - log_sum_exp) as f32;
    let mut top: Vec<(u32, f32)> = candidates.iter().flat_map(|one| one.top.iter().copied()).collect();
    top.sort_by(|a, b| better(a.1, b.1).then(a.0.cmp(&b.0)));
    top.truncate(num_top);
    for (_, logit) in &mut top {
        *logit = logprob(*logit);
    }
    Drawn { token_id, logprob: Some(logprob(logit)), top }
}

/// Larger first. Not a number comes last, whatever its sign: it must never be drawn where there is a number.
fn better(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: [Places; 1] = [Places { top: 3, offered: 2 }];

    fn combine(candidates: &[&Candidate], logprobs: Option<usize>) -> Option<Drawn> {
        best(candidates).map(|choice| drawn(choice, candidates, logprobs))
    }

    /// What a rank offers for its slice of greedily drawn logits.
    fn candidate(first_id: u32, logits: &[f32], num_top: usize) -> Candidate {
        let mut top: Vec<_> = (first_id..).zip(logits.iter().copied()).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let (token_id, logit) = top.first().copied().unwrap_or((first_id, f32::NEG_INFINITY));
        top.truncate(num_top);
        let sum_exp = logits.iter().map(|x| (x - logit).exp()).sum();
        let offered = |(token_id, logit): &(u32, f32)| Offered {
            token_id: *token_id,
            scaled: 2.0 * logit,
            logit: *logit,
        };
        let best = top.iter().take(2).map(offered).collect();
        let offer = Some(Offer { best, num_ids: logits.len(), tail_sum_exp: 1.0 / 3.0 });
        Candidate { score: logit, token_id, logit, max_logit: logit, sum_exp, top, offer }
    }

    #[test]
    fn slices_give_what_the_whole_gives() {
        let logits = [0.5, -1.0, 3.0, 2.5, 3.0, -7.0, 0.0];
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let whole = combine(&[&candidate(0, &logits, 3)], Some(3)).expect("drawn");
        assert_eq!(whole.token_id, 2);
        let split = [candidate(0, &logits[..3], 3), candidate(3, &logits[3..], 3), candidate(7, &[], 3)];
        let bytes: Vec<_> = split.iter().map(|one| encode(std::slice::from_ref(one), &PLACES)).collect();
        assert!(bytes.iter().all(|one| one.len() == bytes[0].len()));
        let decoded: Vec<_> = bytes.iter().map(|one| decode(one, &PLACES).remove(0)).collect();
        assert_eq!(decoded, split);
        let drawn = combine(&decoded.iter().collect::<Vec<_>>(), Some(3)).expect("drawn");
        assert_eq!(drawn.token_id, 2);
        assert_eq!(drawn.top.iter().map(|one| one.0).collect::<Vec<_>>(), [2, 4, 3]);
        let expected = (3.0 - sum.ln()) as f32;
        assert!((drawn.logprob.expect("asked for") - expected).abs() < 1e-6);
        assert!((drawn.top[1].1 - expected).abs() < 1e-6);
    }

    #[test]
    fn without_log_probabilities_there_are_none() {
        let drawn = combine(&[&candidate(0, &[1.0, 2.0], 0)], None);
        assert_eq!(drawn, Some(Drawn { token_id: 1, logprob: None, top: Vec::new() }));
    }

    #[test]
    fn nothing_is_drawn_where_a_rank_has_logits_that_are_not_finite() {
        let good = candidate(1, &[-5.0, 7.0], 1);
        for nan in [f32::NAN, -f32::NAN] {
            // Whether or not the rank still offers a score.
            for score in [nan, 3.0, f32::NEG_INFINITY] {
                let bad = Candidate { score, max_logit: nan, sum_exp: nan, ..candidate(0, &[1.0], 1) };
                for logprobs in [None, Some(0), Some(1)] {
                    assert_eq!(combine(&[&bad, &good], logprobs), None);
                    assert_eq!(combine(&[&good, &bad], logprobs), None);
                    assert_eq!(combine(&[&bad], logprobs), None);
                }
            }
        }
    }

    #[test]
    fn a_rank_without_vocabulary_disturbs_nobody_and_draws_nothing() {
        let (empty, good) = (candidate(0, &[], 0), candidate(0, &[-5.0], 0));
        assert_eq!(empty.score, f32::NEG_INFINITY);
        for order in [[&empty, &good], [&good, &empty]] {
            let drawn = combine(&order, Some(0)).expect("drawn");
            assert_eq!((drawn.token_id, drawn.logprob), (0, Some(0.0)));
        }
        assert_eq!(combine(&[&empty, &empty], None), None);
    }

    #[test]
    fn an_overflown_score_of_finite_logits_is_still_the_best() {
        let most = Candidate { score: f32::INFINITY, ..candidate(4, &[3.0], 0) };
        assert_eq!(combine(&[&candidate(0, &[9.0], 0), &most], None).map(|drawn| drawn.token_id), Some(4));
    }
}
