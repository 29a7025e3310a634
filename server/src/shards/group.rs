//! All ranks together.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::Permissions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::PathBuf,
};

use bytes::Bytes;
use futures::future::select_all;
use lockstep_proto::shard as pb;
use opentelemetry::trace::SpanContext;
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;
use tokio::sync::watch;

use super::{
    config::{GroupConfig, Host, Placement},
    convert,
    error::{GroupError, StartError},
    pixels::PixelFile,
    process::{ExitWatch, Processes},
    rank::{Rank, Steps, all},
    types::{LoadProgress, MemoryPlan, ModelDescription, ResidentMemory},
};
use crate::scheduler::{MediaHash, SeqId, StepPlan, StepResult};

/// A loaded group of shards. Dropping it kills them; [`Group::shutdown`] also waits until they are gone.
pub struct Group {
    epoch: u64,
    handle: GroupHandle,
    steps: Vec<Steps>,
    /// Traces of sequences that no step has admitted yet.
    traces: HashMap<SeqId, SpanContext>,
    /// None where the shards are not this process's children.
    hosted: Option<Hosted>,
}

/// What shards of this host need for as long as they live.
struct Hosted {
    processes: Processes,
    /// Holds the sockets, open to this user only.
    _run_dir: TempDir,
    /// The memory that the ranks meet in. They open it by its path under `/proc`, so it must stay open here.
    _collective: OwnedFd,
}

/// What can be done with a group beside its steps. Cheap to clone.
#[derive(Clone)]
pub struct GroupHandle {
    ranks: Vec<Rank>,
    placement: Placement,
}

/// Where a rank listens, and whether it lives.
pub(super) struct Member {
    pub socket: PathBuf,
    pub exit: ExitWatch,
}

impl Group {
    /// Starts the shards as processes of this host and loads the model into all of them. `progress` has one entry for
    /// each rank.
    ///
    /// # Errors
    /// With all that went wrong, by rank. No process is left then.
    ///
    /// # Panics
    /// If the world size is 0.
    pub async fn start(
        config: &GroupConfig,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<(Self, ModelDescription, Vec<MemoryPlan>), StartError> {
        assert!(config.world_size > 0, "a group has a rank 0");
        let run_dir = tempfile::Builder::new()
            .prefix("lockstep-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .map_err(cannot("make a folder for the shards' sockets"))?;
        let collective = memfd_create("lockstep-collective", MemfdFlags::CLOEXEC)
            .map_err(|error| cannot("make the memory that shards meet in")(error.into()))?;
        let collective_path = format!("/proc/{}/fd/{}", std::process::id(), collective.as_raw_fd());
        let command = match &config.command {
            Some(command) => command.clone(),
            None => vec![this_program()?],
        };
        let sockets: Vec<PathBuf> =
            (0..config.world_size).map(|rank| run_dir.path().join(format!("rank-{rank}"))).collect();
        let processes = Processes::start(&command, &sockets)
            .await
            .map_err(cannot(&format!("start a shard as {}", command[0].display())))?;
        let members = sockets.into_iter().zip(&processes.exits);
        let members = members.map(|(socket, exit)| Member { socket, exit: exit.clone() }).collect();
        match Self::attach(config, &collective_path, members, progress).await {
            Ok((mut group, description, plans)) => {
                group.hosted = Some(Hosted { processes, _run_dir: run_dir, _collective: collective });
                Ok((group, description, plans))
            }
            Err(error) => {
                processes.shutdown().await;
                Err(error)
            }
        }
    }

    /// Loads the model into shards that run already.
    pub(super) async fn attach(
        config: &GroupConfig,
        collective_path: &str,
        members: Vec<Member>,
        progress: &watch::Sender<Vec<LoadProgress>>,
    ) -> Result<(Self, ModelDescription, Vec<MemoryPlan>), StartError> {
        progress.send_replace(vec![LoadProgress::default(); members.len()]);
        let connecting =
            (0..).zip(members).map(|(rank, member)| Rank::connect(rank, member.socket, member.exit));
        let ranks = all(connecting).await.map_err(StartError::Ranks)?;
        let requests = config.load_requests(collective_path, &Host::detect());
        let loading = ranks.iter().zip(requests).map(|(rank, request)| rank.load(request, progress));
        let (plans, descriptions) = all(loading).await.map_err(StartError::Ranks)?.into_iter().unzip();
        let description = agree(descriptions)?;
        let steps = all(ranks.iter().map(Rank::steps)).await.map_err(StartError::Ranks)?;
        let handle = GroupHandle { ranks, placement: config.placement };
        let group = Self { epoch: config.epoch, handle, steps, traces: HashMap::new(), hosted: None };
        Ok((group, description, plans))
    }

    /// Lets the ranks add to the trace of a sequence that the next step admits.
    pub fn trace(&mut self, id: SeqId, request: SpanContext) {
        self.traces.insert(id, request);
    }

    /// Runs one step on all ranks. Must not be dropped before it returns, or the next answers are of this step.
    ///
    /// # Errors
    /// A rank died or failed, or the ranks diverged. The group is of no more use then.
    pub async fn run(&mut self, plan: &StepPlan) -> Result<StepResult, GroupError> {
        let request = convert::run_request(plan, self.epoch, &self.traces);
        self.traces.clear();
        let answers = all(self.steps.iter_mut().map(|steps| steps.run(request.clone())))
            .await
            .map_err(GroupError::nearest_to_cause)?;
        let hashes: Vec<u64> = answers.iter().map(|answer| answer.state_hash).collect();
        if hashes.iter().any(|hash| *hash != hashes[0]) {
            return Err(GroupError::Diverged { step: plan.step, hashes });
        }
        let mut first = None;
        for (rank, answer) in (0..).zip(answers) {
            if rank == 0 {
                let checked = convert::step_result(plan, self.epoch, answer);
                first = Some(checked.map_err(|words| GroupError::ShardFailed { rank, words })?);
            } else if (answer.epoch, answer.step) != (self.epoch, plan.step) {
                let words = format!("answers step {} of epoch {}", answer.step, answer.epoch);
                return Err(GroupError::ShardFailed { rank, words });
            }
        }
        Ok(first.expect("a group has a rank 0"))
    }

    /// For what goes on beside the steps.
    pub fn handle(&self) -> GroupHandle {
        self.handle.clone()
    }

    /// Kills all shards, and returns when they are gone.
    pub async fn shutdown(self) {
        if let Some(hosted) = self.hosted {
            hosted.processes.shutdown().await;
        }
    }
}

impl GroupHandle {
    /// Places the pixels of a medium at all ranks: `grid` in patches (time, height, width), `pixels` as
    /// frames x height x width x 3. They stay there until they are encoded, or the medium is evicted.
    ///
    /// # Errors
    /// A rank died, or did not take them; or there is no place to write them.
    pub async fn put_media(&self, hash: MediaHash, grid: [u32; 3], pixels: Bytes) -> Result<(), GroupError> {
        let size_bytes = pixels.len() as u64;
        let header = |path| pb::MediaHeader {
            hash: convert::media_hash(&hash),
            grid: Some(convert::grid(grid)),
            size_bytes,
            path,
        };
        let placed = match self.placement {
            Placement::Files => {
                let file = PixelFile::write(pixels).await;
                let file = file.map_err(|error| GroupError::Pixels(error.to_string()))?;
                // The file lives until all ranks have answered: by then they have opened it, or never will.
                all(self.ranks.iter().map(|rank| rank.put_media(header(file.path()), Bytes::new()))).await
            }
            Placement::Chunks { .. } => {
                all(self.ranks.iter().map(|rank| rank.put_media(header(String::new()), pixels.clone()))).await
            }
        };
        placed.map_err(GroupError::nearest_to_cause)?;
        Ok(())
    }

    /// The memory that each rank holds, in rank order.
    ///
    /// # Errors
    /// A rank died, or did not answer.
    pub async fn memory(&self) -> Result<Vec<ResidentMemory>, GroupError> {
        all(self.ranks.iter().map(Rank::memory)).await.map_err(GroupError::nearest_to_cause)
    }

    /// Returns when the process of a rank has ended: to notice it while no step runs.
    pub async fn lost(&self) -> GroupError {
        let deaths = self.ranks.iter().map(|rank| Box::pin(rank.death()));
        let (first, ..) = select_all(deaths).await;
        GroupError::nearest_to_cause(vec![first])
    }
}

/// What all ranks say, with the blocks that the poorest of them has.
fn agree(descriptions: Vec<ModelDescription>) -> Result<ModelDescription, StartError> {
    let mut agreed = descriptions[0].clone();
    for (rank, other) in (0..).zip(&descriptions) {
        agreed.kv_blocks = agreed.kv_blocks.min(other.kv_blocks);
        agreed.feature_blocks = agreed.feature_blocks.min(other.feature_blocks);
        if agreed.instruction_set != other.instruction_set {
            let (first, other) = (agreed.instruction_set, other.instruction_set.clone());
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

fn this_program() -> Result<OsString, StartError> {
    std::env::current_exe().map(Into::into).map_err(cannot("find this program's own file"))
}

fn cannot(what: &str) -> impl FnOnce(io::Error) -> StartError {
    let what = what.to_owned();
    move |source| StartError::System { what, source }
}
