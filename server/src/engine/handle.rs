//! The way into the engine, and what comes out of it.

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
    DrawFailure, FinishReason, MediaHash, NewSequence, SampledToken, SeqId, Stats, SubmitError,
};

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
    Scheduled {
        /// Since when.
        at: Instant,
        /// Tokens of its prompt that were found computed.
        cached_tokens: u32,
    },
    /// A piece of a medium was encoded, in this many microseconds.
    Encoded(u64),
    /// A token was drawn.
    Token(SampledToken, Instant),
    /// It ended. The last update.
    Finished(FinishReason),
    /// No token could be drawn for it. The last update.
    Failed(DrawFailure),
    /// The shards are gone, or were lost again and again while they worked on it. The last update.
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

pub(super) struct Command {
    pub submission: Submission,
    /// Of the sequence and its forks. As many updates as each may have tokens, and a few: bounded by the sequence itself.
    pub updates: Vec<mpsc::UnboundedSender<Update>>,
    pub accepted: oneshot::Sender<Result<(), SubmitError>>,
}

/// The way into the engine. Dropping a receiver that [`EngineHandle::submit`] returns cancels its sequence.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    next_id: Arc<AtomicU64>,
    lost: Arc<RwLock<Option<Arc<str>>>>,
    closing: Arc<watch::Sender<bool>>,
    moves: watch::Receiver<bool>,
    stats: watch::Receiver<Stats>,
}

/// The engine's end of its handles.
pub(super) struct Outside {
    pub commands: mpsc::Receiver<Command>,
    /// Whether the engine is to end when it has nothing to do.
    pub closing: watch::Receiver<bool>,
    /// Whether steps move.
    pub moves: watch::Sender<bool>,
    /// The scheduler's, as of the last result.
    pub stats: watch::Sender<Stats>,
    lost: Arc<RwLock<Option<Arc<str>>>>,
}

impl Outside {
    /// Returns when the engine is to end, if no sequence waits to be taken then.
    pub async fn closed_and_empty(&self) {
        // On a copy: what is seen here is news to others still.
        let closed = self.closing.clone().wait_for(|closing| *closing).await.is_ok();
        if !closed || !self.commands.is_empty() {
            std::future::pending::<()>().await;
        }
    }

    /// Tells all who ask from now on why there is no engine any more.
    pub fn say_lost(&mut self, why: &Arc<str>) {
        *self.lost.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(why.clone());
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            drop(command.accepted);
        }
    }
}

impl EngineHandle {
    /// A handle, and the engine's end of it.
    pub(super) fn new(stats: Stats) -> (Self, Outside) {
        let (sender, commands) = mpsc::channel(ENGINE_QUEUE);
        let lost = Arc::new(RwLock::new(None));
        let (close, closing) = watch::channel(false);
        let (tell, moves) = watch::channel(true);
        let (publish, stats) = watch::channel(stats);
        let (next_id, close) = (Arc::default(), Arc::new(close));
        let handle = Self { commands: sender, next_id, lost: lost.clone(), closing: close, moves, stats };
        (handle, Outside { commands, closing, moves: tell, stats: publish, lost })
    }

    /// Whether steps move: false while the shards are put together again.
    pub fn moves(&self) -> watch::Receiver<bool> {
        self.moves.clone()
    }

    /// How full the scheduler is and what it has done, as of the last result.
    pub fn stats(&self) -> watch::Receiver<Stats> {
        self.stats.clone()
    }

    /// Lets the engine take no more sequences, and end when those that it has are done. Whatever is submitted after this is refused.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Whether a sequence may be submitted: for those that have much to do before they do.
    ///
    /// # Errors
    /// The engine was closed, or the shards are gone.
    pub fn check_open(&self) -> Result<(), EngineError> {
        let is_open = !*self.closing.borrow() && !self.commands.is_closed();
        if is_open { Ok(()) } else { Err(EngineError::Lost(self.why_lost())) }
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
        // The engine may not have noticed yet.
        self.check_open()?;
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
