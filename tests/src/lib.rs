//! What the end-to-end tests share: a real server, shards that are not quite real, the reference's answers, requests of every kind,
//! input that nobody should send, and clients that leave deadlines to the server or do what no client should.

pub mod answers;
pub mod beside;
pub mod crowd;
pub mod exam;
pub mod faults;
pub mod golden;
pub mod hostile;
pub mod pool;
pub mod raw;
pub mod replay;
pub mod server;
pub mod shard;
pub mod untimed;
pub mod uploads;
pub mod watched;

/// A number from the environment: how long a test runs, from which seed, or how a shard of the tests behaves.
///
/// # Errors
/// When it is there and no number.
pub fn number(variable: &str, otherwise: u64) -> anyhow::Result<u64> {
    let Ok(value) = std::env::var(variable) else { return Ok(otherwise) };
    value.parse().map_err(|error| anyhow::anyhow!("{variable}={value}: {error}"))
}
