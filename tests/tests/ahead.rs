//! One step ahead: how far away the shards are does not show in the time of a token.
//!
//! `cargo test --release --workspace --test ahead -- --nocapture` prints the times. `LOCKSTEP_AHEAD_MODEL` names another checkpoint, whose
//! own steps take as long as they take.

use std::path::PathBuf;
use std::time::Instant;

use lockstep_tests::beside::{connect, endless};
use lockstep_tests::golden;
use lockstep_tests::server::{Server, other_binary};

const TOKENS: usize = 120;
/// First tokens that are not counted.
const WARM_UP: usize = 10;
/// Most by which the time of a token may grow.
const MOST: f64 = 0.02;
/// A busy machine may spoil a comparison.
const ATTEMPTS: usize = 5;

/// The median time between two tokens of a stream, in milliseconds, with shards so far away.
async fn time_per_token(delay_ms: u32) -> anyhow::Result<f64> {
    let far = other_binary("far-shard")?;
    let given = std::env::var_os("LOCKSTEP_AHEAD_MODEL").map(PathBuf::from);
    let delay = delay_ms.to_string();
    let step = if given.is_some() { "0" } else { "25" };
    let environment = [("LOCKSTEP_DELAY_MS", delay.as_str()), ("LOCKSTEP_STEP_MS", step)];
    let model = given.unwrap_or_else(|| golden::root().join("tests/checkpoints/a"));
    let arguments = ["--world-size", "2", "--max-context-tokens", "4096", "--shard-program", &far];
    let server = Server::start_in(&environment, &model, &arguments)?;
    let mut service = connect(&server).await?;
    let mut stream = service.stream_generate(endless()).await?.into_inner();
    let (mut times, mut last) = (vec![], Instant::now());
    while times.len() < TOKENS {
        stream.message().await?.expect("the stream is endless");
        times.push(last.elapsed().as_secs_f64() * 1e3);
        last = Instant::now();
    }
    let times = &mut times[WARM_UP..];
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_take_their_time_do_not_hold_up_tokens() -> anyhow::Result<()> {
    let mut growth = f64::INFINITY;
    for _ in 0..ATTEMPTS {
        let (near, far) = (time_per_token(0).await?, time_per_token(5).await?);
        println!("{near:.2} ms a token; {far:.2} ms with 5 ms more for every message");
        growth = growth.min(far / near - 1.0);
        if growth <= MOST {
            return Ok(());
        }
    }
    anyhow::bail!("a token takes {:.1}% longer", growth * 100.0)
}
