//! How fast a GPU's memory is: what kernels that only read, or only move, are measured against.
#![allow(unsafe_code)]

use std::rc::Rc;

use cudarc::driver::sys::CUdevice_attribute;

use super::compile::{Arch, Compiler, Source};
use super::driver::{DeviceBuffer, Function, Gpu, Module};
use super::kernels::Argument;
use crate::device::{DeviceError, Result};

/// Reads everything and keeps nothing. Four loads are under way in each thread at a time. It is no part of a step, so that
/// only who measures has it compiled.
pub const READ: Source = Source {
    file: "read.cu",
    text: r#"
extern "C" __global__ void __launch_bounds__(256) read_all(const uint4* from, unsigned long long count, unsigned* never) {
  const unsigned long long stride = static_cast<unsigned long long>(gridDim.x) * 256;
  unsigned long long i = static_cast<unsigned long long>(blockIdx.x) * 256 + threadIdx.x;
  unsigned mixed = 0;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
    mixed ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += stride) {
    const uint4 a = from[i];
    mixed ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  // The compiler cannot know that this never is: the memory has one byte everywhere, and so has what is mixed of it.
  if (mixed == 0x12345678u) *never = mixed;
}
"#,
};

/// Threads of a block of the kernel above, and its blocks for each multiprocessor.
const THREADS: usize = 256;
const BLOCKS_PER_MULTIPROCESSOR: usize = 16;

/// Memory to read and to move.
pub struct Probe {
    memory: DeviceBuffer,
    gpu: Rc<Gpu>,
}

/// The kernel that reads.
pub struct Reader {
    function: Function,
    num_blocks: usize,
    _module: Module,
}

impl Probe {
    /// Reserves `bytes`, which must be far more than the GPU's caches hold.
    ///
    /// # Errors
    /// The GPU has no more.
    pub fn new(gpu: &Rc<Gpu>, bytes: usize) -> Result<Self> {
        let probe = Self { memory: DeviceBuffer::new(gpu, bytes, "measuring")?, gpu: gpu.clone() };
        probe.fill()?;
        Ok(probe)
    }

    /// Has the stream write all of the memory.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn fill(&self) -> Result<()> {
        self.gpu.fill(self.memory.address(), 0x5a, self.memory.bytes())
    }

    /// Has the stream copy one half of the memory to the other: as many bytes as there are are read and written together.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn copy(&self) -> Result<()> {
        let half = self.memory.bytes() / 2;
        self.gpu.copy(self.memory.address(), self.memory.address() + half as u64, half)
    }

    /// Compiles the kernel that reads.
    ///
    /// # Errors
    /// NVRTC or the driver refuses.
    pub fn reader(&self, arch: Arch) -> Result<Reader> {
        let compiled = Compiler::new(arch).and_then(|compiler| compiler.compile(READ, &[]));
        let cubin = compiled.map_err(|error| DeviceError::Failed(error.to_string()))?.cubin;
        let module = Module::load(&self.gpu, READ.file, &cubin)?;
        let count = self.gpu.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let num_blocks = count.unsigned_abs() as usize * BLOCKS_PER_MULTIPROCESSOR;
        Ok(Reader { function: module.function("read_all", 0)?, num_blocks, _module: module })
    }

    /// Has the stream read all of the memory.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn read(&self, reader: &Reader) -> Result<()> {
        let (from, vectors) = (self.memory.address(), (self.memory.bytes() / 16) as u64);
        let grid = [reader.num_blocks, 1, 1];
        let mut arguments = [from.place(), vectors.place(), from.place()];
        // SAFETY: the arguments are those of the kernel above, and the memory is as long as it says.
        unsafe { self.gpu.launch(&reader.function, grid, THREADS, 0, &mut arguments) }
    }
}
