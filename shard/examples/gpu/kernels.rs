//! Kernels one by one, at the sizes that the model has.
//!
//! Those of the decode path are measured in a graph, as steps use them, so that what is measured is the kernel and not the launch.
//! Weights and keys that fit the cache of the GPU are taken in several copies, one after the other, so that they come from memory.

use std::{rc::Rc, sync::Arc};

use anyhow::Result;
use lockstep_shard::{
    collective::Alone,
    config::Config,
    device::{
        Angles, AttentionHeads, DType, Device, HostElements, HostMatrix, KV_BLOCK_TOKENS, RankDevice,
        RowSampling, SequenceRows, StepRows,
        cuda::{
            CudaDevice, CudaOptions, Gpu, KvCache, Linear, Norm, Rows, Sizes, Sums, Tensor,
            libraries::Libraries, modules,
        },
    },
    progress::Progress,
};
use serde_json::{Value, json};

use super::{
    Args,
    ceilings::random,
    measure::{Report, Work},
};

/// Bytes that are read before any of them is read again: several times the cache of the largest GPUs.
const UNCACHED_BYTES: usize = 256 << 20;

/// The most copies of what is smaller.
const MAX_COPIES: usize = 128;

/// Calls in a graph, at least.
const CALLS: usize = 8;

/// A device, and its GPU.
pub struct Opened {
    pub gpu: Rc<Gpu>,
    pub device: CudaDevice,
}

/// Opens a device for calls of up to `max_rows` rows. `is_repeatable`: Lockstep's own kernels alone.
pub fn open(
    args: &Args,
    libraries: &Libraries,
    workspace_bytes: usize,
    max_rows: usize,
    is_repeatable: bool,
) -> Result<Opened> {
    let gpu = Gpu::open(args.gpu as i32)?;
    let cubins = modules::modules(libraries.gpu.arch, args.kernel_cache.as_deref(), &|| ())?;
    let cubins = cubins.into_iter().map(|module| (module.name.to_owned(), module.cubin)).collect();
    let longest = args.contexts.iter().chain(&args.prompts).max().copied().unwrap_or(0);
    let device = CudaDevice::new(CudaOptions {
        gpu: gpu.clone(),
        cubins,
        sizes: Sizes {
            world_size: 1,
            max_step_tokens: max_rows,
            max_step_sequences: args.batches.iter().max().copied().unwrap_or(1),
            max_context_tokens: longest + KV_BLOCK_TOKENS,
            most_sharing: 64,
            num_query: 64,
            num_kv: 64,
            head_dim: 128,
            num_ids: 1 << 18,
            frame_bytes: 0,
        },
        workspace_bytes,
        collective: Box::new(Alone),
        sums: Sums::Host,
        has_nccl: false,
        use_cublas_lt: libraries.cublas_lt.is_some(),
        is_repeatable,
        use_graphs: true,
        overlap_kernels: true,
        progress: Arc::new(Progress::new(1)),
    })?;
    Ok(Opened { gpu, device })
}

/// A matrix of the model.
struct Matrix {
    name: &'static str,
    inputs: usize,
    outputs: usize,
    /// Whether results are in single precision, as logits are.
    is_head: bool,
}

fn matrices(config: &Config) -> [Matrix; 5] {
    let text = &config.text;
    let (hidden, mlp) = (text.hidden_size, text.intermediate_size);
    let qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim();
    let matrix = |name, inputs: usize, outputs: usize| Matrix {
        name,
        // A row of the device's is a multiple of eight elements, padded as slices are.
        inputs: inputs.next_multiple_of(16),
        outputs,
        is_head: false,
    };
    [
        matrix("qkv", hidden, qkv),
        matrix("o_proj", text.num_attention_heads * text.head_dim(), hidden),
        matrix("gate_up", hidden, 2 * mlp.next_multiple_of(16)),
        matrix("down", mlp, hidden),
        Matrix { is_head: true, ..matrix("head", hidden, text.vocab_size) },
    ]
}

/// Measures all of them.
pub fn measure(args: &Args, libraries: &Libraries, config: &Config, report: &mut Report) -> Result<()> {
    let mut chunks: Vec<usize> = args.prompts.iter().map(|tokens| *tokens.min(&args.step_tokens)).collect();
    chunks.dedup();
    let rows = chunks.iter().chain(&args.batches).max().copied().unwrap_or(1);
    let text = &config.text;
    // Inputs and results of the widest product, twice, and logits of a batch in single precision.
    let widest = text.hidden_size.max(2 * text.intermediate_size) + text.intermediate_size;
    let batch = args.batches.iter().max().copied().unwrap_or(1);
    let workspace_bytes = 4 * rows * widest + 8 * CALLS * batch * text.vocab_size + (256 << 20);
    for is_repeatable in [false, true] {
        let opened = open(args, libraries, workspace_bytes, rows, is_repeatable)?;
        let mut bench = Bench { opened, config, report, is_repeatable };
        if is_repeatable {
            println!("with --repeatable, products by Lockstep's own kernels:");
        } else {
            println!("one step, kernel by kernel:");
        }
        bench.products(args, &chunks)?;
        if is_repeatable {
            continue;
        }
        bench.layers(args)?;
        bench.small(args)?;
        bench.sampling(args)?;
        for &context in &args.contexts {
            for &batch in &args.batches {
                bench.decode_attention(batch, context)?;
            }
        }
        for &prompt in &args.prompts {
            bench.prompt_attention(prompt.min(args.step_tokens), prompt)?;
        }
        bench.vision_attention(args)?;
    }
    Ok(())
}

struct Bench<'a> {
    opened: Opened,
    config: &'a Config,
    report: &'a mut Report,
    is_repeatable: bool,
}

type DeviceResult<T> = lockstep_shard::device::Result<T>;

impl Bench<'_> {
    fn heads(&self) -> AttentionHeads {
        let text = &self.config.text;
        let (num_query, num_kv) = (text.num_attention_heads, text.num_key_value_heads);
        AttentionHeads {
            kv_of_query: (0..num_query).map(|head| head * num_kv / num_query).collect(),
            num_kv,
            head_dim: text.head_dim(),
        }
    }

    /// Rows of sequences that have `context` tokens, the last `rows` of each in this step.
    fn rows(&self, heads: &AttentionHeads, batch: usize, rows: usize, context: usize) -> Result<Rows> {
        let device = &self.opened.device;
        let blocks = context.div_ceil(KV_BLOCK_TOKENS);
        let sequences: Vec<SequenceRows> = (0..batch)
            .map(|i| SequenceRows {
                rows: i * rows..(i + 1) * rows,
                num_computed_tokens: context - rows,
                block_table: (i * blocks..(i + 1) * blocks).map(|block| block as u32).collect(),
            })
            .collect();
        let slot = |row: usize| (row / rows * blocks * KV_BLOCK_TOKENS + context - rows + row % rows) as u32;
        let slots: Vec<u32> = (0..batch * rows).map(slot).collect();
        let token_ids = vec![1; batch * rows];
        let (frequencies, positions) = (vec![(0.7, 0); heads.head_dim / 2], vec![[1; 3]; batch * rows]);
        let angles = Angles { frequencies: &frequencies, scale: 1.0, positions: &positions };
        let (cos, sin) = device.angles(&angles)?;
        let (token_ids, slots, sequences) = (&token_ids, &slots, &sequences);
        Ok(device.rows(StepRows { token_ids, drawn: &[], slots, sequences, heads, cos, sin })?)
    }

    /// Random activations.
    fn activations(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let x: Vec<f32> = random(rows * cols, 3).iter().map(|x| x.to_f32()).collect();
        Ok(self.opened.device.upload(rows, cols, &x)?)
    }

    /// Seconds of a call in a graph of so many of them. `rows` are those that the device took last.
    fn in_graph(
        &mut self,
        rows: &Rows,
        calls: usize,
        mut call: impl FnMut(&CudaDevice, usize) -> DeviceResult<Tensor>,
    ) -> Result<f64> {
        // Graphs of other work on rows of the same shape end with the group.
        self.opened.device.leave_group()?;
        self.opened.device.join_group(Box::new(Alone))?;
        let device = &self.opened.device;
        let mut all = || {
            let mut last = call(device, 0)?;
            for i in 1..calls {
                last = call(device, i)?;
            }
            Ok(last)
        };
        let seconds =
            self.report.time(&self.opened.gpu, || Ok(device.replay(rows, &mut all).map(drop)?))?;
        Ok(seconds / calls as f64)
    }

    fn copies(&self, bytes: usize) -> usize {
        UNCACHED_BYTES.div_ceil(bytes.max(1)).clamp(1, MAX_COPIES)
    }

    fn pack(&self, matrix: &Matrix) -> Result<Vec<Linear>> {
        let (rows, cols) = (matrix.outputs, matrix.inputs);
        let elements = random(rows * cols, 4);
        let copies = self.copies(2 * rows * cols);
        let pack = |_| {
            let data = HostElements::Bf16(elements.clone());
            Ok(self.opened.device.pack_linear(HostMatrix { rows, cols, data }, None)?)
        };
        (0..copies).map(pack).collect()
    }

    /// Products with each matrix: of as many rows as batches have, and as prompts have.
    fn products(&mut self, args: &Args, chunks: &[usize]) -> Result<()> {
        for matrix in matrices(self.config) {
            let weights = self.pack(&matrix)?;
            let Matrix { name, inputs, outputs, is_head } = matrix;
            let multiply = |device: &CudaDevice, x: &Tensor, i: usize| {
                let weight = &weights[i % weights.len()];
                if is_head { device.logits(x, weight) } else { device.linear(x, weight) }
            };
            let about = |rows: usize, copies: usize| json!({ "rows": rows, "inputs": inputs, "outputs": outputs, "copies": copies });
            for &rows in &args.batches {
                let (x, heads) = (self.activations(rows, inputs)?, self.heads());
                let step = self.rows(&heads, rows, 1, 1)?;
                let calls = weights.len().max(CALLS);
                let seconds = self.in_graph(&step, calls, |device, i| multiply(device, &x, i))?;
                let name = self.named(&format!("decode, {name}, {rows} rows"));
                let about = about(rows, weights.len());
                self.report.tell(&name, seconds, Work::product(rows, inputs, outputs), about)?;
            }
            // Of a prompt, only the last row has logits.
            for &rows in chunks.iter().filter(|_| !is_head) {
                let x = self.activations(rows, inputs)?;
                let mut i = 0;
                let Opened { gpu, device } = &self.opened;
                let seconds = self.report.time(gpu, || {
                    i += 1;
                    Ok(multiply(device, &x, i).map(drop)?)
                })?;
                let name = self.named(&format!("prompt, {name}, {rows} rows"));
                let about = about(rows, weights.len());
                self.report.tell(&name, seconds, Work::product(rows, inputs, outputs), about)?;
            }
        }
        Ok(())
    }

    /// A whole layer of a decode step, each of whose kernels may begin before the one before it has ended; and where none does.
    fn layers(&mut self, args: &Args) -> Result<()> {
        let (heads, hidden) = (self.heads(), self.config.text.hidden_size);
        let matrices = matrices(self.config);
        let bytes = matrices[..4].iter().map(|matrix| 2 * matrix.inputs * matrix.outputs).sum();
        let layer = Layer::new(&self.opened.device, &matrices, hidden)?;
        for &rows in &args.batches {
            let mut cache = self.opened.device.kv_cache(DType::Bf16, 1, &heads, rows)?;
            for (overlaps, how) in [(true, ""), (false, ", one kernel after the other")] {
                self.opened.gpu.let_kernels_begin_early(overlaps)?;
                let (x, step) = (self.activations(rows, hidden)?, self.rows(&heads, rows, 1, 1)?);
                let seconds = self.in_graph(&step, CALLS, |device, _| {
                    layer.forward(device, &x, &heads, &step, &mut cache)
                })?;
                let about = json!({ "rows": rows, "overlaps": overlaps });
                self.report.tell(
                    &format!("decode, layer, {rows} rows{how}"),
                    seconds,
                    Work::bytes(bytes),
                    about,
                )?;
            }
        }
        Ok(self.opened.gpu.let_kernels_begin_early(true)?)
    }

    fn named(&self, name: &str) -> String {
        format!("{}{name}", if self.is_repeatable { "own kernels, " } else { "" })
    }

    /// What is between the products of a decode step.
    fn small(&mut self, args: &Args) -> Result<()> {
        let text = self.config.text.clone();
        let (hidden, heads) = (text.hidden_size, self.heads());
        let mlp = text.intermediate_size.next_multiple_of(16);
        let columns = (heads.num_query() + 2 * heads.num_kv) * heads.head_dim;
        for &rows in &args.batches {
            let norm = self.opened.device.pack_norm(vec![1.0; hidden], 1e-6)?;
            let step = self.rows(&heads, rows, 1, 1)?;
            let tell = |bench: &mut Self, name: &str, seconds: f64, elements: usize| {
                let name = format!("decode, {name}, {rows} rows");
                bench.report.tell(&name, seconds, Work::bytes(2 * elements), json!({ "rows": rows }))
            };
            let seconds = self.in_graph(&step, 4 * CALLS, |device, _| {
                let (x, residual) = (device.empty(rows, hidden)?, device.empty(rows, hidden)?);
                device.reduce_residual_norm(x, Some(residual), &norm).map(|(normed, _)| normed)
            })?;
            tell(self, "residual and norm", seconds, 4 * rows * hidden)?;
            let gate_up = self.activations(rows, 2 * mlp)?;
            let step = self.rows(&heads, rows, 1, 1)?;
            let seconds = self.in_graph(&step, 4 * CALLS, |device, _| device.gated_silu(&gate_up))?;
            tell(self, "gated activation", seconds, 3 * rows * mlp)?;
            let mut cache = self.opened.device.kv_cache(DType::Bf16, 1, &heads, rows)?;
            let mut qkv = self.activations(rows, columns)?;
            let step = self.rows(&heads, rows, 1, 1)?;
            let seconds = self.in_graph(&step, 4 * CALLS, |device, _| {
                device.rotary_append(&mut qkv, &heads, &step, &mut cache, 0)?;
                device.empty(1, 8)
            })?;
            tell(self, "rotary and append", seconds, 2 * rows * columns)?;
        }
        Ok(())
    }

    /// Drawing from logits: it ends on the host, so that no graph has it.
    fn sampling(&mut self, args: &Args) -> Result<()> {
        let ids = self.config.text.vocab_size;
        let weight = HostMatrix { rows: ids, cols: 16, data: HostElements::Bf16(random(ids * 16, 5)) };
        let weight = self.opened.device.pack_linear(weight, None)?;
        for &rows in &args.batches {
            let x = self.activations(rows, 16)?;
            let Opened { gpu, device } = &self.opened;
            let logits = device.logits(&x, &weight)?;
            for (name, temperature) in [("greedy", None), ("with a temperature", Some(0.7))] {
                let sampling = vec![RowSampling { temperature, ..RowSampling::default() }; rows];
                let seconds = self
                    .report
                    .time(gpu, || Ok(device.candidates(&logits, 0, ids, &sampling).map(drop)?))?;
                let name = format!("decode, draw {name}, {rows} rows, to the host");
                let work = Work::bytes(4 * rows * ids);
                self.report.tell(&name, seconds, work, json!({ "rows": rows }))?;
            }
        }
        Ok(())
    }

    /// Attention of one token of each sequence.
    fn decode_attention(&mut self, batch: usize, context: usize) -> Result<()> {
        let name = format!("decode, attention, {batch} x {context} tokens");
        let heads = self.heads();
        let bytes = batch * context * 2 * heads.num_kv * heads.head_dim * 2;
        let (layers, blocks) = (self.copies(bytes), batch * context.div_ceil(KV_BLOCK_TOKENS));
        let (free, _) = self.opened.gpu.memory_bytes()?;
        if (layers * bytes) as u64 > free / 10 * 9 {
            return self.report.leave_out(&name, &format!("{} bytes of memory", layers * bytes));
        }
        let mut cache = self.opened.device.kv_cache(DType::Bf16, layers, &heads, blocks)?;
        let columns = (heads.num_query() + 2 * heads.num_kv) * heads.head_dim;
        let mut qkv = self.activations(batch, columns)?;
        let step = self.rows(&heads, batch, 1, context)?;
        for layer in 0..layers {
            self.opened.device.rotary_append(&mut qkv, &heads, &step, &mut cache, layer)?;
        }
        let seconds = self.in_graph(&step, layers.max(CALLS), |device, i| {
            device.paged_attention(&qkv, &heads, &step, &cache, i % layers)
        })?;
        let flops = (4 * batch * heads.num_query() * heads.head_dim * context) as f64;
        let work = Work { bytes: bytes as f64, flops };
        self.report.tell(
            &name,
            seconds,
            work,
            json!({ "batch": batch, "context": context, "copies": layers }),
        )
    }

    /// Attention of the last `rows` tokens of a prompt.
    fn prompt_attention(&mut self, rows: usize, prompt: usize) -> Result<()> {
        let heads = self.heads();
        let cache = self.opened.device.kv_cache(DType::Bf16, 1, &heads, prompt.div_ceil(KV_BLOCK_TOKENS))?;
        let columns = (heads.num_query() + 2 * heads.num_kv) * heads.head_dim;
        let qkv = self.activations(rows, columns)?;
        let step = self.rows(&heads, 1, rows, prompt)?;
        let Opened { gpu, device } = &self.opened;
        let seconds = self
            .report
            .time(gpu, || Ok(device.paged_attention(&qkv, &heads, &step, &cache, 0).map(drop)?))?;
        let seen = rows as f64 * (prompt as f64 - (rows as f64 - 1.0) / 2.0);
        let flops = 4.0 * (heads.num_query() * heads.head_dim) as f64 * seen;
        let name = format!("prompt, attention, {rows} rows of {prompt} tokens");
        let about = json!({ "rows": rows, "prompt": prompt });
        self.report.tell(&name, seconds, Work { bytes: 0.0, flops }, about)
    }

    /// Attention of the vision tower: in windows, and over the whole picture.
    fn vision_attention(&mut self, args: &Args) -> Result<()> {
        let vision = &self.config.vision;
        let (num_heads, head_dim) = (vision.num_heads, vision.head_dim());
        let patches = args.picture.iter().map(|side| side / vision.patch_size).product::<usize>();
        let qkv = self.activations(patches, 3 * num_heads * head_dim)?;
        let window = (vision.window_size / vision.patch_size).pow(2);
        for (name, window) in [("windows", window), ("the whole picture", patches)] {
            let mut ends: Vec<u32> = (0..patches as u32).step_by(window).collect();
            ends.push(patches as u32);
            let Opened { gpu, device } = &self.opened;
            let seconds = self.report.time(gpu, || {
                Ok(device.vision_attention(&qkv, num_heads, head_dim, &ends, 0..patches).map(drop)?)
            })?;
            let pairs: f64 = ends.windows(2).map(|ends| f64::from(ends[1] - ends[0]).powi(2)).sum();
            let flops = 4.0 * (num_heads * head_dim) as f64 * pairs;
            let about: Value = json!({ "patches": patches, "window": window });
            let name = format!("vision, attention in {name}, {patches} patches");
            self.report.tell(&name, seconds, Work { bytes: 0.0, flops }, about)?;
        }
        Ok(())
    }
}

/// The weights of a layer. They do not fit the cache of a GPU.
struct Layer {
    qkv: Linear,
    o_proj: Linear,
    gate_up: Linear,
    down: Linear,
    norm: Norm,
}

impl Layer {
    fn new(device: &CudaDevice, matrices: &[Matrix], hidden: usize) -> Result<Self> {
        let pack = |matrix: &Matrix| {
            let (rows, cols) = (matrix.outputs, matrix.inputs);
            let data = HostElements::Bf16(random(rows * cols, 6));
            device.pack_linear(HostMatrix { rows, cols, data }, None)
        };
        let [qkv, o_proj, gate_up, down, ..] = matrices else { unreachable!("a layer has four matrices") };
        Ok(Self {
            qkv: pack(qkv)?,
            o_proj: pack(o_proj)?,
            gate_up: pack(gate_up)?,
            down: pack(down)?,
            norm: device.pack_norm(vec![1.0; hidden], 1e-6)?,
        })
    }

    fn forward(
        &self,
        device: &CudaDevice,
        x: &Tensor,
        heads: &AttentionHeads,
        rows: &Rows,
        cache: &mut KvCache,
    ) -> DeviceResult<Tensor> {
        let mut qkv = device.linear(x, &self.qkv)?;
        device.rotary_append(&mut qkv, heads, rows, cache, 0)?;
        let attended = device.paged_attention(&qkv, heads, rows, cache, 0)?;
        let h = device.linear_part(&attended, &self.o_proj)?;
        let (h, residual) = device.reduce_residual_norm(h, None, &self.norm)?;
        let h = device.linear_part(&device.gated_linear(&h, &self.gate_up)?, &self.down)?;
        Ok(device.reduce_residual_norm(h, Some(residual), &self.norm)?.0)
    }
}
