//! Sums through NCCL.
#![allow(unsafe_code)]

use std::{
    ptr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::{
    driver::sys::{CUcontext, CUresult, CUstream, cuCtxGetCurrent, cuCtxSetCurrent, cuStreamQuery},
    nccl::{result, sys},
};

use super::driver::{Address, Gpu};
use super::staging::as_bytes;
use crate::collective::Collective;
use crate::device::{DeviceError, Result};

/// A communicator of NCCL that never blocks, so that a rank that is lost does not hold this one up. Any thread may abort it.
pub struct Communicator {
    raw: Mutex<Raw>,
    place: Place,
    /// Whether a sum may have been given up.
    is_cut_short: AtomicBool,
}

/// NCCL's name for it, null once it was aborted.
struct Raw(sys::ncclComm_t);

/// The stream of its sums, and the GPU's context.
struct Place(CUstream, CUcontext);

// SAFETY: the driver takes calls on both from any thread.
unsafe impl Send for Place {}
// SAFETY: the same.
unsafe impl Sync for Place {}

// SAFETY: NCCL takes calls from any thread, one at a time.
unsafe impl Send for Raw {}

impl Communicator {
    /// All ranks of `host` make one, by an id that rank 0 draws and gives to the others. The GPU must outlive it.
    pub fn new(gpu: &Gpu, host: &dyn Collective) -> Result<Self> {
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        if host.rank() == 0 {
            id = result::get_uniqueid().map_err(|error| failed("cannot draw an id", &error.0))?;
        }
        let of_ranks = host.all_gather(as_bytes(&id.internal.map(|byte| byte as u8)))?;
        for (to, byte) in id.internal.iter_mut().zip(&of_ranks[0]) {
            *to = *byte as _;
        }
        let mut config = config();
        let mut raw = ptr::null_mut();
        // SAFETY: all that is pointed to lives during the call; NCCL copies the configuration.
        let begun = unsafe {
            sys::ncclCommInitRankConfig(
                &mut raw,
                host.world_size() as i32,
                id,
                host.rank() as i32,
                &mut config,
            )
        };
        // What is not made is aborted when it is dropped.
        let raw = Mutex::new(Raw(raw));
        let mut context = ptr::null_mut();
        // SAFETY: the driver writes the context of this thread, which is the GPU's. Without one it stays null.
        let _ = unsafe { cuCtxGetCurrent(&mut context) };
        let place = Place(gpu.stream(), context);
        let communicator = Self { raw, place, is_cut_short: AtomicBool::new(false) };
        communicator.finish(begun, "cannot make a communicator", || Ok(host.check()?))?;
        Ok(communicator)
    }

    /// Waits until a call that may go on in the background is done, and does `look` meanwhile.
    fn finish(&self, mut state: sys::ncclResult_t, what: &str, look: impl Fn() -> Result<()>) -> Result<()> {
        while state == sys::ncclResult_t::ncclInProgress {
            look()?;
            std::thread::yield_now();
            state = self.state()?.map_err(|error| failed(what, &error))?;
        }
        if state == sys::ncclResult_t::ncclSuccess { Ok(()) } else { Err(failed(what, &state)) }
    }

    /// How what was begun last goes, or why that cannot be told.
    fn state(&self) -> Result<std::result::Result<sys::ncclResult_t, sys::ncclResult_t>> {
        self.with(|raw| {
            let mut state = sys::ncclResult_t::ncclSuccess;
            // SAFETY: the communicator was made, if only in the background, and NCCL writes its state.
            let asked = unsafe { sys::ncclCommGetAsyncError(raw, &mut state) };
            asked.result().map(|_| state).map_err(|error| error.0)
        })
    }

    pub fn all_reduce_sum(&self, at: Address, count: usize, gpu: &Gpu, host: &dyn Collective) -> Result<()> {
        let (dtype, sum) = (sys::ncclDataType_t::ncclBfloat16, sys::ncclRedOp_t::ncclSum);
        let begun = self.with(|raw| {
            // SAFETY: the caller names memory of a live buffer, and the stream lives as long as the GPU.
            unsafe { sys::ncclAllReduce(at as _, at as _, count, dtype, sum, raw, gpu.stream().cast()) }
        })?;
        // It may wait for room on the stream.
        self.finish(begun, "cannot sum over the ranks", || {
            gpu.look();
            Ok(host.check()?)
        })
    }

    /// Whether what was begun goes well so far.
    pub fn check(&self) -> Result<()> {
        match self.state()? {
            Ok(sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress) => Ok(()),
            Ok(error) | Err(error) => Err(failed("a sum failed", &error)),
        }
    }

    /// Whether it was aborted when a sum may have been on its way.
    pub fn is_cut_short(&self) -> bool {
        self.is_cut_short.load(Ordering::Acquire)
    }

    /// Calls NCCL, which does not block, unless the communicator was aborted.
    fn with<T>(&self, call: impl FnOnce(sys::ncclComm_t) -> T) -> Result<T> {
        let raw = self.lock();
        if raw.0.is_null() { Err(DeviceError::GroupLost) } else { Ok(call(raw.0)) }
    }

    /// Ends what waits for other ranks, from any thread. The communicator is of no more use.
    pub fn abort(&self) {
        // Without the lock while NCCL aborts: others see at once that it is gone.
        let Raw(raw) = std::mem::replace(&mut *self.lock(), Raw(ptr::null_mut()));
        if !raw.is_null() {
            let Place(stream, context) = self.place;
            // What the stream has done by now is whole.
            // SAFETY: the GPU, its context and its stream outlive the communicator.
            let is_done = unsafe {
                let _ = cuCtxSetCurrent(context);
                cuStreamQuery(stream) == CUresult::CUDA_SUCCESS
            };
            self.is_cut_short.store(!is_done, Ordering::Release);
            // SAFETY: the communicator lives, and is not used again. An error leaves nothing else to be done.
            let _ = unsafe { sys::ncclCommAbort(raw) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Raw> {
        // Nothing panics under the lock.
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // The others may be gone or in another epoch: nobody is waited for.
        self.abort();
    }
}

/// What `NCCL_CONFIG_INITIALIZER` is, but that calls do not block.
fn config() -> sys::ncclConfig_t {
    const UNDEFINED: i32 = i32::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 2 * 10_000 + 28 * 100,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn failed(what: &str, error: &sys::ncclResult_t) -> DeviceError {
    match error {
        // Another rank is gone, which is no fault of this one.
        sys::ncclResult_t::ncclRemoteError => DeviceError::GroupLost,
        error => DeviceError::Failed(format!("NCCL: {what}: {error:?}")),
    }
}
