//! With `--repeatable` a request has the same tokens and log-probabilities, to the bit, alone and in any company.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use futures::future::try_join_all;
use lockstep_client::Request;
use lockstep_tests::faults::{recoveries, until};
use lockstep_tests::server::signal;

use super::{NCCL, all_at_once, client, film, one_by_one, picture, same, same_choices, start, streamed};

/// Eight requests of every kind. Those of [`LONE`] are asked alone as well.
fn requests() -> anyhow::Result<Vec<Request>> {
    let requests = [
        Request::new().user("How many shapes are there? ").temperature(1.2).seed(1).top_p(0.8).n(2),
        Request::new().user((picture()?, "What is in the picture?")).temperature(0.0).repetition_penalty(1.2),
        Request::new().user((film()?, "What is in the video?")).temperature(0.9).seed(6),
        Request::new().user("What is in the picture?").temperature(0.0),
        Request::new().user("red square, blue circle, red square").temperature(0.8).seed(2).top_k(20),
        Request::new().user("Where is it?").temperature(0.7).seed(5).frequency_penalty(0.5),
        Request::new().user((picture()?, "Where is the square?")).temperature(1.0).seed(4).min_p(0.05),
        Request::new().user("Which way does it move?").temperature(1.0).seed(7).logit_bias(77, 2.0),
    ];
    let requests = (3..).zip(requests);
    Ok(requests.map(|(tokens, request)| request.max_tokens(tokens).ignore_eos(true).logprobs(3)).collect())
}

/// How many of them are asked alone.
const LONE: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn bits_do_not_depend_on_company_chunks_or_faults() -> anyhow::Result<()> {
    let requests = requests()?;
    let server = start(&format!("{NCCL} --repeatable"))?;
    let alone = one_by_one(&client(&server).await?, &requests[..LONE]).await?;
    drop(server);

    let server =
        start(&format!("{NCCL} --repeatable --max-step-tokens 60 --max-running 12 --no-prefix-cache"))?;
    let client = client(&server).await?;
    same("beside seven others", &all_at_once(&client, &requests).await?[..LONE], &alone)?;

    let heard: Vec<_> = requests.iter().map(|_| AtomicUsize::new(0)).collect();
    let streams = requests.iter().zip(&heard).map(|(request, heard)| streamed(&client, request, heard));
    let fault = async {
        while heard.iter().all(|heard| heard.load(Ordering::Relaxed) == 0) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        signal(*server.shard_pids().first().context("a shard")?, "KILL")?;
        until("not back", &server, || (recoveries(&server) == 1).then_some(())).await
    };
    let (replayed, ()) = tokio::try_join!(try_join_all(streams), fault)?;
    for (choices, alone) in replayed.iter().zip(&alone) {
        same_choices("after a replay", choices, &alone.choices)?;
    }
    Ok(())
}

/// Sums over more than two go through the host then, since the order in which NCCL adds more than two numbers is its own.
#[tokio::test(flavor = "multi_thread")]
async fn three_shards_are_repeatable_as_well() -> anyhow::Result<()> {
    let requests = requests()?;
    let server = start("--world-size 3 --repeatable --max-step-tokens 64 --no-prefix-cache")?;
    let client = client(&server).await?;
    let alone = one_by_one(&client, &requests[..1]).await?;
    same("beside others", &all_at_once(&client, &requests[..4]).await?[..1], &alone)
}
