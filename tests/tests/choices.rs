//! Several answers to one prompt: each is drawn by itself, whatever the others do.

use std::time::Duration;

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;
use lockstep_tests::untimed;
use prost::Message as _;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt;

type Client = InferenceServiceClient<Channel>;

const MAX_TOKENS: u32 = 40;

async fn start(arguments: &[&str]) -> anyhow::Result<(Server, Client)> {
    let arguments = [&["--dtype", "f32", "--max-image-tokens", "1024"], arguments].concat();
    let server = Server::start(&root().join("tests/checkpoints/a"), &arguments)?;
    let client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    Ok((server, client))
}

/// A question with a picture, to be answered `n` times.
fn request(n: u32, temperature: f32) -> anyhow::Result<v1::GenerateRequest> {
    let picture = std::fs::read(root().join("tests/pictures/scene_112x140.png"))?;
    let source = Some(v1::image::Source::Data(picture.into()));
    let parts = [
        v1::part::Part::Text("Look at this: ".to_owned()),
        v1::part::Part::Image(v1::Image { source, ..Default::default() }),
        v1::part::Part::Text("What would you call it?".to_owned()),
    ];
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    Ok(v1::GenerateRequest {
        chat: Some(v1::Chat {
            messages: vec![v1::Message { role: v1::Role::User.into(), parts }],
            tools: vec![],
        }),
        sampling: Some(v1::Sampling {
            temperature: Some(temperature),
            repetition_penalty: Some(1.0),
            seed: Some(11),
            top_k: Some(0),
            top_p: Some(1.0),
            ..Default::default()
        }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(MAX_TOKENS),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        n: Some(n),
        logprobs: Some(2),
        ..Default::default()
    })
}

async fn answers(client: &mut Client, request: v1::GenerateRequest) -> anyhow::Result<Vec<v1::Choice>> {
    let n = request.n.unwrap_or(1);
    let response = client.generate(request).await?.into_inner();
    let tokens: usize = response.choices.iter().map(|choice| choice.token_ids.len()).sum();
    assert_eq!(response.usage.context("usage")?.completion_tokens as usize, tokens);
    let finished = response.choices.iter().map(|choice| choice.finished.as_ref().map(|end| end.choice));
    assert!(finished.eq((0..n).map(Some)), "each is finished under its own index");
    Ok(response.choices)
}

fn tokens(choices: &[v1::Choice]) -> Vec<&[u32]> {
    choices.iter().map(|choice| &choice.token_ids[..]).collect()
}

#[tokio::test]
async fn each_answer_is_drawn_by_itself_and_the_same_again() -> anyhow::Result<()> {
    let mut known: Option<Vec<v1::Choice>> = None;
    for world_size in ["1", "2", "3"] {
        let (_server, mut client) = start(&["--world-size", world_size]).await?;
        let three = answers(&mut client, request(3, 1.2)?).await?;
        assert_ne!(three[0].token_ids, three[1].token_ids);
        assert_ne!(three[1].token_ids, three[2].token_ids);
        let alone = answers(&mut client, request(1, 1.2)?).await?;
        assert_eq!(three[..1], alone, "the first is who would have come alone, to the last bit");
        let five = answers(&mut client, request(5, 1.2)?).await?;
        assert_eq!(three, five[..3], "what the others are matters to nobody");
        let greedy = answers(&mut client, request(3, 0.0)?).await?;
        assert!(greedy.iter().all(|choice| choice.token_ids == greedy[0].token_ids));
        let known = known.get_or_insert_with(|| five.clone());
        assert_eq!(tokens(&five), tokens(known), "world size {world_size}");
    }
    Ok(())
}

#[tokio::test]
async fn answers_do_not_depend_on_how_much_room_they_have() -> anyhow::Result<()> {
    let (_server, mut client) = start(&[]).await?;
    let expected = answers(&mut client, request(6, 1.2)?).await?;
    // About 70 tokens of prompt and 40 of answer: four blocks each, of which two are shared.
    for tight in [
        &["--kv-tokens", "160"][..],
        &["--kv-tokens", "256", "--max-step-tokens", "16", "--max-running", "16"],
        &["--max-running", "2"],
        &["--max-running", "1"],
    ] {
        let (_server, mut client) = start(tight).await?;
        let found = answers(&mut client, request(6, 1.2)?).await?;
        assert_eq!(found, expected, "{tight:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_tells_every_token_under_its_answer() -> anyhow::Result<()> {
    let (_server, mut client) = start(&["--world-size", "2"]).await?;
    let whole = answers(&mut client, request(3, 1.2)?).await?;
    let stream = v1::StreamGenerateRequest { request: Some(request(3, 1.2)?) };
    let mut stream = client.stream_generate(stream).await?.into_inner();
    let mut parts = vec![v1::Choice::default(); 3];
    let (mut turns, mut last, mut completed) = (0, 0, None);
    while let Some(message) = stream.message().await? {
        assert_eq!(completed, None, "nothing follows");
        match message.event.context("an event")? {
            Event::Started(started) => assert_eq!(started.seed, 11),
            Event::Delta(delta) => {
                turns += u32::from(delta.choice != last);
                last = delta.choice;
                let part = &mut parts[delta.choice as usize];
                assert_eq!(part.finished, None);
                part.text.push_str(&delta.text);
                part.token_ids.extend(delta.token_ids);
                part.logprobs.extend(delta.logprobs);
            }
            Event::Finished(finished) => {
                let index = finished.choice as usize;
                assert_eq!(parts[index].finished.replace(finished), None);
            }
            Event::Completed(event) => completed = Some(event),
        }
    }
    assert_eq!(parts, whole);
    assert!(turns > MAX_TOKENS, "they are written together: {turns} turns");
    assert_eq!(completed.and_then(|event| event.usage).context("usage")?.completion_tokens, 3 * MAX_TOKENS);
    Ok(())
}

#[tokio::test]
async fn a_stop_string_ends_one_answer_and_no_other() -> anyhow::Result<()> {
    let (_server, mut client) = start(&[]).await?;
    let free = answers(&mut client, request(3, 1.2)?).await?;
    let text: Vec<char> = free[1].text.chars().collect();
    let own = text.windows(5).map(|part| part.iter().collect::<String>());
    let mut own = own.filter(|part| !part.contains('\u{fffd}'));
    let stop = own.find(|part| !free[0].text.contains(part) && !free[2].text.contains(part));
    let stop = stop.context("a part of one text that is not in the others")?;
    let mut stopped = request(3, 1.2)?;
    stopped.stopping.as_mut().context("stopping")?.stop.push(stop.clone());
    let stopped = answers(&mut client, stopped).await?;
    let end = free[1].text.find(&stop).context("its place")?;
    assert_eq!(stopped[1].text, free[1].text[..end]);
    let finished = stopped[1].finished.clone().context("an end")?;
    assert_eq!((finished.reason(), finished.stop_string), (v1::FinishReason::StopString, Some(stop)));
    assert!(stopped[1].token_ids.len() < MAX_TOKENS as usize);
    for other in [0, 2] {
        assert_eq!(stopped[other], free[other]);
    }
    Ok(())
}

#[tokio::test]
async fn a_deadline_ends_all_answers_and_tells_what_there_was() -> anyhow::Result<()> {
    let (server, _) = start(&[]).await?;
    let mut client = untimed::connect(server.address()).await?;
    let mut long = request(3, 1.2)?;
    (long.logprobs, long.stopping.as_mut().context("stopping")?.max_tokens) = (None, Some(30_000));
    let status = client.generate(untimed::within(Duration::from_millis(700), long)).await;
    let status = status.expect_err("it cannot be done by then");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    let details = tonic_types::pb::Status::decode(status.details())?.details;
    let answer = details.iter().find(|any| any.type_url.ends_with("GenerateResponse"));
    let answer = v1::GenerateResponse::decode(&answer.context("what there was")?.value[..])?;
    assert_eq!(answer.choices.len(), 3);
    assert!(answer.choices.iter().all(|choice| choice.finished.is_none()));
    let produced = answer.usage.context("usage")?.completion_tokens;
    assert!((3..90_000).contains(&produced), "{produced}");
    Ok(())
}

#[tokio::test]
async fn a_cancelled_request_gives_up_the_places_of_all_its_answers() -> anyhow::Result<()> {
    let (_server, mut client) = start(&["--max-running", "3"]).await?;
    let mut endless = request(3, 1.2)?;
    endless.stopping.as_mut().context("stopping")?.max_tokens = Some(30_000);
    let stream = v1::StreamGenerateRequest { request: Some(endless) };
    let mut stream = client.stream_generate(stream).await?.into_inner();
    for _ in 0..20 {
        stream.message().await?.context("more of it")?;
    }
    drop(stream);
    let next = answers(&mut client, request(3, 1.2)?);
    assert_eq!(tokio::time::timeout(Duration::from_secs(20), next).await??.len(), 3);
    Ok(())
}

#[tokio::test]
async fn more_answers_than_may_be_are_refused_by_name() -> anyhow::Result<()> {
    let (_server, mut client) = start(&["--max-waiting", "4"]).await?;
    for (n, why) in
        [(0, "must be in 1..16"), (17, "must be in 1..16"), (5, "5 sequences would wait, and at most 4 may")]
    {
        let status = client.generate(request(n, 1.2)?).await.expect_err("too many");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let fault = &status.get_details_bad_request().context("a BadRequest")?.field_violations[0];
        assert_eq!((fault.field.as_str(), fault.description.as_str()), ("n", why));
    }
    assert_eq!(answers(&mut client, request(4, 1.2)?).await?.len(), 4);
    Ok(())
}
