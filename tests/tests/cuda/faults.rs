//! Shards on GPUs are killed while they answer. Streams pause, and go on.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use lockstep_client::{Client, Model, Request};
use lockstep_tests::exam::checkpoint;
use lockstep_tests::faults::{recoveries, until};
use lockstep_tests::server::{Server, is_running, signal};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::memory::GPU_BYTES;
use super::{
    COMMON, HOST, NCCL, TIMEOUT, client, film, one_by_one, picture, same_choices, stand_ins, start, streamed,
    words,
};

/// Tokens of each answer.
const TOKENS: u32 = 8;
/// Tokens of all answers before a fault.
const HEARD: usize = 2;

/// A text, a picture and a film, drawn in several ways.
fn requests() -> anyhow::Result<Vec<Request>> {
    let requests = [
        Request::new().user("What is in the picture?").temperature(0.0),
        Request::new().user((picture()?, "What is in the picture?")).temperature(0.9).seed(1).top_p(0.9),
        Request::new().user((film()?, "What is in the video?")).temperature(0.9).seed(2).n(2),
    ];
    Ok(requests.map(|request| request.max_tokens(TOKENS).ignore_eos(true).logprobs(2)).into())
}

/// The same, of which steps are begun before the ones before are told.
fn plain() -> anyhow::Result<Vec<Request>> {
    Ok(requests()?.into_iter().map(|request| request.top_p(1.0).logprobs(0)).collect())
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// SIGKILL of the shard that was started as this one.
    One(usize),
    /// SIGKILL of all shards at once.
    All,
}

/// Shards that run, in the order of their age.
fn shards(server: &Server) -> Vec<u32> {
    let mut pids: Vec<u32> = server.shard_pids().into_iter().filter(|pid| is_running(*pid)).collect();
    pids.sort_unstable();
    pids
}

/// Kills when all streams have begun, and returns when the shards are back.
async fn inject(server: &Server, fault: Fault, heard: &[AtomicUsize]) -> anyhow::Result<()> {
    let heard = || heard.iter().map(|heard| heard.load(Ordering::Relaxed));
    while heard().any(|heard| heard < HEARD) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (before, pids) = (recoveries(server), shards(server));
    match fault {
        Fault::One(index) => signal(pids[index], "KILL")?,
        Fault::All => pids.iter().try_for_each(|pid| signal(*pid, "KILL"))?,
    }
    ensure!(heard().all(|heard| heard < TOKENS as usize), "the fault came too late");
    until("not back", server, || (recoveries(server) > before).then_some(())).await
}

async fn health(server: &Server) -> anyhow::Result<HealthClient<Channel>> {
    let channel = Channel::from_shared(format!("http://{}", server.address()))?.connect().await?;
    Ok(HealthClient::new(channel))
}

/// What a model is, without what its shards hold at the moment.
async fn model(client: &Client) -> anyhow::Result<Model> {
    let mut model = client.model().await?;
    model.shards.iter_mut().for_each(|shard| shard.resident_bytes = 0);
    Ok(model)
}

/// Streams through faults. Where `is_repeatable`, they are what they are without, to the bit.
async fn streams_go_on(
    server: Server,
    requests: Vec<Request>,
    faults: &[Fault],
    is_repeatable: bool,
) -> anyhow::Result<()> {
    let client = client(&server).await?;
    let told = health(&server).await?.watch(HealthCheckRequest::default()).await?;
    let mut told = told.into_inner();
    let mut next = async || -> anyhow::Result<ServingStatus> {
        let next = tokio::time::timeout(TIMEOUT, told.message()).await.context("health says nothing")?;
        Ok(next?.context("health ended")?.status())
    };
    ensure!(next().await? == ServingStatus::Serving);
    let before = model(&client).await?;
    ensure!((before.device.as_str(), before.world_size) == ("cuda", 2), "{before:?}");
    let expected = if is_repeatable { one_by_one(&client, &requests).await? } else { vec![] };

    for (number, fault) in faults.iter().enumerate() {
        let what = format!("{fault:?}");
        let heard: Vec<_> = requests.iter().map(|_| AtomicUsize::new(0)).collect();
        let streams = requests.iter().zip(&heard).map(|(request, heard)| streamed(&client, request, heard));
        let both = async { tokio::try_join!(try_join_all(streams), inject(&server, *fault, &heard)) };
        let both = tokio::time::timeout(TIMEOUT, both).await;
        let (streams, ()) = both.with_context(|| format!("{what}: it hangs:\n{}", server.output()))??;
        for (stream, expected) in streams.iter().zip(&expected) {
            same_choices(&what, stream, &expected.choices)?;
        }
        for (stream, n) in streams.iter().zip([1, 1, 2]) {
            let is_complete = stream.iter().all(|choice| choice.token_ids.len() == TOKENS as usize);
            ensure!(stream.len() == n && is_complete, "{what}: {stream:?}");
        }
        ensure!(recoveries(&server) == number + 1, "{what}: another fault:\n{}", server.output());
        ensure!(next().await? == ServingStatus::NotServing && next().await? == ServingStatus::Serving);
        ensure!(model(&client).await? == before, "{what}: another model");
    }
    let ended = server.stop()?;
    ensure!(ended.code == Some(0), "{}", ended.output);
    Ok(())
}

/// So that a request is computed each time.
const UNCACHED: &str = "--no-prefix-cache";

#[tokio::test(flavor = "multi_thread")]
async fn streams_over_nccl_go_on_as_if_nothing_had_happened() -> anyhow::Result<()> {
    let server = start(&format!("{NCCL} --repeatable {UNCACHED}"))?;
    streams_go_on(server, plain()?, &[Fault::One(0), Fault::All], true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_over_the_host_go_on_as_if_nothing_had_happened() -> anyhow::Result<()> {
    let server = start(&format!("{HOST} --repeatable {UNCACHED}"))?;
    streams_go_on(server, requests()?, &[Fault::One(1)], true).await
}

/// With other kernels, and with a cache of which nobody said how large it is: a shard that comes back takes what the others have.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_complete_where_bits_depend_on_company() -> anyhow::Result<()> {
    let (environment, arguments) = (stand_ins(&GPU_BYTES)?, words(&[COMMON, NCCL, UNCACHED]));
    let server = Server::start_in(&environment, &checkpoint(), &arguments)?;
    streams_go_on(server, requests()?, &[Fault::One(1)], false).await
}
