//! What is done to single logits before the temperature: bias and penalties.

use std::ops::Range;

use crate::device::RowSampling;

/// The tokens of a slice of the vocabulary whose logits change, and how.
pub struct Adjustments<'a> {
    sampling: &'a RowSampling<'a>,
    /// By id, each once.
    tokens: Vec<Adjustment>,
}

/// What the logit of one token meets.
#[derive(Clone, Copy)]
pub struct Adjustment {
    /// The token.
    pub id: u32,
    /// What is added first.
    pub bias: f32,
    /// Whether the repetition penalty applies.
    pub is_repeated: bool,
    /// Occurrences in the answer.
    pub count: u32,
}

impl<'a> Adjustments<'a> {
    /// Those of the tokens `ids`.
    pub fn new(sampling: &'a RowSampling<'a>, ids: Range<u64>) -> Self {
        let nothing = |id| Adjustment { id, bias: 0.0, is_repeated: false, count: 0 };
        let penalized: &[u32] = if sampling.repetition_penalty == 1.0 { &[] } else { sampling.penalized_ids };
        let biased = sampling.logit_bias.iter().map(|&(id, bias)| Adjustment { bias, ..nothing(id) });
        let repeated = penalized.iter().map(|&id| Adjustment { is_repeated: true, ..nothing(id) });
        let counted = sampling.answer_counts.iter().map(|&(id, count)| Adjustment { count, ..nothing(id) });
        let all = biased.chain(repeated).chain(counted);
        let mut tokens: Vec<_> = all.filter(|token| ids.contains(&u64::from(token.id))).collect();
        tokens.sort_unstable_by_key(|token| token.id);
        tokens.dedup_by(|next, kept| {
            if next.id != kept.id {
                return false;
            }
            kept.bias += next.bias;
            kept.is_repeated |= next.is_repeated;
            kept.count += next.count;
            true
        });
        Self { sampling, tokens }
    }

    /// All of them, by id, each token once.
    pub fn tokens(&self) -> &[Adjustment] {
        &self.tokens
    }

    /// The changed ones of `logits`, those of token `first_id` and on: each with its index there.
    pub fn of<'s>(&'s self, first_id: u32, logits: &'s [f32]) -> impl Iterator<Item = (usize, f32)> + 's {
        let start = self.tokens.partition_point(|token| token.id < first_id);
        self.tokens[start..]
            .iter()
            .map(move |token| ((token.id - first_id) as usize, token))
            .take_while(move |(index, _)| *index < logits.len())
            .map(move |(index, token)| (index, self.adjusted(token, logits[index])))
    }

    fn adjusted(&self, token: &Adjustment, logit: f32) -> f32 {
        let RowSampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self.sampling;
        let mut logit = logit + token.bias;
        if token.is_repeated {
            logit = if logit > 0.0 { logit / repetition_penalty } else { logit * repetition_penalty };
        }
        if token.count > 0 {
            logit -= frequency_penalty * token.count as f32 + presence_penalty;
        }
        logit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bias_comes_first_and_the_answers_penalties_last() {
        let sampling = RowSampling {
            logit_bias: &[(12, 3.0), (10, -1.0)],
            penalized_ids: &[14, 12, 11, 9, 15],
            repetition_penalty: 2.0,
            answer_counts: &[(11, 3), (13, 1)],
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..RowSampling::default()
        };
        let adjustments = Adjustments::new(&sampling, 10..15);
        let logits = [1.0, 4.0, -2.0, 1.0, -3.0];
        let all: Vec<_> = adjustments.of(10, &logits).collect();
        let of_11 = 4.0 / 2.0 - 3.0 * 0.25 - 0.5;
        assert_eq!(all, [(0, 0.0), (1, of_11), (2, 0.5), (3, 0.25), (4, -6.0)]);
        assert_eq!(adjustments.of(12, &logits[2..4]).collect::<Vec<_>>(), [(0, 0.5), (1, 0.25)]);
    }

    #[test]
    fn without_a_penalty_no_token_is_looked_at() {
        let sampling = RowSampling { penalized_ids: &[1, 2], ..RowSampling::default() };
        assert_eq!(Adjustments::new(&sampling, 0..5).of(0, &[1.0; 5]).count(), 0);
    }
}
