//! Questions about videos over gRPC: every form in which a video comes, what is taken of it, and what is refused.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::video::Source;
use lockstep_tests::golden::root;
use lockstep_tests::server::{Server, binary, is_running, signal};
use serde_json::Value;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// How long the slowest machine may take.
const PATIENCE: Duration = Duration::from_secs(60);

type Client = InferenceServiceClient<Channel>;

fn server() -> anyhow::Result<Server> {
    let arguments = ["--dtype", "f32", "--world-size", "2", "--max-image-tokens", "1024"];
    Server::start(&root().join("tests/checkpoints/a"), &arguments)
}

async fn connect(server: &Server) -> anyhow::Result<Client> {
    Ok(Client::connect(format!("http://{}", server.address())).await?)
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/videos").join(name)).expect(name)
}

/// A video of small frames.
fn video(source: Source) -> v1::Video {
    v1::Video { source: Some(source), min_pixels: Some(784), max_pixels: Some(8_000), ..Default::default() }
}

fn data(data: Vec<u8>) -> v1::Video {
    video(Source::Data(data.into()))
}

fn frames(count: usize, rate: f64) -> v1::VideoFrames {
    let frames = (0..count).map(|index| file(&format!("frames/{index:02}.png")).into());
    v1::VideoFrames { frames: frames.collect(), timestamps_s: vec![], rate: Some(rate) }
}

fn chat(video: v1::Video) -> v1::Chat {
    let parts = [v1::part::Part::Video(video), v1::part::Part::Text("What moves?".into())];
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    v1::Chat { messages: vec![v1::Message { role: v1::Role::User.into(), parts }], tools: vec![] }
}

async fn ask(client: &mut Client, video: v1::Video) -> Result<(v1::MediaInfo, v1::Choice), Status> {
    let request = v1::GenerateRequest {
        chat: Some(chat(video)),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(v1::Stopping { max_tokens: Some(8), ignore_eos: Some(true), ..Default::default() }),
        logprobs: Some(3),
        ..Default::default()
    };
    let mut response = client.generate(request).await?.into_inner();
    let media = response.started.expect("what was understood").media.remove(0);
    Ok((media, response.choices.remove(0)))
}

/// The same ten frames, as a lossless file, at a rate and at times: the same answer, bit for bit.
#[tokio::test]
async fn the_form_of_a_video_makes_no_difference() -> anyhow::Result<()> {
    let server = server()?;
    let mut client = connect(&server).await?;
    let given = frames(10, 4.0);
    let times: Vec<f64> = (0..10).map(|index| f64::from(index) * 0.25).collect();
    let at_times = v1::VideoFrames { rate: None, timestamps_s: times.clone(), ..given.clone() };
    let (media, choice) = ask(&mut client, video(Source::Frames(given))).await?;
    assert_eq!(media.kind(), v1::MediaKind::Video);
    assert_eq!((media.source_width, media.source_height), (96, 64));
    assert_eq!((media.resized_width, media.resized_height, media.tokens), (84, 56, 5 * 6));
    assert_eq!(media.timestamps_s, times);
    let webp = v1::Video { fps: Some(4.0), ..data(file("moving.webp")) };
    for other in [video(Source::Frames(at_times)), webp] {
        assert_eq!(ask(&mut client, other).await?, (media.clone(), choice.clone()));
    }
    let slower = ask(&mut client, video(Source::Frames(frames(10, 0.5)))).await?;
    assert_eq!(slower.0.tokens, media.tokens);
    assert_ne!(slower.1.logprobs, choice.logprobs, "time makes a difference");
    Ok(())
}

/// Files of all kinds: which frames are taken, and how large they are. The price is the same before anything is decoded.
#[tokio::test]
async fn what_is_taken_of_a_file_is_told() -> anyhow::Result<()> {
    let server = server()?;
    let mut client = connect(&server).await?;
    let reordered = || data(file("reordered.mp4"));
    let ntsc = 1001.0 / 30_000.0;
    for (name, asked, source, frames, last_s) in [
        // 0.8 s at 2 a second are 4, the least.
        ("reordered", reordered(), [96, 64], 4, 23.0 * ntsc),
        ("at 10 a second", v1::Video { fps: Some(10.0), ..reordered() }, [96, 64], 8, 23.0 * ntsc),
        ("at all", v1::Video { fps: Some(1000.0), ..reordered() }, [96, 64], 24, 23.0 * ntsc),
        (
            "at most 6",
            v1::Video { fps: Some(1000.0), max_frames: Some(7), ..reordered() },
            [96, 64],
            6,
            23.0 * ntsc,
        ),
        ("rotated", data(file("rotated.mp4")), [64, 96], 4, 0.75),
        ("fragmented", data(file("fragmented.mp4")), [96, 64], 4, 11.0 / 25.0),
        ("trimmed", data(file("trimmed.mp4")), [96, 64], 4, 15.0 / 25.0),
        ("gif", data(file("moving.gif")), [96, 64], 4, 2.25),
    ] {
        let counted = v1::CountTokensRequest { chat: Some(chat(asked.clone())), cache_salt: None };
        let counted = client.count_tokens(counted).await.context(name)?.into_inner();
        let (media, _) = ask(&mut client, asked).await.context(name)?;
        assert_eq!(counted.media, std::slice::from_ref(&media), "{name}");
        assert_eq!([media.source_width, media.source_height], source, "{name}");
        assert_eq!(media.timestamps_s.len(), frames, "{name}");
        assert_eq!(media.timestamps_s[0], 0.0, "{name}");
        assert!((media.timestamps_s[frames - 1] - last_s).abs() < 1e-3, "{name}: {:?}", media.timestamps_s);
        let frame_tokens = media.resized_width / 28 * (media.resized_height / 28);
        assert_eq!(media.tokens, frame_tokens * frames as u32 / 2, "{name}");
        assert!(media.resized_width * media.resized_height <= 8_000, "{name}");
    }
    // Without bounds a frame has at least 128 tokens, and all of them together no more than they may.
    let plain = v1::Video { min_pixels: None, max_pixels: None, ..reordered() };
    assert!(ask(&mut client, plain).await?.0.tokens >= 2 * 128);
    let bounded = v1::Video {
        fps: Some(1000.0),
        min_pixels: Some(784),
        max_pixels: None,
        total_pixels: Some(48 * 784),
        ..reordered()
    };
    assert!(ask(&mut client, bounded).await?.0.tokens <= 48);
    Ok(())
}

/// The fields at fault of a status that must be INVALID_ARGUMENT, and its words.
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Vec<String>, String) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let details = status.get_details_bad_request().expect("a BadRequest");
    let fields = details.field_violations.into_iter().map(|violation| violation.field);
    let fields = fields.map(|field| field.trim_start_matches("chat.messages[0].parts[0].video").to_owned());
    (fields.collect(), status.message().to_owned())
}

/// Files that are no videos, or broken ones: their own fault, in words, and nobody else's.
#[tokio::test]
async fn broken_videos_cost_their_requests_only() -> anyhow::Result<()> {
    let server = server()?;
    let mut client = connect(&server).await?;
    let whole = file("reordered.mp4");
    let before = ask(&mut client, data(whole.clone())).await?;
    // What the frames are made of, of which no header says anything.
    let mut broken = whole.clone();
    let middle = whole.len() / 2;
    broken[middle..middle + 400].fill(0xA5);
    let (fields, words) = refused(ask(&mut client, data(broken)).await);
    assert_eq!(fields, [".data"]);
    assert!(words.contains("cannot be decoded"), "{words}");
    for (name, label) in [("HEVC", b"hvc1"), ("VP9", b"vp09"), ("AV1", b"av01")] {
        let mut other = whole.clone();
        let at = other.windows(4).position(|four| four == b"avc1").context("a codec")?;
        // Of several mentions the one in the table of sample formats counts, which is the last.
        let last = other.windows(4).rposition(|four| four == b"avc1").unwrap_or(at);
        other[last..last + 4].copy_from_slice(label);
        let (fields, words) = refused(ask(&mut client, data(other)).await);
        assert_eq!(fields, [".data"]);
        assert!(words.contains(&format!("the video's codec, {name}, is not supported")), "{words}");
        assert!(words.contains("frames one by one") && words.contains("started with --ffmpeg"), "{words}");
    }
    let (_, words) = refused(ask(&mut client, data(file("interlaced.mp4"))).await);
    assert!(words.contains("interlaced"), "{words}");
    let still = std::fs::read(root().join("tests/pictures/noise_33x29.png"))?;
    let (_, words) = refused(ask(&mut client, data(still)).await);
    assert!(words.contains("not a video"), "{words}");
    assert_eq!(ask(&mut client, data(whole)).await?, before);
    Ok(())
}

async fn ask_again_and_again(mut client: Client) -> Result<Infallible, Status> {
    loop {
        ask(&mut client, data(file("bunny.mp4"))).await?;
    }
}

/// Requests with videos do not wait for one another: their processes are there at the same time, and none after them.
#[tokio::test]
async fn videos_are_decoded_in_parallel() -> anyhow::Result<()> {
    let server = server()?;
    let client = connect(&server).await?;
    let shards = server.child_pids().len();
    let asking = (0..4).map(|_| ask_again_and_again(client.clone()));
    let two_at_once = async {
        while server.decoder_pids().len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        failed = futures::future::try_join_all(asking) => panic!("{failed:?}"),
        () = two_at_once => {}
        () = tokio::time::sleep(PATIENCE) => panic!("videos wait for one another"),
    }
    // Nobody asks any more.
    tokio::time::timeout(PATIENCE, async {
        while server.child_pids().len() > shards {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .context("a process is left")?;
    Ok(())
}

/// A server that is killed takes its shards and the processes that decode for it with it.
#[tokio::test]
async fn no_process_outlives_a_server() -> anyhow::Result<()> {
    let server = server()?;
    let client = connect(&server).await?;
    let kill_while_decoding = async {
        while server.decoder_pids().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let pids = server.child_pids();
        signal(server.pid(), "KILL").map(|()| pids)
    };
    let pids = tokio::select! {
        failed = ask_again_and_again(client) => panic!("{failed:?}"),
        pids = kill_while_decoding => pids?,
        () = tokio::time::sleep(PATIENCE) => panic!("nothing is decoded"),
    };
    tokio::time::timeout(PATIENCE, async {
        while pids.iter().any(|pid| is_running(*pid)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .context("a process is left")?;
    Ok(())
}

/// What a video costs is known from its headers: too much of it is refused before anything is decoded.
#[tokio::test]
async fn a_video_that_costs_too_much_is_refused_before_decoding() -> anyhow::Result<()> {
    let arguments = ["--dtype", "f32", "--max-image-tokens", "1024", "--max-context-tokens", "512"];
    let bytes = ["--max-media-bytes", "500000"];
    let server = Server::start(&root().join("tests/checkpoints/a"), &[&arguments[..], &bytes].concat())?;
    let mut client = connect(&server).await?;
    // What the frames are made of is broken, which only decoding would find.
    let mut film = file("reordered.mp4");
    let middle = film.len() / 2;
    film[middle..middle + 400].fill(0xA5);
    let film = |fps: f64, tokens: u32| v1::Video {
        fps: Some(fps),
        min_pixels: Some(tokens * 784 * 3 / 4),
        max_pixels: Some(tokens * 784),
        ..data(film.clone())
    };
    for (video, words) in [
        // 24 frames, two of them a patch.
        (film(1000.0, 520), "at most 4096"),
        (film(2.0, 1400), "at most 1024"),
        (film(1000.0, 60), "with its answer it may have 512"),
        // 8 frames of 2,352 bytes for each token.
        (film(10.0, 40), "all requests together may hold 500000"),
    ] {
        let status = ask(&mut client, video).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(words), "{status}");
    }
    Ok(())
}

#[test]
fn videos_are_asked_about_on_the_command_line() -> anyhow::Result<()> {
    let server = server()?;
    let ask = |arguments: &[&str]| -> anyhow::Result<Value> {
        let mut command = std::process::Command::new(binary()?);
        command.current_dir(root()).args([
            "ask",
            "--server",
            server.address(),
            "--json",
            "--max-tokens",
            "4",
        ]);
        let output = command.args(arguments).output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let answer = ask(&[
        "--max-pixels",
        "8000",
        "First:",
        "--video",
        "tests/videos/reordered.mp4",
        "--max-frames",
        "2",
        "--image",
        "tests/pictures/noise_33x29.png",
        "--frames",
        "tests/videos/frames",
        "--fps",
        "4",
        "Which is the longest?",
    ])?;
    let media = answer["media"].as_array().context("media")?;
    let kinds: Vec<_> = media.iter().map(|medium| medium["kind"].as_str().unwrap_or_default()).collect();
    assert_eq!(kinds, ["video", "image", "video"]);
    let places: Vec<_> = media.iter().map(|medium| medium["part_index"].as_u64()).collect();
    assert_eq!(places, [Some(1), Some(2), Some(3)]);
    let times = |index: usize| media[index]["timestamps_s"].as_array().map(Vec::len);
    assert_eq!((times(0), times(1), times(2)), (Some(2), Some(0), Some(20)));
    assert_eq!(media[2]["timestamps_s"][19].as_f64(), Some(4.75));
    Ok(())
}
