//! The scheduler's rules, one by one.

mod forks;
mod prefix;

use super::*;

fn config() -> SchedulerConfig {
    SchedulerConfig {
        kv_blocks: 16,
        kv_block_tokens: 4,
        feature_blocks: 4,
        feature_block_tokens: 4,
        // A token of a picture costs as much as one of text.
        vision: VisionCosts { num_stages: 2, attending_stages: vec![], attention_tokens: 1 },
        max_step_tokens: 16,
        max_step_sequences: 4,
        max_waiting: 4,
        max_context_tokens: 64,
        prefix_cache: false,
    }
}

fn text(id: u64, num_tokens: u32) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        token_ids: (0..num_tokens).collect(),
        media: vec![],
        sampling: SamplingParams::default(),
        max_new_tokens: 100,
        end_token_ids: vec![99],
        priority: 0,
        prefix_key: PrefixKey::default(),
        forks: vec![],
    }
}

/// A prompt of `before` tokens, one picture, and `after` tokens.
fn picture(id: u64, name: u8, before: u32, num_tokens: u32, after: u32) -> NewSequence {
    let hash = MediaHash([name; 32]);
    let medium = Medium { hash, first_token: before, num_tokens, grid: [1, 2, 2], seconds_per_grid_t: 0.0 };
    NewSequence { media: vec![medium], ..text(id, before + num_tokens + after) }
}

/// The result of a step that draws the same token everywhere.
fn answered(plan: &StepPlan, token_id: u32) -> StepResult {
    let drawing = plan.chunks.iter().filter(|chunk| chunk.max_new_tokens > 0);
    let token = SampledToken { token_id, ..SampledToken::default() };
    let sampled = drawing.map(|chunk| Sampled { id: chunk.id, tokens: vec![token.clone()], failure: None });
    StepResult { step: plan.step, sampled: sampled.collect(), vision_us: 5, step_us: 6 }
}

/// A scheduler whose model always draws the same token.
struct Bench(Scheduler);

impl Bench {
    fn new(config: SchedulerConfig) -> Self {
        Self(Scheduler::new(config))
    }

    fn submit(&mut self, new: NewSequence) {
        self.0.submit(Millis(0), new).unwrap();
    }

    fn plan(&mut self) -> StepPlan {
        self.0.schedule(Millis(1)).expect("there is something to do")
    }

    fn answer(&mut self, plan: &StepPlan, token_id: u32) -> Vec<Event> {
        self.0.apply(Millis(2), answered(plan, token_id))
    }

    /// A step, if there is anything to do.
    fn step_if_any(&mut self) {
        if let Some(plan) = self.0.schedule(Millis(1)) {
            self.answer(&plan, 7);
        }
    }

    fn step(&mut self) -> StepPlan {
        let plan = self.plan();
        self.answer(&plan, 7);
        self.0.check_conservation();
        plan
    }
}

/// Of each chunk: sequence, start, length, tokens to draw.
fn chunks(plan: &StepPlan) -> Vec<(u64, u32, u32, u32)> {
    plan.chunks.iter().map(|chunk| (chunk.id.0, chunk.start, chunk.length, chunk.max_new_tokens)).collect()
}

/// Of each piece of encoding: sequence, medium, from, to.
fn pieces(plan: &StepPlan) -> Vec<(u64, u8, u64, u64)> {
    plan.encodes.iter().map(|encode| (encode.id.0, encode.hash.0[0], encode.from, encode.to)).collect()
}

fn ids(ids: &[SeqId]) -> Vec<u64> {
    ids.iter().map(|id| id.0).collect()
}

#[test]
fn cuts_a_long_prompt_and_draws_after_its_last_chunk() {
    let mut bench = Bench::new(config());
    bench.submit(text(1, 37));
    let first = bench.step();
    assert_eq!(first.admissions[0].token_ids.len(), 37);
    assert_eq!((chunks(&first), first.chunks[0].new_blocks.len()), (vec![(1, 0, 16, 0)], 4));
    let second = bench.step();
    assert!(second.admissions.is_empty());
    assert_eq!(chunks(&second), [(1, 16, 16, 0)]);
    let third = bench.step();
    assert_eq!((chunks(&third), third.chunks[0].new_blocks.len()), (vec![(1, 32, 5, 1)], 2));
    assert_eq!(chunks(&bench.step()), [(1, 37, 1, 1)]);
}

#[test]
fn decodes_come_before_prompts_and_running_prompts_before_waiting_ones() {
    let mut bench = Bench::new(config());
    bench.submit(text(1, 4));
    bench.submit(text(2, 20));
    assert_eq!(chunks(&bench.step()), [(1, 0, 4, 1), (2, 0, 12, 0)]);
    bench.submit(text(3, 20));
    assert_eq!(chunks(&bench.step()), [(1, 4, 1, 1), (2, 12, 8, 1), (3, 0, 7, 0)]);
    assert_eq!(chunks(&bench.step()), [(1, 5, 1, 1), (2, 20, 1, 1), (3, 7, 13, 1)]);
}

#[test]
fn higher_priority_leaves_the_queue_first() {
    let mut bench = Bench::new(SchedulerConfig { max_step_sequences: 1, ..config() });
    bench.submit(text(1, 4));
    bench.submit(NewSequence { priority: 5, ..text(2, 4) });
    bench.submit(NewSequence { priority: 5, ..text(3, 4) });
    assert_eq!(chunks(&bench.step()), [(2, 0, 4, 1)]);
    bench.0.cancel(SeqId(2));
    assert_eq!(chunks(&bench.step()), [(3, 0, 4, 1)]);
}

#[test]
fn tells_what_happened_in_order() {
    let mut bench = Bench::new(config());
    bench.submit(NewSequence { max_new_tokens: 2, ..picture(1, 9, 1, 4, 1) });
    let id = SeqId(1);
    let token = |token_id| Event::Token { id, token: SampledToken { token_id, ..SampledToken::default() } };
    let plan = bench.plan();
    let expected = [
        Event::Scheduled { id, at: Millis(1) },
        Event::Encoded { id, hash: MediaHash([9; 32]), vision_us: 5 },
        Event::PrefillDone { id, at: Millis(2) },
        token(7),
    ];
    assert_eq!(bench.answer(&plan, 7), expected);
    let plan = bench.plan();
    let finished = Event::Finished { id, reason: FinishReason::Length, at: Millis(2) };
    assert_eq!(bench.answer(&plan, 8), [token(8), finished]);
    let last = bench.step();
    assert_eq!((ids(&last.releases), last.chunks.len()), (vec![1], 0));
    assert_eq!(bench.0.schedule(Millis(3)), None);
}

#[test]
fn an_end_token_ends_the_sequence_and_is_told() {
    let mut bench = Bench::new(config());
    bench.submit(text(1, 4));
    let plan = bench.plan();
    let events = bench.answer(&plan, 99);
    assert!(matches!(&events[2], Event::Token { token, .. } if token.token_id == 99));
    assert!(matches!(events[3], Event::Finished { reason: FinishReason::StopToken(99), .. }));
    assert_eq!(events.len(), 4);
}

#[test]
fn a_sequence_that_cannot_draw_fails_alone_and_is_released() {
    let mut bench = Bench::new(config());
    bench.submit(text(1, 4));
    bench.submit(text(2, 4));
    bench.step();
    let plan = bench.plan();
    let token = SampledToken { token_id: 7, ..SampledToken::default() };
    let failure = Some(DrawFailure::LogitsNotFinite);
    let sampled = vec![
        Sampled { id: SeqId(1), tokens: vec![], failure },
        Sampled { id: SeqId(2), tokens: vec![token.clone()], failure: None },
    ];
    let events = bench.0.apply(Millis(2), StepResult { step: plan.step, sampled, ..StepResult::default() });
    let failed = Event::Failed { id: SeqId(1), failure: DrawFailure::LogitsNotFinite, at: Millis(2) };
    assert_eq!(events, [failed, Event::Token { id: SeqId(2), token }]);
    let next = bench.step();
    assert_eq!((ids(&next.releases), chunks(&next)), (vec![1], vec![(2, 5, 1, 1)]));
    assert_eq!(bench.0.stats().kv_held, 2);
}

#[test]
fn bounds_the_answer_by_the_capacity() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 2, ..config() });
    bench.submit(text(1, 6));
    let first = bench.plan();
    assert_eq!(bench.answer(&first, 7).len(), 3);
    let second = bench.plan();
    let events = bench.answer(&second, 7);
    assert!(
        matches!(events[1], Event::Finished { reason: FinishReason::Length, .. }),
        "8 tokens fill 2 blocks"
    );
}

#[test]
fn blocks_of_a_cancelled_sequence_serve_the_next_plan() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 2, ..config() });
    bench.submit(text(1, 7));
    bench.submit(text(2, 7));
    let plan = bench.plan();
    assert_eq!(chunks(&plan), [(1, 0, 7, 1)]);
    bench.0.cancel(SeqId(1));
    bench.0.cancel(SeqId(1));
    assert_eq!(bench.answer(&plan, 7), [], "nobody listens any more");
    assert_eq!(bench.0.stats().kv_held, 2, "the shards may still use the blocks");
    let next = bench.step();
    assert_eq!((ids(&next.releases), chunks(&next)), (vec![1], vec![(2, 0, 7, 1)]));
}

#[test]
fn growth_takes_the_blocks_of_the_last_in_order() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 4, ..config() });
    bench.submit(text(1, 7));
    bench.submit(text(2, 7));
    bench.step();
    bench.step();
    let third = bench.step();
    assert_eq!((ids(&third.releases), chunks(&third)), (vec![2], vec![(1, 8, 1, 1)]));
    assert_eq!(bench.0.stats().totals.preemptions, 1);
    let fourth = bench.step();
    assert_eq!(chunks(&fourth), [(1, 9, 1, 1)], "one free block is too few for the 9 tokens of sequence 2");
    bench.0.cancel(SeqId(1));
    let fifth = bench.step();
    let Admission { token_ids, num_prompt_tokens, .. } = &fifth.admissions[0];
    assert_eq!((token_ids.len(), *num_prompt_tokens), (9, 7), "it enters with its answer so far");
    assert_eq!(chunks(&fifth), [(2, 0, 9, 1)], "which is computed again with its prompt");
}

#[test]
fn higher_priority_keeps_its_blocks_though_it_came_later() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 4, ..config() });
    bench.submit(text(1, 7));
    bench.submit(NewSequence { priority: 1, ..text(2, 7) });
    bench.step();
    bench.step();
    assert_eq!(ids(&bench.step().releases), [1]);
}

#[test]
fn a_prompt_waits_until_all_of_it_fits() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 8, ..config() });
    bench.submit(text(1, 24));
    bench.submit(text(2, 12));
    bench.submit(text(3, 4));
    assert_eq!(chunks(&bench.step()), [(1, 0, 16, 0)]);
    assert_eq!(
        chunks(&bench.step()),
        [(1, 16, 8, 1)],
        "2 blocks are left, and who came first is not overtaken"
    );
}

#[test]
fn encodes_a_medium_before_its_pad_tokens_within_the_budget() {
    let mut bench = Bench::new(config());
    bench.submit(picture(1, 9, 2, 10, 3));
    let first = bench.step();
    assert_eq!(first.encodes[0].feature_blocks.len(), 3);
    assert_eq!(chunks(&first), [(1, 0, 6, 0)], "10 tokens of the budget went to the picture");
    assert_eq!(chunks(&bench.step()), [(1, 6, 9, 1)]);
}

#[test]
fn a_medium_takes_what_the_text_before_it_leaves_and_goes_on_in_the_next_step() {
    let mut bench = Bench::new(config());
    bench.submit(text(1, 8));
    bench.submit(picture(2, 9, 2, 10, 3));
    let first = bench.step();
    assert_eq!((pieces(&first), chunks(&first)), (vec![(2, 9, 0, 12)], vec![(1, 0, 8, 1), (2, 0, 2, 0)]));
    let second = bench.step();
    assert_eq!((pieces(&second), chunks(&second)), (vec![(2, 9, 12, 20)], vec![(1, 8, 1, 1), (2, 2, 11, 0)]));
    assert_eq!((first.encodes[0].feature_blocks.len(), second.encodes[0].feature_blocks.len()), (3, 0));
}

#[test]
fn a_running_sequence_waits_for_no_more_than_the_budget() {
    let mut bench = Bench::new(SchedulerConfig {
        feature_blocks: 20,
        kv_blocks: 40,
        max_context_tokens: 160,
        ..config()
    });
    bench.submit(text(1, 4));
    bench.step();
    bench.submit(picture(2, 9, 0, 80, 4));
    for step in 0..5 {
        let plan = bench.step();
        assert_eq!(pieces(&plan), [(2, 9, 30 * step, 30 * (step + 1))]);
        assert_eq!(chunks(&plan), [(1, 4 + step as u32, 1, 1)], "the picture takes what the decode leaves");
    }
    let last = bench.step();
    assert_eq!((pieces(&last), chunks(&last)), (vec![(2, 9, 150, 160)], vec![(1, 9, 1, 1), (2, 0, 10, 0)]));
}

#[test]
fn attending_to_many_tokens_costs_more_of_the_budget() {
    let vision = VisionCosts { num_stages: 2, attending_stages: vec![1], attention_tokens: 10 };
    let mut bench = Bench::new(SchedulerConfig { feature_blocks: 8, vision, ..config() });
    bench.submit(picture(1, 9, 0, 10, 4));
    // A token is 20 of 16 * 20; 10 units are 10 each, then they are 20 each.
    assert_eq!(chunks(&bench.step()), [(1, 0, 1, 0)], "10 tokens of encoding cost 15 of text");
    let mut bench = Bench::new(bench.0.config().clone());
    let video = picture(1, 9, 0, 10, 4);
    let frames = Medium { grid: [5, 2, 4], ..video.media[0].clone() };
    bench.submit(NewSequence { media: vec![frames], ..video });
    assert_eq!(chunks(&bench.step()), [(1, 0, 5, 0)], "those of a video attend to their temporal patch only");
}

#[test]
fn a_medium_left_half_way_is_evicted_and_begins_anew_after_what_is_in_work() {
    let mut bench = Bench::new(SchedulerConfig { feature_blocks: 12, ..config() });
    bench.submit(picture(1, 9, 0, 20, 1));
    assert_eq!(pieces(&bench.step()), [(1, 9, 0, 32)]);
    bench.submit(picture(2, 9, 0, 20, 2));
    bench.submit(picture(3, 8, 0, 20, 1));
    bench.0.cancel(SeqId(1));
    let second = bench.step();
    assert_eq!((ids(&second.releases), &second.evictions), (vec![1], &vec![MediaHash([9; 32])]));
    assert_eq!(pieces(&second), [(3, 8, 0, 32)], "what this step evicts begins in a later one");
    assert_eq!(
        pieces(&bench.step()),
        [(3, 8, 32, 40), (2, 9, 0, 24)],
        "sequence 2 waits for what is in work"
    );
    let fourth = bench.step();
    assert_eq!((pieces(&fourth), chunks(&fourth)), (vec![(2, 9, 24, 40)], vec![(2, 0, 8, 0)]));
}

#[test]
fn a_medium_goes_on_for_others_when_the_first_who_needs_it_leaves() {
    let mut bench = Bench::new(SchedulerConfig { feature_blocks: 12, kv_blocks: 40, ..config() });
    bench.submit(picture(1, 9, 0, 40, 1));
    bench.step();
    bench.submit(picture(2, 9, 0, 40, 2));
    bench.submit(picture(3, 9, 0, 40, 3));
    bench.0.cancel(SeqId(1));
    let second = bench.step();
    assert_eq!((second.evictions.len(), second.admissions.len(), pieces(&second)), (1, 2, vec![]));
    assert_eq!(pieces(&bench.step()), [(2, 9, 0, 32)]);
    bench.0.cancel(SeqId(2));
    let fourth = bench.step();
    assert_eq!((fourth.evictions.len(), pieces(&fourth)), (0, vec![(3, 9, 32, 64)]));
}

#[test]
fn time_of_vision_is_shared_by_what_pieces_cost() {
    let mut bench = Bench::new(config());
    bench.submit(picture(1, 1, 0, 2, 1));
    bench.submit(picture(2, 2, 0, 6, 1));
    let plan = bench.plan();
    assert_eq!(pieces(&plan), [(1, 1, 0, 4), (2, 2, 0, 12)]);
    let events = bench.0.apply(Millis(2), StepResult { vision_us: 80, ..answered(&plan, 7) });
    let times = events.iter().filter_map(|event| match event {
        Event::Encoded { id, vision_us, .. } => Some((id.0, *vision_us)),
        _ => None,
    });
    assert_eq!(times.collect::<Vec<_>>(), [(1, 20), (2, 60)]);
}

#[test]
fn a_step_begins_a_bounded_number_of_media() {
    let mut bench = Bench::new(SchedulerConfig { feature_blocks: 40, max_step_tokens: 60, ..config() });
    let mut many = text(1, 21);
    for name in 0..20 {
        let medium = picture(1, name as u8 + 1, name, 1, 0).media.remove(0);
        many.media.push(medium);
    }
    bench.submit(many);
    let first = bench.step();
    assert_eq!((first.encodes.len(), chunks(&first)), (8, vec![(1, 0, 8, 0)]));
    assert_eq!(bench.step().encodes.len(), 8);
    assert_eq!(chunks(&bench.step()), [(1, 16, 5, 1)]);
}

#[test]
fn one_encoding_serves_all_who_have_the_medium_now_or_later() {
    let mut bench = Bench::new(config());
    bench.submit(picture(1, 9, 1, 4, 1));
    bench.submit(picture(2, 9, 1, 4, 1));
    let both = bench.step();
    assert_eq!((both.encodes.len(), chunks(&both)), (1, vec![(1, 0, 6, 1), (2, 0, 6, 1)]));
    bench.0.cancel(SeqId(1));
    bench.0.cancel(SeqId(2));
    bench.step();
    assert_eq!((bench.0.stats().features_held, bench.0.stats().features_cached), (0, 1));
    bench.submit(picture(3, 9, 1, 4, 1));
    let later = bench.step();
    assert_eq!((later.encodes.len(), chunks(&later)), (0, vec![(3, 0, 6, 1)]));
}

#[test]
fn features_give_way_when_space_is_needed() {
    let mut bench = Bench::new(config());
    bench.submit(picture(1, 1, 0, 9, 1));
    bench.step();
    bench.0.cancel(SeqId(1));
    bench.submit(picture(2, 2, 0, 8, 1));
    let plan = bench.step();
    assert_eq!((ids(&plan.releases), &plan.evictions), (vec![1], &vec![MediaHash([1; 32])]));
    assert_eq!(plan.encodes[0].hash, MediaHash([2; 32]));
}

#[test]
fn who_lacks_features_is_passed_by_text_but_not_by_other_media() {
    let mut bench = Bench::new(config());
    bench.submit(picture(1, 1, 0, 9, 1));
    bench.step();
    bench.submit(picture(2, 2, 0, 8, 1));
    bench.submit(picture(3, 3, 0, 1, 1));
    bench.submit(text(4, 3));
    let plan = bench.step();
    assert_eq!(chunks(&plan).iter().map(|chunk| chunk.0).collect::<Vec<_>>(), [1, 4]);
    bench.0.cancel(SeqId(1));
    assert_eq!(bench.step().admissions[0].id, SeqId(2));
}

#[test]
fn refuses_what_can_never_run_with_numbers() {
    let mut scheduler = Scheduler::new(SchedulerConfig { kv_blocks: 3, ..config() });
    let mut refuse = |new| scheduler.submit(Millis(0), new).unwrap_err();
    assert_eq!(refuse(text(1, 12)), SubmitError::TooLong { prompt_tokens: 12, capacity_tokens: 12 });
    assert_eq!(refuse(text(1, 0)), SubmitError::EmptyPrompt);
    assert_eq!(refuse(NewSequence { max_new_tokens: 0, ..text(1, 3) }), SubmitError::NoNewTokens);
    let misplaced = NewSequence { media: picture(1, 1, 3, 4, 0).media, ..text(1, 6) };
    assert_eq!(refuse(misplaced), SubmitError::MisplacedMedium { index: 0 });
    let mut overlapping = picture(1, 1, 3, 4, 1);
    overlapping.media.push(Medium { first_token: 6, num_tokens: 1, ..overlapping.media[0].clone() });
    assert_eq!(refuse(overlapping), SubmitError::MisplacedMedium { index: 1 });
    for (seconds_per_grid_t, t) in
        [(f64::INFINITY, 1), (f64::NAN, 1), (-1.0, 1), (28_801.0, 2), (10_000.0, 4)]
    {
        let mut untimely = picture(1, 1, 3, 4, 1);
        untimely.media[0] = Medium { seconds_per_grid_t, grid: [t, 2, 2], ..untimely.media[0].clone() };
        assert_eq!(refuse(untimely), SubmitError::UntimelyMedium { index: 0 }, "{seconds_per_grid_t}");
    }

    let mut scheduler = Scheduler::new(config());
    let refused = scheduler.submit(Millis(0), picture(1, 1, 0, 17, 1)).unwrap_err();
    assert_eq!(refused, SubmitError::TooManyFeatures { needed_blocks: 5, feature_blocks: 4 });
}

#[test]
fn refuses_over_the_bound_of_the_queue_and_takes_again_later() {
    let mut bench = Bench::new(SchedulerConfig { max_waiting: 2, ..config() });
    bench.submit(text(1, 4));
    bench.submit(text(2, 4));
    let refused = bench.0.submit(Millis(0), text(3, 4)).unwrap_err();
    assert_eq!(refused, SubmitError::QueueFull { waiting: 2, max_waiting: 2 });
    assert_eq!(bench.0.submit(Millis(0), text(2, 4)), Err(SubmitError::DuplicateId(SeqId(2))));
    bench.step();
    bench.submit(text(3, 4));
}

#[test]
fn a_plan_goes_on_from_a_token_that_is_not_known_yet() {
    let mut bench = Bench::new(config());
    bench.submit(NewSequence { max_new_tokens: 3, ..text(1, 4) });
    let first = bench.plan();
    let second = bench.plan();
    assert_eq!((chunks(&first), chunks(&second)), (vec![(1, 0, 4, 1)], vec![(1, 4, 1, 1)]));
    assert!(bench.0.is_ahead());
    bench.answer(&first, 7);
    let third = bench.plan();
    assert_eq!(chunks(&third), [(1, 5, 1, 1)]);
    bench.answer(&second, 8);
    assert_eq!(bench.0.schedule(Millis(1)), None, "its last token is being drawn");
    let finished = Event::Finished { id: SeqId(1), reason: FinishReason::Length, at: Millis(2) };
    assert_eq!(bench.answer(&third, 9).last(), Some(&finished));
    assert_eq!(ids(&bench.plan().releases), [1]);
}

#[test]
fn a_token_too_many_is_heard_by_nobody() {
    let mut bench = Bench::new(config());
    bench.submit(text(1, 4));
    let (first, ghost) = (bench.plan(), bench.plan());
    let finished = Event::Finished { id: SeqId(1), reason: FinishReason::StopToken(99), at: Millis(2) };
    assert_eq!(bench.answer(&first, 99).last(), Some(&finished));
    assert_eq!(bench.0.stats().kv_held, 2, "the step on its way writes to the blocks");
    assert_eq!(bench.answer(&ghost, 7), []);
    assert_eq!(ids(&bench.plan().releases), [1]);
    assert_eq!(bench.0.stats().kv_held, 0);
}

#[test]
fn a_medium_whose_eviction_is_in_flight_waits_for_it() {
    let mut bench = Bench::new(SchedulerConfig { feature_blocks: 2, ..config() });
    bench.submit(picture(1, 8, 0, 8, 1));
    bench.step();
    bench.0.cancel(SeqId(1));
    bench.submit(picture(2, 9, 0, 8, 1));
    let evicting = bench.plan();
    assert_eq!(evicting.evictions, [MediaHash([8; 32])]);
    bench.0.cancel(SeqId(2));
    bench.submit(picture(3, 8, 0, 8, 1));
    let next = bench.0.schedule(Millis(1)).expect("sequence 2 is to be released");
    assert_eq!(pieces(&next), [], "its pixels would be dropped with the old features");
    bench.answer(&evicting, 7);
    assert_eq!(pieces(&bench.plan()), [(3, 8, 0, 16)]);
}

#[test]
fn a_replay_begins_with_all_tokens_that_came() {
    let mut bench = Bench::new(config());
    bench.submit(picture(1, 9, 1, 8, 1));
    bench.submit(text(2, 20));
    bench.step();
    bench.step();
    let _lost = bench.plan();
    bench.0.replay();
    bench.0.check_conservation();
    let again = bench.plan();
    assert_eq!(again.step, 0);
    assert_eq!(pieces(&again), [(1, 9, 0, 16)], "features are gone, too");
    let lengths: Vec<_> = again.admissions.iter().map(|admission| admission.token_ids.len()).collect();
    assert_eq!((lengths[0], again.admissions[0].num_prompt_tokens), (11, 10));
    let events = bench.answer(&again, 7);
    assert!(!events.iter().any(|event| matches!(event, Event::Scheduled { .. })), "that is told once");
}
