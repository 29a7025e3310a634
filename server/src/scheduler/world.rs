//! A simulated world around the scheduler: people who come and go, and a shard that checks every plan.
//!
//! Everything follows from one seed. `LOCKSTEP_WORLD_SEED=n` replays one world, `LOCKSTEP_WORLDS=n` runs that many.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

const DEFAULT_WORLDS: u64 = 3000;
const MAX_STEPS: u64 = 50_000;
const TEXT_TOKENS: u32 = 40;

/// The token that the model draws after `token_ids`, if it can draw any: a function of these alone, so that a sequence
/// that was computed again must go on as before.
fn next_token(token_ids: &[u32], seed: u64) -> Result<u32, DrawFailure> {
    let hash = token_ids.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, &token| {
        (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    });
    if (hash >> 40).is_multiple_of(200) {
        return Err(DrawFailure::LogitsNotFinite);
    }
    Ok((hash >> 20) as u32 % TEXT_TOKENS)
}

/// What the model's noise is keyed by.
fn noise_key(sampling: &SamplingParams) -> u64 {
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
struct FakeShard {
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
    fn new(config: SchedulerConfig) -> Self {
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

    fn run(&mut self, plan: &StepPlan) -> StepResult {
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
        for id in &plan.preemptions {
            let held = self.sequences.get_mut(id).expect("only known sequences are preempted");
            held.computed = 0;
            held.block_table.clear();
            self.let_go(*id);
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

    fn let_go(&mut self, id: SeqId) {
        self.holders.values_mut().for_each(|holders| {
            holders.remove(&id);
        });
        self.holders.retain(|_, holders| !holders.is_empty());
    }

    fn admit(&mut self, admission: &Admission) {
        assert_eq!(admission.num_prompt_tokens as usize, admission.token_ids.len());
        let (id, computed, block_tokens) =
            (admission.id, admission.num_computed_tokens, self.config.kv_block_tokens);
        assert!(computed < admission.num_prompt_tokens, "there is something to compute");
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
        assert!(self.sequences.insert(id, held).is_none(), "a sequence is admitted once");
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

    fn is_encoded(&self, hash: &MediaHash) -> bool {
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
            held.token_ids.extend(drawn);
            let token = |token_id| SampledToken { token_id, ..SampledToken::default() };
            Sampled { id: chunk.id, tokens: drawn.map(token).into_iter().collect(), failure: drawn.err() }
        })
    }
}

/// What a person knows of a sequence of theirs.
struct Asked {
    expected: Vec<u32>,
    expected_reason: Result<FinishReason, DrawFailure>,
    received: Vec<u32>,
    scheduled: bool,
    prefill_done: bool,
}

/// The answer that a sequence or its fork must get as this branch, and how it ends, whatever else happens.
fn expected_answer(
    new: &NewSequence,
    branch: u32,
    capacity_tokens: u32,
) -> (Vec<u32>, Result<FinishReason, DrawFailure>) {
    let noise_key = noise_key(&SamplingParams { branch, ..new.sampling.clone() });
    let mut token_ids = new.token_ids.clone();
    let most = capacity_tokens.min(new.max_new_tokens.saturating_add(token_ids.len() as u32)) as usize;
    let reason = loop {
        let token = match next_token(&token_ids, noise_key) {
            Ok(token) => token,
            Err(failure) => break Err(failure),
        };
        token_ids.push(token);
        if new.end_token_ids.contains(&token) {
            break Ok(FinishReason::StopToken(token));
        }
        if token_ids.len() == most {
            break Ok(FinishReason::Length);
        }
    };
    (token_ids.split_off(new.token_ids.len()), reason)
}

/// What became of everybody, so that a test can tell whether the worlds are worth running.
#[derive(Debug, Default)]
struct Tally {
    finished: u64,
    failed: u64,
    cancelled: u64,
    refused: u64,
    preemptions: u64,
    evictions: u64,
    encodes: u64,
    /// Pieces of encoding after the first of a medium.
    resumed: u64,
    /// Media that were evicted half done.
    given_up: u64,
    features_shared: u64,
    forks_sharing: u64,
    forks_alone: u64,
}

fn invent_vision(rng: &mut SmallRng) -> VisionCosts {
    let num_stages = rng.random_range(1..6);
    VisionCosts {
        num_stages,
        attending_stages: (0..num_stages).filter(|_| rng.random_bool(0.4)).collect(),
        attention_tokens: rng.random_range(1..20),
    }
}

struct World {
    rng: SmallRng,
    scheduler: Scheduler,
    shard: FakeShard,
    asked: BTreeMap<SeqId, Asked>,
    /// Sequences that were cancelled or failed, which the next plan must release.
    cancelled: BTreeSet<SeqId>,
    admitted: BTreeSet<SeqId>,
    /// For whom the last plan with a piece of encoding had it.
    encoding: Option<SeqId>,
    forks: BTreeSet<SeqId>,
    next_id: u64,
    now: u64,
    tally: Tally,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let config = SchedulerConfig {
            kv_blocks: rng.random_range(1..48),
            kv_block_tokens: rng.random_range(1..9),
            feature_blocks: rng.random_range(0..20),
            feature_block_tokens: rng.random_range(1..6),
            vision: invent_vision(&mut rng),
            max_step_tokens: rng.random_range(1..40),
            max_step_sequences: rng.random_range(1..9),
            max_waiting: rng.random_range(1..12),
            max_context_tokens: rng.random_range(2..120),
        };
        Self {
            rng,
            shard: FakeShard::new(config.clone()),
            scheduler: Scheduler::new(config),
            asked: BTreeMap::new(),
            cancelled: BTreeSet::new(),
            admitted: BTreeSet::new(),
            encoding: None,
            forks: BTreeSet::new(),
            next_id: 0,
            now: 0,
            tally: Tally::default(),
        }
    }

    fn run(mut self) -> Tally {
        let arrivals = self.rng.random_range(1..40);
        let arrival_rate = self.rng.random_range(0.05..1.0);
        let cancel_rate = if self.rng.random_bool(0.5) { 0.0 } else { 0.1 };
        for steps in 0.. {
            assert!(steps < MAX_STEPS, "the world goes on forever");
            while self.next_id < arrivals && self.rng.random_bool(arrival_rate) {
                self.arrive();
            }
            self.maybe_cancel(cancel_rate);
            let idle = !self.step(cancel_rate);
            if idle && self.next_id >= arrivals {
                break;
            }
        }
        assert!(self.asked.is_empty(), "everybody has left");
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv_held, stats.features_held), (0, 0, 0, 0));
        assert!(self.shard.sequences.is_empty() && self.shard.holders.is_empty());
        self.tally.preemptions = stats.num_preemptions;
        self.tally
    }

    fn arrive(&mut self) {
        let new = self.invent();
        let ids: Vec<SeqId> = std::iter::once(new.id).chain(new.forks.iter().copied()).collect();
        let config = self.scheduler.config().clone();
        let capacity = config.capacity_tokens();
        let waiting = self.scheduler.stats().waiting;
        let tokens = new.token_ids.len() as u32;
        match self.scheduler.submit(Millis(self.now), new.clone()) {
            Ok(()) => {
                assert!(waiting + ids.len() as u32 <= config.max_waiting && tokens < capacity);
                for (branch, id) in ids.into_iter().enumerate() {
                    let (expected, expected_reason) = expected_answer(&new, branch as u32, capacity);
                    let asked = Asked {
                        expected,
                        expected_reason,
                        received: vec![],
                        scheduled: false,
                        prefill_done: false,
                    };
                    self.asked.insert(id, asked);
                }
                self.forks.extend(&new.forks);
            }
            Err(error) => {
                self.tally.refused += 1;
                match error {
                    SubmitError::QueueFull { .. } => {
                        assert!(waiting + ids.len() as u32 > config.max_waiting);
                    }
                    SubmitError::TooManyForks { .. } => assert!(ids.len() as u32 > config.max_waiting),
                    SubmitError::TooLong { .. } => assert!(tokens >= capacity),
                    SubmitError::TooManyFeatures { needed_blocks, .. } => {
                        assert!(needed_blocks > config.feature_blocks);
                    }
                    other => panic!("a sound sequence is refused: {other}"),
                }
            }
        }
    }

    fn invent(&mut self) -> NewSequence {
        let rng = &mut self.rng;
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let mut token_ids = vec![];
        let mut media = vec![];
        for _ in 0..rng.random_range(0..3) {
            token_ids.extend((0..rng.random_range(0..8)).map(|_| rng.random_range(0..TEXT_TOKENS)));
            // Few different names: people often ask about the same picture.
            let name: u8 = rng.random_range(0..6);
            let (t, frame_tokens) = [(1, 1), (1, 4), (2, 3), (1, 10), (3, 4), (1, 16)][usize::from(name)];
            let num_tokens = t * frame_tokens;
            let grid = [t, 2, 2 * frame_tokens];
            let first_token = token_ids.len() as u32;
            token_ids.extend((0..num_tokens).map(|_| 1000 + u32::from(name)));
            let hash = MediaHash([name; 32]);
            media.push(Medium { hash, first_token, num_tokens, grid, seconds_per_grid_t: 0.0 });
        }
        token_ids.extend((0..rng.random_range(1..30)).map(|_| rng.random_range(0..TEXT_TOKENS)));
        let sampling = SamplingParams { temperature: 1.0, seed: rng.random(), ..SamplingParams::default() };
        let max_new_tokens = if rng.random_bool(0.1) { u32::MAX } else { rng.random_range(1..40) };
        let end_token_ids = if rng.random_bool(0.5) { vec![3, 4] } else { vec![] };
        let priority = rng.random_range(-1..2);
        let num_forks = if rng.random_bool(0.3) { rng.random_range(1..5) } else { 0 };
        let forks = (0..num_forks).map(|_| {
            self.next_id += 1;
            SeqId(self.next_id - 1)
        });
        let forks = forks.collect();
        NewSequence { id, token_ids, media, sampling, max_new_tokens, end_token_ids, priority, forks }
    }

    fn maybe_cancel(&mut self, rate: f64) {
        if self.next_id == 0 || !self.rng.random_bool(rate) {
            return;
        }
        // Any id: cancelling one that is gone must do nothing. Often one whose medium is half done, and often some neighbours
        // go, too: of several answers to one prompt all, or a part.
        let any = self.rng.random_range(0..self.next_id);
        let half_done = self.encoding.filter(|_| self.rng.random_bool(0.3));
        let first = half_done.map_or(any, |id| id.0);
        let count = if self.rng.random_bool(0.5) { 1 } else { self.rng.random_range(1..6) };
        (first..self.next_id.min(first + count)).for_each(|id| self.cancel(SeqId(id)));
    }

    fn cancel(&mut self, id: SeqId) {
        self.scheduler.cancel(id);
        if self.asked.remove(&id).is_some() {
            self.tally.cancelled += 1;
            if self.admitted.contains(&id) {
                self.cancelled.insert(id);
            }
        }
    }

    /// Plans and runs one step. Returns whether there was one.
    fn step(&mut self, cancel_rate: f64) -> bool {
        self.now += self.rng.random_range(0..50);
        let Some(plan) = self.scheduler.schedule(Millis(self.now)) else {
            assert!(self.asked.is_empty(), "sequences wait, and nothing is done");
            assert!(self.cancelled.is_empty(), "a cancelled sequence is not released");
            return false;
        };
        self.scheduler.check_conservation();
        let works = !plan.chunks.is_empty() || !plan.encodes.is_empty();
        // What is evicted may be all that is wanted: it begins again in the next step.
        let makes_way = !plan.evictions.is_empty();
        assert!(works || makes_way || self.asked.is_empty(), "sequences wait, and the step computes nothing");
        self.check_plan(&plan);
        // Between plan and result anything may happen to the queue.
        self.maybe_cancel(cancel_rate);
        let result = self.shard.run(&plan);
        let events = self.scheduler.apply(Millis(self.now), result);
        events.into_iter().for_each(|event| self.receive(event));
        self.scheduler.check_conservation();
        true
    }

    fn check_plan(&mut self, plan: &StepPlan) {
        self.encoding = plan.encodes.last().map(|encode| encode.id).or(self.encoding);
        self.tally.encodes += plan.encodes.len() as u64;
        self.tally.resumed += plan.encodes.iter().filter(|encode| !encode.is_first()).count() as u64;
        self.tally.evictions += plan.evictions.len() as u64;
        let given_up = plan.evictions.iter().filter(|hash| !self.shard.is_encoded(hash));
        self.tally.given_up += given_up.count() as u64;
        for id in &plan.releases {
            self.cancelled.remove(id);
        }
        assert!(self.cancelled.is_empty(), "blocks of a cancelled sequence are free in the next plan");
        for admission in &plan.admissions {
            self.admitted.insert(admission.id);
            if self.forks.contains(&admission.id) {
                let sharing = u64::from(admission.num_computed_tokens > 0);
                self.tally.forks_sharing += sharing;
                self.tally.forks_alone += 1 - sharing;
            }
            let cached = |medium: &&Medium| self.shard.is_encoded(&medium.hash);
            self.tally.features_shared += admission.media.iter().filter(cached).count() as u64;
        }
    }

    fn receive(&mut self, event: Event) {
        match event {
            Event::Scheduled { id, at } => {
                let asked = self.asked.get_mut(&id).expect("events are for those who wait for them");
                assert!(!asked.scheduled && at.0 <= self.now);
                asked.scheduled = true;
            }
            Event::Encoded { id, .. } => assert!(self.asked[&id].scheduled),
            Event::PrefillDone { id, .. } => {
                let asked = self.asked.get_mut(&id).expect("events are for those who wait for them");
                assert!(asked.scheduled && !asked.prefill_done && asked.received.is_empty());
                asked.prefill_done = true;
            }
            Event::Token { id, token } => {
                let asked = self.asked.get_mut(&id).expect("events are for those who wait for them");
                assert!(asked.prefill_done);
                asked.received.push(token.token_id);
            }
            Event::Finished { id, reason, .. } => {
                let asked = self.asked.remove(&id).expect("a sequence finishes once");
                assert_eq!((asked.received, Ok(reason)), (asked.expected, asked.expected_reason));
                self.tally.finished += 1;
            }
            Event::Failed { id, failure, .. } => {
                let asked = self.asked.remove(&id).expect("a sequence fails once");
                assert_eq!((asked.received, Err(failure)), (asked.expected, asked.expected_reason));
                self.cancelled.insert(id);
                self.tally.failed += 1;
            }
        }
    }
}

/// Tells the seed of a world that failed.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this world can be replayed with LOCKSTEP_WORLD_SEED={}", self.0);
        }
    }
}

fn number_from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, and is {text:?}")))
}

#[test]
fn random_worlds_conserve_blocks_and_make_progress() {
    let worlds = number_from_environment("LOCKSTEP_WORLDS").unwrap_or(DEFAULT_WORLDS);
    let seeds = match number_from_environment("LOCKSTEP_WORLD_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..worlds,
    };
    let many = seeds.end - seeds.start >= 1000;
    let mut total = Tally::default();
    for seed in seeds {
        let _replay = Replay(seed);
        let tally = World::new(seed).run();
        total.finished += tally.finished;
        total.failed += tally.failed;
        total.cancelled += tally.cancelled;
        total.refused += tally.refused;
        total.preemptions += tally.preemptions;
        total.evictions += tally.evictions;
        total.encodes += tally.encodes;
        total.resumed += tally.resumed;
        total.given_up += tally.given_up;
        total.features_shared += tally.features_shared;
        total.forks_sharing += tally.forks_sharing;
        total.forks_alone += tally.forks_alone;
    }
    println!("{total:?}");
    let Tally { finished, failed, cancelled, refused, .. } = total;
    let Tally { preemptions, evictions, encodes, resumed, given_up, features_shared, .. } = total;
    let of_sequences = [finished, failed, cancelled, refused, preemptions];
    let of_media = [evictions, encodes, resumed, given_up, features_shared];
    let of_forks = [total.forks_sharing, total.forks_alone];
    let all_happened = of_sequences.iter().chain(&of_media).chain(&of_forks).all(|&n| n > 100);
    assert!(all_happened || !many, "the worlds are too tame: {total:?}");
}
