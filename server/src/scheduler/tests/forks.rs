//! Several answers to one prompt.

use super::*;

fn forked(new: NewSequence, forks: &[u64]) -> NewSequence {
    NewSequence { forks: forks.iter().copied().map(SeqId).collect(), ..new }
}

/// Of each admission: sequence, branch, tokens that are computed, blocks.
fn admissions(plan: &StepPlan) -> Vec<(u64, u32, u32, Vec<u32>)> {
    let blocks = |admission: &Admission| admission.blocks.iter().map(|block| block.0).collect();
    let each = plan.admissions.iter();
    each.map(|one| (one.id.0, one.sampling.branch, one.num_computed_tokens, blocks(one))).collect()
}

fn copies(plan: &StepPlan) -> Vec<(u32, u32)> {
    plan.copies.iter().map(|copy| (copy.source.0, copy.target.0)).collect()
}

#[test]
fn forks_begin_with_the_blocks_of_the_prompt_and_draw_for_themselves() {
    let mut bench = Bench::new(config());
    bench.submit(forked(text(1, 22), &[2, 3]));
    assert_eq!(chunks(&bench.step()), [(1, 0, 16, 0)]);
    let second = bench.step();
    assert_eq!((chunks(&second), second.admissions.len()), (vec![(1, 16, 6, 1)], 0));
    let third = bench.step();
    assert_eq!(chunks(&third), [(1, 22, 1, 1), (2, 21, 1, 1), (3, 21, 1, 1)]);
    let shared = [0, 1, 2, 3, 4];
    let table = |own| shared.into_iter().chain([own]).collect();
    assert_eq!(admissions(&third), [(2, 1, 21, table(6)), (3, 2, 21, table(7))]);
    assert_eq!(copies(&third), [(5, 6), (5, 7)]);
    assert_eq!(third.admissions[0].token_ids.len(), 22);
    assert_eq!(bench.0.stats().kv_held, 8, "the prompt once, and a block for each fork");
    bench.0.cancel(SeqId(1));
    let fourth = bench.step();
    assert_eq!((ids(&fourth.releases), chunks(&fourth)), (vec![1], vec![(2, 22, 1, 1), (3, 22, 1, 1)]));
    assert_eq!(bench.0.stats().kv_held, 7, "what the others share stays");
}

#[test]
fn a_prompt_in_full_blocks_needs_no_copy() {
    let mut bench = Bench::new(config());
    bench.submit(forked(text(1, 9), &[2]));
    bench.step();
    let plan = bench.step();
    assert_eq!(admissions(&plan), [(2, 1, 8, vec![0, 1])]);
    assert_eq!((copies(&plan), plan.chunks[1].new_blocks.len()), (vec![], 1));
}

#[test]
fn a_prompt_of_one_token_is_nothing_to_share() {
    let mut bench = Bench::new(config());
    bench.submit(forked(text(1, 1), &[2]));
    bench.step();
    let plan = bench.step();
    assert_eq!(admissions(&plan), [(2, 1, 0, vec![])]);
    assert_eq!(chunks(&plan), [(1, 1, 1, 1), (2, 0, 1, 1)]);
}

#[test]
fn the_prompt_outlives_who_computed_it_and_is_let_go_with_the_last_fork() {
    let mut bench = Bench::new(SchedulerConfig { max_step_sequences: 1, ..config() });
    bench.submit(forked(NewSequence { max_new_tokens: 1, ..text(1, 10) }, &[2, 3]));
    bench.step();
    let second = bench.step();
    assert_eq!((ids(&second.releases), admissions(&second)), (vec![1], vec![(2, 1, 9, vec![0, 1, 3])]));
    let third = bench.step();
    assert_eq!((ids(&third.releases), admissions(&third).len()), (vec![2], 1));
    assert_eq!((third.admissions[0].num_computed_tokens, copies(&third).len()), (9, 1));
    assert_eq!(ids(&bench.step().releases), [3]);
    assert_eq!(bench.0.stats().kv_held, 0);
}

#[test]
fn the_features_of_a_prompt_are_kept_with_it() {
    let mut bench = Bench::new(SchedulerConfig { max_step_sequences: 1, ..config() });
    bench.submit(forked(NewSequence { max_new_tokens: 1, ..picture(1, 1, 0, 9, 1) }, &[2]));
    bench.step();
    assert_eq!(chunks(&bench.step()), [(1, 7, 3, 1)]);
    bench.submit(NewSequence { priority: 1, ..picture(6, 2, 0, 8, 1) });
    let plan = bench.step();
    assert_eq!(plan.evictions, [], "the fork may have to be computed again");
    assert_eq!((ids(&plan.releases), admissions(&plan)[0].0), (vec![1], 2));
}

#[test]
fn the_first_fork_follows_a_leader_that_left_too_early() {
    let mut bench = Bench::new(config());
    bench.submit(forked(text(1, 22), &[2, 3]));
    bench.step();
    bench.0.cancel(SeqId(1));
    let plan = bench.step();
    assert_eq!((ids(&plan.releases), admissions(&plan)), (vec![1], vec![(2, 1, 0, vec![])]));
    assert_eq!(chunks(&plan), [(2, 0, 16, 0)]);
    bench.step();
    let third = bench.step();
    assert_eq!((admissions(&third)[0].0, chunks(&third)), (3, vec![(2, 22, 1, 1), (3, 21, 1, 1)]));
}

#[test]
fn forks_that_wait_are_in_nobodys_way() {
    let mut bench = Bench::new(config());
    bench.submit(forked(text(1, 22), &[2]));
    bench.submit(text(3, 3));
    bench.step();
    assert_eq!(chunks(&bench.step()), [(1, 16, 6, 1), (3, 0, 3, 1)]);
}

#[test]
fn a_prompt_is_given_up_where_its_blocks_are_needed() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 3, max_step_sequences: 1, ..config() });
    bench.submit(forked(text(1, 10), &[2, 3]));
    // The first takes all blocks until it has as many tokens as there can be.
    bench.step();
    bench.step();
    let plan = bench.step();
    assert_eq!((ids(&plan.releases), admissions(&plan)), (vec![1], vec![(2, 1, 0, vec![])]));
    bench.step();
    assert_eq!(admissions(&bench.step()), [(3, 2, 0, vec![])]);
}

#[test]
fn a_kept_prompt_goes_before_a_running_sequence_loses_its_blocks() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 6, max_step_sequences: 2, ..config() });
    bench.submit(text(1, 3));
    bench.submit(forked(NewSequence { max_new_tokens: 1, ..text(2, 10) }, &[3]));
    bench.step();
    // Three of six blocks are kept, two are the first sequence's; the fork needs another, which a better sequence takes.
    bench.submit(NewSequence { priority: 1, ..text(4, 4) });
    let plan = bench.step();
    assert_eq!(admissions(&plan)[0].0, 4);
    for _ in 0..4 {
        bench.step();
    }
    assert_eq!(bench.0.stats().totals.preemptions, 0);
}

#[test]
fn a_fork_that_loses_its_blocks_is_computed_again_by_itself() {
    let mut bench = Bench::new(SchedulerConfig { kv_blocks: 4, ..config() });
    bench.submit(forked(text(1, 6), &[2]));
    bench.step();
    let second = bench.step();
    assert_eq!((admissions(&second), copies(&second)), (vec![(2, 1, 5, vec![0, 2])], vec![(1, 2)]));
    // Block 0 is shared, and each has one of its own. The first takes the fourth, so that the other pauses, and then that one's.
    let plan = (0..9).map(|_| bench.step()).find(|plan| !plan.releases.is_empty()).expect("too few blocks");
    assert_eq!((ids(&plan.releases), chunks(&plan)), (vec![2], vec![(1, 12, 1, 1)]));
    bench.0.cancel(SeqId(1));
    let again = bench.step();
    assert_eq!((admissions(&again), chunks(&again)), (vec![(2, 1, 0, vec![])], vec![(2, 0, 9, 1)]));
}

#[test]
fn cancelling_all_answers_frees_all() {
    for begun in 0..4 {
        let mut bench = Bench::new(config());
        bench.submit(forked(picture(1, 9, 3, 8, 4), &[2, 3]));
        (0..begun).for_each(|_| drop(bench.step()));
        // In any order.
        [[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 3, 2]][begun].iter().for_each(|id| bench.0.cancel(SeqId(*id)));
        bench.0.check_conservation();
        while let Some(plan) = bench.0.schedule(Millis(3)) {
            assert_eq!(chunks(&plan), []);
            bench.answer(&plan, 7);
        }
        let stats = bench.0.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv_held, stats.features_held), (0, 0, 0, 0));
    }
}

#[test]
fn forks_count_in_the_queue() {
    let mut bench = Bench::new(SchedulerConfig { max_waiting: 3, ..config() });
    let refused = bench.0.submit(Millis(0), forked(text(1, 4), &[2, 3, 4])).unwrap_err();
    assert_eq!(refused, SubmitError::TooManyForks { sequences: 4, max_waiting: 3 });
    for twice in [[1, 2], [2, 2]] {
        let refused = bench.0.submit(Millis(0), forked(text(1, 4), &twice)).unwrap_err();
        assert_eq!(refused, SubmitError::DuplicateId(SeqId(twice[0])));
    }
    bench.submit(forked(text(1, 4), &[2]));
    let refused = bench.0.submit(Millis(0), forked(text(3, 4), &[4])).unwrap_err();
    assert_eq!(refused, SubmitError::QueueFull { waiting: 2, max_waiting: 3 });
    bench.submit(text(3, 4));
}
