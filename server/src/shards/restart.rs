//! Putting a group together, at first and after a fault. Ranks that live keep their weights.

use std::{
    ffi::OsString, fs::Permissions, future::Future, io, os::unix::fs::PermissionsExt, path::PathBuf,
    sync::Arc, time::Duration,
};

use futures::{
    StreamExt,
    future::{join_all, try_join},
    stream::FuturesUnordered,
};
use lockstep_proto::shard as pb;
use tempfile::TempDir;
use tokio::{sync::watch, time::timeout};

use super::{
    config::GroupConfig,
    error::{GroupError, RankError, RankFault, StartError},
    group::Group,
    meeting::MeetingFiles,
    process::{ExitWatch, Nursery, ShardProcess},
    rank::{Rank, all},
    types::{LoadProgress, Loaded, MemoryPlan, ModelDescription},
    watchdog::Watchdog,
};
use crate::limits::{KILL_TIMEOUT, MAX_FIRST_STARTS, REGROUP_TIMEOUT};

/// What shards of this host need for as long as they live.
pub(super) struct Hosted {
    nursery: Nursery,
    command: Vec<OsString>,
    /// By rank. None is one that could not be started.
    processes: Vec<Option<ShardProcess>>,
    /// Holds the sockets, open to this user only.
    run_dir: TempDir,
    /// Where the ranks of each epoch meet.
    pub(super) meeting: MeetingFiles,
}

/// Where a rank listens, and whether it lives.
#[derive(Clone)]
pub(super) struct Member {
    pub socket: PathBuf,
    pub exit: ExitWatch,
}

impl Hosted {
    fn new(config: &GroupConfig) -> Result<Self, StartError> {
        let run_dir = tempfile::Builder::new()
            .prefix("lockstep-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .map_err(cannot("make a folder for the shards' sockets"))?;
        let command = match &config.command {
            Some(command) => command.clone(),
            None => vec![std::env::current_exe().map_err(cannot("find this program's own file"))?.into()],
        };
        let nursery = Nursery::open().map_err(cannot("start a thread for the shards"))?;
        let processes = (0..config.world_size).map(|_| None).collect();
        Ok(Self { nursery, command, processes, run_dir, meeting: MeetingFiles::default() })
    }

    /// Fresh memory for the ranks of an epoch, and its path.
    fn open_collective(&mut self) -> Result<String, StartError> {
        self.meeting.open().map_err(cannot("make the memory that shards meet in"))
    }

    /// Kills the processes of ranks, all at once. Returns when they are gone, or left behind.
    async fn kill(&mut self, ranks: impl IntoIterator<Item = u32>) {
        let processes = ranks.into_iter().filter_map(|rank| self.processes[rank as usize].take());
        join_all(processes.map(|process| process.kill(KILL_TIMEOUT))).await;
    }

    /// Starts the process of a rank that has none.
    async fn start(&mut self, rank: u32, epoch: u64) -> Result<Member, StartError> {
        let socket = self.run_dir.path().join(format!("rank-{rank}-{epoch}"));
        let started = self.nursery.start(rank, &self.command, &socket).await;
        let process = started.map_err(cannot(&format!("start a shard as {}", self.command[0].display())))?;
        let exit = process.exit.clone();
        self.processes[rank as usize] = Some(process);
        Ok(Member { socket, exit })
    }

    /// Kills all shards, and returns when they are gone, or left behind.
    pub async fn shutdown(mut self) {
        self.kill(0..self.processes.len() as u32).await;
    }
}

impl Group {
    /// Starts the shards as processes of this host and loads the model into all of them. `progress` has one entry for
    /// each rank. Where a rank is killed or falls silent, all start again, a few times.
    ///
    /// # Errors
    /// With all that went wrong, by rank. No process is left then.
    ///
    /// # Panics
    /// If the world size is 0.
    pub async fn start(
        config: &GroupConfig,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<(Self, Vec<MemoryPlan>), StartError> {
        assert!(config.world_size > 0, "a group has a rank 0");
        let mut starts = 1;
        loop {
            let mut hosted = Hosted::new(config)?;
            let started = Self::start_once(config, &mut hosted, progress).await;
            match started {
                Ok((mut group, plans)) => {
                    group.hosted = Some(hosted);
                    return Ok((group, plans));
                }
                Err(error) => {
                    hosted.shutdown().await;
                    if starts == MAX_FIRST_STARTS || !error.may_pass() {
                        return Err(error);
                    }
                    tracing::warn!("starting the shards again: {error}");
                    starts += 1;
                }
            }
        }
    }

    async fn start_once(
        config: &GroupConfig,
        hosted: &mut Hosted,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<(Self, Vec<MemoryPlan>), StartError> {
        let path = hosted.open_collective()?;
        let mut members = vec![];
        for rank in 0..config.world_size {
            members.push(hosted.start(rank, 0).await?);
        }
        Self::attach(config, &path, members, progress).await
    }

    /// Loads the model into shards that run already.
    pub(super) async fn attach(
        config: &GroupConfig,
        collective_path: &str,
        members: Vec<Member>,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<(Self, Vec<MemoryPlan>), StartError> {
        progress.send_replace(vec![LoadProgress::default(); members.len()]);
        let requests = config.load_requests(0, collective_path, members.len() as u32);
        let ranks = connect((0..).zip(members)).await?;
        let loaded = load(&ranks, requests, config, progress).await?;
        let checksums = loaded.iter().map(|loaded| loaded.weights_checksum).collect();
        let (plans, descriptions): (_, Vec<ModelDescription>) =
            loaded.into_iter().map(|loaded| (loaded.plan, loaded.description)).unzip();
        let description = agree(descriptions[0].clone(), (0..).zip(descriptions))?;
        let steps = all(ranks.iter().map(Rank::steps)).await.map_err(StartError::Ranks)?;
        Ok((Self::of(config.clone(), description, checksums, ranks, steps), plans))
    }

    /// Puts the group together again after `fault`, as its next epoch: kills and starts the ranks at fault, has the others leave the
    /// old epoch with their weights, and lets all meet. What sequences and features the group had is forgotten. The steps of
    /// the new epoch begin at 0.
    ///
    /// # Errors
    /// A rank that was started anew failed, or read other weights than before. It may be called again, with that.
    pub async fn restart(&mut self, fault: &GroupError) -> Result<(), GroupError> {
        // Also those of attempts before this one, which are not tried yet.
        self.suspects.extend(fault.suspects());
        loop {
            let staying = self.num_staying();
            let Err(error) = self.restart_ranks().await else {
                self.suspects.clear();
                return Ok(());
            };
            let again = GroupError::NotRestarted(Arc::new(error));
            self.suspects.extend(again.suspects());
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

    async fn restart_ranks(&mut self) -> Result<(), StartError> {
        self.forget_steps();
        self.epoch += 1;
        let before = self.ranks.borrow().clone();
        let (lost, living): (Vec<Rank>, Vec<Rank>) =
            before.iter().cloned().partition(|rank| self.is_lost(rank));
        let Some(hosted) = &mut self.hosted else {
            let error = |words: &str| RankError { rank: 0, fault: RankFault::Confused(words.into()) };
            return Err(StartError::Ranks(vec![error("was not started by this server")]));
        };
        let path = hosted.open_collective()?;
        hosted.kill(lost.iter().map(Rank::number)).await;
        // If this fails these count as dead, and are started once more the next time.
        let mut members = vec![];
        for rank in lost.iter().map(Rank::number) {
            members.push((rank, hosted.start(rank, self.epoch).await?));
        }
        let epoch = self.epoch;
        let staying = stay(&living, epoch, &path);
        let requests = self.config.load_requests(epoch, &path, members.len() as u32);
        let (config, progress) =
            (&self.config, watch::Sender::new(vec![LoadProgress::default(); before.len()]));
        let returning = async {
            let ranks = connect(members).await?;
            let requests = ranks.iter().map(|rank| requests[rank.number() as usize].clone()).collect();
            let loaded = load(&ranks, requests, config, &progress).await?;
            Ok((ranks, loaded))
        };
        // Where one side fails the other waits in vain, until the next restart.
        let ((), (returned, loaded)) =
            while_alive(&living, config.silence, try_join(staying, returning)).await?;
        hosted.meeting.close_earlier();
        for (rank, loaded) in returned.iter().map(Rank::number).zip(&loaded) {
            if self.weights_checksums[rank as usize] != loaded.weights_checksum {
                return Err(StartError::OtherWeights { rank });
            }
        }
        let numbers: Vec<u32> = returned.iter().map(Rank::number).collect();
        let mut ranks: Vec<Rank> = living.into_iter().chain(returned).collect();
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

/// Has ranks leave their epoch for the next.
async fn stay(ranks: &[Rank], epoch: u64, path: &str) -> Result<(), StartError> {
    let staying = all(ranks.iter().map(|rank| async {
        timeout(REGROUP_TIMEOUT, rank.regroup(epoch, path)).await.unwrap_or_else(|_| {
            let words = format!("did not meet the others within {REGROUP_TIMEOUT:?}");
            Err(RankError { rank: rank.number(), fault: RankFault::Confused(words) })
        })
    }));
    staying.await.map(|_| ()).map_err(StartError::Ranks)
}

async fn connect(members: impl IntoIterator<Item = (u32, Member)>) -> Result<Vec<Rank>, StartError> {
    let connecting =
        members.into_iter().map(|(rank, member)| Rank::connect(rank, member.socket, member.exit));
    all(connecting).await.map_err(StartError::Ranks)
}

/// Loads the model into ranks.
async fn load(
    ranks: &[Rank],
    requests: Vec<pb::LoadRequest>,
    config: &GroupConfig,
    progress: &watch::Sender<Vec<LoadProgress>>,
) -> Result<Vec<Loaded>, StartError> {
    let mut watchdog = Watchdog::of_loading(ranks.to_vec(), config.silence);
    let loading = all(ranks.iter().zip(requests).map(|(rank, request)| rank.load(request, progress)));
    tokio::select! {
        loaded = loading => loaded.map_err(StartError::Ranks),
        (silent, silence) = watchdog.alarm() => Err(StartError::silent(silent, silence)),
    }
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

fn cannot(what: &str) -> impl FnOnce(io::Error) -> StartError {
    let what = what.to_owned();
    move |source| StartError::System { what, source }
}
