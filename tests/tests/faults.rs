//! Faults of shards while requests of all kinds stream. A stream may pause; its tokens and their log-probabilities are the same, bit
//! for bit, as without a fault.
//!
//! `LOCKSTEP_FAULTS=n` injects that many, `LOCKSTEP_FAULT_SEED=n` chooses which, when, and what is asked meanwhile.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lockstep::limits::MAX_RESTARTS;
use lockstep_proto::v1;
use lockstep_tests::beside::{Beside, Service, Streamed, Token, connect, endless, first};
use lockstep_tests::faults::{PATIENCE, order, recoveries, until};
use lockstep_tests::replay::{ANSWER_TOKENS, answer, answer_counted, requests};
use lockstep_tests::server::{Server, is_running, other_binary, signal};
use lockstep_tests::{golden, number};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const DEFAULT_FAULTS: u64 = 20;
const CLIENTS: usize = 4;
const WORLD_SIZE: &str = "2";
/// A gap in a stream that is not the machine's doing.
const PAUSE: Duration = Duration::from_millis(400);
/// Half of the faults of each kind are over within this time and one start of the server, however busy the machine is.
const BACK_WITHIN: Duration = Duration::from_secs(3);

fn checkpoint() -> PathBuf {
    golden::root().join("tests/checkpoints/a")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// SIGKILL of one shard, as from the out-of-memory killer.
    KillOne,
    /// SIGKILL of all at once.
    KillAll,
    /// SIGSTOP of one, which then neither computes nor ends.
    StopOne,
    /// SIGSTOP of all.
    StopAll,
    /// SIGKILL of one, and of the one that is started in its place.
    KillTwice,
}

const FAULTS: [Fault; 5] = [Fault::KillOne, Fault::KillAll, Fault::StopOne, Fault::StopAll, Fault::KillTwice];

/// What clients did so far.
#[derive(Default)]
struct Tally {
    done: AtomicBool,
    /// Messages with tokens, by client.
    heard: [AtomicU64; CLIENTS],
    streams: AtomicU64,
    paused: AtomicU64,
    tokens: AtomicU64,
}

/// Asks one thing after the other until it is done, and compares every answer.
async fn client(
    number: usize,
    mut service: Service,
    mut rng: SmallRng,
    expected: Arc<Vec<(v1::GenerateRequest, Vec<Token>)>>,
    tally: Arc<Tally>,
) -> anyhow::Result<()> {
    while !tally.done.load(Ordering::Relaxed) {
        let index = rng.random_range(0..expected.len());
        let (request, expected) = &expected[index];
        let answer = answer_counted(&mut service, request, &tally.heard[number]).await;
        let (tokens, gap) = answer.with_context(|| format!("request {index}"))?;
        ensure!(tokens == *expected, "request {index}: {tokens:?} is not {expected:?}");
        tally.streams.fetch_add(1, Ordering::Relaxed);
        tally.paused.fetch_add((gap > PAUSE).into(), Ordering::Relaxed);
        tally.tokens.fetch_add(tokens.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Shards that run, in the order of their age.
fn shards(server: &Server) -> Vec<u32> {
    let mut pids: Vec<u32> = server.shard_pids().into_iter().filter(|pid| is_running(*pid)).collect();
    pids.sort_unstable();
    pids
}

/// Injects a fault, and tells how long it was until shards were back.
async fn inject(server: &Server, fault: Fault, rng: &mut SmallRng) -> anyhow::Result<Duration> {
    let (before, world): (usize, usize) = (recoveries(server), WORLD_SIZE.parse()?);
    let pids =
        until("no full group", server, || Some(shards(server)).filter(|pids| pids.len() == world)).await?;
    let one = pids[rng.random_range(0..pids.len())];
    let began = Instant::now();
    match fault {
        Fault::KillOne => signal(one, "KILL")?,
        Fault::KillAll => pids.iter().try_for_each(|pid| signal(*pid, "KILL"))?,
        Fault::StopOne => signal(one, "STOP")?,
        Fault::StopAll => pids.iter().try_for_each(|pid| signal(*pid, "STOP"))?,
        Fault::KillTwice => {
            signal(one, "KILL")?;
            let is_new = |pid: &u32| !pids.contains(pid);
            let new = until("no new shard", server, || shards(server).into_iter().find(is_new)).await?;
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..60))).await;
            // It may be one that was not loaded yet, or one that works already.
            signal(new, "KILL")?;
        }
    }
    until("not back", server, || (recoveries(server) > before).then_some(())).await?;
    Ok(began.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_go_on_through_faults() -> anyhow::Result<()> {
    let (count, seed) = (number("LOCKSTEP_FAULTS", DEFAULT_FAULTS)?, number("LOCKSTEP_FAULT_SEED", 1)?);
    // What a long stream has is computed again after every fault: with the whole context of the checkpoint nothing else would be done.
    let context = ["--max-context-tokens", "2048", "--kv-tokens", "16384"];
    let arguments = [&["--world-size", WORLD_SIZE, "--max-step-tokens", "128"], &context[..]].concat();
    let began = Instant::now();
    let server = Server::start(&checkpoint(), &arguments)?;
    let start = began.elapsed();
    let mut service = connect(&server).await?;
    let mut expected = vec![];
    for request in requests()? {
        let (tokens, _) = answer(&mut service, &request).await?;
        ensure!(tokens.len() == ANSWER_TOKENS as usize, "{} tokens", tokens.len());
        expected.push((request, tokens));
    }
    let (expected, tally) = (Arc::new(expected), Arc::new(Tally::default()));
    let beside = Beside::begin(connect(&server).await?).await?;
    let mut clients = vec![];
    for number in 0..CLIENTS {
        let rng = SmallRng::seed_from_u64(seed ^ (number as u64) << 32);
        let service = connect(&server).await?;
        clients.push(tokio::spawn(client(number, service, rng, expected.clone(), tally.clone())));
    }

    let mut rng = SmallRng::seed_from_u64(seed);
    let mut times: BTreeMap<Fault, Vec<Duration>> = BTreeMap::new();
    for number in 0..count {
        let fault = FAULTS[number as usize % FAULTS.len()];
        // So far apart that every stream has a token between two: faults in a row without one end it.
        let heard = || -> Vec<u64> {
            let clients = tally.heard.iter().map(|count| count.load(Ordering::Relaxed));
            clients.chain([beside.count()]).collect()
        };
        let before = heard();
        let all_heard = || heard().iter().zip(&before).all(|(now, before)| now > before);
        until("a stream stands still", &server, || all_heard().then_some(())).await?;
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..500))).await;
        let time = inject(&server, fault, &mut rng).await;
        if let Some(ended) = clients.iter_mut().find(|client| client.is_finished()) {
            bail!("a stream broke ({:?}) at fault {number}, {fault:?}:\n{}", ended.await, server.output());
        }
        times.entry(fault).or_default().push(time?);
    }
    tally.done.store(true, Ordering::Relaxed);
    for client in clients {
        client.await??;
    }
    let Streamed { tokens: beside, total } = beside.end().await?;
    // What was still to be computed when the server stopped the last one is not in anybody's way.
    ensure!(beside == first(service, beside.len()).await?, "the long stream changed");

    println!("{count} faults with seed {seed}");
    for (fault, times) in &mut times {
        times.sort_unstable();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!("{fault:?}: {} times, back after {median:.2?} (median), {worst:.2?} (worst)", times.len());
        assert!(
            median <= BACK_WITHIN + start,
            "{fault:?}: a start takes {start:.2?}, being back {median:.2?}"
        );
    }
    let [streams, paused, tokens] =
        [&tally.streams, &tally.paused, &tally.tokens].map(|count| count.load(Ordering::Relaxed));
    println!(
        "{streams} streams, {paused} of them with a pause over {PAUSE:?}; {tokens} tokens, 0 lost or changed"
    );
    println!("beside them one stream, again and again: {total} tokens, 0 lost or changed");
    let ended = server.stop()?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    Ok(())
}

async fn health_client(server: &Server) -> anyhow::Result<HealthClient<Channel>> {
    let channel = Channel::from_shared(format!("http://{}", server.address()))?.connect().await?;
    Ok(HealthClient::new(channel))
}

async fn health(server: &Server) -> anyhow::Result<ServingStatus> {
    let answer = health_client(server).await?.check(HealthCheckRequest::default()).await?;
    Ok(answer.into_inner().status())
}

#[tokio::test]
async fn health_says_when_steps_do_not_move() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--world-size", WORLD_SIZE])?;
    let told = health_client(&server).await?.watch(HealthCheckRequest::default()).await?;
    let mut told = told.into_inner();
    let mut next = async || -> anyhow::Result<ServingStatus> {
        let next = tokio::time::timeout(PATIENCE, told.message()).await.context("health says nothing")?;
        Ok(next?.context("health ended")?.status())
    };
    assert_eq!(next().await?, ServingStatus::Serving);
    signal(shards(&server)[0], "STOP")?;
    assert_eq!(next().await?, ServingStatus::NotServing);
    assert_eq!(next().await?, ServingStatus::Serving);
    until("not back", &server, || (recoveries(&server) == 1).then_some(())).await?;
    until("no full group", &server, || (shards(&server).len() == 2).then_some(())).await?;
    assert_eq!(health(&server).await?, ServingStatus::Serving);
    first(connect(&server).await?, 5).await?;
    Ok(())
}

#[tokio::test]
async fn shards_that_die_again_and_again_end_the_server_and_its_streams() -> anyhow::Result<()> {
    let mut server = Server::start(&checkpoint(), &["--world-size", WORLD_SIZE])?;
    let mut service = connect(&server).await?;
    let mut stream = service.stream_generate(endless()).await?.into_inner();
    stream.message().await?.context("the stream begins")?;
    let (deadline, mut said) = (Instant::now() + PATIENCE, ServingStatus::Serving);
    let status = loop {
        // As soon as they are there.
        for pid in shards(&server) {
            let _ = signal(pid, "KILL");
        }
        match tokio::time::timeout(Duration::from_millis(1), stream.message()).await {
            Ok(Err(status)) => break status,
            Ok(Ok(message)) => ensure!(message.is_some(), "the stream ended as if nothing had happened"),
            Err(_) => {}
        }
        if said == ServingStatus::Serving {
            said = health(&server).await.unwrap_or(said);
        }
        ensure!(Instant::now() < deadline, "it goes on for ever:\n{}", server.output());
    };
    assert_eq!((status.code(), said), (Code::Unavailable, ServingStatus::NotServing), "{status}");
    while is_running(server.pid()) {
        for pid in shards(&server) {
            let _ = signal(pid, "KILL");
        }
        ensure!(Instant::now() < deadline, "the server goes on for ever:\n{}", server.output());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let ended = server.wait(PATIENCE)?;
    assert_eq!(ended.code, Some(1), "{}", ended.output);
    assert!(ended.output.contains("signal: 9"), "{}", ended.output);
    let faults = ended.output.matches("restarting after a fault").count();
    assert!(faults > MAX_RESTARTS as usize, "{}", ended.output);
    Ok(())
}

/// A prompt takes the shards with it whenever they have computed it. The stream beside it draws tokens meanwhile, and only pauses.
#[tokio::test]
async fn a_request_that_kills_the_shards_each_time_is_ended_alone() -> anyhow::Result<()> {
    let program = other_binary("fragile-shard")?;
    let arguments = ["--world-size", WORLD_SIZE, "--max-step-tokens", "128", "--shard-program", &program];
    let server = Server::start_in(&[("LOCKSTEP_TOO_LONG", "400")], &checkpoint(), &arguments)?;
    let beside = Beside::begin(connect(&server).await?).await?;
    let mut requests = requests()?;
    let long = requests.pop().context("the long one is the last")?;
    let mut service = connect(&server).await?;
    is_ended(&server, &mut service, &long, 3).await?;
    answer(&mut service, &requests[0]).await?;
    let beside = beside.end().await?.tokens;
    ensure!(beside == first(service.clone(), beside.len()).await?, "the stream beside it changed");
    // Where nobody draws tokens in between, the server lives on, too, though each fault takes both shards, one after the other.
    is_ended(&server, &mut service, &long, 6).await?;
    answer(&mut service, &requests[0]).await?;
    assert_eq!(recoveries(&server), 6);
    Ok(())
}

/// A request ends for the faults that it brings, after which the shards are back for the `count`th time.
async fn is_ended(
    server: &Server,
    service: &mut Service,
    request: &v1::GenerateRequest,
    count: usize,
) -> anyhow::Result<()> {
    let answered = tokio::time::timeout(2 * PATIENCE, answer(service, request)).await;
    let error = answered.context("it kills and kills")?.err().context("it was answered")?;
    let status = error.downcast_ref::<Status>().context("not told by a status")?;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("3 times in a row"), "{status}");
    until("not back", server, || (recoveries(server) == count).then_some(())).await
}

/// It does so at its first meeting with the others, which is when it begins to load.
#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_is_stopped_or_killed_while_it_loads_is_started_again() -> anyhow::Result<()> {
    let (program, folder) = (other_binary("faulty-shard")?, tempfile::tempdir()?);
    let faults = [("LOCKSTEP_FAULTS", folder.path().to_str().context("a path of words")?)];
    let start = || {
        let arguments = ["--world-size", WORLD_SIZE, "--shard-program", &program];
        Server::start_in(&faults, &checkpoint(), &arguments)
    };
    order(folder.path(), 1, "stop 0\nkill 0")?;
    let server = start()?;
    let began = server.output();
    assert_eq!(began.matches("starting the shards again").count(), 2, "{began}");
    assert!(began.contains("shard 1: is silent") && began.contains("shard 1: died (signal: 9"), "{began}");

    // One that works is killed; the next two while they load in its place.
    let beside = Beside::begin(connect(&server).await?).await?;
    order(folder.path(), 1, "kill 0\nstop 0\nkill 0")?;
    until("not back", &server, || (recoveries(&server) == 1).then_some(())).await?;
    let beside = beside.end().await?.tokens;
    ensure!(beside == first(connect(&server).await?, beside.len()).await?, "the stream changed");
    let ended = server.stop()?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert_eq!(ended.output.matches("restarting after a fault").count(), 3, "{}", ended.output);

    // All of them, while they load: at first, and again after a fault.
    for kind in ["kill", "stop"] {
        let both = |orders: &str| (0..2).try_for_each(|rank| order(folder.path(), rank, orders));
        both(&format!("{kind} 0"))?;
        let server = start()?;
        ensure!(server.output().contains("starting the shards again"), "{}", server.output());
        let beside = Beside::begin(connect(&server).await?).await?;
        both(&format!("{kind} 0\n{kind} 0"))?;
        // At once or one after the other.
        until("not back", &server, || (recoveries(&server) >= 1).then_some(())).await?;
        let beside = beside.end().await?.tokens;
        ensure!(beside == first(connect(&server).await?, beside.len()).await?, "the stream changed");
    }

    order(folder.path(), 1, "kill 0\nkill 0\nkill 0\nkill 0")?;
    let error = start().err().context("it started")?.to_string();
    assert!(error.contains("exit status: 1"), "{error}");
    assert_eq!(std::fs::read_to_string(folder.path().join("1"))?, "kill 0", "three starts, and no more");
    Ok(())
}

/// Ends when it is dropped.
struct Burner(std::process::Child);

impl Drop for Burner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_machine_is_no_fault() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--world-size", WORLD_SIZE])?;
    let beside = Beside::begin(connect(&server).await?).await?;
    let burner = || std::process::Command::new("/bin/sh").args(["-c", "while :; do :; done"]).spawn();
    let count = 6 * std::thread::available_parallelism()?.get();
    let burners = (0..count).map(|_| burner().map(Burner)).collect::<Result<Vec<_>, _>>()?;
    tokio::time::sleep(Duration::from_secs(8)).await;
    drop(burners);
    let beside = beside.end().await?.tokens;
    ensure!(beside == first(connect(&server).await?, beside.len()).await?, "the stream changed");
    let ended = server.stop()?;
    assert!(!ended.output.contains("restarting after a fault"), "{}", ended.output);
    Ok(())
}
