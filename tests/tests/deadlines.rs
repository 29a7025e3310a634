//! Deadlines in every phase: the server says so itself, with what was produced, and makes room for the next request.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::golden::root;
use lockstep_tests::server::{Server, binary};
use lockstep_tests::untimed::{Client, connect, connect_taking, within};
use prost::Message;
use tokio::sync::Mutex;
use tonic::{Code, Status};
use tonic_types::{StatusExt, pb};

/// For how long a machine that is shared may stand still.
const STANDSTILL: Duration = Duration::from_secs(3);
/// Long for a few steps of a small model, short for a story of [`STORY_TOKENS`].
const A_MOMENT: Duration = Duration::from_millis(800);
/// Tokens that are asked for and never come in [`A_MOMENT`].
const STORY_TOKENS: u32 = 30_000;
/// Held by tests that compare times, which would not be comparable while another one keeps the processors busy.
static QUIET: Mutex<()> = Mutex::const_new(());

fn server(arguments: &[&str]) -> anyhow::Result<Server> {
    let common = ["--max-image-tokens", "1024"];
    Server::start(&root().join("tests/checkpoints/a"), &[&common, arguments].concat())
}

fn request(parts: Vec<v1::part::Part>, max_tokens: u32) -> v1::GenerateRequest {
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    let messages = vec![v1::Message { role: v1::Role::User.into(), parts }];
    let stopping =
        v1::Stopping { max_tokens: Some(max_tokens), ignore_eos: Some(true), ..Default::default() };
    let greedy = v1::Sampling { temperature: Some(0.0), ..Default::default() };
    v1::GenerateRequest {
        chat: Some(v1::Chat { messages, tools: vec![] }),
        sampling: Some(greedy),
        stopping: Some(stopping),
        ..Default::default()
    }
}

fn text(text: &str, max_tokens: u32) -> v1::GenerateRequest {
    request(vec![v1::part::Part::Text(text.to_owned())], max_tokens)
}

fn stream(request: v1::GenerateRequest) -> v1::StreamGenerateRequest {
    v1::StreamGenerateRequest { request: Some(request) }
}

/// As many photographs as one request may have, each a single token for the model.
fn photographs() -> anyhow::Result<v1::GenerateRequest> {
    let data = std::fs::read(root().join("tests/pictures/coffee.jpg"))?;
    let source = Some(v1::image::Source::Data(data.into()));
    let side = Some(28);
    let image = v1::Image { source, resized_width: side, resized_height: side, ..Default::default() };
    Ok(request(vec![v1::part::Part::Image(image); 64], 2))
}

/// The phase and the answer so far of a status that must be DEADLINE_EXCEEDED.
fn expired(status: &Status) -> (String, Option<v1::GenerateResponse>) {
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    let info = status.get_details_error_info().expect("an ErrorInfo");
    let details = pb::Status::decode(status.details()).expect("a google.rpc.Status").details;
    let answer = details.iter().find(|any| any.type_url.ends_with("/lockstep.v1.GenerateResponse"));
    let answer = answer.map(|any| v1::GenerateResponse::decode(&any.value[..]).expect("an answer"));
    (info.metadata["phase"].clone(), answer)
}

/// Opens a story that takes a place for a long time.
async fn story(client: &mut Client) -> anyhow::Result<tonic::Streaming<v1::StreamGenerateResponse>> {
    let mut story =
        client.stream_generate(stream(text("A very long story.", STORY_TOKENS))).await?.into_inner();
    for _ in 0..3 {
        story.message().await?.expect("the story begins");
    }
    Ok(story)
}

#[tokio::test]
async fn an_unfinished_answer_comes_with_the_status_and_disturbs_nobody() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    let server = server(&["--world-size", "2"])?;
    let mut client = connect(server.address()).await?;
    let short = || text("Tell me about lighthouses.", 60);
    let quiet = client.generate(short()).await?.into_inner();
    let whole = client.generate(text("A very long story.", 200)).await?.into_inner();

    let company = {
        let mut client = client.clone();
        tokio::spawn(async move {
            let mut answers = Vec::new();
            for _ in 0..3 {
                answers.push(client.generate(short()).await?.into_inner());
            }
            Ok::<_, Status>(answers)
        })
    };
    let sent = Instant::now();
    let unfinished = client.generate(within(A_MOMENT, text("A very long story.", STORY_TOKENS))).await;
    let took = sent.elapsed();
    let status = unfinished.expect_err("it is too long");
    let (phase, answer) = expired(&status);
    assert_eq!(phase, "generation", "{status}");
    assert!(took < A_MOMENT + STANDSTILL, "it came after {took:?}");
    let answer = answer.expect("the answer so far");
    let tokens = answer.usage.expect("usage").completion_tokens;
    assert!((1..STORY_TOKENS).contains(&tokens), "{tokens} tokens");
    assert_eq!(answer.started.expect("started").prompt_tokens, whole.started.expect("started").prompt_tokens);
    let (choice, whole) = (&answer.choices[0], &whole.choices[0]);
    assert_eq!(choice.finished, None, "it is not finished, and least of all for its length");
    let common = choice.token_ids.len().min(whole.token_ids.len());
    assert_eq!(choice.token_ids[..common], whole.token_ids[..common]);
    // An answer that ends within a character ends with the replacement character.
    let [some, other] = [&choice.text, &whole.text].map(|text| text.trim_end_matches('\u{FFFD}'));
    assert!(some.starts_with(other) || other.starts_with(some), "{some:?}\n{other:?}");
    for answer in company.await?? {
        assert_eq!(answer.choices[0].token_ids, quiet.choices[0].token_ids);
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_ends_with_what_it_used() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    let server = server(&[])?;
    let mut client = connect(server.address()).await?;
    let late = within(A_MOMENT, stream(text("A very long story.", STORY_TOKENS)));
    let mut late = client.stream_generate(late).await?.into_inner();
    let mut tokens = 0;
    let status = loop {
        match late.message().await {
            Ok(Some(message)) => match message.event.expect("an event") {
                Event::Delta(delta) => tokens += delta.token_ids.len() as u32,
                Event::Started(_) => {}
                other => panic!("it is not complete: {other:?}"),
            },
            Ok(None) => panic!("it ended as if it were complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(expired(&status), ("generation".to_owned(), None), "{status}");
    let details = pb::Status::decode(status.details())?.details;
    assert_eq!(details[1].type_url, "type.googleapis.com/lockstep.v1.Completed");
    let completed = v1::Completed::decode(&details[1].value[..])?;
    assert_eq!(completed.usage.expect("usage").completion_tokens, tokens);
    assert!(tokens > 0 && completed.timings.expect("timings").decode_ms > 0.0);
    Ok(())
}

#[tokio::test]
async fn a_client_that_reads_nothing_gives_its_place_up_at_its_deadline() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    let server = server(&["--max-running", "1"])?;
    let mut deaf = connect_taking(server.address(), 1_024).await?;
    let begun = Instant::now();
    let unread = within(A_MOMENT, stream(text("A very long story.", STORY_TOKENS)));
    let unread = deaf.stream_generate(unread).await?;
    let mut client = connect(server.address()).await?;
    client.generate(text("Hello", 2)).await?;
    let waited = begun.elapsed();
    assert!(waited < 3 * A_MOMENT, "the place was free after {waited:?}");
    drop(unread);
    Ok(())
}

#[tokio::test]
async fn whoever_waits_in_the_queue_leaves_it() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    let server = server(&["--max-running", "1", "--max-waiting", "1"])?;
    let mut client = connect(server.address()).await?;
    let mut story = story(&mut client).await?;
    // One may wait: each of these is taken only if the one before has left the queue.
    for _ in 0..3 {
        let late = client.generate(within(Duration::from_millis(100), text("Hello", 4))).await;
        let status = late.expect_err("the story goes on");
        let (phase, answer) = expired(&status);
        assert_eq!(phase, "queue", "{status}");
        assert!(status.message().contains("waiting in the queue"), "{status}");
        assert_eq!(answer.expect("an answer").usage.expect("usage").completion_tokens, 0);
    }
    story.message().await?.expect("the story goes on");
    drop(story);
    client.generate(text("Hello", 4)).await?;
    Ok(())
}

#[tokio::test]
async fn a_prompt_that_is_not_computed_in_time_leaves_its_blocks() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    let server = server(&["--kv-tokens", "8192", "--max-step-tokens", "64", "--no-prefix-cache"])?;
    let mut client = connect(server.address()).await?;
    let counted = v1::CountTokensRequest { chat: text(&"again ".repeat(100), 1).chat, cache_salt: None };
    let hundred_words = client.count_tokens(counted).await?.into_inner().prompt_tokens as usize;
    let long = || text(&"again ".repeat(100 * 6_000 / hundred_words), 2);
    client.generate(long()).await?;
    let timings = client.generate(long()).await?.into_inner().timings.expect("timings");
    assert!(timings.prefill_ms > 60.0, "the prompt is long: {timings:?}");

    // What comes before the first step, and a third of the steps.
    let third_ms = timings.total_ms - timings.decode_ms - timings.prefill_ms * 2.0 / 3.0;
    let late = client.generate(within(Duration::from_secs_f64(third_ms / 1e3), long())).await;
    let status = late.expect_err("a third of the time is not enough");
    let (phase, answer) = expired(&status);
    assert_eq!(phase, "prefill", "{status}, after {third_ms} ms of {timings:?}");
    assert_eq!(answer.expect("an answer").usage.expect("usage").completion_tokens, 0);
    // There are blocks for only one such prompt.
    let next = client.generate(long()).await?.into_inner();
    assert_eq!(next.usage.expect("usage").completion_tokens, 2);
    Ok(())
}

#[tokio::test]
async fn decoding_is_not_waited_for_and_its_bytes_come_back() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    // Room for one such request, not for two: 64 files of 56,155 bytes.
    let server = server(&["--max-media-bytes", "6000000"])?;
    let mut client = connect(server.address()).await?;
    client.generate(photographs()?).await?;
    let timings = client.generate(photographs()?).await?.into_inner().timings.expect("timings");
    assert!(timings.media_ms > 40.0, "decoding takes a while: {timings:?}");

    let third = Duration::from_secs_f64(timings.media_ms / 3e3);
    let late = client.generate(within(third, photographs()?)).await;
    let status = late.expect_err("a third of the time is not enough");
    let (phase, answer) = expired(&status);
    assert!(["receiving", "media"].contains(&phase.as_str()), "{status}");
    assert_eq!(answer, None);
    let given_up = Instant::now();
    loop {
        match client.generate(photographs()?).await {
            Ok(_) => return Ok(()),
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
        }
        assert!(given_up.elapsed() < Duration::from_secs(30), "the bytes did not come back");
    }
}

/// Eight films of small frames: all their frames are decoded, few are taken.
fn films() -> anyhow::Result<v1::GenerateRequest> {
    let data = std::fs::read(root().join("tests/videos/bunny.mp4"))?;
    let source = Some(v1::video::Source::Data(data.into()));
    let video = v1::Video { source, min_pixels: Some(784), max_pixels: Some(2_000), ..Default::default() };
    Ok(request(vec![v1::part::Part::Video(video); 8], 2))
}

#[tokio::test]
async fn processes_that_decode_end_with_the_deadline() -> anyhow::Result<()> {
    let _quiet = QUIET.lock().await;
    let server = server(&[])?;
    let mut client = connect(server.address()).await?;
    let shards = server.child_pids().len();
    client.generate(films()?).await?;
    let whole = client.generate(films()?).await?.into_inner();
    let media_ms = whole.timings.expect("timings").media_ms;
    assert!(media_ms > 100.0, "decoding takes a while: {media_ms} ms");

    let third = Duration::from_secs_f64(media_ms / 3e3);
    let late = tokio::spawn({
        let (mut client, films) = (client.clone(), films()?);
        async move { client.generate(within(third, films)).await }
    });
    let mut most = 0;
    while !late.is_finished() {
        most = most.max(server.decoder_pids().len());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let status = late.await?.expect_err("a third of the time is not enough");
    let (phase, answer) = expired(&status);
    assert_eq!(phase, "media", "{status}");
    assert_eq!(answer, None);
    assert!(most > 0, "nothing was being decoded");
    // Sooner than the rest of the films could have been decoded.
    let given_up = Instant::now();
    while server.child_pids().len() > shards {
        assert!(given_up.elapsed() < third, "a process goes on decoding");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let again = client.generate(films()?).await?.into_inner();
    assert_eq!(again.choices, whole.choices);
    Ok(())
}

#[tokio::test]
async fn the_shortest_of_deadlines_is_said_too() -> anyhow::Result<()> {
    let server = server(&[])?;
    let mut client = connect(server.address()).await?;
    for timeout in [Duration::ZERO, Duration::from_nanos(1), Duration::from_millis(1)] {
        let status = client.generate(within(timeout, photographs()?)).await.expect_err("it is too short");
        let (phase, _) = expired(&status);
        assert!(["receiving", "media", "prompt"].contains(&phase.as_str()), "{status}");
    }
    let counted = v1::CountTokensRequest { chat: photographs()?.chat, cache_salt: None };
    expired(&client.count_tokens(within(Duration::ZERO, counted)).await.expect_err("it is too short"));
    client.generate(within(Duration::from_secs(60), text("Hello", 2))).await?;
    Ok(())
}

#[tokio::test]
async fn a_malformed_deadline_is_named() -> anyhow::Result<()> {
    let server = server(&[])?;
    let mut client = connect(server.address()).await?;
    for timeout in ["soon", "5", "123456789S", "-1S"] {
        let mut request = tonic::Request::new(text("Hello", 2));
        request.metadata_mut().insert("grpc-timeout", timeout.parse()?);
        let status = client.generate(request).await.expect_err(timeout);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let fields = status.get_details_bad_request().expect("a BadRequest").field_violations;
        assert_eq!(fields[0].field, "grpc-timeout");
    }
    Ok(())
}

#[test]
fn ask_prints_what_came_and_fails() -> anyhow::Result<()> {
    let _quiet = QUIET.blocking_lock();
    let server = server(&[])?;
    let mut command = Command::new(binary()?);
    command.args(["ask", "--server", server.address(), "--timeout", "1", "--max-tokens", "30000"]);
    let output = command.args(["--ignore-eos", "A very long story."]).stdin(Stdio::null()).output()?;
    let (answer, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(answer.trim().len() > 1, "nothing came: {answer:?}");
    assert!(error.contains("DEADLINE_EXCEEDED"), "{error}");
    Ok(())
}
