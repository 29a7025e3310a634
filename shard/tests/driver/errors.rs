//! What goes wrong is answered as CUDA answers it.

use std::{ffi::CStr, ptr};

use cudarc::driver::sys::CUresult;

use super::gpu::{
    allocate, arguments, download, enter, kernel, launch, launch_early, module, number, stream, try_launch,
    upload,
};

#[test]
fn memory_has_an_end() {
    enter(number::OUT_OF_MEMORY);
    let (mut free, mut total, mut address) = (0, 0, 0);
    ok!(cuMemGetInfo_v2(&mut free, &mut total));
    assert_eq!((free, total), (4 << 30, 4 << 30));
    let out_of_memory = CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    assert_eq!(cuda!(cuMemAlloc_v2(&mut address, total + 1)), out_of_memory);
    let half = allocate(total / 2);
    assert_eq!(cuda!(cuMemAlloc_v2(&mut address, total / 2 + 1)), out_of_memory);
    ok!(cuMemGetInfo_v2(&mut free, &mut total));
    assert_eq!(free, total / 2);
    ok!(cuMemFree_v2(half));
    assert_eq!(cuda!(cuMemFree_v2(half)), CUresult::CUDA_ERROR_INVALID_VALUE);
    ok!(cuMemGetInfo_v2(&mut free, &mut total));
    assert_eq!(free, total);
}

#[test]
fn a_kernel_that_is_not_there_is_not_found() {
    enter(number::SHARED);
    let module = module("extern \"C\" __global__ void gelu() {}\nextern \"C\" __global__ void away() {}\n");
    let mut function = ptr::null_mut();
    ok!(cuModuleGetFunction(&mut function, module, c"gelu".as_ptr()));
    // One that is in the source and not in the emulation, and one that is in the emulation and not in the source.
    for name in [c"away", c"patches"] {
        let result = cuda!(cuModuleGetFunction(&mut function, module, name.as_ptr()));
        assert_eq!(result, CUresult::CUDA_ERROR_NOT_FOUND);
    }
    ok!(cuModuleUnload(module));
    let mut module = ptr::null_mut();
    let result = cuda!(cuModuleLoadData(&mut module, c"not an image".as_ptr().cast()));
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_IMAGE);
}

#[test]
fn errors_have_names() {
    enter(number::SHARED);
    let mut name = ptr::null();
    ok!(cuGetErrorName(CUresult::CUDA_ERROR_LAUNCH_FAILED, &mut name));
    // SAFETY: the names are constants that end with a zero.
    assert_eq!(unsafe { CStr::from_ptr(name) }, c"CUDA_ERROR_LAUNCH_FAILED");
}

#[test]
fn a_thread_without_a_context_can_do_nothing() {
    enter(number::SHARED);
    std::thread::spawn(|| {
        let result = cuda!(cuMemAlloc_v2(&mut 0, 8));
        assert_eq!(result, CUresult::CUDA_ERROR_INVALID_CONTEXT);
    })
    .join()
    .unwrap();
}

#[test]
fn devices_are_numbered() {
    enter(number::SHARED);
    let (mut count, mut device) = (0, 0);
    ok!(cuDeviceGetCount(&mut count));
    assert_eq!(count, number::ALL);
    let result = cuda!(cuDeviceGet(&mut device, number::ALL));
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_DEVICE);
}

#[test]
fn a_kernel_that_fails_fails_its_context() {
    enter(number::FAILING_KERNEL);
    let (stream, early_end) = (stream(), kernel("early_end"));
    launch(early_end, 1, 64, stream, &mut []);
    let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
    assert_eq!(cuda!(cuStreamSynchronize(stream)), failed);
    assert_eq!(try_launch(early_end, 1, 64, stream, &mut []), failed);
    assert_eq!(cuda!(cuMemAlloc_v2(&mut 0, 8)), failed);
    // Other contexts are as they were, and so is the emulation.
    enter(number::SHARED);
    let (stream, count, places) = (super::gpu::stream(), upload(&[0_u32]), allocate(64 * 8));
    launch(kernel("count_threads"), 1, 64, stream, &mut arguments![count, places]);
    ok!(cuStreamSynchronize(stream));
    assert_eq!(download::<u32>(count, 1), [64]);

    // One that may begin before the one before it has ended, and does not wait for that.
    ok!(cuDevicePrimaryCtxRelease_v2(number::FAILING_KERNEL));
    enter(number::FAILING_KERNEL);
    let (stream, x, count) = (super::gpu::stream(), allocate(128), 64_u64);
    launch_early(kernel("gelu"), 256, stream, &mut arguments![x, count]);
    assert_eq!(cuda!(cuStreamSynchronize(stream)), failed);
}

#[test]
fn an_illegal_address_fails_the_context_until_it_is_left() {
    enter(number::ILLEGAL_ADDRESS);
    let (reading, from, to) = (stream(), upload(&[1_u32; 64]), allocate(256));
    let read_global = kernel("read_global");
    let illegal = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
    for (index, expected) in [(63_u32, CUresult::CUDA_SUCCESS), (64, illegal)] {
        launch(read_global, 1, 64, reading, &mut arguments![from, index, to]);
        assert_eq!(cuda!(cuStreamSynchronize(reading)), expected);
    }
    ok!(cuDevicePrimaryCtxRelease_v2(number::ILLEGAL_ADDRESS));

    // A pointer that is in no allocation of the GPU.
    enter(number::ILLEGAL_ADDRESS);
    let (writing, host, count) = (stream(), vec![0_u32; 64], 64_u64);
    ok!(cuStreamSynchronize(writing));
    launch(kernel("gelu"), 1, 256, writing, &mut arguments![host.as_ptr(), count]);
    assert_eq!(cuda!(cuStreamSynchronize(writing)), illegal);
}

#[test]
fn memory_of_another_gpu_is_reached_where_that_is_enabled() {
    let peer = enter(number::PEER);
    let theirs = upload(&[3_u32; 4]);
    enter(number::SHARED);
    let mut can = 0;
    ok!(cuDeviceCanAccessPeer(&mut can, number::SHARED, number::PEER));
    assert_eq!(can, 1);
    ok!(cuCtxEnablePeerAccess(peer, 0));
    let again = cuda!(cuCtxEnablePeerAccess(peer, 0));
    assert_eq!(again, CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    let (stream, index, to) = (stream(), 2_u32, allocate(4));
    launch(kernel("read_global"), 1, 1, stream, &mut arguments![theirs, index, to]);
    ok!(cuStreamSynchronize(stream));
    assert_eq!(download::<u32>(to, 1), [3]);
}
