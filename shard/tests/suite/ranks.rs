//! Ranks on threads, without the runner.

use std::path::Path;
use std::sync::Arc;

use lockstep_shard::collective::{Alone, Collective, DEFAULT_SLOT_BYTES, SharedMemory};
use lockstep_shard::config::Config;
use lockstep_shard::device::cpu::{self, CpuDevice, CpuOptions};
use lockstep_shard::device::{
    DType, Device, FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS, RowSampling, SequenceRows,
};
use lockstep_shard::model::stages::{by_frame, stages};
use lockstep_shard::model::{Batch, Drawn, FramePiece, Model, Normalization, Parallel, VisionFrame};
use lockstep_shard::progress::Progress;
use lockstep_shard::weights::Checkpoint;

const KV_BLOCKS: usize = 32;
const FEATURE_BLOCKS: usize = 40;
const WORKSPACE_BYTES: usize = 40 << 20;
const FRAME_PATCHES: usize = 5000;

/// The released checkpoints' constants.
pub const NORMALIZATION: Normalization = Normalization {
    mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
    std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
};

/// A medium at the model's size.
#[derive(Clone)]
pub struct Picture {
    pub pixels: Vec<u8>,
    pub grid: [usize; 3],
}

impl Picture {
    pub fn num_tokens(&self) -> usize {
        self.grid.iter().product::<usize>() / 4
    }

    /// How much work encoding it is.
    pub fn work(&self, config: &Config) -> u64 {
        (self.num_tokens() * stages(&config.vision).len()) as u64
    }

    /// Encodes it, in pieces that end at `ends` and where all is done.
    pub fn encode<D: Device>(
        &self,
        device: &D,
        (model, config): (&Model<D>, &Config),
        frame: &mut VisionFrame<D>,
        (features, slots): (&mut D::Features, &[u32]),
        ends: &[u64],
    ) {
        let [t, h, w] = self.grid;
        let order = model.window_order([h, w]);
        let frame_tokens = order.tokens.len();
        let frame_units = (frame_tokens * stages(&config.vision).len()) as u64;
        let frame_bytes = self.pixels.len().div_ceil(t);
        let mut done = 0;
        for &end in ends.iter().chain([&self.work(config)]) {
            for (t, work) in by_frame(done..end, frame_units) {
                // As where steps run: nothing but the first stage sees pixels.
                let has_pixels = work.start < frame_tokens;
                let pixels =
                    if has_pixels { &self.pixels[t * frame_bytes..(t + 1) * frame_bytes] } else { &[] };
                let slots = &slots[t * frame_tokens..(t + 1) * frame_tokens];
                let piece = FramePiece { pixels, grid: [h, w], order: &order, work, slots };
                model.encode(device, frame, &piece, features).expect("encoded");
            }
            done = end;
        }
    }
}

/// Tokens with their positions, and the media that they stand for.
#[derive(Clone)]
pub struct Prompt {
    pub token_ids: Vec<u32>,
    pub positions: Vec<[u32; 3]>,
    pub pictures: Vec<Picture>,
}

/// One rank of a group, with its model.
pub struct Rank {
    pub config: Config,
    pub device: CpuDevice,
    pub model: Model<CpuDevice>,
    pub cache: cpu::KvCache,
    pub features: cpu::Features,
    pub frame: VisionFrame<CpuDevice>,
    next_feature: u32,
    next_block: u32,
}

/// A sequence on a rank.
pub struct Sequence {
    prompt: Prompt,
    first_feature: u32,
    block_table: Vec<u32>,
    num_computed: usize,
}

impl Rank {
    pub fn new(dir: &Path, dtype: DType, collective: Box<dyn Collective>) -> Self {
        let parallel = Parallel { rank: collective.rank(), world_size: collective.world_size() };
        let options = CpuOptions {
            threads: 1,
            cpus: Vec::new(),
            workspace_bytes: WORKSPACE_BYTES,
            instruction_set: None,
            collective,
            progress: Arc::new(Progress::new(1)),
        };
        let device = CpuDevice::new(options).expect("a device");
        let config = Config::open(dir).expect("a valid configuration");
        let checkpoint = Checkpoint::open(dir).expect("a checkpoint");
        let model =
            Model::load(&device, &checkpoint, &config, NORMALIZATION, parallel, dtype, &mut |_| Ok(()))
                .expect("a model");
        let frame = model.vision_frame(&device, FRAME_PATCHES).expect("room");
        let cache =
            device.kv_cache(dtype, config.text.num_hidden_layers, model.heads(), KV_BLOCKS).expect("a cache");
        let features = device.features(config.text.hidden_size, FEATURE_BLOCKS).expect("features");
        Self { config, device, model, cache, features, frame, next_feature: 0, next_block: 0 }
    }

    /// Slot of the `i`th feature: from the end, so that a test sees whether slots are obeyed.
    fn slot(i: u32) -> u32 {
        (FEATURE_BLOCKS * FEATURE_BLOCK_TOKENS) as u32 - 1 - i
    }

    /// Encodes the pictures of a prompt, and gives it blocks for `num_tokens` tokens.
    pub fn admit(&mut self, prompt: &Prompt, num_tokens: usize) -> Sequence {
        self.admit_in_pieces(prompt, num_tokens, |_| Vec::new())
    }

    /// The same, where `ends` says where pieces of so much work end.
    pub fn admit_in_pieces(
        &mut self,
        prompt: &Prompt,
        num_tokens: usize,
        mut ends: impl FnMut(u64) -> Vec<u64>,
    ) -> Sequence {
        let first_feature = self.next_feature;
        for picture in &prompt.pictures {
            let end = self.next_feature + picture.num_tokens() as u32;
            let slots: Vec<u32> = (self.next_feature..end).map(Self::slot).collect();
            let ends = ends(picture.work(&self.config));
            let (model, features) = ((&self.model, &self.config), (&mut self.features, &slots[..]));
            picture.encode(&self.device, model, &mut self.frame, features, &ends);
            self.next_feature = end;
        }
        // Blocks are dealt out in a stride, so that no sequence's are neighbours.
        let block_table = (0..num_tokens.div_ceil(KV_BLOCK_TOKENS) as u32)
            .map(|i| (self.next_block + i) * 5 % KV_BLOCKS as u32)
            .collect::<Vec<_>>();
        self.next_block += block_table.len() as u32;
        assert!(self.next_block as usize <= KV_BLOCKS, "the test needs more blocks");
        Sequence { prompt: prompt.clone(), first_feature, block_table, num_computed: 0 }
    }

    /// Forgets all sequences and features.
    pub fn clear(&mut self) {
        (self.next_feature, self.next_block) = (0, 0);
    }

    /// Features of the prompt's pictures, as all ranks see them, `[tokens, hidden]`.
    pub fn features_of(&self, sequence: &Sequence) -> Vec<f32> {
        let num_tokens: usize = sequence.prompt.pictures.iter().map(Picture::num_tokens).sum();
        let rows: Vec<_> =
            (0..num_tokens as u32).map(|i| (i, Self::slot(sequence.first_feature + i))).collect();
        let mut x = self.device.empty(num_tokens, self.config.text.hidden_size).expect("activations");
        self.device.insert_features(&mut x, &self.features, &rows, false).expect("inserted");
        self.device.download(&x).expect("downloaded")
    }

    /// Computes the next `lengths[i]` tokens of each sequence in one step, and gives the hidden states of the
    /// rows that `sample_rows` picks of a sequence's rows.
    pub fn step(
        &mut self,
        sequences: &mut [(&mut Sequence, usize)],
        sample_rows: impl Fn(std::ops::Range<usize>) -> Vec<usize>,
    ) -> cpu::Tensor {
        let mut batch = Batch::default();
        for (sequence, length) in sequences {
            let start = sequence.num_computed;
            let first_row = batch.token_ids.len();
            let pads_before = |end: usize| {
                let pads =
                    sequence.prompt.token_ids[..end].iter().filter(|&&id| id == self.config.image_token_id);
                pads.count() as u32
            };
            let mut feature = sequence.first_feature + pads_before(start);
            for token in start..start + *length {
                let id = sequence.prompt.token_ids[token];
                if id == self.config.image_token_id {
                    batch.features.push((batch.token_ids.len() as u32, Self::slot(feature)));
                    feature += 1;
                }
                batch.token_ids.push(id);
                batch.positions.push(sequence.prompt.positions[token]);
                let block = sequence.block_table[token / KV_BLOCK_TOKENS];
                batch.slots.push(block * KV_BLOCK_TOKENS as u32 + (token % KV_BLOCK_TOKENS) as u32);
            }
            let rows = first_row..batch.token_ids.len();
            batch.sample_rows.extend(sample_rows(rows.clone()).into_iter().map(|row| row as u32));
            batch.sequences.push(SequenceRows {
                rows,
                num_computed_tokens: start,
                block_table: sequence.block_table.clone(),
            });
            sequence.num_computed += *length;
        }
        let step = self.model.forward(&self.device, &batch, &mut self.cache, &self.features);
        step.expect("a step").0
    }

    /// Draws greedily after `hidden`'s only row.
    pub fn draw(&self, hidden: &cpu::Tensor, logprobs: usize) -> Drawn {
        let row = RowSampling { logprobs: Some(logprobs), ..RowSampling::default() };
        self.model.sample(&self.device, hidden, &[row]).expect("sampled").remove(0).expect("finite logits")
    }

    /// Computes a prompt and then, one after the other, the tokens `forced`. Returns the log-probabilities of all tokens,
    /// best first, before each of these.
    pub fn force(&mut self, prompt: &Prompt, forced: &[u32]) -> Vec<Vec<(u32, f32)>> {
        self.clear();
        let mut sequence = self.admit(prompt, prompt.token_ids.len() + forced.len());
        let mut next_position = 1 + *prompt.positions.iter().flatten().max().expect("not empty");
        let mut chunk = prompt.token_ids.len();
        let mut step = |&token: &u32| {
            let hidden = self.step(&mut [(&mut sequence, chunk)], |rows| vec![rows.end - 1]);
            sequence.prompt.token_ids.push(token);
            sequence.prompt.positions.push([next_position; 3]);
            next_position += 1;
            chunk = 1;
            self.draw(&hidden, self.config.text.vocab_size).top
        };
        forced.iter().map(&mut step).collect()
    }
}

/// Runs `work` as every rank of a group, each on a thread of its own.
pub fn on_ranks<T: Send>(
    dir: &Path,
    world_size: usize,
    dtype: DType,
    work: impl Fn(&mut Rank) -> T + Sync,
) -> Vec<T> {
    if world_size == 1 {
        return vec![work(&mut Rank::new(dir, dtype, Box::new(Alone)))];
    }
    let group = tempfile::tempdir().expect("a folder");
    let path = group.path().join("group");
    SharedMemory::create(&path, world_size, DEFAULT_SLOT_BYTES).expect("created");
    std::thread::scope(|scope| {
        let (path, work) = (&path, &work);
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let collective =
                        SharedMemory::join(path, rank, world_size, DEFAULT_SLOT_BYTES).expect("joined");
                    work(&mut Rank::new(dir, dtype, Box::new(collective)))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}
