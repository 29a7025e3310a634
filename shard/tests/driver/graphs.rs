//! What a stream is given while it is captured is done when the graph is launched, and not before.

use std::{ptr, sync::mpsc, thread};

use cudarc::driver::sys::{CUgraphExec, CUresult, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus};

use super::{
    gpu::{
        Pinned, SUCCESS, allocate, arguments, download, enter, enter_loaded, kernel, launch, number, stream,
        synchronize, upload,
    },
    processes::{child, hear, is_child, say},
};

pub const THREAD_LOCAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

pub fn begin(stream: CUstream, mode: CUstreamCaptureMode) {
    ok!(cuStreamBeginCapture_v2(stream, mode));
}

pub fn end(stream: CUstream) -> Result<CUgraphExec, CUresult> {
    let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
    match cuda!(cuStreamEndCapture(stream, &mut graph)) {
        SUCCESS => {}
        error => return Err(error),
    }
    ok!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
    ok!(cuGraphDestroy(graph));
    Ok(executable)
}

fn status(stream: CUstream) -> CUstreamCaptureStatus {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    ok!(cuStreamIsCapturing(stream, &mut status));
    status
}

#[test]
fn a_graph_does_its_operations_each_time_it_is_launched() {
    enter(number::SHARED);
    let (stream, input, count) = (stream(), Pinned::new(&[0; 2]), upload(&[0_u32]));
    let (sink, places, copied) = (kernel("count_threads"), allocate(2 * 32 * 8), allocate(8));
    begin(stream, THREAD_LOCAL);
    assert_eq!(status(stream), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    launch(sink, 2, 32, stream, &mut arguments![count, places]);
    ok!(cuMemcpyHtoDAsync_v2(copied, input.as_ptr(), input.bytes(), stream));
    let graph = end(stream).unwrap();
    assert_eq!(status(stream), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
    synchronize(stream);
    assert_eq!(download::<u32>(count, 1), [0]);
    ok!(cuGraphUpload(graph, stream));
    for round in 1..4 {
        input.write(&[round, round]);
        ok!(cuGraphLaunch(graph, stream));
        synchronize(stream);
        assert_eq!(download::<u32>(count, 1), [64 * round]);
        assert_eq!(download::<u32>(copied, 2), [round; 2]);
    }
    ok!(cuGraphExecDestroy(graph));
    assert_eq!(cuda!(cuGraphLaunch(graph, stream)), CUresult::CUDA_ERROR_INVALID_VALUE);
}

/// A call that may not be made while a stream is captured.
type Illegal = fn(CUstream) -> CUresult;

#[test]
fn an_illegal_call_ends_a_capture() {
    enter(number::CAPTURE);
    let calls: [(&str, Illegal); 6] = [
        ("synchronize", |stream| cuda!(cuStreamSynchronize(stream))),
        ("query", |stream| cuda!(cuStreamQuery(stream))),
        ("synchronize the context", |_| cuda!(cuCtxSynchronize())),
        ("allocate", |_| cuda!(cuMemAlloc_v2(&mut 0, 8))),
        ("allocate of the host", |_| cuda!(cuMemHostAlloc(&mut ptr::null_mut(), 8, 0))),
        ("copy from pageable memory", |stream| {
            let from = [0_u32; 2];
            let to = TARGET.with(|target| *target);
            cuda!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), 8, stream))
        }),
    ];
    TARGET.with(|target| assert_ne!(*target, 0));
    for (name, call) in calls {
        let stream = stream();
        begin(stream, THREAD_LOCAL);
        assert_eq!(call(stream), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "{name}");
        assert_eq!(status(stream), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED, "{name}");
        let invalidated = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        assert_eq!(end(stream), Err(invalidated), "{name}");
        synchronize(stream);
    }
}

thread_local! {
    static TARGET: u64 = allocate(8);
}

#[test]
fn another_thread_may_allocate_where_the_capture_is_of_a_thread() {
    let context = enter(number::SHARED) as usize;
    let stream = stream();
    begin(stream, THREAD_LOCAL);
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        ok!(cuCtxSetCurrent(context as *mut _));
        allocate(8);
        sender.send(()).unwrap();
    });
    receiver.recv().unwrap();
    end(stream).unwrap();
}

#[test]
fn no_thread_may_allocate_where_the_capture_is_of_the_process() {
    let mut child = child("graphs::captures_for_the_process", &[]);
    assert_eq!(hear(&mut child), "refused");
    assert!(child.wait().unwrap().success());
}

#[test]
#[ignore = "the other process of a test, in which other tests would be disturbed"]
fn captures_for_the_process() {
    if !is_child() {
        return;
    }
    let context = enter_loaded(number::SHARED) as usize;
    let stream = stream();
    begin(stream, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL);
    let other = thread::spawn(move || {
        ok!(cuCtxSetCurrent(context as *mut _));
        cuda!(cuMemAlloc_v2(&mut 0, 8))
    });
    assert_eq!(other.join().unwrap(), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(end(stream), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
    say("refused");
}

#[test]
fn a_second_stream_joins_a_capture_by_an_event() {
    enter(number::SHARED);
    let (origin, other, to) = (stream(), stream(), allocate(16));
    let (mut forked, mut joined) = (ptr::null_mut(), ptr::null_mut());
    ok!(cuEventCreate(&mut forked, 2));
    ok!(cuEventCreate(&mut joined, 2));
    for joins in [true, false] {
        begin(origin, THREAD_LOCAL);
        ok!(cuEventRecord(forked, origin));
        ok!(cuStreamWaitEvent(other, forked, 0));
        ok!(cuMemsetD32Async(to, 7, 4, other));
        if joins {
            ok!(cuEventRecord(joined, other));
            ok!(cuStreamWaitEvent(origin, joined, 0));
            let graph = end(origin).unwrap();
            ok!(cuGraphLaunch(graph, origin));
            synchronize(origin);
            assert_eq!(download::<u32>(to, 4), [7; 4]);
            // An event of a graph is no moment of a stream.
            let captured = CUresult::CUDA_ERROR_CAPTURED_EVENT;
            assert_eq!(cuda!(cuStreamWaitEvent(origin, joined, 0)), captured);
            assert_eq!(cuda!(cuEventQuery(joined)), captured);
        } else {
            assert_eq!(end(origin), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
        }
    }
}

#[test]
fn what_was_not_captured_is_not_waited_for_in_a_capture() {
    enter(number::SHARED);
    let (stream, other, mut event) = (stream(), stream(), ptr::null_mut());
    ok!(cuEventCreate(&mut event, 2));
    ok!(cuEventRecord(event, other));
    begin(stream, THREAD_LOCAL);
    let result = cuda!(cuStreamWaitEvent(stream, event, 0));
    assert_eq!(result, CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert_eq!(end(stream), Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED));
}
