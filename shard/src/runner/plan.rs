//! What memory a rank will hold, known before anything is allocated.
//!
//! The model runs over shapes, on a device that only counts: the weights that it would pack, the caches that it would
//! reserve, and the most activations that it would hold at once in the largest steps.

use thiserror::Error;

use super::{media::MediaStore, setup::Setup};
use crate::{
    config::Config,
    device::{Activations, Device, DeviceError, RowSampling, SequenceRows, plan::PlanDevice},
    model::{Batch, LoadError, Model},
    weights::Checkpoint,
};

/// Bytes of the process itself: stacks, the runtime, connections, the tables of a step, and what the allocator keeps of
/// loading. `tests/memory.rs` measures 0.5 MiB after loading; steps and connections come on top.
const PROCESS_BYTES: u64 = 2 << 20;

/// Part of the workspace that is added to what the largest steps need: smaller steps leave gaps of other sizes.
const WORKSPACE_SLACK: u64 = 32;

/// Bytes that a rank will hold, all of them touched at start. Nothing grows later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// Pixels of media that wait to be encoded.
    pub media_bytes: u64,
    /// The process itself: stacks, the runtime, connections, what the allocator keeps.
    pub process_bytes: u64,
}

/// Why there is no plan, or no room for it.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The host has too little memory.
    #[error(
        "a rank needs {needed_bytes} bytes ({plan}), the host has {available_bytes} bytes available per rank"
    )]
    DoesNotFit {
        /// Bytes of the plan.
        needed_bytes: u64,
        /// The plan.
        plan: MemoryPlan,
        /// Bytes of the host that are free or can be, divided by its ranks.
        available_bytes: u64,
    },
    /// The checkpoint does not fit its configuration.
    #[error(transparent)]
    Checkpoint(LoadError),
    /// The shapes of the model could not be run.
    #[error("cannot plan memory: {0}")]
    Shapes(#[from] DeviceError),
}

impl MemoryPlan {
    /// Plans a rank. Returns the bytes of the checkpoint that it will read, too.
    ///
    /// # Errors
    /// The checkpoint does not fit its configuration (all faults), or sizes beyond any memory.
    pub fn new(setup: &Setup, config: &Config, checkpoint: &Checkpoint) -> Result<(Self, u64), PlanError> {
        let device = PlanDevice::new();
        let mut read_bytes = 0;
        let Setup { normalization, parallel, dtype, .. } = *setup;
        let model =
            Model::load(&device, checkpoint, config, normalization, parallel, dtype, &mut |b| read_bytes = b)
                .map_err(PlanError::Checkpoint)?;
        let weights_bytes = device.weights_bytes();
        run_largest_steps(&device, &model, setup, config)?;
        let workspace = device.workspace_bytes();
        let plan = Self {
            weights_bytes,
            kv_bytes: device.kv_bytes(),
            features_bytes: device.features_bytes(),
            workspace_bytes: workspace + workspace / WORKSPACE_SLACK,
            collective_bytes: setup.collective_bytes() as u64,
            media_bytes: (MediaStore::reserved_bytes(setup.media_store_bytes(config))
                + setup.medium_bytes(config)) as u64,
            process_bytes: PROCESS_BYTES + setup.scratch_bytes() as u64,
        };
        Ok((plan, read_bytes))
    }

    /// All bytes.
    pub fn total_bytes(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Checks that the plan fits the part of `host_available_bytes` that each of `world_size` ranks has.
    ///
    /// # Errors
    /// It does not fit.
    pub fn check_fits(&self, host_available_bytes: u64, world_size: usize) -> Result<(), PlanError> {
        let available_bytes = host_available_bytes / world_size as u64;
        let needed_bytes = self.total_bytes();
        if needed_bytes <= available_bytes {
            return Ok(());
        }
        Err(PlanError::DoesNotFit { needed_bytes, plan: self.clone(), available_bytes })
    }

    fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights_bytes),
            ("keys and values", self.kv_bytes),
            ("features", self.features_bytes),
            ("workspace", self.workspace_bytes),
            ("collective", self.collective_bytes),
            ("media", self.media_bytes),
            ("process", self.process_bytes),
        ]
    }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (name, bytes)) in self.parts().into_iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(f, "{separator}{name} {bytes}")?;
        }
        Ok(())
    }
}

/// Makes the caches, and the calls of the largest steps: the largest medium, one long chunk, and as many sequences as may
/// be, each drawing a token.
fn run_largest_steps(
    device: &PlanDevice,
    model: &Model<PlanDevice>,
    setup: &Setup,
    config: &Config,
) -> Result<(), DeviceError> {
    let layers = config.text.num_hidden_layers;
    let mut cache = device.kv_cache(setup.dtype, layers, model.heads(), setup.kv_blocks)?;
    let mut features = device.features(config.text.hidden_size, setup.feature_blocks)?;
    if let Some(grid) = setup.largest_grid(config) {
        let tokens = grid.iter().product::<usize>() / config.vision.merge_unit();
        model.encode(device, &[], grid, &mut features, &vec![0; tokens])?;
    }
    for sequences in [1, setup.max_step_sequences.min(setup.max_step_tokens)] {
        let batch = even_batch(setup.max_step_tokens, sequences);
        let hidden = model.forward(device, &batch, &mut cache, &features)?;
        // As where all chunks but one draw: their rows are gathered beside the rows of all.
        let drawing: Vec<u32> = (0..hidden.rows() as u32).collect();
        let hidden = device.gather_rows(&hidden, &drawing)?;
        let greedy = RowSampling {
            penalized_ids: &[],
            repetition_penalty: 1.0,
            temperature: None,
            noise_key: 0,
            logprobs: None,
        };
        model.sample(device, &hidden, &vec![greedy; drawing.len()])?;
    }
    Ok(())
}

/// `num_rows` rows of tokens, spread over `num_sequences` sequences, the first of which takes what is over.
fn even_batch(num_rows: usize, num_sequences: usize) -> Batch {
    let each = num_rows / num_sequences;
    let first = num_rows - each * (num_sequences - 1);
    let ends = (0..num_sequences).map(|i| first + i * each);
    let starts = std::iter::once(0).chain(ends.clone());
    let sequences: Vec<SequenceRows> = starts
        .zip(ends)
        .map(|(start, end)| SequenceRows {
            rows: start..end,
            num_computed_tokens: 0,
            block_table: Vec::new(),
        })
        .collect();
    Batch {
        token_ids: vec![0; num_rows],
        positions: vec![[0; 3]; num_rows],
        slots: vec![0; num_rows],
        features: vec![(0, 0); 1],
        sample_rows: sequences.iter().map(|sequence| sequence.rows.end as u32 - 1).collect(),
        sequences,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_covers_all_rows_once() {
        for (rows, sequences) in [(7, 1), (7, 3), (4, 4), (100, 8)] {
            let batch = even_batch(rows, sequences);
            let covered: Vec<usize> =
                batch.sequences.iter().flat_map(|sequence| sequence.rows.clone()).collect();
            assert_eq!(covered, (0..rows).collect::<Vec<_>>());
            assert_eq!(batch.sample_rows.len(), sequences);
        }
    }

    #[test]
    fn a_plan_that_does_not_fit_says_what_it_needs() {
        let plan = MemoryPlan { weights_bytes: 70, kv_bytes: 30, ..MemoryPlan::default() };
        plan.check_fits(200, 2).unwrap();
        let error = plan.check_fits(199, 2).unwrap_err().to_string();
        assert!(error.contains("needs 100 bytes (weights 70, keys and values 30,"), "{error}");
        assert!(error.contains("99 bytes available per rank"), "{error}");
    }
}
