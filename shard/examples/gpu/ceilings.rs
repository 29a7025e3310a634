//! What the GPU itself can do: how fast its memory is read, and how fast a library multiplies.

use anyhow::Result;
use half::bf16;
use lockstep_shard::device::{
    Device, HostElements, HostMatrix,
    cuda::{Gpu, libraries::Libraries, probe::Probe},
};
use serde_json::json;

use super::{
    Args,
    kernels::open,
    measure::{Ceilings, Report, Work},
};

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
    let probe = Probe::new(&gpu, args.bytes)?;
    let about = json!({ "bytes": args.bytes });
    let copied = report.time(&gpu, || Ok(probe.copy()?))?;
    report.tell(
        "copy in the GPU's memory, read and written",
        copied,
        Work::bytes(args.bytes),
        about.clone(),
    )?;
    let set = report.time(&gpu, || Ok(probe.fill()?))?;
    report.tell("fill of the GPU's memory", set, Work::bytes(args.bytes), about.clone())?;
    let mut fastest = args.bytes as f64 / copied;
    match probe.reader(libraries.gpu.arch) {
        Ok(reader) => {
            let seconds = report.time(&gpu, || Ok(probe.read(&reader)?))?;
            report.tell("read of the GPU's memory", seconds, Work::bytes(args.bytes), about)?;
            fastest = fastest.max(args.bytes as f64 / seconds);
        }
        Err(error) => report.leave_out("read of the GPU's memory", &error.to_string())?,
    }
    Ok(fastest)
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
