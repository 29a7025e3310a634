//! Attention over the paged cache: the cache, the rows of a step on the GPU, and the launches.
#![allow(unsafe_code)]

use half::bf16;

use super::arena::Tensor;
use super::attention::{Part, RUN_TOKENS, SPLIT_TOKENS, Sharing, StepWords, WIDE};
use super::device::{CudaDevice, THREADS};
use super::driver::{Address, DeviceBuffer};
use super::kernels::{Argument, AttentionKernels, count, launch};
use crate::device::{Activations, AttentionHeads, DType, KV_BLOCK_TOKENS, Result};

/// Warps of a block of attention that does not split.
pub const ATTENTION_WARPS: usize = 4;

/// Columns of which a block makes a result of what pieces of a context gave.
const COMBINE_COLUMNS: usize = 32;

/// Keys and values of all layers: `kernels/rotary.cu` says how they lie.
pub struct KvCache {
    pub(super) blocks: DeviceBuffer,
    pub(super) num_layers: usize,
    pub(super) num_blocks: usize,
    pub(super) num_kv: usize,
    pub(super) head_dim: usize,
    /// Which query heads share keys and values.
    pub(super) query_offsets: DeviceBuffer,
    /// What pieces of contexts give.
    pub(super) partial: DeviceBuffer,
    pub(super) stats: DeviceBuffer,
}

impl KvCache {
    /// Bytes of a block in one layer.
    pub fn block_bytes(&self) -> usize {
        self.num_kv * 2 * KV_BLOCK_TOKENS * self.head_dim * size_of::<bf16>()
    }

    /// Where a layer begins.
    ///
    /// # Panics
    /// There is no such layer.
    pub fn layer(&self, layer: usize) -> Address {
        assert!(layer < self.num_layers, "layer {layer} of {}", self.num_layers);
        self.blocks.address() + (layer * self.num_blocks * self.block_bytes()) as Address
    }
}

/// The rows of a step, on the GPU.
pub struct Rows {
    pub(super) num_rows: usize,
    pub(super) words: StepWords,
    pub(super) start: Address,
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

impl Rows {
    /// Where a part of its words is.
    pub fn at(&self, part: Part) -> Address {
        self.start + (part.start * size_of::<u32>()) as Address
    }
}

/// A call of attention over the cache.
struct Paged<'a> {
    kernels: &'a AttentionKernels,
    qkv: Address,
    layer: Address,
    out: Address,
    rows: &'a Rows,
    cache: &'a KvCache,
    num_query: usize,
    scale: f32,
}

/// What turns products into powers of two.
pub fn scale(head_dim: usize) -> f32 {
    (std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32
}

impl CudaDevice {
    /// See [`Device::kv_cache`](crate::device::Device::kv_cache).
    pub(super) fn reserve_cache(
        &self,
        dtype: DType,
        num_layers: usize,
        heads: &AttentionHeads,
        num_blocks: usize,
    ) -> Result<KvCache> {
        assert_eq!(dtype, DType::Bf16, "type of the cache");
        let AttentionHeads { num_kv, head_dim, .. } = *heads;
        if heads.num_query() > 0 {
            self.kernels.attention(head_dim)?;
        }
        let [partial, stats] = self.sizes.piece_bytes(heads.num_query());
        let mut cache = KvCache {
            blocks: DeviceBuffer::new(&self.gpu, 0, "keys and values")?,
            num_layers,
            num_blocks,
            num_kv,
            head_dim,
            query_offsets: self.filled(&query_offsets(heads), "heads")?,
            partial: DeviceBuffer::new(&self.gpu, partial, "attention")?,
            stats: DeviceBuffer::new(&self.gpu, stats, "attention")?,
        };
        let bytes = num_layers * num_blocks * cache.block_bytes();
        cache.blocks = DeviceBuffer::new(&self.gpu, bytes, "keys and values")?;
        // What is not seen has weight 0, which a number must be multiplied by.
        self.gpu.fill(cache.blocks.address(), 0, bytes)?;
        Ok(cache)
    }

    /// See [`Device::copy_blocks`](crate::device::Device::copy_blocks).
    pub(super) fn copy_cache(&self, cache: &mut KvCache, copies: &[(u32, u32)]) -> Result<()> {
        let vectors = cache.block_bytes() / 16;
        if vectors == 0 {
            return Ok(());
        }
        let pairs: Vec<[u32; 2]> = copies.iter().map(|&(source, target)| [source, target]).collect();
        for pairs in pairs.chunks(self.sizes.max_pairs()) {
            let at = self.staging.put(pairs)?;
            launch!(
                self,
                &self.kernels.copy_blocks,
                [vectors.div_ceil(THREADS), cache.num_layers, 1],
                THREADS,
                cache.blocks.address(),
                count(cache.num_blocks),
                count(vectors),
                at,
                count(pairs.len()),
            )?;
        }
        Ok(())
    }

    /// See [`Device::paged_attention`](crate::device::Device::paged_attention).
    pub(super) fn attend(
        &self,
        qkv: &Tensor,
        heads: &AttentionHeads,
        rows: &Rows,
        cache: &KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        let (num_query, head_dim) = (heads.num_query(), heads.head_dim);
        assert_eq!(qkv.cols(), (num_query + 2 * heads.num_kv) * head_dim, "columns of qkv");
        assert_eq!(qkv.rows(), rows.num_rows, "rows of qkv");
        let out = self.tensor(qkv.rows(), num_query * head_dim)?;
        if out.bytes() == 0 {
            return Ok(out);
        }
        let call = Paged {
            kernels: self.kernels.attention(head_dim)?,
            qkv: qkv.address(),
            layer: cache.layer(layer),
            out: out.address(),
            rows,
            cache,
            num_query,
            scale: scale(head_dim),
        };
        self.split_attention(&call)?;
        self.wide_attention(&call)?;
        self.whole_attention(&call)?;
        Ok(out)
    }

    fn split_attention(&self, call: &Paged<'_>) -> Result<()> {
        let Paged { rows, cache, num_query, scale, .. } = *call;
        let split = rows.words.split;
        if split.rows.count == 0 {
            return Ok(());
        }
        launch!(
            self,
            &call.kernels.split,
            [split.pieces.count, cache.num_kv, 1],
            32,
            call.qkv,
            call.layer,
            rows.at(rows.words.block_tables),
            rows.at(split.sequences),
            rows.at(split.pieces),
            rows.at(split.rows),
            cache.query_offsets.address(),
            count(num_query),
            count(cache.num_kv),
            count(SPLIT_TOKENS),
            scale,
            cache.partial.address(),
            cache.stats.address(),
        )?;
        launch!(
            self,
            &call.kernels.combine,
            [split.rows.count, num_query, cache.head_dim.div_ceil(COMBINE_COLUMNS)],
            split.combine_warps * 32,
            cache.partial.address(),
            cache.stats.address(),
            rows.at(split.rows),
            count(SPLIT_TOKENS),
            count(RUN_TOKENS),
            call.out,
        )
    }

    /// How attention of these heads is shared out.
    pub(super) fn sharing(&self, heads: &AttentionHeads) -> Sharing {
        Sharing {
            num_kv: heads.num_kv,
            most_sharing: most_sharing(heads),
            max_pieces: self.sizes.max_pieces(),
            is_wide: self.is_wide(heads.head_dim),
        }
    }

    /// Whether warpgroups may attend with heads of this width: the GPU has them, and a token may have other bits in a prompt
    /// than it had when it was decoded.
    pub(super) fn is_wide(&self, head_dim: usize) -> bool {
        let kernels = self.kernels.attention(head_dim);
        !self.is_repeatable && kernels.is_ok_and(|kernels| kernels.wide.is_some())
    }

    fn wide_attention(&self, call: &Paged<'_>) -> Result<()> {
        let Paged { rows, cache, .. } = *call;
        let wide = rows.words.wide;
        let Some(kernels) = &call.kernels.wide else { return Ok(()) };
        if wide.tiles.count == 0 {
            return Ok(());
        }
        launch!(
            self,
            &kernels.paged,
            [wide.tiles.count, cache.num_kv, 1],
            WIDE.threads();
            WIDE.shared_bytes(cache.head_dim),
            call.qkv,
            call.layer,
            rows.at(rows.words.block_tables),
            rows.at(wide.sequences),
            rows.at(wide.tiles),
            cache.query_offsets.address(),
            count(call.num_query),
            count(cache.num_kv),
            call.scale,
            call.out,
        )
    }

    fn whole_attention(&self, call: &Paged<'_>) -> Result<()> {
        let Paged { rows, cache, .. } = *call;
        let whole = rows.words.whole;
        if whole.tiles.count == 0 {
            return Ok(());
        }
        launch!(
            self,
            &call.kernels.whole,
            [whole.tiles.count.div_ceil(ATTENTION_WARPS), cache.num_kv, 1],
            ATTENTION_WARPS * 32,
            call.qkv,
            call.layer,
            rows.at(rows.words.block_tables),
            rows.at(whole.sequences),
            rows.at(whole.tiles),
            count(whole.tiles.count),
            cache.query_offsets.address(),
            count(call.num_query),
            count(cache.num_kv),
            count(SPLIT_TOKENS),
            count(RUN_TOKENS),
            call.scale,
            call.out,
        )
    }
}

/// The most query heads that share keys and values.
fn most_sharing(heads: &AttentionHeads) -> usize {
    let offsets = query_offsets(heads);
    offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
}

/// The first query head of each head of keys and values, and the end of the last.
pub fn query_offsets(heads: &AttentionHeads) -> Vec<u32> {
    let first = |kv: usize| heads.kv_of_query.partition_point(|&of_query| of_query < kv) as u32;
    (0..=heads.num_kv).map(first).collect()
}
