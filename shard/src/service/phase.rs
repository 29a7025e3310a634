//! For which group a rank is loaded, and how it gets from one load to the next.

use std::{
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tonic::Status;

use super::{gate::Gate, worker::Job};
use crate::runner::MediaStore;

/// How long a compute thread that shall end may do nothing at all.
const UNLOAD_SILENCE: Duration = Duration::from_secs(10);

/// How long a rank is kept for a group that it does not hear of.
const LEASE: Duration = Duration::from_secs(5);

/// A rank's state, shared by its handlers.
#[derive(Clone, Default)]
pub(super) struct Phase(Arc<Mutex<Inner>>);

#[derive(Default)]
enum Inner {
    #[default]
    Idle,
    Loading(Tenancy),
    Loaded(Tenancy, Loaded),
}

/// One load, from the request for it until its compute thread has ended.
#[derive(Clone)]
pub(super) struct Tenancy {
    /// For whom.
    pub group: u64,
    /// Which of the group's epochs it is in.
    pub gate: Arc<Gate>,
    /// Whether its compute thread has begun. Closes when that has given back all that it had.
    pub alive: watch::Receiver<bool>,
    /// When the group was heard of last.
    pub heard: Instant,
}

/// What a loaded rank is asked through.
#[derive(Clone)]
pub(super) struct Loaded {
    pub media: Arc<MediaStore>,
    pub jobs: mpsc::Sender<Job>,
    pub world_size: usize,
}

impl Phase {
    /// Goes over to a new load, and gives back the one before, which must end first.
    ///
    /// # Errors
    /// Another group uses this rank, or the same one has asked for a later epoch.
    pub fn begin(&self, next: Tenancy) -> Result<Option<Tenancy>, Status> {
        let mut inner = self.lock();
        let before = inner.tenancy().cloned();
        if let Some(before) = &before {
            if before.group == next.group {
                let (epoch, asked) = (next.gate.asked(), before.gate.asked());
                if epoch <= asked {
                    let words = format!("epoch: is {epoch}, it must be larger than {asked}");
                    return Err(Status::invalid_argument(words));
                }
            } else if before.is_used() {
                return Err(Status::unavailable("another server uses this rank"));
            }
        }
        *inner = Inner::Loading(next);
        Ok(before)
    }

    /// A group has asked something.
    pub fn hear(&self, group: u64) {
        if let Some(tenancy) = self.lock().tenancy_mut().filter(|tenancy| tenancy.group == group) {
            tenancy.heard = Instant::now();
        }
    }

    /// A load is done.
    pub fn loaded(&self, gate: &Arc<Gate>, loaded: Loaded) {
        let mut inner = self.lock();
        if let Some(tenancy) = inner.loading(gate) {
            *inner = Inner::Loaded(tenancy, loaded);
        }
    }

    /// A load has failed.
    pub fn failed(&self, gate: &Arc<Gate>) {
        let mut inner = self.lock();
        if inner.loading(gate).is_some() {
            *inner = Inner::Idle;
        }
    }

    /// What the rank is loaded for, and how to ask it.
    ///
    /// # Errors
    /// It is not loaded.
    pub fn ready(&self) -> Result<(Tenancy, Loaded), Status> {
        match &*self.lock() {
            Inner::Loaded(tenancy, loaded) => Ok((tenancy.clone(), loaded.clone())),
            Inner::Idle | Inner::Loading(_) => Err(Status::failed_precondition("this rank is not loaded")),
        }
    }

    /// The gate of what is loaded or loading, and the group that it is loaded for.
    pub fn gate(&self) -> Option<(Arc<Gate>, Option<u64>)> {
        match &*self.lock() {
            Inner::Idle => None,
            Inner::Loading(tenancy) => Some((tenancy.gate.clone(), None)),
            Inner::Loaded(tenancy, _) => Some((tenancy.gate.clone(), Some(tenancy.group))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn tenancy(&self) -> Option<&Tenancy> {
        match self {
            Self::Idle => None,
            Self::Loading(tenancy) | Self::Loaded(tenancy, _) => Some(tenancy),
        }
    }

    fn tenancy_mut(&mut self) -> Option<&mut Tenancy> {
        match self {
            Self::Idle => None,
            Self::Loading(tenancy) | Self::Loaded(tenancy, _) => Some(tenancy),
        }
    }

    /// The load of this gate, unless another one has begun since.
    fn loading(&self, gate: &Arc<Gate>) -> Option<Tenancy> {
        match self {
            Self::Loading(tenancy) if Arc::ptr_eq(&tenancy.gate, gate) => Some(tenancy.clone()),
            _ => None,
        }
    }
}

impl Tenancy {
    fn is_used(&self) -> bool {
        self.heard.elapsed() < LEASE
    }

    /// Ends it, and returns when its memory is free. A thread that neither moves nor ends takes the process with it: the memory
    /// could not be had otherwise.
    pub async fn end(self) {
        self.end_unless_silent(UNLOAD_SILENCE).await;
    }

    async fn end_unless_silent(mut self, silence: Duration) {
        self.gate.close();
        // Until it begins, it waits for the load before it, and looks after that one's end.
        if self.alive.wait_for(|begun| *begun).await.is_err() {
            return;
        }
        let mut reached = self.gate.reached();
        // Nothing more is sent: the channel closes.
        while timeout(silence, self.alive.changed()).await.is_err() {
            let now = self.gate.reached();
            if now == reached {
                tracing::error!("the thread of an earlier load does not end: this process does");
                process::exit(1);
            }
            reached = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_load_that_waits_for_the_one_before_it_may_do_nothing() {
        let (thread, alive) = watch::channel(false);
        let tenancy = Tenancy { group: 1, gate: Gate::new(0, 1), alive, heard: Instant::now() };
        let silence = Duration::from_millis(10);
        let ended = tokio::spawn(tenancy.end_unless_silent(silence));
        tokio::time::sleep(10 * silence).await;
        assert!(!ended.is_finished(), "the thread may still begin");
        drop(thread);
        ended.await.expect("it ends without ever having begun");
    }
}
