//! Whole answers over gRPC from real servers, against the reference's.

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::{self, Case};
use lockstep_tests::server::Server;
use tonic::transport::Channel;

const CHECKPOINTS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// Of f32 log-probabilities.
const TOLERANCE: f32 = 1e-4;

type Client = InferenceServiceClient<Channel>;

fn request(case: &Case, repetition_penalty: f32, max_tokens: usize) -> anyhow::Result<v1::GenerateRequest> {
    Ok(v1::GenerateRequest {
        chat: Some(golden::chat(&case.messages)?),
        sampling: Some(v1::Sampling {
            temperature: Some(0.0),
            repetition_penalty: Some(repetition_penalty),
            ..Default::default()
        }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(max_tokens as u32),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        logprobs: Some(20),
        ..Default::default()
    })
}

async fn answer(
    client: &mut Client,
    request: v1::GenerateRequest,
) -> anyhow::Result<(v1::Started, v1::Choice)> {
    let mut response = client.generate(request).await?.into_inner();
    let choice = response.choices.pop().context("a choice")?;
    Ok((response.started.context("what was understood")?, choice))
}

/// The largest difference of log-probabilities from the reference's f32: of the first `positions` tokens of the answer,
/// and of the first position's most probable tokens.
fn largest_error(case: &Case, choice: &v1::Choice, positions: usize) -> anyhow::Result<f32> {
    let mut largest = 0f32;
    for (expected, got) in case.logprobs.iter().zip(&choice.logprobs).take(positions) {
        let got = got.chosen.as_ref().context("a log-probability")?;
        largest = largest.max((expected - got.logprob).abs());
    }
    let first = &choice.logprobs.first().context("a first position")?.top;
    for (id, expected) in case.first_logprobs.ids.iter().zip(&case.first_logprobs.logprobs) {
        // A token at the edge of the best 20 may fall out of them.
        if let Some(got) = first.iter().find(|token| token.token_id == *id) {
            largest = largest.max((expected - got.logprob).abs());
        }
    }
    Ok(largest)
}

async fn check_f32(client: &mut Client, case: &Case, context: &str) -> anyhow::Result<()> {
    let (started, choice) = answer(client, request(case, 1.0, case.greedy.len())?).await?;
    assert_eq!(started.prompt_token_ids, case.input_ids, "{context}: input_ids");
    let resized: Vec<_> =
        started.media.iter().map(|media| [media.resized_width, media.resized_height]).collect();
    assert_eq!(resized, case.resized, "{context}: resized");
    let tokens: Vec<_> = started.media.iter().map(|media| media.tokens).collect();
    let expected: Vec<_> = case.grids.iter().map(|[t, h, w]| t * h * w / 4).collect();
    assert_eq!(tokens, expected, "{context}: tokens of media");
    assert_eq!(choice.token_ids, case.greedy, "{context}: greedy");
    let best = choice.logprobs[0].top.iter().take(5).map(|token| token.token_id).collect::<Vec<_>>();
    assert_eq!(best, case.first_logprobs.ids[..5], "{context}: most probable tokens");
    let error = largest_error(case, &choice, case.greedy.len())?;
    assert!(error <= TOLERANCE, "{context}: log-probabilities differ by {error}");
    let (_, choice) = answer(client, request(case, 1.3, case.greedy_rp.len())?).await?;
    assert_eq!(choice.token_ids, case.greedy_rp, "{context}: greedy with repetition penalty");
    Ok(())
}

async fn connect(server: &Server) -> anyhow::Result<Client> {
    Ok(InferenceServiceClient::connect(format!("http://{}", server.address())).await?)
}

#[tokio::test]
async fn f32_answers_are_the_references_at_every_world_size() -> anyhow::Result<()> {
    for name in CHECKPOINTS {
        let golden = golden::read(name)?;
        for world_size in 1..=8 {
            let arguments =
                ["--dtype", "f32", "--world-size", &world_size.to_string(), "--max-image-tokens", "1024"];
            let server = Server::start(&golden::root().join(&golden.checkpoint), &arguments)?;
            let mut client = connect(&server).await?;
            for case in &golden.cases {
                let context = format!("checkpoint {name}, {world_size} shards, {}", case.name);
                check_f32(&mut client, case, &context).await.context(context)?;
            }
            drop(client);
            assert_eq!(server.stop()?.code, Some(0));
        }
    }
    Ok(())
}

#[tokio::test]
async fn f32_answers_do_not_depend_on_batch_and_chunks() -> anyhow::Result<()> {
    let golden = golden::read("a")?;
    let arguments = [
        "--dtype",
        "f32",
        "--world-size",
        "2",
        "--max-step-tokens",
        "37",
        "--max-running",
        "8",
        "--max-image-tokens",
        "1024",
    ];
    let server = Server::start(&golden::root().join(&golden.checkpoint), &arguments)?;
    let mut client = connect(&server).await?;
    let mut alone = Vec::new();
    for case in &golden.cases {
        alone.push(answer(&mut client, request(case, 1.0, case.greedy.len())?).await?.1);
    }
    let together = golden.cases.iter().map(|case| {
        let mut client = client.clone();
        async move { answer(&mut client, request(case, 1.0, case.greedy.len())?).await }
    });
    for (i, result) in futures::future::join_all(together).await.into_iter().enumerate() {
        let (_, choice) = result?;
        assert_eq!(choice.token_ids, golden.cases[i].greedy, "{}", golden.cases[i].name);
        assert_eq!(
            choice.logprobs, alone[i].logprobs,
            "{}: not the same bits in a batch",
            golden.cases[i].name
        );
    }
    Ok(())
}

#[tokio::test]
async fn bf16_errors_are_at_most_twice_the_references() -> anyhow::Result<()> {
    for name in CHECKPOINTS {
        let golden = golden::read(name)?;
        let arguments = ["--dtype", "bf16", "--world-size", "2", "--max-image-tokens", "1024"];
        let server = Server::start(&golden::root().join(&golden.checkpoint), &arguments)?;
        let mut client = connect(&server).await?;
        for case in &golden.cases {
            let (_, choice) = answer(&mut client, request(case, 1.0, case.greedy.len())?).await?;
            // Only the tokens up to the first that differs have the same past.
            let same = choice.token_ids.iter().zip(&case.greedy).take_while(|(a, b)| a == b).count();
            let bound = 2.0 * case.full_bf16_max_error;
            let error = largest_error(case, &choice, same)?;
            assert!(error <= bound, "checkpoint {name}, {}: {error} is more than {bound}", case.name);
        }
    }
    Ok(())
}
