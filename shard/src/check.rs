//! Checking a checkpoint's folder before any rank is started.

use std::path::Path;

use crate::config::Config;
use crate::device::DType;
use crate::device::plan::PlanDevice;
use crate::model::{Model, Normalization, Parallel};
use crate::weights::Checkpoint;

/// All that a rank would find wrong with a checkpoint's configuration and tensors, a text each; nothing is read but headers.
pub fn check_folder(folder: &Path) -> Vec<String> {
    let config = Config::open(folder).map_err(|error| error.to_string());
    let checkpoint = Checkpoint::open(folder).map_err(|error| error.to_string());
    match (config, checkpoint) {
        (Ok(config), Ok(checkpoint)) => {
            let normalization = Normalization { mean: [0.0; 3], std: [1.0; 3] };
            let alone = Parallel { rank: 0, world_size: 1 };
            let device = PlanDevice::new();
            let loaded =
                Model::load(&device, &checkpoint, &config, normalization, alone, DType::Bf16, &mut |_| ());
            loaded.err().map(|error| error.to_string()).into_iter().collect()
        }
        (config, checkpoint) => config.err().into_iter().chain(checkpoint.err()).collect(),
    }
}
