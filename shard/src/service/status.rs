//! How errors travel: each becomes a `Status` that carries its words.

use tonic::Status;

use super::{options::InvalidOptions, worker::LoadError};
use crate::{
    device::DeviceError,
    runner::{StepError, media::MediaError, plan::PlanError},
};

/// A step that failed.
pub fn of_step(rank: usize, step: u64, error: &StepError) -> Status {
    let words = format!("rank {rank}, step {step}: {error}");
    match error {
        StepError::Invalid { .. } => Status::invalid_argument(words),
        StepError::Device(DeviceError::GroupLost) => Status::aborted(words),
        StepError::Device(DeviceError::Failed(_)) => Status::internal(words),
    }
}

/// A model that was not loaded.
pub fn of_load(error: &LoadError) -> Status {
    let words = error.to_string();
    match error {
        LoadError::Unsupported(_) => Status::unimplemented(words),
        LoadError::Checkpoint(_) | LoadError::Memory(_) | LoadError::Join(_) => {
            Status::failed_precondition(words)
        }
        LoadError::Plan(PlanError::DoesNotFit { .. } | PlanError::DoesNotFitGpu { .. }) => {
            Status::resource_exhausted(words)
        }
        LoadError::Plan(PlanError::Step(_)) => Status::failed_precondition(words),
        LoadError::Plan(_) => Status::internal(words),
        LoadError::Device(DeviceError::GroupLost) => Status::aborted(words),
        LoadError::Device(DeviceError::Failed(_)) => Status::internal(words),
    }
}

/// A request to load that makes no sense.
pub fn of_options(error: &InvalidOptions) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Pixels that were not taken.
pub fn of_media(error: &MediaError) -> Status {
    match error {
        MediaError::Full { .. } | MediaError::TooManyFiles => Status::resource_exhausted(error.to_string()),
        MediaError::OtherEpoch { .. } => Status::failed_precondition(error.to_string()),
        MediaError::Cleared => Status::aborted(error.to_string()),
        MediaError::OtherGrid | MediaError::Length { .. } | MediaError::File(_) => {
            Status::invalid_argument(error.to_string())
        }
    }
}
