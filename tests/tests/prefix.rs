//! The prefix cache: what an earlier request of the same client computed is neither encoded nor computed again, and answers are the
//! same as without it.

use lockstep_proto::v1;
use lockstep_tests::beside::{Service, connect};
use lockstep_tests::golden;
use lockstep_tests::server::Server;

/// Tokens in a block: only full ones are kept.
const BLOCK_TOKENS: u32 = 32;

fn picture() -> anyhow::Result<v1::part::Part> {
    let data = std::fs::read(golden::root().join("tests/pictures/cat.jpg"))?;
    let source = Some(v1::image::Source::Data(data.into()));
    Ok(v1::part::Part::Image(v1::Image { source, ..Default::default() }))
}

/// Four frames, as so many a second.
fn film(rate: f64) -> anyhow::Result<v1::part::Part> {
    let frame = std::fs::read(golden::root().join("tests/pictures/noise_56x56.png"))?;
    let frames = vec![frame.into(); 4];
    let frames = v1::VideoFrames { frames, rate: Some(rate), ..Default::default() };
    let source = Some(v1::video::Source::Frames(frames));
    Ok(v1::part::Part::Video(v1::Video { source, ..Default::default() }))
}

fn text(text: &str) -> v1::part::Part {
    v1::part::Part::Text(text.to_owned())
}

fn message(role: v1::Role, parts: Vec<v1::part::Part>) -> v1::Message {
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    v1::Message { role: role.into(), parts }
}

fn request(messages: Vec<v1::Message>) -> v1::GenerateRequest {
    v1::GenerateRequest {
        chat: Some(v1::Chat { messages, tools: vec![] }),
        sampling: Some(v1::Sampling { temperature: Some(0.7), seed: Some(5), ..Default::default() }),
        stopping: Some(v1::Stopping { max_tokens: Some(24), ignore_eos: Some(true), ..Default::default() }),
        logprobs: Some(2),
        ..Default::default()
    }
}

struct Answer {
    message: v1::GenerateResponse,
    prompt: u32,
    cached: u32,
}

async fn ask(service: &mut Service, request: v1::GenerateRequest) -> anyhow::Result<Answer> {
    let message = service.generate(request).await?.into_inner();
    let usage = message.usage.unwrap_or_default();
    let started = message.started.as_ref().map(|started| (started.prompt_tokens, started.cached_tokens));
    assert_eq!(started, Some((usage.prompt_tokens, usage.cached_tokens)));
    Ok(Answer { message, prompt: usage.prompt_tokens, cached: usage.cached_tokens })
}

/// Three turns about one picture.
async fn conversation(service: &mut Service) -> anyhow::Result<Vec<Answer>> {
    let mut messages = vec![];
    let mut answers = vec![];
    for question in
        ["What is in this picture?", "What colour is it?", "And what is it doing there, do you think?"]
    {
        let shown = messages.is_empty().then(picture).transpose()?;
        messages.push(message(v1::Role::User, shown.into_iter().chain([text(question)]).collect()));
        let answer = ask(service, request(messages.clone())).await?;
        messages.push(message(v1::Role::Assistant, vec![text(&answer.message.choices[0].text)]));
        answers.push(answer);
    }
    Ok(answers)
}

fn server(arguments: &[&str]) -> anyhow::Result<Server> {
    let arguments = [&["--world-size", "2", "--max-step-tokens", "128"], arguments].concat();
    Server::start(&golden::root().join("tests/checkpoints/a"), &arguments)
}

#[tokio::test]
async fn a_conversation_about_a_picture_computes_it_once_and_says_the_same() -> anyhow::Result<()> {
    // So few features that another picture takes the place of the first.
    let (with, without) = (server(&["--feature-tokens", "1024"])?, server(&["--no-prefix-cache"])?);
    let answers = conversation(&mut connect(&with).await?).await?;
    let plain = conversation(&mut connect(&without).await?).await?;
    for (answer, plain) in answers.iter().zip(&plain) {
        assert_eq!(answer.message.choices, plain.message.choices);
        assert_eq!((answer.prompt, plain.cached), (plain.prompt, 0));
    }
    assert_eq!(answers[0].cached, 0);
    for turn in 1..answers.len() {
        let before = answers[turn - 1].prompt;
        let [answer, first] = [&answers[turn], &answers[0]];
        assert!(answer.cached >= before / BLOCK_TOKENS * BLOCK_TOKENS, "{} of {before}", answer.cached);
        let vision = |answer: &Answer| answer.message.timings.unwrap_or_default().vision_ms;
        assert!(vision(first) > 0.0 && vision(answer) == 0.0, "turn {turn} encodes the picture");
    }
    Ok(())
}

#[tokio::test]
async fn nobody_finds_what_is_not_theirs() -> anyhow::Result<()> {
    let server = server(&[])?;
    let mut service = connect(&server).await?;
    let long = text(&"All work and no play makes Jack a dull boy. ".repeat(20));
    let asked = |salt: Option<&str>| {
        let mut request = request(vec![message(v1::Role::User, vec![long.clone()])]);
        request.cache_salt = salt.map(str::to_owned);
        request
    };
    assert_eq!(ask(&mut service, asked(None)).await?.cached, 0);
    let again = ask(&mut service, asked(None)).await?;
    assert!(again.cached + BLOCK_TOKENS >= again.prompt, "{} of {}", again.cached, again.prompt);
    assert_eq!(ask(&mut service, asked(Some("mine"))).await?.cached, 0);
    assert!(ask(&mut service, asked(Some("mine"))).await?.cached > 0);
    let mut keyed = tonic::Request::new(asked(None));
    keyed.metadata_mut().insert("authorization", "Bearer somebody".parse()?);
    let usage = service.generate(keyed).await?.into_inner().usage.unwrap_or_default();
    assert_eq!(usage.cached_tokens, 0);
    Ok(())
}

#[tokio::test]
async fn the_same_frames_at_another_rate_are_another_video() -> anyhow::Result<()> {
    let server = server(&[])?;
    let mut service = connect(&server).await?;
    // Longer than a block before the frames end.
    let filler = text(&"Watch this closely. ".repeat(20));
    let mut cached = vec![];
    for rate in [2.0, 2.0, 4.0, 2.0] {
        let parts = vec![film(rate)?, filler.clone()];
        cached.push(ask(&mut service, request(vec![message(v1::Role::User, parts)])).await?.cached);
    }
    assert_eq!((cached[0], cached[1] > 0, cached[3]), (0, true, cached[1]));
    assert!(cached[2] < BLOCK_TOKENS, "{cached:?}");
    Ok(())
}
