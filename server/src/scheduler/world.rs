//! A simulated world around the scheduler: people who come and go, and a shard that checks every plan.
//!
//! Everything follows from one seed. `LOCKSTEP_WORLD_SEED=n` replays one world, `LOCKSTEP_WORLDS=n` runs that many.

mod shard;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use self::shard::{FakeShard, TEXT_TOKENS, next_token, noise_key, owner};
use super::*;

const DEFAULT_WORLDS: u64 = 3000;
const MAX_STEPS: u64 = 50_000;

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
    /// Plans that were made before the result of the one before.
    ahead: u64,
    /// Tokens that were drawn for sequences which had ended.
    ghosts: u64,
    faults: u64,
    /// Tokens that sequences found computed, in worlds with a prefix cache.
    found: u64,
    /// Media that sequences found encoded.
    media_found: u64,
    tokens: u64,
    steps: u64,
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
    /// Results that the scheduler has not got yet.
    results: VecDeque<StepResult>,
    /// Faults that are still to come.
    faults: u64,
    /// Sequences that were cancelled or failed, which the next plan must release.
    cancelled: BTreeSet<SeqId>,
    /// Sequences that the shard has by the last plan.
    admitted: BTreeSet<SeqId>,
    /// For whom the last plan with a piece of encoding had it.
    encoding: Option<SeqId>,
    forks: BTreeSet<SeqId>,
    /// What was asked before, for those who go on with it.
    told: Vec<NewSequence>,
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
            prefix_cache: rng.random_bool(0.7),
        };
        Self {
            rng,
            shard: FakeShard::new(config.clone()),
            scheduler: Scheduler::new(config),
            asked: BTreeMap::new(),
            results: VecDeque::new(),
            faults: 0,
            cancelled: BTreeSet::new(),
            admitted: BTreeSet::new(),
            encoding: None,
            forks: BTreeSet::new(),
            told: vec![],
            next_id: 0,
            now: 0,
            tally: Tally::default(),
        }
    }

    fn run(mut self) -> Tally {
        let arrivals = self.rng.random_range(1..40);
        let arrival_rate = self.rng.random_range(0.05..1.0);
        let cancel_rate = if self.rng.random_bool(0.5) { 0.0 } else { 0.1 };
        self.faults = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(1..6) };
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
        assert!(self.shard.is_empty());
        let Totals { steps, tokens, replays, preemptions, .. } = stats.totals;
        assert_eq!(
            (steps, tokens, replays),
            (self.tally.steps, self.tally.tokens, self.tally.faults),
            "what is counted happened"
        );
        let Totals { prefix_tokens_looked_up, prefix_tokens_found, .. } = stats.totals;
        let Totals { media_looked_up, media_found, .. } = stats.totals;
        assert!(prefix_tokens_found <= prefix_tokens_looked_up && media_found <= media_looked_up);
        self.tally.preemptions = preemptions;
        self.tally.found = prefix_tokens_found;
        self.tally.media_found = media_found;
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
        let goes_on = !self.told.is_empty() && rng.random_bool(0.4);
        let (mut token_ids, mut media) = match goes_on {
            true => {
                let before = &self.told[rng.random_range(0..self.told.len())];
                let (answer, _) = expected_answer(before, 0, before.token_ids.len() as u32 + 20);
                ([&before.token_ids[..], &answer].concat(), before.media.clone())
            }
            false => (vec![], vec![]),
        };
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
            let seconds_per_grid_t = if t > 1 { [0.5, 1.0][rng.random_range(0..2)] } else { 0.0 };
            media.push(Medium { hash, first_token, num_tokens, grid, seconds_per_grid_t });
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
        let prefix_key = PrefixKey([owner(&sampling); 32]);
        let new = NewSequence {
            id,
            token_ids,
            media,
            sampling,
            max_new_tokens,
            end_token_ids,
            priority,
            prefix_key,
            forks,
        };
        self.told.push(new.clone());
        new
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

    /// Plans and runs a step, or takes the result of one, or loses the shard. Returns whether there was anything to do.
    fn step(&mut self, cancel_rate: f64) -> bool {
        self.now += self.rng.random_range(0..50);
        if self.faults > 0 && self.rng.random_bool(0.02) {
            self.lose_shard();
        }
        let in_flight = self.scheduler.num_in_flight();
        assert_eq!(in_flight, self.results.len());
        let plans = !self.scheduler.is_ahead() && (in_flight == 0 || self.rng.random_bool(0.8));
        if plans && let Some(plan) = self.scheduler.schedule(Millis(self.now)) {
            self.scheduler.check_conservation();
            self.tally.ahead += in_flight as u64;
            self.check_plan(&plan, in_flight > 0);
            self.results.push_back(self.shard.run(&plan));
            // Between plan and result anything may happen to the queue.
            self.maybe_cancel(cancel_rate);
            return true;
        }
        let Some(result) = self.results.pop_front() else {
            assert!(self.asked.is_empty(), "sequences wait, and nothing is done");
            assert!(self.cancelled.is_empty(), "a cancelled sequence is not released");
            return false;
        };
        let is_ghost = |sampled: &&Sampled| !self.asked.contains_key(&sampled.id);
        self.tally.ghosts += result.sampled.iter().filter(is_ghost).count() as u64;
        let events = self.scheduler.apply(Millis(self.now), result);
        self.tally.steps += 1;
        events.into_iter().for_each(|event| self.receive(event));
        self.scheduler.check_conservation();
        true
    }

    /// Everything that the shard knew is gone, and so are the results on their way.
    fn lose_shard(&mut self) {
        self.faults -= 1;
        self.tally.faults += 1;
        self.shard = FakeShard::new(self.scheduler.config().clone());
        self.results.clear();
        self.admitted.clear();
        self.cancelled.clear();
        self.encoding = None;
        self.scheduler.replay();
        self.scheduler.check_conservation();
    }

    fn check_plan(&mut self, plan: &StepPlan, is_ahead: bool) {
        let works = !plan.chunks.is_empty() || !plan.encodes.is_empty();
        // What is evicted may be all that is wanted: it begins again in the next step.
        let makes_way = !plan.evictions.is_empty();
        assert!(
            works || makes_way || is_ahead || self.asked.is_empty(),
            "sequences wait, and the step computes nothing"
        );
        self.encoding = plan.encodes.last().map(|encode| encode.id).or(self.encoding);
        self.tally.encodes += plan.encodes.len() as u64;
        self.tally.resumed += plan.encodes.iter().filter(|encode| !encode.is_first()).count() as u64;
        self.tally.evictions += plan.evictions.len() as u64;
        let given_up = plan.evictions.iter().filter(|hash| !self.shard.is_encoded(hash));
        self.tally.given_up += given_up.count() as u64;
        for id in &plan.releases {
            self.cancelled.remove(id);
            assert!(self.admitted.remove(id), "only what was admitted is released");
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
                self.tally.tokens += 1;
            }
            Event::Finished { id, reason, .. } => {
                let asked = self.asked.remove(&id).expect("a sequence finishes once");
                assert_eq!((asked.received, Ok(reason)), (asked.expected, asked.expected_reason));
                self.tally.finished += 1;
            }
            Event::Failed { id, failure, .. } => {
                let asked = self.asked.remove(&id).expect("a sequence fails once");
                assert_eq!((asked.received, Err(failure)), (asked.expected, asked.expected_reason));
                if self.admitted.contains(&id) {
                    self.cancelled.insert(id);
                }
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
        total.ahead += tally.ahead;
        total.ghosts += tally.ghosts;
        total.faults += tally.faults;
        total.found += tally.found;
        total.media_found += tally.media_found;
    }
    println!("{total:?}");
    let Tally { finished, failed, cancelled, refused, .. } = total;
    let Tally { preemptions, evictions, encodes, resumed, given_up, features_shared, .. } = total;
    let of_sequences = [finished, failed, cancelled, refused, preemptions];
    let of_media = [evictions, encodes, resumed, given_up, features_shared];
    let of_forks = [total.forks_sharing, total.forks_alone];
    let of_plans = [total.ahead, total.ghosts, total.faults, total.found, total.media_found];
    let all = of_sequences.iter().chain(&of_media).chain(&of_forks).chain(&of_plans);
    let all_happened = all.copied().all(|n| n > 100);
    assert!(all_happened || !many, "the worlds are too tame: {total:?}");
}

/// People of high priority come without end, more than can be served. Somebody of low priority is served all the same, when those who
/// come are no longer ahead by their priority.
#[test]
fn nobody_starves() {
    for (priority, least_ms) in [(0, 0), (1, 10_000), (3, 30_000)] {
        let config = SchedulerConfig {
            kv_blocks: 12,
            kv_block_tokens: 4,
            feature_blocks: 0,
            feature_block_tokens: 1,
            vision: VisionCosts { num_stages: 1, attending_stages: vec![], attention_tokens: 1 },
            max_step_tokens: 8,
            max_step_sequences: 3,
            max_waiting: 6,
            max_context_tokens: 40,
            prefix_cache: true,
        };
        let (mut scheduler, mut shard) = (Scheduler::new(config.clone()), FakeShard::new(config));
        let new = |id, priority| NewSequence {
            id: SeqId(id),
            token_ids: (0..10).map(|token| (id as u32 + token) % TEXT_TOKENS).collect(),
            media: vec![],
            sampling: SamplingParams::default(),
            max_new_tokens: 20,
            end_token_ids: vec![],
            priority,
            prefix_key: PrefixKey::default(),
            forks: vec![],
        };
        scheduler.submit(Millis(0), new(0, 0)).unwrap();
        let (mut next_id, mut now) = (1, 0);
        loop {
            // Every place in the queue is always taken.
            while scheduler.submit(Millis(now), new(next_id, priority)).is_ok() {
                next_id += 1;
            }
            let plan = scheduler.schedule(Millis(now)).expect("there is always something to do");
            let events = scheduler.apply(Millis(now), shard.run(&plan));
            let ended = |event: &Event| {
                matches!(event, Event::Finished { id: SeqId(0), .. } | Event::Failed { id: SeqId(0), .. })
            };
            if events.iter().any(ended) {
                break;
            }
            now += 100;
            assert!(now < least_ms + 60_000, "it waits for ever behind priority {priority}");
        }
        assert!(now >= least_ms, "priority {priority} is worth nothing");
        assert!(next_id > 10 || least_ms == 0, "few came");
    }
}
