//! Hashes that the GPU computes: of what all ranks must have alike, and of weights that must stay as they are.
#![allow(unsafe_code)]

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use super::device::{CudaDevice, THREADS};
use super::driver::{Address, DeviceBuffer, Event, Gpu, PinnedBuffer};
use super::kernels::{Argument, count, launch};
use super::staging::Plain;
use crate::device::{DeviceError, Result};

/// Hashes that can be under way.
const HASHES: usize = 64;

/// Bytes that a block hashes before there are more blocks, and the most blocks.
const BYTES_PER_BLOCK: usize = 32 << 10;
const MAX_BLOCKS: usize = 1024;

/// Bytes of the GPU that hashes take: for what blocks compute, and for the hashes themselves. These take as many of the host.
pub const HASH_BYTES: [usize; 2] = [MAX_BLOCKS * size_of::<u64>(), HASHES * size_of::<u64>()];

/// A hash that the GPU computes. The last [`HASHES`] of them can be read.
pub struct Hash(usize);

/// Where hashes are computed, and where they come to.
pub struct Hashes {
    partial: DeviceBuffer,
    computed: DeviceBuffer,
    returned: RefCell<PinnedBuffer>,
    /// When each is there.
    events: Vec<Event>,
    next: Cell<usize>,
}

/// Memory that must stay as it is.
pub struct Kept {
    address: Address,
    bytes: usize,
    hash: u64,
}

impl Hashes {
    /// Room for hashes.
    ///
    /// # Errors
    /// There is none.
    pub fn new(gpu: &Rc<Gpu>) -> Result<Self> {
        Ok(Self {
            partial: DeviceBuffer::new(gpu, HASH_BYTES[0], "hashes")?,
            computed: DeviceBuffer::new(gpu, HASH_BYTES[1], "hashes")?,
            returned: RefCell::new(PinnedBuffer::new(gpu, HASH_BYTES[1])?),
            events: (0..HASHES).map(|_| Event::new(gpu)).collect::<Result<_>>()?,
            next: Cell::new(0),
        })
    }

    /// When a hash is there.
    pub fn event(&self, hash: &Hash) -> &Event {
        &self.events[hash.0]
    }

    /// A hash that has come.
    pub fn value(&self, hash: &Hash) -> u64 {
        let start = hash.0 * size_of::<u64>();
        let returned = self.returned.borrow();
        let bytes = &returned.as_slice()[start..start + size_of::<u64>()];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
}

impl CudaDevice {
    /// Weights with these bytes, which must never change.
    pub(super) fn keep<T: Plain>(&self, data: &[T]) -> Result<DeviceBuffer> {
        let buffer = self.weights.borrow_mut().reserve(&self.gpu, size_of_val(data))?;
        self.fill(&buffer, data)?;
        if buffer.bytes() > 0 {
            let (address, bytes) = (buffer.address(), buffer.bytes());
            let hash = self.hash_now(address, bytes)?;
            self.kept.borrow_mut().push(Kept { address, bytes, hash });
        }
        Ok(buffer)
    }

    /// Has the stream compute the hash of some bytes, and bring it to the host.
    pub(super) fn begin_hash(&self, at: Address, bytes: usize) -> Result<Hash> {
        let slot = self.hashes.next.get();
        self.hashes.next.set((slot + 1) % HASHES);
        let blocks = bytes.div_ceil(BYTES_PER_BLOCK).clamp(1, MAX_BLOCKS);
        let partial = self.hashes.partial.address();
        let hash = self.hashes.computed.address() + (slot * size_of::<u64>()) as Address;
        let function = &self.kernels.hash_words;
        launch!(self, function, [blocks, 1, 1], THREADS, at, bytes as u64, partial)?;
        let function = &self.kernels.hash_finish;
        launch!(self, function, [1, 1, 1], THREADS, partial, count(blocks), bytes as u64, hash)?;
        self.hashes.returned.borrow_mut().receive(hash, slot * size_of::<u64>(), size_of::<u64>())?;
        self.hashes.events[slot].record()?;
        Ok(Hash(slot))
    }

    /// The hash of some bytes, which is waited for.
    pub(super) fn hash_now(&self, at: Address, bytes: usize) -> Result<u64> {
        let hash = self.begin_hash(at, bytes)?;
        // Without a group, too: between two of them weights are verified.
        self.gpu.synchronize()?;
        Ok(self.hashes.value(&hash))
    }

    /// Checks that all weights are still what was packed.
    pub(super) fn verify_kept(&self) -> Result<()> {
        for (index, kept) in self.kept.borrow().iter().enumerate() {
            if self.hash_now(kept.address, kept.bytes)? != kept.hash {
                return Err(DeviceError::Failed(format!("the GPU's weights have changed, in part {index}")));
            }
        }
        Ok(())
    }
}
