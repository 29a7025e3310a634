//! A GPU's memory: what is planned, and what the cache of keys and values takes of it.

use std::time::Duration;

use anyhow::{Context, ensure};
use lockstep_client::{Model, Request};
use lockstep_tests::exam::checkpoint;
use lockstep_tests::faults::{recoveries, until};
use lockstep_tests::server::{Server, signal};

use super::{COMMON, client, refused_in, stand_ins, words};

/// A small GPU: all of it is the host's memory.
pub const GPU_BYTES: [(&str, &str); 1] = [("LOCKSTEP_EMULATED_GPU_BYTES", "768000000")];

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
        for part in [" of its GPU (weights ", " of the host (shared ", ", pinned "] {
            ensure!(line.contains(part), "{part}: {line}");
        }
        Ok(parts?.1.split(' ').next().context("a number")?.parse()?)
    });
    planned.collect()
}

/// What a driver gives memory in.
const PAGE_BYTES: u64 = 2 << 20;

/// Whether a model's cache, of so many bytes a token, is what a line says in megabytes: in whole pages.
fn are_of(model: &Model, token_bytes: u64, megabytes: f64) -> bool {
    let bytes = model.kv_capacity_tokens * token_bytes;
    (megabytes - bytes.next_multiple_of(PAGE_BYTES) as f64 / 1e6).abs() < 0.1
}

#[tokio::test]
async fn the_cache_takes_what_is_left_of_the_share() -> anyhow::Result<()> {
    let (output, less) = started("--gpu-memory 0.5").await?;
    ensure!(planned(&output)?.len() == 1 && output.contains(", graphs "), "{output}");
    let (output, more) = started("--gpu-memory 0.75").await?;
    // A token takes 2 x 2 heads x 32 elements of 2 bytes in each of 5 layers.
    let grown = (more.kv_capacity_tokens - less.kv_capacity_tokens) * 1280;
    ensure!(grown.abs_diff(192_000_000) < PAGE_BYTES, "{grown} bytes more");
    ensure!(are_of(&more, 1280, planned(&output)?[0]), "{more:?}: {output}");
    let mut planned_bytes = more.shards.iter().map(|shard| shard.planned_bytes);
    ensure!(planned_bytes.all(|bytes| bytes > 570_000_000 && bytes < 620_000_000), "{:?}", more.shards);
    Ok(())
}

#[tokio::test]
async fn ranks_agree_on_a_cache_and_take_what_they_are_told() -> anyhow::Result<()> {
    // Of two shards on one GPU each may take half.
    let (output, shared) = started("--world-size 2 --gpus 3,3 --gpu-memory 0.75").await?;
    let of_ranks = planned(&output)?;
    ensure!(of_ranks.len() == 2 && (of_ranks[0] - of_ranks[1]).abs() < 0.1, "{output}");
    ensure!(are_of(&shared, 640, of_ranks[0]), "{shared:?}: {output}");
    // They sum through the host, and no step of theirs is a graph.
    ensure!(!output.contains(", graphs "), "{output}");
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
        "and may have 38400000: --gpu-memory 0.05 of 768000000 bytes for 1 rank(s), and 768000000 are free, of which 76800000 are left",
    ];
    for expected in expected {
        ensure!(output.contains(expected), "{expected:?} is not in:\n{output}");
    }
    // Nor does a cache that was asked for.
    let output = refused_in(&GPU_BYTES, &["--kv-tokens 1000000"])?;
    ensure!(output.contains("keys and values 1281359872"), "{output}");
    Ok(())
}

/// The driver may hold the memory of a process for a moment longer than the process is there, and others on a GPU come and go. A shard
/// that comes back waits, and has the cache that was settled.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_comes_back_waits_for_the_memory_that_it_had() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let others = folder.path().join("others");
    let environment = [GPU_BYTES[0], ("LOCKSTEP_EMULATED_GPU_OTHERS", others.to_str().context("a path")?)];
    let server = Server::start_in(&stand_ins(&environment)?, &checkpoint(), &words(&[COMMON]))?;
    let client = client(&server).await?;
    let before = client.model().await?;
    std::fs::write(&others, "600000000")?;
    for pid in server.shard_pids() {
        signal(pid, "KILL")?;
    }
    until("not starting", &server, || server.output().contains("load their weights").then_some(())).await?;
    // Longer than a shard takes to look at the memory.
    tokio::time::sleep(Duration::from_secs(4)).await;
    ensure!(recoveries(&server) == 0, "{}", server.output());
    // Less than at first is free, but enough.
    std::fs::write(&others, "50000000")?;
    until("not back", &server, || (recoveries(&server) == 1).then_some(())).await?;
    let output = server.output();
    ensure!(output.matches("restarting after a fault").count() == 1, "{output}");
    let request = Request::new().user("What is in the picture?").max_tokens(2).ignore_eos(true);
    ensure!(client.generate(&request).await?.first().token_ids.len() == 2);
    ensure!(client.model().await?.kv_capacity_tokens == before.kv_capacity_tokens, "{before:?}");
    Ok(())
}
