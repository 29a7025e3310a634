//! Sequences that begin with what others left.

use super::*;

fn bench() -> Bench {
    Bench::new(SchedulerConfig { prefix_cache: true, ..config() })
}

/// Of each sequence that enters: its id, how many of its tokens are computed, in which blocks.
fn found(plan: &StepPlan) -> Vec<(u64, u32, Vec<u32>)> {
    let entering = plan.admissions.iter();
    entering
        .map(|it| (it.id.0, it.num_computed_tokens, it.blocks.iter().map(|block| block.0).collect()))
        .collect()
}

/// Tokens looked up in the prefix cache and found, and media looked up in the cache of features and found.
fn lookups(bench: &Bench) -> [u64; 4] {
    let totals = bench.0.stats().totals;
    [totals.prefix_tokens_looked_up, totals.prefix_tokens_found, totals.media_looked_up, totals.media_found]
}

/// A sequence that came, drew a token and went.
fn visit(bench: &mut Bench, new: NewSequence) {
    let id = new.id;
    bench.submit(NewSequence { max_new_tokens: 1, ..new });
    while bench.0.stats().running + bench.0.stats().waiting > 0 {
        bench.step();
    }
    assert!(!bench.0.is_running(id));
}

#[test]
fn a_conversation_goes_on_after_what_is_computed() {
    let mut bench = bench();
    visit(&mut bench, text(1, 10));
    bench.submit(text(2, 13));
    let plan = bench.step();
    assert_eq!((found(&plan), chunks(&plan)), (vec![(2, 8, vec![0, 1])], vec![(2, 8, 5, 1)]));
    assert_eq!(lookups(&bench), [23, 8, 0, 0]);
}

#[test]
fn the_last_token_is_computed_in_any_case() {
    let mut bench = bench();
    visit(&mut bench, text(1, 8));
    bench.submit(text(2, 8));
    let plan = bench.step();
    assert_eq!((found(&plan), chunks(&plan)), (vec![(2, 4, vec![0])], vec![(2, 4, 4, 1)]));
}

#[test]
fn blocks_are_shared_while_their_first_holder_runs() {
    let mut bench = bench();
    bench.submit(text(1, 10));
    bench.step();
    bench.submit(text(2, 9));
    let plan = bench.step();
    assert_eq!(found(&plan), [(2, 8, vec![0, 1])]);
    bench.0.cancel(SeqId(1));
    bench.step();
    assert_eq!(bench.0.stats().kv_held, 3);
}

#[test]
fn what_is_in_flight_is_not_found_yet() {
    let mut bench = bench();
    bench.submit(text(1, 10));
    let first = bench.plan();
    bench.submit(text(2, 10));
    let second = bench.plan();
    assert_eq!(found(&second), [(2, 0, vec![])]);
    bench.answer(&first, 7);
    bench.answer(&second, 7);
    bench.0.check_conservation();
}

#[test]
fn other_keys_and_other_times_find_nothing() {
    let video = |id, seconds_per_grid_t| {
        let mut new = picture(id, 9, 1, 8, 3);
        new.media[0].seconds_per_grid_t = seconds_per_grid_t;
        new
    };
    let mut bench = bench();
    visit(&mut bench, video(1, 0.5));
    visit(&mut bench, NewSequence { prefix_key: PrefixKey([1; 32]), ..video(2, 0.5) });
    assert_eq!(bench.0.stats().totals.prefix_tokens_found, 0);
    visit(&mut bench, video(3, 1.0));
    assert_eq!(bench.0.stats().totals.prefix_tokens_found, 0, "the same frames at another rate");
    visit(&mut bench, video(4, 0.5));
    assert_eq!(bench.0.stats().totals.prefix_tokens_found, 8);
}

#[test]
fn a_picture_that_is_computed_is_neither_encoded_nor_reserved() {
    let mut bench = Bench::new(SchedulerConfig { prefix_cache: true, feature_blocks: 2, ..config() });
    visit(&mut bench, picture(1, 9, 0, 8, 2));
    // Another picture takes the place of its features.
    visit(&mut bench, picture(2, 8, 0, 8, 2));
    bench.submit(picture(3, 9, 0, 8, 5));
    let plan = bench.step();
    assert_eq!((found(&plan), pieces(&plan)), (vec![(3, 8, vec![0, 1])], vec![]));
    assert_eq!((plan.evictions.len(), bench.0.stats().features_held), (0, 0));
    assert_eq!(lookups(&bench), [33, 8, 2, 0], "it was not looked for again");
}

#[test]
fn what_is_kept_gives_way_from_its_end() {
    let mut bench = Bench::new(SchedulerConfig { prefix_cache: true, kv_blocks: 6, ..config() });
    visit(&mut bench, text(1, 12));
    bench.step_if_any();
    assert_eq!((bench.0.stats().kv_kept, bench.0.stats().kv_free), (3, 6));
    let other = NewSequence { prefix_key: PrefixKey([1; 32]), ..text(2, 15) };
    visit(&mut bench, other);
    bench.submit(text(3, 14));
    assert_eq!(found(&bench.step())[0].1, 8);
}

#[test]
fn a_sequence_that_lost_its_blocks_finds_what_is_left_of_them() {
    let mut bench = Bench::new(SchedulerConfig { prefix_cache: true, kv_blocks: 4, ..config() });
    bench.submit(text(1, 7));
    bench.submit(NewSequence { prefix_key: PrefixKey([1; 32]), ..text(2, 7) });
    let preempting = (0..5).map(|_| bench.step()).find(|plan| !plan.releases.is_empty()).expect("few blocks");
    assert_eq!(ids(&preempting.releases), [2]);
    bench.0.cancel(SeqId(1));
    let plan = bench.step();
    assert_eq!((found(&plan)[0].0, found(&plan)[0].1), (2, 4));
    assert_eq!(lookups(&bench), [14, 0, 0, 0], "what it finds was its own");
}

#[test]
fn forks_look_for_nothing() {
    let mut bench = bench();
    bench.submit(NewSequence { forks: vec![SeqId(2), SeqId(3)], ..picture(1, 9, 1, 4, 4) });
    bench.step();
    assert_eq!(found(&bench.step()).len(), 2);
    assert_eq!(lookups(&bench), [9, 0, 1, 0]);
    (1..=3).for_each(|id| bench.0.cancel(SeqId(id)));
    visit(&mut bench, picture(4, 9, 1, 4, 4));
    assert_eq!(lookups(&bench), [18, 8, 1, 0]);
}

#[test]
fn nothing_is_looked_up_where_there_is_no_prefix_cache() {
    let mut bench = Bench::new(config());
    for id in [1, 2] {
        visit(&mut bench, picture(id, 9, 1, 4, 4));
    }
    assert_eq!(lookups(&bench), [0, 0, 2, 1]);
}

#[test]
fn kept_prompts_that_hide_each_other_are_given_up() {
    let mut bench = Bench::new(SchedulerConfig {
        prefix_cache: true,
        kv_blocks: 7,
        max_step_sequences: 8,
        max_waiting: 8,
        ..config()
    });
    visit(&mut bench, text(1, 9));
    let other = PrefixKey([1; 32]);
    bench.submit(NewSequence { max_new_tokens: 20, prefix_key: other, ..text(2, 7) });
    bench.step();
    // Two requests of one prompt, whose full blocks both keep for their forks.
    for id in [10, 20] {
        bench.submit(NewSequence { max_new_tokens: 6, forks: vec![SeqId(id + 1)], ..text(id, 9) });
    }
    for _ in 0..200 {
        bench.step_if_any();
        bench.0.check_conservation();
    }
    let stats = bench.0.stats();
    assert_eq!((stats.running, stats.waiting), (0, 0), "everybody is served");
}

#[test]
fn features_held_without_blocks_are_in_nobodys_way() {
    let config = SchedulerConfig { prefix_cache: true, kv_blocks: 5, feature_blocks: 2, ..config() };
    let mut bench = Bench::new(config);
    let medium = |name, first_token| Medium { first_token, ..picture(0, name, 0, 4, 1).media[0].clone() };
    // The first picture is computed, so that a sequence needs the second only.
    visit(&mut bench, NewSequence { media: vec![medium(1, 0)], ..text(1, 5) });
    bench.step_if_any();
    bench.submit(NewSequence { priority: 1, prefix_key: PrefixKey([1; 32]), ..text(2, 4) });
    bench.submit(NewSequence { media: vec![medium(1, 0), medium(2, 4)], ..text(3, 10) });
    // It loses its blocks, the first picture's too, and keeps the features of the second.
    while bench.0.stats().kv_free > 0 || bench.0.stats().totals.preemptions == 0 {
        bench.step();
    }
    assert_eq!((bench.0.stats().running, bench.0.stats().features_held), (1, 1));
    bench.0.cancel(SeqId(2));
    let media = vec![medium(5, 0), medium(6, 4)];
    bench.submit(NewSequence {
        max_new_tokens: 1,
        priority: 2,
        media,
        prefix_key: PrefixKey([2; 32]),
        ..text(4, 9)
    });
    for _ in 0..100 {
        bench.step_if_any();
        bench.0.check_conservation();
    }
    assert_eq!((bench.0.stats().running, bench.0.stats().waiting), (0, 0), "everybody is served");
}
