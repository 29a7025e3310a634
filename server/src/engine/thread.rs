//! The thread of the engine.

use std::future::Future;
use std::sync::mpsc;
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
        let (tell, told) = mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::Builder::new().name("engine".into()).spawn(move || {
            match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => {
                    let _ = tell.send(Ok(runtime.handle().clone()));
                    // The sender says nothing: its end does.
                    let _ = runtime.block_on(stopped);
                    runtime.shutdown_background();
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        })?;
        let runtime = told.recv().map_err(|_| io::Error::other("the thread ended"))??;
        Ok(Self { runtime, _stop: stop })
    }

    /// Runs `work` on it.
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(work)
    }
}
