//! Memory that a GPU shares: with GPUs of other processes, and with the host while a kernel runs.
#![allow(unsafe_code)]

use std::{
    mem::MaybeUninit,
    ptr::NonNull,
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
};

use cudarc::driver::{DriverError, result, sys};

use super::driver::{Address, DeviceBuffer, Gpu, failed};
use crate::device::{DeviceError, Result};

/// Which GPU it is, in all processes.
pub type Uuid = [u8; 16];

/// What another process opens memory by.
pub type Handle = [u8; 64];

impl Gpu {
    /// Which GPU it is.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn uuid(&self) -> Result<Uuid> {
        uuid_of(self.device())
    }

    /// Whether it reads and writes the memory of another GPU, or is itself that GPU. False where this process does not see the
    /// other one: then its memory cannot be opened here.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn reaches(&self, other: &Uuid) -> Result<bool> {
        if self.uuid()? == *other {
            return Ok(true);
        }
        let count = result::device::get_count().map_err(failed("cannot count the GPUs"))?;
        for ordinal in 0..count {
            let device = result::device::get(ordinal).map_err(failed("cannot find a GPU"))?;
            if uuid_of(device)? == *other {
                let mut can = 0;
                // SAFETY: both devices are the driver's, which writes one number.
                unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device(), device) }
                    .result()
                    .map_err(failed("cannot ask whether GPUs reach one another"))?;
                return Ok(can != 0);
            }
        }
        Ok(false)
    }

    /// The driver's name for its context in this process.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn context(&self) -> Result<u64> {
        let context = result::ctx::get_current().map_err(failed("cannot ask for the GPU's context"))?;
        Ok(context.map_or(0, |context| context as usize as u64))
    }

    /// Lets it read and write what belongs to another context of this process.
    ///
    /// # Safety
    /// The context is of another GPU, and lives.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn reach_context(&self, context: u64) -> Result<()> {
        // SAFETY: as the caller promises.
        match unsafe { sys::cuCtxEnablePeerAccess(context as usize as sys::CUcontext, 0) } {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            error => Err(failed("cannot reach another GPU")(DriverError(error))),
        }
    }
}

fn uuid_of(device: sys::CUdevice) -> Result<Uuid> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the device is the driver's, which writes 16 bytes.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }
        .result()
        .map_err(failed("cannot ask which GPU it is"))?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

/// What another process opens a buffer by. That process then sees all of the buffer's allocation.
///
/// # Errors
/// The driver does not share this memory.
pub fn share(buffer: &DeviceBuffer) -> Result<Handle> {
    let mut handle = MaybeUninit::<sys::CUipcMemHandle>::uninit();
    // SAFETY: the buffer lives, and the driver writes the handle where it succeeds.
    let handle = unsafe {
        sys::cuIpcGetMemHandle(handle.as_mut_ptr(), buffer.address())
            .result()
            .map_err(failed("cannot share memory"))?;
        handle.assume_init()
    };
    Ok(handle.reserved.map(|byte| byte as u8))
}

/// A buffer of another process.
pub struct OpenedBuffer {
    address: Address,
    gpu: Rc<Gpu>,
}

impl OpenedBuffer {
    /// Opens what another process, not this one, has shared.
    ///
    /// # Errors
    /// The GPU does not reach that memory, or the driver cannot share it with this process.
    pub fn open(gpu: &Rc<Gpu>, handle: &Handle) -> Result<Self> {
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the driver checks the handle, and writes an address.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) }
            .result()
            .map_err(failed("cannot open the memory of another rank"))?;
        Ok(Self { address, gpu: gpu.clone() })
    }

    /// Where it is for this GPU.
    pub fn address(&self) -> Address {
        self.address
    }
}

impl Drop for OpenedBuffer {
    fn drop(&mut self) {
        // What the stream still does with it comes first.
        let _ = self.gpu.synchronize();
        // SAFETY: opened once, and closed once.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.address) };
    }
}

/// Words of the host's memory that kernels read and write while the host does, all 0 at first.
pub struct SharedWords<const N: usize> {
    words: NonNull<[AtomicU32; N]>,
    on_gpu: Address,
    gpu: Rc<Gpu>,
}

impl<const N: usize> SharedWords<N> {
    /// Reserves them.
    ///
    /// # Errors
    /// The host has no more memory that can be pinned, or the GPU does not reach it.
    pub fn new(gpu: &Rc<Gpu>) -> Result<Self> {
        // SAFETY: the memory is given back once, in `drop`.
        let start =
            unsafe { result::malloc_host(size_of::<[AtomicU32; N]>(), sys::CU_MEMHOSTALLOC_DEVICEMAP) }
                .map_err(failed("cannot pin memory that the GPU sees"))?;
        let words = NonNull::new(start.cast::<[AtomicU32; N]>())
            .ok_or_else(|| DeviceError::Failed("pinned memory at address zero".into()))?;
        // SAFETY: it is as long as was asked for, and begins at a page.
        unsafe { start.cast::<u8>().write_bytes(0, size_of::<[AtomicU32; N]>()) };
        let mut this = Self { words, on_gpu: 0, gpu: gpu.clone() };
        // SAFETY: the memory was just reserved, as one that the GPU sees; the driver writes an address.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut this.on_gpu, start, 0) }
            .result()
            .map_err(failed("cannot tell where the GPU sees the host's memory"))?;
        Ok(this)
    }

    /// Where word `index` is for the GPU.
    pub fn address(&self, index: usize) -> Address {
        assert!(index < N, "word {index} of {N}");
        self.on_gpu + (index * size_of::<u32>()) as Address
    }

    /// Word `index` as it is now.
    pub fn load(&self, index: usize) -> u32 {
        self.words()[index].load(Ordering::Acquire)
    }

    /// Writes word `index`, which kernels that run see.
    pub fn store(&self, index: usize, value: u32) {
        self.words()[index].store(value, Ordering::Release);
    }

    /// Word `index` for another thread.
    ///
    /// # Safety
    /// These words outlive it.
    pub unsafe fn word(&self, index: usize) -> SharedWord {
        SharedWord(NonNull::from(&self.words()[index]))
    }

    fn words(&self) -> &[AtomicU32; N] {
        // SAFETY: the memory lives as long as this, was initialised, and is only accessed as atomic words.
        unsafe { self.words.as_ref() }
    }
}

impl<const N: usize> Drop for SharedWords<N> {
    fn drop(&mut self) {
        let _ = self.gpu.synchronize();
        // SAFETY: reserved in `new`, and given back once.
        let _ = unsafe { result::free_host(self.words.as_ptr().cast()) };
    }
}

/// One of [`SharedWords`], for another thread.
pub struct SharedWord(NonNull<AtomicU32>);

// SAFETY: an atomic word may be written by any thread, and lives as long as this: see `SharedWords::word`.
unsafe impl Send for SharedWord {}
// SAFETY: as above.
unsafe impl Sync for SharedWord {}

impl SharedWord {
    /// Writes it, which kernels that run see.
    pub fn store(&self, value: u32) {
        // SAFETY: it lives, and is only accessed as an atomic word.
        unsafe { self.0.as_ref() }.store(value, Ordering::Release);
    }
}
