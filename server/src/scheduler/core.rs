//! The scheduler itself: submit, cancel, schedule, apply.

mod begin;
#[cfg(test)]
mod checks;
mod forks;
mod stats;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Range,
};

pub use self::stats::{Stats, Totals};
use self::{begin::Beginning, forks::Forks};
use super::{
    features::{FeatureCache, Piece},
    kv::KvCache,
    plan::{Admission, Chunk, Encode, Event, FinishReason, StepPlan, StepResult},
    sequence::{Order, Sequence},
    types::{MediaHash, Medium, Millis, NewSequence, SchedulerConfig, SeqId, SubmitError},
};

/// Media that one step encodes pieces of. The pixels of each are placed by themselves before the step, so that this bounds how
/// long that takes, and how many wait at the shards: those of two steps and one more.
const MAX_STEP_MEDIA: usize = 8;
/// Plans whose results have not come: the one that the shards run, and the next, which they have then already.
const MAX_IN_FLIGHT: usize = 2;

/// Decides which tokens of which sequences the shards compute next, in which blocks.
///
/// Every plan that [`schedule`](Self::schedule) gives is answered by one [`apply`](Self::apply), in order; there may be two plans
/// without an answer. No plan needs to know what the one before it draws: a sequence goes on from its last token, whichever that
/// is. One that turns out to have ended has then a token too many in flight, which nobody hears of. Sequences may be submitted
/// and cancelled at any time.
///
/// - Running sequences that only wait for their last token to be computed come first, with one token each; then prompts
///   in the order of arrival and priority, in chunks; then, with what is left, sequences that wait.
/// - A waiting sequence runs once there are blocks for all tokens that it has, beside those that the running ones will
///   still need for theirs. Only growth can therefore exhaust the blocks. The running sequence that comes last in the
///   order then loses its blocks to the one that needs some: it leaves the shards, and enters them later with all its tokens,
///   to be computed again. Where it is itself the one that needs some, it pauses.
/// - Full blocks are named when they are computed, and kept when they are free, for sequences with the same beginning. A sequence
///   begins with the longest one that there is, but for its last token, which it computes to draw after it.
/// - The features of the media that a sequence computes are reserved when it begins, and held until it ends, even while it
///   has no blocks, unless one that comes before it needs the room. A sequence whose features do not fit is passed over, but then no later one with media starts before it.
/// - A medium is encoded when the tokens before it are computed, or are in the same step, as far as the step's budget goes: so
///   over many steps, if it is large, and no step is longer for it. One medium is in work at a time. Whoever needs another
///   one first goes on with that, for whomever it is.
/// - Of several sequences with one prompt the first computes it. The others begin with its blocks, one after the other as
///   there is room for them. A prompt that is kept for them is given up where a running sequence needs its blocks.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    sequences: HashMap<SeqId, Sequence>,
    running: BTreeSet<Order>,
    waiting: BTreeSet<Order>,
    /// Sequences that ended or were cancelled after they began. Plans in flight may still use their blocks.
    leaving: Vec<Sequence>,
    kv: KvCache,
    features: FeatureCache,
    forks: Forks,
    next_arrival: u64,
    next_step: u64,
    in_flight: VecDeque<InFlight>,
    totals: Totals,
}

/// What a plan needs remembered until its result comes.
#[derive(Debug)]
struct InFlight {
    step: u64,
    at: Millis,
    first_scheduled: Vec<SeqId>,
    /// Pieces of encoding, with what each takes of the budget.
    encodes: Vec<(SeqId, MediaHash, u32)>,
    evictions: Vec<MediaHash>,
    /// Tokens that are computed.
    chunks: Vec<(SeqId, Range<u32>)>,
}

/// A plan in the making.
struct Draft {
    plan: StepPlan,
    /// Media that plans in flight evict.
    evicted: Vec<MediaHash>,
    tokens_left: u32,
    first_scheduled: Vec<SeqId>,
    encodes: Vec<(SeqId, MediaHash, u32)>,
}

impl Draft {
    /// A medium that this plan evicts, or one in flight, waits until that has run: to a shard the eviction also means that
    /// pixels which wait under this hash are not needed, and they are placed before the plan that needs them.
    fn may_encode(&self, hash: &MediaHash) -> bool {
        let evicted = self.plan.evictions.contains(hash) || self.evicted.contains(hash);
        self.plan.encodes.len() < MAX_STEP_MEDIA && !evicted
    }

    /// Takes tokens from `start` up to `end` into the plan, as far as the budget goes, and says how far that is.
    fn take_until(&mut self, start: u32, end: u32) -> u32 {
        let length = end.saturating_sub(start).min(self.tokens_left);
        self.tokens_left -= length;
        start + length
    }
}

impl Scheduler {
    /// An empty scheduler.
    ///
    /// # Panics
    /// If a size that must not be 0 is 0.
    pub fn new(config: SchedulerConfig) -> Self {
        for (name, value) in [
            ("kv_blocks", config.kv_blocks),
            ("kv_block_tokens", config.kv_block_tokens),
            ("feature_block_tokens", config.feature_block_tokens),
            ("max_step_tokens", config.max_step_tokens),
            ("max_step_sequences", config.max_step_sequences),
            ("vision.num_stages", config.vision.num_stages),
            ("vision.attention_tokens", config.vision.attention_tokens),
        ] {
            assert!(value > 0, "{name} must not be 0");
        }
        Self {
            kv: KvCache::new(config.kv_blocks),
            features: FeatureCache::new(
                config.feature_blocks,
                config.feature_block_tokens,
                config.vision.clone(),
            ),
            config,
            forks: Forks::default(),
            sequences: HashMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            leaving: vec![],
            next_arrival: 0,
            next_step: 0,
            in_flight: VecDeque::new(),
            totals: Totals::default(),
        }
    }

    /// The configuration that this scheduler was made with.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Takes a sequence and its forks into the queue. `max_new_tokens` is reduced to what the capacity leaves.
    ///
    /// # Errors
    /// If the sequence can never run, or the queue is full. Nothing has changed then.
    pub fn submit(&mut self, now: Millis, new: NewSequence) -> Result<(), SubmitError> {
        self.check(&new)?;
        let waiting = self.waiting.len() as u32;
        if waiting + 1 + new.forks.len() as u32 > self.config.max_waiting {
            return Err(SubmitError::QueueFull { waiting, max_waiting: self.config.max_waiting });
        }
        self.enqueue(now, new);
        Ok(())
    }

    /// Ends a sequence without an event. Its blocks are free in the next plan. Does nothing if it is not there (any more).
    pub fn cancel(&mut self, id: SeqId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.running.remove(&sequence.order);
            self.waiting.remove(&sequence.order);
            self.leave_forks(&sequence);
            if sequence.admitted || !sequence.reserved.is_empty() {
                self.leaving.push(sequence);
            }
        }
    }

    /// Whether the shards know a sequence, by the plans given out so far.
    pub fn is_running(&self, id: SeqId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.admitted)
    }

    /// Whether as many plans are in flight as may be.
    pub fn is_ahead(&self) -> bool {
        self.in_flight.len() >= MAX_IN_FLIGHT
    }

    /// Plans that no result has answered.
    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The next step, or none if there is nothing to do before the results of those in flight.
    ///
    /// # Panics
    /// If it [`is_ahead`](Self::is_ahead).
    pub fn schedule(&mut self, now: Millis) -> Option<StepPlan> {
        assert!(!self.is_ahead(), "{MAX_IN_FLIGHT} plans are in flight");
        let mut draft = Draft {
            plan: StepPlan { step: self.next_step, ..StepPlan::default() },
            evicted: self.in_flight.iter().flat_map(|plan| &plan.evictions).copied().collect(),
            tokens_left: self.config.max_step_tokens,
            first_scheduled: vec![],
            encodes: vec![],
        };
        self.release_leaving(&mut draft.plan);
        let lengths = self.share_budget(&mut draft);
        let preempted = self.plan_chunks(lengths, &mut draft.plan);
        if !preempted {
            self.admit_waiting(&mut draft);
            // Where nothing runs, nothing but what is kept for forks can be in the way.
            while self.running.is_empty() && self.give_up_any_prompt() {
                self.admit_waiting(&mut draft);
            }
        }
        if draft.plan.is_empty() {
            return None;
        }
        self.next_step += 1;
        self.in_flight.push_back(InFlight {
            step: draft.plan.step,
            at: now,
            first_scheduled: draft.first_scheduled,
            encodes: draft.encodes,
            evictions: draft.plan.evictions.clone(),
            chunks: draft
                .plan
                .chunks
                .iter()
                .map(|chunk| (chunk.id, chunk.start..chunk.start + chunk.length))
                .collect(),
        });
        Some(draft.plan)
    }

    /// Takes the result of the first plan in flight. Sequences that ended or were cancelled since have no events.
    ///
    /// # Panics
    /// If no plan is in flight or the result is of another step.
    pub fn apply(&mut self, now: Millis, result: StepResult) -> Vec<Event> {
        let in_flight = self.in_flight.pop_front().expect("a result needs a plan");
        assert_eq!(result.step, in_flight.step, "results come in the order of the plans");
        self.totals.steps += 1;
        let mut events = vec![];
        let alive = |id: &SeqId| self.sequences.contains_key(id);
        for id in in_flight.first_scheduled.into_iter().filter(alive) {
            events.push(Event::Scheduled { id, at: in_flight.at });
        }
        let all_tokens: u64 = in_flight.encodes.iter().map(|(.., tokens)| u64::from(*tokens)).sum();
        for (id, hash, tokens) in in_flight.encodes {
            if alive(&id) {
                let vision_us = result.vision_us * u64::from(tokens) / all_tokens;
                events.push(Event::Encoded { id, hash, vision_us });
            }
        }
        for (id, tokens) in in_flight.chunks {
            self.name_blocks(id, tokens);
        }
        for sampled in result.sampled {
            for token in sampled.tokens {
                // A sequence that ended with an earlier token of this step is gone here too.
                let Some(sequence) = self.sequences.get_mut(&sampled.id) else { break };
                let id = sampled.id;
                if sequence.token_ids.len() as u32 == sequence.num_prompt_tokens {
                    events.push(Event::PrefillDone { id, at: now });
                }
                let token_id = token.token_id;
                sequence.token_ids.push(token_id);
                sequence.num_drawing -= 1;
                self.totals.tokens += 1;
                events.push(Event::Token { id, token });
                let reason = if sequence.end_token_ids.contains(&token_id) {
                    Some(FinishReason::StopToken(token_id))
                } else {
                    let is_last = sequence.token_ids.len() as u32 >= sequence.max_tokens;
                    is_last.then_some(FinishReason::Length)
                };
                self.keep_prompt(id);
                let Some(reason) = reason else { continue };
                events.push(Event::Finished { id, reason, at: now });
                self.cancel(id);
            }
            if let Some(failure) = sampled.failure
                && self.sequences.contains_key(&sampled.id)
            {
                events.push(Event::Failed { id: sampled.id, failure, at: now });
                self.forget_blocks(sampled.id);
                self.cancel(sampled.id);
            }
        }
        events
    }

    /// Takes back all that the shards were told, because they forgot it: every sequence waits again, with all the tokens that came
    /// until now, plans in flight have no results, and steps are counted from 0. Nothing is lost, and no event tells of it.
    pub fn replay(&mut self) {
        for id in self.in_flight.drain(..).flat_map(|plan| plan.first_scheduled) {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.scheduled = false;
            }
        }
        self.leaving.clear();
        self.kv = KvCache::new(self.config.kv_blocks);
        self.features.clear();
        self.waiting.append(&mut self.running);
        for sequence in self.sequences.values_mut() {
            sequence.restart();
            sequence.num_drawing = 0;
            sequence.reserved.clear();
        }
        self.forget_prompts();
        self.next_step = 0;
        self.totals.replays += 1;
    }

    fn check(&self, new: &NewSequence) -> Result<(), SubmitError> {
        let mut ids = BTreeSet::new();
        for id in std::iter::once(new.id).chain(new.forks.iter().copied()) {
            let leaving = self.leaving.iter().any(|sequence| sequence.order.id == id);
            if leaving || self.sequences.contains_key(&id) || !ids.insert(id) {
                return Err(SubmitError::DuplicateId(id));
            }
        }
        let (sequences, max_waiting) = (ids.len() as u32, self.config.max_waiting);
        if sequences > max_waiting.max(1) {
            return Err(SubmitError::TooManyForks { sequences, max_waiting });
        }
        if new.token_ids.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if new.max_new_tokens == 0 {
            return Err(SubmitError::NoNewTokens);
        }
        let capacity_tokens = self.config.capacity_tokens();
        let prompt_tokens = u32::try_from(new.token_ids.len()).unwrap_or(u32::MAX);
        if prompt_tokens >= capacity_tokens {
            return Err(SubmitError::TooLong { prompt_tokens, capacity_tokens });
        }
        let mut free_from = 0;
        for (index, medium) in new.media.iter().enumerate() {
            let end = medium.first_token.checked_add(medium.num_tokens).filter(|&end| end <= prompt_tokens);
            let [t, ..] = medium.grid;
            let is_whole = medium.num_tokens > 0 && t > 0 && medium.num_tokens.is_multiple_of(t);
            match end {
                Some(end) if is_whole && medium.first_token >= free_from => free_from = end,
                _ => return Err(SubmitError::MisplacedMedium { index }),
            }
            if !medium.is_timely() {
                return Err(SubmitError::UntimelyMedium { index });
            }
        }
        let needed_blocks = self.features.blocks_needed(&new.media);
        if needed_blocks > self.config.feature_blocks {
            let feature_blocks = self.config.feature_blocks;
            return Err(SubmitError::TooManyFeatures { needed_blocks, feature_blocks });
        }
        Ok(())
    }

    fn release_leaving(&mut self, plan: &mut StepPlan) {
        for sequence in self.leaving.drain(..) {
            self.kv.release(sequence.block_table);
            self.features.release(&sequence.reserved, &mut plan.evictions);
            if sequence.admitted {
                plan.releases.push(sequence.order.id);
            }
        }
        self.release_retired();
    }

    /// How many tokens each running sequence computes, as far as the budget goes. Plans the encoding that these need.
    fn share_budget(&mut self, draft: &mut Draft) -> BTreeMap<Order, u32> {
        let mut lengths = BTreeMap::new();
        let unfinished = self.running.iter().filter(|order| !self.sequences[&order.id].is_complete());
        let (decodes, prefills): (Vec<Order>, Vec<Order>) =
            unfinished.partition(|order| self.sequences[&order.id].is_decoding());
        for order in decodes.into_iter().take(draft.tokens_left as usize) {
            draft.tokens_left -= 1;
            lengths.insert(order, 1);
        }
        for order in prefills {
            let length = self.prefill_length(order.id, draft);
            if length > 0 {
                lengths.insert(order, length);
            }
        }
        lengths
    }

    /// How many tokens of a prompt are computed in this step: up to the budget, and up to the first medium whose
    /// features are neither there nor complete in this step. What is left of the budget then goes into that medium.
    fn prefill_length(&mut self, id: SeqId, draft: &mut Draft) -> u32 {
        let sequence = &self.sequences[&id];
        let (start, num_tokens) = (sequence.num_computed_tokens, sequence.num_tokens());
        let missing = sequence.media.iter().filter(|medium| medium.end_token() > start);
        let missing: Vec<Medium> =
            missing.filter(|medium| !self.features.is_encoded(&medium.hash)).cloned().collect();
        let mut end = start;
        for medium in missing {
            end = draft.take_until(end, medium.first_token);
            if end < medium.first_token || !self.encode(id, medium.hash, draft) {
                return end - start;
            }
        }
        draft.take_until(end, num_tokens) - start
    }

    /// Goes on with encoding a medium for sequence `id`, as far as the budget goes. Whether it is complete.
    fn encode(&mut self, id: SeqId, wanted: MediaHash, draft: &mut Draft) -> bool {
        while !self.features.is_encoded(&wanted) {
            let hash = self.features.in_work().unwrap_or(wanted);
            let id = if hash == wanted { id } else { self.holder(&hash) };
            if !draft.may_encode(&hash) {
                return false;
            }
            let Some(piece) = self.features.advance(&hash, draft.tokens_left) else { return false };
            draft.tokens_left -= piece.tokens;
            draft.encodes.push((id, hash, piece.tokens));
            let Piece { from, to, feature_blocks, .. } = piece;
            draft.plan.encodes.push(Encode { id, hash, feature_blocks, from, to });
        }
        true
    }

    /// The first of the sequences that need a medium which is in work.
    fn holder(&self, hash: &MediaHash) -> SeqId {
        let holds = |order: &&Order| {
            let sequence = &self.sequences[&order.id];
            sequence.reserved.iter().any(|medium| medium.hash == *hash)
        };
        self.running.iter().chain(&self.waiting).find(holds).expect("a medium in work is held").id
    }

    /// Gives the running sequences the blocks that their tokens need, best first, so that only sequences without a
    /// chunk in this plan lose theirs. Whether any did.
    fn plan_chunks(&mut self, lengths: BTreeMap<Order, u32>, plan: &mut StepPlan) -> bool {
        let before = self.totals.preemptions;
        for (order, length) in lengths {
            if !self.running.contains(&order) {
                continue;
            }
            let sequence = &self.sequences[&order.id];
            let end = sequence.num_computed_tokens + length;
            let missing = sequence.blocks_missing(end, self.config.kv_block_tokens);
            while self.kv.num_free() < missing {
                if self.give_up_prompt() {
                    continue;
                }
                let last = *self.running.last().expect("the sequence itself runs");
                if last == order {
                    if self.give_up_any_prompt() {
                        continue;
                    }
                    break;
                }
                self.preempt(last, plan);
            }
            if self.kv.num_free() >= missing {
                plan.chunks.push(self.chunk(order.id, length));
            }
        }
        self.totals.preemptions > before
    }

    fn preempt(&mut self, order: Order, plan: &mut StepPlan) {
        let sequence = self.sequences.get_mut(&order.id).expect("a running sequence exists");
        self.kv.release(sequence.restart());
        self.running.remove(&order);
        self.waiting.insert(order);
        self.totals.preemptions += 1;
        plan.releases.push(order.id);
    }

    /// The next `length` tokens of a running sequence, for which there are blocks.
    fn chunk(&mut self, id: SeqId, length: u32) -> Chunk {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence exists");
        let start = sequence.num_computed_tokens;
        let end = start + length;
        let missing = sequence.blocks_missing(end, self.config.kv_block_tokens);
        let new_blocks = self.kv.allocate(missing).expect("the caller counted the free blocks");
        sequence.block_table.extend(&new_blocks);
        sequence.num_computed_tokens = end;
        let max_new_tokens = (end == sequence.num_tokens()).into();
        sequence.num_drawing += max_new_tokens;
        Chunk { id, start, length, new_blocks, max_new_tokens }
    }

    fn admit_waiting(&mut self, draft: &mut Draft) {
        let mut blocks_left = self.blocks_not_promised();
        let mut features_exhausted = false;
        let candidates: Vec<Order> = self.waiting.iter().copied().collect();
        for order in candidates {
            if self.running.len() as u32 >= self.config.max_step_sequences || draft.tokens_left == 0 {
                break;
            }
            if self.forks.must_wait(&self.sequences[&order.id]) {
                continue;
            }
            let beginning = self.beginning(order.id);
            if beginning.missing > blocks_left {
                break;
            }
            if !self.reserve_media(&beginning, order.id, features_exhausted, draft) {
                // Who comes first goes before what others hold without computing anything.
                let makes_room = !features_exhausted && self.give_up_features(order.id, draft);
                if !makes_room || !self.reserve_media(&beginning, order.id, false, draft) {
                    features_exhausted = true;
                    continue;
                }
            }
            blocks_left -= beginning.missing;
            self.start(order, beginning, draft);
            let length = self.prefill_length(order.id, draft);
            if length > 0 {
                draft.plan.chunks.push(self.chunk(order.id, length));
            }
        }
    }

    /// Free blocks beyond those that the running sequences still need for the tokens that they have.
    fn blocks_not_promised(&self) -> u32 {
        let promised: u32 = self
            .running
            .iter()
            .map(|order| &self.sequences[&order.id])
            .filter(|sequence| !sequence.is_complete())
            .map(|sequence| sequence.blocks_missing(sequence.num_tokens(), self.config.kv_block_tokens))
            .sum();
        self.kv.num_free().saturating_sub(promised)
    }

    /// Puts a waiting sequence among the running ones, with the blocks that it begins with.
    fn start(&mut self, order: Order, beginning: Beginning, draft: &mut Draft) {
        self.waiting.remove(&order);
        self.running.insert(order);
        if beginning.is_fork {
            self.begin_fork(order, &mut draft.plan);
        } else {
            self.kv.share(&beginning.found);
        }
        let sequence = self.sequences.get_mut(&order.id).expect("a waiting sequence exists");
        if !beginning.is_fork {
            sequence.num_computed_tokens = beginning.num_tokens;
            sequence.block_table = beginning.found;
        }
        sequence.admitted = true;
        let is_first = !std::mem::replace(&mut sequence.scheduled, true);
        draft.plan.admissions.push(Admission {
            id: order.id,
            token_ids: sequence.token_ids.clone(),
            num_prompt_tokens: sequence.num_prompt_tokens,
            media: sequence.media.clone(),
            sampling: sequence.sampling.clone(),
            num_computed_tokens: sequence.num_computed_tokens,
            blocks: sequence.block_table.clone(),
        });
        if is_first {
            draft.first_scheduled.push(order.id);
        }
        // A fork begins with what is its own already.
        if is_first && !beginning.is_fork {
            self.count_lookups(order.id);
        }
    }
}
