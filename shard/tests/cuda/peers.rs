//! Sums over ranks that read one another's memory: the bits of sums through the host, whatever the size; steps that are repeated;
//! a rank that is killed; GPUs that do not reach one another.

use std::{
    cell::Cell,
    env,
    path::Path,
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use half::bf16;
use lockstep_shard::{
    collective::{Aborter, DEFAULT_SLOT_BYTES, SharedMemory},
    device::{
        Activations, Angles, AttentionHeads, DType, Device, DeviceError, DeviceKind, HostElements,
        HostMatrix, RankDevice, SequenceRows, StepRows,
        cuda::{
            CudaDevice, CudaOptions, Gpu, Linear, Norm, Sizes, Sums, Tensor, compile::Arch,
            libraries as found, modules,
        },
    },
    progress::Progress,
    runner::StepResult,
    service::{gate::Gate, gpu::GpuOptions},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    common::{self, Group, Script, bits},
    gpu,
    processes::{Place, Process, say, wait_for_word},
    requests::{CHECKPOINT, requests},
};

/// What sums go through.
const SUMS: &str = "LOCKSTEP_TEST_SUMS";
/// How many elements are summed.
const ELEMENTS: &str = "LOCKSTEP_TEST_ELEMENTS";
/// Set where all ranks are on one GPU.
const SHARES_GPU: &str = "LOCKSTEP_TEST_SHARES_GPU";
/// Set where NCCL is not to be used.
pub const WITHOUT_NCCL: &str = "LOCKSTEP_TEST_WITHOUT_NCCL";
/// Set where ranks are repeatable.
pub const REPEATABLE: &str = "LOCKSTEP_TEST_REPEATABLE";

/// Starts all ranks of a group that meets for the epochs 1 to `epochs`.
pub fn start(
    test: &str,
    world_size: usize,
    folder: &Path,
    epochs: u64,
    settings: &[(&str, &str)],
) -> Vec<Process> {
    for epoch in 1..=epochs {
        for name in ["peers", "host"] {
            let path = folder.join(format!("{name}-{epoch}"));
            SharedMemory::create(&path, world_size, DEFAULT_SLOT_BYTES).unwrap();
        }
    }
    (0..world_size).map(|rank| Process::start(test, rank, world_size, folder, settings)).collect()
}

impl Place {
    fn join(&self, name: &str, epoch: u64) -> (Box<SharedMemory>, Aborter) {
        let path = self.folder.join(format!("{name}-{epoch}"));
        let joined = SharedMemory::join(&path, self.rank, self.world_size, DEFAULT_SLOT_BYTES).unwrap();
        let aborter = joined.aborter();
        (Box::new(joined), aborter)
    }

    /// A device of the group of epoch 1.
    pub fn device(&self, name: &str, sums: Sums) -> (CudaDevice, Rc<Gpu>, Aborter, Arc<Progress>) {
        found::driver().unwrap();
        let gpu = Gpu::open(if env::var_os(SHARES_GPU).is_some() { 0 } else { self.rank as i32 }).unwrap();
        let num_compiled = Cell::new(0);
        let compiled = || num_compiled.set(num_compiled.get() + 1);
        let cubins = modules::modules(Arch::new(9, 0).unwrap(), None, &compiled).unwrap();
        assert_eq!(num_compiled.get(), cubins.len(), "progress while kernels are compiled");
        let (collective, aborter) = self.join(name, 1);
        let gate = Gate::new(1, 1);
        let collective = Box::new(gate.enter(1, *collective, None).unwrap());
        let progress = gate.progress().clone();
        let device = CudaDevice::new(CudaOptions {
            gpu: gpu.clone(),
            cubins: cubins.into_iter().map(|module| (module.name.to_owned(), module.cubin)).collect(),
            sizes: Sizes {
                world_size: self.world_size,
                max_step_tokens: 64,
                max_step_sequences: 8,
                max_context_tokens: 128,
                most_sharing: 1,
                num_query: 1,
                num_kv: 1,
                head_dim: 64,
                num_ids: 64,
                frame_bytes: 0,
            },
            workspace_bytes: 32 << 20,
            collective,
            sums,
            has_nccl: env::var_os(WITHOUT_NCCL).is_none(),
            use_cublas_lt: false,
            is_repeatable: env::var_os(REPEATABLE).is_some(),
            use_graphs: true,
            overlap_kernels: true,
            progress: progress.clone(),
        })
        .unwrap();
        (device, gpu, aborter, progress)
    }
}

/// A rank's part of a sum. Those of the first two ranks all but cancel, so that in another order a sum has other bits.
pub fn part(call: u64, rank: usize, len: usize) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(call << 8 | if rank < 2 { 0 } else { rank as u64 });
    let sign = if rank == 1 { -1.0 } else { 1.0 };
    let scale = if rank < 2 { sign * 4096.0 } else { 1.0 };
    let round = |x: f32| bf16::from_f32(x).to_f32();
    (0..len).map(|i| round(rng.random_range(-1.0_f32..1.0) * if i % 2 == 0 { scale } else { sign })).collect()
}

/// Added in f32, in the order of ranks, and rounded once.
fn sum_of_parts(call: u64, world_size: usize, len: usize) -> Vec<f32> {
    let mut sum = vec![0.0; len];
    for rank in 0..world_size {
        let part = part(call, rank, len);
        sum.iter_mut().zip(part).for_each(|(sum, x)| *sum = if rank == 0 { x } else { *sum + x });
    }
    sum.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
}

fn same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differs = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differs, None, "{what}: the first element that differs");
}

/// Sums, and sums with residual and norm, on a device. Gives their results.
fn sum(
    device: &CudaDevice,
    place: &Place,
    call: u64,
    [rows, cols]: [usize; 2],
) -> Result<Vec<Vec<f32>>, DeviceError> {
    let mine = part(call, place.rank, rows * cols);
    let sum = device.reduce(device.upload(rows, cols, &mine)?)?;
    let norm = device.pack_norm((0..cols).map(|col| 0.5 + (col % 7) as f32 / 8.0).collect(), 1e-6)?;
    let residual = device.upload(rows, cols, &part(call + 1000, 0, rows * cols))?;
    let x = device.upload(rows, cols, &mine)?;
    let (normed, first) = device.reduce_residual_norm(x, None, &norm)?;
    let x = device.upload(rows, cols, &mine)?;
    let (normed_too, second) = device.reduce_residual_norm(x, Some(residual), &norm)?;
    // A part that is written where the others read it: the identity's product.
    let identity: Vec<f32> = (0..64 * 64).map(|i| f32::from(i % 65 == 0)).collect();
    let linear =
        device.pack_linear(HostMatrix { rows: 64, cols: 64, data: HostElements::F32(identity) }, None)?;
    let x = device.upload(3, 64, &part(call, place.rank, 3 * 64))?;
    let product = device.reduce(device.linear_part(&x, &linear)?)?;
    [&sum, &normed, &first, &normed_too, &second, &product].map(|x| device.download(x)).into_iter().collect()
}

/// The shapes of some calls: below and above what is summed in one shot, of one block, of several, and of more rows than blocks.
const SHAPES: [[usize; 2]; 7] = [[1, 64], [150, 256], [3, 37], [65, 8192], [5, 1000], [1, 2048], [2, 8]];

/// Sums in all ways and compares.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_sums() {
    let Some(place) = Place::of_this_process() else { return };
    let (peers, ..) = place.device("peers", Sums::Peers);
    let (host, ..) = place.device("host", Sums::Host);
    for (call, shape) in (0..).zip(SHAPES) {
        let found = sum(&peers, &place, call, shape).unwrap();
        let expected = sum(&host, &place, call, shape).unwrap();
        let len = shape[0] * shape[1];
        same_bits("a sum", &found[0], &sum_of_parts(call, place.world_size, len));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            same_bits(&format!("result {i} of call {call}, {shape:?}"), found, expected);
        }
    }
    leave_together(&[&peers, &host]);
}

/// A rank that ends also ends what others still wait for.
pub fn leave_together(devices: &[&CudaDevice]) {
    devices.iter().for_each(|device| drop(device.all_gather(&[0]).unwrap()));
}

pub fn all_end_well(processes: &mut [Process]) {
    for (rank, process) in processes.iter_mut().enumerate() {
        assert!(process.end().success(), "rank {rank}");
    }
}

#[test]
fn sums_have_the_bits_of_those_through_the_host() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for (world_size, settings) in [
        (2, &[][..]),
        (3, &[(WITHOUT_NCCL, "1")][..]),
        (4, &[][..]),
        (3, &[(SHARES_GPU, "1")][..]),
        (2, &[(REPEATABLE, "1")][..]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        all_end_well(&mut start("peers::is_a_rank_that_sums", world_size, folder.path(), 1, settings));
    }
}

#[test]
fn a_rank_that_reaches_no_other_makes_all_go_another_way() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for settings in [&[][..], &[(WITHOUT_NCCL, "1")][..]] {
        let folder = tempfile::tempdir().unwrap();
        let mut processes = start("peers::is_a_rank_that_sums", 2, folder.path(), 1, settings);
        processes.truncate(1);
        let alone = [settings, &[("LOCKSTEP_EMULATED_PEERS", "0")][..]].concat();
        processes.push(Process::start("peers::is_a_rank_that_sums", 1, 2, folder.path(), &alone));
        all_end_well(&mut processes);
    }
}

/// Is in a group that loses rank 2, and goes on in another.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_of_a_group_that_is_lost() {
    let Some(place) = Place::of_this_process() else { return };
    let is_late = env::var_os("LOCKSTEP_TEST_IS_LATE").is_some();
    let (mut device, gpu, aborter, _) = place.device(if is_late { "late" } else { "peers" }, Sums::Peers);
    let check = |device: &CudaDevice, call| {
        let found = sum(device, &place, call, [20, 256]).unwrap();
        same_bits("a sum", &found[0], &sum_of_parts(call, place.world_size, 20 * 256));
    };
    if !is_late {
        check(&device, 1);
        let free = gpu.memory_bytes().unwrap().0;
        // As a server tells a rank that its group is lost.
        let (told, hears) = std::sync::mpsc::channel();
        thread::spawn(move || {
            wait_for_word();
            aborter.abort();
            told.send(()).unwrap();
            wait_for_word();
        });
        if place.rank == 1 {
            say("waits");
            hears.recv().unwrap();
        } else {
            let x = device.upload(20, 256, &part(2, place.rank, 20 * 256)).unwrap();
            let x = device.reduce(x).unwrap();
            say("waits");
            let error = device.download(&x).unwrap_err();
            assert!(matches!(error, DeviceError::GroupLost), "{error}");
        }
        let lost = sum(&device, &place, 2, [20, 256]).unwrap_err();
        assert!(matches!(lost, DeviceError::GroupLost), "{lost}");
        say("lost");
        for epoch in 2..4 {
            if epoch == 3 {
                leave_together(&[&device]);
            }
            device.leave_group().unwrap();
            device.join_group(place.join("peers", epoch).0).unwrap();
            check(&device, 3 + epoch);
        }
        assert_eq!(gpu.memory_bytes().unwrap().0, free, "free bytes of the GPU");
    } else {
        // Its own epoch 1 is the group's second.
        check(&device, 5);
        leave_together(&[&device]);
        device.leave_group().unwrap();
        device.join_group(place.join("peers", 3).0).unwrap();
        check(&device, 6);
    }
    leave_together(&[&device]);
}

#[test]
fn a_rank_that_is_killed_in_a_sum_ends_it_for_the_others() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let test = "peers::is_a_rank_of_a_group_that_is_lost";
    let mut processes = start(test, 3, folder.path(), 3, &[]);
    std::os::unix::fs::symlink(folder.path().join("peers-2"), folder.path().join("late-1")).unwrap();
    for process in &processes {
        assert_eq!(process.hear(), "waits");
    }
    // Ranks 0 and 2 wait in their kernels for rank 1, which does not come.
    thread::sleep(Duration::from_millis(100));
    processes[2].kill();
    let started = Instant::now();
    processes[..2].iter_mut().for_each(Process::tell);
    for process in &processes[..2] {
        assert_eq!(process.hear(), "lost");
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    processes[2] = Process::start(test, 2, 3, folder.path(), &[("LOCKSTEP_TEST_IS_LATE", "1")]);
    all_end_well(&mut processes);
}

/// What a rank does while its GPU waits for one that is gone.
const STUCK_IN: &str = "LOCKSTEP_TEST_STUCK_IN";

/// Sums with a rank that is gone, and goes on until it is told that the group is lost.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_is_stuck() {
    let Some(place) = Place::of_this_process() else { return };
    let sums = if env::var(SUMS).unwrap() == "peers" { Sums::Peers } else { Sums::Nccl };
    let (mut device, _, aborter, progress) = place.device("peers", sums);
    let elements: usize = env::var(ELEMENTS).unwrap().parse().unwrap();
    let meetings = progress.collectives.get();
    let mut x = device.reduce(device.upload(1, elements, &vec![1.0; elements]).unwrap()).unwrap();
    assert_eq!(progress.collectives.get(), meetings + 1, "meetings that a sum is");
    assert_eq!(device.download(&x).unwrap()[0], place.world_size as f32);
    if place.rank == 1 {
        say("summed");
        wait_for_word();
        return;
    }
    let (moved, told) = (progress.clone(), std::sync::mpsc::channel());
    thread::spawn(move || {
        wait_for_word();
        let before = moved.work_pieces();
        thread::sleep(Duration::from_millis(100));
        told.0.send(moved.work_pieces() - before).unwrap();
        aborter.abort();
    });
    say("summed");
    wait_for_loss(&device, &mut x);
    assert_eq!(told.1.recv().unwrap(), 0, "a GPU that waits makes no progress");
    device.leave_group().unwrap();
    say("left");
}

/// Begins a sum that never ends, and what cannot be done before it has.
fn wait_for_loss(device: &CudaDevice, x: &mut Tensor) {
    let norm = device.pack_norm(vec![1.0; 64], 1e-6).unwrap();
    let mut small = device.upload(1, 64, &[0.0; 64]).unwrap();
    *x = device.reduce(device.empty(x.rows(), x.cols()).unwrap()).unwrap();
    say("waits");
    match &env::var(STUCK_IN).unwrap()[..] {
        "launches" => (0..2000).for_each(|_| device.gelu(&mut small).unwrap()),
        "copies" => (0..2000).for_each(|_| drop(device.upload(1, 512, &[0.0; 512]).unwrap())),
        "memory" => drop(norm),
        what => panic!("a rank is not stuck in {what}"),
    }
    let error = device.download(x).unwrap_err();
    assert!(matches!(error, DeviceError::GroupLost), "{error}");
}

/// The thread that would see that the group is lost waits itself: in a call that launches, for a buffer to copy from, for the
/// stream to give memory back.
#[test]
fn a_rank_that_waits_for_its_own_gpu_is_not_held_by_one_that_was_killed() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for (sums, elements) in [("peers", "64"), ("peers", "1000000"), ("nccl", "64")] {
        for stuck_in in ["launches", "copies", "memory"] {
            let folder = tempfile::tempdir().unwrap();
            let settings = [(SUMS, sums), (ELEMENTS, elements), (STUCK_IN, stuck_in)];
            let mut processes = start("peers::is_a_rank_that_is_stuck", 2, folder.path(), 1, &settings);
            processes.iter().for_each(|process| assert_eq!(process.hear(), "summed"));
            assert_eq!(processes[0].hear(), "waits");
            processes[1].kill();
            thread::sleep(Duration::from_millis(200));
            let started = Instant::now();
            processes[0].tell();
            assert_eq!(processes[0].hear(), "left");
            let took = started.elapsed();
            assert!(took < Duration::from_secs(1), "{sums}, {stuck_in}: {took:?}");
            assert!(processes[0].end().success());
        }
    }
}

/// Launches all of a long step at once.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_with_a_slow_gpu() {
    let Some(place) = Place::of_this_process() else { return };
    let (device, _, _, progress) = place.device("host", Sums::Host);
    let mut x = device.upload(1, 64, &[0.0; 64]).unwrap();
    (0..80).for_each(|_| device.gelu(&mut x).unwrap());
    let launched = progress.work_pieces();
    device.download(&x).unwrap();
    let passed = progress.work_pieces() - launched;
    assert!((5..=10).contains(&passed), "{passed} of ten milestones");
}

#[test]
fn a_step_that_is_all_launched_is_not_silent() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let delay = ("LOCKSTEP_EMULATED_DELAY_US", "5000");
    all_end_well(&mut start("peers::is_a_rank_with_a_slow_gpu", 1, folder.path(), 1, &[delay]));
}

fn step(device: &CudaDevice, weights: &Weights, ids: [u32; 2]) -> Vec<f32> {
    step_with(device, weights, ids, |_| Ok(()))
}

/// What a step does: three sums, so that each step begins at the other turn, and `within` it something with activations.
fn step_with(
    device: &CudaDevice,
    weights: &Weights,
    ids: [u32; 2],
    within: impl Fn(&Tensor) -> Result<(), DeviceError>,
) -> Vec<f32> {
    let angles = Angles { frequencies: &[(0.5, 0); 32], scale: 1.0, positions: &[[0; 3]; 2] };
    let (cos, sin) = device.angles(&angles).unwrap();
    let heads = AttentionHeads { kv_of_query: vec![0], num_kv: 1, head_dim: 64 };
    let sequence =
        |i: usize| SequenceRows { rows: i..i + 1, num_computed_tokens: 0, block_table: vec![i as u32] };
    let sequences = [sequence(0), sequence(1)];
    let rows = device.rows(StepRows {
        token_ids: &ids,
        drawn: &[],
        slots: &[0, 32],
        sequences: &sequences,
        heads: &heads,
        cos,
        sin,
    });
    let rows = rows.unwrap();
    let Weights { table, linear, norm } = weights;
    let work = || {
        let x = device.embedding(table, 0, &rows)?;
        let (h, residual) = device.reduce_residual_norm(x, None, norm)?;
        within(&h)?;
        let x = device.linear_part(&h, linear)?;
        drop(h);
        let (h, _) = device.reduce_residual_norm(x, Some(residual), norm)?;
        let x = device.linear_part(&h, linear)?;
        drop(h);
        device.reduce(x)
    };
    let h = device.replay(&rows, work).unwrap();
    device.download(&h).unwrap()
}

struct Weights {
    table: Linear,
    linear: Linear,
    norm: Norm,
}

impl Weights {
    fn new(device: &CudaDevice, rank: usize) -> Self {
        let matrix =
            |seed| HostMatrix { rows: 64, cols: 64, data: HostElements::F32(part(seed, rank, 64 * 64)) };
        Self {
            table: device.pack_linear(matrix(1), None).unwrap(),
            linear: device.pack_linear(matrix(2), Some(part(3, rank, 64))).unwrap(),
            norm: device.pack_norm(vec![1.0; 64], 1e-6).unwrap(),
        }
    }
}

/// Repeats steps, between which there are other sums, so that a step comes at either turn.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_repeats_steps() {
    let Some(place) = Place::of_this_process() else { return };
    let (peers, _, _, progress) = place.device("peers", Sums::Peers);
    let (host, ..) = place.device("host", Sums::Host);
    let [of_peers, of_host] = [&peers, &host].map(|device| Weights::new(device, place.rank));
    let (mut launches, mut meetings) = (Vec::new(), Vec::new());
    for i in 0..24_u32 {
        let ids = [i * 7 % 64, i * 11 % 64];
        let before = (progress.work_pieces(), progress.collectives.get());
        let found = step(&peers, &of_peers, ids);
        launches.push(progress.work_pieces() - before.0);
        meetings.push(progress.collectives.get() - before.1);
        same_bits(&format!("step {i}"), &found, &step(&host, &of_host, ids));
        for call in 0..u64::from(i % 3) {
            let x = peers.upload(2, 64, &part(call, place.rank, 128)).unwrap();
            let sum = peers.download(&peers.reduce(x).unwrap()).unwrap();
            same_bits("a sum between steps", &sum, &sum_of_parts(call, place.world_size, 128));
        }
    }
    // All but the first two launch a graph after the angles, and some an empty call before it. Where the GPU is, is counted now and
    // then.
    let is_repeated = |launches: &u64| (2..=4).contains(launches);
    assert!(launches[0] > 5 && launches[2..].iter().all(is_repeated), "{launches:?}");
    // A sum is a meeting, repeated or not.
    assert!(meetings.iter().all(|meetings| (3..=4).contains(meetings)), "{meetings:?}");
    leave_together(&[&peers, &host]);
}

#[test]
fn steps_are_repeated_with_the_same_bits() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for (world_size, settings) in [(2, &[][..]), (3, &[(REPEATABLE, "1")][..])] {
        let folder = tempfile::tempdir().unwrap();
        let test = "peers::is_a_rank_that_repeats_steps";
        all_end_well(&mut start(test, world_size, folder.path(), 1, settings));
    }
}

/// Does steps that cannot be kept at rank 0, where they wait for the stream, and are repeated at others.
#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_cannot_repeat_steps() {
    let Some(place) = Place::of_this_process() else { return };
    let (peers, _, _, progress) = place.device("peers", Sums::Peers);
    let (host, ..) = place.device("host", Sums::Host);
    let [of_peers, of_host] = [&peers, &host].map(|device| Weights::new(device, place.rank));
    let (mut works, mut meetings) = (Vec::new(), Vec::new());
    for i in 0..6 {
        let (num_works, before) = (Cell::new(0), progress.collectives.get());
        let within = |x: &Tensor| {
            num_works.set(num_works.get() + 1);
            if place.rank == 0 { peers.download(x).map(drop) } else { Ok(()) }
        };
        let found = step_with(&peers, &of_peers, [i, 7 * i], within);
        works.push(num_works.get());
        meetings.push(progress.collectives.get() - before);
        same_bits(&format!("step {i}"), &found, &step(&host, &of_host, [i, 7 * i]));
    }
    assert_eq!(works, if place.rank == 0 { [1, 2, 1, 1, 1, 1] } else { [1, 1, 0, 0, 0, 0] });
    // Three sums, and one of nothing before all steps but the first.
    assert_eq!(meetings, [3, 4, 4, 4, 4, 4]);
    leave_together(&[&peers, &host]);
}

#[test]
fn a_rank_that_cannot_keep_steps_does_them_as_they_are() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    all_end_well(&mut start("peers::is_a_rank_that_cannot_repeat_steps", 2, folder.path(), 1, &[]));
}

/// A model's group of which each rank is a process.
pub fn group(world_size: usize, sums: Sums, is_repeatable: bool) -> Group {
    let ordinals = (0..world_size).collect();
    let group = Group::new(CHECKPOINT, world_size, DType::Bf16);
    let gpu = GpuOptions { ordinals, memory: 0.9, sums, is_repeatable, ..group.gpu };
    Group { device: DeviceKind::Cuda, gpu, ..group }
}

pub fn drawn(results: &[StepResult]) -> String {
    let hashes: Vec<u64> = results.iter().map(|result| result.state_hash).collect();
    let tokens = results.iter().flat_map(|result| &result.sampled).flat_map(|sampled| bits(&sampled.tokens));
    format!("{hashes:?} {:?}", tokens.collect::<Vec<_>>())
}

#[test]
#[ignore = "a rank of a test"]
fn is_a_rank_that_answers() {
    let Some(place) = Place::of_this_process() else { return };
    let sums = if env::var(SUMS).unwrap() == "peers" { Sums::Peers } else { Sums::Host };
    let group = group(place.world_size, sums, env::var_os(REPEATABLE).is_some());
    let requests = requests(2);
    let steps = Script { chunk: 64, new_tokens: 8 }.steps(&group, &requests);
    let results =
        common::run_rank(&group.options(place.rank, place.folder.join("peers-1")), &requests, &steps);
    say(&drawn(&results));
}

/// Steps of one row for each sequence are repeated as graphs where sums go through the memory of GPUs, and never where they go
/// through the host.
#[test]
fn answers_have_the_bits_of_those_through_the_host() {
    if gpu::is_left_out(gpu::EACH_HAS_ONE) {
        return;
    }
    for (world_size, repeatable) in [(2, &[][..]), (3, &[(REPEATABLE, "1")][..])] {
        let answers = ["peers", "host"].map(|sums| {
            let folder = tempfile::tempdir().unwrap();
            let settings = [repeatable, &[(SUMS, sums)][..]].concat();
            let mut processes =
                start("peers::is_a_rank_that_answers", world_size, folder.path(), 1, &settings);
            let said: Vec<String> = processes.iter().map(Process::hear).collect();
            all_end_well(&mut processes);
            assert!(said.iter().all(|answers| *answers == said[0]), "ranks agree");
            said[0].clone()
        });
        assert_eq!(answers[0], answers[1], "{world_size} ranks");
    }
}
