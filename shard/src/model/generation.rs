//! The whole model: vision tower, language model and head.

use std::sync::Arc;

use crate::config::Config;
use crate::device::plan::PlanDevice;
use crate::device::{AttentionHeads, DType, Device, DeviceError, DeviceKind, Result, RowSampling};
use crate::layers::{Drawing, Drawn, Parallel, VocabParallelHead, VocabSlice};
use crate::model::text::{Batch, TextModel};
use crate::model::vision::{FramePiece, Normalization, VisionFrame, VisionTransformer};
use crate::model::windows::WindowOrder;
use crate::weights::{Checkpoint, CheckpointError, CheckpointFault, Loader, Progress};

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint does not fit its configuration: all that is wrong with it.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// One rank's slices of the model.
pub struct Model<D: Device> {
    visual: VisionTransformer<D>,
    model: TextModel<D>,
    lm_head: VocabParallelHead<D>,
    weights_checksum: u64,
}

impl<D: Device> Model<D> {
    /// Checks every tensor, then loads this rank's slices, with weights as `dtype`. `progress` hears the
    /// bytes read so far; the last it hears from a load on [`PlanDevice`], which reads nothing, is their sum.
    pub fn load(
        device: &D,
        checkpoint: &Checkpoint,
        config: &Config,
        normalization: Normalization,
        parallel: Parallel,
        dtype: DType,
        progress: &mut Progress<'_>,
    ) -> std::result::Result<Self, LoadError> {
        if D::WANTS_DATA {
            // Faults are told before anything is read.
            Model::load(
                &PlanDevice::new(DeviceKind::Cpu),
                checkpoint,
                config,
                normalization,
                parallel,
                dtype,
                &mut |_| Ok(()),
            )?;
        }
        let mut loader = Loader::new(device, checkpoint, dtype, progress);
        let mut model = Self::load_slices(&mut loader, config, normalization, parallel)?;
        model.weights_checksum = loader.checksum();
        let faults: Vec<CheckpointFault> = loader.into_faults();
        if faults.is_empty() { Ok(model) } else { Err(checkpoint.error(faults).into()) }
    }

    fn load_slices(
        loader: &mut Loader<'_, D>,
        config: &Config,
        normalization: Normalization,
        parallel: Parallel,
    ) -> Result<Self> {
        let table = [config.text.vocab_size, config.text.hidden_size];
        let embed_tokens = Arc::new(VocabSlice::load(loader, "model.embed_tokens", table, parallel)?);
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            Arc::new(VocabSlice::load(loader, "lm_head", table, parallel)?)
        };
        Ok(Self {
            visual: VisionTransformer::load(loader, &config.vision, normalization, parallel)?,
            model: TextModel::load(loader, &config.text, embed_tokens, parallel)?,
            lm_head: VocabParallelHead::new(lm_head),
            weights_checksum: 0,
        })
    }

    /// The checksum of this rank's slices, as the checkpoint has them.
    pub fn weights_checksum(&self) -> u64 {
        self.weights_checksum
    }

    /// The heads of this rank, for [`Device::kv_cache`].
    pub fn heads(&self) -> &AttentionHeads {
        self.model.heads()
    }

    /// Memory to encode temporal patches of up to `max_patches` patches in. It comes first in the workspace and stays, so that
    /// what lies between two steps divides the workspace no further.
    pub fn vision_frame(&self, device: &D, max_patches: usize) -> Result<VisionFrame<D>> {
        self.visual.frame(device, max_patches)
    }

    /// The order in which the vision tower sees `h` times `w` patches.
    pub fn window_order(&self, grid: [usize; 2]) -> WindowOrder {
        self.visual.window_order(grid)
    }

    /// The most tokens that vision encoding works on at once.
    pub fn vision_run_tokens(&self) -> usize {
        self.visual.run_tokens()
    }

    /// Does a piece of encoding a temporal patch. When all pieces are done, in order, its features are written, the same on
    /// all ranks. Returns a hash of what the piece made, the same too.
    pub fn encode(
        &self,
        device: &D,
        frame: &mut VisionFrame<D>,
        piece: &FramePiece<'_>,
        features: &mut D::Features,
    ) -> Result<u64> {
        self.visual.forward(device, frame, piece, features)
    }

    /// Computes a step: the final hidden state, normed, of `batch.sample_rows`, `[sample rows, hidden]`, and a hash of that of all
    /// rows. The same bits on all ranks.
    pub fn forward(
        &self,
        device: &D,
        batch: &Batch,
        cache: &mut D::KvCache,
        features: &D::Features,
    ) -> Result<(D::Tensor, D::Hash)> {
        self.model.forward(device, batch, cache, features)
    }

    /// Begins to draw one token for each row of `hidden`, of which there is one at least: see [`Model::finish`].
    pub fn begin(&self, device: &D, hidden: &D::Tensor, rows: &[RowSampling<'_>]) -> Result<Drawing<D>> {
        self.lm_head.begin(device, hidden, rows)
    }

    /// The tokens that were begun to be drawn for `rows`; none where a row's logits are not finite. The same on all ranks.
    pub fn finish(
        &self,
        device: &D,
        drawing: Drawing<D>,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Option<Drawn>>> {
        self.lm_head.finish(device, drawing, rows)
    }

    /// Draws one token for each row of `hidden`; none where the row's logits are not finite. The same on all ranks.
    pub fn sample(
        &self,
        device: &D,
        hidden: &D::Tensor,
        rows: &[RowSampling<'_>],
    ) -> Result<Vec<Option<Drawn>>> {
        self.lm_head.draw(device, hidden, rows)
    }
}
