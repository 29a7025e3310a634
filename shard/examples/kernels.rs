//! How fast the CPU kernels are here: bytes of weights a second for one row, operations a second for many rows, for each
//! instruction set. `cargo run --release -p lockstep-shard --example kernels [threads]`, on a quiet machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use lockstep_shard::collective::Alone;
use lockstep_shard::device::cpu::{CpuDevice, CpuOptions, InstructionSet};
use lockstep_shard::device::{
    Activations, AttentionHeads, DType, Device, DeviceError, HostElements, HostMatrix, RankDevice,
    SequenceRows, StepRows,
};
use lockstep_shard::progress::Progress;

/// Seconds of the fastest of several calls.
fn fastest(mut call: impl FnMut() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    let mut fastest = f64::INFINITY;
    let begin = Instant::now();
    let mut calls = 0;
    while calls < 3 || begin.elapsed() < Duration::from_millis(400) {
        let start = Instant::now();
        call()?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
        calls += 1;
    }
    Ok(fastest)
}

fn matrix(rows: usize, cols: usize, dtype: DType) -> HostMatrix {
    let value = |i: usize| (i % 251) as f32 / 251.0 - 0.5;
    let data = match dtype {
        DType::Bf16 => HostElements::Bf16((0..rows * cols).map(|i| bf16::from_f32(value(i))).collect()),
        DType::F32 => HostElements::F32((0..rows * cols).map(value).collect()),
    };
    HostMatrix { rows, cols, data }
}

fn linear(device: &CpuDevice, dtype: DType) -> Result<(), DeviceError> {
    // The MLP of the 3B model on one of two ranks.
    let (outputs, inputs) = (11008, 2048);
    let weight = device.pack_linear(matrix(outputs, inputs, dtype), None)?;
    let bytes = (outputs * inputs * dtype.size_bytes()) as f64;
    let seconds = fastest(|| device.verify_weights())?;
    println!("  verify {dtype:?}: {:6.1} GB/s", bytes / seconds * 1e-9);
    for rows in [1, 2, 4, 8, 16, 64, 512] {
        let x = device.upload(rows, inputs, &vec![0.5; rows * inputs])?;
        let seconds = fastest(|| device.linear(&x, &weight).map(drop))?;
        let operations = 2.0 * (rows * outputs * inputs) as f64;
        println!(
            "  linear {dtype:?} {rows:4} rows: {:7.3} ms, {:6.1} GB/s, {:7.1} GFLOP/s",
            seconds * 1e3,
            bytes / seconds * 1e-9,
            operations / seconds * 1e-9
        );
    }
    Ok(())
}

fn attention(device: &CpuDevice) -> Result<(), DeviceError> {
    let heads = AttentionHeads { kv_of_query: vec![0; 8], num_kv: 1, head_dim: 128 };
    let num_blocks = 128;
    let cache = device.kv_cache(DType::Bf16, 1, &heads, num_blocks)?;
    let num_tokens = num_blocks * 32;
    for rows in [1, 1000] {
        let qkv = device.upload(rows, 10 * 128, &vec![0.1; rows * 10 * 128])?;
        let sequence = SequenceRows {
            rows: 0..rows,
            num_computed_tokens: num_tokens - rows,
            block_table: (0..num_blocks as u32).collect(),
        };
        let sequences = [sequence];
        let [cos, sin] = [device.empty(rows, 64)?, device.empty(rows, 64)?];
        let none = vec![0; rows];
        let step = StepRows {
            token_ids: &none,
            drawn: &[],
            slots: &none,
            sequences: &sequences,
            heads: &heads,
            cos,
            sin,
        };
        let step = device.rows(step)?;
        let seconds = fastest(|| device.paged_attention(&qkv, &heads, &step, &cache, 0).map(drop))?;
        let operations = 4.0 * (rows * 8 * 128) as f64 * (num_tokens - rows / 2) as f64;
        println!(
            "  paged attention, {rows:4} of {num_tokens} tokens: {:7.3} ms, {:7.1} GFLOP/s",
            seconds * 1e3,
            operations / seconds * 1e-9
        );
    }
    Ok(())
}

fn vision(device: &CpuDevice) -> Result<(), DeviceError> {
    let (num_heads, head_dim, rows) = (8, 80, 4096);
    let qkv = device.upload(rows, 3 * num_heads * head_dim, &vec![0.1; rows * 3 * num_heads * head_dim])?;
    for window in [64, 4096] {
        let cu_seqlens: Vec<u32> = (0..=rows as u32).step_by(window).collect();
        let seconds =
            fastest(|| device.vision_attention(&qkv, num_heads, head_dim, &cu_seqlens, 0..rows).map(drop))?;
        let operations = 4.0 * (rows * window * num_heads * head_dim) as f64;
        println!(
            "  vision attention, windows of {window:4}: {:7.3} ms, {:7.1} GFLOP/s",
            seconds * 1e3,
            operations / seconds * 1e-9
        );
    }
    let mut x = device.upload(qkv.rows(), qkv.cols(), &vec![0.1; qkv.rows() * qkv.cols()])?;
    let seconds = fastest(|| device.gelu(&mut x))?;
    println!("  gelu: {:7.2} ns an element", seconds * 1e9 / (x.rows() * x.cols()) as f64);
    Ok(())
}

fn main() -> Result<(), DeviceError> {
    let threads = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(1);
    for set in InstructionSet::available() {
        println!("{set}, {threads} threads");
        let device = CpuDevice::new(CpuOptions {
            threads,
            cpus: Vec::new(),
            workspace_bytes: 256 << 20,
            instruction_set: Some(set),
            collective: Box::new(Alone),
            progress: Arc::new(Progress::new(threads)),
        })?;
        linear(&device, DType::Bf16)?;
        linear(&device, DType::F32)?;
        attention(&device)?;
        vision(&device)?;
    }
    Ok(())
}
