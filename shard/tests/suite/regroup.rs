//! Ranks whose group falls apart at any moment of their work go on in another one as if they had just been loaded.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use lockstep_shard::{
    collective::{DEFAULT_SLOT_BYTES, SharedMemory},
    device::{DType, DeviceError},
    runner::{Step, StepError, StepResult},
    service::{gate::Gate, load, worker::LoadEvent},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::common::{Group, Request, Script, TokenBits, bits, json, request, run_steps};

const CHECKPOINT: &str = "tests/checkpoints/a";
const ROUNDS: u64 = 30;

/// Text, and pictures of many windows.
fn requests() -> Vec<Request> {
    let golden = json("tests/goldens/a.json");
    let cases = golden["cases"].as_array().unwrap().iter();
    let wanted = |name: &str| ["text_unicode", "many_windows"].contains(&name);
    cases
        .filter(|case| wanted(case["name"].as_str().unwrap()))
        .map(|case| request(CHECKPOINT, case))
        .collect()
}

fn drawn(results: &[StepResult]) -> Vec<TokenBits> {
    results.iter().flat_map(|result| &result.sampled).flat_map(|sampled| bits(&sampled.tokens)).collect()
}

fn path(folder: &Path, epoch: u64) -> PathBuf {
    folder.join(epoch.to_string())
}

/// Runs `steps` again and again on ranks that lose each other at random moments, at last undisturbed. Tells what that last run
/// drew, and how often a run was cut short.
fn run_through_losses(
    group: &Group,
    requests: &[Request],
    steps: &[Step],
    rng: &mut SmallRng,
    longest: Duration,
) -> (Vec<TokenBits>, usize) {
    let folder = tempfile::tempdir().unwrap();
    for epoch in 1..=ROUNDS + 1 {
        SharedMemory::create(&path(folder.path(), epoch), group.world_size, DEFAULT_SLOT_BYTES).unwrap();
    }
    let options = |rank| group.options(rank, path(folder.path(), 1));
    let gates: Vec<Arc<Gate>> = (0..group.world_size).map(|_| Gate::new(1, group.threads)).collect();
    let together = Barrier::new(group.world_size + 1);
    let (losses, last) = (Mutex::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for (rank, gate) in gates.iter().enumerate() {
            let (options, folder, together) = (options(rank), folder.path(), &together);
            let (losses, last) = (&losses, &last);
            scope.spawn(move || {
                let mut loaded = load::load(&options, gate, &mut |_| ()).unwrap();
                for epoch in 1..=ROUNDS {
                    together.wait();
                    if let Err(error) = run_steps(&mut loaded, requests, steps) {
                        assert!(matches!(error, StepError::Device(DeviceError::GroupLost)), "{error}");
                        *losses.lock().unwrap() += 1;
                    }
                    together.wait();
                    loaded.rank.regroup(epoch + 1, &path(folder, epoch + 1)).unwrap();
                    let pictures = requests.iter().flat_map(|request| &request.pictures);
                    assert!(pictures.into_iter().all(|picture| loaded.media.shape(&picture.hash).is_none()));
                }
                let results = run_steps(&mut loaded, requests, steps).unwrap();
                last.lock().unwrap().push(drawn(&results));
            });
        }
        for epoch in 1..=ROUNDS {
            together.wait();
            thread::sleep(longest.mul_f64(rng.random_range(0.0..1.0)));
            // One after the other, as calls come: the first one ends the step of all.
            let first = rng.random_range(0..gates.len());
            for gate in gates.iter().cycle().skip(first).take(gates.len()) {
                gate.ask(epoch + 1).unwrap();
            }
            together.wait();
        }
    });
    let mut last = last.into_inner().unwrap();
    assert!(last.iter().all(|drawn| *drawn == last[0]));
    (last.swap_remove(0), losses.into_inner().unwrap())
}

#[test]
fn a_group_that_was_lost_at_any_moment_draws_the_same_bits() {
    let mut rng = SmallRng::seed_from_u64(4);
    let requests = requests();
    assert_eq!(requests.len(), 2);
    for (dtype, world_size, threads) in [(DType::F32, 1, 2), (DType::Bf16, 2, 1), (DType::F32, 3, 2)] {
        let group = Group { threads, ..Group::new(CHECKPOINT, world_size, dtype) };
        let script = Script { chunk: 64, new_tokens: 8 };
        let steps = script.steps(&group, &requests);
        let started = Instant::now();
        let expected = drawn(&group.run(&requests, &steps));
        let longest = started.elapsed();
        let (found, losses) = run_through_losses(&group, &requests, &steps, &mut rng, longest);
        assert_eq!(found, expected, "{dtype:?}, world size {world_size}");
        assert!(losses > 0, "no run was cut short");
    }
}

#[test]
fn progress_is_seen_within_a_step_and_while_loading() {
    let group = Group::new(CHECKPOINT, 1, DType::F32);
    let gate = Gate::new(1, 1);
    let requests = requests();
    let mut seen = Vec::new();
    let mut tell = |event| {
        if matches!(event, LoadEvent::Progress { .. }) {
            seen.push(gate.reached().work_pieces);
        }
    };
    let mut loaded = load::load(&group.options(0, PathBuf::new()), &gate, &mut tell).unwrap();
    let before = gate.reached();
    // More than one for each tensor: a large one is many pieces.
    assert!(seen.last().is_some_and(|pieces| *pieces > 100), "{seen:?}");
    assert_eq!((before.epoch, before.collectives, before.steps), (1, 2, 0));

    let steps = Script { chunk: 4096, new_tokens: 1 }.steps(&group, &requests);
    run_steps(&mut loaded, &requests, &steps).unwrap();
    let after = gate.reached();
    // Two reductions and four linear layers for each block of the text, and more for each of vision.
    assert!(after.collectives >= 10 && after.work_pieces > before.work_pieces + 200, "{before:?}, {after:?}");
}
