//! Shards that others start, and start again.

use std::time::Duration;

use lockstep_shard::service::ListenAddress;
use tokio::{
    sync::watch,
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

/// Where shards listen.
pub(super) struct Elsewhere {
    addresses: Vec<ListenAddress>,
    /// Never told: it is not known here whether these processes live.
    exit: watch::Sender<Option<Exit>>,
}

impl Elsewhere {
    pub fn new(addresses: Vec<ListenAddress>) -> Self {
        Self { addresses, exit: watch::Sender::new(None) }
    }

    /// What listens, or will, at the address of a rank.
    pub fn member(&self, rank: u32) -> Member {
        Member { rank, address: self.addresses[rank as usize].clone(), exit: self.exit.subscribe() }
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
            let address = &self.addresses[rank as usize];
            let words = format!("does not answer at {address} after {REACH_TIMEOUT:?}");
            Err(RankError { rank, fault: RankFault::Unreachable(words) })
        })
    }
}
