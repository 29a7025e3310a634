//! Shards that are children of this process.

use std::{ffi::OsString, fs::Permissions, os::unix::fs::PermissionsExt};

use futures::future::join_all;
use lockstep_shard::service::ListenAddress;
use tempfile::TempDir;

use super::{
    error::{StartError, cannot},
    meeting::Meeting,
    process::{Nursery, ShardProcess},
    rank::Member,
};
use crate::limits::KILL_TIMEOUT;

/// What shards of this host need for as long as they live.
pub(super) struct Hosted {
    nursery: Nursery,
    command: Vec<OsString>,
    /// What the shards' environment has beside this process's.
    environment: &'static [(&'static str, &'static str)],
    /// By rank. None is one that could not be started.
    processes: Vec<Option<ShardProcess>>,
    /// Holds the sockets, open to this user only.
    run_dir: TempDir,
}

impl Hosted {
    /// For so many shards, which run `command`, or else this program.
    pub fn new(
        command: Option<&[OsString]>,
        world_size: u32,
        environment: &'static [(&'static str, &'static str)],
    ) -> Result<Self, StartError> {
        let run_dir = tempfile::Builder::new()
            .prefix("lockstep-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .map_err(cannot("make a folder for the shards' sockets"))?;
        let command = match command {
            Some(command) => command.to_vec(),
            None => vec![std::env::current_exe().map_err(cannot("find this program's own file"))?.into()],
        };
        let nursery = Nursery::open().map_err(cannot("start a thread for the shards"))?;
        let processes = (0..world_size).map(|_| None).collect();
        Ok(Self { nursery, command, environment, processes, run_dir })
    }

    /// Kills the processes of ranks, all at once. Returns when they are gone, or left behind.
    pub async fn kill(&mut self, ranks: impl IntoIterator<Item = u32>) {
        let processes = ranks.into_iter().filter_map(|rank| self.processes[rank as usize].take());
        join_all(processes.map(|process| process.kill(KILL_TIMEOUT))).await;
    }

    /// Starts the process of a rank that has none.
    pub async fn start(&mut self, rank: u32, meeting: &Meeting) -> Result<Member, StartError> {
        let socket = self.run_dir.path().join(format!("rank-{rank}-{}", meeting.epoch));
        let started = self.nursery.start(rank, &self.command, self.environment, &socket).await;
        let process = started.map_err(cannot(&format!("start a shard as {}", self.command[0].display())))?;
        let exit = process.exit.clone();
        self.processes[rank as usize] = Some(process);
        Ok(Member { rank, group: meeting.group, address: ListenAddress::Unix(socket), exit })
    }

    /// Kills all shards, and returns when they are gone, or left behind.
    pub async fn shutdown(mut self) {
        self.kill(0..self.processes.len() as u32).await;
    }
}
