//! The vision tower: `visual.*` of the checkpoint.

use std::ops::Range;

use crate::config::VisionConfig;
use crate::device::{Activations, Device, PatchLayout, Result};
use crate::layers::{
    ColumnParallel, GatedMlp, HeadRange, LinearSpec, MLP_CHUNK_ROWS, Parallel, PatchEmbed, QkvParallel,
    RowParallel, partition,
};
use crate::model::rope::AxialRope;
use crate::model::stages::{Stage, stages};
use crate::model::windows::{WindowOrder, window_side};
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
    stages: Vec<Stage>,
    normalization: Normalization,
    num_heads: usize,
    config: VisionConfig,
}

/// What is kept of a temporal patch between the pieces of work on it. There is one, for the largest of all temporal patches;
/// nothing in it outlives the work on one.
pub struct VisionFrame<D: Device> {
    /// `[patches, hidden]`, in the tower's order: what the stages so far made of each row.
    residual: D::Tensor,
    /// `[patches, 3 * num_heads * head_dim]`, rotated: of the block whose attention spans the temporal patch.
    qkv: D::Tensor,
}

/// Some of the work on one temporal patch.
pub struct FramePiece<'a> {
    /// Its frames in RGB, already at the model's size. Not looked at by pieces beyond the first stage.
    pub pixels: &'a [u8],
    /// Patches in height and width.
    pub grid: [usize; 2],
    /// The order that belongs to the grid.
    pub order: &'a WindowOrder,
    /// What to do, in units of one token in one stage; see [`crate::model::stages`]. In each stage, windows are done by the
    /// piece that has their first token.
    pub work: Range<usize>,
    /// The slot of each token's feature, row by row over the merged grid.
    pub slots: &'a [u32],
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
            stages: stages(config),
            normalization,
            num_heads: heads.query.len(),
            config: config.clone(),
        })
    }

    /// Memory for temporal patches of up to `max_patches` patches.
    pub fn frame(&self, device: &D, max_patches: usize) -> Result<VisionFrame<D>> {
        let qkv = 3 * self.num_heads * self.config.head_dim();
        Ok(VisionFrame {
            residual: device.empty(max_patches, self.config.hidden_size)?,
            qkv: device.empty(max_patches, qkv)?,
        })
    }

    /// The order of `h` times `w` patches.
    pub fn window_order(&self, grid: [usize; 2]) -> WindowOrder {
        WindowOrder::new(&self.config, grid)
    }

    /// The most tokens that are worked on at once, which bounds the activations beside [`VisionFrame`].
    pub fn run_tokens(&self) -> usize {
        (MLP_CHUNK_ROWS / self.config.merge_unit()).max(window_side(&self.config).pow(2))
    }

    /// Does a piece of the work on a temporal patch. The last stage writes features. A row's bits do not depend on how the
    /// work is cut. Returns a hash of what became of the rows that were worked on.
    pub fn forward(
        &self,
        device: &D,
        frame: &mut VisionFrame<D>,
        piece: &FramePiece<'_>,
        features: &mut D::Features,
    ) -> Result<u64> {
        let num_tokens = piece.order.tokens.len();
        assert_eq!(num_tokens, piece.slots.len(), "one slot for each token of {:?}", piece.grid);
        let (mut hash, mut touched) = (0_u64, None::<Range<usize>>);
        for (i, &stage) in self.stages.iter().enumerate() {
            let first = i * num_tokens;
            let within = |unit: usize| unit.clamp(first, first + num_tokens) - first;
            let tokens = within(piece.work.start)..within(piece.work.end);
            for run in piece.order.runs(tokens, self.run_tokens()) {
                let before = touched.unwrap_or(run.clone());
                touched = Some(before.start.min(run.start)..before.end.max(run.end));
                hash = hash.rotate_left(1) ^ self.stage(device, frame, piece, stage, run, features)?;
            }
        }
        // Errors of the residual stream stay in it: what a piece made is looked at once, at its end.
        let touched = touched.unwrap_or(0..0);
        let unit = self.config.merge_unit();
        let residual = device.hash(&frame.residual, touched.start * unit..touched.end * unit)?;
        Ok(hash ^ device.read_hash(residual)?)
    }

    /// One stage for the windows of the tokens `run`. Returns a hash of the features that it wrote, 0 if none.
    fn stage(
        &self,
        device: &D,
        frame: &mut VisionFrame<D>,
        piece: &FramePiece<'_>,
        stage: Stage,
        run: Range<usize>,
        features: &mut D::Features,
    ) -> Result<u64> {
        let (num_heads, head_dim) = (self.num_heads, self.config.head_dim());
        let rows = run.start * self.config.merge_unit()..run.end * self.config.merge_unit();
        let (block, attended) = match stage {
            Stage::Windowed { block } => {
                let qkv = self.project(device, frame, piece, block, rows.clone())?;
                let cu_seqlens = piece.order.cu_seqlens(&run);
                (block, device.vision_attention(&qkv, num_heads, head_dim, &cu_seqlens, 0..rows.len())?)
            }
            Stage::Project { block } => {
                let qkv = self.project(device, frame, piece, block, rows.clone())?;
                device.copy_rows(&qkv, &mut frame.qkv, rows.start)?;
                return Ok(0);
            }
            Stage::Attend { block } => {
                let all = [0, piece.order.patches.len() as u32];
                (block, device.vision_attention(&frame.qkv, num_heads, head_dim, &all, rows.clone())?)
            }
        };
        let h = self.finish(device, frame, block, attended, rows)?; // [rows, hidden], normed
        if block + 1 < self.blocks.len() {
            return Ok(0);
        }
        let x = self.merger.forward(device, h)?; // [tokens, out_hidden]
        let tokens = &piece.order.tokens[run];
        let slots: Vec<u32> = tokens.iter().map(|&token| piece.slots[token as usize]).collect();
        device.write_features(features, &x, &slots)?;
        device.read_hash(device.hash(&x, 0..x.rows())?)
    }

    /// Queries, keys and values of some rows of a block, rotated: `[rows, 3 * num_heads * head_dim]`.
    fn project(
        &self,
        device: &D,
        frame: &mut VisionFrame<D>,
        piece: &FramePiece<'_>,
        block: usize,
        rows: Range<usize>,
    ) -> Result<D::Tensor> {
        let norm1 = &self.blocks[block].norm1;
        let h = if block == 0 {
            let x = self.embed(device, piece, rows.clone())?;
            let (h, residual) = device.reduce_residual_norm(x, None, norm1)?;
            device.copy_rows(&residual, &mut frame.residual, rows.start)?;
            h
        } else {
            // The block before has normed the same rows. Doing it again costs less than keeping the result would take.
            device.norm(&frame.residual, rows.clone(), norm1)?
        };
        let mut qkv = self.blocks[block].attn.qkv.forward(device, &h)?;
        drop(h);
        // cos, sin: [rows, head_dim / 2]
        let (cos, sin) = self.rotary_emb.tables(device, &piece.order.positions[rows])?;
        device.vision_rotary(&mut qkv, self.num_heads, &cos, &sin)?;
        Ok(qkv)
    }

    /// Some rows of the patch embedding, one addend of as many as there are ranks.
    fn embed(&self, device: &D, piece: &FramePiece<'_>, rows: Range<usize>) -> Result<D::Tensor> {
        let [h, w] = piece.grid;
        let layout = PatchLayout {
            grid: [1, h, w],
            patch_size: self.config.patch_size,
            temporal_patch_size: self.config.temporal_patch_size,
            mean: self.normalization.mean,
            std: self.normalization.std,
        };
        self.patch_embed.forward(device, piece.pixels, &layout, &piece.order.patches[rows])
    }

    /// What follows the attention of a block, for `rows` of the residual stream: what the next norm gives of them.
    fn finish(
        &self,
        device: &D,
        frame: &mut VisionFrame<D>,
        block: usize,
        attended: D::Tensor,
        rows: Range<usize>,
    ) -> Result<D::Tensor> {
        let next_norm = self.blocks.get(block + 1).map_or(&self.merger.ln_q, |next| &next.norm1);
        let block = &self.blocks[block];
        let x = block.attn.proj.forward(device, &attended)?;
        drop(attended);
        let first_row = rows.start;
        let rows: Vec<u32> = rows.map(|row| row as u32).collect();
        let residual = device.gather_rows(&frame.residual, &rows)?;
        let (h, residual) = device.reduce_residual_norm(x, Some(residual), &block.norm2)?;
        let x = block.mlp.forward(device, &h)?;
        drop(h);
        let (h, residual) = device.reduce_residual_norm(x, Some(residual), next_norm)?;
        device.copy_rows(&residual, &mut frame.residual, first_row)?;
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
