//! What GetModel tells.

use lockstep_proto::v1;

/// The model that is served, and its limits.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Name of the checkpoint.
    pub name: String,
    /// The checkpoint's architecture.
    pub architecture: String,
    /// The most tokens that a prompt and its answer have together.
    pub max_context_tokens: u32,
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// "cpu" or "cuda".
    pub device: &'static str,
    /// "bf16" or "f32".
    pub dtype: &'static str,
    /// Pixels on a side of a token of a picture.
    pub pixels_per_token_side: u32,
    /// Pixels of a picture, at least, when the request says nothing.
    pub min_pixels: u64,
    /// Likewise, at most.
    pub max_pixels: u64,
    /// Tokens that end an answer.
    pub end_token_ids: Vec<u32>,
    /// Tokens that the cache of keys and values holds.
    pub kv_capacity_tokens: u64,
    /// Bytes that each rank planned, in rank order.
    pub planned_bytes: Vec<u64>,
}

impl ModelInfo {
    /// The answer to GetModel. `resident_bytes` is what each rank holds now, in rank order.
    pub fn describe(&self, resident_bytes: &[u64]) -> v1::GetModelResponse {
        let shards = self.planned_bytes.iter().zip(resident_bytes).enumerate();
        let shards = shards.map(|(rank, (&planned_bytes, &resident_bytes))| v1::ShardMemory {
            rank: rank as u32,
            planned_bytes,
            resident_bytes,
        });
        v1::GetModelResponse {
            name: self.name.clone(),
            architecture: self.architecture.clone(),
            max_context_tokens: self.max_context_tokens,
            vocab_size: self.vocab_size,
            world_size: self.planned_bytes.len() as u32,
            device: self.device.to_owned(),
            dtype: self.dtype.to_owned(),
            pixels_per_token_side: self.pixels_per_token_side,
            min_pixels: self.min_pixels,
            max_pixels: self.max_pixels,
            end_token_ids: self.end_token_ids.clone(),
            kv_capacity_tokens: self.kv_capacity_tokens,
            shards: shards.collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}
