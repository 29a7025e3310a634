//! Questions about videos over gRPC: every form in which a video comes, what is taken of it, and what is refused.

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::video::Source;
use lockstep_tests::golden::root;
use lockstep_tests::server::{Server, binary};
use serde_json::Value;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

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

/// `frames` with these times.
fn at(times_s: &[f64]) -> v1::Video {
    let frames = v1::VideoFrames { rate: None, timestamps_s: times_s.to_vec(), ..frames(times_s.len(), 1.0) };
    video(Source::Frames(frames))
}

#[tokio::test]
async fn every_field_of_a_video_is_checked() -> anyhow::Result<()> {
    let server = server()?;
    let mut client = connect(&server).await?;
    let given = |change: &dyn Fn(&mut v1::VideoFrames)| {
        let mut frames = frames(4, 2.0);
        change(&mut frames);
        video(Source::Frames(frames))
    };
    let film = || data(file("reordered.mp4"));
    let noise = std::fs::read(root().join("tests/pictures/noise_33x29.png"))?;
    for (video, fields) in [
        (v1::Video::default(), &[""][..]),
        (data(vec![]), &[".data"]),
        (v1::Video { fps: Some(f64::NAN), max_frames: Some(1), ..film() }, &[".fps", ".max_frames"]),
        (v1::Video { fps: Some(-1.0), max_frames: Some(u32::MAX), ..film() }, &[".fps", ".max_frames"]),
        (
            v1::Video { min_pixels: Some(0), max_pixels: Some(0), total_pixels: Some(0), ..film() },
            &[".min_pixels", ".max_pixels", ".total_pixels"],
        ),
        (v1::Video { min_pixels: Some(9_000), ..film() }, &[".min_pixels"]),
        (given(&|frames| frames.frames.clear()), &[".frames.frames"]),
        (given(&|frames| frames.frames = vec![frames.frames[0].clone(); 769]), &[".frames.frames"]),
        (given(&|frames| frames.frames[2] = vec![].into()), &[".frames.frames[2]"]),
        (given(&|frames| frames.frames[1] = b"no picture"[..].into()), &[".frames.frames[1]"]),
        (given(&|frames| frames.frames[3] = noise.clone().into()), &[".frames.frames[3]"]),
        (given(&|frames| frames.rate = None), &[".frames.timestamps_s"]),
        (given(&|frames| frames.timestamps_s = vec![0.0; 4]), &[".frames.rate"]),
        (given(&|frames| frames.rate = Some(0.0)), &[".frames.rate"]),
        (given(&|frames| frames.rate = Some(f64::INFINITY)), &[".frames.rate"]),
        (given(&|frames| frames.rate = Some(1e-9)), &[".frames.rate"]),
        (at(&[0.0, 1.0, 0.5, f64::NAN]), &[".frames.timestamps_s[2]", ".frames.timestamps_s[3]"]),
        (at(&[-1.0, 1e30]), &[".frames.timestamps_s[0]", ".frames.timestamps_s[1]"]),
        (at(&[2.0, 2.0]), &[".frames.timestamps_s"]),
        (v1::Video { fps: Some(1.0), max_frames: Some(4), ..at(&[0.0, 1.0]) }, &[".fps", ".max_frames"]),
        // 24 frames of at least 400 tokens each pair are more than the server takes.
        (
            v1::Video { fps: Some(1000.0), min_pixels: Some(400_000), max_pixels: Some(400_000), ..film() },
            &[".data"],
        ),
    ] {
        let shown = format!("{fields:?}");
        assert_eq!(refused(ask(&mut client, video).await).0, fields, "{shown}");
    }
    let by_id = ask(&mut client, video(Source::MediaId(vec![0; 32].into()))).await.unwrap_err();
    assert_eq!(by_id.code(), Code::NotFound);
    Ok(())
}

/// Files that are no videos, or broken ones: their own fault, in words, and nobody else's.
#[tokio::test]
async fn broken_videos_cost_their_requests_only() -> anyhow::Result<()> {
    let server = server()?;
    let mut client = connect(&server).await?;
    let whole = file("reordered.mp4");
    let before = ask(&mut client, data(whole.clone())).await?;
    for sixteenth in 1..16 {
        let cut = whole[..whole.len() * sixteenth / 16].to_vec();
        assert_eq!(refused(ask(&mut client, data(cut)).await).0, [".data"], "{sixteenth}/16");
    }
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

async fn uploaded(client: &mut Client, kind: v1::MediaKind, file: Vec<u8>) -> Result<bytes::Bytes, Status> {
    use v1::upload_media_request::Piece;
    let header = v1::UploadHeader { kind: kind.into(), size_bytes: file.len() as u64, cache_salt: None };
    let pieces = [Piece::Header(header), Piece::Chunk(file.into())];
    let pieces = pieces.map(|piece| v1::UploadMediaRequest { piece: Some(piece) });
    Ok(client.upload_media(futures::stream::iter(pieces)).await?.into_inner().media_id)
}

#[tokio::test]
async fn an_uploaded_video_is_asked_about_by_its_id() -> anyhow::Result<()> {
    let server = server()?;
    let mut client = connect(&server).await?;
    let film = file("reordered.mp4");
    let sent = ask(&mut client, data(film.clone())).await?;
    let id = uploaded(&mut client, v1::MediaKind::Video, film.clone()).await?;
    assert_eq!(ask(&mut client, video(Source::MediaId(id))).await?, sent);
    let still = std::fs::read(root().join("tests/pictures/noise_33x29.png"))?;
    let picture = uploaded(&mut client, v1::MediaKind::Image, still.clone()).await?;
    let error = ask(&mut client, video(Source::MediaId(picture))).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    for (kind, wrong) in [(v1::MediaKind::Video, still), (v1::MediaKind::Image, film)] {
        let error = uploaded(&mut client, kind, wrong).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
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
