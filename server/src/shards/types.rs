//! What the shards tell of themselves.

/// What the model is, as all ranks agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDescription {
    /// The checkpoint's architecture.
    pub architecture: String,
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// The most tokens of one sequence by the checkpoint's configuration.
    pub max_context_tokens: u32,
    /// The token that stands for a piece of a picture.
    pub image_token_id: u32,
    /// The token that stands for a piece of a video.
    pub video_token_id: u32,
    /// The token before a picture or video.
    pub vision_start_token_id: u32,
    /// The token after it.
    pub vision_end_token_id: u32,
    /// Pixels on a side of a patch.
    pub patch_size: u32,
    /// Patches on a side of a token.
    pub merge_size: u32,
    /// Frames in a patch.
    pub temporal_patch_size: u32,
    /// Tokens in a block of the cache of keys and values.
    pub kv_block_tokens: u32,
    /// Tokens in a block of the cache of vision features.
    pub feature_block_tokens: u32,
    /// Blocks of keys and values that every rank has.
    pub kv_blocks: u32,
    /// Blocks of vision features that every rank has.
    pub feature_blocks: u32,
    /// Instruction set of the kernels.
    pub instruction_set: String,
    /// Stages in which the vision tower works on each temporal patch.
    pub vision_stages: u32,
    /// Those in which every token attends to all of its temporal patch, from 0.
    pub attending_stages: Vec<u32>,
    /// Tokens in a temporal patch with which attending to them costs as much as the rest of a stage.
    pub attention_tokens: u32,
}

/// Bytes that a rank planned to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Slices of the weights.
    pub weights_bytes: u64,
    /// Cache of keys and values.
    pub kv_bytes: u64,
    /// Cache of vision features.
    pub features_bytes: u64,
    /// Activations.
    pub workspace_bytes: u64,
    /// This rank's part of the memory shared with the other ranks.
    pub collective_bytes: u64,
    /// Pixels that wait to be encoded, and those of the temporal patch in work.
    pub media_bytes: u64,
    /// The process itself.
    pub process_bytes: u64,
    /// What else a GPU holds; 0 without one.
    pub staging_bytes: u64,
    /// Steps that a GPU keeps as graphs, about; 0 without one.
    pub graphs_bytes: u64,
    /// Memory of the host that a GPU copies from and to; 0 without one.
    pub pinned_bytes: u64,
    /// Whether weights, caches, activations, staging and graphs are in a GPU's memory.
    pub on_gpu: bool,
}

impl MemoryPlan {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes
            + self.kv_bytes
            + self.features_bytes
            + self.workspace_bytes
            + self.collective_bytes
            + self.media_bytes
            + self.process_bytes
            + self.staging_bytes
            + self.graphs_bytes
            + self.pinned_bytes
    }

    /// Bytes of it in a GPU's memory.
    pub fn gpu_bytes(&self) -> u64 {
        if !self.on_gpu {
            return 0;
        }
        let caches_bytes = self.kv_bytes + self.features_bytes;
        self.weights_bytes + caches_bytes + self.workspace_bytes + self.staging_bytes + self.graphs_bytes
    }
}

/// What a rank tells when it has loaded.
#[derive(Clone, Debug)]
pub(super) struct Loaded {
    pub plan: MemoryPlan,
    pub description: ModelDescription,
    /// Of its slices of the weights as it read them.
    pub weights_checksum: u64,
}

/// How far a rank is with loading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights read.
    pub loaded_bytes: u64,
    /// Bytes of weights to read; 0 until the rank knows.
    pub total_bytes: u64,
}

/// Memory that a rank holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResidentMemory {
    /// Anonymous resident bytes (RssAnon).
    pub anonymous_bytes: u64,
    /// Shared resident bytes (RssShmem).
    pub shared_bytes: u64,
}

impl ResidentMemory {
    /// Both kinds.
    pub fn total_bytes(&self) -> u64 {
        self.anonymous_bytes + self.shared_bytes
    }
}
