//! Ranks exchange what they have, each on a GPU of its own, and are not left waiting for one that is missing.

use std::{
    ptr,
    sync::{Arc, Barrier, mpsc},
    thread,
    time::Duration,
};

use cudarc::{
    driver::sys::{CUdeviceptr, CUgraphExec, CUresult, CUstream, CUstreamCaptureMode},
    nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId},
};
use half::bf16;

use super::{
    gpu::{allocate, download, enter, enter_loaded, number, stream, synchronize, upload},
    processes::{child, hear, is_child, say, wait_for_parent},
};

/// Calls a function of NCCL and gives what it answers.
macro_rules! nccl {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the stand-in looks up communicators before it uses them, buffers are checked when they are used, and the rest
        // are references to what outlives the call.
        unsafe { cudarc::nccl::sys::$function($($argument),*) }
    }};
}

const SUCCESS: ncclResult_t = ncclResult_t::ncclSuccess;

fn unique_id() -> ncclUniqueId {
    let mut id = ncclUniqueId { internal: [0; 128] };
    assert_eq!(nccl!(ncclGetUniqueId(&mut id)), SUCCESS);
    id
}

/// What NCCL takes as not set.
const UNDEFINED: i32 = i32::MIN;

fn config(blocking: i32) -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22803,
        blocking,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn async_error(comm: ncclComm_t) -> ncclResult_t {
    let mut result = SUCCESS;
    assert_eq!(nccl!(ncclCommGetAsyncError(comm, &mut result)), SUCCESS);
    result
}

/// A rank of a communicator that is made without blocking.
struct Rank {
    comm: ncclComm_t,
    stream: CUstream,
    rank: usize,
}

impl Rank {
    fn begin(id: ncclUniqueId, num_ranks: i32, rank: usize) -> Self {
        let (mut comm, mut config) = (ptr::null_mut(), config(0));
        let result = nccl!(ncclCommInitRankConfig(&mut comm, num_ranks, id, rank as i32, &mut config));
        assert_eq!(result, ncclResult_t::ncclInProgress);
        Self { comm, stream: stream(), rank }
    }

    fn new(id: ncclUniqueId, num_ranks: i32, rank: usize) -> Self {
        let this = Self::begin(id, num_ranks, rank);
        assert_eq!(this.finish(ncclResult_t::ncclInProgress), SUCCESS);
        this
    }

    /// What a call comes to that may go on in the background.
    fn finish(&self, mut state: ncclResult_t) -> ncclResult_t {
        while state == ncclResult_t::ncclInProgress {
            thread::sleep(Duration::from_millis(1));
            state = async_error(self.comm);
        }
        state
    }

    fn sum(&self, from: CUdeviceptr, to: CUdeviceptr, count: usize, data_type: ncclDataType_t) {
        let (from, to) = (ptr::without_provenance(from as usize), ptr::without_provenance_mut(to as usize));
        let stream = self.stream.cast();
        let sum = ncclRedOp_t::ncclSum;
        let begun = nccl!(ncclAllReduce(from, to, count, data_type, sum, self.comm, stream));
        assert_eq!(self.finish(begun), SUCCESS);
    }

    /// A graph of one sum.
    fn graph_of_sum(&self, buffer: CUdeviceptr) -> CUgraphExec {
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        ok!(cuStreamBeginCapture_v2(self.stream, mode));
        self.sum(buffer, buffer, 8, ncclDataType_t::ncclFloat32);
        ok!(cuStreamEndCapture(self.stream, &mut graph));
        ok!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        ok!(cuGraphDestroy(graph));
        executable
    }

    fn destroy(self) {
        assert_eq!(self.finish(nccl!(ncclCommFinalize(self.comm))), SUCCESS);
        assert_eq!(nccl!(ncclCommDestroy(self.comm)), SUCCESS);
    }
}

/// Runs ranks as threads, each with its GPU, beginning with `first_gpu`.
fn with_ranks(num_ranks: i32, run: impl Fn(&Rank) + Sync) {
    enter(number::SHARED);
    let id = unique_id();
    thread::scope(|scope| {
        for number in 0..num_ranks {
            let run = &run;
            scope.spawn(move || {
                enter(number::FIRST_RANK + number);
                let rank = Rank::new(id, num_ranks, number as usize);
                run(&rank);
                rank.destroy();
            });
        }
    });
}

/// Numbers that only some ranks have.
fn numbers(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 31 + rank * 17) % 100) as f32 / 8.0 - 6.0).collect()
}

#[test]
fn all_ranks_get_the_sum_of_all() {
    for num_ranks in [1, 2, 4] {
        // More than a chunk, and less than two.
        let count = 100_000;
        with_ranks(num_ranks, |rank| {
            let mine = numbers(rank.rank, count);
            let all: Vec<Vec<f32>> = (0..num_ranks as usize).map(|rank| numbers(rank, count)).collect();
            let sum = |i: usize| all.iter().map(|numbers| numbers[i]).sum::<f32>();

            let buffer = upload(&mine);
            rank.sum(buffer, buffer, count, ncclDataType_t::ncclFloat32);
            synchronize(rank.stream);
            assert_eq!(download::<f32>(buffer, count), (0..count).map(sum).collect::<Vec<_>>());

            let rounded: Vec<bf16> = mine.into_iter().map(bf16::from_f32).collect();
            let (from, to) = (upload(&rounded), allocate(count * 2));
            rank.sum(from, to, count, ncclDataType_t::ncclBfloat16);
            synchronize(rank.stream);
            let expected: Vec<bf16> = (0..count).map(|i| bf16::from_f32(sum(i))).collect();
            assert_eq!(download::<bf16>(to, count), expected);
        });
    }
}

#[test]
fn all_ranks_get_what_each_has() {
    with_ranks(3, |rank| {
        let (from, to) = (upload(&numbers(rank.rank, 1000)), allocate(3 * 1000 * 4));
        let pointers = (ptr::without_provenance(from as usize), ptr::without_provenance_mut(to as usize));
        let float = ncclDataType_t::ncclFloat32;
        let result = nccl!(ncclAllGather(pointers.0, pointers.1, 1000, float, rank.comm, rank.stream.cast()));
        assert_eq!(rank.finish(result), SUCCESS);
        synchronize(rank.stream);
        let expected: Vec<f32> = (0..3).flat_map(|rank| numbers(rank, 1000)).collect();
        assert_eq!(download::<f32>(to, 3000), expected);
    });
}

#[test]
fn a_collective_in_a_graph_is_done_each_time() {
    with_ranks(2, |rank| {
        let buffer = upload(&[1.0_f32; 8]);
        let executable = rank.graph_of_sum(buffer);
        for _ in 0..5 {
            ok!(cuGraphLaunch(executable, rank.stream));
        }
        synchronize(rank.stream);
        assert_eq!(download::<f32>(buffer, 8), [32.0; 8]);
        ok!(cuGraphExecDestroy(executable));
    });
}

#[test]
fn an_abort_waits_until_no_graph_has_the_communicator() {
    enter(number::FIRST_RANK);
    let rank = Rank::new(unique_id(), 1, 0);
    let executable = rank.graph_of_sum(upload(&[1.0_f32; 8]));
    let (told, hears) = mpsc::channel();
    let comm = rank.comm as usize;
    thread::spawn(move || told.send(nccl!(ncclCommAbort(comm as ncclComm_t))).unwrap());
    assert!(hears.recv_timeout(Duration::from_millis(100)).is_err());
    ok!(cuGraphExecDestroy(executable));
    assert_eq!(hears.recv_timeout(Duration::from_secs(10)).unwrap(), SUCCESS);
}

#[test]
fn calls_of_a_group_are_made_at_its_end() {
    with_ranks(2, |rank| {
        let buffer = upload(&[1.0_f32; 8]);
        assert_eq!(nccl!(ncclGroupStart()), SUCCESS);
        rank.sum(buffer, buffer, 8, ncclDataType_t::ncclFloat32);
        ok!(cuStreamQuery(rank.stream));
        assert_eq!(download::<f32>(buffer, 8), [1.0; 8]);
        assert_eq!(nccl!(ncclGroupEnd()), SUCCESS);
        synchronize(rank.stream);
        assert_eq!(download::<f32>(buffer, 8), [2.0; 8]);
    });
}

#[test]
fn ranks_know_who_they_are() {
    with_ranks(2, |rank| {
        let (mut count, mut number, mut version) = (0, 0, 0);
        assert_eq!(nccl!(ncclCommCount(rank.comm, &mut count)), SUCCESS);
        assert_eq!(nccl!(ncclCommUserRank(rank.comm, &mut number)), SUCCESS);
        assert_eq!(nccl!(ncclGetVersion(&mut version)), SUCCESS);
        assert_eq!((count, number, version), (2, rank.rank as i32, 22803));
    });
}

#[test]
fn an_abort_ends_the_wait_for_a_missing_rank() {
    let both_joined = Arc::new(Barrier::new(2));
    enter(number::SHARED);
    let id = unique_id();
    thread::scope(|scope| {
        let joined = both_joined.clone();
        scope.spawn(move || {
            enter(number::FIRST_RANK);
            let rank = Rank::new(id, 2, 0);
            joined.wait();
            let buffer = upload(&[1.0_f32; 8]);
            rank.sum(buffer, buffer, 8, ncclDataType_t::ncclFloat32);
            thread::sleep(Duration::from_millis(100));
            assert_eq!(cuda!(cuStreamQuery(rank.stream)), CUresult::CUDA_ERROR_NOT_READY);
            let comm = rank.comm as usize;
            let aborter = thread::spawn(move || {
                thread::sleep(Duration::from_millis(50));
                assert_eq!(nccl!(ncclCommAbort(comm as ncclComm_t)), SUCCESS);
            });
            synchronize(rank.stream);
            aborter.join().unwrap();
            let gone = nccl!(ncclCommDestroy(rank.comm));
            assert_eq!(gone, ncclResult_t::ncclInvalidArgument);
        });
        scope.spawn(move || {
            enter(number::FIRST_RANK + 1);
            let rank = Rank::new(id, 2, 1);
            both_joined.wait();
            assert_eq!(nccl!(ncclCommAbort(rank.comm)), SUCCESS);
        });
    });
}

#[test]
fn an_abort_ends_the_wait_for_a_rank_that_never_joins() {
    enter(number::FIRST_RANK);
    let rank = Rank::begin(unique_id(), 2, 0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(async_error(rank.comm), ncclResult_t::ncclInProgress);
    assert_eq!(nccl!(ncclCommAbort(rank.comm)), SUCCESS);
}

#[test]
fn two_ranks_may_not_use_the_same_gpu() {
    enter(number::FIRST_RANK);
    let id = unique_id();
    let ranks = [0, 1].map(|rank| Rank::begin(id, 2, rank));
    for rank in &ranks {
        while async_error(rank.comm) == ncclResult_t::ncclInProgress {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(async_error(rank.comm), ncclResult_t::ncclInvalidUsage);
        assert_eq!(nccl!(ncclCommAbort(rank.comm)), SUCCESS);
    }
}

#[test]
fn a_process_that_dies_is_reported_and_leaves_the_others_waiting() {
    enter(number::FIRST_RANK);
    let id = unique_id();
    let text: String = id.internal.iter().map(|&byte| format!("{:02x}", byte as u8)).collect();
    let mut child = child("collectives::is_the_second_rank", &[(ID, text)]);
    let rank = Rank::new(id, 2, 0);
    let buffer = upload(&[1.0_f32; 8]);
    rank.sum(buffer, buffer, 8, ncclDataType_t::ncclFloat32);
    synchronize(rank.stream);
    assert_eq!(download::<f32>(buffer, 8), [3.0; 8]);
    assert_eq!(hear(&mut child), "3");

    rank.sum(buffer, buffer, 8, ncclDataType_t::ncclFloat32);
    assert_eq!(async_error(rank.comm), SUCCESS);
    child.kill().unwrap();
    // Not reaped yet: a process that has ended is dead all the same.
    while async_error(rank.comm) == SUCCESS {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(async_error(rank.comm), ncclResult_t::ncclRemoteError);
    assert_eq!(cuda!(cuStreamQuery(rank.stream)), CUresult::CUDA_ERROR_NOT_READY);
    assert_eq!(nccl!(ncclCommAbort(rank.comm)), SUCCESS);
    synchronize(rank.stream);
    child.wait().unwrap();
}

const ID: &str = "LOCKSTEP_TEST_NCCL_ID";

#[test]
#[ignore = "the other process of a test"]
fn is_the_second_rank() {
    if !is_child() {
        return;
    }
    let text = std::env::var(ID).unwrap();
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap() as _;
    enter_loaded(number::FIRST_RANK + 1);
    let rank = Rank::new(ncclUniqueId { internal: std::array::from_fn(byte) }, 2, 1);
    let buffer = upload(&[2.0_f32; 8]);
    rank.sum(buffer, buffer, 8, ncclDataType_t::ncclFloat32);
    synchronize(rank.stream);
    say(&download::<f32>(buffer, 8)[0].to_string());
    // Until it is killed.
    wait_for_parent();
}
