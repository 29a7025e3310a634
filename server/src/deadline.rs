//! Deadlines: until when a client waits, and what was going on when that was over.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use crate::limits::DEADLINE_MARGIN;

/// The moment by which something must have happened, if there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// The deadline of a request that arrived at `arrived` and whose client gives up after `timeout`. It is a little
    /// earlier than that, so that the answer is there before the client stops listening.
    pub fn of_request(arrived: Instant, timeout: Duration) -> Self {
        let margin = DEADLINE_MARGIN.min(timeout / 10);
        // What the clock cannot hold is as good as no deadline.
        Deadline(arrived.checked_add(timeout - margin))
    }

    /// A deadline `time` from `now`.
    pub fn within(now: Instant, time: Duration) -> Self {
        Deadline(now.checked_add(time))
    }

    /// The earlier of two deadlines.
    pub fn or_earlier(self, other: Deadline) -> Self {
        Deadline(self.0.into_iter().chain(other.0).min())
    }

    /// Whether it is over at `now`.
    pub fn has_passed(self, now: Instant) -> bool {
        self.0.is_some_and(|at| now >= at)
    }

    /// The output of `work`, which is part of `phase`.
    ///
    /// # Errors
    /// If the deadline passes first; `work` is then dropped.
    pub async fn bound<T>(self, phase: Phase, work: impl Future<Output = T>) -> Result<T, Expired> {
        Alarm::new(self).bound(work).await.ok_or(Expired(phase))
    }
}

/// What a request was waiting for when its deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its message.
    Receiving,
    /// Its media.
    Media,
    /// Its prompt.
    Prompt,
    /// Its first step.
    Queue,
    /// Its first token.
    Prefill,
    /// Its last token.
    Generation,
    /// A short answer that has no phases.
    Answering,
}

impl Phase {
    /// A name for programs.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Receiving => "receiving",
            Phase::Media => "media",
            Phase::Prompt => "prompt",
            Phase::Queue => "queue",
            Phase::Prefill => "prefill",
            Phase::Generation => "generation",
            Phase::Answering => "answering",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Phase::Receiving => "receiving the request",
            Phase::Media => "decoding media",
            Phase::Prompt => "encoding the prompt",
            Phase::Queue => "waiting in the queue",
            Phase::Prefill => "computing the prompt",
            Phase::Generation => "generating the answer",
            Phase::Answering => "answering",
        }
    }
}

/// A request's deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("deadline exceeded while {}", .0.words())]
pub struct Expired(pub Phase);

/// Wakes its task when a deadline passes. The clock is read at every poll: whoever is polled after the deadline learns of
/// it, whatever else woke the task.
#[derive(Debug)]
pub struct Alarm {
    deadline: Deadline,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    /// An alarm for a deadline; it never rings if there is none.
    pub fn new(deadline: Deadline) -> Self {
        Self { deadline, sleep: None }
    }

    /// Whether the deadline has passed.
    pub fn has_rung(&self) -> bool {
        self.deadline.has_passed(Instant::now())
    }

    /// Ready when the deadline has passed.
    pub fn poll_rung(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(at) = self.deadline.0 else { return Poll::Pending };
        if self.has_rung() {
            return Poll::Ready(());
        }
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at.into())));
        sleep.as_mut().poll(cx)
    }

    /// The output of `work`, or nothing if the deadline passes first. What is ready is given out also when it is late.
    pub async fn bound<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => self.poll_rung(cx).map(|()| None),
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    fn soon() -> Deadline {
        Deadline::within(Instant::now(), Duration::from_millis(2))
    }

    #[tokio::test]
    async fn work_ends_at_the_deadline_with_its_phase() {
        let expired = soon().bound(Phase::Queue, pending::<()>()).await.unwrap_err();
        assert_eq!(expired.to_string(), "deadline exceeded while waiting in the queue");
        assert_eq!(Deadline::default().bound(Phase::Queue, ready(1)).await, Ok(1));
    }

    #[tokio::test]
    async fn what_is_ready_is_given_out_and_what_is_not_ends_at_once() {
        let over = Deadline::within(Instant::now(), Duration::ZERO);
        let mut alarm = Alarm::new(over);
        assert_eq!(alarm.bound(ready(1)).await, Some(1));
        assert!(alarm.has_rung());
        assert_eq!(alarm.bound(pending::<()>()).await, None);
        assert_eq!(alarm.bound(pending::<()>()).await, None, "it goes on ringing");
    }

    #[test]
    fn a_deadline_is_kept_before_the_client_gives_up() {
        let now = Instant::now();
        for (timeout_ms, kept_ms) in [(10, 9), (100, 90), (1_000, 980), (60_000, 59_980)] {
            let deadline = Deadline::of_request(now, Duration::from_millis(timeout_ms));
            assert_eq!(deadline, Deadline::within(now, Duration::from_millis(kept_ms)));
        }
        assert!(Deadline::of_request(now, Duration::ZERO).has_passed(now));
        assert_eq!(Deadline::of_request(now, Duration::MAX), Deadline::default());
    }

    #[test]
    fn the_earlier_deadline_counts() {
        let now = Instant::now();
        let [early, late] = [1, 2].map(|s| Deadline::within(now, Duration::from_secs(s)));
        for (a, b, expected) in [
            (early, late, early),
            (late, early, early),
            (Deadline::default(), late, late),
            (late, Deadline::default(), late),
        ] {
            assert_eq!(a.or_earlier(b), expected);
        }
    }
}
