//! The model on CPU ranks, against the reference's answers in `tests/goldens`.

mod ranks;

use lockstep_shard::device::DType;
use lockstep_shard::model::Drawn;
use ranks::{Case, Goldens, Rank, on_ranks, repository};

fn ids(answer: &[Drawn]) -> Vec<u32> {
    answer.iter().map(|one| one.token_id).collect()
}

/// The largest difference of the log-probabilities of an answer from the reference's.
fn error(answer: &[Drawn], case: &Case) -> f32 {
    let first = &case.first_logprobs;
    let of_first = first.ids.iter().zip(&first.logprobs).map(|(id, expected)| {
        let found = answer[0].top.iter().find(|(other, _)| other == id);
        (found.unwrap_or_else(|| panic!("{}: token {id} is missing", case.name)).1 - expected).abs()
    });
    let of_chosen = answer
        .iter()
        .zip(&case.logprobs)
        .map(|(one, expected)| (one.logprob.expect("asked for") - expected).abs());
    of_first.chain(of_chosen).fold(0.0, f32::max)
}

fn check_f32(rank: &mut Rank, goldens: &Goldens, world_size: usize) {
    for case in &goldens.cases {
        let what = format!("{}, {}, {world_size} ranks", goldens.checkpoint, case.name);
        let prompt = case.prompt();
        let answer = rank.answer(&prompt, case.greedy.len(), 1.0, None);
        assert_eq!(ids(&answer), case.greedy, "{what}");
        let error = error(&answer, case);
        assert!(error < 1e-4, "{what}: log-probabilities differ by {error}");
        let penalized = rank.answer(&prompt, case.greedy_rp.len(), 1.3, None);
        assert_eq!(ids(&penalized), case.greedy_rp, "{what}, with a repetition penalty");
    }
}

fn is_the_reference(name: &str) {
    let goldens = Goldens::read(name);
    assert!(!goldens.cases.is_empty());
    for world_size in 1..=8 {
        on_ranks(&repository(&goldens.checkpoint), world_size, DType::F32, |rank| {
            check_f32(rank, &goldens, world_size);
        });
    }
}

#[test]
fn a_is_the_reference_at_every_world_size() {
    is_the_reference("a");
}

#[test]
fn b_is_the_reference_at_every_world_size() {
    is_the_reference("b");
}

#[test]
fn c_is_the_reference_at_every_world_size() {
    is_the_reference("c");
}

#[test]
fn d_is_the_reference_at_every_world_size() {
    is_the_reference("d");
}

#[test]
fn e_is_the_reference_at_every_world_size() {
    is_the_reference("e");
}

/// The reference's tokens, forced: the error from its f32 is at most twice what its own bf16 has.
#[test]
fn bf16_is_about_as_exact_as_the_reference() {
    for name in ["a", "b", "c", "d", "e"] {
        let goldens = Goldens::read(name);
        for world_size in [1, 3] {
            on_ranks(&repository(&goldens.checkpoint), world_size, DType::Bf16, |rank| {
                for case in &goldens.cases {
                    let answer = rank.answer(&case.prompt(), case.greedy.len(), 1.0, Some(&case.greedy));
                    let (error, bound) = (error(&answer, case), 2.0 * case.full_bf16_max_error);
                    assert!(error <= bound, "{name}, {}, {world_size} ranks: {error} > {bound}", case.name);
                }
            });
        }
    }
}
