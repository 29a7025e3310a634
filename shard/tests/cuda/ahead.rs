//! Steps that are begun before the one before is told.

use lockstep_shard::{
    runner::{Step, StepResult},
    service::{gate::Gate, gpu::Sums, load, worker::Loaded},
};

use super::{
    common::{Request, Script, bits, run_steps},
    requests::{on_gpus, requests},
};

fn loaded(group: &super::common::Group) -> Loaded {
    let options = group.options(0, Default::default());
    load::load(&options, &Gate::new(options.epoch, options.threads), &mut |_| ()).unwrap()
}

/// Runs steps as far ahead as the rank can. Returns how many were begun before the one before was told, too.
fn run_ahead(loaded: &mut Loaded, requests: &[Request], steps: &[Step]) -> (Vec<StepResult>, usize) {
    run_ahead_where(loaded, requests, steps, || true)
}

/// The same, but ahead of a step only where it `wants` to be.
pub fn run_ahead_where(
    loaded: &mut Loaded,
    requests: &[Request],
    steps: &[Step],
    mut wants: impl FnMut() -> bool,
) -> (Vec<StepResult>, usize) {
    // What encodes pictures cannot be ahead of anything.
    let first = steps.iter().rposition(|step| !step.encodes.is_empty()).map_or(0, |last| last + 1);
    let mut results = run_steps(loaded, requests, &steps[..first]).unwrap();
    let rank = loaded.rank.ahead().expect("a rank of a model");
    let (mut under_way, mut ahead) = (0, 0);
    for step in &steps[first..] {
        let is_ahead = under_way > 0 && rank.may_begin(step) && wants();
        if under_way > 0 && !is_ahead {
            results.push(rank.finish().unwrap());
            under_way -= 1;
        }
        rank.begin(step.clone()).unwrap();
        under_way += 1;
        if is_ahead {
            results.push(rank.finish().unwrap());
            (under_way, ahead) = (under_way - 1, ahead + 1);
        }
    }
    results.extend((0..under_way).map(|_| rank.finish().unwrap()));
    (results, ahead)
}

#[test]
fn tokens_that_the_gpu_takes_itself_are_those_that_the_host_would_give_it() {
    let mut requests = requests(3);
    requests[0].sampling.temperature = Some(0.8);
    let group = on_gpus(1, Sums::Host);
    let steps = Script { chunk: 40, new_tokens: 8 }.steps(&group, &requests);
    let told = run_steps(&mut loaded(&group), &requests, &steps).unwrap();
    let (ahead, num_ahead) = run_ahead(&mut loaded(&group), &requests, &steps);
    assert!(num_ahead >= 6, "{num_ahead} steps are begun before the one before is told");
    assert_eq!(ahead.len(), told.len());
    for (i, (ahead, told)) in ahead.iter().zip(&told).enumerate() {
        assert_eq!(ahead.state_hash, told.state_hash, "step {i}");
        for (ahead, told) in ahead.sampled.iter().zip(&told.sampled) {
            assert_eq!((ahead.id, bits(&ahead.tokens)), (told.id, bits(&told.tokens)), "step {i}");
        }
    }
}

/// A penalty looks at the tokens that were drawn, and a truncation may look at all logits: their steps wait.
#[test]
fn what_needs_the_tokens_waits_for_them() {
    let group = on_gpus(1, Sums::Host);
    let mut requests = requests(1);
    requests[0].sampling.repetition_penalty = 1.2;
    let steps = Script { chunk: 40, new_tokens: 4 }.steps(&group, &requests);
    let told = run_steps(&mut loaded(&group), &requests, &steps).unwrap();
    let (same, num_ahead) = run_ahead(&mut loaded(&group), &requests, &steps);
    assert_eq!(num_ahead, 0);
    let hashes = |results: &[StepResult]| results.iter().map(|result| result.state_hash).collect::<Vec<_>>();
    assert_eq!(hashes(&same), hashes(&told));
}
