//! Ends what waits for other ranks on the GPU when the group has fallen apart.
//!
//! The thread that gives the stream its work cannot be relied on for that: it waits itself for room in the stream's queue, for
//! copies, or for the stream before it gives memory back, all of it behind a kernel that waits for a rank that is gone. So a
//! thread of its own looks at the group, and never waits for the GPU.

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::ipc::SharedWord;
use super::nccl::Communicator;
use crate::collective::Checker;
use crate::device::{DeviceError, Result};

/// Time between two looks at the group.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// What of a group waits for other ranks on the GPU.
pub struct Waits {
    /// What kernels that read other GPUs' memory look at while they wait: not 0 ends that.
    pub abort: Option<SharedWord>,
    pub communicator: Option<Arc<Communicator>>,
}

impl Waits {
    /// Ends it, from any thread, now and for all that the stream is given later.
    pub fn end(&self) {
        // First what takes no time: a communicator may wait for the stream before it is gone.
        if let Some(abort) = &self.abort {
            abort.store(1);
        }
        if let Some(communicator) = &self.communicator {
            communicator.abort();
        }
    }
}

/// The thread. When it is dropped what waits ends, too.
pub struct Watcher {
    waits: Arc<Waits>,
    /// Dropped to stop it.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Ends `waits` when `check` says that the group is lost.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(check: Checker, waits: Waits) -> Result<Self> {
        let waits = Arc::new(waits);
        let (stop, stopped) = mpsc::channel();
        let to_end = waits.clone();
        let watch = move || {
            while stopped.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if check().is_err() {
                    return to_end.end();
                }
            }
        };
        let thread = thread::Builder::new()
            .name("group-watcher".into())
            .spawn(watch)
            .map_err(|error| DeviceError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self { waits, stop: Some(stop), thread: Some(thread) })
    }

    /// Ends what waits at once.
    pub fn end_waits(&self) {
        self.waits.end();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.end_waits();
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}
