//! Checking a checkpoint's folder before any rank is started.

use std::path::Path;

use crate::config::Config;
use crate::device::plan::PlanDevice;
use crate::device::{DType, DeviceKind};
use crate::model::{Model, Normalization, Parallel};
use crate::weights::Checkpoint;

/// What a folder holds, as far as it can be told before loading.
#[derive(Clone, Debug)]
pub struct Checked {
    /// All that a rank would find wrong, a text each.
    pub faults: Vec<String>,
    /// What `config.json` says, if it can be used.
    pub facts: Option<Facts>,
}

/// What others are checked against before the weights are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The most tokens of one sequence by the configuration.
    pub max_context_tokens: u32,
    /// Whether that is a context which YaRN makes.
    pub yarn: bool,
    /// The token that stands for a piece of a picture.
    pub image_token_id: u32,
    /// The token that stands for a piece of a video.
    pub video_token_id: u32,
}

/// Checks a checkpoint's configuration and tensors. Nothing is read but headers, and the files that a `SHA256SUMS` in the folder
/// lists.
pub fn check_folder(folder: &Path) -> Checked {
    let config = Config::open(folder).map_err(|error| error.to_string());
    let checkpoint = Checkpoint::open(folder).map_err(|error| error.to_string());
    let facts = config.as_ref().ok().map(|config| Facts {
        max_context_tokens: u32::try_from(config.text.max_context_tokens()).unwrap_or(u32::MAX),
        yarn: config.text.yarn.is_some(),
        image_token_id: config.image_token_id,
        video_token_id: config.video_token_id,
    });
    let faults = match (config, checkpoint) {
        (Ok(config), Ok(checkpoint)) => {
            let normalization = Normalization { mean: [0.0; 3], std: [1.0; 3] };
            let alone = Parallel { rank: 0, world_size: 1 };
            let device = PlanDevice::new(DeviceKind::Cpu);
            let loaded = Model::load(
                &device,
                &checkpoint,
                &config,
                normalization,
                alone,
                DType::Bf16,
                &mut |_| Ok(()),
            );
            let changed = checkpoint.compare_with_sums();
            let changed = (!changed.is_empty()).then(|| checkpoint.error(changed).to_string());
            loaded.err().map(|error| error.to_string()).into_iter().chain(changed).collect()
        }
        (config, checkpoint) => config.err().into_iter().chain(checkpoint.err()).collect(),
    };
    Checked { faults, facts }
}
