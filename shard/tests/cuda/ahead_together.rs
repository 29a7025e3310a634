//! Ranks that begin a step before the one before is told, each when it likes: their GPUs agree on tokens.

use std::{
    env, thread,
    time::{Duration, Instant},
};

use lockstep_shard::{
    device::{Candidate, DType, Device, DeviceError, HostElements, HostMatrix, RowSampling, Told},
    runner::StepError,
    service::{gate::Gate, gpu::Sums, load},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    ahead::run_ahead_where,
    common::{Group, Request, Script, run_steps, token_ids},
    gpu,
    peers::{REPEATABLE, WITHOUT_NCCL, all_end_well, drawn, group, leave_together, part, start},
    processes::{Place, Process, say, wait_for_word},
    requests::{CHECKPOINT, on_gpus, requests},
};

/// Set where the last request, which begins to draw later than another one, asks for more tokens beside each than GPUs list.
const LISTS: &str = "LOCKSTEP_TEST_LISTS";

/// Text, a picture and text, with log-probabilities but no lists of tokens.
fn plain() -> (Vec<Request>, Script) {
    let mut requests = requests(3);
    requests.iter_mut().for_each(|request| request.sampling.logprobs = Some(0));
    requests[1].sampling.temperature = Some(0.8);
    (requests, Script { chunk: 40, new_tokens: 8 })
}

/// The same, but for the last. A step that is ahead waits for its logits before it is begun.
fn with_lists() -> (Vec<Request>, Script) {
    let (mut requests, script) = plain();
    requests[2].sampling.logprobs = Some(300);
    (requests, Script { chunk: 8, ..script })
}

/// The first rank is ahead of all steps that it can, the second of none, and others of some. All take their time now and then.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_is_ahead() {
    let Some(place) = Place::of_this_process() else { return };
    let group = group(place.world_size, Sums::Peers, env::var_os(REPEATABLE).is_some());
    let options = group.options(place.rank, place.folder.join("peers-1"));
    let gate = Gate::new(options.epoch, options.threads);
    let mut loaded = load::load(&options, &gate, &mut |_| ()).unwrap();
    let (requests, script) = if env::var_os(LISTS).is_some() { with_lists() } else { plain() };
    let steps = script.steps(&group, &requests);
    let mut rng = SmallRng::seed_from_u64(place.rank as u64);
    let wants = || {
        if rng.random_bool(0.3) {
            thread::sleep(Duration::from_millis(rng.random_range(0..20)));
        }
        place.rank == 0 || place.rank > 1 && rng.random_bool(0.5)
    };
    let (results, num_ahead) = run_ahead_where(&mut loaded, &requests, &steps, wants);
    say(&num_ahead.to_string());
    say(&drawn(&results));
    // A rank that ends also ends what others still wait for, and no host meets another one in the last step.
    wait_for_word();
}

/// All that a stream does takes its time, at random.
const DELAY: (&str, &str) = ("LOCKSTEP_EMULATED_DELAY_US", "200");

#[test]
fn ranks_that_are_ahead_draw_what_they_draw_step_by_step() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for (world_size, settings, least_ahead) in [
        (2, &[][..], 6),
        (2, &[(LISTS, "1"), (WITHOUT_NCCL, "1"), DELAY][..], 2),
        (3, &[(REPEATABLE, "1"), DELAY][..], 6),
    ] {
        let has_lists = settings.contains(&(LISTS, "1"));
        let (requests, script) = if has_lists { with_lists() } else { plain() };
        let cpu = Group::new(CHECKPOINT, 1, DType::Bf16).answers(&requests, &script);
        let mut by_hosts = on_gpus(world_size, Sums::Host);
        by_hosts.gpu.is_repeatable = settings.iter().any(|(name, _)| *name == REPEATABLE);
        let told = by_hosts.run(&requests, &script.steps(&by_hosts, &requests));
        let folder = tempfile::tempdir().unwrap();
        let test = "ahead_together::is_a_rank_that_is_ahead";
        let mut processes = start(test, world_size, folder.path(), 1, settings);
        let num_ahead: Vec<usize> = processes.iter().map(|process| process.hear().parse().unwrap()).collect();
        let is_so = num_ahead[0] >= least_ahead && num_ahead[1] == 0;
        assert!(is_so, "{num_ahead:?} steps are begun before the one before is told");
        for (rank, process) in processes.iter().enumerate() {
            assert_eq!(process.hear(), drawn(&told), "rank {rank} of {world_size}");
        }
        processes.iter_mut().for_each(Process::tell);
        all_end_well(&mut processes);
        let first = told.iter().flat_map(|step| &step.sampled).filter(|sampled| sampled.id.0 == 0);
        let first: Vec<_> = first.flat_map(|sampled| sampled.tokens.clone()).collect();
        assert_eq!(token_ids(&first), token_ids(&cpu[0]), "{world_size} ranks, and the CPU");
    }
}

/// Loses rank 2 in a step, when it has begun the next one already.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_loses_another_one() {
    let Some(place) = Place::of_this_process() else { return };
    let group = group(place.world_size, Sums::Peers, false);
    let options = group.options(place.rank, place.folder.join("peers-1"));
    let gate = Gate::new(options.epoch, options.threads);
    let mut loaded = load::load(&options, &gate, &mut |_| ()).unwrap();
    let (requests, script) = plain();
    let steps = script.steps(&group, &requests);
    let (before, last) = steps.split_at(steps.len() - 2);
    run_steps(&mut loaded, &requests, before).unwrap();
    if place.rank == 2 {
        say("waits");
        wait_for_word();
        return;
    }
    let rank = loaded.rank.ahead().unwrap();
    rank.begin(last[0].clone()).unwrap();
    assert!(rank.may_begin(&last[1]));
    rank.begin(last[1].clone()).unwrap();
    assert!(!rank.has_finished().unwrap(), "rank 2 has begun nothing");
    say("waits");
    thread::spawn(move || {
        wait_for_word();
        // As a server tells a rank that its group is lost.
        gate.ask(2).unwrap();
    });
    let lost = loop {
        match rank.has_finished() {
            Ok(has_finished) => assert!(!has_finished),
            Err(error) => break error,
        }
        thread::yield_now();
    };
    for error in [lost, rank.finish().unwrap_err(), rank.finish().unwrap_err()] {
        assert!(matches!(error, StepError::Device(DeviceError::GroupLost)), "{error}");
    }
    say("lost");
}

#[test]
fn a_rank_that_is_killed_ends_steps_that_are_ahead() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut processes = start("ahead_together::is_a_rank_that_loses_another_one", 3, folder.path(), 1, &[]);
    for process in &processes {
        assert_eq!(process.hear(), "waits");
    }
    processes[2].kill();
    let started = Instant::now();
    processes[..2].iter_mut().for_each(Process::tell);
    for process in &processes[..2] {
        assert_eq!(process.hear(), "lost");
    }
    // What is left of both steps is computed, for which stand-ins take their time.
    let took = started.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    all_end_well(&mut processes[..2]);
}

/// What is compared of candidates.
fn bits(candidates: &[Candidate]) -> Vec<u32> {
    let words = |one: &Candidate| {
        let floats = [one.score, one.logit, one.max_logit, one.sum_exp].map(f32::to_bits);
        [&[one.token_id], &floats[..]].concat()
    };
    candidates.iter().flat_map(words).collect()
}

/// Draws from slices of logits, of which the last rank has none.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_draws() {
    let Some(place) = Place::of_this_process() else { return };
    let (peers, ..) = place.device("peers", Sums::Peers);
    let (host, ..) = place.device("host", Sums::Host);
    let num_ids = if place.rank + 1 == place.world_size { 0 } else { 40 };
    let first_id = 40 * place.rank as u32;
    for num_rows in [1, 3, 64, 65] {
        // As many rows as are looked at together, and one more.
        let together = num_rows <= 64;
        let row = |noise_key| RowSampling { temperature: Some(0.7), noise_key, ..RowSampling::default() };
        let plain: Vec<_> = (0..num_rows as u64).map(row).collect();
        let with_lists: Vec<_> =
            plain.iter().map(|row| RowSampling { logprobs: Some(1), ..row.clone() }).collect();
        let draw = |device: &lockstep_shard::device::cuda::CudaDevice, rows: &[RowSampling<'_>]| {
            let matrix = HostElements::F32(part(2, place.rank, 64 * 64));
            let head = device.pack_linear(HostMatrix { rows: 64, cols: 64, data: matrix }, None).unwrap();
            let hidden = device.upload(num_rows, 64, &part(num_rows as u64, 0, num_rows * 64)).unwrap();
            let logits = device.logits(&hidden, &head).unwrap();
            let candidates = device.candidates(&logits, first_id, num_ids, rows).unwrap();
            let feeds = device.feeds(&candidates);
            (feeds, device.read_candidates(candidates).unwrap())
        };
        let (feeds, Told::Own(mine)) = draw(&host, &plain) else { panic!("hosts gather") };
        assert!(!feeds);
        let of_ranks =
            host.all_gather(&bits(&mine).iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
        let of_ranks: Vec<Vec<u32>> = of_ranks
            .unwrap()
            .iter()
            .map(|bytes| bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
            .collect();
        match draw(&peers, &plain) {
            (true, Told::OfRanks(gathered)) if together => {
                assert_eq!(gathered.iter().map(|of_rank| bits(of_rank)).collect::<Vec<_>>(), of_ranks);
            }
            (false, Told::Own(own)) if !together => assert_eq!(bits(&own), bits(&mine)),
            (feeds, told) => panic!("{num_rows} rows: {feeds}, {told:?}"),
        }
        let (feeds, Told::Own(own)) = draw(&peers, &with_lists) else {
            panic!("lists are gathered by hosts")
        };
        assert!(!feeds);
        assert_eq!(bits(&own), bits(&mine));
    }
    leave_together(&[&peers, &host]);
}

#[test]
fn candidates_of_all_ranks_come_to_each() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for world_size in [2, 3] {
        let folder = tempfile::tempdir().unwrap();
        all_end_well(&mut start("ahead_together::is_a_rank_that_draws", world_size, folder.path(), 1, &[]));
    }
}
