//! Every way to draw, through the public API: what it must do to tokens, and the same at every world size.

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;

type Client = InferenceServiceClient<tonic::transport::Channel>;

const MAX_TOKENS: u32 = 24;

async fn start(world_size: &str) -> anyhow::Result<(Server, Client)> {
    let arguments = ["--dtype", "f32", "--world-size", world_size, "--max-image-tokens", "1024"];
    let server = Server::start(&root().join("tests/checkpoints/a"), &arguments)?;
    let client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    Ok((server, client))
}

/// Greedy unless changed, and without any penalty.
fn greedy() -> v1::Sampling {
    v1::Sampling { temperature: Some(0.0), repetition_penalty: Some(1.0), ..Default::default() }
}

fn sampled(seed: u64) -> v1::Sampling {
    v1::Sampling { temperature: Some(1.5), seed: Some(seed), ..greedy() }
}

async fn answer(client: &mut Client, sampling: v1::Sampling) -> anyhow::Result<Vec<u32>> {
    let part = v1::Part { part: Some(v1::part::Part::Text("Tell me something.".into())) };
    let message = v1::Message { role: v1::Role::User.into(), parts: vec![part] };
    let request = v1::GenerateRequest {
        chat: Some(v1::Chat { messages: vec![message], tools: vec![] }),
        sampling: Some(sampling),
        stopping: Some(v1::Stopping {
            max_tokens: Some(MAX_TOKENS),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    };
    Ok(client.generate(request).await?.into_inner().choices.remove(0).token_ids)
}

#[tokio::test]
async fn every_setting_does_what_it_says() -> anyhow::Result<()> {
    let (_server, mut client) = start("2").await?;
    let best = answer(&mut client, greedy()).await?;
    let drawn = answer(&mut client, sampled(1)).await?;
    assert_ne!(drawn, best);

    // The narrowest of each truncation leaves the best token.
    for narrowest in [
        v1::Sampling { top_k: Some(1), ..sampled(1) },
        v1::Sampling { top_p: Some(1e-6), ..sampled(1) },
        v1::Sampling { min_p: Some(1.0), ..sampled(1) },
        // Nothing to draw: the widest truncation changes nothing either.
        v1::Sampling { top_k: Some(40), top_p: Some(0.9), min_p: Some(0.1), ..greedy() },
    ] {
        assert_eq!(answer(&mut client, narrowest.clone()).await?, best, "{narrowest:?}");
    }
    for widest in [
        v1::Sampling { top_k: Some(0), top_p: Some(1.0), min_p: Some(0.0), ..sampled(1) },
        v1::Sampling { top_k: Some(u32::MAX), ..sampled(1) },
    ] {
        assert_eq!(answer(&mut client, widest.clone()).await?, drawn, "{widest:?}");
    }

    let only = v1::Sampling { logit_bias: [(77, 100.0)].into(), ..sampled(1) };
    assert_eq!(answer(&mut client, only).await?, vec![77; MAX_TOKENS as usize]);
    let never = v1::Sampling { logit_bias: [(best[0], -100.0)].into(), ..greedy() };
    assert!(!answer(&mut client, never).await?.contains(&best[0]));

    // A forced token that is punished for each time gives way at last, and one that is punished once does not.
    let forced = |frequency: f32, presence: f32| v1::Sampling {
        logit_bias: [(77, 40.0)].into(),
        frequency_penalty: Some(frequency),
        presence_penalty: Some(presence),
        ..greedy()
    };
    let punished = answer(&mut client, forced(2.0, 0.0)).await?;
    let times = punished.iter().filter(|id| **id == 77).count();
    assert!(punished[0] == 77 && times > 2 && times < punished.len(), "{punished:?}");
    assert_eq!(answer(&mut client, forced(0.0, 2.0)).await?, vec![77; MAX_TOKENS as usize]);
    Ok(())
}

#[tokio::test]
async fn a_seed_draws_the_same_at_every_world_size() -> anyhow::Result<()> {
    let settings = [
        v1::Sampling { top_k: Some(50), ..sampled(3) },
        v1::Sampling { top_p: Some(0.9), ..sampled(4) },
        v1::Sampling { min_p: Some(0.02), ..sampled(5) },
        v1::Sampling {
            top_k: Some(300),
            top_p: Some(0.95),
            repetition_penalty: Some(1.2),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(0.5),
            logit_bias: [(5, 3.0), (6, -3.0)].into(),
            ..sampled(6)
        },
    ];
    let mut alone: Vec<Vec<u32>> = Vec::new();
    for world_size in ["1", "3"] {
        let (_server, mut client) = start(world_size).await?;
        for (i, setting) in settings.iter().enumerate() {
            let tokens = answer(&mut client, setting.clone()).await?;
            match alone.get(i) {
                Some(alone) => assert_eq!(&tokens, alone, "{setting:?} at world size {world_size}"),
                None => alone.push(tokens),
            }
        }
    }
    Ok(())
}
