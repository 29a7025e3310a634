//! What the GPU itself can do: how fast its memory is read, and how fast a library multiplies.
#![allow(unsafe_code)]

use std::{ffi::c_void, ptr};

use anyhow::{Context, Result};
use cudarc::driver::{result, sys};
use half::bf16;
use lockstep_shard::device::{
    Device, HostElements, HostMatrix,
    cuda::{
        Gpu,
        compile::{Compiler, Source},
        libraries::Libraries,
    },
};
use serde_json::json;

use super::{
    Args,
    kernels::open,
    measure::{Ceilings, Report, Work},
};

/// Reads everything and keeps nothing. Four loads are under way in each thread at a time.
const READ: Source = Source {
    file: "read.cu",
    text: r#"
extern "C" __global__ void __launch_bounds__(256) read_all(const uint4* from, unsigned long long count, unsigned* never) {
  const unsigned long long stride = static_cast<unsigned long long>(gridDim.x) * 256;
  unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * 256 + threadIdx.x;
  unsigned mixed = 0;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
    mixed ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += stride) {
    const uint4 a = from[i];
    mixed ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  // The compiler cannot know that this never is: the memory has one byte everywhere, and so has what is mixed of it.
  if (mixed == 0x12345678u) *never = mixed;
}
"#,
};

/// Blocks of the kernel above for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 16;

/// Measures both, and tells the other ways in which memory is read beside the fastest.
pub fn measure(args: &Args, libraries: &Libraries, report: &mut Report) -> Result<Ceilings> {
    let bytes_per_s = bandwidth(args, libraries, report)?;
    let flops_per_s = matrix_rate(args, libraries, report)?;
    println!("ceilings: {:.1} GB/s read, {:.1} TFLOP/s", 1e-9 * bytes_per_s, 1e-12 * flops_per_s);
    Ok(Ceilings { bytes_per_s, flops_per_s })
}

/// The fastest of: a kernel that only reads, and the driver's own copy, whose bytes are read and written.
fn bandwidth(args: &Args, libraries: &Libraries, report: &mut Report) -> Result<f64> {
    let gpu = Gpu::open(args.gpu as i32)?;
    let memory = Memory::new(args.bytes)?;
    gpu.fill(memory.0, 0x5a, args.bytes)?;
    let about = json!({ "bytes": args.bytes });
    let half = args.bytes / 2;
    let copied = report.time(&gpu, || Ok(gpu.copy(memory.0, memory.0 + half as u64, half)?))?;
    report.tell(
        "copy in the GPU's memory, read and written",
        copied,
        Work::bytes(args.bytes),
        about.clone(),
    )?;
    let set = report.time(&gpu, || Ok(gpu.fill(memory.0, 0x5a, args.bytes)?))?;
    report.tell("fill of the GPU's memory", set, Work::bytes(args.bytes), about.clone())?;
    let mut fastest = args.bytes as f64 / copied;
    match read(&gpu, libraries, &memory, args.bytes, report) {
        Ok(seconds) => {
            report.tell("read of the GPU's memory", seconds, Work::bytes(args.bytes), about)?;
            fastest = fastest.max(args.bytes as f64 / seconds);
        }
        Err(error) => report.leave_out("read of the GPU's memory", &format!("{error:#}"))?,
    }
    Ok(fastest)
}

/// Seconds of reading all of `memory`.
fn read(gpu: &Gpu, libraries: &Libraries, memory: &Memory, bytes: usize, report: &Report) -> Result<f64> {
    let cubin = Compiler::new(libraries.gpu.arch)?.compile(READ, &[])?.cubin;
    // SAFETY: NVRTC made the image, and the GPU is open.
    let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.context("the reading kernel")?;
    // SAFETY: the module is loaded, for as long as the process lives.
    let function = unsafe { result::module::get_function(module, c"read_all".into()) }?;
    let count = gpu.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let grid = (count.unsigned_abs() * BLOCKS_PER_MULTIPROCESSOR as u32, 1, 1);
    let mut from = memory.0;
    let mut vectors = (bytes / 16) as u64;
    let mut arguments: [*mut c_void; 3] =
        [ptr::from_mut(&mut from).cast(), ptr::from_mut(&mut vectors).cast(), ptr::null_mut()];
    let mut never = memory.0;
    arguments[2] = ptr::from_mut(&mut never).cast();
    report.time(gpu, || {
        // SAFETY: the arguments are those of the kernel above, and the memory is as long as it says.
        let launched =
            unsafe { result::launch_kernel(function, grid, (256, 1, 1), 0, gpu.stream(), &mut arguments) };
        launched.context("the reading kernel")
    })
}

/// Operations a second of a large product by cuBLASLt, of random numbers: of zeros it may be faster.
fn matrix_rate(args: &Args, libraries: &Libraries, report: &mut Report) -> Result<f64> {
    let size = args.square;
    let name = format!("product of {size} x {size} x {size}");
    if libraries.cublas_lt.is_none() {
        report.leave_out(&name, "there is no cuBLASLt")?;
        return Ok(0.0);
    }
    let device = open(args, libraries, 6 * size * size + (64 << 20), size, false)?;
    let numbers = random(size * size, 1);
    let x: Vec<f32> = numbers.iter().map(|number| number.to_f32()).collect();
    let x = device.device.upload(size, size, &x)?;
    let weight = HostMatrix { rows: size, cols: size, data: HostElements::Bf16(random(size * size, 2)) };
    let weight = device.device.pack_linear(weight, None)?;
    let seconds = report.time(&device.gpu, || Ok(device.device.linear(&x, &weight).map(drop)?))?;
    let work = Work::product(size, size, size);
    report.tell(&name, seconds, work, json!({ "by": "cuBLASLt" }))?;
    Ok(work.flops / seconds)
}

/// Numbers between -1 and 1.
pub fn random(count: usize, seed: u64) -> Vec<bf16> {
    // Sebastiano Vigna's SplitMix64 (public domain, 2015).
    let mut state = seed;
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut numbers = Vec::with_capacity(count + 4);
    while numbers.len() < count {
        let word = word();
        let lane = |lane: u32| bf16::from_f32(f32::from((word >> (16 * lane)) as i16) / 32768.0);
        numbers.extend((0..4).map(lane));
    }
    numbers.truncate(count);
    numbers
}

/// Memory of the GPU that is current.
struct Memory(sys::CUdeviceptr);

impl Memory {
    fn new(bytes: usize) -> Result<Self> {
        // SAFETY: given back in `drop`.
        let address = unsafe { result::malloc_sync(bytes) };
        Ok(Self(address.with_context(|| format!("reserving {bytes} bytes"))?))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: reserved in `new`; freeing waits for what still uses it.
        let _ = unsafe { result::free_sync(self.0) };
    }
}
