//! A bounded place for work that would stall the async threads: decoding pictures, reading videos,
//! hashing uploads, tokenizing prompts.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Why work was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkersError {
    /// As many pieces of work as may wait are waiting already.
    #[error("{what}: {limit} requests are in work or waiting already")]
    Overloaded {
        /// The kind of work.
        what: &'static str,
        /// How many may be in work or waiting.
        limit: usize,
    },
    /// The work panicked: a bug of ours or of a library, which must not disturb anybody else.
    #[error("{what}: panicked: {message}")]
    Panicked {
        /// The kind of work.
        what: &'static str,
        /// What the panic said.
        message: String,
    },
}

/// Runs closures on blocking threads, a bounded number at a time, with a bounded number waiting.
#[derive(Debug, Clone)]
pub struct Workers {
    what: &'static str,
    limit: usize,
    admitted: Arc<Semaphore>,
    running: Arc<Semaphore>,
}

/// A place to work in. Dropping it gives it up.
#[derive(Debug)]
pub struct Place {
    what: &'static str,
    _admitted: OwnedSemaphorePermit,
    _running: OwnedSemaphorePermit,
}

impl Workers {
    /// A place where `running` closures work at once and `waiting` more may wait. `what` names the work in errors.
    pub fn new(what: &'static str, running: usize, waiting: usize) -> Self {
        assert!(running > 0, "at least one worker");
        let limit = running + waiting;
        Self {
            what,
            limit,
            admitted: Arc::new(Semaphore::new(limit)),
            running: Arc::new(Semaphore::new(running)),
        }
    }

    /// Runs `work` off the async threads and waits for it.
    ///
    /// Dropping the future while it waits gives its place up; work that has begun goes on to its end and keeps its
    /// place until then, so that abandoned work is bounded too.
    pub async fn run<T, F>(&self, work: F) -> Result<T, WorkersError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        Arc::new(self.place().await?).run(work).await
    }

    /// Waits for a place, for work of several pieces or that needs no thread of this process.
    pub async fn place(&self) -> Result<Place, WorkersError> {
        let admitted = Arc::clone(&self.admitted)
            .try_acquire_owned()
            .map_err(|_| WorkersError::Overloaded { what: self.what, limit: self.limit })?;
        let running = Arc::clone(&self.running).acquire_owned().await.expect("the semaphore is never closed");
        Ok(Place { what: self.what, _admitted: admitted, _running: running })
    }
}

impl Place {
    /// Runs a piece of work off the async threads and waits for it. The caller bounds how many run at once in one place.
    ///
    /// Work that has begun keeps the place until its end, also where nobody waits for it any more.
    pub async fn run<T, F>(self: &Arc<Self>, work: F) -> Result<T, WorkersError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let place = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            let _place = place;
            work()
        });
        task.await.map_err(|error| WorkersError::Panicked { what: self.what, message: panic_message(error) })
    }
}

fn panic_message(error: tokio::task::JoinError) -> String {
    if !error.is_panic() {
        return error.to_string();
    }
    let payload = error.into_panic();
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(message), _) => (*message).to_owned(),
        (_, Some(message)) => message.clone(),
        _ => "without a message".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refuses_more_than_may_wait_and_recovers() {
        let workers = Workers::new("test", 1, 1);
        let (release, held) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let workers = workers.clone();
            async move { workers.run(move || held.recv().is_ok()).await }
        });
        while workers.running.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let second = tokio::spawn({
            let workers = workers.clone();
            async move { workers.run(|| 2).await }
        });
        while workers.admitted.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let third = workers.run(|| 3).await;
        assert_eq!(third, Err(WorkersError::Overloaded { what: "test", limit: 2 }));
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Ok(true));
        assert_eq!(second.await.unwrap(), Ok(2));
        assert_eq!(workers.run(|| 4).await, Ok(4));
    }

    /// One who has a place is never refused, however many wait; abandoned work keeps the place.
    #[tokio::test]
    async fn work_in_a_place_keeps_it() {
        let workers = Workers::new("test", 1, 0);
        let place = Arc::new(workers.place().await.unwrap());
        assert_eq!(place.run(|| 1).await, Ok(1));
        let overloaded = Err(WorkersError::Overloaded { what: "test", limit: 1 });
        assert_eq!(workers.run(|| 2).await, overloaded);
        assert_eq!(place.run(|| 3).await, Ok(3));
        let (release, held) = std::sync::mpsc::channel::<()>();
        let mut abandoned = Box::pin(place.run(move || held.recv().is_ok()));
        assert!(futures::poll!(&mut abandoned).is_pending());
        drop(abandoned);
        drop(place);
        assert_eq!(workers.run(|| 4).await, overloaded);
        release.send(()).unwrap();
        while workers.running.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(workers.run(|| 5).await, Ok(5));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_its_place() {
        let workers = Workers::new("test", 1, 0);
        let failed = workers.run(|| -> u32 { panic!("boom") }).await;
        assert_eq!(failed, Err(WorkersError::Panicked { what: "test", message: "boom".into() }));
        assert_eq!(workers.run(|| 1).await, Ok(1));
    }
}
