//! The state without a device: what wrong steps say, and what right ones lay out.

use super::*;
use crate::{
    model::positions::PositionGeometry,
    runner::step::{MediaSpan, Sampling},
};

const LIMITS: Limits = Limits {
    sequence: SequenceLimits {
        vocab_size: 100,
        max_context_tokens: 96,
        geometry: PositionGeometry { merge_size: 2, tokens_per_second: 2.0 },
    },
    max_step_tokens: 48,
    max_step_sequences: 2,
    max_frame_patches: 64,
    vision_stages: 3,
    kv_blocks: 8,
    feature_blocks: 2,
    patch_size: 14,
    temporal_patch_size: 2,
};
const HASH: MediaHash = MediaHash([7; 32]);
const GRID: Grid = Grid { t: 1, h: 4, w: 4 };
const FRAME_BYTES: usize = 16 * 14 * 14 * 3;

fn admission(id: u64, num_tokens: usize) -> Admission {
    Admission {
        id: SeqId(id),
        token_ids: (0..num_tokens as u32).collect(),
        num_prompt_tokens: num_tokens,
        media: Vec::new(),
        sampling: Sampling { seed: 1, ..Sampling::default() },
        num_computed_tokens: 0,
        blocks: Vec::new(),
    }
}

fn chunk(id: u64, start: usize, length: usize, new_blocks: &[u32], max_new_tokens: usize) -> Chunk {
    Chunk { id: SeqId(id), start, length, new_blocks: new_blocks.to_vec(), max_new_tokens }
}

/// All of encoding a medium of [`GRID`].
fn encode(feature_blocks: &[u32]) -> Encode {
    Encode { hash: HASH, feature_blocks: feature_blocks.to_vec(), from: 0, to: 12 }
}

/// A state with sequences 1 and 2, of 40 tokens each.
fn state() -> State {
    let mut state = State::new(LIMITS);
    state.admit(vec![admission(1, 40), admission(2, 40)]).unwrap();
    state
}

fn words<T>(result: Result<T, StepError>) -> String {
    result.err().expect("a wrong step").to_string()
}

#[test]
fn chunks_become_rows_one_after_the_other() {
    let mut state = state();
    let chunks = [chunk(2, 0, 34, &[5, 3], 0), chunk(1, 0, 3, &[0], 0)];
    let StepBatch { batch, draws } = state.batch(&chunks).unwrap();
    assert_eq!(batch.token_ids.len(), 37);
    assert_eq!(batch.slots[31..35], [5 * 32 + 31, 3 * 32, 3 * 32 + 1, 0]);
    assert_eq!((batch.sample_rows, draws), (vec![33, 36], vec![]));
    assert_eq!(batch.sequences[1].rows, 34..37);
    state.commit(&chunks);

    let chunks = [chunk(1, 3, 1, &[], 0), chunk(2, 34, 6, &[], 1)];
    let StepBatch { batch, draws } = state.batch(&chunks).unwrap();
    assert_eq!(batch.positions[0], [3; 3]);
    assert_eq!(batch.sequences[1].num_computed_tokens, 34);
    assert_eq!((batch.sample_rows, draws), (vec![0, 6], vec![1]));
    state.commit(&chunks);
    let before = state.row_sampling(SeqId(2)).noise_key;
    state.push(SeqId(2), 99);
    assert_ne!(state.row_sampling(SeqId(2)).noise_key, before);
    let StepBatch { batch, .. } = state.batch(&[chunk(2, 40, 1, &[], 1)]).unwrap();
    assert_eq!(batch.token_ids, [99]);
}

#[test]
fn wrong_chunks_are_refused_by_field() {
    let refused = |chunks: &[Chunk]| words(state().batch(chunks));
    assert_eq!(refused(&[chunk(3, 0, 1, &[0], 0)]), "chunks[0].sequence_id: sequence 3 is unknown");
    assert_eq!(refused(&[chunk(1, 1, 1, &[0], 0)]), "chunks[0].start: is 1, must be 0");
    assert_eq!(refused(&[chunk(1, 0, 0, &[0], 0)]), "chunks[0].length: has 0, needs 1 to 40");
    assert_eq!(refused(&[chunk(1, 0, 41, &[0, 1], 0)]), "chunks[0].length: has 41, needs 1 to 40");
    assert_eq!(
        refused(&[chunk(1, 0, usize::MAX, &[0], 0)]),
        format!("chunks[0].length: has {}, needs 1 to 40", usize::MAX)
    );
    assert_eq!(refused(&[chunk(1, 0, 33, &[0], 0)]), "chunks[0].new_blocks: has 1, needs 2 to 3");
    assert_eq!(refused(&[chunk(1, 0, 33, &[0, 1, 2, 3], 0)]), "chunks[0].new_blocks: has 4, needs 2 to 3");
    assert_eq!(refused(&[chunk(1, 0, 33, &[0, 8], 0)]), "chunks[0].new_blocks[1]: 8 is not below 8");
    assert_eq!(refused(&[chunk(1, 0, 39, &[0, 1], 1)]), "chunks[0].max_new_tokens: has 1, needs 0 to 0");
    assert_eq!(refused(&[chunk(1, 0, 40, &[0, 1], 2)]), "chunks[0].max_new_tokens: has 2, needs 0 to 1");
    let twice = [chunk(1, 0, 1, &[0], 0), chunk(1, 1, 1, &[], 0)];
    assert_eq!(refused(&twice), "chunks[1].sequence_id: sequence 1 occurs twice");
    let long = [chunk(1, 0, 40, &[0, 1], 1), chunk(2, 0, 9, &[2], 0)];
    assert_eq!(refused(&long), "chunks[1].length: has 9, needs 1 to 8");
    let many = [chunk(1, 0, 1, &[0], 0), chunk(2, 0, 1, &[1], 0), chunk(3, 0, 1, &[2], 0)];
    assert_eq!(refused(&many), "chunks: has 3, needs 0 to 2");
}

#[test]
fn a_block_has_one_owner_until_it_leaves() {
    let refused = |chunks: &[Chunk]| words(state().batch(chunks));
    let to_one = refused(&[chunk(1, 0, 33, &[5, 5], 0)]);
    assert_eq!(to_one, "chunks[0].new_blocks[1]: block 5 is taken");
    let to_two = refused(&[chunk(1, 0, 33, &[5, 6], 0), chunk(2, 0, 1, &[6], 0)]);
    assert_eq!(to_two, "chunks[1].new_blocks[0]: block 6 is taken");

    let chunks = [chunk(1, 0, 33, &[5, 6], 0)];
    let taken = || {
        let mut state = state();
        state.batch(&chunks).unwrap();
        state.commit(&chunks);
        state
    };
    // In a later step, to the same sequence and to another one.
    let grown = [chunk(1, 33, 7, &[5], 0)];
    assert_eq!(words(taken().batch(&grown)), "chunks[0].new_blocks[0]: block 5 is taken");
    let other = [chunk(2, 0, 40, &[0, 5], 1)];
    assert_eq!(words(taken().batch(&other)), "chunks[0].new_blocks[1]: block 5 is taken");
    let mut state = taken();
    state.forget(&Step { releases: vec![SeqId(1)], ..Step::default() }, |_| false).unwrap();
    state.batch(&other).unwrap();
    state.commit(&other);
    state.push(SeqId(2), 1);
    let later = [chunk(2, 40, 1, &[5], 0)];
    assert_eq!(words(state.batch(&later)), "chunks[0].new_blocks[0]: block 5 is taken");
}

#[test]
fn no_token_is_drawn_past_the_context() {
    let mut state = State::new(LIMITS);
    state.admit(vec![admission(1, 96)]).unwrap();
    for (start, length, blocks) in [(0, 48, &[0, 1][..]), (48, 47, &[2])] {
        let chunks = [chunk(1, start, length, blocks, 0)];
        state.batch(&chunks).unwrap();
        state.commit(&chunks);
    }
    assert_eq!(
        words(state.batch(&[chunk(1, 95, 1, &[], 1)])),
        "chunks[0].max_new_tokens: has 1, needs 0 to 0"
    );
}

#[test]
fn tokens_of_media_take_features() {
    let mut state = State::new(LIMITS);
    let span = MediaSpan { hash: HASH, first_token: 3, grid: GRID, seconds_per_grid_t: None };
    state.admit(vec![Admission { media: vec![span], ..admission(1, 12) }]).unwrap();
    let early = words(state.batch(&[chunk(1, 0, 4, &[0], 0)]));
    assert_eq!(early, "chunks[0]: medium 070707070707 is not encoded");

    let half = Encode { to: 6, ..encode(&[1]) };
    let piece = state.encode(0, half, Some((GRID, FRAME_BYTES))).unwrap();
    assert_eq!((piece.work.clone(), piece.frame_tokens, piece.is_last), (0..6, 4, false));
    assert_eq!(state.frame_slots(&piece, 0), [64, 65, 66, 67]);
    let early = words(state.batch(&[chunk(1, 0, 4, &[1], 0)]));
    assert_eq!(early, "chunks[0]: medium 070707070707 is not encoded", "half of it is");
    let piece = state.encode(0, Encode { from: 6, ..encode(&[]) }, None).unwrap();
    assert_eq!((piece.work, piece.is_last), (6..12, true));
    let mut fresh = State::new(LIMITS);
    std::mem::swap(&mut fresh.features, &mut state.features);
    let span = MediaSpan { hash: HASH, first_token: 3, grid: GRID, seconds_per_grid_t: None };
    fresh.admit(vec![Admission { media: vec![span], ..admission(1, 12) }]).unwrap();
    let first = [chunk(1, 0, 5, &[0], 0)];
    let StepBatch { batch, .. } = fresh.batch(&first).unwrap();
    assert_eq!(batch.features, [(3, 64), (4, 65)]);
    assert_eq!(batch.positions[3..5], [[3, 3, 3], [3, 3, 4]]);
    fresh.commit(&first);
    let StepBatch { batch, .. } = fresh.batch(&[chunk(1, 5, 7, &[], 1)]).unwrap();
    assert_eq!(batch.features, [(0, 66), (1, 67)]);
    assert_eq!(batch.positions[2], [5; 3]);
}

#[test]
fn wrong_media_are_refused_by_field() {
    let refused = |blocks: &[u32], grid: Grid, bytes: usize| {
        words(state().encode(1, encode(blocks), Some((grid, bytes))))
    };
    assert_eq!(refused(&[], GRID, FRAME_BYTES), "encodes[1].feature_blocks: has 0, needs 1 to 1");
    assert_eq!(refused(&[2], GRID, FRAME_BYTES), "encodes[1].feature_blocks: 2 is not below 2");
    assert!(refused(&[0], GRID, FRAME_BYTES - 1).starts_with("encodes[1].hash: is 9407, must be 18816"));
    assert_eq!(refused(&[0], GRID, 3 * FRAME_BYTES), "encodes[1].hash: has 3, needs 1 to 2");
    assert_eq!(refused(&[0], GRID, 0), "encodes[1].hash: has 0, needs 1 to 2");
    assert!(refused(&[0], Grid { h: 3, ..GRID }, FRAME_BYTES).contains("no multiple of the merge size 2"));
    assert_eq!(refused(&[0], Grid { h: 20, ..GRID }, FRAME_BYTES), "encodes[1].hash: 80 is not below 65");
    assert_eq!(refused(&[0], Grid { t: 40, ..GRID }, FRAME_BYTES), "encodes[1].hash: 640 is not below 513");
    assert!(refused(&[0], Grid { t: u32::MAX, h: u32::MAX, w: u32::MAX }, 1).contains("is not below 65"));
}

#[test]
fn one_medium_is_in_work_at_a_time_and_its_pieces_come_in_order() {
    let other = MediaHash([8; 32]);
    let waiting = Some((GRID, FRAME_BYTES));
    let begun = || {
        let mut state = state();
        state.encode(0, Encode { to: 5, ..encode(&[0]) }, waiting).unwrap();
        state
    };
    let refused = |encode: Encode| words(begun().encode(0, encode, waiting));
    let next = |from, to| Encode { from, to, ..encode(&[]) };
    assert_eq!(refused(encode(&[1])), "encodes[0].hash: medium 070707070707 is still in work");
    let of_other = Encode { hash: other, ..encode(&[1]) };
    assert_eq!(refused(of_other.clone()), "encodes[0].hash: medium 070707070707 is still in work");
    assert_eq!(
        refused(Encode { hash: other, ..next(5, 6) }),
        "encodes[0].hash: medium 080808080808 is not in work"
    );
    assert_eq!(refused(next(4, 6)), "encodes[0].from: is 4, must be 5");
    assert_eq!(refused(next(5, 5)), "encodes[0].to: has 5, needs 6 to 12");
    assert_eq!(refused(next(5, 13)), "encodes[0].to: has 13, needs 6 to 12");
    let blocks = Encode { feature_blocks: vec![1], ..next(5, 6) };
    assert_eq!(refused(blocks), "encodes[0].feature_blocks: has 1, needs 0 to 0");

    // What is given up leaves nothing: neither its place nor its blocks.
    let mut state = begun();
    state.forget(&Step { evictions: vec![HASH], ..Step::default() }, |_| true).unwrap();
    assert_eq!(
        words(state.encode(0, next(5, 6), waiting)),
        "encodes[0].hash: medium 070707070707 is not in work"
    );
    state.encode(0, Encode { hash: other, ..encode(&[0]) }, waiting).unwrap();
    assert_eq!(
        words(state.encode(0, of_other, waiting)),
        "encodes[0].hash: medium 080808080808 is encoded already"
    );
    state.encode(0, encode(&[1]), waiting).unwrap();
    assert_eq!(
        words(state.encode(0, encode(&[1]), None)),
        "encodes[0].hash: medium 070707070707 is encoded already"
    );
    state.forget(&Step { evictions: vec![HASH], ..Step::default() }, |_| false).unwrap();
    assert_eq!(words(state.encode(0, encode(&[1]), None)), "encodes[0].hash: medium 070707070707 is unknown");
}

#[test]
fn what_leaves_is_forgotten() {
    let mut state = state();
    let forget = |state: &mut State, step: Step| state.forget(&step, |hash| *hash == MediaHash([1; 32]));
    let release = Step { releases: vec![SeqId(1), SeqId(1)], ..Step::default() };
    assert_eq!(words(forget(&mut state, release)), "releases[1]: sequence 1 is unknown");
    let evict = Step { evictions: vec![MediaHash([1; 32]), HASH], ..Step::default() };
    assert_eq!(words(forget(&mut state, evict)), "evictions[1]: medium 070707070707 is unknown");
    assert_eq!(
        words(state.admit(vec![admission(2, 3)])),
        "admissions[0].sequence_id: sequence 2 occurs twice"
    );

    let chunks = [chunk(2, 0, 40, &[4, 5], 1)];
    state.batch(&chunks).unwrap();
    state.commit(&chunks);
    state.push(SeqId(2), 50);
    // As one that is preempted: it enters again with what it drew, and nothing of it is computed.
    forget(&mut state, Step { releases: vec![SeqId(2)], ..Step::default() }).unwrap();
    assert_eq!(state.lengths().count(), 0);
    let again = Admission { token_ids: (0..40).chain([50]).collect(), ..admission(2, 40) };
    state.admit(vec![again]).unwrap();
    assert_eq!(state.lengths().collect::<Vec<_>>(), [[2, 41, 0]]);
    let StepBatch { batch, draws } = state.batch(&[chunk(2, 0, 41, &[1, 2], 1)]).unwrap();
    assert_eq!((batch.token_ids[40], batch.slots[40], draws), (50, 72, vec![0]));
}

/// Sequence 2 of `state` enters again as a fork of sequence 1, which has computed its 40 tokens in blocks 4 and 5.
fn fork(num_computed_tokens: usize, blocks: &[u32]) -> Admission {
    Admission { num_computed_tokens, blocks: blocks.to_vec(), ..admission(3, 40) }
}

fn computed() -> State {
    let mut state = state();
    let chunks = [chunk(1, 0, 40, &[4, 5], 1)];
    state.batch(&chunks).unwrap();
    state.commit(&chunks);
    state.push(SeqId(1), 7);
    state
}

#[test]
fn a_fork_shares_full_blocks_and_has_a_copy_of_the_last() {
    let mut state = computed();
    state.admit(vec![fork(39, &[4, 0])]).unwrap();
    state.copy(&[(5, 0)]).unwrap();
    let chunks = [chunk(1, 40, 1, &[], 1), chunk(3, 39, 1, &[], 1)];
    let StepBatch { batch, .. } = state.batch(&chunks).unwrap();
    assert_eq!(batch.slots, [5 * 32 + 8, 7]);
    assert_eq!(batch.sequences[1].block_table, [4, 0]);
    assert_eq!((batch.token_ids[1], batch.positions[1]), (39, [39; 3]));
    state.commit(&chunks);
    assert_eq!(state.lengths().last(), Some([3, 40, 40]));
    // Block 4 is the fork's when the other one has left, and nobody's when both have.
    let release = |id| Step { releases: vec![SeqId(id)], ..Step::default() };
    state.forget(&release(1), |_| false).unwrap();
    let other = [chunk(2, 0, 1, &[4], 0)];
    assert_eq!(words(state.batch(&other)), "chunks[0].new_blocks[0]: block 4 is taken");
    state.forget(&release(3), |_| false).unwrap();
    state.batch(&other).unwrap();
}

#[test]
fn wrong_forks_are_refused_by_field() {
    let refused = |fork| words(computed().admit(vec![fork]));
    assert_eq!(refused(fork(32, &[8])), "admissions[0].blocks[0]: 8 is not below 8");
    let empty = "admissions[0].blocks[0]: block 3 has keys and values of 0 tokens, needs 32";
    assert_eq!(refused(fork(32, &[3])), empty);
    assert_eq!(refused(fork(33, &[4, 5])), "admissions[0].blocks[1]: block 5 is taken");
    assert_eq!(refused(fork(40, &[4, 0])), "admissions[0].num_computed_tokens: has 40, needs 0 to 39");
    assert_eq!(refused(fork(39, &[4])), "admissions[0].blocks: has 1, needs 2 to 2");

    let forked = |copies: &[(u32, u32)]| {
        let mut state = computed();
        state.admit(vec![fork(39, &[4, 0])])?;
        state.copy(copies)?;
        state.batch(&[chunk(3, 39, 1, &[], 1)]).map(|_| ())
    };
    let missing = "chunks[0]: block 0 has keys and values of 0 tokens, needs 7";
    assert_eq!(words(forked(&[])), missing);
    assert_eq!(words(forked(&[(5, 1)])), "copies[0].target: block 1 is free");
    assert_eq!(words(forked(&[(5, 4)])), "copies[0].target: block 4 is shared");
    assert_eq!(
        words(forked(&[(2, 0)])),
        "copies[0].source: block 2 has keys and values of 0 tokens, needs 1"
    );
    forked(&[(5, 0)]).unwrap();

    // A sequence that computed tokens again in the same blocks would write what its fork reads.
    let mut state = computed();
    state.admit(vec![fork(32, &[4])]).unwrap();
    let sequence = state.sequences.get_mut(&SeqId(1)).expect("there");
    sequence.num_computed_tokens = 31;
    assert_eq!(words(state.batch(&[chunk(1, 31, 1, &[], 0)])), "chunks[0]: block 4 is shared");
}
