//! How far the GPU is with what it was given.
//!
//! Launches are counted as progress, and what the GPU does when all is launched must be, or a long step would look silent. So an
//! event is recorded every few launches, and counted when it has come, by whoever waits for the GPU. A GPU that hangs
//! lets none come.
#![allow(unsafe_code)]

use std::{collections::VecDeque, sync::Arc};

use cudarc::driver::{result, sys};

use super::driver::failed;
use crate::device::Result;
use crate::progress::Progress;

/// Launches from one milestone to the next: of the longest kernels, which take a tenth of a second each, less than a second.
const LAUNCHES: usize = 8;

/// Milestones that are ahead of the GPU at most, for more launches than a stream takes.
const MAX_AHEAD: usize = 256;

/// The milestones of a stream.
pub struct Milestones {
    stream: sys::CUstream,
    progress: Arc<Progress>,
    launches: usize,
    ahead: VecDeque<Milestone>,
    passed: Vec<Milestone>,
}

impl Milestones {
    /// Those of a stream that outlives them, counted by the thread that owns the device.
    pub fn new(stream: sys::CUstream, progress: Arc<Progress>) -> Self {
        Self { stream, progress, launches: 0, ahead: VecDeque::new(), passed: Vec::new() }
    }

    /// Something was launched.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn launched(&mut self) -> Result<()> {
        self.launches += 1;
        if !self.launches.is_multiple_of(LAUNCHES) {
            return Ok(());
        }
        if self.ahead.len() >= MAX_AHEAD {
            self.look();
            if self.ahead.len() >= MAX_AHEAD {
                return Ok(());
            }
        }
        let milestone = self.passed.pop().map_or_else(Milestone::new, Ok)?;
        // SAFETY: event and stream live.
        unsafe { result::event::record(milestone.0, self.stream) }
            .map_err(failed("cannot record an event"))?;
        self.ahead.push_back(milestone);
        Ok(())
    }

    /// Counts those that the GPU has passed.
    pub fn look(&mut self) {
        while self.ahead.front().is_some_and(Milestone::has_come) {
            self.progress.pieces_of(0).count();
            self.passed.extend(self.ahead.pop_front());
        }
    }
}

/// An event.
struct Milestone(sys::CUevent);

impl Milestone {
    fn new() -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self(event.map_err(failed("cannot create an event"))?))
    }

    /// False, too, where the GPU failed: whoever waits is told.
    fn has_come(&self) -> bool {
        // SAFETY: the event lives.
        unsafe { sys::cuEventQuery(self.0) == sys::CUresult::CUDA_SUCCESS }
    }
}

impl Drop for Milestone {
    fn drop(&mut self) {
        // SAFETY: created once, and destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
