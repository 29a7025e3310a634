//! The loop: take submissions, schedule, place media, send the step to all ranks, apply a result, emit. One step ahead: the next
//! plan is at the shards before the result of the last one is back.

mod handle;
mod thread;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::trace::SpanContext;
use tokio::sync::mpsc;

use self::handle::{Command, Outside};
pub use self::handle::{EngineError, EngineHandle, Pixels, Submission, Update};
pub use self::thread::EngineThread;
use crate::deadline::Deadline;
use crate::limits::{MAX_FAULTS_OF_A_SEQUENCE, MAX_RESTARTS, STABLE_AFTER};
use crate::scheduler::{Event, MediaHash, Millis, Scheduler, SeqId, StepPlan};
use crate::shards::{Broken, Group, GroupError};

struct Live {
    /// Kept until the sequence ends, since it may have to be computed again.
    pixels: HashMap<MediaHash, Pixels>,
    trace: Option<SpanContext>,
    deadline: Deadline,
    updates: mpsc::UnboundedSender<Update>,
    scheduled: bool,
    /// Since its last token.
    faults: u32,
}

/// Schedules sequences and runs their steps, until it is closed or the shards are lost for good.
pub struct Engine {
    scheduler: Scheduler,
    group: Group,
    outside: Outside,
    live: HashMap<SeqId, Live>,
    started: Instant,
    /// In a row, without a token between them.
    restarts: u32,
}

impl Engine {
    /// An engine over a loaded group, and the way into it.
    pub fn new(scheduler: Scheduler, group: Group) -> (Self, EngineHandle) {
        let (handle, outside) = EngineHandle::new(scheduler.stats());
        let (live, started) = (HashMap::new(), Instant::now());
        (Self { scheduler, group, outside, live, started, restarts: 0 }, handle)
    }

    /// Runs until [`EngineHandle::close`] or until every handle is dropped, then stops the shards. A fault of the shards is a pause:
    /// they are put together again, and all sequences go on from the tokens that they have.
    ///
    /// # Errors
    /// When the shards cannot be kept alive; every sequence has then been told.
    pub async fn run(mut self) -> Result<(), GroupError> {
        let result = self.run_through_faults().await;
        self.outside.moves.send_replace(false);
        if let Err(error) = &result {
            let why: Arc<str> = error.to_string().into();
            self.outside.say_lost(&why);
            for (_, live) in self.live.drain() {
                let _ = live.updates.send(Update::Lost(why.clone()));
            }
        }
        self.group.shutdown().await;
        result
    }

    async fn run_through_faults(&mut self) -> Result<(), GroupError> {
        loop {
            let began = Instant::now();
            match self.steps().await {
                Ok(()) => return Ok(()),
                Err(Broken) => {
                    if self.recover(began.elapsed()).await?.is_break() {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn steps(&mut self) -> Result<(), Broken> {
        loop {
            self.send_plans().await?;
            let idle = self.scheduler.num_in_flight() == 0;
            if idle && !self.live.is_empty() {
                // A fault of the scheduler. All begin anew.
                return Err(self.group.give_up(GroupError::Stuck { sequences: self.live.len() }));
            }
            let Outside { commands, closing, .. } = &mut self.outside;
            tokio::select! {
                result = self.group.receive() => {
                    let events = self.scheduler.apply(now(self.started), result?);
                    self.outside.stats.send_replace(self.scheduler.stats());
                    self.emit(events);
                }
                // Closed only when there is nothing more to come: then it ends with the last step.
                command = commands.recv(), if !commands.is_closed() || !commands.is_empty() || idle => match command {
                    Some(command) => self.take(command),
                    None if idle => return Ok(()),
                    None => {}
                },
                Ok(()) = closing.changed() => commands.close(),
            }
        }
    }

    /// Plans and sends steps, as far ahead as the scheduler goes.
    async fn send_plans(&mut self) -> Result<(), Broken> {
        while !self.scheduler.is_ahead() {
            // First, so that what is abandoned is in no newcomer's way.
            self.cancel_abandoned();
            while let Ok(command) = self.outside.commands.try_recv() {
                self.take(command);
            }
            let Some(plan) = self.scheduler.schedule(now(self.started)) else { break };
            self.tell_scheduled(&plan);
            self.place_media(&plan).await?;
            self.group.send(plan);
        }
        Ok(())
    }

    /// Puts the group together again, after it worked for `worked`, and has everything computed again that it lost; breaks off where
    /// the engine is to end and there is nothing to compute.
    ///
    /// # Errors
    /// When that failed too often.
    async fn recover(&mut self, worked: Duration) -> Result<ControlFlow<()>, GroupError> {
        self.outside.moves.send_replace(false);
        let began = Instant::now();
        if worked >= STABLE_AFTER {
            self.restarts = 0;
        }
        let mut fault = self.group.diagnose().await;
        self.blame_sequences(&fault);
        loop {
            tracing::error!(
                restarts = self.restarts,
                sequences = self.live.len(),
                "restarting after a fault: {fault}"
            );
            if self.restarts == MAX_RESTARTS {
                return Err(fault);
            }
            self.restarts += 1;
            self.cancel_abandoned();
            let restarted = tokio::select! {
                restarted = self.group.restart(&fault) => restarted,
                () = self.outside.closed_and_empty(), if self.live.is_empty() => return Ok(ControlFlow::Break(())),
            };
            match restarted {
                Ok(()) => break,
                Err(again) => fault = again,
            }
        }
        self.scheduler.replay();
        self.outside.stats.send_replace(self.scheduler.stats());
        self.outside.moves.send_replace(true);
        tracing::warn!(sequences = self.live.len(), "the shards are back after {:?}", began.elapsed());
        Ok(ControlFlow::Continue(()))
    }

    /// Counts the fault against the sequences that the shards worked on, and ends those that were there too often.
    fn blame_sequences(&mut self, fault: &GroupError) {
        let Self { scheduler, live, .. } = self;
        live.retain(|id, live| {
            live.faults += u32::from(scheduler.is_running(*id));
            let is_suspect = live.faults >= MAX_FAULTS_OF_A_SEQUENCE;
            if is_suspect {
                let why = format!(
                    "the shards were lost {} times in a row while they computed this: {fault}",
                    live.faults
                );
                let _ = live.updates.send(Update::Lost(why.into()));
                scheduler.cancel(*id);
            }
            !is_suspect
        });
    }

    fn take(&mut self, command: Command) {
        let Command { submission, updates, accepted } = command;
        let Submission { sequence, pixels, trace, deadline } = submission;
        if updates.iter().all(mpsc::UnboundedSender::is_closed) {
            return;
        }
        let ids: Vec<SeqId> = std::iter::once(sequence.id).chain(sequence.forks.iter().copied()).collect();
        let result = self.scheduler.submit(now(self.started), sequence);
        if result.is_ok() {
            for (id, updates) in ids.into_iter().zip(updates) {
                let (pixels, trace) = (pixels.clone(), trace.clone());
                self.live.insert(id, Live { pixels, trace, deadline, updates, scheduled: false, faults: 0 });
            }
        }
        // A client that has just gone is found by `cancel_abandoned`.
        let _ = accepted.send(result);
    }

    fn cancel_abandoned(&mut self) {
        let (scheduler, now) = (&mut self.scheduler, Instant::now());
        self.live.retain(|id, live| {
            // A stream's deadline is kept here too: a client that reads nothing never lets its handler look at the clock.
            let abandoned = live.updates.is_closed() || live.deadline.has_passed(now);
            if abandoned {
                scheduler.cancel(*id);
            }
            !abandoned
        });
    }

    /// Pixels reach the shards once, right before the step that begins to encode them. They go when they are encoded, or when
    /// a plan evicts what is half done.
    async fn place_media(&mut self, plan: &StepPlan) -> Result<(), Broken> {
        for encode in plan.encodes.iter().filter(|encode| encode.is_first()) {
            let pixels = self.live.values().find_map(|live| live.pixels.get(&encode.hash));
            let pixels = pixels.expect("a medium is encoded only for a live sequence that has it").clone();
            self.group.put_media(encode.hash, pixels.grid, pixels.data).await?;
        }
        Ok(())
    }

    /// Tells the sequences that are in a plan for the first time, before its step has run: whoever gives up meanwhile has
    /// not waited in the queue.
    fn tell_scheduled(&mut self, plan: &StepPlan) {
        let now = Instant::now();
        for admission in &plan.admissions {
            if let Some(live) = self.live.get_mut(&admission.id) {
                if let Some(trace) = &live.trace {
                    self.group.trace(admission.id, trace.clone());
                }
                if !std::mem::replace(&mut live.scheduled, true) {
                    let cached_tokens = admission.num_computed_tokens;
                    let _ = live.updates.send(Update::Scheduled { at: now, cached_tokens });
                }
            }
        }
    }

    /// Passes events of a step on to their sequences.
    fn emit(&mut self, events: Vec<Event>) {
        let now = Instant::now();
        for event in events {
            let (id, update) = match event {
                // Told before the step.
                Event::Scheduled { .. } | Event::PrefillDone { .. } => continue,
                Event::Encoded { id, vision_us, .. } => (id, Update::Encoded(vision_us)),
                Event::Token { id, token } => (id, Update::Token(token, now)),
                Event::Finished { id, reason, .. } => (id, Update::Finished(reason)),
                Event::Failed { id, failure, .. } => {
                    tracing::error!(sequence = id.0, "{failure}");
                    (id, Update::Failed(failure))
                }
            };
            let ended = matches!(update, Update::Finished(_) | Update::Failed(_));
            let Some(live) = self.live.get_mut(&id) else { continue };
            if matches!(update, Update::Token(..)) {
                (live.faults, self.restarts) = (0, 0);
            }
            // A receiver that is gone is found by `cancel_abandoned` before the next step.
            let _ = live.updates.send(update);
            if ended {
                self.live.remove(&id);
            }
        }
    }
}

fn now(started: Instant) -> Millis {
    Millis(started.elapsed().as_millis() as u64)
}
