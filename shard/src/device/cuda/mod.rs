//! GPUs of NVIDIA, through libraries that are loaded when they are asked for: which of them are there, the kernels, compiled
//! for the GPU at hand, and the device on them.

mod arena;
mod attention;
mod candidates;
pub mod compile;
pub mod cubin_cache;
mod cublas_lt;
mod device;
mod driver;
mod graphs;
mod group;
mod hash;
mod ipc;
mod kernels;
pub mod libraries;
mod library_error;
mod linear;
mod milestones;
pub mod modules;
mod nccl;
mod paged;
mod peers;
mod pixels;
pub mod probe;
mod recent;
mod reduce;
mod regroup;
mod sizes;
mod staging;
mod warm_up;
mod watcher;
mod weights;
mod windows;

pub use arena::{RANGE_BYTES, Tensor, tensor_units};
pub use device::{CudaDevice, CudaOptions, Features, Norm};
pub use driver::Gpu;
pub use graphs::graphs_bytes;
pub use group::Sums;
pub use hash::Hash;
pub use kernels::begins_early;
pub use linear::Linear;
pub use paged::{KvCache, Rows};
pub use sizes::{PAGE_BYTES, Sizes, StepTooLarge, allocation_bytes};
pub use weights::Places;
