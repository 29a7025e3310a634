//! How a rank is set up: its place in the group and the sizes that memory is planned for.

use super::{sequence::SequenceLimits, state::Limits};
use crate::{
    collective::{DEFAULT_SLOT_BYTES, required_bytes},
    config::Config,
    device::{DType, DeviceKind, cpu, cuda},
    layers::{partition, truncation},
    model::{Normalization, Parallel, positions::PositionGeometry, stages},
};

/// Sizes and place of a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setup {
    /// Its place in the group.
    pub parallel: Parallel,
    /// What computes.
    pub device: DeviceKind,
    /// Of weights and of the cache of keys and values.
    pub dtype: DType,
    /// How pixels are normalized.
    pub normalization: Normalization,
    /// The most tokens of one sequence.
    pub max_context_tokens: usize,
    /// The most tokens that one step computes.
    pub max_step_tokens: usize,
    /// The most sequences in one step.
    pub max_step_sequences: usize,
    /// The most patches of one temporal patch of a medium.
    pub max_frame_patches: usize,
    /// Bytes of pixels that may wait in this rank's own memory, as those do that do not come as files.
    pub waiting_pixel_bytes: usize,
    /// Blocks of keys and values.
    pub kv_blocks: usize,
    /// Blocks of vision features.
    pub feature_blocks: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Whether a GPU keeps steps as graphs.
    pub use_graphs: bool,
}

impl Setup {
    /// What steps must keep within.
    pub fn limits(&self, config: &Config) -> Limits {
        let geometry = PositionGeometry {
            merge_size: config.vision.spatial_merge_size as u32,
            tokens_per_second: config.vision.tokens_per_second as f32,
        };
        Limits {
            sequence: SequenceLimits {
                vocab_size: config.text.vocab_size as u32,
                max_context_tokens: self.max_context_tokens,
                geometry,
            },
            max_step_tokens: self.max_step_tokens,
            max_step_sequences: self.max_step_sequences,
            max_frame_patches: self.max_frame_patches,
            vision_stages: stages::stages(&config.vision).len(),
            kv_blocks: self.kv_blocks,
            feature_blocks: self.feature_blocks,
            patch_size: config.vision.patch_size,
            temporal_patch_size: config.vision.temporal_patch_size,
        }
    }

    /// Bytes of the pixels of the largest temporal patch.
    pub fn frame_bytes(&self, config: &Config) -> usize {
        self.max_frame_patches * config.vision.patch_values()
    }

    /// Bytes that ranks share to meet in. Every rank maps all of them.
    pub fn collective_bytes(&self) -> usize {
        match self.parallel.world_size {
            1 => 0,
            world_size => required_bytes(world_size, DEFAULT_SLOT_BYTES),
        }
    }

    /// Bytes of the host that draws from the best tokens take.
    pub fn draw_bytes(&self, config: &Config) -> usize {
        truncation::host_bytes(self.max_step_sequences, config.text.vocab_size, self.parallel.world_size)
    }

    /// Bytes of the host that the device works in, beside activations and what it pins.
    pub fn scratch_bytes(&self, config: &Config) -> usize {
        match self.device {
            DeviceKind::Cpu => cpu::scratch_bytes(self.threads),
            DeviceKind::Cuda => self.cuda_sizes(config).host_bytes(),
        }
    }

    /// What the largest calls are, for a GPU.
    pub fn cuda_sizes(&self, config: &Config) -> cuda::Sizes {
        let text = &config.text;
        cuda::Sizes {
            world_size: self.parallel.world_size,
            max_step_tokens: self.max_step_tokens,
            max_step_sequences: self.max_step_sequences,
            max_context_tokens: self.max_context_tokens,
            most_sharing: text.num_attention_heads.div_ceil(text.num_key_value_heads),
            num_query: text.num_attention_heads.div_ceil(self.parallel.world_size),
            num_kv: text.num_key_value_heads,
            head_dim: text.head_dim(),
            num_ids: partition::vocabulary(text.vocab_size, Parallel { rank: 0, ..self.parallel }).padded,
            frame_bytes: self.frame_bytes(config),
        }
    }
}
