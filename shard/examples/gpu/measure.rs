//! Timing, and what is said of a measure.

use std::{
    fs::File,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use lockstep_shard::device::cuda::Gpu;
use serde_json::{Value, json};

/// Repetitions before those that count: libraries set themselves up in them, and graphs are made.
const WARMUP: usize = 3;

/// The most repetitions that count.
const MAX_REPETITIONS: usize = 2000;

/// What the GPU itself can do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ceilings {
    /// Bytes read in a second.
    pub bytes_per_s: f64,
    /// Operations of bf16 matrix products in a second.
    pub flops_per_s: f64,
}

/// What a measure moves and computes, of which it may be a part of what the GPU can do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Bytes that have to be read.
    pub bytes: f64,
    /// Operations: two for a product and a sum.
    pub flops: f64,
}

impl Work {
    /// Of bytes alone.
    pub fn bytes(bytes: usize) -> Self {
        Self { bytes: bytes as f64, flops: 0.0 }
    }

    /// Of a product of so many rows, inputs and outputs in bf16: the weights are read once, the activations read and written.
    pub fn product(rows: usize, inputs: usize, outputs: usize) -> Self {
        let (rows, inputs, outputs) = (rows as f64, inputs as f64, outputs as f64);
        let bytes = 2.0 * (inputs * outputs + rows * (inputs + outputs));
        Self { bytes, flops: 2.0 * rows * inputs * outputs }
    }
}

/// Where measures are told.
pub struct Report {
    json: Option<File>,
    target: Duration,
    /// As measured in this run.
    pub ceilings: Ceilings,
}

impl Report {
    /// Prints the head of the table.
    pub fn new(json: Option<&Path>, measure_ms: u64) -> Result<Self> {
        println!("{:<56}{:>12}{:>10}{:>10}{:>10}{:>11}", "", "ms", "GB/s", "TFLOP/s", "of read", "of matrix");
        let json = json.map(File::create).transpose()?;
        Ok(Self { json, target: Duration::from_millis(measure_ms), ceilings: Ceilings::default() })
    }

    /// Seconds of one call, by the wall clock around many of them that the GPU was given one after the other.
    pub fn time(&self, gpu: &Gpu, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
        for _ in 0..WARMUP {
            call()?;
        }
        gpu.synchronize()?;
        let start = Instant::now();
        call()?;
        gpu.synchronize()?;
        let once = start.elapsed().max(Duration::from_micros(1));
        let repetitions = (self.target.as_secs_f64() / once.as_secs_f64()) as usize;
        let repetitions = repetitions.clamp(2, MAX_REPETITIONS);
        let start = Instant::now();
        for _ in 0..repetitions {
            call()?;
        }
        gpu.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / repetitions as f64)
    }

    /// Tells a measure of `seconds`. `about` goes into the JSON beside it.
    pub fn tell(&mut self, name: &str, seconds: f64, work: Work, about: Value) -> Result<()> {
        let (bytes_per_s, flops_per_s) = (work.bytes / seconds, work.flops / seconds);
        let share = |rate: f64, ceiling: f64| (rate > 0.0 && ceiling > 0.0).then(|| rate / ceiling);
        let of_read = share(bytes_per_s, self.ceilings.bytes_per_s);
        let of_matrix = share(flops_per_s, self.ceilings.flops_per_s);
        let number = |value: f64| if value > 0.0 { format!("{value:.1}") } else { String::new() };
        let part = |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.1}%", 100.0 * share));
        println!(
            "{name:<56}{:>12.4}{:>10}{:>10}{:>10}{:>11}",
            1e3 * seconds,
            number(1e-9 * bytes_per_s),
            number(1e-12 * flops_per_s),
            part(of_read),
            part(of_matrix)
        );
        let line = json!({
            "name": name,
            "ms": 1e3 * seconds,
            "bytes": work.bytes,
            "flops": work.flops,
            "of_read_bandwidth": of_read,
            "of_matrix_rate": of_matrix,
            "about": about,
        });
        self.write(&line)
    }

    /// Says what is left out, and why.
    pub fn leave_out(&mut self, name: &str, why: &str) -> Result<()> {
        println!("{name:<56}left out: {why}");
        self.write(&json!({ "name": name, "left_out": why }))
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        if let Some(file) = &mut self.json {
            writeln!(file, "{line}")?;
        }
        Ok(())
    }
}
