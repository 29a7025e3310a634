//! Keys and values of all layers, in blocks.
//!
//! `[layer][block][kv head]`, and for each of these the keys of the block, `[head_dim][32 tokens]`, then its values,
//! `[32 tokens][head_dim]`: both as attention reads them.

use half::bf16;

use super::memory::Region;
use crate::device::{AttentionHeads, DType, DeviceError, KV_BLOCK_TOKENS, Result};
use crate::progress::Counter;

/// Keys and values of all layers.
pub struct KvCache {
    pub(super) region: Region,
    pub(super) dtype: DType,
    num_layers: usize,
    num_blocks: usize,
    num_kv: usize,
    head_dim: usize,
}

impl KvCache {
    /// Reserves and touches it, counting the work on `pieces`.
    pub fn new(
        dtype: DType,
        num_layers: usize,
        heads: &AttentionHeads,
        num_blocks: usize,
        pieces: &Counter,
    ) -> Result<Self> {
        let (num_kv, head_dim) = (heads.num_kv, heads.head_dim);
        let bytes = [num_layers, num_blocks, num_kv, 2 * head_dim, KV_BLOCK_TOKENS, dtype.size_bytes()]
            .into_iter()
            .try_fold(1_usize, usize::checked_mul)
            .ok_or_else(|| DeviceError::Failed(format!("a cache of {num_blocks} blocks is too large")))?;
        let region = Region::new(bytes, "the cache of keys and values", pieces)?;
        Ok(Self { region, dtype, num_layers, num_blocks, num_kv, head_dim })
    }

    /// Elements of the keys and values of one head in one block.
    pub(super) fn head_len(&self) -> usize {
        2 * self.head_dim * KV_BLOCK_TOKENS
    }

    /// Element at which the keys of a head in a block begin; its values follow them.
    pub(super) fn head_start(&self, layer: usize, block: usize, kv_head: usize) -> usize {
        assert!(layer < self.num_layers, "layer {layer} of a cache of {}", self.num_layers);
        assert!(block < self.num_blocks, "block {block} of a cache of {}", self.num_blocks);
        assert!(kv_head < self.num_kv, "kv head {kv_head} of a cache of {}", self.num_kv);
        ((layer * self.num_blocks + block) * self.num_kv + kv_head) * self.head_len()
    }

    /// Asserts that the cache was made for these heads.
    pub(super) fn check_heads(&self, heads: &AttentionHeads) {
        assert_eq!((self.num_kv, self.head_dim), (heads.num_kv, heads.head_dim), "another cache's heads");
    }

    /// Writes the keys and values of one token and head.
    pub(super) fn write(&mut self, layer: usize, slot: u32, kv_head: usize, keys: &[f32], values: &[f32]) {
        let (block, offset) = (slot as usize / KV_BLOCK_TOKENS, slot as usize % KV_BLOCK_TOKENS);
        let start = self.head_start(layer, block, kv_head);
        let range = start..start + self.head_len();
        let head_dim = self.head_dim;
        match self.dtype {
            DType::F32 => {
                let head = &mut self.region.as_mut_slice::<f32>()[range];
                write_head(head, head_dim, offset, keys, values, |x| x);
            }
            DType::Bf16 => {
                let head = &mut self.region.as_mut_slice::<u16>()[range];
                write_head(head, head_dim, offset, keys, values, |x| bf16::from_f32(x).to_bits());
            }
        }
    }

    /// Copies blocks, `(source, target)`, one after the other.
    pub fn copy_blocks(&mut self, copies: &[(u32, u32)]) {
        let bytes = self.num_kv * self.head_len() * self.dtype.size_bytes();
        let num_blocks = self.num_blocks;
        for layer in 0..self.num_layers {
            for &(source, target) in copies {
                let (source, target) = (source as usize, target as usize);
                assert!(source < num_blocks && target < num_blocks, "copy of block {source} to {target}");
                let (from, to) = (layer * num_blocks + source, layer * num_blocks + target);
                let elements = bytes / size_of::<u16>();
                self.region
                    .as_mut_slice::<u16>()
                    .copy_within(from * elements..(from + 1) * elements, to * elements);
            }
        }
    }
}

fn write_head<T>(
    head: &mut [T],
    head_dim: usize,
    offset: usize,
    keys: &[f32],
    values: &[f32],
    convert: impl Fn(f32) -> T,
) {
    let (head_keys, head_values) = head.split_at_mut(head_dim * KV_BLOCK_TOKENS);
    for (to, &key) in head_keys[offset..].iter_mut().step_by(KV_BLOCK_TOKENS).zip(keys) {
        *to = convert(key);
    }
    for (to, &value) in head_values[offset * head_dim..(offset + 1) * head_dim].iter_mut().zip(values) {
        *to = convert(value);
    }
}
