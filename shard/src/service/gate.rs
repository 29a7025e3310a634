//! Which epoch a rank is in, and what other threads may do to the thread that computes: end what it waits for, and see how
//! far it is.
//!
//! A rank goes from epoch to epoch. A call *asks* for one, the compute thread *enters* it (its collectives can be aborted
//! from then on), and when it has met the other ranks it has *joined*. Whoever asks for a later one ends the collectives of
//! whatever was entered, all under one lock: a rank never waits for a group that has been given up.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;

use crate::{
    collective::{Aborter, Checker, Collective, GroupLost},
    progress::Progress,
};

/// The epoch of a rank. Shared by its threads.
pub struct Gate {
    progress: Arc<Progress>,
    /// The latest epoch that was asked for.
    asked: watch::Sender<u64>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The epoch of the numbers of `progress`.
    entered: u64,
    joined: Option<u64>,
    /// The epoch whose stream of steps is open.
    running: Option<u64>,
    meetings: Option<Meetings>,
}

/// How to end the collectives of the entered epoch.
struct Meetings {
    over: Arc<AtomicBool>,
    aborter: Option<Aborter>,
}

/// How far a rank is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The epoch of the numbers.
    pub epoch: u64,
    /// Pieces of work done.
    pub work_pieces: u64,
    /// Meetings begun.
    pub collectives: u64,
    /// Steps answered.
    pub steps: u64,
}

impl Gate {
    /// A rank that will load for `epoch`, with so many threads.
    pub fn new(epoch: u64, threads: usize) -> Arc<Self> {
        Arc::new(Self {
            progress: Arc::new(Progress::new(threads)),
            asked: watch::Sender::new(epoch),
            inner: Mutex::new(Inner { entered: epoch, ..Inner::default() }),
        })
    }

    /// Where the rank's threads count.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// How far the rank is.
    pub fn reached(&self) -> Reached {
        let inner = self.lock();
        Reached {
            epoch: inner.entered,
            work_pieces: self.progress.work_pieces(),
            collectives: self.progress.collectives.get(),
            steps: self.progress.steps.get(),
        }
    }

    /// Asks for a later epoch, and ends the collectives of the one before.
    ///
    /// # Errors
    /// It is not later than one that was asked for: the latest.
    pub fn ask(&self, epoch: u64) -> Result<(), u64> {
        let mut inner = self.lock();
        let latest = *self.asked.borrow();
        if epoch <= latest {
            return Err(latest);
        }
        self.asked.send_replace(epoch);
        inner.end_meetings();
        Ok(())
    }

    /// Asks for an epoch that never comes: whatever waits or streams ends.
    pub fn close(&self) {
        // Closed before, it has nothing to end.
        let _ = self.ask(u64::MAX);
    }

    /// The latest epoch that was asked for.
    pub fn asked(&self) -> u64 {
        *self.asked.borrow()
    }

    /// Returns when an epoch later than `epoch` was asked for.
    pub async fn over(&self, epoch: u64) {
        let mut asked = self.asked.subscribe();
        // The sender is this gate's own.
        let _ = asked.wait_for(|asked| *asked > epoch).await;
    }

    /// Enters an epoch, to meet its ranks by `collective`, of which `aborter` ends the waits: the same collective, counted, and
    /// ended by this gate. The numbers of collectives and steps begin at 0.
    ///
    /// # Errors
    /// A later epoch was asked for.
    pub fn enter<C: Collective>(
        &self,
        epoch: u64,
        collective: C,
        aborter: Option<Aborter>,
    ) -> Result<Counted<C>, GroupLost> {
        let mut inner = self.lock();
        if *self.asked.borrow() != epoch {
            return Err(GroupLost);
        }
        self.progress.collectives.reset();
        self.progress.steps.reset();
        let over = Arc::new(AtomicBool::new(false));
        inner.entered = epoch;
        inner.meetings = Some(Meetings { over: over.clone(), aborter });
        Ok(Counted { inner: collective, over, progress: self.progress.clone() })
    }

    /// Notes that the rank has met the others of an epoch, and takes its steps from now on.
    ///
    /// # Errors
    /// A later epoch was asked for.
    pub fn join(&self, epoch: u64) -> Result<(), GroupLost> {
        let mut inner = self.lock();
        if *self.asked.borrow() != epoch {
            return Err(GroupLost);
        }
        inner.joined = Some(epoch);
        Ok(())
    }

    /// Ends the collectives of the entered epoch, so that no other rank waits for this one.
    pub fn leave(&self) {
        self.lock().end_meetings();
    }

    /// Opens the one stream of steps of the epoch that was joined. A stream of an epoch before is in nobody's way.
    ///
    /// # Errors
    /// No epoch is joined, or its stream is open already: why, in words.
    pub fn open_run(self: &Arc<Self>) -> Result<OpenRun, String> {
        let mut inner = self.lock();
        let asked = *self.asked.borrow();
        let Some(epoch) = inner.joined.filter(|joined| *joined == asked) else {
            return Err(format!("this rank has not joined epoch {asked}"));
        };
        if inner.running == Some(epoch) {
            return Err("steps come on another stream already".into());
        }
        inner.running = Some(epoch);
        Ok(OpenRun { gate: self.clone(), epoch })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics under the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn end_meetings(&mut self) {
        if let Some(Meetings { over, aborter }) = self.meetings.take() {
            over.store(true, Ordering::Release);
            if let Some(aborter) = aborter {
                aborter.abort();
            }
        }
    }
}

/// Held while a stream of steps is open.
pub struct OpenRun {
    gate: Arc<Gate>,
    epoch: u64,
}

impl OpenRun {
    /// Returns when an epoch later than the stream's was asked for.
    pub async fn over(&self) {
        self.gate.over(self.epoch).await;
    }

    /// Its epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
}

impl Drop for OpenRun {
    fn drop(&mut self) {
        self.gate.lock().running.take_if(|epoch| *epoch == self.epoch);
    }
}

/// A collective whose meetings are counted when they begin, and that a [`Gate`] can end.
pub struct Counted<C> {
    inner: C,
    over: Arc<AtomicBool>,
    progress: Arc<Progress>,
}

impl<C> Counted<C> {
    fn begin(&self) -> Result<&C, GroupLost> {
        self.progress.collectives.count();
        // A rank alone waits for nobody, and would work on to the end of its step.
        if self.over.load(Ordering::Acquire) { Err(GroupLost) } else { Ok(&self.inner) }
    }
}

impl<C: Collective> Collective for Counted<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, data: &mut [f32]) -> Result<(), GroupLost> {
        self.begin()?.all_reduce_sum(data)
    }

    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost> {
        self.begin()?.all_gather(mine)
    }

    fn begin_elsewhere(&self) -> Result<(), GroupLost> {
        self.begin()?.begin_elsewhere()
    }

    fn check(&self) -> Result<(), GroupLost> {
        if self.over.load(Ordering::Acquire) { Err(GroupLost) } else { self.inner.check() }
    }

    fn checker(&self) -> Checker {
        let (over, inner) = (self.over.clone(), self.inner.checker());
        Box::new(move || if over.load(Ordering::Acquire) { Err(GroupLost) } else { inner() })
    }

    fn barrier(&self) -> Result<(), GroupLost> {
        self.begin()?.barrier()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Alone;

    #[test]
    fn a_later_epoch_ends_what_was_entered_and_forbids_what_was_not() {
        let gate = Gate::new(4, 1);
        let first = gate.enter(4, Alone, None).expect("asked for");
        first.barrier().expect("not over");
        // A meeting that goes through a GPU is counted as well.
        first.begin_elsewhere().expect("not over");
        let check = first.checker();
        check().expect("not over");
        gate.join(4).expect("asked for");
        assert_eq!(gate.reached(), Reached { epoch: 4, collectives: 2, ..Reached::default() });
        assert_eq!((gate.ask(4), gate.ask(3)), (Err(4), Err(4)));
        gate.ask(6).expect("later");
        assert_eq!([first.barrier(), first.begin_elsewhere(), check()], [Err(GroupLost); 3]);
        assert!(gate.enter(5, Alone, None).is_err() && gate.join(4).is_err());

        let second = gate.enter(6, Alone, None).expect("asked for");
        assert_eq!(gate.reached(), Reached { epoch: 6, ..Reached::default() });
        gate.ask(7).expect("later");
        assert!(gate.join(6).is_err() && second.barrier().is_err());
    }

    #[test]
    fn a_stream_of_steps_is_one_for_each_epoch() {
        let gate = Gate::new(1, 1);
        assert!(gate.open_run().is_err(), "nothing is joined");
        gate.join(1).expect("asked for");
        let old = gate.open_run().expect("the first");
        assert!(gate.open_run().is_err_and(|words| words.contains("another stream")));
        gate.ask(2).expect("later");
        assert!(gate.open_run().is_err_and(|words| words.contains("not joined epoch 2")));
        gate.join(2).expect("asked for");
        let new = gate.open_run().expect("the old one is in nobody's way");
        drop(old);
        assert!(gate.open_run().is_err(), "the old one's end says nothing of the new one");
        drop(new);
        gate.open_run().expect("it has ended");
    }
}
