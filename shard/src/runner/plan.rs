//! What memory a rank will hold, known before anything is allocated.
//!
//! The model runs over shapes, on a device that only counts: the weights that it would pack, the caches that it would
//! reserve, and the most activations that it would hold at once in the largest steps.

use thiserror::Error;

use super::{media::MediaStore, setup::Setup};
use crate::{
    config::Config,
    device::{
        Device, DeviceError, DeviceKind, RowSampling, SequenceRows, Truncation, cuda,
        plan::{Counted, PlanDevice},
    },
    model::{Batch, FramePiece, LoadError, Model, VisionFrame, stages::stages},
    weights::Checkpoint,
};

/// Bytes of the process itself: stacks, the runtime, connections, the tables of a step, and what the allocator keeps of
/// loading. `tests/memory.rs` measures 0.5 MiB after loading; steps and connections come on top.
const PROCESS_BYTES: u64 = 2 << 20;

/// Sizes of steps that are planned for. Activations have their places first come, first served: a step somewhat smaller than
/// the largest leaves smaller gaps, and needs more where a piece of a fixed size then fits none of them.
const PLANNED_SIZES: usize = 32;

/// Part of the workspace that is added to what the planned sizes need. The next planned size is as much smaller than the
/// largest, so that what lies between needs no more.
const WORKSPACE_SLACK: u64 = 2 * PLANNED_SIZES as u64;

/// Bytes that a rank will hold, all of them touched at start. Nothing grows later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Slices of the weights.
    pub weights_bytes: u64,
    /// Cache of keys and values.
    pub kv_bytes: u64,
    /// Cache of vision features.
    pub features_bytes: u64,
    /// Activations, with those that stay between the pieces of encoding a temporal patch.
    pub workspace_bytes: u64,
    /// What else a GPU holds: what goes to it and comes back, pixels, what the splits of contexts give. 0 without one.
    pub staging_bytes: u64,
    /// Steps that a GPU keeps as graphs, about. 0 without one.
    pub graphs_bytes: u64,
    /// This rank's part of the memory shared with the other ranks.
    pub collective_bytes: u64,
    /// Pixels that wait to be encoded, and those of the temporal patch in work.
    pub media_bytes: u64,
    /// The process itself: stacks, the runtime, connections, what the allocator keeps.
    pub process_bytes: u64,
    /// Memory of the host that a GPU copies from and to. 0 without one.
    pub pinned_bytes: u64,
    /// Whether weights, caches, workspace, staging and graphs are in a GPU's memory; else all is in the host's.
    pub on_gpu: bool,
    /// Of `kv_bytes`, those of one block.
    pub kv_block_bytes: u64,
}

/// Why there is no plan, or no room for it.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The host has too little memory.
    #[error(
        "a rank needs {needed_bytes} bytes ({plan}), the host has {available_bytes} bytes available per rank"
    )]
    DoesNotFit {
        /// Bytes of the plan.
        needed_bytes: u64,
        /// The plan.
        plan: MemoryPlan,
        /// Bytes of the host that are free or can be, divided by the ranks that load.
        available_bytes: u64,
    },
    /// The GPU has too little memory.
    #[error(
        "a rank needs {needed_bytes} bytes of its GPU ({plan}), and may have {available_bytes}: --gpu-memory {share} of \
         {total_bytes} bytes for {sharing} rank(s), and {free_bytes} are free, of which {kept_bytes} are left to the driver, its \
         libraries and others, and the rest to {loading} rank(s)"
    )]
    DoesNotFitGpu {
        /// Bytes of the plan.
        needed_bytes: u64,
        /// The plan.
        plan: Box<MemoryPlan>,
        /// Bytes that a rank may take.
        available_bytes: u64,
        /// Part of the GPU's memory that a rank may take.
        share: f64,
        /// Bytes of the GPU.
        total_bytes: u64,
        /// Ranks on the GPU.
        sharing: u64,
        /// Bytes of the GPU that nobody has taken.
        free_bytes: u64,
        /// Bytes of these that are not for ranks to take.
        kept_bytes: u64,
        /// Ranks on the GPU that load at the same time.
        loading: u64,
    },
    /// The checkpoint does not fit its configuration.
    #[error(transparent)]
    Checkpoint(LoadError),
    /// A GPU cannot be told of so large a step.
    #[error(transparent)]
    Step(#[from] cuda::StepTooLarge),
    /// The shapes of the model could not be run.
    #[error("cannot plan memory: {0}")]
    Shapes(#[from] DeviceError),
}

impl MemoryPlan {
    /// Plans a rank. Returns the bytes of the checkpoint that it will read, too.
    ///
    /// # Errors
    /// The checkpoint does not fit its configuration (all faults), or sizes beyond any memory or what a GPU can be told of.
    pub fn new(setup: &Setup, config: &Config, checkpoint: &Checkpoint) -> Result<(Self, u64), PlanError> {
        let on_gpu = setup.device == DeviceKind::Cuda;
        let sizes = setup.cuda_sizes(config);
        if on_gpu {
            sizes.check()?;
        }
        let device = PlanDevice::new(setup.device);
        let mut read_bytes = 0;
        let Setup { normalization, parallel, dtype, .. } = *setup;
        let model = Model::load(&device, checkpoint, config, normalization, parallel, dtype, &mut |bytes| {
            read_bytes = bytes;
            Ok(())
        })
        .map_err(PlanError::Checkpoint)?;
        let weights_bytes = device.weights_bytes();
        run_largest_steps(&device, &model, setup, config)?;
        let workspace = device.workspace_bytes();
        let of_gpu = |bytes: usize| if on_gpu { bytes as u64 } else { 0 };
        let graphs_bytes = cuda::graphs_bytes(config.text.num_hidden_layers);
        let mut plan = Self {
            weights_bytes,
            kv_bytes: 0,
            kv_block_bytes: device.kv_bytes() / setup.kv_blocks as u64,
            features_bytes: allocated(on_gpu, device.features_bytes()),
            workspace_bytes: allocated(on_gpu, workspace + workspace / WORKSPACE_SLACK),
            staging_bytes: of_gpu(sizes.device_bytes()),
            graphs_bytes: if setup.use_graphs { of_gpu(graphs_bytes) } else { 0 },
            pinned_bytes: of_gpu(sizes.pinned_bytes()),
            collective_bytes: setup.collective_bytes() as u64,
            media_bytes: (MediaStore::reserved_bytes(setup.waiting_pixel_bytes) + setup.frame_bytes(config))
                as u64,
            on_gpu,
            process_bytes: PROCESS_BYTES + (setup.scratch_bytes(config) + setup.draw_bytes(config)) as u64,
        };
        plan.set_kv_blocks(setup.kv_blocks);
        Ok((plan, read_bytes))
    }

    /// Plans for another number of blocks of keys and values.
    pub fn set_kv_blocks(&mut self, blocks: usize) {
        self.kv_bytes = allocated(self.on_gpu, self.kv_block_bytes * blocks as u64);
    }

    /// All bytes.
    pub fn total_bytes(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of the GPU's memory.
    pub fn gpu_bytes(&self) -> u64 {
        let parts = [
            self.weights_bytes,
            self.kv_bytes,
            self.features_bytes,
            self.workspace_bytes,
            self.staging_bytes,
            self.graphs_bytes,
        ];
        if self.on_gpu { parts.iter().sum() } else { 0 }
    }

    /// Checks that the plan fits the part of `host_available_bytes` that each of `num_ranks` ranks has, all that take memory now, with what
    /// it shares with the others, which is taken already.
    ///
    /// # Errors
    /// It does not fit.
    pub fn check_fits(&self, host_available_bytes: u64, num_ranks: usize) -> Result<(), PlanError> {
        let available_bytes = host_available_bytes / num_ranks as u64 + self.collective_bytes;
        let needed_bytes = self.total_bytes() - self.gpu_bytes();
        if needed_bytes <= available_bytes {
            return Ok(());
        }
        Err(PlanError::DoesNotFit { needed_bytes, plan: self.clone(), available_bytes })
    }

    fn parts(&self) -> [(&'static str, u64); 10] {
        [
            ("weights", self.weights_bytes),
            ("keys and values", self.kv_bytes),
            ("features", self.features_bytes),
            ("workspace", self.workspace_bytes),
            ("staging", self.staging_bytes),
            ("graphs", self.graphs_bytes),
            ("collective", self.collective_bytes),
            ("media", self.media_bytes),
            ("process", self.process_bytes),
            ("pinned", self.pinned_bytes),
        ]
    }
}

/// Bytes that memory of so many takes where it is.
fn allocated(on_gpu: bool, bytes: u64) -> u64 {
    if on_gpu { cuda::allocation_bytes(bytes as usize) as u64 } else { bytes }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (name, bytes)) in self.parts().into_iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{name} {bytes}")?;
        }
        Ok(())
    }
}

/// Makes the caches, and the calls of the largest steps and of smaller ones: media, one long chunk, and as many sequences
/// as may be, each drawing a token.
fn run_largest_steps(
    device: &PlanDevice,
    model: &Model<PlanDevice>,
    setup: &Setup,
    config: &Config,
) -> Result<(), DeviceError> {
    // First and for good, as where steps run.
    let mut frame = model.vision_frame(device, setup.max_frame_patches)?;
    let layers = config.text.num_hidden_layers;
    let mut cache = device.kv_cache(setup.dtype, layers, model.heads(), setup.kv_blocks)?;
    let mut features = device.features(config.text.hidden_size, setup.feature_blocks)?;
    let frame_tokens = setup.max_frame_patches / config.vision.merge_unit();
    for tokens in planned_sizes(frame_tokens.min(model.vision_run_tokens())) {
        encode(device, model, config, &mut frame, &mut features, tokens)?;
    }
    for rows in planned_sizes(setup.max_step_tokens) {
        for sequences in [1, setup.max_step_sequences.min(rows)] {
            run_step(device, model, &mut cache, &features, [rows, sequences, sequences])?;
        }
    }
    Ok(())
}

/// Sizes from `largest` down to half of it.
fn planned_sizes(largest: usize) -> impl Iterator<Item = usize> {
    let sizes = (0..=PLANNED_SIZES).map(move |i| largest - largest * i / (2 * PLANNED_SIZES));
    sizes.filter(|size| *size > 0)
}

/// The calls of encoding a temporal patch of so many tokens. What they need does not depend on how these lie, nor on how
/// many there are beyond those that are worked on at once.
fn encode(
    device: &PlanDevice,
    model: &Model<PlanDevice>,
    config: &Config,
    frame: &mut VisionFrame<PlanDevice>,
    features: &mut Counted,
    tokens: usize,
) -> Result<(), DeviceError> {
    let merge = config.vision.spatial_merge_size;
    let grid = [merge, tokens * merge];
    let order = model.window_order(grid);
    let work = 0..stages(&config.vision).len() * tokens;
    let piece = FramePiece { pixels: &[], grid, order: &order, work, slots: &vec![0; tokens] };
    model.encode(device, frame, &piece, features).map(drop)
}

/// The calls of a step of so many rows and sequences, some of which draw.
fn run_step(
    device: &PlanDevice,
    model: &Model<PlanDevice>,
    cache: &mut Counted,
    features: &Counted,
    [rows, sequences, draws]: [usize; 3],
) -> Result<(), DeviceError> {
    let (hidden, _) = model.forward(device, &even_batch(rows, sequences), cache, features)?;
    // As where a chunk does not draw: the rows of the others are gathered beside the rows of all.
    let drawing: Vec<u32> = (0..draws as u32).collect();
    let gathered = device.gather_rows(&hidden, &drawing)?;
    // The draw that needs most: one that takes all logits of a row.
    let truncation = Truncation::new(0, 0.5, 0.0);
    let truncated = RowSampling {
        temperature: Some(1.0),
        num_offered: truncation.map_or(0, |truncation| truncation.num_offered()),
        truncation,
        ..RowSampling::default()
    };
    model.sample(device, &gathered, &vec![truncated; draws])?;
    Ok(())
}

/// `num_rows` rows of tokens, spread over `num_sequences` sequences, the first of which takes what is over.
fn even_batch(num_rows: usize, num_sequences: usize) -> Batch {
    let each = num_rows / num_sequences;
    let first = num_rows - each * (num_sequences - 1);
    let ends = (0..num_sequences).map(|i| first + i * each);
    let starts = std::iter::once(0).chain(ends.clone());
    let sequences: Vec<SequenceRows> = starts
        .zip(ends)
        .map(|(start, end)| SequenceRows {
            rows: start..end,
            num_computed_tokens: 0,
            block_table: Vec::new(),
        })
        .collect();
    Batch {
        token_ids: vec![0; num_rows],
        drawn: Vec::new(),
        positions: vec![[0; 3]; num_rows],
        slots: vec![0; num_rows],
        features: vec![(0, 0); 1],
        sample_rows: sequences.iter().map(|sequence| sequence.rows.end as u32 - 1).collect(),
        sequences,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, path::Path};

    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use serde_json::json;

    use super::*;
    use crate::{
        device::DType,
        model::{Normalization, Parallel},
        weights::random::RandomModel,
    };

    /// The most workspace that random steps need, as a part of what is planned for `setup`. The device only counts, and lends
    /// and takes back workspace exactly as the device does.
    fn needed_share(dir: &Path, setup: &Setup, rng: &mut SmallRng) -> f64 {
        let config = Config::open(dir).expect("a valid configuration");
        let checkpoint = Checkpoint::open(dir).expect("a checkpoint");
        let (plan, _) = MemoryPlan::new(setup, &config, &checkpoint).expect("a plan");
        let device = PlanDevice::new(setup.device);
        let Setup { normalization, parallel, dtype, .. } = *setup;
        let model =
            Model::load(&device, &checkpoint, &config, normalization, parallel, dtype, &mut |_| Ok(()));
        let model = model.expect("loads");
        let mut frame = model.vision_frame(&device, setup.max_frame_patches).expect("counted");
        let mut cache = device.kv_cache(dtype, 1, model.heads(), 1).expect("counted");
        let mut features = device.features(1, 1).expect("counted");
        let most_tokens = setup.max_frame_patches / config.vision.merge_unit();
        // As often little as much, and often nearly all that may be.
        let mut amount = |most: usize| match rng.random_range(0..3) {
            0 => rng.random_range(1..=most),
            1 => {
                let few = 1 << rng.random_range(0..12);
                rng.random_range(1..=most.min(few))
            }
            _ => most - rng.random_range(0..most.div_ceil(20)),
        };
        for _ in 0..60 {
            if most_tokens > 0 {
                let tokens = amount(most_tokens);
                encode(&device, &model, &config, &mut frame, &mut features, tokens).expect("counted");
            }
            let rows = amount(setup.max_step_tokens);
            let sequences = amount(rows.min(setup.max_step_sequences));
            let draws = amount(sequences + 1) - 1;
            run_step(&device, &model, &mut cache, &features, [rows, sequences, draws]).expect("counted");
        }
        device.workspace_bytes() as f64 / plan.workspace_bytes as f64
    }

    fn setup(rng: &mut SmallRng, max_step_tokens: usize, max_frame_patches: usize) -> Setup {
        let world_size = rng.random_range(1..9);
        Setup {
            parallel: Parallel { rank: rng.random_range(0..world_size), world_size },
            device: if rng.random_bool(0.5) { DeviceKind::Cpu } else { DeviceKind::Cuda },
            dtype: DType::Bf16,
            normalization: Normalization { mean: [0.5; 3], std: [0.25; 3] },
            max_context_tokens: 4096,
            max_step_tokens,
            max_step_sequences: rng.random_range(1..65),
            max_frame_patches,
            waiting_pixel_bytes: 0,
            kv_blocks: 1,
            feature_blocks: 1,
            threads: 1,
            use_graphs: true,
        }
    }

    #[test]
    fn no_step_of_a_small_model_needs_more_workspace_than_planned() {
        let mut rng = SmallRng::seed_from_u64(5);
        for round in 0..200 {
            let name = ["a", "b", "c", "d", "e", "f", "g"][round % 7];
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/checkpoints").join(name);
            let most = [30, 300, 3000][rng.random_range(0..3)];
            let max_step_tokens = rng.random_range(1..most);
            // Without media, so that text alone decides, in every other round.
            let patches = if round % 2 == 0 { 0 } else { rng.random_range(0..4 * most) };
            let setup = setup(&mut rng, max_step_tokens, patches);
            let share = needed_share(&dir, &setup, &mut rng);
            assert!(share <= 1.0, "{share} of what was planned for {name}: {setup:?}");
        }
    }

    /// A checkpoint as wide as the released one of 3B, with few layers.
    fn wide_checkpoint() -> tempfile::TempDir {
        hollow_checkpoint(&RandomModel {
            vocab_size: 151_936,
            hidden_size: 2048,
            num_hidden_layers: 2,
            num_attention_heads: 16,
            num_key_value_heads: 2,
            intermediate_size: 11_008,
            vision_hidden_size: 1280,
            vision_depth: 2,
            vision_num_heads: 16,
            vision_intermediate_size: 3420,
            seed: 0,
        })
    }

    /// A checkpoint of a file without data.
    fn hollow_checkpoint(wide: &RandomModel) -> tempfile::TempDir {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in wide.shapes() {
            let start = end;
            end += 2 * shape.iter().product::<usize>();
            header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }));
        }
        let mut header = serde_json::to_vec(&header).expect("a header");
        header.resize(header.len().next_multiple_of(8), b' ');
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = fs::File::create(folder.path().join("model.safetensors")).expect("a file");
        file.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
        file.write_all(&header).expect("written");
        file.set_len((8 + header.len() + end) as u64).expect("a file of holes");

        let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/checkpoints/a/config.json");
        let mut config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(small).expect("read")).expect("JSON");
        for (name, value) in [
            ("vocab_size", wide.vocab_size),
            ("hidden_size", wide.hidden_size),
            ("num_hidden_layers", wide.num_hidden_layers),
            ("num_attention_heads", wide.num_attention_heads),
            ("num_key_value_heads", wide.num_key_value_heads),
            ("intermediate_size", wide.intermediate_size),
        ] {
            config[name] = value.into();
        }
        config["tie_word_embeddings"] = (wide.vocab_size == 151_936).into();
        config["rope_scaling"]["mrope_section"] = json!([16, 24, 24]);
        let vision = &mut config["vision_config"];
        for (name, value) in [
            ("depth", wide.vision_depth),
            ("hidden_size", wide.vision_hidden_size),
            ("num_heads", wide.vision_num_heads),
            ("intermediate_size", wide.vision_intermediate_size),
            ("out_hidden_size", wide.hidden_size),
        ] {
            vision[name] = value.into();
        }
        let attending: Vec<usize> = if wide.vision_depth == 32 { vec![7, 15, 23, 31] } else { vec![1] };
        vision["fullatt_block_indexes"] = json!(attending);
        fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        folder
    }

    /// Of 2 ranks, a medium of 8192 patches needs 9 hundredths less than one that is a little smaller.
    #[test]
    fn no_step_of_a_wide_model_needs_more_workspace_than_planned() {
        let mut rng = SmallRng::seed_from_u64(6);
        let folder = wide_checkpoint();
        for round in 0..24 {
            let patches = [8192, 16384, 5000, rng.random_range(4..20_000)][round % 4];
            let max_step_tokens = rng.random_range(1..4097);
            let mut setup = setup(&mut rng, max_step_tokens, patches);
            if round == 0 {
                setup.parallel = Parallel { rank: 1, world_size: 2 };
            }
            let share = needed_share(folder.path(), &setup, &mut rng);
            assert!(share <= 1.0, "{share} of what was planned: {setup:?}");
        }
    }

    /// The released 7B, the largest picture that its processor allows, and a context of 32,768 tokens beside it, on 1, 2, 4 and 8
    /// GPUs: all within a plan that is made at start.
    #[test]
    fn the_largest_picture_and_a_full_context_fit_a_gpu() {
        let folder = hollow_checkpoint(&RandomModel {
            vocab_size: 152_064,
            hidden_size: 3584,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            intermediate_size: 18_944,
            vision_hidden_size: 1280,
            vision_depth: 32,
            vision_num_heads: 16,
            vision_intermediate_size: 3420,
            seed: 0,
        });
        let config = Config::open(folder.path()).expect("a valid configuration");
        let checkpoint = Checkpoint::open(folder.path()).expect("a checkpoint");
        let mut plans = Vec::new();
        for world_size in [1, 2, 4, 8] {
            let setup = Setup {
                parallel: Parallel { rank: 0, world_size },
                device: DeviceKind::Cuda,
                max_context_tokens: 32_768,
                max_step_tokens: 4096,
                max_step_sequences: 64,
                max_frame_patches: 4 * 16_384,
                kv_blocks: 32_768 / 32,
                feature_blocks: 32_768 / 64,
                ..setup(&mut SmallRng::seed_from_u64(1), 1, 1)
            };
            let (plan, _) = MemoryPlan::new(&setup, &config, &checkpoint).expect("a plan");
            println!("{world_size} GPUs: {:.1} GB each ({plan})", plan.gpu_bytes() as f64 * 1e-9);
            plans.push(plan);
        }
        let [one, .., eight] = &plans[..] else { unreachable!("four plans") };
        // 7.6 billion parameters of text and 0.7 of vision, of two bytes each: 16.6 GB, and a megabyte of each matrix's last page.
        assert!((16.7e9..16.9e9).contains(&(one.weights_bytes as f64)), "{one}");
        assert_eq!(one.kv_bytes, 32_768 * 28 * 4 * 2 * 128 * 2);
        assert!(one.gpu_bytes() < 24_000_000_000, "{one}");
        assert!(eight.weights_bytes < one.weights_bytes / 6, "{eight}");
    }

    #[test]
    fn the_largest_batch_covers_all_rows_once() {
        for (rows, sequences) in [(7, 1), (7, 3), (4, 4), (100, 8)] {
            let batch = even_batch(rows, sequences);
            let covered: Vec<usize> =
                batch.sequences.iter().flat_map(|sequence| sequence.rows.clone()).collect();
            assert_eq!(covered, (0..rows).collect::<Vec<_>>());
            assert_eq!(batch.sample_rows.len(), sequences);
        }
    }

    #[test]
    fn a_step_that_is_too_large_is_refused_with_the_arithmetic() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/checkpoints/g");
        let config = Config::open(&dir).expect("a valid configuration");
        let checkpoint = Checkpoint::open(&dir).expect("a checkpoint");
        // The most of all that a request to load may ask for.
        let setup = Setup {
            device: DeviceKind::Cuda,
            max_context_tokens: 1 << 20,
            max_step_tokens: 1 << 17,
            max_step_sequences: 1 << 14,
            ..setup(&mut SmallRng::seed_from_u64(1), 1, 1 << 20)
        };
        let error = MemoryPlan::new(&setup, &config, &checkpoint).expect_err("too large");
        assert!(matches!(error, PlanError::Step(_)), "{error}");
        // 2^14 sequences of 2^15 blocks, of four bytes each, and the rows.
        let bytes = setup.cuda_sizes(&config).step_bytes();
        assert!((1 << 31..(1 << 31) + (1 << 23)).contains(&bytes), "{bytes}");
        let words = error.to_string();
        for part in ["16384 sequences", "1048576 tokens in blocks of 32", &format!("{bytes} bytes")] {
            assert!(words.contains(part), "{part} in {words}");
        }
    }

    #[test]
    fn a_plan_that_does_not_fit_says_what_it_needs() {
        let plan =
            MemoryPlan { weights_bytes: 65, kv_bytes: 30, collective_bytes: 5, ..MemoryPlan::default() };
        plan.check_fits(190, 2).unwrap();
        let error = plan.check_fits(189, 2).unwrap_err().to_string();
        assert!(error.contains("needs 100 bytes (weights 65, keys and values 30,"), "{error}");
        assert!(error.contains("99 bytes available per rank"), "{error}");
    }
}
