//! From the candidates of all ranks to one token.

use std::cmp::Ordering;

use crate::device::Candidate;

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

/// Stands for a place in `top` that a rank with a short vocabulary cannot fill.
const NO_TOKEN: u32 = u32::MAX;
const FIXED_WORDS: usize = 5;

/// Candidates as bytes; how many depends on `tops` (how many of the best each row wants) only, as a gather
/// needs.
pub fn encode(candidates: &[Candidate], tops: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tops.iter().map(|top| 4 * (FIXED_WORDS + 2 * top)).sum());
    for (candidate, &top) in candidates.iter().zip(tops) {
        let Candidate { score, token_id, logit, max_logit, sum_exp, top: best } = candidate;
        let words = [score.to_bits(), *token_id, logit.to_bits(), max_logit.to_bits(), sum_exp.to_bits()];
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        for place in 0..top {
            let (id, logit) = best.get(place).copied().unwrap_or((NO_TOKEN, f32::NEG_INFINITY));
            bytes.extend(id.to_le_bytes());
            bytes.extend(logit.to_bits().to_le_bytes());
        }
    }
    bytes
}

/// The reverse of [`encode`].
///
/// # Panics
/// When `bytes` is not what `encode` gives for `tops`: ranks of one group disagree about the step.
pub fn decode(bytes: &[u8], tops: &[usize]) -> Vec<Candidate> {
    let (words, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "candidates are whole words");
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    let mut word = || words.next().expect("every rank offers a candidate for every row");
    tops.iter()
        .map(|&top| {
            let (score, token_id) = (f32::from_bits(word()), word());
            let [logit, max_logit, sum_exp] = [(); 3].map(|()| f32::from_bits(word()));
            let top = (0..top)
                .map(|_| (word(), f32::from_bits(word())))
                .filter(|&(id, _)| id != NO_TOKEN)
                .collect();
            Candidate { score, token_id, logit, max_logit, sum_exp, top }
        })
        .collect()
}

/// The best of all ranks' candidates for one row: the highest score, the smallest token on a tie. `None` where a logit of
/// any rank is infinite or not a number, or no score is above negative infinity: then there is nothing to draw from.
///
/// The log-probability is `logit - ln(sum(exp(logits)))` over the whole vocabulary, the sum taken over ranks
/// in their order, in f64.
///
/// # Panics
/// When there is no candidate.
pub fn combine(candidates: &[&Candidate], logprobs: Option<usize>) -> Option<Drawn> {
    let best = candidates
        .iter()
        .min_by(|a, b| better(a.score, b.score).then(a.token_id.cmp(&b.token_id)))
        .expect("there is at least one rank");
    let finite = candidates.iter().all(|one| !one.max_logit.is_nan());
    // Of finite logits, a score may be infinite where penalty or temperature are extreme.
    if !finite || best.score.is_nan() || best.score == f32::NEG_INFINITY {
        return None;
    }
    let Some(num_top) = logprobs else {
        return Some(Drawn { token_id: best.token_id, logprob: None, top: Vec::new() });
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
    Some(Drawn { token_id: best.token_id, logprob: Some(logprob(best.logit)), top })
}

/// Larger first. Not a number comes last, whatever its sign: it must never be drawn where there is a number.
fn better(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a rank offers for its slice of greedily drawn logits.
    fn candidate(first_id: u32, logits: &[f32], num_top: usize) -> Candidate {
        let mut top: Vec<_> = (first_id..).zip(logits.iter().copied()).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let (token_id, logit) = top.first().copied().unwrap_or((first_id, f32::NEG_INFINITY));
        top.truncate(num_top);
        let sum_exp = logits.iter().map(|x| (x - logit).exp()).sum();
        Candidate { score: logit, token_id, logit, max_logit: logit, sum_exp, top }
    }

    #[test]
    fn slices_give_what_the_whole_gives() {
        let logits = [0.5, -1.0, 3.0, 2.5, 3.0, -7.0, 0.0];
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let whole = combine(&[&candidate(0, &logits, 3)], Some(3)).expect("drawn");
        assert_eq!(whole.token_id, 2);
        let split = [candidate(0, &logits[..3], 3), candidate(3, &logits[3..], 3), candidate(7, &[], 3)];
        let bytes: Vec<_> = split.iter().map(|one| encode(std::slice::from_ref(one), &[3])).collect();
        assert!(bytes.iter().all(|one| one.len() == bytes[0].len()));
        let decoded: Vec<_> = bytes.iter().map(|one| decode(one, &[3]).remove(0)).collect();
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
