//! Large pictures are encoded in pieces, and nobody but who asked notices.

use std::process::{Command, Stdio};
use std::time::Duration;

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::golden::root;
use lockstep_tests::server::{Server, binary};
use tonic::Streaming;
use tonic::transport::Channel;

type Client = InferenceServiceClient<Channel>;

/// Width and height for the model: 1,120 tokens, which with their attention cost about 3,900 tokens of a step's budget.
const LARGE: [u32; 2] = [1120, 784];

/// A server whose steps are so small that encoding [`LARGE`] takes about 60 of them.
fn server() -> anyhow::Result<Server> {
    let arguments =
        ["--world-size", "2", "--max-image-tokens", "1120", "--max-step-tokens", "64", "--max-running", "8"];
    Server::start(&root().join("tests/checkpoints/a"), &arguments)
}

async fn client(server: &Server) -> anyhow::Result<Client> {
    Ok(Client::connect(format!("http://{}", server.address())).await?)
}

fn text(text: &str) -> v1::Part {
    v1::Part { part: Some(v1::part::Part::Text(text.to_owned())) }
}

fn request(parts: Vec<v1::Part>, max_tokens: u32) -> v1::GenerateRequest {
    let message = v1::Message { role: v1::Role::User.into(), parts };
    v1::GenerateRequest {
        chat: Some(v1::Chat { messages: vec![message], tools: vec![] }),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        logprobs: Some(3),
        ..Default::default()
    }
}

/// A question about a large picture. Pictures of requests with different salts are encoded for each.
fn about_picture(salt: &str) -> anyhow::Result<v1::GenerateRequest> {
    let data = std::fs::read(root().join("tests/pictures/cat.jpg"))?;
    let [width, height] = LARGE.map(Some);
    let source = Some(v1::image::Source::Data(data.into()));
    let image = v1::Image { source, resized_width: width, resized_height: height, ..Default::default() };
    let picture = v1::Part { part: Some(v1::part::Part::Image(image)) };
    let request = request(vec![text("Look: "), picture, text("What is this?")], 6);
    Ok(v1::GenerateRequest { cache_salt: Some(salt.to_owned()), ..request })
}

async fn stream(
    client: &mut Client,
    request: v1::GenerateRequest,
) -> anyhow::Result<Streaming<v1::StreamGenerateResponse>> {
    let request = v1::StreamGenerateRequest { request: Some(request) };
    Ok(client.stream_generate(request).await?.into_inner())
}

/// The next event's tokens.
async fn tokens(stream: &mut Streaming<v1::StreamGenerateResponse>) -> anyhow::Result<Vec<u32>> {
    match stream.message().await?.and_then(|message| message.event) {
        Some(Event::Delta(delta)) => Ok(delta.token_ids),
        Some(Event::Started(_)) => Ok(vec![]),
        other => anyhow::bail!("the stream ended: {other:?}"),
    }
}

/// What the same question gets from a server that encodes the picture in one step.
async fn expected() -> anyhow::Result<Vec<v1::Choice>> {
    let arguments = ["--world-size", "2", "--max-image-tokens", "1120", "--max-step-tokens", "8192"];
    let server = Server::start(&root().join("tests/checkpoints/a"), &arguments)?;
    let answer = client(&server).await?.generate(about_picture("whole")?).await?.into_inner();
    assert_eq!(answer.started.expect("started").media[0].tokens, 1120);
    Ok(answer.choices)
}

#[tokio::test]
async fn a_stream_goes_on_between_the_pieces_of_a_picture_whose_answer_is_the_same() -> anyhow::Result<()> {
    let expected = expected().await?;
    let server = server()?;
    let mut client = client(&server).await?;
    let story = request(vec![text("A very long story.")], 20_000);
    let mut told = stream(&mut client, story).await?;
    let mut before = vec![];
    while before.len() < 20 {
        before.extend(tokens(&mut told).await?);
    }

    let mut asking = client.clone();
    let question = about_picture("pieces")?;
    let answer = asking.generate(question);
    tokio::pin!(answer);
    let mut beside = vec![];
    let answer = loop {
        tokio::select! {
            answer = &mut answer => break answer?.into_inner(),
            more = tokens(&mut told) => beside.extend(more?),
        }
    };
    println!("{} tokens of the stream came beside {:?}", beside.len(), answer.timings);
    assert!(beside.len() >= 50, "{} tokens came while the picture was encoded", beside.len());
    assert_eq!(answer.choices, expected, "the same bits as of encoding in one step");
    assert!(answer.timings.expect("timings").vision_ms > 0.0);

    // The stream itself is what it is alone.
    drop(told);
    let count = (before.len() + beside.len()) as u32;
    let mut alone = stream(&mut client, request(vec![text("A very long story.")], count)).await?;
    let mut tokens_alone = vec![];
    while tokens_alone.len() < count as usize {
        tokens_alone.extend(tokens(&mut alone).await?);
    }
    assert_eq!(tokens_alone, [before, beside].concat());
    Ok(())
}

#[tokio::test]
async fn pictures_left_half_way_leave_nothing_behind() -> anyhow::Result<()> {
    let expected = expected().await?;
    let server = server()?;
    let mut client = client(&server).await?;
    for (round, wait_ms) in [0, 3, 10, 30, 60, 100].into_iter().enumerate() {
        let (shared, other) = (format!("shared {round}"), format!("other {round}"));
        // The first is left while others wait for the same picture, and for another one.
        let mut left = stream(&mut client, about_picture(&shared)?).await?;
        left.message().await?;
        let (mut one, mut two) = (client.clone(), client.clone());
        let (same, other) = (about_picture(&shared)?, about_picture(&other)?);
        let same = tokio::spawn(async move { one.generate(same).await });
        let other = tokio::spawn(async move { two.generate(other).await });
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        drop(left);
        assert_eq!(same.await??.into_inner().choices, expected, "after {wait_ms} ms");
        assert_eq!(other.await??.into_inner().choices, expected, "after {wait_ms} ms");
    }
    // Pixels are let go of by the server and by every shard.
    let mut pids = server.shard_pids();
    pids.push(server.pid());
    for pid in pids {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
        let open: Vec<_> = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok()).collect();
        let pixels = open.iter().filter(|target| target.to_string_lossy().contains("lockstep-pixels"));
        assert_eq!(pixels.count(), 0, "process {pid} has {open:?} open");
    }
    Ok(())
}

#[test]
fn the_bench_of_gaps_tells_how_the_stream_fared() -> anyhow::Result<()> {
    let server = server()?;
    let mut command = Command::new(binary()?);
    let [width, height] = LARGE.map(|side| side.to_string());
    command.current_dir(root()).args(["bench", "--server", server.address(), "--json", "--max-tokens", "20"]);
    command.args(["--beside-picture", "tests/pictures/cat.jpg"]);
    command.args(["--resized-width", &width, "--resized-height", &height]);
    let output = command.stdin(Stdio::null()).output()?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["newcomer"]["picture"]["tokens"], 1120);
    assert!(report["num_beside"].as_u64().is_some_and(|tokens| tokens >= 50), "{report}");
    for field in ["alone_ms", "beside_ms"] {
        let [median, max] = ["median", "max"].map(|of| report[field][of].as_f64().expect("a number"));
        assert!(0.0 < median && median <= max, "{report}");
    }
    assert!(report["vision_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{report}");
    Ok(())
}
