//! What a rank plans to take of its GPU and of the host is what it takes, as the driver counts it.

use std::{
    sync::{Arc, Barrier},
    thread,
};

use half::bf16;
use lockstep_shard::{
    collective::{Alone, DEFAULT_SLOT_BYTES, SharedMemory},
    device::{
        Device, DeviceKind, HostElements, HostMatrix,
        cuda::{CudaDevice, CudaOptions, Gpu, Sizes, compile::Arch, libraries, modules},
        plan::PlanDevice,
    },
    progress::Progress,
    runner::MemoryPlan,
    service::{
        gate::Gate,
        gpu::Sums,
        load,
        worker::{LoadEvent, Loaded},
    },
};

use super::{
    common::{Group, Script, run_steps},
    gpu,
    requests::{on_gpus, requests},
};

/// GPUs that no other test here uses, so that what is taken of them is the test's.
const FIRST_GPU: usize = 6;
const WEIGHTS_GPU: i32 = 5;

/// Bytes that may be planned and not taken: those of buffers for sums over ranks that go another way.
const SPARE_BYTES: u64 = 4 << 20;
/// The same of a real driver, which has small buffers share pages.
const SHARED_BYTES: u64 = 64 << 20;
/// What a real driver and its libraries may take beside.
const LIBRARIES_BYTES: u64 = 1 << 30;

/// Bytes that the stand-in for the driver has pinned for the current GPU; none where the driver is a real one.
#[allow(unsafe_code)]
fn pinned_bytes() -> Option<u64> {
    let program = libloading::os::unix::Library::this();
    // SAFETY: the stand-in has a function of this name that takes nothing and returns a number.
    let count = unsafe { program.get::<unsafe extern "C" fn() -> usize>(b"standin_pinned_bytes\0") };
    // SAFETY: as above.
    count.ok().map(|count| unsafe { count() } as u64)
}

/// Loads a rank and runs steps, and compares what it planned with what was taken.
fn check(group: &Group, rank: usize, others: &Barrier, load: impl FnOnce() -> (MemoryPlan, Loaded)) {
    libraries::driver().unwrap();
    let opened = Gpu::open(group.gpu.ordinals[rank] as i32).unwrap();
    let free = || opened.memory_bytes().unwrap().0;
    let before = (free(), pinned_bytes());
    // Ranks look before any of them takes memory.
    others.wait();
    let (plan, mut loaded) = load();
    // Kernels that wait for one another are for ranks that are processes of their own.
    if group.gpu.sums != Sums::Peers {
        let requests = requests(2);
        let steps = Script { chunk: 64, new_tokens: 3 }.steps(group, &requests);
        run_steps(&mut loaded, &requests, &steps).unwrap();
    }
    let (taken, pinned) = (before.0 - free(), pinned_bytes());
    others.wait();
    let planned = plan.gpu_bytes() - plan.graphs_bytes;
    println!("{} ranks: {taken} bytes of {planned}, {pinned:?} pinned ({plan})", group.world_size);
    let is_real = pinned.is_none();
    let (more, less) =
        if is_real { (plan.graphs_bytes + LIBRARIES_BYTES, SHARED_BYTES) } else { (0, SPARE_BYTES) };
    assert!(taken <= planned + more, "{taken} bytes of the GPU of {planned} ({plan})");
    assert!(planned - less <= taken, "{taken} bytes of the GPU of {planned} ({plan})");
    if let (Some(before), Some(pinned)) = (before.1, pinned) {
        let pinned = pinned - before;
        assert!(pinned <= plan.pinned_bytes, "{pinned} bytes pinned of {}", plan.pinned_bytes);
        assert!(plan.pinned_bytes - pinned <= 2 << 20, "{pinned} bytes pinned of {}", plan.pinned_bytes);
    }
}

#[test]
fn a_rank_takes_what_it_planned() {
    if gpu::is_left_out("other tests take memory of the same one") {
        return;
    }
    check_groups(FIRST_GPU, &[(1, Sums::Host), (2, Sums::Host), (2, Sums::Peers)]);
}

#[test]
#[ignore = "of a real GPU that nobody else is on"]
fn a_rank_alone_takes_what_it_planned() {
    check_groups(gpu::real().unwrap_or(FIRST_GPU), &[(1, Sums::Host)]);
}

/// Matrices, biases and norms, of which some have pages of their own and some share them.
fn pack<D: Device>(device: &D) -> Vec<(D::Linear, D::Norm)> {
    let pack = |outputs: usize| {
        let data = HostElements::Bf16(vec![bf16::ONE; outputs * 8]);
        let weight = HostMatrix { rows: outputs, cols: 8, data };
        let linear = device.pack_linear(weight, Some(vec![0.5; outputs])).unwrap();
        (linear, device.pack_norm(vec![1.0; outputs / 3], 1e-6).unwrap())
    };
    [300_000, 70_000, 130_001, 16, 255_000, 200_000].into_iter().map(pack).collect()
}

#[test]
fn weights_take_what_is_planned() {
    if gpu::is_left_out("other tests take memory of the same one") {
        return;
    }
    libraries::driver().unwrap();
    let gpu = Gpu::open(WEIGHTS_GPU).unwrap();
    let modules = modules::modules(Arch::new(9, 0).unwrap(), None, &|| ()).unwrap().into_iter();
    let device = CudaDevice::new(CudaOptions {
        gpu: gpu.clone(),
        cubins: modules.map(|module| (module.name.to_owned(), module.cubin)).collect(),
        sizes: Sizes {
            world_size: 1,
            max_step_tokens: 1,
            max_step_sequences: 1,
            max_context_tokens: 1,
            most_sharing: 1,
            num_query: 1,
            num_kv: 1,
            head_dim: 64,
            num_ids: 64,
            frame_bytes: 0,
        },
        workspace_bytes: 1 << 20,
        collective: Box::new(Alone),
        sums: Sums::Host,
        has_nccl: false,
        use_cublas_lt: false,
        is_repeatable: false,
        use_graphs: false,
        overlap_kernels: true,
        progress: Arc::new(Progress::new(1)),
    });
    let device = device.unwrap();
    let free = || gpu.memory_bytes().unwrap().0;
    let before = free();
    let kept = pack(&device);
    let taken = before - free();
    let plan = PlanDevice::new(DeviceKind::Cuda);
    pack(&plan);
    assert_eq!(taken, plan.weights_bytes());
    drop((kept, device));
    assert!(free() > before, "all is given back");
}

/// Each rank has a GPU of its own.
fn check_groups(first_gpu: usize, groups: &[(usize, Sums)]) {
    for &(world_size, sums) in groups {
        let mut group = on_gpus(world_size, sums);
        group.gpu.ordinals = (first_gpu..first_gpu + world_size).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("collective");
        if world_size > 1 {
            SharedMemory::create(&path, world_size, DEFAULT_SLOT_BYTES).unwrap();
        }
        let others = Barrier::new(world_size);
        let work = |rank: usize| {
            check(&group, rank, &others, || {
                let options = group.options(rank, path.clone());
                let gate = Gate::new(options.epoch, options.threads);
                let mut planned = None;
                let loaded = load::load(&options, &gate, &mut |event| {
                    if let LoadEvent::Plan(plan) = event {
                        planned = Some(plan);
                    }
                });
                (planned.unwrap(), loaded.unwrap())
            });
        };
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || work(rank))).collect();
            ranks.into_iter().for_each(|rank| rank.join().unwrap());
        });
    }
}
