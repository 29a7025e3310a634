//! A sequence as a rank holds it: its tokens, where they stand, and where their keys and values are.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use super::step::{Admission, Fault, Grid, InField, MediaHash, Sampling, StepError, below, count};
use crate::{
    device::KV_BLOCK_TOKENS,
    model::positions::{MediumRun, PositionGeometry, Positions},
};

/// What a sequence must keep within.
#[derive(Clone, Copy, Debug)]
pub struct SequenceLimits {
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// Tokens of one sequence.
    pub max_context_tokens: usize,
    /// What of the model decides positions.
    pub geometry: PositionGeometry,
}

/// Tokens of a medium within a sequence.
#[derive(Clone, Debug)]
pub struct Span {
    /// The medium.
    pub hash: MediaHash,
    /// Its shape.
    pub grid: Grid,
    /// Its tokens.
    pub tokens: Range<usize>,
}

/// The state of one sequence. All ranks hold the same.
#[derive(Debug)]
pub struct Sequence {
    /// The prompt and everything drawn.
    pub token_ids: Vec<u32>,
    /// How its tokens are drawn.
    pub sampling: Sampling,
    /// Media of the prompt, in order.
    pub spans: Vec<Span>,
    /// Blocks of keys and values, in order.
    pub block_table: Vec<u32>,
    /// Tokens whose keys and values are computed.
    pub num_computed_tokens: usize,
    positions: Positions,
    distinct: DistinctTokens,
    answer: AnswerTokens,
    /// Place of a token that is drawn just now and not known yet. No penalty is to look at it.
    awaited: Option<usize>,
}

impl Sequence {
    /// Takes a sequence in, if it keeps the limits. `field` names the admission in errors.
    pub fn admit(admission: Admission, limits: &SequenceLimits, field: &str) -> Result<Self, StepError> {
        let Admission { token_ids, num_prompt_tokens, media, sampling, num_computed_tokens, blocks, .. } =
            admission;
        count(token_ids.len(), 1, limits.max_context_tokens).in_field(|| format!("{field}.token_ids"))?;
        count(num_prompt_tokens, 1, token_ids.len()).in_field(|| format!("{field}.num_prompt_tokens"))?;
        count(num_computed_tokens, 0, token_ids.len() - 1)
            .in_field(|| format!("{field}.num_computed_tokens"))?;
        let num_blocks = num_computed_tokens.div_ceil(KV_BLOCK_TOKENS);
        count(blocks.len(), num_blocks, num_blocks).in_field(|| format!("{field}.blocks"))?;
        if let Some(at) = token_ids.iter().position(|id| *id >= limits.vocab_size) {
            below(u64::from(token_ids[at]), u64::from(limits.vocab_size))
                .in_field(|| format!("{field}.token_ids[{at}]"))?;
        }
        if let Some(logprobs) = sampling.logprobs {
            below(logprobs as u64, u64::from(limits.vocab_size) + 1)
                .in_field(|| format!("{field}.sampling.logprobs"))?;
        }
        for (i, (id, _)) in sampling.logit_bias.iter().enumerate() {
            below(u64::from(*id), u64::from(limits.vocab_size))
                .in_field(|| format!("{field}.sampling.logit_bias[{i}].token_id"))?;
        }
        let runs: Vec<MediumRun> = media
            .iter()
            .map(|span| MediumRun {
                first_token: span.first_token,
                grid: span.grid.to_array(),
                seconds_per_grid_t: span.seconds_per_grid_t,
            })
            .collect();
        let positions = Positions::new(num_prompt_tokens, &runs, limits.geometry)
            .map_err(Fault::from)
            .in_field(|| field.to_owned())?;
        let spans = media.iter().zip(&runs).map(|(span, run)| Span {
            hash: span.hash,
            grid: span.grid,
            tokens: run.first_token..run.first_token + run.num_tokens(limits.geometry.merge_size),
        });
        Ok(Self {
            spans: spans.collect(),
            distinct: DistinctTokens::new(&token_ids, sampling.repetition_penalty != 1.0),
            // After a preemption and on a replay the answer so far comes with the prompt.
            answer: AnswerTokens::new(
                &token_ids[num_prompt_tokens..],
                sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0,
            ),
            token_ids,
            sampling,
            block_table: blocks,
            num_computed_tokens,
            positions,
            awaited: None,
        })
    }

    /// Time, height and width of token `index`.
    pub fn position(&self, index: usize) -> [u32; 3] {
        self.positions.of(index)
    }

    /// Slots of the cache of keys and values for `tokens`, which the block table covers.
    pub fn slots(&self, tokens: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        tokens.map(|token| slot_in_blocks(&self.block_table, token, KV_BLOCK_TOKENS))
    }

    /// Takes a drawn token.
    pub fn push(&mut self, token_id: u32) {
        self.token_ids.push(token_id);
        self.distinct.insert(token_id);
        self.answer.count(token_id);
    }

    /// Appends a token that is not known yet.
    pub fn await_token(&mut self) {
        debug_assert!(self.awaited.is_none(), "one token is awaited at a time");
        self.awaited = Some(self.token_ids.len());
        self.token_ids.push(0);
    }

    /// Says which token it is that was awaited.
    pub fn settle(&mut self, token_id: u32) {
        if let Some(place) = self.awaited.take() {
            self.token_ids[place] = token_id;
        }
    }

    /// Distinct tokens of prompt and answer, or none where no penalty applies.
    pub fn penalized_ids(&self) -> &[u32] {
        &self.distinct.in_order
    }

    /// Distinct tokens of the answer and how often each occurs, or none where no penalty applies.
    pub fn answer_counts(&self) -> &[(u32, u32)] {
        &self.answer.counts
    }
}

/// Slot of item `index` in a cache of blocks of `block_size`, of which `blocks` are the owner's.
pub fn slot_in_blocks(blocks: &[u32], index: usize, block_size: usize) -> u32 {
    blocks[index / block_size] * block_size as u32 + (index % block_size) as u32
}

/// The distinct tokens of a sequence, kept only where a penalty needs them.
#[derive(Debug)]
struct DistinctTokens {
    in_order: Vec<u32>,
    seen: Option<HashSet<u32>>,
}

impl DistinctTokens {
    fn new(token_ids: &[u32], needed: bool) -> Self {
        let mut distinct = Self { in_order: Vec::new(), seen: needed.then(HashSet::new) };
        token_ids.iter().for_each(|id| distinct.insert(*id));
        distinct
    }

    fn insert(&mut self, token_id: u32) {
        if self.seen.as_mut().is_some_and(|seen| seen.insert(token_id)) {
            self.in_order.push(token_id);
        }
    }
}

/// How often each token occurs in an answer, kept only where a penalty needs it.
#[derive(Debug)]
struct AnswerTokens {
    /// In the order of first occurrence.
    counts: Vec<(u32, u32)>,
    /// Where a token stands in `counts`.
    places: Option<HashMap<u32, usize>>,
}

impl AnswerTokens {
    fn new(token_ids: &[u32], needed: bool) -> Self {
        let mut answer = Self { counts: Vec::new(), places: needed.then(HashMap::new) };
        token_ids.iter().for_each(|id| answer.count(*id));
        answer
    }

    fn count(&mut self, token_id: u32) {
        let Some(places) = &mut self.places else { return };
        let place = *places.entry(token_id).or_insert(self.counts.len());
        if place == self.counts.len() {
            self.counts.push((token_id, 0));
        }
        self.counts[place].1 += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::step::{MediaSpan, SeqId};

    const LIMITS: SequenceLimits = SequenceLimits {
        vocab_size: 100,
        max_context_tokens: 64,
        geometry: PositionGeometry { merge_size: 2, tokens_per_second: 2.0 },
    };

    fn admission(token_ids: Vec<u32>, repetition_penalty: f32) -> Admission {
        Admission {
            id: SeqId(1),
            num_prompt_tokens: token_ids.len(),
            token_ids,
            media: Vec::new(),
            sampling: Sampling { repetition_penalty, ..Sampling::default() },
            num_computed_tokens: 0,
            blocks: Vec::new(),
        }
    }

    fn refusal(admission: Admission) -> String {
        Sequence::admit(admission, &LIMITS, "admissions[0]").unwrap_err().to_string()
    }

    #[test]
    fn penalized_tokens_are_the_distinct_ones_of_prompt_and_answer() {
        let mut sequence = Sequence::admit(admission(vec![5, 3, 5], 1.3), &LIMITS, "").unwrap();
        [9, 3, 9].into_iter().for_each(|id| sequence.push(id));
        assert_eq!(sequence.penalized_ids(), [5, 3, 9]);
        let mut free = Sequence::admit(admission(vec![5, 3, 5], 1.0), &LIMITS, "").unwrap();
        free.push(9);
        assert!(free.penalized_ids().is_empty());
    }

    #[test]
    fn only_the_answers_tokens_are_counted_and_a_replay_counts_the_same() {
        for (presence_penalty, frequency_penalty) in [(0.5, 0.0), (0.0, -0.5)] {
            let sampling = Sampling { presence_penalty, frequency_penalty, ..Sampling::default() };
            let admit = |token_ids: Vec<u32>| {
                let admission = Admission {
                    num_prompt_tokens: 3,
                    sampling: sampling.clone(),
                    ..admission(token_ids, 1.0)
                };
                Sequence::admit(admission, &LIMITS, "").unwrap()
            };
            let mut sequence = admit(vec![5, 3, 5]);
            assert!(sequence.answer_counts().is_empty());
            [9, 5, 9].into_iter().for_each(|id| sequence.push(id));
            assert_eq!(sequence.answer_counts(), [(9, 2), (5, 1)]);
            let replay = admit(vec![5, 3, 5, 9, 5, 9]);
            assert_eq!(replay.answer_counts(), sequence.answer_counts());
        }
        let mut free = Sequence::admit(admission(vec![5], 1.3), &LIMITS, "").unwrap();
        free.push(9);
        assert!(free.answer_counts().is_empty());
    }

    #[test]
    fn slots_follow_the_block_table() {
        let mut sequence = Sequence::admit(admission(vec![1; 40], 1.0), &LIMITS, "").unwrap();
        sequence.block_table = vec![7, 2];
        assert_eq!(sequence.slots(30..34).collect::<Vec<_>>(), [7 * 32 + 30, 7 * 32 + 31, 64, 65]);
    }

    #[test]
    fn a_wrong_admission_is_refused_by_field() {
        assert_eq!(refusal(admission(vec![], 1.0)), "admissions[0].token_ids: has 0, needs 1 to 64");
        assert_eq!(refusal(admission(vec![1; 65], 1.0)), "admissions[0].token_ids: has 65, needs 1 to 64");
        assert_eq!(refusal(admission(vec![1, 100], 1.0)), "admissions[0].token_ids[1]: 100 is not below 100");
        let mut prompt = admission(vec![1, 2], 1.0);
        prompt.num_prompt_tokens = 3;
        assert_eq!(refusal(prompt), "admissions[0].num_prompt_tokens: has 3, needs 1 to 2");
        let mut computed = admission(vec![1; 40], 1.0);
        computed.num_computed_tokens = 40;
        assert_eq!(refusal(computed.clone()), "admissions[0].num_computed_tokens: has 40, needs 0 to 39");
        computed.num_computed_tokens = 33;
        computed.blocks = vec![0; 3];
        assert_eq!(refusal(computed), "admissions[0].blocks: has 3, needs 2 to 2");
        let mut biased = admission(vec![1], 1.0);
        biased.sampling.logit_bias = vec![(99, 1.0), (100, 1.0)];
        assert_eq!(refusal(biased), "admissions[0].sampling.logit_bias[1].token_id: 100 is not below 100");
        let mut media = admission(vec![1; 4], 1.0);
        let grid = Grid { t: 1, h: 4, w: 4 };
        media.media =
            vec![MediaSpan { hash: MediaHash([0; 32]), first_token: 2, grid, seconds_per_grid_t: None }];
        assert!(refusal(media).starts_with("admissions[0]: media[0]: ends at token 6 of 4"));
    }
}
