//! Looks whether ranks move.
//!
//! It counts how often it looked in vain, not seconds: where this process itself was not allowed to run, nobody is accused.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use lockstep_proto::shard as pb;
use tokio::{sync::watch, task::JoinHandle, time::MissedTickBehavior};

use super::rank::Rank;

/// How often it looks before a rank is silent.
const LOOKS: u32 = 10;
/// How many times longer a rank that loads may stay at the same byte: disks do.
const LOADING_PATIENCE: u32 = 30;

/// Watches ranks until it is dropped.
pub(super) struct Watchdog {
    alarm: watch::Receiver<Option<Vec<u32>>>,
    silence: Duration,
    task: JoinHandle<()>,
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watchdog {
    /// Of ranks that run steps while `works` says so.
    pub fn of_steps(ranks: Vec<Rank>, silence: Duration, works: Arc<AtomicBool>) -> Self {
        Self::new(ranks, silence, move || if works.load(Ordering::Relaxed) { LOOKS } else { u32::MAX })
    }

    /// Of ranks that load.
    pub fn of_loading(ranks: Vec<Rank>, silence: Duration) -> Self {
        Self::new(ranks, silence, || LOOKS * LOADING_PATIENCE)
    }

    fn new(ranks: Vec<Rank>, silence: Duration, patience: impl Fn() -> u32 + Send + 'static) -> Self {
        let (raise, alarm) = watch::channel(None);
        let task = tokio::spawn(async move {
            let ranks = silent(&ranks, silence / LOOKS, patience).await;
            raise.send_replace(Some(ranks));
        });
        Self { alarm, silence, task }
    }

    /// Returns when ranks are silent: which, and for how long.
    pub async fn alarm(&mut self) -> (Vec<u32>, Duration) {
        let ranks = self.alarm.wait_for(Option::is_some).await.ok().and_then(|ranks| ranks.clone());
        match ranks {
            Some(ranks) => (ranks, self.silence),
            None => std::future::pending().await,
        }
    }
}

/// What was seen of the ranks' work.
#[derive(Default)]
struct Seen {
    /// By rank, as it said last.
    progress: Vec<Option<pb::GetProgressResponse>>,
    /// How often in a row each did not answer.
    unanswered: Vec<u32>,
    /// How often in a row nothing had moved at any rank.
    unmoved: u32,
}

impl Seen {
    /// Takes what the ranks say now; none is a rank that does not answer.
    fn look(&mut self, now: Vec<Option<pb::GetProgressResponse>>) {
        self.unanswered.resize(now.len(), 0);
        self.progress.resize(now.len(), None);
        let mut moved = false;
        for ((now, before), unanswered) in now.into_iter().zip(&mut self.progress).zip(&mut self.unanswered) {
            *unanswered = if now.is_some() { 0 } else { *unanswered + 1 };
            if now.is_some() && now != *before {
                moved = true;
                *before = now;
            }
        }
        self.unmoved = if moved { 0 } else { self.unmoved + 1 };
    }

    /// The ranks at fault, if any are: those that do not answer; or, where nothing moved for `patience` looks, those that the
    /// others wait for.
    fn silent(&self, patience: u32) -> Vec<u32> {
        if self.unanswered.iter().any(|looks| *looks >= LOOKS) {
            // What stops one may have stopped others a moment later, and to find out one after the other takes each its time.
            let with_it = (0..).zip(&self.unanswered).filter(|(_, looks)| **looks > LOOKS / 2);
            return with_it.map(|(rank, _)| rank).collect();
        }
        if self.unmoved < patience {
            return vec![];
        }
        let meetings =
            |progress: &Option<pb::GetProgressResponse>| progress.as_ref().map(|it| it.collectives);
        let fewest = self.progress.iter().map(meetings).min().flatten();
        let late = (0..).zip(&self.progress).filter(|(_, progress)| meetings(progress) <= fewest);
        late.map(|(rank, _)| rank).collect()
    }
}

async fn silent(ranks: &[Rank], interval: Duration, patience: impl Fn() -> u32) -> Vec<u32> {
    let mut seen = Seen::default();
    let mut looks = tokio::time::interval(interval);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let patience = patience();
        if patience == u32::MAX {
            // Nothing to do: what was not done meanwhile is nobody's fault.
            seen.unmoved = 0;
        }
        seen.look(join_all(ranks.iter().map(|rank| rank.progress(interval))).await);
        let silent = seen.silent(patience);
        if !silent.is_empty() {
            return silent.into_iter().map(|index| ranks[index as usize].number()).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(work_pieces: u64, collectives: u64) -> Option<pb::GetProgressResponse> {
        Some(pb::GetProgressResponse { epoch: 1, work_pieces, collectives, ..Default::default() })
    }

    #[test]
    fn a_rank_that_does_not_answer_is_silent_also_without_work() {
        let mut seen = Seen::default();
        for _ in 0..LOOKS {
            assert!(seen.silent(u32::MAX).is_empty());
            seen.look(vec![at(1, 1), None]);
        }
        assert_eq!(seen.silent(u32::MAX), [1]);
        seen.look(vec![at(1, 1), at(0, 0)]);
        assert!(seen.silent(u32::MAX).is_empty());
    }

    #[test]
    fn what_stops_a_moment_later_is_silent_too() {
        let mut seen = Seen::default();
        seen.look(vec![at(1, 1), None, at(1, 1)]);
        for look in 1..LOOKS {
            assert!(seen.silent(u32::MAX).is_empty());
            let third = if look < LOOKS - 2 { at(1, 1) } else { None };
            seen.look(vec![None, None, third]);
        }
        assert_eq!(seen.silent(u32::MAX), [0, 1]);
    }

    #[test]
    fn one_that_the_others_wait_for_is_silent_when_nothing_moves() {
        let mut seen = Seen::default();
        for _ in 0..=LOOKS {
            assert!(seen.silent(LOOKS).is_empty());
            seen.look(vec![at(50, 8), at(90, 7), at(40, 8)]);
        }
        assert_eq!(seen.silent(LOOKS), [1]);
    }

    #[test]
    fn slow_work_is_no_silence() {
        let mut seen = Seen::default();
        for piece in 0..5 * u64::from(LOOKS) {
            // The others have waited at their next meeting for long.
            seen.look(vec![at(50, 8), at(90 + piece / 5, 7)]);
            assert!(seen.silent(LOOKS).is_empty());
        }
    }
}
