//! Shards that run on their own, and that the server reaches over TCP. After a fault it connects to them again; they keep their weights.

use std::io;
use std::net::TcpListener as StdTcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;
use lockstep_tests::beside::{Beside, connect, first};
use lockstep_tests::golden;
use lockstep_tests::replay::{answer, requests};
use lockstep_tests::server::{Server, binary, signal};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How long a fault may last: silence is noticed after two seconds, and this machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(30);
const WORLD_SIZE: usize = 2;

fn checkpoint() -> PathBuf {
    golden::root().join("tests/checkpoints/a")
}

/// A `lockstep shard` that nobody but the test looks after.
struct Shard {
    child: Child,
    address: String,
}

impl Shard {
    fn start(address: &str) -> anyhow::Result<Self> {
        let mut command = Command::new(binary()?);
        command.args(["shard", "--listen", &format!("tcp:{address}")]).stdin(Stdio::null());
        Ok(Self { child: command.spawn()?, address: address.to_owned() })
    }

    fn start_all() -> anyhow::Result<Vec<Self>> {
        // Ports are looked for together, so that no two are the same.
        let free: io::Result<Vec<_>> = (0..WORLD_SIZE).map(|_| StdTcpListener::bind("127.0.0.1:0")).collect();
        let addresses: io::Result<Vec<_>> = free?.iter().map(StdTcpListener::local_addr).collect();
        addresses?.iter().map(|address| Self::start(&address.to_string())).collect()
    }

    fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(|_| ())
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        *self = Self::start(&self.address)?;
        Ok(())
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn flag<'a>(addresses: impl IntoIterator<Item = &'a str>) -> String {
    let addresses: Vec<String> = addresses.into_iter().map(|address| format!("tcp:{address}")).collect();
    addresses.join(",")
}

fn serve(shards: &[Shard]) -> anyhow::Result<Server> {
    let addresses = flag(shards.iter().map(|shard| shard.address.as_str()));
    Server::start(&checkpoint(), &["--shards", &addresses])
}

/// Waits until the server has recovered so often, and tells which ranks loaded their weights again the last time.
async fn back(server: &Server, times: usize) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    while server.output().matches("the shards are back").count() < times {
        ensure!(Instant::now() < deadline, "not back within {PATIENCE:?}:\n{}", server.output());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let output = server.output();
    let line = output.lines().rfind(|line| line.contains("load their weights")).unwrap_or_default();
    let ranks = line.split_once("shards ").map_or("", |(_, rest)| rest);
    Ok(ranks.trim_end_matches(" load their weights").to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_come_back_change_no_stream() -> anyhow::Result<()> {
    let mut shards = Shard::start_all()?;
    let server = serve(&shards)?;
    ensure!(server.child_pids().is_empty(), "it has started shards of its own");
    let beside = Beside::begin(connect(&server).await?).await?;

    shards[1].kill()?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    shards[1].restart()?;
    assert_eq!(back(&server, 1).await?, "[1]");
    // Between two faults there must be a token.
    first(connect(&server).await?, 2).await?;

    // Longer than it may be silent.
    signal(shards[0].child.id(), "STOP")?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    signal(shards[0].child.id(), "CONT")?;
    assert_eq!(back(&server, 2).await?, "[]");
    first(connect(&server).await?, 2).await?;

    shards.iter_mut().try_for_each(Shard::kill)?;
    shards.iter_mut().try_for_each(Shard::restart)?;
    assert_eq!(back(&server, 3).await?, "[0, 1]");

    let tokens = beside.end().await?.tokens;
    ensure!(tokens == first(connect(&server).await?, tokens.len()).await?, "the stream changed");
    let ended = server.stop()?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    for shard in &mut shards {
        ensure!(shard.child.try_wait()?.is_none(), "a shard ended with a server that had not started it");
    }
    Ok(())
}

/// Passes connections on to an address, until it is told to cut them. Those that come later are passed on again.
async fn pass_on(listener: TcpListener, address: String, cut: watch::Receiver<()>) -> io::Result<()> {
    loop {
        let (mut near, _) = listener.accept().await?;
        let (address, mut cut) = (address.clone(), cut.clone());
        cut.mark_unchanged();
        tokio::spawn(async move {
            let mut far = TcpStream::connect(address).await?;
            tokio::select! {
                passed = copy_bidirectional(&mut near, &mut far) => passed.map(|_| ()),
                _ = cut.changed() => Ok(()),
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_costs_no_weights() -> anyhow::Result<()> {
    let shards = Shard::start_all()?;
    let between = TcpListener::bind("127.0.0.1:0").await?;
    let proxy = between.local_addr()?.to_string();
    let (cut, is_cut) = watch::channel(());
    tokio::spawn(pass_on(between, shards[1].address.clone(), is_cut));
    let addresses = flag([shards[0].address.as_str(), &proxy]);
    let server = Server::start(&checkpoint(), &["--shards", &addresses])?;
    let beside = Beside::begin(connect(&server).await?).await?;
    for times in 1..=3 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        cut.send_replace(());
        assert_eq!(back(&server, times).await?, "[]");
        first(connect(&server).await?, 2).await?;
    }
    let tokens = beside.end().await?.tokens;
    ensure!(tokens == first(connect(&server).await?, tokens.len()).await?, "the stream changed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_at_a_time_has_the_shards_and_the_next_one_loads_them_anew() -> anyhow::Result<()> {
    let shards = Shard::start_all()?;
    let server = serve(&shards)?;
    let addresses = flag(shards.iter().map(|shard| shard.address.as_str()));
    let beside = Beside::begin(connect(&server).await?).await?;
    let second = Server::run_to_end(&checkpoint(), &["--shards", &addresses])?;
    assert_eq!(second.code, Some(1));
    assert!(second.output.contains("another server uses this rank"), "{}", second.output);
    beside.end().await?;

    let children = Server::start(&checkpoint(), &["--world-size", "2"])?;
    let mut expected = vec![];
    for request in requests()? {
        expected.push((answer(&mut connect(&children).await?, &request).await?.0, request));
    }
    drop(children);
    // In the middle of a step, without a word to the shards.
    let _beside = Beside::begin(connect(&server).await?).await?;
    signal(server.pid(), "KILL")?;
    let server = serve(&shards)?;
    let mut service = connect(&server).await?;
    for (expected, request) in expected {
        ensure!(answer(&mut service, &request).await?.0 == expected, "another answer than that of children");
    }
    Ok(())
}

#[test]
fn addresses_that_cannot_be_are_refused() -> anyhow::Result<()> {
    let twice = Server::run_to_end(&checkpoint(), &["--shards", "tcp:127.0.0.1:1,tcp:127.0.0.1:1"])?;
    assert_eq!(twice.code, Some(1));
    assert!(twice.output.contains("--shards tcp:127.0.0.1:1: is there twice"), "{}", twice.output);
    let no_address = Server::run_to_end(&checkpoint(), &["--shards", "127.0.0.1:1"])?;
    assert!(no_address.output.contains("neither unix:/path nor tcp:HOST:PORT"), "{}", no_address.output);
    let both = Server::run_to_end(&checkpoint(), &["--shards", "tcp:127.0.0.1:1", "--world-size", "2"])?;
    assert!(both.output.contains("cannot be used with"), "{}", both.output);
    Ok(())
}
