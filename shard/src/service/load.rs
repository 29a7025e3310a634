//! From a checkpoint's folder to a rank that runs steps.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::shard as pb;

use super::{
    gate::Gate,
    gpu,
    options::LoadOptions,
    worker::{Ahead, Load, LoadError, LoadEvent, Loaded, Rank},
};
use crate::{
    collective::{Alone, Collective, DEFAULT_SLOT_BYTES, SharedMemory},
    config::Config,
    device::{
        Device, DeviceError, DeviceKind, FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS, RankDevice,
        cpu::{CpuDevice, CpuOptions},
        cuda::{CudaDevice, CudaOptions},
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
    match options.device {
        DeviceKind::Cpu => load_on_cpu(options, gate, tell, wrap),
        DeviceKind::Cuda => load_on_gpu(options, gate, tell, wrap),
    }
}

fn load_on_cpu(
    options: &LoadOptions,
    gate: &Arc<Gate>,
    tell: &mut dyn FnMut(LoadEvent),
    wrap: Arc<Wrap>,
) -> Result<Loaded, LoadError> {
    let (config, checkpoint) = open(options)?;
    let setup = setup(options);
    let (plan, total_bytes) = plan(&setup, &config, &checkpoint)?;
    tell(LoadEvent::Plan(plan.clone()));
    let place = Place::new(options, gate, wrap);
    let collective = place.join(options.epoch, &options.collective_path)?;
    meet(&*collective, || check_host(&plan, options))?;
    let device = CpuDevice::new(CpuOptions {
        threads: options.threads,
        cpus: options.cpus.clone(),
        workspace_bytes: plan.workspace_bytes as usize,
        instruction_set: None,
        collective,
        progress: gate.progress().clone(),
    })?;
    let instruction_set = device.instruction_set().name();
    let told = Told { tell, total_bytes, instruction_set: instruction_set.to_owned() };
    load_on(device, place, &setup, Opened { config, checkpoint }, told)
}

fn load_on_gpu(
    options: &LoadOptions,
    gate: &Arc<Gate>,
    tell: &mut dyn FnMut(LoadEvent),
    wrap: Arc<Wrap>,
) -> Result<Loaded, LoadError> {
    let host = gpu::find(options)?;
    let (config, checkpoint) = open(options)?;
    let mut setup = setup(options);
    // As many blocks as there is room for, if nobody said how many: how much one takes tells a plan for one.
    setup.kv_blocks = setup.kv_blocks.max(1);
    let (mut plan, total_bytes) = plan(&setup, &config, &checkpoint)?;
    let place = Place::new(options, gate, wrap);
    let collective = place.join(options.epoch, &options.collective_path)?;
    meet(&*collective, || {
        check_host(&plan, options)?;
        let look = || gpu::Room::of(&host, options);
        if options.gpu.is_settled {
            let goes_on = || {
                gate.progress().pieces_of(0).count();
                gate.asked() == options.epoch
            };
            return gpu::wait_for_room(look, &plan, gpu::ROOM_TIMEOUT, goes_on);
        }
        let room = look()?;
        if options.kv_blocks == 0 {
            let most = room.kv_blocks(&plan)?;
            setup.kv_blocks = least_of_ranks(&*collective, most)?;
            plan.set_kv_blocks(setup.kv_blocks);
        }
        Ok(room.check_fits(&plan)?)
    })?;
    tell(LoadEvent::Plan(plan.clone()));
    let device = CudaDevice::new(CudaOptions {
        cubins: host.cubins(options, gate.progress())?,
        sums: options.gpu.sums,
        has_nccl: host.has_nccl,
        use_cublas_lt: host.has_cublas_lt,
        is_repeatable: options.gpu.is_repeatable,
        use_graphs: options.gpu.use_graphs,
        overlap_kernels: options.gpu.overlap_kernels,
        gpu: host.gpu,
        sizes: setup.cuda_sizes(&config),
        workspace_bytes: plan.workspace_bytes as usize,
        collective,
        progress: gate.progress().clone(),
    })?;
    let told = Told { tell, total_bytes, instruction_set: host.arch.target() };
    load_on(device, place, &setup, Opened { config, checkpoint }, told)
}

/// What is read from the checkpoint's folder.
struct Opened {
    config: Config,
    checkpoint: Checkpoint,
}

/// What is told of loading, and to whom.
struct Told<'a> {
    tell: &'a mut dyn FnMut(LoadEvent),
    total_bytes: u64,
    instruction_set: String,
}

/// Loads on a device that is ready.
fn load_on<D: RankDevice + 'static>(
    device: D,
    place: Place,
    setup: &Setup,
    Opened { config, checkpoint }: Opened,
    Told { tell, total_bytes, instruction_set }: Told<'_>,
) -> Result<Loaded, LoadError> {
    let gate = place.gate.clone();
    let mut progress = Telling { tell, told: Instant::now(), total_bytes };
    let epoch = gate.asked();
    let parts = load_parts(device, setup, &config, &checkpoint, &mut |loaded_bytes| {
        gate.progress().pieces_of(0).count();
        progress.tell(loaded_bytes);
        // Nobody waits for an epoch that was given up, and somebody may for the memory.
        if gate.asked() == epoch { Ok(()) } else { Err(DeviceError::GroupLost) }
    })?;
    let description = describe(&config, setup, &instruction_set, parts.model.weights_checksum());
    let media = Arc::new(MediaStore::new(setup.waiting_pixel_bytes, epoch));
    // Touched now, so that the first medium takes no new memory.
    let pixels = vec![1; setup.frame_bytes(&config)];
    let idle_bytes = parts.device.used_workspace_bytes();
    let runner = Runner::new(parts, setup.limits(&config), media.clone(), pixels);
    Ok(Loaded { description, media, rank: Box::new(LoadedRank { runner, place, idle_bytes }) })
}

fn plan(setup: &Setup, config: &Config, checkpoint: &Checkpoint) -> Result<(MemoryPlan, u64), LoadError> {
    MemoryPlan::new(setup, config, checkpoint).map_err(|error| match error {
        PlanError::Checkpoint(error) => LoadError::from(error),
        error => error.into(),
    })
}

fn check_host(plan: &MemoryPlan, options: &LoadOptions) -> Result<(), LoadError> {
    let available_bytes = process::available_memory_bytes().map_err(LoadError::Memory)?;
    Ok(plan.check_fits(available_bytes, options.loading_ranks)?)
}

/// The smallest of the ranks' numbers.
fn least_of_ranks(collective: &dyn Collective, mine: usize) -> Result<usize, LoadError> {
    let of_ranks = collective.all_gather(&(mine as u64).to_le_bytes()).map_err(DeviceError::from)?;
    let numbers = of_ranks.iter().filter_map(|bytes| bytes[..].try_into().ok()).map(u64::from_le_bytes);
    Ok(numbers.min().map_or(mine, |least| least as usize))
}

/// A rank's place in its group, and how it gets there.
struct Place {
    rank: usize,
    world_size: usize,
    gate: Arc<Gate>,
    wrap: Arc<Wrap>,
}

impl Place {
    fn new(options: &LoadOptions, gate: &Arc<Gate>, wrap: Arc<Wrap>) -> Self {
        Self { rank: options.rank, world_size: options.world_size, gate: gate.clone(), wrap }
    }

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

/// A rank that is ready.
struct LoadedRank<D: RankDevice> {
    runner: Runner<D>,
    place: Place,
    /// Workspace that is in use between steps.
    idle_bytes: usize,
}

impl<D: RankDevice> Rank for LoadedRank<D> {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        self.runner.run(step)
    }

    fn ahead(&mut self) -> Option<&mut dyn Ahead> {
        Some(&mut self.runner)
    }

    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError> {
        self.runner.forget(epoch);
        let device = self.runner.device_mut();
        // A step that was ended anywhere has given back what it held, or this rank must not go on.
        assert_eq!(device.used_workspace_bytes(), self.idle_bytes, "bytes of workspace in use between steps");
        // First, so that the memory of two groups is never held at once.
        device.leave_group()?;
        // They may have been in memory for long, and nothing in the sums of the ranks would show that one has changed.
        device.verify_weights()?;
        let collective = self.place.join(epoch, collective_path)?;
        // It may have to let others load, and needs no more memory itself.
        let met = meet(&*collective, || Ok(()));
        device.join_group(collective)?;
        met
    }
}

impl<D: Device> Ahead for Runner<D> {
    fn may_begin(&self, step: &Step) -> bool {
        self.may_begin(step)
    }

    fn begin(&mut self, step: Step) -> Result<(), StepError> {
        self.begin(step)
    }

    fn has_finished(&self) -> Result<bool, StepError> {
        self.has_finished()
    }

    fn finish(&mut self) -> Result<StepResult, StepError> {
        self.finish()
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
        device: options.device,
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
        // Sums that go another way are in no graph.
        use_graphs: options.gpu.use_graphs
            && (options.world_size == 1 || options.gpu.sums == gpu::Sums::Peers),
    }
}

fn load_parts<D: Device>(
    device: D,
    setup: &Setup,
    config: &Config,
    checkpoint: &Checkpoint,
    progress: &mut Progress<'_>,
) -> Result<Parts<D>, LoadError> {
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
