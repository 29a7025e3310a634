//! The CPU device: packed weights, vector kernels for several instruction sets, and a pool of pinned threads.

mod arena;
mod attention;
mod candidates;
mod device;
mod dot;
mod instruction_set;
mod kept;
mod kv_cache;
mod linear;
mod memory;
mod online_softmax;
mod packed;
mod patches;
mod pool;
mod rowwise;
mod scratch;
mod simd;
#[cfg(test)]
mod testing;
mod vision_attention;

pub use arena::Tensor;
pub(super) use candidates::whole_row;
pub use device::{CpuDevice, CpuOptions, Features, Norm, Rows};
pub use instruction_set::InstructionSet;
pub use kv_cache::KvCache;
pub use packed::{PackedLinear, packed_bytes};
pub use scratch::scratch_bytes;
