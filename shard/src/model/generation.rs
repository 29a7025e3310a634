//! The whole model: vision tower, language model and head.

use std::sync::Arc;

use crate::config::Config;
use crate::device::plan::PlanDevice;
use crate::device::{AttentionHeads, DType, Device, DeviceError, Result, RowSampling};
use crate::layers::{Drawn, Parallel, VocabParallelHead, VocabSlice};
use crate::model::text::{Batch, TextModel};
use crate::model::vision::{Normalization, VisionTransformer};
use crate::weights::{Checkpoint, CheckpointError, CheckpointFault, Loader};

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
        progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<Self, LoadError> {
        if D::WANTS_DATA {
            // Faults are told before anything is read.
            Model::load(&PlanDevice::new(), checkpoint, config, normalization, parallel, dtype, &mut |_| ())?;
        }
        let mut loader = Loader::new(device, checkpoint, dtype, progress);
        let model = Self::load_slices(&mut loader, config, normalization, parallel)?;
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
        })
    }

    /// The heads of this rank, for [`Device::kv_cache`].
    pub fn heads(&self) -> &AttentionHeads {
        self.model.heads()
    }

    /// Writes the vision features of a medium to `slots`: one per token, row by row over the merged grid. The
    /// same on all ranks.
    ///
    /// `pixels` are frames in RGB, already at the model's size; `grid` counts patches in time, height and
    /// width.
    pub fn encode(
        &self,
        device: &D,
        pixels: &[u8],
        grid: [usize; 3],
        features: &mut D::Features,
        slots: &[u32],
    ) -> Result<()> {
        self.visual.forward(device, pixels, grid, features, slots)
    }

    /// Computes a step: the final hidden state, normed, of `batch.sample_rows`, `[sample rows, hidden]`. The
    /// same bits on all ranks.
    pub fn forward(
        &self,
        device: &D,
        batch: &Batch,
        cache: &mut D::KvCache,
        features: &D::Features,
    ) -> Result<D::Tensor> {
        self.model.forward(device, batch, cache, features)
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
