//! Kernels of the production's sources run with the arguments that the host gives.

use std::{ffi::CString, fs, path::Path, ptr, time::Instant};

use cudarc::{
    driver::sys::{CUfunction_attribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUresult},
    nvrtc::{
        result::{compile_program, create_program, get_program_log},
        sys::{nvrtcCreateProgram, nvrtcResult},
    },
};
use half::bf16;

use super::gpu::{
    BEGINS_EARLY, Gate, allocate, arguments, download, enter, image, kernel, launch, launch_with, number,
    stream, synchronize, try_launch, upload,
};

fn numbers(count: usize, seed: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32(((i * 37 + seed * 101) % 200) as f32 / 100.0 - 1.0)).collect()
}

fn norm(x: &[bf16], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let mean = x.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>() / x.len() as f32;
    x.iter().zip(weight).map(|(x, weight)| x.to_f32() / (mean + epsilon).sqrt() * weight).collect()
}

fn assert_close(got: &[bf16], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got.to_f32() - expected).abs();
        assert!(difference <= 0.01 * expected.abs() + 1e-3, "{index}: {got} is not {expected}");
    }
}

#[test]
fn rows_are_normed() {
    enter(number::SHARED);
    let (rows, cols, epsilon) = (5_usize, 72_u32, 1e-6_f32);
    let x = numbers(rows * cols as usize, 1);
    let weight: Vec<f32> = (0..cols).map(|i| 1.0 + i as f32 / 100.0).collect();
    let (device_x, device_weight, normed) = (upload(&x), upload(&weight), allocate(size_of_val(&x[..])));
    let stream = stream();
    let mut arguments = arguments![device_x, device_weight, epsilon, cols, normed];
    launch(kernel("norm_rows"), rows as u32, 256, stream, &mut arguments);
    synchronize(stream);
    let expected: Vec<f32> = x.chunks(cols as usize).flat_map(|row| norm(row, &weight, epsilon)).collect();
    assert_close(&download(normed, x.len()), &expected);
}

#[test]
fn arguments_are_copied_at_the_call() {
    enter(number::SHARED);
    let (stream, rows, cols) = (stream(), 3_usize, 16_u32);
    let table = numbers(8 * cols as usize, 2);
    let (device_table, ids, out) =
        (upload(&table), upload(&[2_u32, 5, 0]), allocate(rows * cols as usize * 2));
    let gate = Gate::new(stream);
    let (mut first_id, num_ids) = (0_u32, 8_u32);
    let mut arguments = arguments![device_table, first_id, num_ids, ids, cols, out];
    launch(kernel("embedding"), rows as u32, 256, stream, &mut arguments);
    first_id += 100;
    assert_eq!(first_id, 100);
    gate.open();
    synchronize(stream);
    let expected: Vec<bf16> =
        [2, 5, 0].iter().flat_map(|&id| table[id * 16..(id + 1) * 16].iter().copied()).collect();
    assert_eq!(download::<bf16>(out, expected.len()), expected);
}

#[test]
fn a_launch_with_attributes_is_a_launch() {
    enter(number::SHARED);
    let (stream, x, count) = (stream(), upload(&numbers(64, 3)), 64_u64);
    let function = kernel("gelu");
    let not_early = CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 0 };
    let result = launch_with(BEGINS_EARLY, not_early, function, 256, stream, &mut arguments![x, count]);
    assert_eq!(result, CUresult::CUDA_SUCCESS);
    synchronize(stream);
    assert_ne!(download::<bf16>(x, 64), numbers(64, 3));
    let no_blocks = CUlaunchAttributeValue { pad: [0; 64] };
    let cluster = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    let result = launch_with(cluster, no_blocks, function, 256, stream, &mut arguments![x, count]);
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
fn a_launch_beyond_what_a_gpu_has_is_refused() {
    enter(number::SHARED);
    let (stream, x, count) = (stream(), allocate(128), 64_u64);
    let function = kernel("gelu");
    let mut arguments = arguments![x, count];
    for (grid, block) in [(0, 256), (1, 0), (1, 1025)] {
        let result = try_launch(function, grid, block, stream, &mut arguments);
        assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE, "{grid}, {block}");
    }
    let with_shared = |bytes| {
        let mut arguments = arguments![x, count];
        let values = arguments.as_mut_ptr();
        cuda!(cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, bytes, stream, values, ptr::null_mut()))
    };
    assert_eq!(with_shared(50 << 10), CUresult::CUDA_ERROR_INVALID_VALUE);
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    ok!(cuFuncSetAttribute(function, attribute, 100 << 10));
    assert_eq!(with_shared(50 << 10), CUresult::CUDA_SUCCESS);
    let too_much = cuda!(cuFuncSetAttribute(function, attribute, 228 << 10));
    assert_eq!(too_much, CUresult::CUDA_ERROR_INVALID_VALUE);
    synchronize(stream);
}

/// The names of an image.
fn names(image: &[u8]) -> Vec<String> {
    let names = image.split(|&byte| byte == b'\n').nth(1).unwrap();
    let names = names.split(|&byte| byte == 0).map(|name| String::from_utf8(name.to_vec()).unwrap());
    names.filter(|name| !name.is_empty()).collect()
}

#[test]
fn an_image_has_the_kernels_of_its_source() {
    enter(number::SHARED);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/cuda/kernels");
    // What they include makes none.
    let without_includes = |path: &Path| -> String {
        let source = fs::read_to_string(path).unwrap();
        source.lines().filter(|line| !line.starts_with("#include")).map(|line| format!("{line}\n")).collect()
    };
    let paths = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut all = Vec::new();
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "cu")) {
        let names = names(&image(&without_includes(&path)));
        assert!(!names.is_empty(), "{}", path.display());
        all.extend(names);
    }
    for name in &all {
        kernel(name);
    }
    // One that is written out, and two that macros make.
    for name in ["norm_rows", "gemv_8", "vision_attention_80"] {
        assert!(all.iter().any(|other| other == name), "{name}");
    }
}

#[test]
fn a_source_that_does_not_compile_says_why() {
    enter(number::SHARED);
    for (source, message) in
        [("int x;\n#error no such luck\n", "no such luck"), ("#include \"away.cuh\"\n", "away.cuh")]
    {
        let program = create_program(&CString::new(source).unwrap(), None).unwrap();
        // SAFETY: the program exists until the process ends.
        let (result, log) = unsafe {
            let result = compile_program(program, &["--gpu-architecture=sm_90"]);
            (result, get_program_log(program).unwrap())
        };
        assert_eq!(result.unwrap_err().0, nvrtcResult::NVRTC_ERROR_COMPILATION);
        let log: String = log.iter().map(|&byte| char::from(byte as u8)).collect();
        assert!(log.contains(message), "{log}");
    }
}

#[test]
fn headers_are_found_by_their_names() {
    enter(number::SHARED);
    let (header, header_name) = (c"#define ENTRY(N) extern \"C\" __global__ void gemv_##N() {}", c"e.cuh");
    let mut program = ptr::null_mut();
    // SAFETY: all texts end with a zero, and there is one header.
    unsafe {
        let source = c"#include \"e.cuh\"\nENTRY(1)\nENTRY(2)\n";
        let (headers, header_names) = ([header.as_ptr()], [header_name.as_ptr()]);
        let result = nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            c"s.cu".as_ptr(),
            1,
            headers.as_ptr(),
            header_names.as_ptr(),
        );
        result.result().unwrap();
        compile_program(program, &["--gpu-architecture=sm_90"]).unwrap();
    }
}

/// How long a product of few rows takes, for whoever wonders whether a model can run this way. Shown with `--nocapture`.
#[test]
fn products_of_few_rows_take_milliseconds() {
    enter(number::SHARED);
    let (num_inputs, num_outputs) = (512_u32, 256_u32);
    let (x, weight) = (numbers(512, 4), numbers(512 * 256, 5));
    let (device_x, device_weight, y) = (upload(&x), upload(&weight), allocate(512));
    let (stream, function, no_bias) = (stream(), kernel("gemv_1"), 0_u64);
    let mut arguments = arguments![device_x, device_weight, no_bias, num_inputs, num_outputs, y];
    let start = Instant::now();
    for _ in 0..10 {
        launch(function, 64, 128, stream, &mut arguments);
    }
    synchronize(stream);
    println!("gemv_1 of [256, 512]: {:.2?}", start.elapsed() / 10);
    let dot = |row: &[bf16]| row.iter().zip(&x).map(|(w, x)| w.to_f32() * x.to_f32()).sum();
    let expected: Vec<f32> = weight.chunks(512).map(dot).collect();
    assert_close(&download(y, 256), &expected);
}
