//! What `bench` found, as JSON and as a table.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Duration,
};

use serde::Serialize;

use super::{args::BenchArgs, run::Sample};
use crate::{Error, Model, ShardMemory, error::code_name};

/// The samples and errors of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    samples: Vec<Sample>,
    errors: BTreeMap<&'static str, Failure>,
}

/// Requests that failed with the same code.
#[derive(Debug, Clone, Serialize)]
struct Failure {
    count: usize,
    first_message: String,
}

impl Tally {
    /// Takes the outcome of one request.
    pub(crate) fn add(&mut self, outcome: Result<Sample, Error>) {
        match outcome {
            Ok(sample) => self.samples.push(sample),
            Err(error) => {
                let code = error.code().map_or("PROTOCOL", code_name);
                let failure = self
                    .errors
                    .entry(code)
                    .or_insert_with(|| Failure { count: 0, first_message: error.to_string() });
                failure.count += 1;
            }
        }
    }

    fn spread(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::new(self.samples.iter().filter_map(of).collect())
    }
}

/// How a figure is spread over the requests; percentiles by nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) p95: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None of no values.
    pub(crate) fn new(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let rank = |quantile: f64| values[(quantile * values.len() as f64).ceil() as usize - 1];
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Spread { min, median, p95: rank(0.95), max })
    }
}

/// What `bench --json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    server: String,
    model: ModelSummary,
    settings: Settings,
    completed: usize,
    errors: BTreeMap<&'static str, Failure>,
    wall_s: f64,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    prompt_tokens_per_s: f64,
    /// Tokens of a prompt, picture included.
    prompt_tokens: Option<Spread>,
    picture: Option<Picture>,
    ttft_ms: Option<Spread>,
    tpot_ms: Option<Spread>,
    latency_ms: Option<Spread>,
    /// By the server's own clock.
    server_ms: ServerTimes,
    shards: Vec<ShardMemory>,
}

#[derive(Debug, Serialize)]
struct ModelSummary {
    name: String,
    architecture: String,
    device: String,
    dtype: String,
    world_size: u32,
    version: String,
}

#[derive(Debug, Serialize)]
struct Settings {
    concurrency: u32,
    requests: u32,
    prompt_tokens: u32,
    max_tokens: u32,
    image: Option<String>,
    seed: u64,
}

#[derive(Debug, Serialize)]
struct Picture {
    resized_width: u32,
    resized_height: u32,
    tokens: u32,
}

#[derive(Debug, Serialize)]
struct ServerTimes {
    queue: Option<Spread>,
    media: Option<Spread>,
    vision: Option<Spread>,
    prefill: Option<Spread>,
    /// Of one token after the first.
    decode_per_token: Option<Spread>,
}

impl Report {
    /// The report of a run of `wall` time.
    pub(crate) fn new(args: &BenchArgs, model: &Model, wall: Duration, tally: &Tally) -> Self {
        let wall_s = wall.as_secs_f64();
        let per_s = |total: f64| if wall_s > 0.0 { total / wall_s } else { 0.0 };
        let sum =
            |of: fn(&Sample) -> u32| tally.samples.iter().map(|sample| f64::from(of(sample))).sum::<f64>();
        Report {
            server: args.server.clone(),
            model: ModelSummary {
                name: model.name.clone(),
                architecture: model.architecture.clone(),
                device: model.device.clone(),
                dtype: model.dtype.clone(),
                world_size: model.world_size,
                version: model.version.clone(),
            },
            settings: Settings {
                concurrency: args.concurrency,
                requests: args.requests,
                prompt_tokens: args.prompt_tokens,
                max_tokens: args.max_tokens,
                image: args.image.as_ref().map(|path| path.display().to_string()),
                seed: args.seed,
            },
            completed: tally.samples.len(),
            errors: tally.errors.clone(),
            wall_s,
            requests_per_s: per_s(tally.samples.len() as f64),
            output_tokens_per_s: per_s(sum(|sample| sample.completion_tokens)),
            prompt_tokens_per_s: per_s(sum(|sample| sample.prompt_tokens)),
            prompt_tokens: tally.spread(|sample| Some(f64::from(sample.prompt_tokens))),
            picture: tally.samples.iter().find_map(|sample| {
                sample.medium.map(|(resized_width, resized_height, tokens)| Picture {
                    resized_width,
                    resized_height,
                    tokens,
                })
            }),
            ttft_ms: tally.spread(|sample| Some(milliseconds(sample.ttft))),
            tpot_ms: tally.spread(|sample| sample.tpot.map(milliseconds)),
            latency_ms: tally.spread(|sample| Some(milliseconds(sample.latency))),
            server_ms: ServerTimes {
                queue: tally.spread(|sample| Some(sample.timings.queue_ms)),
                media: tally.spread(|sample| sample.medium.map(|_| sample.timings.media_ms)),
                vision: tally.spread(|sample| sample.medium.map(|_| sample.timings.vision_ms)),
                prefill: tally.spread(|sample| Some(sample.timings.prefill_ms)),
                decode_per_token: tally.spread(|sample| {
                    let after_first = sample.completion_tokens.checked_sub(1).filter(|tokens| *tokens > 0)?;
                    Some(sample.timings.decode_ms / f64::from(after_first))
                }),
            },
            shards: model.shards.clone(),
        }
    }

    /// How many of the measured requests failed.
    pub(crate) fn num_failed(&self) -> usize {
        self.errors.values().map(|failure| failure.count).sum()
    }

    /// Writes the report for people.
    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let ModelSummary { name, device, dtype, world_size, version, .. } = &self.model;
        writeln!(out, "{name}, {dtype} on {world_size} x {device}, lockstep {version} at {}", self.server)?;
        let Settings { concurrency, requests, prompt_tokens, max_tokens, image, seed } = &self.settings;
        write!(out, "{requests} requests, {concurrency} at a time, {prompt_tokens} + {max_tokens} tokens")?;
        if let (Some(path), Some(picture)) = (image, &self.picture) {
            let Picture { resized_width, resized_height, tokens } = picture;
            write!(out, ", {path} as {resized_width}x{resized_height} ({tokens} tokens)")?;
        }
        writeln!(out, ", seed {seed}\n")?;

        writeln!(out, "{:<30}{:>10}{:>10}{:>10}{:>10}", "milliseconds", "min", "median", "p95", "max")?;
        write_spread(out, "time to first token", self.ttft_ms)?;
        write_spread(out, "time per output token", self.tpot_ms)?;
        write_spread(out, "whole answer", self.latency_ms)?;
        write_spread(out, "on the server: queue", self.server_ms.queue)?;
        write_spread(out, "on the server: media", self.server_ms.media)?;
        write_spread(out, "on the server: vision", self.server_ms.vision)?;
        write_spread(out, "on the server: prefill", self.server_ms.prefill)?;
        write_spread(out, "on the server: decode, 1 token", self.server_ms.decode_per_token)?;
        if self.server_ms.vision.is_some_and(|vision| vision.min == 0.0) {
            writeln!(out, "(vision of 0 ms: the picture's features were found in a cache)")?;
        }

        writeln!(
            out,
            "\n{:.1} output tokens/s, {:.1} prompt tokens/s, {:.2} requests/s over {:.2} s",
            self.output_tokens_per_s, self.prompt_tokens_per_s, self.requests_per_s, self.wall_s
        )?;
        for shard in &self.shards {
            let (resident, planned) = (mebibytes(shard.resident_bytes), mebibytes(shard.planned_bytes));
            writeln!(out, "shard {}: {resident:.1} MiB resident, {planned:.1} MiB planned", shard.rank)?;
        }
        for (code, failure) in &self.errors {
            writeln!(out, "{} x {code}, first: {}", failure.count, failure.first_message)?;
        }
        Ok(())
    }
}

pub(crate) fn write_spread(out: &mut impl Write, name: &str, spread: Option<Spread>) -> io::Result<()> {
    let Some(Spread { min, median, p95, max }) = spread else { return Ok(()) };
    writeln!(out, "{name:<30}{min:>10.2}{median:>10.2}{p95:>10.2}{max:>10.2}")
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}
