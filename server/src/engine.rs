//! The loop: take submissions, schedule, place media, run the step on all ranks, apply the result, emit.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use bytes::Bytes;
use opentelemetry::trace::SpanContext;
use tokio::sync::{mpsc, oneshot, watch};

use crate::deadline::Deadline;
use crate::limits::ENGINE_QUEUE;
use crate::scheduler::{
    DrawFailure, Event, FinishReason, MediaHash, Millis, NewSequence, SampledToken, Scheduler, SeqId,
    StepPlan, SubmitError,
};
use crate::shards::{Group, GroupError, GroupHandle};

/// Pixels of a medium at the model's size, ready for the shards.
#[derive(Clone, Debug)]
pub struct Pixels {
    /// Patches in time, height and width.
    pub grid: [u32; 3],
    /// Frames, rows, columns, RGB.
    pub data: Bytes,
}

/// A sequence, with its forks, on its way into the engine.
pub struct Submission {
    /// What to compute. Its id and those of its forks come from [`EngineHandle::next_id`].
    pub sequence: NewSequence,
    /// Pixels of all its media.
    pub pixels: HashMap<MediaHash, Pixels>,
    /// The trace that its work is part of.
    pub trace: Option<SpanContext>,
    /// When nobody waits for it any more. All updates then end, without a last one.
    pub deadline: Deadline,
}

/// What happens to a sequence.
#[derive(Debug)]
pub enum Update {
    /// It is part of a step for the first time.
    Scheduled(Instant),
    /// A piece of a medium was encoded, in this many microseconds.
    Encoded(u64),
    /// A token was drawn.
    Token(SampledToken, Instant),
    /// It ended. The last update.
    Finished(FinishReason),
    /// No token could be drawn for it. The last update.
    Failed(DrawFailure),
    /// The shards are gone. The last update.
    Lost(Arc<str>),
}

/// Why a sequence was not taken.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The scheduler refused it.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// The engine's own queue is full.
    #[error("{ENGINE_QUEUE} requests wait for the engine already")]
    Busy,
    /// The shards are gone.
    #[error("{0}")]
    Lost(Arc<str>),
}

struct Command {
    submission: Submission,
    /// Of the sequence and its forks. As many updates as each may have tokens, and a few: bounded by the sequence itself.
    updates: Vec<mpsc::UnboundedSender<Update>>,
    accepted: oneshot::Sender<Result<(), SubmitError>>,
}

/// The way into the engine. Dropping a receiver that [`EngineHandle::submit`] returns cancels its sequence.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    next_id: Arc<AtomicU64>,
    lost: Arc<RwLock<Option<Arc<str>>>>,
    closing: Arc<watch::Sender<bool>>,
}

impl EngineHandle {
    /// Lets the engine take no more sequences, and end when those that it has are done.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// An id that no other sequence has.
    pub fn next_id(&self) -> SeqId {
        SeqId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands a sequence over, and returns its updates, and those of each of its forks.
    ///
    /// # Errors
    /// When a queue is full, the sequence could never run, or the shards are gone.
    pub async fn submit(
        &self,
        submission: Submission,
    ) -> Result<Vec<mpsc::UnboundedReceiver<Update>>, EngineError> {
        let channels = (0..=submission.sequence.forks.len()).map(|_| mpsc::unbounded_channel());
        let (updates, receivers) = channels.unzip();
        let (accepted, answer) = oneshot::channel();
        let command = Command { submission, updates, accepted };
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Busy,
            mpsc::error::TrySendError::Closed(_) => EngineError::Lost(self.why_lost()),
        })?;
        answer.await.map_err(|_| EngineError::Lost(self.why_lost()))??;
        Ok(receivers)
    }

    fn why_lost(&self) -> Arc<str> {
        let lost = self.lost.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let otherwise = if *self.closing.borrow() { "the server is stopping" } else { "the engine stopped" };
        lost.clone().unwrap_or_else(|| otherwise.into())
    }
}

struct Live {
    pixels: HashMap<MediaHash, Pixels>,
    trace: Option<SpanContext>,
    deadline: Deadline,
    updates: mpsc::UnboundedSender<Update>,
}

/// Schedules sequences and runs their steps, until it is closed or the shards are lost.
pub struct Engine {
    scheduler: Scheduler,
    group: Group,
    shards: GroupHandle,
    commands: mpsc::Receiver<Command>,
    live: HashMap<SeqId, Live>,
    started: Instant,
    lost: Arc<RwLock<Option<Arc<str>>>>,
    closing: watch::Receiver<bool>,
}

impl Engine {
    /// An engine over a loaded group, and the way into it.
    pub fn new(scheduler: Scheduler, group: Group) -> (Self, EngineHandle) {
        let (sender, commands) = mpsc::channel(ENGINE_QUEUE);
        let lost = Arc::new(RwLock::new(None));
        let (close, closing) = watch::channel(false);
        let (next_id, closing_sender) = (Arc::default(), Arc::new(close));
        let handle = EngineHandle { commands: sender, next_id, lost: lost.clone(), closing: closing_sender };
        let shards = group.handle();
        let engine = Engine {
            scheduler,
            group,
            shards,
            commands,
            live: HashMap::new(),
            started: Instant::now(),
            lost,
            closing,
        };
        (engine, handle)
    }

    /// Runs until [`EngineHandle::close`] or until every handle is dropped, then stops the shards.
    ///
    /// # Errors
    /// When a rank dies or the ranks disagree; every sequence has then been told.
    pub async fn run(mut self) -> Result<(), GroupError> {
        let result = self.steps().await;
        if let Err(error) = &result {
            self.tell_lost(&error.to_string());
        }
        self.group.shutdown().await;
        result
    }

    async fn steps(&mut self) -> Result<(), GroupError> {
        loop {
            if *self.closing.borrow_and_update() {
                self.commands.close();
            }
            // First, so that what is abandoned is in no newcomer's way.
            self.cancel_abandoned();
            while let Ok(command) = self.commands.try_recv() {
                self.take(command);
            }
            let Some(plan) = self.scheduler.schedule(self.now()) else {
                if self.wait().await? {
                    continue;
                }
                return Ok(());
            };
            self.tell_scheduled(&plan);
            self.place_media(&plan).await?;
            let result = self.group.run(&plan).await?;
            let events = self.scheduler.apply(self.now(), result);
            self.emit(events);
        }
    }

    /// Waits for a command when there is nothing to do. False when there is none to come.
    async fn wait(&mut self) -> Result<bool, GroupError> {
        assert!(self.live.is_empty(), "a live sequence has something to compute");
        tokio::select! {
            command = self.commands.recv() => match command {
                Some(command) => {
                    self.take(command);
                    Ok(true)
                }
                None => Ok(false),
            },
            Ok(()) = self.closing.changed() => Ok(true),
            error = self.shards.lost() => Err(error),
        }
    }

    fn take(&mut self, command: Command) {
        let Command { submission, updates, accepted } = command;
        let Submission { sequence, pixels, trace, deadline } = submission;
        if updates.iter().all(mpsc::UnboundedSender::is_closed) {
            return;
        }
        let ids: Vec<SeqId> = std::iter::once(sequence.id).chain(sequence.forks.iter().copied()).collect();
        let result = self.scheduler.submit(self.now(), sequence);
        if result.is_ok() {
            for (id, updates) in ids.into_iter().zip(updates) {
                let (pixels, trace) = (pixels.clone(), trace.clone());
                self.live.insert(id, Live { pixels, trace, deadline, updates });
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
    async fn place_media(&mut self, plan: &StepPlan) -> Result<(), GroupError> {
        for encode in plan.encodes.iter().filter(|encode| encode.is_first()) {
            let pixels = self.live.values().find_map(|live| live.pixels.get(&encode.hash));
            let pixels = pixels.expect("a medium is encoded only for a live sequence that has it").clone();
            self.shards.put_media(encode.hash, pixels.grid, pixels.data).await?;
        }
        Ok(())
    }

    /// Tells the sequences that are in a plan for the first time, before its step has run: whoever gives up meanwhile has
    /// not waited in the queue.
    fn tell_scheduled(&mut self, plan: &StepPlan) {
        let now = Instant::now();
        for admission in &plan.admissions {
            if let Some(live) = self.live.get_mut(&admission.id) {
                if let Some(trace) = live.trace.take() {
                    self.group.trace(admission.id, trace);
                }
                let _ = live.updates.send(Update::Scheduled(now));
            }
        }
    }

    /// Passes events of a step on to their sequences.
    fn emit(&mut self, events: Vec<Event>) {
        let now = Instant::now();
        for event in events {
            let (id, update) = match event {
                // Told before the step.
                Event::Scheduled { .. } => continue,
                Event::Encoded { id, vision_us, .. } => (id, Update::Encoded(vision_us)),
                Event::PrefillDone { id, .. } => {
                    // The scheduler keeps a sequence's features until it ends, also where it is preempted, so that none
                    // of its media is encoded again.
                    if let Some(live) = self.live.get_mut(&id) {
                        live.pixels.clear();
                    }
                    continue;
                }
                Event::Token { id, token } => (id, Update::Token(token, now)),
                Event::Finished { id, reason, .. } => (id, Update::Finished(reason)),
                Event::Failed { id, failure, .. } => {
                    tracing::error!(sequence = id.0, "{failure}");
                    (id, Update::Failed(failure))
                }
            };
            let ended = matches!(update, Update::Finished(_) | Update::Failed(_));
            if let Some(live) = self.live.get(&id) {
                // A receiver that is gone is found by `cancel_abandoned` before the next step.
                let _ = live.updates.send(update);
            }
            if ended {
                self.live.remove(&id);
            }
        }
    }

    fn tell_lost(&mut self, why: &str) {
        let why: Arc<str> = why.into();
        *self.lost.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(why.clone());
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            drop(command.accepted);
        }
        for (_, live) in self.live.drain() {
            let _ = live.updates.send(Update::Lost(why.clone()));
        }
    }

    fn now(&self) -> Millis {
        Millis(self.started.elapsed().as_millis() as u64)
    }
}
