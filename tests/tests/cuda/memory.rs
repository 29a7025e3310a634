//! A GPU's memory: what is planned, and what the cache of keys and values takes of it.

use anyhow::{Context, ensure};
use lockstep_client::Model;
use lockstep_tests::exam::checkpoint;
use lockstep_tests::server::Server;

use super::{COMMON, client, refused_in, stand_ins, words};

/// A small GPU: all of it is the host's memory.
pub const GPU_BYTES: [(&str, &str); 1] = [("LOCKSTEP_EMULATED_GPU_BYTES", "256000000")];

/// Starts a server that is told nothing of its cache but what is in `arguments`; what it printed, and what it says of itself.
async fn started(arguments: &str) -> anyhow::Result<(String, Model)> {
    let server = Server::start_in(&stand_ins(&GPU_BYTES)?, &checkpoint(), &words(&[COMMON, arguments]))?;
    let model = client(&server).await?.model().await?;
    ensure!((model.device.as_str(), model.dtype.as_str()) == ("cuda", "bf16"), "{model:?}");
    Ok((server.output(), model))
}

/// Megabytes of keys and values in the line about each shard's memory.
fn planned(output: &str) -> anyhow::Result<Vec<f64>> {
    let lines = output.lines().filter(|line| line.starts_with("memory of shard "));
    let planned = lines.map(|line| {
        let parts = line.split_once("keys and values ").context("keys and values");
        ensure!(line.contains(" of its GPU (weights ") && line.contains(" of the host (shared "), "{line}");
        Ok(parts?.1.split(' ').next().context("a number")?.parse()?)
    });
    planned.collect()
}

#[tokio::test]
async fn the_cache_takes_what_is_left_of_the_share() -> anyhow::Result<()> {
    let (output, less) = started("--gpu-memory 0.5").await?;
    ensure!(planned(&output)?.len() == 1, "{output}");
    let (output, more) = started("--gpu-memory 0.75").await?;
    // A token takes 2 x 2 heads x 32 elements of 2 bytes in each of 5 layers.
    let grown = (more.kv_capacity_tokens - less.kv_capacity_tokens) * 1280;
    ensure!(grown.abs_diff(64_000_000) < 100_000, "{grown} bytes more");
    let bytes = more.kv_capacity_tokens as f64 * 1280.0;
    ensure!((planned(&output)?[0] - bytes / 1e6).abs() < 0.1, "{bytes}: {output}");
    let mut planned_bytes = more.shards.iter().map(|shard| shard.planned_bytes);
    ensure!(planned_bytes.all(|bytes| bytes > 192_000_000 && bytes < 250_000_000), "{:?}", more.shards);
    Ok(())
}

#[tokio::test]
async fn ranks_agree_on_a_cache_and_take_what_they_are_told() -> anyhow::Result<()> {
    // Of two shards on one GPU each may take half.
    let (output, shared) = started("--world-size 2 --gpus 3,3 --gpu-memory 0.75").await?;
    let of_ranks = planned(&output)?;
    ensure!(of_ranks.len() == 2 && (of_ranks[0] - of_ranks[1]).abs() < 0.1, "{output}");
    let bytes = shared.kv_capacity_tokens as f64 * 640.0;
    ensure!((of_ranks[0] - bytes / 1e6).abs() < 0.1, "{bytes}: {output}");
    // In whole blocks of 32 tokens.
    let (output, told) = started("--world-size 3 --kv-tokens 1000").await?;
    ensure!(told.kv_capacity_tokens == 992, "{told:?}");
    ensure!(told.world_size == 3 && planned(&output)?.len() == 3, "{output}");
    Ok(())
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> anyhow::Result<()> {
    let output = refused_in(&GPU_BYTES, &["--gpu-memory 0.05"])?;
    let expected = [
        "bytes of its GPU (weights ",
        "and may have 12800000: --gpu-memory 0.05 of 256000000 bytes, of which ",
        " are free",
    ];
    for expected in expected {
        ensure!(output.contains(expected), "{expected:?} is not in:\n{output}");
    }
    // Nor does a cache that was asked for.
    let output = refused_in(&GPU_BYTES, &["--kv-tokens 1000000"])?;
    ensure!(
        output.contains("keys and values 1280000000") || output.contains("keys and values 1279"),
        "{output}"
    );
    Ok(())
}
