//! Nothing that a client sends can hurt: the whole catalogue against a live server, beside a stream that must not notice.

use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::golden::root;
use lockstep_tests::hostile::{Case, Expected, ask, catalogue};
use lockstep_tests::server::{Server, resident_bytes};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// How much more memory a server may hold after a run of the catalogue than before, once an allocator has what it keeps.
const SLACK_BYTES: u64 = 24 << 20;
/// Runs after which memory must have settled.
const MAX_RUNS: usize = 5;
/// Bytes of the largest message.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// How long the server may take to notice that clients went away.
const PATIENCE: Duration = Duration::from_secs(10);
/// Cases that are sent at a time.
const AT_ONCE: usize = 4;

type Service = InferenceServiceClient<Channel>;

async fn connect(server: &Server) -> anyhow::Result<Service> {
    let channel = Channel::from_shared(format!("http://{}", server.address()))?;
    let service = Service::new(channel.connect().await?);
    Ok(service.max_encoding_message_size(2 * MAX_REQUEST_BYTES).max_decoding_message_size(MAX_REQUEST_BYTES))
}

fn fields(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map_or(Vec::new(), |details| details.field_violations);
    violations.into_iter().map(|violation| violation.field).collect()
}

/// What became of a case, where it is not what was expected.
async fn wrong(mut service: Service, case: &Case) -> Option<String> {
    let became = match service.generate(case.request.clone()).await {
        Ok(_) => Expected::Served,
        Err(status) => Expected::Refused(status.code(), fields(&status)),
    };
    (became != case.expected).then(|| format!("{}: {became:?}, not {:?}", case.name, case.expected))
}

/// Runs the catalogue, and tells what went otherwise than expected.
async fn run(service: &Service, cases: &[Case]) -> Vec<String> {
    use futures::StreamExt;
    let runs = futures::stream::iter(cases).map(|case| wrong(service.clone(), case));
    runs.buffer_unordered(AT_ONCE).filter_map(|wrong| async { wrong }).collect().await
}

/// A token and the bits of its log-probability.
type Token = (u32, u32);

fn endless() -> v1::StreamGenerateRequest {
    let mut request = ask(vec![v1::part::Part::Text("Tell me everything.".to_owned())]);
    request.logprobs = Some(0);
    request.sampling = Some(v1::Sampling { temperature: Some(0.8), seed: Some(11), ..Default::default() });
    request.stopping = Some(v1::Stopping { ignore_eos: Some(true), ..Default::default() });
    v1::StreamGenerateRequest { request: Some(request) }
}

/// The tokens of the endless stream until `enough` says so.
async fn listen(mut service: Service, mut enough: impl FnMut(usize) -> bool) -> anyhow::Result<Vec<Token>> {
    let mut stream = service.stream_generate(endless()).await?.into_inner();
    let mut tokens = Vec::new();
    while !enough(tokens.len()) {
        let event = stream.message().await?.and_then(|message| message.event);
        match event.ok_or_else(|| anyhow::anyhow!("the stream ended"))? {
            Event::Delta(delta) => {
                let logprobs = delta
                    .logprobs
                    .iter()
                    .map(|position| position.chosen.as_ref().map_or(0.0, |chosen| chosen.logprob));
                tokens.extend(delta.token_ids.iter().copied().zip(logprobs.map(f32::to_bits)));
            }
            Event::Started(_) => {}
            other => anyhow::bail!("the stream ended after {} tokens: {other:?}", tokens.len()),
        }
    }
    Ok(tokens)
}

/// Resident memory of the server and its shards.
fn memory(server: &Server) -> u64 {
    let shards = server.shard_pids();
    shards.into_iter().chain([server.pid()]).map(|pid| resident_bytes(pid).unwrap_or(0)).sum()
}

#[tokio::test]
async fn the_catalogue_is_answered_as_it_should_be_and_disturbs_nobody() -> anyhow::Result<()> {
    let server = Server::start(&root().join("tests/checkpoints/a"), &["--world-size", "2"])?;
    let service = connect(&server).await?;
    let cases = catalogue()?;
    assert!(cases.len() > 150, "{}", cases.len());

    let (done, mut is_done) = watch::channel(false);
    let stream = tokio::spawn(listen(service.clone(), move |_| *is_done.borrow_and_update()));
    let wrong = run(&service, &cases).await;
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    done.send(true)?;
    let beside = stream.await??;
    let mut held = vec![memory(&server)];
    while held.len() <= MAX_RUNS {
        run(&service, &cases).await;
        held.push(memory(&server));
        if held[held.len() - 1] < held[held.len() - 2] + SLACK_BYTES {
            break;
        }
    }
    assert!(held.len() <= MAX_RUNS, "memory grows with every run: {held:?} bytes");

    let alone = listen(service.clone(), |count| count >= beside.len()).await?;
    assert!(beside.len() > 200, "{}", beside.len());
    assert_eq!(beside, alone[..beside.len()]);
    let ended = server.stop()?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(!ended.output.contains("panicked"), "{}", ended.output);
    Ok(())
}

#[tokio::test]
async fn a_message_one_byte_too_long_is_refused() -> anyhow::Result<()> {
    use prost::Message;
    let server = Server::start(&root().join("tests/checkpoints/a"), &[])?;
    let mut service = connect(&server).await?;
    let of_bytes = |bytes: usize| {
        let mut request = ask(vec![]);
        request.adapter = Some("a".repeat(bytes));
        request
    };
    let rest = of_bytes(MAX_REQUEST_BYTES).encoded_len() - MAX_REQUEST_BYTES;
    let longest = of_bytes(MAX_REQUEST_BYTES - rest);
    assert_eq!(longest.encoded_len(), MAX_REQUEST_BYTES);
    let refused = service.generate(longest).await.expect_err("a message without parts");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let refused =
        service.generate(of_bytes(MAX_REQUEST_BYTES - rest + 1)).await.expect_err("one byte too many");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    service.generate(ask(vec![v1::part::Part::Text("Hi".to_owned())])).await?;
    Ok(())
}

/// Requests whose clients went away in the middle of them, in every way.
#[tokio::test]
async fn abandoned_requests_leave_nothing() -> anyhow::Result<()> {
    let server =
        Server::start(&root().join("tests/checkpoints/a"), &["--max-running", "4", "--max-waiting", "4"])?;
    for _ in 0..20 {
        // Each on a connection of its own, which goes away with it. That is noticed a moment later.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut service = connect(&server).await?;
            match service.stream_generate(endless()).await {
                Ok(stream) => break drop(stream.into_inner().message().await?),
                Err(refused) if refused.code() == Code::ResourceExhausted && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(refused) => return Err(refused.into()),
            }
        }
    }
    for pieces in 0..3 {
        let mut service = connect(&server).await?;
        let header =
            v1::UploadHeader { kind: v1::MediaKind::Image.into(), size_bytes: 1000, cache_salt: None };
        let header = v1::upload_media_request::Piece::Header(header);
        let chunk = v1::upload_media_request::Piece::Chunk(vec![0; 500].into());
        let pieces = [header, chunk].into_iter().take(pieces);
        let pieces = pieces.map(|piece| v1::UploadMediaRequest { piece: Some(piece) }).collect::<Vec<_>>();
        // It never ends: its client goes away.
        use futures::StreamExt;
        let endless = futures::stream::iter(pieces).chain(futures::stream::pending());
        let upload = service.upload_media(endless);
        assert!(tokio::time::timeout(Duration::from_millis(50), upload).await.is_err());
    }
    // As many as may run and wait find places.
    let mut service = connect(&server).await?;
    for _ in 0..8 {
        service.generate(ask(vec![v1::part::Part::Text("Hi".to_owned())])).await?;
    }
    Ok(())
}
