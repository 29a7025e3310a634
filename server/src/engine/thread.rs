//! The thread of the engine.

use std::future::Future;
use std::{io, thread};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A thread for the engine, the connections of its shards and nothing else, with a runtime of its own. A step then wakes no other
/// thread on its way, and waits behind nobody's request. Dropping it ends what it runs.
pub struct EngineThread {
    runtime: Handle,
    _stop: oneshot::Sender<()>,
}

impl EngineThread {
    /// Starts it.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::Builder::new().name("engine".into()).spawn(move || {
            // The sender says nothing: its end does.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, _stop: stop })
    }

    /// Runs `work` on it.
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(work)
    }
}
