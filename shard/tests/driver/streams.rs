//! Streams work while the host goes on, and events order them.

use std::{ptr, sync::mpsc, thread, time::Duration};

use cudarc::driver::sys::{CUevent, CUresult, CUstream};

use super::gpu::{Gate, Pinned, allocate, download, enter, number, stream, synchronize, upload};

const OLD: [u32; 4] = [1, 2, 3, 4];
const NEW: [u32; 4] = [5, 6, 7, 8];
const BYTES: usize = size_of_val(&OLD);

fn event() -> CUevent {
    let mut event = ptr::null_mut();
    ok!(cuEventCreate(&mut event, 0));
    event
}

/// Operations that a stream takes before a call waits.
const MAX_QUEUED: u32 = 1024;

#[test]
fn a_call_waits_while_the_queue_is_full() {
    let context = enter(number::SHARED) as usize;
    let (stream, to) = (stream(), allocate(BYTES));
    let gate = Gate::new(stream);
    for value in 1..MAX_QUEUED {
        ok!(cuMemsetD32Async(to, value, 4, stream));
    }
    let (told, hears) = mpsc::channel();
    let handle = stream as usize;
    thread::spawn(move || {
        ok!(cuCtxSetCurrent(context as *mut _));
        ok!(cuMemsetD32Async(to, 1 << 20, 4, handle as CUstream));
        told.send(()).unwrap();
    });
    assert!(hears.recv_timeout(Duration::from_millis(100)).is_err());
    gate.open();
    hears.recv_timeout(Duration::from_secs(10)).unwrap();
    synchronize(stream);
    assert_eq!(download::<u32>(to, 4), [1 << 20; 4]);
}

#[test]
fn a_pinned_buffer_is_read_when_the_copy_is_made() {
    enter(number::SHARED);
    let (stream, pinned, to) = (stream(), Pinned::new(&OLD), allocate(BYTES));
    let gate = Gate::new(stream);
    ok!(cuMemcpyHtoDAsync_v2(to, pinned.as_ptr(), BYTES, stream));
    pinned.write(&NEW);
    gate.open();
    synchronize(stream);
    assert_eq!(download::<u32>(to, 4), NEW);
}

#[test]
fn a_pageable_buffer_is_read_at_the_call() {
    enter(number::SHARED);
    let (stream, to) = (stream(), allocate(BYTES));
    let mut pageable = OLD.to_vec();
    let gate = Gate::new(stream);
    ok!(cuMemcpyHtoDAsync_v2(to, pageable.as_ptr().cast(), BYTES, stream));
    pageable.copy_from_slice(&NEW);
    gate.open();
    synchronize(stream);
    assert_eq!(download::<u32>(to, 4), OLD);
}

#[test]
fn a_result_is_in_a_pinned_buffer_only_after_synchronizing() {
    enter(number::SHARED);
    let (stream, pinned, from) = (stream(), Pinned::new(&OLD), upload(&NEW));
    let gate = Gate::new(stream);
    ok!(cuMemcpyDtoHAsync_v2(pinned.as_ptr(), from, BYTES, stream));
    assert_eq!(pinned.read(), OLD);
    assert_eq!(cuda!(cuStreamQuery(stream)), CUresult::CUDA_ERROR_NOT_READY);
    gate.open();
    synchronize(stream);
    assert_eq!(pinned.read(), NEW);
    ok!(cuStreamQuery(stream));
}

#[test]
fn a_result_is_in_a_pageable_buffer_when_the_call_returns() {
    enter(number::SHARED);
    let (stream, from) = (stream(), allocate(BYTES));
    let mut pageable = [0_u32; 4];
    ok!(cuMemsetD32Async(from, 9, 4, stream));
    ok!(cuMemcpyDtoHAsync_v2(pageable.as_mut_ptr().cast(), from, BYTES, stream));
    assert_eq!(pageable, [9; 4]);
}

#[test]
fn a_synchronous_copy_does_not_wait_for_streams_that_do_not_block_it() {
    enter(number::SHARED);
    let (stream, to) = (stream(), upload(&OLD));
    let gate = Gate::new(stream);
    ok!(cuMemsetD32Async(to, 9, 4, stream));
    assert_eq!(download::<u32>(to, 4), OLD);
    gate.open();
    synchronize(stream);
    assert_eq!(download::<u32>(to, 4), [9; 4]);
}

#[test]
fn a_synchronous_copy_waits_for_streams_that_block_it() {
    enter(number::SHARED);
    let mut blocking = ptr::null_mut();
    ok!(cuStreamCreate(&mut blocking, 0));
    let to = upload(&vec![0_u32; 1 << 20]);
    for value in 0..20 {
        ok!(cuMemsetD32Async(to, value, 1 << 20, blocking));
    }
    assert_eq!(download::<u32>(to, 4), [19; 4]);
}

#[test]
fn memory_is_not_a_number_before_it_is_written() {
    enter(number::SHARED);
    let address = allocate(1000);
    assert_eq!(address % 256, 0);
    assert!(download::<f32>(address, 250).into_iter().all(f32::is_nan));
}

#[test]
fn an_event_makes_one_stream_wait_for_another() {
    enter(number::SHARED);
    let (first, second, event) = (stream(), stream(), event());
    let (from, to) = (upload(&OLD), allocate(BYTES));
    let gate = Gate::new(first);
    ok!(cuMemsetD32Async(from, 9, 4, first));
    ok!(cuEventRecord(event, first));
    ok!(cuStreamWaitEvent(second, event, 0));
    ok!(cuMemcpyDtoDAsync_v2(to, from, BYTES, second));
    assert_eq!(cuda!(cuEventQuery(event)), CUresult::CUDA_ERROR_NOT_READY);
    gate.open();
    synchronize(second);
    ok!(cuEventQuery(event));
    assert_eq!(download::<u32>(to, 4), [9; 4]);
}

#[test]
fn events_measure_time() {
    enter(number::SHARED);
    let (stream, start, end) = (stream(), event(), event());
    ok!(cuEventRecord(start, stream));
    let gate = Gate::new(stream);
    ok!(cuEventRecord(end, stream));
    let mut milliseconds = 0.0;
    assert_eq!(cuda!(cuEventElapsedTime_v2(&mut milliseconds, start, end)), CUresult::CUDA_ERROR_NOT_READY);
    ok!(cuEventSynchronize(start));
    std::thread::sleep(std::time::Duration::from_millis(5));
    gate.open();
    ok!(cuEventSynchronize(end));
    ok!(cuEventElapsedTime_v2(&mut milliseconds, start, end));
    assert!(milliseconds >= 4.0, "{milliseconds}");
    ok!(cuEventDestroy_v2(end));
    assert_eq!(cuda!(cuEventQuery(end)), CUresult::CUDA_ERROR_INVALID_HANDLE);
}

#[test]
fn freeing_waits_for_what_is_under_way() {
    enter(number::SHARED);
    let (stream, from, to) = (stream(), upload(&OLD), allocate(BYTES));
    let gate = Gate::new(stream);
    ok!(cuMemcpyDtoDAsync_v2(to, from, BYTES, stream));
    let opener = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        gate.open();
    });
    ok!(cuMemFree_v2(from));
    assert_eq!(download::<u32>(to, 4), OLD);
    opener.join().unwrap();
}
