//! Putting a group together, at first and after a fault. Ranks that live keep their weights.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{
    StreamExt,
    future::{Either, select},
    stream::FuturesUnordered,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    config::{GroupConfig, ShardSource},
    elsewhere::Elsewhere,
    error::{GroupError, RankError, RankFault, StartError, cannot},
    group::{Group, Joined},
    hosted::Hosted,
    meeting::Meeting,
    rank::{Member, Rank, all},
    types::{LoadProgress, Loaded, MemoryPlan, ModelDescription},
    watchdog::Watchdog,
};
use crate::limits::{GRACE, MAX_FIRST_STARTS, REGROUP_TIMEOUT, TAKEOVER_TIMEOUT};

/// What fails where there is no memory for a meeting.
const MEET: &str = "make the memory that shards meet in";
/// Between two attempts to start.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// The processes of a group's shards.
pub(super) enum Processes {
    Hosted(Hosted),
    Elsewhere(Elsewhere),
}

impl Processes {
    fn new(config: &GroupConfig, group: u64) -> Result<Self, StartError> {
        Ok(match &config.source {
            ShardSource::Children { command } => {
                Self::Hosted(Hosted::new(command.as_deref(), config.world_size, config.shard_environment())?)
            }
            ShardSource::Elsewhere(addresses) => Self::Elsewhere(Elsewhere::new(addresses, group)),
        })
    }

    /// A process for a rank, for an epoch: a new one, or whatever there is elsewhere.
    async fn start(&mut self, rank: u32, meeting: &Meeting) -> Result<Member, StartError> {
        match self {
            Self::Hosted(hosted) => hosted.start(rank, meeting).await,
            Self::Elsewhere(elsewhere) => Ok(elsewhere.member(rank)),
        }
    }

    /// Ranks that must load again after a fault, beside those that have nothing loaded. A child at fault is killed, whatever it is at;
    /// one that runs elsewhere has done nothing wrong where only the way to it is broken.
    fn suspects(&self, fault: &GroupError) -> Vec<u32> {
        match self {
            Self::Hosted(_) => fault.suspects(),
            Self::Elsewhere(_) => fault.distrusted(),
        }
    }

    /// The ranks that have their weights still, connected, and the numbers of the others.
    async fn survivors(
        &self,
        before: &[Rank],
        suspects: &BTreeSet<u32>,
        group: u64,
    ) -> Result<(Vec<Rank>, Vec<u32>), StartError> {
        let has_weights = |rank: &Rank| !rank.is_dead() && !suspects.contains(&rank.number());
        let survivors: Vec<Rank> = match self {
            Self::Hosted(_) => before.iter().filter(|rank| has_weights(rank)).cloned().collect(),
            Self::Elsewhere(elsewhere) => {
                let reaching = all(before.iter().map(|rank| elsewhere.reach(rank.number())));
                let reached = reaching.await.map_err(StartError::Ranks)?;
                let loaded = reached.into_iter().filter(|(_, loaded_for)| *loaded_for == group);
                loaded.map(|(rank, _)| rank).filter(has_weights).collect()
            }
        };
        let survives = |number: &u32| survivors.iter().any(|rank| rank.number() == *number);
        let lost = before.iter().map(Rank::number).filter(|number| !survives(number)).collect();
        Ok((survivors, lost))
    }

    /// Kills ranks that are children, and returns when they are gone, or left behind.
    async fn kill(&mut self, ranks: &[u32]) {
        if let Self::Hosted(hosted) = self {
            hosted.kill(ranks.iter().copied()).await;
        }
    }

    /// Kills the shards that are children, and returns when they are gone, or left behind.
    pub async fn shutdown(self) {
        match self {
            Self::Hosted(hosted) => hosted.shutdown().await,
            Self::Elsewhere(_) => {}
        }
    }
}

impl Group {
    /// Loads the model into all shards, after starting those that are to be children of this process. `progress` has one entry for
    /// each rank. Where a rank is killed or falls silent, all begin again, a few times.
    ///
    /// # Errors
    /// With all that went wrong, by rank. No child is left then.
    ///
    /// # Panics
    /// If the world size is 0.
    pub async fn start(
        config: &GroupConfig,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<(Self, Vec<MemoryPlan>), StartError> {
        assert!(config.world_size > 0, "a group has a rank 0");
        let (began, mut starts) = (Instant::now(), 1);
        let mut meeting = Meeting::first().map_err(cannot(MEET))?;
        loop {
            let mut processes = Processes::new(config, meeting.group)?;
            match join(config, &meeting, &mut processes, progress).await {
                Ok((joined, plans)) => {
                    meeting.close_earlier();
                    return Ok((Self::of(config.clone(), processes, meeting, joined), plans));
                }
                Err(error) => {
                    processes.shutdown().await;
                    // Shards elsewhere are kept for a server that is gone until they have not heard of it for a while.
                    let are_kept = error.is_unavailable() && began.elapsed() < TAKEOVER_TIMEOUT;
                    if !are_kept && (starts == MAX_FIRST_STARTS || !error.may_pass()) {
                        return Err(error);
                    }
                    tracing::warn!("starting the shards again: {error}");
                    starts += u32::from(!are_kept);
                    sleep(RETRY_INTERVAL).await;
                    meeting.advance().map_err(cannot(MEET))?;
                }
            }
        }
    }

    /// Puts the group together again after `fault`, as its next epoch: kills and starts the ranks at fault, or connects again to those
    /// that run elsewhere; has the others leave the old epoch with their weights, and lets all meet. What sequences and features the
    /// group had is forgotten. The steps of the new epoch begin at 0.
    ///
    /// # Errors
    /// A rank that was started anew failed, or read other weights than before. It may be called again, with that.
    pub async fn restart(&mut self, fault: &GroupError) -> Result<(), GroupError> {
        // Also those of attempts before this one, which are not tried yet.
        self.suspects.extend(self.processes.suspects(fault));
        let began = Instant::now();
        loop {
            let mut staying = self.num_staying();
            let Err(error) = self.restart_ranks(&mut staying).await else {
                self.suspects.clear();
                return Ok(());
            };
            // Another server has begun to take what was new here, or it takes a moment until it can be reached.
            if error.is_unavailable() && began.elapsed() < TAKEOVER_TIMEOUT {
                tracing::warn!("putting the shards together again: {error}");
                sleep(RETRY_INTERVAL).await;
                continue;
            }
            let again = GroupError::NotRestarted(Arc::new(error));
            self.suspects.extend(self.processes.suspects(&again));
            // What takes several ranks takes them one after the other. It is one fault, and each can fall only once.
            if self.num_staying() == staying {
                return Err(again);
            }
            tracing::warn!("another shard fell with the first: {again}");
        }
    }

    /// Ranks of the last epoch that may keep their weights.
    fn num_staying(&self) -> usize {
        self.ranks.borrow().iter().filter(|rank| !self.is_lost(rank)).count()
    }

    fn is_lost(&self, rank: &Rank) -> bool {
        rank.is_dead() || self.suspects.contains(&rank.number())
    }

    /// One attempt. Sets how many ranks keep their weights in it.
    async fn restart_ranks(&mut self, staying: &mut usize) -> Result<(), StartError> {
        self.forget_steps();
        self.meeting.advance().map_err(cannot(MEET))?;
        let before = self.ranks.borrow().clone();
        let (survivors, lost) = self.processes.survivors(&before, &self.suspects, self.meeting.group).await?;
        tracing::warn!(
            "epoch {}: of {} shards {lost:?} load their weights",
            self.meeting.epoch,
            before.len()
        );
        *staying = survivors.len();
        // Until all have met: what they load in vain this time is not compared with what they had.
        self.suspects.extend(&lost);
        self.processes.kill(&lost).await;
        // If this fails these count as dead, and are started once more the next time.
        let mut members = vec![];
        for rank in lost {
            members.push(self.processes.start(rank, &self.meeting).await?);
        }
        let (config, meeting) = (&self.config, &self.meeting);
        let regrouping = stay(&survivors, meeting);
        let progress = watch::Sender::new(vec![LoadProgress::default(); before.len()]);
        let returning = load(members, meeting, config, &progress, true);
        let ((), (returned, loaded)) =
            while_alive(&survivors, config.silence, both(regrouping, returning)).await?;
        self.meeting.close_earlier();
        for (rank, loaded) in returned.iter().map(Rank::number).zip(&loaded) {
            if self.weights_checksums[rank as usize] != loaded.weights_checksum {
                return Err(StartError::OtherWeights { rank });
            }
        }
        let numbers: Vec<u32> = returned.iter().map(Rank::number).collect();
        let mut ranks: Vec<Rank> = survivors.into_iter().chain(returned).collect();
        ranks.sort_by_key(Rank::number);
        let descriptions = numbers.into_iter().zip(loaded.into_iter().map(|loaded| loaded.description));
        let agreed = agree(self.description.clone(), descriptions)?;
        self.description.clone_from(&agreed);
        self.steps = all(ranks.iter().map(Rank::steps)).await.map_err(StartError::Ranks)?;
        self.watchdog = Watchdog::of_steps(ranks.clone(), self.config.silence, self.works.clone());
        self.ranks.send_replace(ranks.into());
        Ok(())
    }
}

/// Starts all ranks and loads the model into them.
async fn join(
    config: &GroupConfig,
    meeting: &Meeting,
    processes: &mut Processes,
    progress: &watch::Sender<Vec<LoadProgress>>,
) -> Result<(Joined, Vec<MemoryPlan>), StartError> {
    progress.send_replace(vec![LoadProgress::default(); config.world_size as usize]);
    let mut members = vec![];
    for rank in 0..config.world_size {
        members.push(processes.start(rank, meeting).await?);
    }
    let (ranks, loaded) = load(members, meeting, config, progress, false).await?;
    let weights_checksums = loaded.iter().map(|loaded| loaded.weights_checksum).collect();
    let (plans, descriptions): (_, Vec<ModelDescription>) =
        loaded.into_iter().map(|loaded| (loaded.plan, loaded.description)).unzip();
    let description = agree(descriptions[0].clone(), (0..).zip(descriptions))?;
    let steps = all(ranks.iter().map(Rank::steps)).await.map_err(StartError::Ranks)?;
    Ok((Joined { description, weights_checksums, ranks, steps }, plans))
}

/// Does `work`, unless one of these ranks, which have nothing to do meanwhile, dies or falls silent.
async fn while_alive<T>(
    ranks: &[Rank],
    silence: Duration,
    work: impl Future<Output = Result<T, StartError>>,
) -> Result<T, StartError> {
    let mut watchdog = Watchdog::of_steps(ranks.to_vec(), silence, Arc::default());
    let mut deaths: FuturesUnordered<_> = ranks.iter().map(Rank::death).collect();
    tokio::select! {
        done = work => done,
        Some(dead) = deaths.next() => Err(StartError::Ranks(vec![dead])),
        (silent, silence) = watchdog.alarm() => Err(StartError::silent(silent, silence)),
    }
}

/// What both give. Where one fails, the other is listened to for longer than its own ranks listen to each other: ranks that were left alone may be heard before the
/// one that failed. Without a fault of its own it would wait in vain, until the next restart.
async fn both<A, B>(
    one: impl Future<Output = Result<A, StartError>>,
    other: impl Future<Output = Result<B, StartError>>,
) -> Result<(A, B), StartError> {
    let (error, rest) = match select(pin!(one), pin!(other)).await {
        Either::Left((Ok(one), other)) => return Ok((one, other.await?)),
        Either::Right((Ok(other), one)) => return Ok((one.await?, other)),
        Either::Left((Err(error), other)) => (error, timeout(3 * GRACE, other).await.map(Result::err)),
        Either::Right((Err(error), one)) => (error, timeout(3 * GRACE, one).await.map(Result::err)),
    };
    Err(match (error, rest) {
        (StartError::Ranks(errors), Ok(Some(StartError::Ranks(others)))) => {
            StartError::Ranks(errors.into_iter().chain(others).collect())
        }
        (error, _) => error,
    })
}

/// Has ranks leave their epoch for the next.
async fn stay(ranks: &[Rank], meeting: &Meeting) -> Result<(), StartError> {
    let staying = all(ranks.iter().map(|rank| async {
        timeout(REGROUP_TIMEOUT, rank.regroup(meeting)).await.unwrap_or_else(|_| {
            let words = format!("did not meet the others within {REGROUP_TIMEOUT:?}");
            Err(RankError { rank: rank.number(), fault: RankFault::Confused(words) })
        })
    }));
    staying.await.map(|_| ()).map_err(StartError::Ranks)
}

/// Connects to ranks and loads the model into them. `is_settled`: the group has been loaded before.
async fn load(
    members: Vec<Member>,
    meeting: &Meeting,
    config: &GroupConfig,
    progress: &watch::Sender<Vec<LoadProgress>>,
    is_settled: bool,
) -> Result<(Vec<Rank>, Vec<Loaded>), StartError> {
    let ranks = all(members.into_iter().map(Rank::connect)).await.map_err(StartError::Ranks)?;
    let loading: Vec<u32> = ranks.iter().map(Rank::number).collect();
    let requests = config.load_requests(meeting, &loading, is_settled);
    let mut watchdog = Watchdog::of_loading(ranks.to_vec(), config.silence);
    let request_of = |rank: &Rank| requests[rank.number() as usize].clone();
    let loading = all(ranks.iter().map(|rank| rank.load(request_of(rank), progress)));
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(StartError::Ranks),
        (silent, silence) = watchdog.alarm() => Err(StartError::silent(silent, silence)),
    }?;
    Ok((ranks, loaded))
}

/// What `first` and all `others` say, with the blocks that the poorest has.
fn agree(
    first: ModelDescription,
    others: impl IntoIterator<Item = (u32, ModelDescription)>,
) -> Result<ModelDescription, StartError> {
    let mut agreed = first;
    for (rank, other) in others {
        agreed.kv_blocks = agreed.kv_blocks.min(other.kv_blocks);
        agreed.feature_blocks = agreed.feature_blocks.min(other.feature_blocks);
        if agreed.instruction_set != other.instruction_set {
            let (first, other) = (agreed.instruction_set, other.instruction_set);
            return Err(StartError::Disagreement { rank, field: "the instruction set", first, other });
        }
        let ModelDescription { kv_blocks, feature_blocks, .. } = agreed;
        if agreed != (ModelDescription { kv_blocks, feature_blocks, ..other.clone() }) {
            let (first, other) = (format!("{agreed:?}"), format!("{other:?}"));
            return Err(StartError::Disagreement { rank, field: "the model", first, other });
        }
    }
    Ok(agreed)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn failed(rank: u32, code: Code) -> StartError {
        let fault = RankFault::Answered { code, words: "it failed".into() };
        StartError::Ranks(vec![RankError { rank, fault }])
    }

    #[tokio::test]
    async fn who_was_left_alone_is_not_taken_for_the_one_that_failed() {
        let alone = async { Err::<(), _>(failed(0, Code::Aborted)) };
        let fails = async {
            sleep(GRACE / 4).await;
            Err::<(), _>(failed(1, Code::ResourceExhausted))
        };
        let error = both(alone, fails).await.expect_err("both fail");
        let StartError::Ranks(errors) = &error else { panic!("{error}") };
        assert_eq!(errors.len(), 2);
        assert_eq!(GroupError::NotRestarted(Arc::new(error)).suspects(), [1]);

        let waits = std::future::pending::<Result<(), StartError>>();
        let error = both(waits, async { Err::<(), _>(failed(1, Code::Internal)) }).await;
        assert!(matches!(error, Err(StartError::Ranks(errors)) if errors.len() == 1));
    }
}
