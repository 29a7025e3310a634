//! Whole steps: the model as a rank loads it, given steps as the server gives them, without the server.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use lockstep_shard::{
    config::Config,
    device::{DType, DeviceKind, FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS},
    model::stages::stages,
    runner::{
        Step, StepResult,
        step::{Admission, Chunk, Encode, Grid, MediaHash, Sampling, SeqId},
    },
    service::{
        gate::Gate,
        gpu::{GpuOptions, Sums},
        load,
        options::LoadOptions,
        worker::Loaded,
    },
};
use serde_json::{Value, json};

use super::{
    Args,
    measure::{Report, Work},
};

/// Steps before those that are timed: graphs are made in them.
const WARMUP_STEPS: usize = 4;

/// Times that a prompt and a picture are computed, the first of which does not count.
const REPETITIONS: usize = 4;

/// Measures decode steps, prompts and a picture.
pub fn measure(args: &Args, config: &Config, report: &mut Report) -> Result<()> {
    println!("whole steps, by the wall clock of whoever gives them:");
    let start = Instant::now();
    let options = options(args, config)?;
    let gate = Gate::new(options.epoch, options.threads);
    let loaded = load::load(&options, &gate, &mut |_| ())?;
    report.tell("loading", start.elapsed().as_secs_f64(), Work::default(), json!({}))?;
    let kv_blocks = loaded.description.kv_blocks as usize;
    let mut bench = Bench { loaded, config, kv_blocks, next_id: 0 };
    for &prompt in &args.prompts {
        bench.prompt(args, prompt, report)?;
    }
    for &context in &args.contexts {
        for &batch in &args.batches {
            bench.decode(args, batch, context, report)?;
        }
    }
    bench.picture(args, report)
}

fn options(args: &Args, config: &Config) -> Result<LoadOptions> {
    let processor = processor(&args.model)?;
    let patch = config.vision.patch_size;
    let max_frame_patches: usize = args.picture.iter().map(|side| side / patch).product();
    let frame_tokens = max_frame_patches / config.vision.merge_unit();
    let longest = args.prompts.iter().chain(&args.contexts).max().copied().unwrap_or(1);
    Ok(LoadOptions {
        group: 1,
        epoch: 1,
        rank: 0,
        world_size: 1,
        loading_ranks: 1,
        model_dir: args.model.clone(),
        device: DeviceKind::Cuda,
        dtype: DType::Bf16,
        collective_path: PathBuf::new(),
        max_context_tokens: longest + WARMUP_STEPS + args.steps + 2 * KV_BLOCK_TOKENS,
        max_step_tokens: args.step_tokens,
        max_frame_patches,
        waiting_pixel_bytes: 4 * max_frame_patches * patch * patch * 3,
        max_step_sequences: args.batches.iter().max().copied().unwrap_or(1),
        kv_blocks: 0,
        feature_blocks: 2 * frame_tokens.div_ceil(FEATURE_BLOCK_TOKENS),
        threads: 1,
        cpus: vec![],
        image_mean: channels(&processor, "image_mean")?,
        image_std: channels(&processor, "image_std")?,
        gpu: GpuOptions {
            ordinals: vec![args.gpu],
            memory: 0.9,
            sums: Sums::Host,
            is_repeatable: false,
            use_graphs: true,
            overlap_kernels: true,
            kernel_cache: args.kernel_cache.clone(),
            loading_ranks: 1,
            is_settled: false,
        },
    })
}

fn processor(model: &Path) -> Result<Value> {
    let path = model.join("preprocessor_config.json");
    Ok(serde_json::from_slice(&std::fs::read(&path).with_context(|| path.display().to_string())?)?)
}

fn channels(processor: &Value, field: &str) -> Result<[f32; 3]> {
    serde_json::from_value(processor[field].clone()).with_context(|| field.to_owned())
}

struct Bench<'a> {
    loaded: Loaded,
    config: &'a Config,
    kv_blocks: usize,
    next_id: u64,
}

impl Bench<'_> {
    fn run(&mut self, step: Step) -> Result<(f64, StepResult)> {
        let start = Instant::now();
        let result = self.loaded.rank.run(step)?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(result.sampled.iter().all(|one| one.failure.is_none()), "a logit is not finite");
        Ok((seconds, result))
    }

    fn id(&mut self) -> SeqId {
        self.next_id += 1;
        SeqId(self.next_id)
    }

    /// Text of random tokens, none of which is a control token.
    fn text(&self, tokens: usize) -> Vec<u32> {
        let most = self.config.image_token_id.saturating_sub(12).max(1);
        (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % most).collect()
    }

    fn admission(&self, id: SeqId, token_ids: Vec<u32>, blocks: Vec<u32>) -> Admission {
        Admission {
            id,
            num_prompt_tokens: token_ids.len(),
            num_computed_tokens: blocks.len() * KV_BLOCK_TOKENS,
            token_ids,
            media: vec![],
            sampling: Sampling::default(),
            blocks,
        }
    }

    /// Computes a prompt into its blocks, from block 0 on, and draws a token; seconds of all its steps.
    fn compute(&mut self, args: &Args, id: SeqId, tokens: usize) -> Result<f64> {
        let mut admissions = vec![self.admission(id, self.text(tokens), vec![])];
        let (mut seconds, mut next_block) = (0.0, 0);
        for start in (0..tokens).step_by(args.step_tokens) {
            let length = args.step_tokens.min(tokens - start);
            let end_block = (start + length).div_ceil(KV_BLOCK_TOKENS) as u32;
            let new_blocks = (next_block..end_block).collect();
            next_block = end_block;
            let max_new_tokens = usize::from(start + length == tokens);
            let chunks = vec![Chunk { id, start, length, new_blocks, max_new_tokens }];
            let admissions = std::mem::take(&mut admissions);
            seconds += self.run(Step { admissions, chunks, ..Step::default() })?.0;
        }
        Ok(seconds)
    }

    fn release(&mut self, ids: Vec<SeqId>) -> Result<()> {
        self.run(Step { releases: ids, ..Step::default() }).map(drop)
    }

    /// A prompt, from its admission to its first token.
    fn prompt(&mut self, args: &Args, tokens: usize, report: &mut Report) -> Result<()> {
        let name = format!("prompt of {tokens} tokens");
        if tokens.div_ceil(KV_BLOCK_TOKENS) > self.kv_blocks {
            return report.leave_out(&name, "there is no room for its keys and values");
        }
        let mut times = Vec::new();
        for _ in 0..REPETITIONS {
            let id = self.id();
            times.push(self.compute(args, id, tokens)?);
            self.release(vec![id])?;
        }
        let text = &self.config.text;
        let (t, width) = (tokens as f64, (text.num_attention_heads * text.head_dim()) as f64);
        let layers = text.num_hidden_layers as f64;
        let head = 2.0 * (text.vocab_size * text.hidden_size) as f64;
        let attention = 4.0 * layers * width * t * (t + 1.0) / 2.0;
        let flops = 2.0 * layer_elements(self.config) as f64 * t + attention + head;
        let about =
            json!({ "tokens": tokens, "step_tokens": args.step_tokens, "all_ms": milliseconds(&times) });
        report.tell(&name, median(&times[1..]), Work { bytes: 0.0, flops }, about)
    }

    /// Decode steps of sequences that have `context` tokens each.
    ///
    /// One of them is computed; the keys and values of the others are copies of its own, in memory of their own.
    fn decode(&mut self, args: &Args, batch: usize, context: usize, report: &mut Report) -> Result<()> {
        let name = format!("decode step of {batch} x {context} tokens");
        let context = context.next_multiple_of(KV_BLOCK_TOKENS);
        let (full, steps) = (context / KV_BLOCK_TOKENS, WARMUP_STEPS + args.steps);
        let more = (1 + steps).div_ceil(KV_BLOCK_TOKENS);
        if batch * (full + more) + 1 > self.kv_blocks {
            let why = format!("{} blocks of keys and values are not enough", self.kv_blocks);
            return report.leave_out(&name, &why);
        }
        let ids = self.fill(args, batch, context)?;
        let first_free = (batch * full) as u32;
        let mut times = Vec::with_capacity(steps);
        for i in 0..steps {
            let at = context + i;
            let needs_block = at.is_multiple_of(KV_BLOCK_TOKENS);
            let nth = (at - context) / KV_BLOCK_TOKENS;
            let chunk = |(j, id): (usize, &SeqId)| Chunk {
                id: *id,
                start: at,
                length: 1,
                new_blocks: Vec::from_iter(needs_block.then_some(first_free + (nth * batch + j) as u32)),
                max_new_tokens: 1,
            };
            let chunks = ids.iter().enumerate().map(chunk).collect();
            times.push(self.run(Step { chunks, ..Step::default() })?.0);
        }
        self.release(ids)?;
        let text = &self.config.text;
        let layers = text.num_hidden_layers;
        let of_token = layers * 2 * text.num_key_value_heads * text.head_dim() * 2;
        let head = text.vocab_size * text.hidden_size;
        let weights = 2 * (layer_elements(self.config) + head);
        let tokens = batch * (context + WARMUP_STEPS + args.steps / 2);
        let bytes = (weights + tokens * of_token) as f64;
        let seen = 4 * layers * text.num_attention_heads * text.head_dim() * tokens;
        let flops = (batch * weights + seen) as f64;
        let times = &times[WARMUP_STEPS..];
        let seconds = median(times);
        let about = json!({
            "batch": batch,
            "context": context,
            "tokens_per_s": batch as f64 / seconds,
            "all_ms": milliseconds(times),
        });
        report.tell(&name, seconds, Work { bytes, flops }, about)
    }

    /// Sequences with `context` tokens computed and one more known.
    fn fill(&mut self, args: &Args, batch: usize, context: usize) -> Result<Vec<SeqId>> {
        let full = context / KV_BLOCK_TOKENS;
        let blocks = |i: usize| (i * full..(i + 1) * full).map(|block| block as u32);
        let source = self.id();
        self.compute(args, source, context)?;
        for i in 1..batch {
            // Somebody has to hold blocks that are copied to.
            let holder = self.id();
            let chunk =
                Chunk { id: holder, start: 0, length: 1, new_blocks: blocks(i).collect(), max_new_tokens: 0 };
            let admissions = vec![self.admission(holder, self.text(2), vec![])];
            self.run(Step { admissions, chunks: vec![chunk], ..Step::default() })?;
            let copies = blocks(0).zip(blocks(i)).collect();
            self.run(Step { copies, ..Step::default() })?;
            self.release(vec![holder])?;
        }
        self.release(vec![source])?;
        let ids: Vec<SeqId> = (0..batch).map(|_| self.id()).collect();
        let admissions = ids
            .iter()
            .enumerate()
            .map(|(i, id)| self.admission(*id, self.text(context + 1), blocks(i).collect()))
            .collect();
        self.run(Step { admissions, ..Step::default() })?;
        Ok(ids)
    }

    /// The vision encoding of a picture, in one piece.
    fn picture(&mut self, args: &Args, report: &mut Report) -> Result<()> {
        let vision = &self.config.vision;
        let [w, h] = [0, 1].map(|side| (args.picture[side] / vision.patch_size) as u32);
        let grid = Grid { t: 1, h, w };
        let tokens = grid.num_patches() / vision.merge_unit() as u64;
        let pixels: Vec<u8> =
            (0..args.picture.iter().product::<usize>() * 3).map(|i| (i * 31 % 251) as u8).collect();
        let flops = vision_flops(self.config, grid.num_patches() as f64);
        let num_stages = stages(vision).len() as u64;
        let mut times = Vec::new();
        for i in 0..REPETITIONS {
            let hash = MediaHash([i as u8; 32]);
            let media = self.loaded.media.clone();
            let upload = media.begin(media.epoch(), hash, grid, pixels.len())?;
            let mut upload = upload.context("the pixels wait already")?;
            upload.push(&pixels)?;
            upload.finish()?;
            let feature_blocks = (0..tokens.div_ceil(FEATURE_BLOCK_TOKENS as u64) as u32).collect();
            let encode = Encode { hash, feature_blocks, from: 0, to: tokens * num_stages };
            let (seconds, _) = self.run(Step { encodes: vec![encode], ..Step::default() })?;
            times.push(seconds);
            self.run(Step { evictions: vec![hash], ..Step::default() })?;
        }
        let name = format!("vision encoding of {} x {} pixels", args.picture[0], args.picture[1]);
        let about = json!({ "tokens": tokens, "all_ms": milliseconds(&times) });
        report.tell(&name, median(&times[1..]), Work { bytes: 0.0, flops }, about)
    }
}

/// Elements of the matrices of all layers of the text model.
fn layer_elements(config: &Config) -> usize {
    let text = &config.text;
    let (hidden, heads) = (text.hidden_size, text.head_dim());
    let attention = hidden * heads * (2 * text.num_attention_heads + 2 * text.num_key_value_heads);
    text.num_hidden_layers * (attention + 3 * hidden * text.intermediate_size)
}

/// Operations of encoding a picture of one frame: patches, blocks, attention and merger.
fn vision_flops(config: &Config, patches: f64) -> f64 {
    let vision = &config.vision;
    let (width, mlp) = (vision.hidden_size as f64, vision.intermediate_size as f64);
    let joined = width * vision.merge_unit() as f64;
    let window = ((vision.window_size / vision.patch_size) as f64).powi(2).min(patches);
    let full = vision.fullatt_block_indexes.len() as f64;
    let blocks = vision.depth as f64;
    let linear = blocks * (4.0 * width * width + 3.0 * width * mlp) + vision.patch_values() as f64 * width;
    let merger = joined * (joined + vision.out_hidden_size as f64) / vision.merge_unit() as f64;
    let attention = 4.0 * width * ((blocks - full) * window + full * patches);
    patches * (2.0 * (linear + merger) + attention)
}

fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn milliseconds(times: &[f64]) -> Vec<f64> {
    times.iter().map(|seconds| (seconds * 1e6).round() / 1e3).collect()
}
