//! Stopping: SIGTERM lets running requests finish, for a while; a second one does not.

use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::beside::{connect, endless};
use lockstep_tests::golden;
use lockstep_tests::server::{Server, is_running, signal};
use tonic::{Code, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

fn server(arguments: &[&str]) -> anyhow::Result<Server> {
    let arguments = [&["--world-size", "2"], arguments].concat();
    Server::start(&golden::root().join("tests/checkpoints/a"), &arguments)
}

/// A stream that has begun.
async fn begin(
    server: &Server,
    max_tokens: Option<u32>,
) -> anyhow::Result<Streaming<v1::StreamGenerateResponse>> {
    let mut request = endless();
    let stopping = request.request.as_mut().and_then(|request| request.stopping.as_mut());
    stopping.expect("it says when to stop").max_tokens = max_tokens;
    let mut stream = connect(server).await?.stream_generate(request).await?.into_inner();
    while !matches!(stream.message().await?.and_then(|message| message.event), Some(Event::Delta(_))) {}
    Ok(stream)
}

async fn none_left(shards: &[u32]) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while shards.iter().any(|pid| is_running(*pid)) {
        anyhow::ensure!(Instant::now() < deadline, "a shard is left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test]
async fn running_requests_finish_and_new_ones_are_refused() -> anyhow::Result<()> {
    let mut server = server(&[])?;
    let mut late = connect(&server).await?;
    let mut stream = begin(&server, Some(400)).await?;
    signal(server.pid(), "TERM")?;
    while !server.output().contains("stopping on SIGTERM") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let refused = late.stream_generate(endless()).await.expect_err("it is stopping");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let mut last = None;
    while let Some(message) = stream.message().await? {
        last = message.event;
    }
    let Some(Event::Completed(completed)) = last else {
        panic!("the stream does not end as it should: {last:?}")
    };
    assert_eq!(completed.usage.unwrap_or_default().completion_tokens, 400);
    let ended = server.wait(PATIENCE)?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    Ok(())
}

#[tokio::test]
async fn draining_ends_at_its_time() -> anyhow::Result<()> {
    let mut server = server(&["--drain-timeout", "0.5"])?;
    let shards = server.shard_pids();
    let mut stream = begin(&server, None).await?;
    let asked = Instant::now();
    signal(server.pid(), "TERM")?;
    let status = loop {
        if let Err(status) = stream.message().await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(asked.elapsed() >= Duration::from_millis(500), "{:?}", asked.elapsed());
    let ended = server.wait(PATIENCE)?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    none_left(&shards).await
}

#[tokio::test]
async fn a_second_signal_ends_it_now() -> anyhow::Result<()> {
    let mut server = server(&[])?;
    let shards = server.shard_pids();
    let _stream = begin(&server, None).await?;
    signal(server.pid(), "TERM")?;
    while !server.output().contains("stopping on SIGTERM") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let asked = Instant::now();
    signal(server.pid(), "INT")?;
    let ended = server.wait(PATIENCE)?;
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    none_left(&shards).await
}
