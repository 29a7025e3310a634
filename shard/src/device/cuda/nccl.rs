//! Sums through NCCL.
#![allow(unsafe_code)]

use cudarc::nccl::{result, sys};

use super::driver::{Address, Gpu};
use super::staging::as_bytes;
use crate::collective::Collective;
use crate::device::{DeviceError, Result};

/// A communicator of NCCL that never blocks, so that a rank that is lost does not hold this one up.
pub struct Communicator {
    /// Null once it was aborted.
    raw: sys::ncclComm_t,
}

impl Communicator {
    /// All ranks of `host` make one, by an id that rank 0 draws and gives to the others.
    pub fn new(host: &dyn Collective) -> Result<Self> {
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        if host.rank() == 0 {
            id = result::get_uniqueid().map_err(|error| failed("cannot draw an id", &error.0))?;
        }
        let of_ranks = host.all_gather(as_bytes(&id.internal.map(|byte| byte as u8)))?;
        for (to, byte) in id.internal.iter_mut().zip(&of_ranks[0]) {
            *to = *byte as _;
        }
        let mut config = config();
        let mut raw = std::ptr::null_mut();
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
        let mut communicator = Self { raw };
        let ready = communicator.finish(begun, "cannot make a communicator", host);
        if ready.is_err() {
            communicator.abort();
        }
        ready.map(|()| communicator)
    }

    /// Waits until a call that may go on in the background is done.
    fn finish(&self, mut state: sys::ncclResult_t, what: &str, host: &dyn Collective) -> Result<()> {
        while state == sys::ncclResult_t::ncclInProgress {
            host.check()?;
            std::thread::yield_now();
            // SAFETY: the communicator was made, if only in the background.
            unsafe { sys::ncclCommGetAsyncError(self.raw, &mut state) }
                .result()
                .map_err(|error| failed(what, &error.0))?;
        }
        if state == sys::ncclResult_t::ncclSuccess { Ok(()) } else { Err(failed(what, &state)) }
    }

    pub fn all_reduce_sum(&self, at: Address, count: usize, gpu: &Gpu, host: &dyn Collective) -> Result<()> {
        if self.raw.is_null() {
            return Err(DeviceError::GroupLost);
        }
        let (dtype, sum) = (sys::ncclDataType_t::ncclBfloat16, sys::ncclRedOp_t::ncclSum);
        // SAFETY: the caller names memory of a live buffer, and the stream lives as long as the GPU.
        let begun =
            unsafe { sys::ncclAllReduce(at as _, at as _, count, dtype, sum, self.raw, gpu.stream().cast()) };
        self.finish(begun, "cannot sum over the ranks", host)
    }

    /// Whether what was begun goes well so far.
    pub fn check(&self) -> Result<()> {
        if self.raw.is_null() {
            return Err(DeviceError::GroupLost);
        }
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.raw, &mut state) };
        match (asked, state) {
            (
                sys::ncclResult_t::ncclSuccess,
                sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress,
            ) => Ok(()),
            // Another rank is gone, which is no fault of this one.
            (_, sys::ncclResult_t::ncclRemoteError) => Err(DeviceError::GroupLost),
            (sys::ncclResult_t::ncclSuccess, error) | (error, _) => Err(failed("a sum failed", &error)),
        }
    }

    /// Ends what waits for other ranks. The communicator is of no more use.
    pub fn abort(&mut self) {
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        if !raw.is_null() {
            // SAFETY: the communicator lives, and is not used again. An error leaves nothing else to be done.
            let _ = unsafe { sys::ncclCommAbort(raw) };
        }
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
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn failed(what: &str, error: &sys::ncclResult_t) -> DeviceError {
    DeviceError::Failed(format!("NCCL: {what}: {error:?}"))
}
