//! Connections and streams: too many, too slow, half-closed, reset, or left behind. Whatever clients do with them, the server goes
//! on, and holds nothing for those that are gone.

use std::io::Read;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lockstep::limits::{MAX_HEADER_BYTES, MAX_STREAMS_PER_CONNECTION};
use lockstep_proto::v1;
use lockstep_proto::v1::part::Part;
use lockstep_tests::beside::{Beside, Service, connect, endless, first};
use lockstep_tests::golden::root;
use lockstep_tests::hostile::ask;
use lockstep_tests::raw::{Call, Connection, framed, header_bytes};
use lockstep_tests::server::Server;
use lockstep_tests::uploads::{chunk, header};
use tonic::{Code, Streaming};
use tonic_types::StatusExt;

/// How long the server may take to notice that clients went away.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that requests may hold in a server that has little room: a photograph and its pixels, and not much more.
const LITTLE_ROOM: &str = "100000";

fn server(arguments: &[&str]) -> anyhow::Result<Server> {
    Server::start(&root().join("tests/checkpoints/a"), arguments)
}

fn hello() -> v1::GenerateRequest {
    ask(vec![Part::Text("Hi".to_owned())])
}

/// A photograph of 56,155 bytes, a single token for the model.
fn photograph() -> anyhow::Result<v1::GenerateRequest> {
    let data = std::fs::read(root().join("tests/pictures/coffee.jpg"))?;
    let source = Some(v1::image::Source::Data(data.into()));
    let side = Some(28);
    let image = v1::Image { source, resized_width: side, resized_height: side, ..Default::default() };
    Ok(ask(vec![Part::Image(image)]))
}

/// An upload that says that it has 50,000 bytes, and the first of them.
fn begin_upload(connection: &Connection, headers: &[(&str, &str)], bytes: usize) -> Call {
    let mut call = connection.call("UploadMedia", headers);
    call.send(framed(&header(v1::MediaKind::Image, 50_000, None)));
    call.send(framed(&chunk(&vec![0; bytes])));
    call
}

/// The endless stream, begun as soon as there is a place for it.
async fn begin(service: &mut Service) -> anyhow::Result<Streaming<v1::StreamGenerateResponse>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match service.stream_generate(endless()).await {
            Ok(stream) => return Ok(stream.into_inner()),
            Err(refused) if refused.code() == Code::ResourceExhausted && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(refused) => return Err(refused.into()),
        }
    }
}

/// Waits until a request is answered that takes nearly all the room that there is.
async fn room_for_a_photograph(service: &mut Service) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(refused) = service.generate(photograph()?).await {
        let wait = refused.code() == Code::ResourceExhausted && Instant::now() < deadline;
        anyhow::ensure!(wait, "the bytes did not come back: {refused}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Messages that begin and do not go on: they are told at their deadlines, and hold nothing after them.
#[tokio::test]
async fn what_does_not_arrive_in_time_is_given_up() -> anyhow::Result<()> {
    let server = server(&["--max-media-bytes", LITTLE_ROOM])?;
    let mut service = connect(&server).await?;
    room_for_a_photograph(&mut service).await?;
    let beside = Beside::begin(service.clone()).await?;

    let connection = Connection::open(server.address()).await?;
    let timeout = Duration::from_secs(4);
    let soon = [("grpc-timeout", "4S")];
    let sent = Instant::now();
    // A chunk counts twice, in its message and in its file.
    let upload = begin_upload(&connection, &soon, 20_000);
    let mut request = connection.call("Generate", &soon);
    request.send(framed(&photograph()?).slice(..20_000));
    let mut stream = connection.call("StreamGenerate", &soon);
    stream.send(Bytes::from_static(&[0, 0]));
    // They hold their bytes as soon as these have arrived.
    let refused = loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        match service.generate(photograph()?).await {
            Err(refused) => break refused,
            Ok(_) => assert!(sent.elapsed() < timeout, "what arrives is not counted"),
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    for (mut call, name) in [(upload, "upload"), (request, "request"), (stream, "stream")] {
        let status = call.answer().await?.expect(name);
        assert_eq!(status.code(), Code::DeadlineExceeded, "{name}: {status}");
        assert!(status.message().contains("receiving the request"), "{name}: {status}");
        let info = status.get_details_error_info().expect("an ErrorInfo");
        assert_eq!(info.metadata["phase"], "receiving", "{name}");
    }
    let took = sent.elapsed();
    assert!(took < 2 * timeout, "they came after {took:?}");

    room_for_a_photograph(&mut service).await?;
    let beside = beside.end().await?.tokens;
    assert_eq!(beside, first(service, beside.len()).await?);
    Ok(())
}

/// Streams that end in the middle, each on a connection that goes on.
#[tokio::test]
async fn half_closed_and_reset_streams_leave_nothing() -> anyhow::Result<()> {
    let arguments = ["--max-running", "2", "--max-waiting", "1", "--max-media-bytes", LITTLE_ROOM];
    let server = server(&arguments)?;
    let mut service = connect(&server).await?;
    let beside = Beside::begin(service.clone()).await?;
    let connection = Connection::open(server.address()).await?;

    for _ in 0..3 {
        // There is room for all of these at once, for a reset takes its time, but not for twice as many and a photograph.
        for bytes in [0, 1, 10_000] {
            for wait_ms in [0, 1, 20] {
                let mut call = begin_upload(&connection, &[], bytes);
                // Sent, and perhaps looked at. Then it is reset.
                let answer = tokio::time::timeout(Duration::from_millis(wait_ms), call.answer()).await;
                assert!(answer.is_err(), "it is not complete: {answer:?}");
            }
        }
        room_for_a_photograph(&mut service).await?;
    }
    for _ in 0..20 {
        drop(begin(&mut service).await?.message().await?);
    }
    for (method, sent, code) in [
        ("UploadMedia", Bytes::new(), Code::InvalidArgument),
        ("UploadMedia", framed(&header(v1::MediaKind::Image, 10, None)), Code::InvalidArgument),
        ("UploadMedia", framed(&chunk(&[1; 100])).slice(..50), Code::Internal),
        ("Generate", Bytes::new(), Code::Internal),
        ("Generate", framed(&photograph()?).slice(..30_000), Code::Internal),
        ("StreamGenerate", Bytes::new(), Code::Internal),
        ("StreamGenerate", Bytes::from_static(&[0, 0]), Code::Internal),
        ("CountTokens", Bytes::new(), Code::Internal),
    ] {
        let mut call = connection.call(method, &[]);
        if !sent.is_empty() {
            call.send(sent);
        }
        call.half_close();
        let status = call.answer().await?.expect(method);
        assert_eq!(status.code(), code, "{method}: {status}");
    }

    room_for_a_photograph(&mut service).await?;
    let beside = beside.end().await?.tokens;
    assert_eq!(beside, first(service, beside.len()).await?);
    let ended = server.stop()?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    assert!(!ended.output.contains("panicked"), "{}", ended.output);
    Ok(())
}

/// Requests whose clients went away in the middle of them, with their connections.
#[tokio::test]
async fn abandoned_requests_leave_nothing() -> anyhow::Result<()> {
    let server = server(&["--max-running", "4", "--max-waiting", "4", "--max-media-bytes", LITTLE_ROOM])?;
    for _ in 0..20 {
        let mut service = connect(&server).await?;
        drop(begin(&mut service).await?.message().await?);
    }
    for bytes in [0, 500, 20_000] {
        let connection = Connection::open(server.address()).await?;
        // It never ends: its client goes away.
        let mut upload = begin_upload(&connection, &[], bytes);
        assert!(tokio::time::timeout(Duration::from_millis(50), upload.answer()).await.is_err());
    }
    let mut service = connect(&server).await?;
    room_for_a_photograph(&mut service).await?;
    // As many as may run and wait find places.
    for _ in 0..8 {
        service.generate(hello()).await?;
    }
    Ok(())
}

/// A complete request.
fn question(connection: &Connection, headers: &[(&str, &str)]) -> Call {
    let mut call = connection.call("Generate", headers);
    call.send(framed(&hello()));
    call.half_close();
    call
}

#[tokio::test]
async fn a_connection_has_a_number_of_requests_at_a_time() -> anyhow::Result<()> {
    let server = server(&[])?;
    let connection = Connection::open(server.address()).await?;
    // Answered, so that the connection knows the server's rules.
    assert!(question(&connection, &[]).answer().await?.is_none());
    let unfinished = || connection.call("UploadMedia", &[]);
    let mut held: Vec<_> = (1..MAX_STREAMS_PER_CONNECTION).map(|_| unfinished()).collect();
    assert!(question(&connection, &[]).answer().await?.is_none(), "there is one place left");
    held.push(unfinished());
    let mut waiting = question(&connection, &[]);
    let answer = tokio::time::timeout(Duration::from_millis(500), waiting.answer()).await;
    assert!(answer.is_err(), "there is no place left: {answer:?}");
    connect(&server).await?.generate(hello()).await?;
    held.truncate(held.len() / 2);
    let answer = tokio::time::timeout(PATIENCE, waiting.answer()).await?;
    assert!(answer?.is_none());
    Ok(())
}

#[tokio::test]
async fn headers_have_a_bound() -> anyhow::Result<()> {
    let server = server(&[])?;
    let connection = Connection::open(server.address()).await?;
    let rest = MAX_HEADER_BYTES as usize - header_bytes("Generate", &[("filler", "")]);
    for (bytes, expected) in [(rest - 1, 200), (rest + 1, 431), (2 * rest, 431), (1, 200)] {
        let filler = "x".repeat(bytes);
        let status = question(&connection, &[("filler", &filler)]).http_status().await?;
        assert_eq!(status.as_u16(), expected, "{bytes} bytes, of {rest}");
    }
    Ok(())
}

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once() -> anyhow::Result<()> {
    let server = server(&["--max-connections", "2"])?;
    let mut client = connect(&server).await?;
    let mut second = connect(&server).await?;
    // Answered, so that both have been taken when the third one comes.
    client.generate(hello()).await?;
    second.generate(hello()).await?;
    let mut third = std::net::TcpStream::connect(server.address())?;
    third.set_read_timeout(Some(Duration::from_secs(5)))?;
    match third.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("it is not closed: {other:?}"),
    }
    client.generate(hello()).await?;
    drop(second);
    let closed = Instant::now();
    loop {
        if let Ok(mut next) = connect(&server).await
            && next.generate(hello()).await.is_ok()
        {
            return Ok(());
        }
        assert!(closed.elapsed() < Duration::from_secs(5), "a closed connection keeps its place");
    }
}
