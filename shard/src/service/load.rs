//! From a checkpoint's folder to a rank that runs steps.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::shard as pb;

use super::{
    gate::Gate,
    options::{DeviceKind, LoadOptions},
    worker::{Load, LoadError, LoadEvent, Loaded, Rank},
};
use crate::{
    collective::{Alone, Collective, DEFAULT_SLOT_BYTES, SharedMemory},
    config::Config,
    device::{
        Device, DeviceError, FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS,
        cpu::{CpuDevice, CpuOptions},
    },
    model::{
        self, Model, Normalization, Parallel,
        stages::{self, Stage},
    },
    process,
    runner::{
        MediaStore, MemoryPlan, Runner, Setup, Step, StepError, StepResult, plan::PlanError, run::Parts,
    },
    weights::{Checkpoint, Progress},
};

/// Time between two reports of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Stands between a rank and its group: takes what the rank would meet the others by, and gives what it is to use instead.
pub type Wrap = dyn Fn(Box<dyn Collective>) -> Box<dyn Collective> + Send + Sync;

/// Plans, checks that the plan fits, meets the other ranks, and loads.
///
/// # Errors
/// All that is wrong with the checkpoint; a plan that does not fit; ranks that cannot be met; a device that fails.
pub fn load(
    options: &LoadOptions,
    gate: &Arc<Gate>,
    tell: &mut dyn FnMut(LoadEvent),
) -> Result<Loaded, LoadError> {
    load_and_meet(options, gate, tell, Arc::new(|collective| collective))
}

/// Loads as [`load`] does. The rank meets the others of each of its epochs by what `wrap` makes of the collective.
pub fn load_with(wrap: Arc<Wrap>) -> Arc<Load> {
    Arc::new(move |options, gate, tell| load_and_meet(options, gate, tell, wrap.clone()))
}

fn load_and_meet(
    options: &LoadOptions,
    gate: &Arc<Gate>,
    tell: &mut dyn FnMut(LoadEvent),
    wrap: Arc<Wrap>,
) -> Result<Loaded, LoadError> {
    if options.device == DeviceKind::Cuda {
        return Err(LoadError::Unsupported("device: this build has no \"cuda\" device".into()));
    }
    let (config, checkpoint) = open(options)?;
    let setup = setup(options);
    let (plan, total_bytes) = MemoryPlan::new(&setup, &config, &checkpoint).map_err(|error| match error {
        PlanError::Checkpoint(error) => LoadError::from(error),
        error => error.into(),
    })?;
    tell(LoadEvent::Plan(plan.clone()));
    let place = Place { rank: options.rank, world_size: options.world_size, gate: gate.clone(), wrap };
    let collective = place.join(options.epoch, &options.collective_path)?;
    meet(&*collective, || {
        let available_bytes = process::available_memory_bytes().map_err(LoadError::Memory)?;
        Ok(plan.check_fits(available_bytes, options.loading_ranks)?)
    })?;
    let device = CpuDevice::new(CpuOptions {
        threads: options.threads,
        cpus: options.cpus.clone(),
        workspace_bytes: plan.workspace_bytes as usize,
        instruction_set: None,
        collective,
        progress: gate.progress().clone(),
    })?;
    let mut progress = Telling { tell, told: Instant::now(), total_bytes };
    let parts = load_parts(device, &setup, &config, &checkpoint, &mut |loaded_bytes| {
        gate.progress().pieces_of(0).count();
        progress.tell(loaded_bytes);
        // Nobody waits for an epoch that was given up, and somebody may for the memory.
        if gate.asked() == options.epoch { Ok(()) } else { Err(DeviceError::GroupLost) }
    })?;
    let (instruction_set, checksum) = (parts.device.instruction_set(), parts.model.weights_checksum());
    let description = describe(&config, &setup, instruction_set.name(), checksum);
    let media = Arc::new(MediaStore::new(setup.waiting_pixel_bytes, options.epoch));
    // Touched now, so that the first medium takes no new memory.
    let pixels = vec![1; setup.frame_bytes(&config)];
    let idle_bytes = parts.device.used_workspace_bytes();
    let runner = Runner::new(parts, setup.limits(&config), media.clone(), pixels);
    Ok(Loaded { description, media, rank: Box::new(CpuRank { runner, place, idle_bytes }) })
}

/// A rank's place in its group, and how it gets there.
struct Place {
    rank: usize,
    world_size: usize,
    gate: Arc<Gate>,
    wrap: Arc<Wrap>,
}

impl Place {
    /// Enters an epoch, whose ranks meet in the file `path`. Waits for nobody.
    fn join(&self, epoch: u64, path: &Path) -> Result<Box<dyn Collective>, LoadError> {
        let lost = |_| DeviceError::GroupLost;
        let collective: Box<dyn Collective> = if self.world_size == 1 {
            Box::new(self.gate.enter(epoch, Alone, None).map_err(lost)?)
        } else {
            let shared = SharedMemory::join(path, self.rank, self.world_size, DEFAULT_SLOT_BYTES)?;
            let aborter = shared.aborter();
            Box::new(self.gate.enter(epoch, shared, Some(aborter)).map_err(lost)?)
        };
        Ok((self.wrap)(collective))
    }
}

/// Meets the other ranks of an epoch. `look` runs when all of them have given back what they had before, and none takes memory
/// before all have looked.
fn meet(collective: &dyn Collective, look: impl FnOnce() -> Result<(), LoadError>) -> Result<(), LoadError> {
    let barrier = || collective.barrier().map_err(DeviceError::from);
    barrier()?;
    look()?;
    Ok(barrier()?)
}

/// A rank on threads of the host.
struct CpuRank {
    runner: Runner<CpuDevice>,
    place: Place,
    /// Workspace that is in use between steps.
    idle_bytes: usize,
}

impl Rank for CpuRank {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        self.runner.run(step)
    }

    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError> {
        self.runner.forget(epoch);
        let device = self.runner.device_mut();
        // A step that was ended anywhere has given back what it held, or this rank must not go on.
        assert_eq!(device.used_workspace_bytes(), self.idle_bytes, "bytes of workspace in use between steps");
        // First, so that the memory of two groups is never held at once.
        device.leave_group();
        // They may have been in memory for long, and nothing in the sums of the ranks would show that one has changed.
        device.verify_weights()?;
        let collective = self.place.join(epoch, collective_path)?;
        // It may have to let others load, and needs no more memory itself.
        let met = meet(&*collective, || Ok(()));
        device.join_group(collective);
        met
    }
}

/// Tells the progress of loading, not too often.
struct Telling<'a> {
    tell: &'a mut dyn FnMut(LoadEvent),
    told: Instant,
    total_bytes: u64,
}

impl Telling<'_> {
    fn tell(&mut self, loaded_bytes: u64) {
        let total_bytes = self.total_bytes;
        if self.told.elapsed() >= PROGRESS_INTERVAL || loaded_bytes == total_bytes {
            self.told = Instant::now();
            (self.tell)(LoadEvent::Progress { loaded_bytes, total_bytes });
        }
    }
}

/// Reads the configuration and maps the tensors. Faults of both are told together.
fn open(options: &LoadOptions) -> Result<(Config, Checkpoint), LoadError> {
    match (Config::open(&options.model_dir), Checkpoint::open(&options.model_dir)) {
        (Ok(config), Ok(checkpoint)) => Ok((config, checkpoint)),
        (Err(config), Err(checkpoint)) => Err(LoadError::Checkpoint(format!("{config}\n{checkpoint}"))),
        (Err(config), Ok(_)) => Err(LoadError::Checkpoint(config.to_string())),
        (Ok(_), Err(checkpoint)) => Err(LoadError::Checkpoint(checkpoint.to_string())),
    }
}

fn setup(options: &LoadOptions) -> Setup {
    Setup {
        parallel: Parallel { rank: options.rank, world_size: options.world_size },
        dtype: options.dtype,
        normalization: Normalization { mean: options.image_mean, std: options.image_std },
        max_context_tokens: options.max_context_tokens,
        max_step_tokens: options.max_step_tokens,
        max_step_sequences: options.max_step_sequences,
        max_frame_patches: options.max_frame_patches,
        waiting_pixel_bytes: options.waiting_pixel_bytes,
        kv_blocks: options.kv_blocks,
        feature_blocks: options.feature_blocks,
        threads: options.threads,
    }
}

fn load_parts(
    device: CpuDevice,
    setup: &Setup,
    config: &Config,
    checkpoint: &Checkpoint,
    progress: &mut Progress<'_>,
) -> Result<Parts<CpuDevice>, LoadError> {
    let Setup { normalization, parallel, dtype, .. } = *setup;
    let model = Model::load(&device, checkpoint, config, normalization, parallel, dtype, progress)?;
    let frame = model.vision_frame(&device, setup.max_frame_patches)?;
    let layers = config.text.num_hidden_layers;
    let kv_cache = device.kv_cache(dtype, layers, model.heads(), setup.kv_blocks)?;
    let features = device.features(config.text.hidden_size, setup.feature_blocks)?;
    Ok(Parts { device, model, kv_cache, features, frame })
}

fn describe(
    config: &Config,
    setup: &Setup,
    instruction_set: &str,
    weights_checksum: u64,
) -> pb::ModelDescription {
    let stages = stages::stages(&config.vision);
    let attends = |stage: &Stage| matches!(stage, Stage::Attend { .. });
    pb::ModelDescription {
        architecture: config.architecture.clone(),
        vocab_size: config.text.vocab_size as u32,
        max_context_tokens: u32::try_from(config.text.max_context_tokens()).unwrap_or(u32::MAX),
        image_token_id: config.image_token_id,
        video_token_id: config.video_token_id,
        vision_start_token_id: config.vision_start_token_id,
        vision_end_token_id: config.vision_end_token_id,
        patch_size: config.vision.patch_size as u32,
        merge_size: config.vision.spatial_merge_size as u32,
        temporal_patch_size: config.vision.temporal_patch_size as u32,
        kv_block_tokens: KV_BLOCK_TOKENS as u32,
        feature_block_tokens: FEATURE_BLOCK_TOKENS as u32,
        kv_blocks: setup.kv_blocks as u32,
        feature_blocks: setup.feature_blocks as u32,
        instruction_set: instruction_set.into(),
        vision_stages: stages.len() as u32,
        attending_stages: (0..).zip(&stages).filter(|(_, stage)| attends(stage)).map(|(i, _)| i).collect(),
        attention_tokens: stages::attention_tokens(&config.vision) as u32,
        weights_checksum,
    }
}

impl From<model::LoadError> for LoadError {
    fn from(error: model::LoadError) -> Self {
        match error {
            model::LoadError::Checkpoint(error) => Self::Checkpoint(error.to_string()),
            model::LoadError::Device(error) => Self::Device(error),
        }
    }
}
