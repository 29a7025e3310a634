//! The model that is served, and its limits.

use lockstep_proto::v1;

/// The model that is served, and its limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Name of the checkpoint.
    pub name: String,
    /// The checkpoint's architecture.
    pub architecture: String,
    /// The most tokens that a prompt and its answer may have together.
    pub max_context_tokens: u32,
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// Tensor-parallel ranks.
    pub world_size: u32,
    /// "cpu" or "cuda".
    pub device: String,
    /// "bf16" or "f32".
    pub dtype: String,
    /// Pixels on a side of a token of a picture.
    pub pixels_per_token_side: u32,
    /// Least pixels of a picture that names no bound.
    pub min_pixels: u64,
    /// Most pixels of a picture that names no bound.
    pub max_pixels: u64,
    /// Tokens that end an answer.
    pub end_token_ids: Vec<u32>,
    /// Tokens that all requests together can hold in the cache of keys and values.
    pub kv_capacity_tokens: u64,
    /// Memory of each shard, in rank order.
    pub shards: Vec<ShardMemory>,
    /// Version of the server.
    pub version: String,
}

/// Memory of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct ShardMemory {
    /// Its rank.
    pub rank: u32,
    /// What it planned at start, in bytes: of the host and of its GPU.
    pub planned_bytes: u64,
    /// Anonymous and shared resident pages of the host, in bytes.
    pub resident_bytes: u64,
}

impl From<v1::GetModelResponse> for Model {
    fn from(model: v1::GetModelResponse) -> Self {
        Model {
            name: model.name,
            architecture: model.architecture,
            max_context_tokens: model.max_context_tokens,
            vocab_size: model.vocab_size,
            world_size: model.world_size,
            device: model.device,
            dtype: model.dtype,
            pixels_per_token_side: model.pixels_per_token_side,
            min_pixels: model.min_pixels,
            max_pixels: model.max_pixels,
            end_token_ids: model.end_token_ids,
            kv_capacity_tokens: model.kv_capacity_tokens,
            shards: model.shards.into_iter().map(ShardMemory::from).collect(),
            version: model.version,
        }
    }
}

impl From<v1::ShardMemory> for ShardMemory {
    fn from(shard: v1::ShardMemory) -> Self {
        ShardMemory {
            rank: shard.rank,
            planned_bytes: shard.planned_bytes,
            resident_bytes: shard.resident_bytes,
        }
    }
}
