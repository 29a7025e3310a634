//! How fast a GPU is, and what part of that Lockstep's kernels and steps reach: read bandwidth and bf16 matrix rate first, then, in the
//! same run and as parts of these, whole decode steps, prompts, and the vision encoding of a picture, then each kernel of the decode
//! path, products and attention of prompts.
//!
//! `cargo run --release -p lockstep-shard --example gpu -- --model DIR`, with a checkpoint that `random-checkpoint` wrote. Each measure is
//! a line of JSON in the file of `--json`, and a line of the table.

mod ceilings;
mod kernels;
mod measure;
mod steps;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use lockstep_shard::{
    config::Config,
    device::cuda::{
        Gpu,
        libraries::{Libraries, Wanted},
    },
};
use measure::{Ceilings, Report};

/// Measures a GPU, and Lockstep on it.
#[derive(Parser)]
struct Args {
    /// Checkpoint whose dimensions are measured, and which the steps run on
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The GPU, as the driver counts them
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// What is measured
    #[arg(long, value_enum, value_delimiter = ',', default_value = "ceilings,steps,kernels")]
    parts: Vec<Part>,
    /// Tokens of context of decode steps and of their attention
    #[arg(long, value_delimiter = ',', default_value = "1024,32768")]
    contexts: Vec<usize>,
    /// Sequences of a decode step
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batches: Vec<usize>,
    /// Tokens of prompts
    #[arg(long, value_delimiter = ',', default_value = "1024,8192,32768")]
    prompts: Vec<usize>,
    /// The most tokens that one step computes: longer prompts take several
    #[arg(long, default_value_t = 8192)]
    step_tokens: usize,
    /// The picture, width and height in pixels, multiples of 28
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = picture, default_value = "1036x672")]
    picture: [usize; 2],
    /// Rows, inputs and outputs of the product that the matrix rate is measured with
    #[arg(long, default_value_t = 8192)]
    square: usize,
    /// Bytes that the bandwidth is measured with: many times the cache
    #[arg(long, default_value_t = 8 << 30)]
    bytes: usize,
    /// Milliseconds that a measure takes, about
    #[arg(long, default_value_t = 200)]
    measure_ms: u64,
    /// Decode steps that are timed, of each batch and context
    #[arg(long, default_value_t = 32)]
    steps: usize,
    /// File for lines of JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Folder for compiled kernels; they are compiled at each start without
    #[arg(long, value_name = "DIR")]
    kernel_cache: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Read bandwidth and matrix rate.
    Ceilings,
    /// Steps of the whole model.
    Steps,
    /// Kernels, one by one.
    Kernels,
}

fn picture(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.parse().ok().filter(|side: &usize| *side > 0 && side.is_multiple_of(28));
    let sides = text.split_once('x').and_then(|(w, h)| Some([side(w)?, side(h)?]));
    sides.ok_or_else(|| "it is not WIDTHxHEIGHT in multiples of 28".to_owned())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let libraries = Libraries::find(Wanted { ordinal: args.gpu, world_size: 1 })?;
    println!("{libraries}");
    // Open for good: libraries keep what they have set up in a context, which would go with the last that has it open.
    std::mem::forget(Gpu::open(args.gpu as i32)?);
    let config = Config::open(&args.model).with_context(|| args.model.display().to_string())?;
    let mut report = Report::new(args.json.as_deref(), args.measure_ms)?;
    if args.parts.contains(&Part::Ceilings) {
        report.ceilings = ceilings::measure(&args, &libraries, &mut report)?;
    } else {
        println!("no ceilings are measured: there are no parts of them");
        report.ceilings = Ceilings::default();
    }
    if args.parts.contains(&Part::Steps) {
        steps::measure(&args, &config, &mut report)?;
    }
    if args.parts.contains(&Part::Kernels) {
        kernels::measure(&args, &libraries, &config, &mut report)?;
    }
    Ok(())
}
