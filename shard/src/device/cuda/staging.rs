//! What goes to the GPU and comes back: through pinned memory, so that copies are the stream's own work.

use std::{cell::RefCell, rc::Rc};

use super::device::CudaDevice;
use super::driver::{Address, DeviceBuffer, Event, Gpu, PinnedBuffer};
use crate::device::Result;

/// Buffers that are used in turn. What was put must be used before as many more are full.
const SLOTS: usize = 4;

/// Places in a slot are multiples of this many bytes, as kernels want them.
const ALIGNMENT: usize = 256;

/// Bytes that are brought back at a time.
pub const DOWNLOAD_BYTES: usize = 1 << 20;

/// A ring of pinned buffers, each with as much memory on the GPU.
pub struct Staging {
    slots: RefCell<Slots>,
    slot_bytes: usize,
}

struct Slots {
    all: Vec<Slot>,
    current: usize,
    used: usize,
}

struct Slot {
    pinned: PinnedBuffer,
    device: DeviceBuffer,
    /// When all copies from the slot are done.
    sent: Event,
}

impl Staging {
    /// A ring of slots that hold `slot_bytes` each.
    pub fn new(gpu: &Rc<Gpu>, slot_bytes: usize) -> Result<Self> {
        let slot_bytes = slot_bytes.next_multiple_of(ALIGNMENT);
        let slot = |_| {
            let pinned = PinnedBuffer::new(gpu, slot_bytes)?;
            let device = DeviceBuffer::new(gpu, slot_bytes, "staging")?;
            Ok(Slot { pinned, device, sent: Event::new(gpu)? })
        };
        let all = (0..SLOTS).map(slot).collect::<Result<_>>()?;
        Ok(Self { slots: RefCell::new(Slots { all, current: 0, used: 0 }), slot_bytes })
    }

    /// Bytes of the GPU that each buffer of a ring takes, and as many of the host.
    pub fn bytes(slot_bytes: usize) -> [usize; SLOTS] {
        [slot_bytes.next_multiple_of(ALIGNMENT); SLOTS]
    }

    /// The GPU's memory of a slot, where nothing that was put is needed any more, and its bytes: 4 MiB at least.
    pub fn place(&self) -> (Address, usize) {
        (self.slots.borrow().all[0].device.address(), self.slot_bytes)
    }

    /// Has the stream copy bytes to the GPU. They are there for the calls that follow, until [`SLOTS`] - 1 more slots are full.
    ///
    /// # Panics
    /// There are more than a slot holds.
    pub fn put<T: Plain>(&self, data: &[T]) -> Result<Address> {
        let bytes = as_bytes(data);
        let mut slots = self.slots.borrow_mut();
        let offset = slots.reserve(bytes.len(), self.slot_bytes)?;
        let current = slots.current;
        let slot = &mut slots.all[current];
        slot.pinned.as_mut_slice()[offset..offset + bytes.len()].copy_from_slice(bytes);
        let to = slot.device.address() + offset as Address;
        slot.pinned.send(offset, bytes.len(), to)?;
        Ok(to)
    }

    /// Has the stream copy bytes to `to`, any number of them.
    pub fn send(&self, data: &[u8], to: Address) -> Result<()> {
        let mut slots = self.slots.borrow_mut();
        for (i, piece) in data.chunks(self.slot_bytes).enumerate() {
            let offset = slots.reserve(piece.len(), self.slot_bytes)?;
            let current = slots.current;
            let slot = &mut slots.all[current];
            slot.pinned.as_mut_slice()[offset..offset + piece.len()].copy_from_slice(piece);
            slot.pinned.send(offset, piece.len(), to + (i * self.slot_bytes) as Address)?;
        }
        Ok(())
    }
}

impl Slots {
    /// A place for `len` bytes in the current slot, or in the next, whose copies are then waited for.
    fn reserve(&mut self, len: usize, slot_bytes: usize) -> Result<usize> {
        assert!(len <= slot_bytes, "{len} bytes in a slot of {slot_bytes}");
        if self.used + len > slot_bytes {
            self.all[self.current].sent.record()?;
            self.current = (self.current + 1) % SLOTS;
            self.used = 0;
            self.all[self.current].sent.wait()?;
        }
        let offset = self.used;
        self.used = (offset + len).next_multiple_of(ALIGNMENT);
        Ok(offset)
    }
}

impl CudaDevice {
    /// A buffer with these bytes.
    pub(super) fn filled<T: Plain>(&self, data: &[T], purpose: &str) -> Result<DeviceBuffer> {
        let buffer = DeviceBuffer::new(&self.gpu, size_of_val(data), purpose)?;
        self.fill(&buffer, data)?;
        Ok(buffer)
    }

    /// Has the stream copy bytes to a buffer that is as long.
    pub(super) fn fill<T: Plain>(&self, buffer: &DeviceBuffer, data: &[T]) -> Result<()> {
        self.staging.send(as_bytes(data), buffer.address())?;
        self.progress.pieces_of(0).count();
        Ok(())
    }

    /// Bytes of the GPU's memory, brought to the host.
    pub(super) fn bring(&self, from: Address, bytes: usize) -> Result<Vec<u8>> {
        let mut brought = Vec::with_capacity(bytes);
        let mut returned = self.returned.borrow_mut();
        while brought.len() < bytes {
            let len = (bytes - brought.len()).min(DOWNLOAD_BYTES);
            returned.receive(from + brought.len() as Address, 0, len)?;
            self.brought.record()?;
            self.wait(&self.brought)?;
            brought.extend_from_slice(&returned.as_slice()[..len]);
        }
        Ok(brought)
    }
}

/// Types any bits of which are a value, and which have no padding.
pub trait Plain: Copy {}

impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for f32 {}
impl Plain for half::bf16 {}
impl<T: Plain, const N: usize> Plain for [T; N] {}

/// The bytes of plain elements.
#[allow(unsafe_code)]
pub fn as_bytes<T: Plain>(data: &[T]) -> &[u8] {
    // SAFETY: plain types have no padding, so that all bytes are initialised.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}
