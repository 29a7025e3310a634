//! Faults of a server's shards, and what is seen of them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::server::Server;

/// How long a fault may last: silence is noticed after two seconds, and the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Tells the shards of `faulty-shard` what to do, a line for each process of a rank: at once and whole.
///
/// # Errors
/// When the folder cannot be written to.
pub fn order(folder: &Path, rank: u32, orders: &str) -> anyhow::Result<()> {
    std::fs::write(folder.join("order"), orders)?;
    Ok(std::fs::rename(folder.join("order"), folder.join(rank.to_string()))?)
}

/// How often a server's shards came back.
pub fn recoveries(server: &Server) -> usize {
    server.output().matches("the shards are back").count()
}

/// Waits until something is seen.
///
/// # Errors
/// It is not within [`PATIENCE`]; with what the server printed.
pub async fn until<T>(what: &str, server: &Server, mut look: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return Ok(seen);
        }
        ensure!(Instant::now() < deadline, "{what} within {PATIENCE:?}:\n{}", server.output());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
