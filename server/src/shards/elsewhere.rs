//! Shards that others start, and start again.

use std::time::Duration;

use futures::future::join_all;
use lockstep_shard::service::ListenAddress;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    error::{RankError, RankFault},
    process::Exit,
    rank::{Member, Rank},
};
use crate::limits::REACH_TIMEOUT;

/// How long a shard may take to answer a question before it is asked on another connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(50);
/// How often all shards hear of the group. They are kept for it for some times as long.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Where shards listen. They hear of the group for as long as this lives, whatever else is asked of them: while the group waits
/// for one of them, nobody else takes the others.
pub(super) struct Elsewhere {
    members: Vec<Member>,
    heartbeat: JoinHandle<()>,
    /// Never told: it is not known here whether these processes live.
    _exit: watch::Sender<Option<Exit>>,
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.heartbeat.abort();
    }
}

impl Elsewhere {
    /// By rank, for a group.
    pub fn new(addresses: &[ListenAddress], group: u64) -> Self {
        let exit = watch::Sender::new(None);
        let members: Vec<Member> = (0..)
            .zip(addresses)
            .map(|(rank, address)| Member { rank, group, address: address.clone(), exit: exit.subscribe() })
            .collect();
        let heartbeat = tokio::spawn(beat(members.clone()));
        Self { members, heartbeat, _exit: exit }
    }

    /// What listens, or will, at the address of a rank.
    pub fn member(&self, rank: u32) -> Member {
        self.members[rank as usize].clone()
    }

    /// Connects to a rank again, and asks which group it is loaded for.
    ///
    /// # Errors
    /// It does not answer for [`REACH_TIMEOUT`].
    pub async fn reach(&self, rank: u32) -> Result<(Rank, u64), RankError> {
        let reaching = async {
            loop {
                let connected = Rank::connect(self.member(rank)).await?;
                if let Some(progress) = connected.progress(ANSWER_TIMEOUT).await {
                    return Ok((connected, progress.group));
                }
                sleep(POLL).await;
            }
        };
        timeout(REACH_TIMEOUT, reaching).await.unwrap_or_else(|_| {
            let address = &self.members[rank as usize].address;
            let words = format!("does not answer at {address} after {REACH_TIMEOUT:?}");
            Err(RankError { rank, fault: RankFault::Unreachable(words) })
        })
    }
}

/// Lets all shards hear of the group, each over a connection of its own.
async fn beat(members: Vec<Member>) {
    join_all(members.into_iter().map(|member| async move {
        loop {
            // One that cannot be reached is noticed elsewhere.
            if let Ok(rank) = Rank::connect(member.clone()).await {
                while rank.progress(ANSWER_TIMEOUT).await.is_some() {
                    sleep(HEARTBEAT).await;
                }
            }
            sleep(POLL).await;
        }
    }))
    .await;
}
