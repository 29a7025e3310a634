//! Nothing that a client sends can hurt: the whole catalogue against a live server, beside a stream that must not notice.

use futures::StreamExt;
use lockstep_proto::v1;
use lockstep_proto::v1::part::Part;
use lockstep_tests::beside::{Beside, MAX_REQUEST_BYTES, Service, connect, first};
use lockstep_tests::golden::root;
use lockstep_tests::hostile::{Case, Expected, ask, bad_uploads, catalogue};
use lockstep_tests::server::{Server, resident_bytes};
use lockstep_tests::uploads::{LIBRARY_BYTES, pieces, upload};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// How much more memory a server may hold after a run of the catalogue than before, once an allocator has what it keeps. Also with
/// one arena the first runs were seen to add 34, 11, 23 and 0 MiB: which large buffers are there at the same time, and so what lies
/// between them, is different in each run.
const SLACK_BYTES: u64 = 24 << 20;
/// One arena for all threads. With one for each, what they keep of what was freed adds up for many runs, by tens of MiB in each, and
/// hides what is held.
const ONE_ARENA: (&str, &str) = ("MALLOC_ARENA_MAX", "1");
/// Runs after which memory must have settled.
const MAX_RUNS: usize = 5;
/// Cases that are sent at a time.
const AT_ONCE: usize = 4;
/// Plain requests after which a server has what it needs for any.
const WARM_UP: usize = 8;

fn fields(status: &Status) -> Vec<String> {
    let violations = status.get_details_bad_request().map_or(Vec::new(), |details| details.field_violations);
    violations.into_iter().map(|violation| violation.field).collect()
}

/// What became of something, where it is not what was expected.
fn unexpected<T>(name: &str, result: Result<T, Status>, expected: &Expected) -> Option<String> {
    let became = match result {
        Ok(_) => Expected::Served,
        Err(status) => Expected::Refused(status.code(), fields(&status)),
    };
    (became != *expected).then(|| format!("{name}: {became:?}, not {expected:?}"))
}

async fn wrong_case(mut service: Service, case: &Case) -> Option<String> {
    unexpected(&case.name, service.generate(case.request.clone()).await, &case.expected)
}

fn by_id(id: &[u8], cache_salt: Option<&str>) -> v1::GenerateRequest {
    let source = Some(v1::image::Source::MediaId(id.to_vec().into()));
    let image = Part::Image(v1::Image { source, ..Default::default() });
    v1::GenerateRequest { cache_salt: cache_salt.map(str::to_owned), ..ask(vec![image]) }
}

fn video_by_id(id: &[u8], cache_salt: Option<&str>) -> v1::GenerateRequest {
    let source = Some(v1::video::Source::MediaId(id.to_vec().into()));
    let video = Part::Video(v1::Video { source, ..Default::default() });
    v1::GenerateRequest { cache_salt: cache_salt.map(str::to_owned), ..ask(vec![video]) }
}

/// Bad uploads, and ids that name nothing, or nothing for this caller.
async fn wrong_uploads(mut service: Service) -> anyhow::Result<Vec<String>> {
    let picture = |name: &str| std::fs::read(root().join("tests/pictures").join(name));
    let (small, large) = (picture("noise_33x29.png")?, picture("coffee.jpg")?);
    let mut wrong = Vec::new();
    for bad in bad_uploads()? {
        let expected = Expected::Refused(Code::InvalidArgument, vec![bad.field.to_owned()]);
        wrong.extend(unexpected(bad.name, upload(&mut service, bad.pieces).await, &expected));
    }
    let hash = blake3::hash(&small);
    let not_found = |kind: &str| {
        let field = format!("chat.messages[0].parts[0].{kind}.media_id");
        Expected::Refused(Code::NotFound, vec![field])
    };
    let nowhere = not_found("image");
    let unsaid = service.generate(by_id(hash.as_bytes(), Some("salt"))).await;
    wrong.extend(unexpected("what bad uploads sent", unsaid, &nowhere));

    let id = upload(&mut service, pieces(v1::MediaKind::Image, &small, Some("salt"))).await?;
    let own = service.generate(by_id(&id, Some("salt"))).await;
    wrong.extend(unexpected("one's own", own, &Expected::Served));
    for (name, request) in [
        ("an unknown id", by_id(&[0; 32], Some("salt"))),
        ("an id without its salt", by_id(&id, None)),
        ("an id of another salt", by_id(&id, Some("other"))),
    ] {
        wrong.extend(unexpected(name, service.generate(request).await, &nowhere));
    }
    let mut foreign = tonic::Request::new(by_id(&id, Some("salt")));
    foreign.metadata_mut().insert("authorization", "Bearer other".parse()?);
    wrong.extend(unexpected("an id of another key", service.generate(foreign).await, &nowhere));
    let as_video = service.generate(video_by_id(&id, Some("salt"))).await;
    wrong.extend(unexpected("a picture's id as a video's", as_video, &not_found("video")));

    upload(&mut service, pieces(v1::MediaKind::Image, &large, None)).await?;
    let evicted = service.generate(by_id(&id, Some("salt"))).await;
    wrong.extend(unexpected("an evicted id", evicted, &nowhere));
    Ok(wrong)
}

/// Runs the catalogue, and tells what went otherwise than expected.
async fn run(service: &Service, cases: &[Case]) -> anyhow::Result<Vec<String>> {
    let runs = futures::stream::iter(cases).map(|case| wrong_case(service.clone(), case));
    let requests = runs.buffer_unordered(AT_ONCE).filter_map(|wrong| async { wrong }).collect::<Vec<_>>();
    let (requests, uploads) = futures::join!(requests, wrong_uploads(service.clone()));
    Ok([requests, uploads?].concat())
}

/// Resident memory of the server and its shards.
fn memory(server: &Server) -> u64 {
    let shards = server.shard_pids();
    shards.into_iter().chain([server.pid()]).map(|pid| resident_bytes(pid).unwrap_or(0)).sum()
}

fn hello() -> v1::GenerateRequest {
    ask(vec![Part::Text("Hi".to_owned())])
}

#[tokio::test]
async fn the_catalogue_is_answered_as_it_should_be_and_disturbs_nobody() -> anyhow::Result<()> {
    let library = LIBRARY_BYTES.to_string();
    let arguments = ["--world-size", "2", "--library-bytes", &library];
    let server = Server::start_in(&[ONE_ARENA], &root().join("tests/checkpoints/a"), &arguments)?;
    let mut service = connect(&server).await?;
    let cases = catalogue()?;
    assert!(cases.len() > 150, "{}", cases.len());
    for _ in 0..WARM_UP {
        service.generate(hello()).await?;
    }
    let mut held = vec![memory(&server)];

    let beside = Beside::begin(service.clone()).await?;
    let wrong = run(&service, &cases).await?;
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    let beside = beside.end().await?.tokens;
    held.push(memory(&server));
    // The first run is when allocators get what they keep.
    loop {
        run(&service, &cases).await?;
        held.push(memory(&server));
        let settled = held[held.len() - 1] < held[held.len() - 2] + SLACK_BYTES;
        if settled || held.len() > MAX_RUNS {
            let mib: Vec<_> =
                held.iter().map(|bytes| format!("{:.1}", *bytes as f64 / f64::from(1 << 20))).collect();
            println!("MiB held before the catalogue and after each run of it: {}", mib.join(", "));
            assert!(settled, "memory grows with every run: {held:?} bytes");
            break;
        }
    }

    assert!(beside.len() > 200, "{}", beside.len());
    assert_eq!(beside, first(service.clone(), beside.len()).await?);
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
    service.generate(hello()).await?;
    Ok(())
}
