//! The vision tower: `visual.*` of the checkpoint.

use crate::config::VisionConfig;
use crate::device::{Device, PatchLayout, Result};
use crate::layers::{
    ColumnParallel, GatedMlp, HeadRange, LinearSpec, Parallel, PatchEmbed, QkvParallel, RowParallel,
    partition,
};
use crate::model::rope::AxialRope;
use crate::model::windows::WindowOrder;
use crate::weights::Loader;

/// The tower's norms have this epsilon, whatever the configuration says.
const NORM_EPS: f32 = 1e-6;

/// How pixels are normalized: `(pixel / 255 - mean) / std`, per colour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Mean of red, green and blue.
    pub mean: [f32; 3],
    /// Their standard deviation.
    pub std: [f32; 3],
}

/// The vision tower.
pub struct VisionTransformer<D: Device> {
    patch_embed: PatchEmbed<D>,
    blocks: Vec<VisionBlock<D>>,
    merger: PatchMerger<D>,
    rotary_emb: AxialRope,
    normalization: Normalization,
    num_heads: usize,
    config: VisionConfig,
}

impl<D: Device> VisionTransformer<D> {
    /// Loads `visual.*`.
    pub fn load(
        loader: &mut Loader<'_, D>,
        config: &VisionConfig,
        normalization: Normalization,
        parallel: Parallel,
    ) -> Result<Self> {
        let side = config.patch_size;
        let kernel = [config.in_channels, config.temporal_patch_size, side, side];
        let heads =
            partition::heads(config.num_heads, config.num_heads, parallel.world_size)[parallel.rank].clone();
        Ok(Self {
            patch_embed: PatchEmbed::load(
                loader,
                "visual.patch_embed.proj",
                config.hidden_size,
                kernel,
                parallel,
            )?,
            blocks: (0..config.depth)
                .map(|i| VisionBlock::load(loader, &format!("visual.blocks.{i}"), config, &heads, parallel))
                .collect::<Result<_>>()?,
            merger: PatchMerger::load(loader, "visual.merger", config, parallel)?,
            rotary_emb: AxialRope::new(config.rope_theta, config.head_dim()),
            normalization,
            num_heads: heads.query.len(),
            config: config.clone(),
        })
    }

    /// Writes the features of a medium to `slots`, one per token, row by row over the merged grid.
    ///
    /// `pixels` are frames in RGB, already at the model's size; `grid` counts patches in time, height and
    /// width.
    pub fn forward(
        &self,
        device: &D,
        pixels: &[u8],
        grid: [usize; 3],
        features: &mut D::Features,
        slots: &[u32],
    ) -> Result<()> {
        let order = WindowOrder::new(&self.config, grid);
        assert_eq!(order.tokens.len(), slots.len(), "one slot for each token of {grid:?}");
        let layout = PatchLayout {
            grid,
            patch_size: self.config.patch_size,
            temporal_patch_size: self.config.temporal_patch_size,
            mean: self.normalization.mean,
            std: self.normalization.std,
        };
        let x = self.patch_embed.forward(device, pixels, &layout, &order.patches)?; // [patches, hidden]
        let x = self.blocks_forward(device, x, &order)?; // [patches, hidden], normed
        let x = self.merger.forward(device, x)?; // [tokens, out_hidden]
        let slots: Vec<u32> = order.tokens.iter().map(|&token| slots[token as usize]).collect();
        device.write_features(features, &x, &slots)
    }

    /// All blocks, from partial sums of the patch embedding to what the merger's norm gives.
    fn blocks_forward(&self, device: &D, x: D::Tensor, order: &WindowOrder) -> Result<D::Tensor> {
        let head_dim = self.config.head_dim();
        // cos, sin: [patches, head_dim / 2]
        let (cos, sin) = self.rotary_emb.tables(device, &order.positions)?;
        let first_norm = self.blocks.first().map_or(&self.merger.ln_q, |block| &block.norm1);
        let (mut h, mut residual) = device.reduce_residual_norm(x, None, first_norm)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let next_norm = self.blocks.get(i + 1).map_or(&self.merger.ln_q, |next| &next.norm1);
            let full = self.config.fullatt_block_indexes.contains(&i);
            let cu_seqlens = if full { &order.cu_seqlens } else { &order.cu_window_seqlens };
            let mut qkv = block.attn.qkv.forward(device, &h)?; // [patches, 3 * num_heads * head_dim]
            drop(h);
            device.vision_rotary(&mut qkv, self.num_heads, &cos, &sin)?;
            let attended = device.vision_attention(&qkv, self.num_heads, head_dim, cu_seqlens)?;
            drop(qkv);
            let x = block.attn.proj.forward(device, &attended)?;
            drop(attended);
            (h, residual) = device.reduce_residual_norm(x, Some(residual), &block.norm2)?;
            let x = block.mlp.forward(device, &h)?;
            drop(h);
            (h, residual) = device.reduce_residual_norm(x, Some(residual), next_norm)?;
        }
        drop(residual);
        Ok(h)
    }
}

struct VisionBlock<D: Device> {
    norm1: D::Norm,
    attn: VisionAttention<D>,
    norm2: D::Norm,
    mlp: GatedMlp<D>,
}

impl<D: Device> VisionBlock<D> {
    fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        config: &VisionConfig,
        heads: &HeadRange,
        parallel: Parallel,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let sizes = [hidden, config.intermediate_size];
        Ok(Self {
            norm1: loader.norm(&format!("{prefix}.norm1"), hidden, NORM_EPS)?,
            attn: VisionAttention::load(loader, &format!("{prefix}.attn"), config, heads, parallel)?,
            norm2: loader.norm(&format!("{prefix}.norm2"), hidden, NORM_EPS)?,
            mlp: GatedMlp::load(loader, &format!("{prefix}.mlp"), sizes, true, parallel)?,
        })
    }
}

struct VisionAttention<D: Device> {
    qkv: QkvParallel<D>,
    proj: RowParallel<D>,
}

impl<D: Device> VisionAttention<D> {
    fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        config: &VisionConfig,
        heads: &HeadRange,
        parallel: Parallel,
    ) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        let qkv = QkvParallel::load_fused(loader, &format!("{prefix}.qkv"), hidden, heads, head_dim)?;
        let proj = format!("{prefix}.proj");
        let proj = LinearSpec { prefix: &proj, outputs: hidden, inputs: hidden, bias: true };
        let proj = RowParallel::load_heads(loader, proj, heads, head_dim, parallel)?;
        Ok(Self { qkv, proj })
    }
}

/// Joins neighbouring patches to tokens, in the width of the language model. Its norm, `ln_q`, is applied by
/// the last block's reduction.
struct PatchMerger<D: Device> {
    ln_q: D::Norm,
    fc1: ColumnParallel<D>,
    fc2: RowParallel<D>,
    merge_unit: usize,
}

impl<D: Device> PatchMerger<D> {
    fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        config: &VisionConfig,
        parallel: Parallel,
    ) -> Result<Self> {
        let merge_unit = config.merge_unit();
        let joined = config.hidden_size * merge_unit;
        let columns = partition::columns(joined, parallel);
        let (fc1, fc2) = (format!("{prefix}.mlp.0"), format!("{prefix}.mlp.2"));
        let fc1 = LinearSpec { prefix: &fc1, outputs: joined, inputs: joined, bias: true };
        let fc2 = LinearSpec { prefix: &fc2, outputs: config.out_hidden_size, inputs: joined, bias: true };
        Ok(Self {
            ln_q: loader.norm(&format!("{prefix}.ln_q"), config.hidden_size, NORM_EPS)?,
            fc1: ColumnParallel::load(loader, fc1, columns.clone())?,
            fc2: RowParallel::load(loader, fc2, &columns, parallel)?,
            merge_unit,
        })
    }

    /// `[patches, hidden] -> [tokens, out_hidden]`.
    fn forward(&self, device: &D, x: D::Tensor) -> Result<D::Tensor> {
        let x = device.join_rows(x, self.merge_unit)?; // [tokens, hidden * merge_unit]
        let mut inner = self.fc1.forward(device, &x)?;
        drop(x);
        device.gelu(&mut inner)?;
        device.reduce(self.fc2.forward(device, &inner)?)
    }
}
