//! What to load, checked whole: every fault at once.

use std::path::PathBuf;

use lockstep_proto::shard as pb;
use thiserror::Error;

use super::gpu::{self, GpuOptions, Sums};
use crate::device::{DType, DeviceKind, FEATURE_BLOCK_TOKENS, KV_BLOCK_TOKENS, cuda::cubin_cache};

/// The most ranks of a group.
const MAX_WORLD_SIZE: u32 = 8;

/// The most blocks of a cache: slots are 32 bits.
const MAX_CACHE_TOKENS: u64 = u32::MAX as u64;

/// What to load, as which rank, and within what bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOptions {
    /// The group.
    pub group: u64,
    /// The group's epoch.
    pub epoch: u64,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Ranks of this host that load at the same time.
    pub loading_ranks: usize,
    /// Folder of the checkpoint.
    pub model_dir: PathBuf,
    /// What computes.
    pub device: DeviceKind,
    /// Of weights and of the cache of keys and values.
    pub dtype: DType,
    /// File that the ranks of this host meet in. Unused by a rank alone.
    pub collective_path: PathBuf,
    /// The most tokens of one sequence.
    pub max_context_tokens: usize,
    /// The most tokens that one step computes.
    pub max_step_tokens: usize,
    /// The most patches of one temporal patch of a medium; 0 for text alone.
    pub max_frame_patches: usize,
    /// Bytes of pixels that may wait in this rank's own memory.
    pub waiting_pixel_bytes: usize,
    /// The most sequences in one step.
    pub max_step_sequences: usize,
    /// Blocks of the cache of keys and values; 0, on GPUs: as many as there is room for.
    pub kv_blocks: usize,
    /// Blocks of the cache of vision features.
    pub feature_blocks: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Processors that they run on; empty: any.
    pub cpus: Vec<u32>,
    /// Mean of red, green and blue, of values in 0..1.
    pub image_mean: [f32; 3],
    /// Their standard deviation.
    pub image_std: [f32; 3],
    /// Of GPUs.
    pub gpu: GpuOptions,
}

/// Everything that is wrong with a request to load.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("cannot load: {}", .0.join("; "))]
pub struct InvalidOptions(pub Vec<String>);

impl LoadOptions {
    /// Checks a request.
    ///
    /// # Errors
    /// All faults, each naming its field.
    pub fn new(request: pb::LoadRequest) -> Result<Self, InvalidOptions> {
        let mut faults = Faults::default();
        let device = match request.device.as_str() {
            "cpu" => Some(DeviceKind::Cpu),
            "cuda" => Some(DeviceKind::Cuda),
            other => faults.say(format!("device: {other:?} is neither \"cpu\" nor \"cuda\"")),
        };
        let dtype = match request.dtype.as_str() {
            "bf16" => Some(DType::Bf16),
            "f32" => Some(DType::F32),
            other => faults.say(format!("dtype: {other:?} is neither \"bf16\" nor \"f32\"")),
        };
        let world_size = faults.within("world_size", request.world_size, 1, MAX_WORLD_SIZE);
        if request.rank >= request.world_size {
            faults
                .say::<()>(format!("rank: {} is not below world_size {}", request.rank, request.world_size));
        }
        if request.group == 0 {
            faults.say::<()>("group: is 0".into());
        }
        if request.model_dir.is_empty() {
            faults.say::<()>("model_dir: is empty".into());
        }
        if request.world_size > 1 && request.collective_path.is_empty() {
            faults.say::<()>("collective_path: is empty, and there are other ranks to meet".into());
        }
        let most = request.world_size.clamp(1, MAX_WORLD_SIZE);
        let loading_ranks = faults.within("loading_ranks", request.loading_ranks, 1, most);
        let image_mean = faults.channels("image_mean", &request.image_mean, f32::is_finite);
        let image_std = faults.channels("image_std", &request.image_std, |std| std.is_finite() && std > 0.0);
        let gpu = if device == Some(DeviceKind::Cuda) {
            faults.gpu(request.gpu, world_size)
        } else {
            GpuOptions::none()
        };
        // A GPU's rank finds out what it has room for, unless that is settled.
        let least_kv = if device == Some(DeviceKind::Cuda) && !gpu.is_settled { 0 } else { 1 };
        let options = Self {
            group: request.group,
            epoch: request.epoch,
            rank: request.rank as usize,
            world_size,
            loading_ranks,
            model_dir: request.model_dir.into(),
            device: device.unwrap_or(DeviceKind::Cpu),
            dtype: dtype.unwrap_or(DType::Bf16),
            collective_path: request.collective_path.into(),
            max_context_tokens: faults.within("max_context_tokens", request.max_context_tokens, 1, 1 << 20),
            max_step_tokens: faults.within("max_step_tokens", request.max_step_tokens, 1, 1 << 17),
            max_frame_patches: faults.within("max_frame_patches", request.max_frame_patches, 0, 1 << 20),
            waiting_pixel_bytes: usize::try_from(request.waiting_pixel_bytes).unwrap_or(usize::MAX),
            max_step_sequences: faults.within("max_step_sequences", request.max_step_sequences, 1, 1 << 14),
            kv_blocks: faults.blocks(
                "kv_capacity_tokens",
                request.kv_capacity_tokens,
                KV_BLOCK_TOKENS,
                least_kv,
            ),
            feature_blocks: faults.blocks(
                "feature_capacity_tokens",
                request.feature_capacity_tokens,
                FEATURE_BLOCK_TOKENS,
                0,
            ),
            threads: faults.within("threads", request.threads, 1, 1024),
            cpus: request.cpus,
            image_mean,
            image_std,
            gpu,
        };
        if faults.0.is_empty() { Ok(options) } else { Err(InvalidOptions(faults.0)) }
    }
}

/// Faults so far. Checks give some value even where they find a fault, so that the next check can go on.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn say<T>(&mut self, fault: String) -> Option<T> {
        self.0.push(fault);
        None
    }

    fn within(&mut self, field: &str, value: u32, least: u32, most: u32) -> usize {
        if !(least..=most).contains(&value) {
            self.0.push(format!("{field}: {value} is not in {least}..={most}"));
        }
        value as usize
    }

    fn blocks(&mut self, field: &str, tokens: u64, block_tokens: usize, least: u64) -> usize {
        let blocks = tokens / block_tokens as u64;
        if blocks < least || tokens > MAX_CACHE_TOKENS {
            let least = least * block_tokens as u64;
            self.0.push(format!("{field}: {tokens} is not in {least}..={MAX_CACHE_TOKENS}"));
        }
        blocks as usize
    }

    fn gpu(&mut self, request: Option<pb::GpuRequest>, world_size: usize) -> GpuOptions {
        let Some(pb::GpuRequest {
            ordinals,
            memory,
            sums,
            repeatable,
            no_graphs,
            kernel_cache,
            loading_ranks,
            is_settled,
        }) = request
        else {
            self.0.push("gpu: is missing".into());
            return GpuOptions::none();
        };
        let ordinals: Vec<usize> = ordinals.into_iter().map(|ordinal| ordinal as usize).collect();
        if ordinals.len() != world_size {
            self.0.push(format!("gpu.ordinals: has {}, needs world_size: {world_size}", ordinals.len()));
        }
        if !(memory > 0.0 && memory <= 1.0) {
            self.0.push(format!("gpu.memory: {memory} is not above 0 and at most 1"));
        }
        let sums = match sums.as_str() {
            "peers" => Some(Sums::Peers),
            "nccl" => Some(Sums::Nccl),
            "host" => Some(Sums::Host),
            other => self.say(format!("gpu.sums: {other:?} is none of \"peers\", \"nccl\" and \"host\"")),
        };
        if sums == Some(Sums::Nccl) && !gpu::are_distinct(&ordinals) {
            self.0.push("gpu.ordinals: ranks share a GPU, which NCCL refuses".into());
        }
        let kernel_cache = match kernel_cache.as_str() {
            "" => cubin_cache::default_folder(),
            "none" => None,
            folder => Some(folder.into()),
        };
        GpuOptions {
            ordinals,
            memory,
            sums: sums.unwrap_or(Sums::Host),
            is_repeatable: repeatable,
            use_graphs: !no_graphs,
            overlap_kernels: true,
            kernel_cache,
            loading_ranks: self.within("gpu.loading_ranks", loading_ranks, 1, MAX_WORLD_SIZE),
            is_settled,
        }
    }

    fn channels(&mut self, field: &str, values: &[f32], valid: impl Fn(f32) -> bool) -> [f32; 3] {
        match <[f32; 3]>::try_from(values) {
            Ok(channels) if channels.iter().all(|value| valid(*value)) => channels,
            _ => {
                self.0.push(format!("{field}: {values:?} are not three valid numbers"));
                [1.0; 3]
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn request() -> pb::LoadRequest {
        pb::LoadRequest {
            build_id: crate::build_id().into(),
            epoch: 4,
            rank: 0,
            world_size: 1,
            model_dir: "/nowhere".into(),
            device: "cpu".into(),
            dtype: "f32".into(),
            collective_path: String::new(),
            max_context_tokens: 1024,
            max_step_tokens: 256,
            max_frame_patches: 1024,
            max_step_sequences: 8,
            kv_capacity_tokens: 4096,
            feature_capacity_tokens: 1024,
            threads: 1,
            cpus: vec![],
            image_mean: vec![0.48, 0.45, 0.40],
            image_std: vec![0.26, 0.26, 0.27],
            waiting_pixel_bytes: 0,
            loading_ranks: 1,
            group: 9,
            gpu: None,
        }
    }

    #[test]
    fn capacities_become_whole_blocks() {
        let options = LoadOptions::new(pb::LoadRequest { kv_capacity_tokens: 100, ..request() }).unwrap();
        assert_eq!((options.kv_blocks, options.feature_blocks), (3, 16));
    }

    #[test]
    fn all_faults_come_at_once() {
        let wrong = pb::LoadRequest {
            rank: 9,
            world_size: 9,
            device: "tpu".into(),
            dtype: "int4".into(),
            threads: 0,
            group: 0,
            loading_ranks: 0,
            kv_capacity_tokens: 31,
            image_std: vec![0.2, 0.0, 0.2],
            ..request()
        };
        let words = LoadOptions::new(wrong).unwrap_err().to_string();
        for field in [
            "rank:",
            "world_size:",
            "device:",
            "dtype:",
            "threads:",
            "group:",
            "loading_ranks:",
            "kv_capacity",
            "collective_path:",
            "image_std:",
        ] {
            assert!(words.contains(field), "{field} in {words}");
        }
        assert!(!words.contains("image_mean"), "{words}");
    }
}
