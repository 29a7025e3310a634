//! A shard that checks every plan of a simulated world, and a model that is a function of tokens.

use std::collections::{BTreeMap, BTreeSet};

use crate::scheduler::*;

/// Tokens that the model draws.
pub(super) const TEXT_TOKENS: u32 = 40;

/// The token that the model draws after `token_ids`, if it can draw any: a function of these alone, so that a sequence
/// that was computed again must go on as before.
pub(super) fn next_token(token_ids: &[u32], seed: u64) -> Result<u32, DrawFailure> {
    let hash = token_ids.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    });
    if (hash >> 40).is_multiple_of(200) {
        return Err(DrawFailure::LogitsNotFinite);
    }
    Ok((hash >> 20) as u32 % TEXT_TOKENS)
}

/// What the model's noise is keyed by.
pub(super) fn noise_key(sampling: &SamplingParams) -> u64 {
    sampling.seed ^ u64::from(sampling.branch).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What stands for the keys and values of the last of `token_ids`: they depend on all of these.
fn key_and_value(token_ids: &[u32]) -> u64 {
    token_ids
        .iter()
        .fold(1, |hash, &token| (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}

/// What a shard knows of a sequence.
struct Held {
    token_ids: Vec<u32>,
    media: Vec<Medium>,
    noise_key: u64,
    computed: u32,
    block_table: Vec<BlockId>,
}

/// A shard that computes nothing and believes nothing.
pub(super) struct FakeShard {
    config: SchedulerConfig,
    step: u64,
    sequences: BTreeMap<SeqId, Held>,
    /// For each block of keys and values, whose tables it is in.
    holders: BTreeMap<BlockId, BTreeSet<SeqId>>,
    /// Keys and values, by block and slot. They stay when nobody holds the block any more, until it is taken.
    slots: BTreeMap<BlockId, Vec<Option<u64>>>,
    /// How far each medium is that has blocks for its features.
    features: BTreeMap<MediaHash, Progress>,
    feature_owners: BTreeMap<BlockId, MediaHash>,
}

struct Progress {
    done: u64,
    total: u64,
}

impl FakeShard {
    pub(super) fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            step: 0,
            sequences: BTreeMap::new(),
            holders: BTreeMap::new(),
            slots: BTreeMap::new(),
            features: BTreeMap::new(),
            feature_owners: BTreeMap::new(),
        }
    }

    /// Checks a plan, and answers it.
    pub(super) fn run(&mut self, plan: &StepPlan) -> StepResult {
        assert_eq!(plan.step, self.step, "steps are numbered without gaps");
        self.step += 1;
        assert!(!plan.is_empty(), "a plan tells something");
        for id in &plan.releases {
            self.sequences.remove(id).expect("only known sequences are released");
            self.let_go(*id);
        }
        for hash in &plan.evictions {
            self.features.remove(hash).expect("only what is there is evicted");
            self.feature_owners.retain(|_, owner| owner != hash);
        }
        plan.admissions.iter().for_each(|admission| self.admit(admission));
        self.check_budget(plan);
        plan.encodes.iter().for_each(|encode| self.encode(encode));
        for copy in &plan.copies {
            assert_eq!(self.holders[&copy.target].len(), 1, "a copy has a block of its own");
            let slots = self.slots[&copy.source].clone();
            self.slots.insert(copy.target, slots);
        }
        let mut seen = BTreeSet::new();
        let mut sampled = vec![];
        for chunk in &plan.chunks {
            assert!(seen.insert(chunk.id), "a sequence has one chunk in a step");
            sampled.extend(self.compute(chunk));
        }
        StepResult { step: plan.step, sampled, vision_us: 7, step_us: 9 }
    }

    /// Whether nobody holds anything.
    pub(super) fn is_empty(&self) -> bool {
        self.sequences.is_empty() && self.holders.is_empty()
    }

    fn let_go(&mut self, id: SeqId) {
        self.holders.values_mut().for_each(|holders| {
            holders.remove(&id);
        });
        self.holders.retain(|_, holders| !holders.is_empty());
    }

    fn admit(&mut self, admission: &Admission) {
        assert!(admission.num_prompt_tokens as usize <= admission.token_ids.len());
        let (id, computed, block_tokens) =
            (admission.id, admission.num_computed_tokens, self.config.kv_block_tokens);
        assert!((computed as usize) < admission.token_ids.len(), "there is something to compute");
        assert_eq!(admission.blocks.len() as u32, computed.div_ceil(block_tokens));
        let (shared, own) = admission.blocks.split_at((computed / block_tokens) as usize);
        for &block in shared {
            assert!(self.holders.entry(block).or_default().insert(id), "a table has a block twice");
        }
        self.take(own, id);
        let held = Held {
            token_ids: admission.token_ids.clone(),
            media: admission.media.clone(),
            noise_key: noise_key(&admission.sampling),
            computed,
            block_table: admission.blocks.clone(),
        };
        assert!(self.sequences.insert(id, held).is_none(), "a sequence is admitted while it is there");
    }

    fn take(&mut self, blocks: &[BlockId], id: SeqId) {
        for &block in blocks {
            assert!(block.0 < self.config.kv_blocks);
            let holders = self.holders.insert(block, BTreeSet::from([id]));
            assert_eq!(holders, None, "block {} is taken", block.0);
            self.slots.insert(block, vec![None; self.config.kv_block_tokens as usize]);
        }
    }

    /// Writes the keys and values of a chunk, and reads those of all tokens before.
    fn attend(&mut self, chunk: &Chunk) {
        let (held, block_tokens) = (&self.sequences[&chunk.id], self.config.kv_block_tokens);
        for token in 0..chunk.start + chunk.length {
            let (block, slot) =
                (held.block_table[(token / block_tokens) as usize], (token % block_tokens) as usize);
            let expected = Some(key_and_value(&held.token_ids[..=token as usize]));
            let slots = self.slots.get_mut(&block).expect("a block of a table was taken");
            if token >= chunk.start {
                assert_eq!(self.holders[&block].len(), 1, "block {} is shared, and written", block.0);
                slots[slot] = expected;
            }
            assert_eq!(slots[slot], expected, "a sequence reads what is not its own");
        }
    }

    fn check_budget(&self, plan: &StepPlan) {
        let tokens: u64 = plan.chunks.iter().map(|chunk| u64::from(chunk.length)).sum();
        let vision: u64 = plan.encodes.iter().map(|encode| self.price(encode)).sum();
        assert!(tokens + vision <= u64::from(self.config.max_step_tokens), "no step exceeds the budget");
        assert!(plan.chunks.len() as u32 <= self.config.max_step_sequences);
        let media: BTreeSet<MediaHash> = plan.encodes.iter().map(|encode| encode.hash).collect();
        assert_eq!(media.len(), plan.encodes.len(), "a medium has one piece in a step");
        for encode in &plan.encodes {
            assert!(!plan.evictions.contains(&encode.hash), "a shard drops the pixels of what is evicted");
        }
    }

    /// What a piece costs, unit by unit, in tokens.
    fn price(&self, encode: &Encode) -> u64 {
        let medium = self.medium(encode);
        let VisionCosts { num_stages, attending_stages, attention_tokens } = &self.config.vision;
        let frame_tokens = u64::from(medium.num_tokens / medium.grid[0]);
        let token = u64::from(num_stages * attention_tokens);
        let unit = |unit: u64| {
            let stage = (unit / frame_tokens % u64::from(*num_stages)) as u32;
            let attended = if attending_stages.contains(&stage) { frame_tokens } else { 0 };
            (u64::from(*attention_tokens) + attended).min(token)
        };
        (encode.from..encode.to).map(unit).sum::<u64>().div_ceil(token)
    }

    fn medium(&self, encode: &Encode) -> &Medium {
        let mut media = self.sequences[&encode.id].media.iter();
        media
            .find(|medium| medium.hash == encode.hash)
            .expect("a medium is encoded for a sequence that has it")
    }

    fn encode(&mut self, encode: &Encode) {
        let num_tokens = self.medium(encode).num_tokens;
        let blocks = num_tokens.div_ceil(self.config.feature_block_tokens);
        if encode.is_first() {
            assert_eq!(encode.feature_blocks.len() as u32, blocks);
            let total = u64::from(num_tokens) * u64::from(self.config.vision.num_stages);
            let known = self.features.insert(encode.hash, Progress { done: 0, total });
            assert!(known.is_none(), "a medium is begun once while its features are kept");
        } else {
            assert_eq!(encode.feature_blocks, []);
        }
        for &block in &encode.feature_blocks {
            assert!(block.0 < self.config.feature_blocks);
            let owner = self.feature_owners.insert(block, encode.hash);
            assert_eq!(owner, None, "feature block {} is taken", block.0);
        }
        let progress = self.features.get_mut(&encode.hash).expect("work goes on where it began");
        assert_eq!(encode.from, progress.done, "no work is left out, and none is done twice");
        assert!(encode.to > encode.from && encode.to <= progress.total);
        progress.done = encode.to;
        let in_work = self.features.values().filter(|progress| progress.done < progress.total);
        assert!(in_work.count() <= 1, "one medium is in work at a time");
    }

    /// Whether the features of a medium are all there.
    pub(super) fn is_encoded(&self, hash: &MediaHash) -> bool {
        self.features.get(hash).is_some_and(|progress| progress.done == progress.total)
    }

    fn compute(&mut self, chunk: &Chunk) -> Option<Sampled> {
        self.take(&chunk.new_blocks, chunk.id);
        let held = self.sequences.get_mut(&chunk.id).expect("only admitted sequences compute");
        assert_eq!(chunk.start, held.computed, "a chunk begins where the last one ended");
        assert!(chunk.length > 0);
        let end = chunk.start + chunk.length;
        assert!(end as usize <= held.token_ids.len());
        held.block_table.extend(&chunk.new_blocks);
        assert_eq!(held.block_table.len() as u32, end.div_ceil(self.config.kv_block_tokens));
        for medium in &held.media {
            if medium.first_token < end && medium.end_token() > chunk.start {
                assert!(
                    self.features.get(&medium.hash).is_some_and(|it| it.done == it.total),
                    "pad tokens are computed without their features"
                );
            }
        }
        held.computed = end;
        self.attend(chunk);
        let held = self.sequences.get_mut(&chunk.id).expect("it was there just now");
        assert_eq!(chunk.max_new_tokens, u32::from(end as usize == held.token_ids.len()));
        (chunk.max_new_tokens > 0).then(|| {
            let drawn = next_token(&held.token_ids, held.noise_key);
            // A plan that is on its way may go on from a token that could not be drawn.
            held.token_ids.push(drawn.unwrap_or(0));
            let token = |token_id| SampledToken { token_id, ..SampledToken::default() };
            Sampled { id: chunk.id, tokens: drawn.map(token).into_iter().collect(), failure: drawn.err() }
        })
    }
}
