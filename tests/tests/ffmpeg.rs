//! Questions about videos of other codecs, to a server that has an ffmpeg: the one that LOCKSTEP_FFMPEG names, or that of
//! the system. Where there is none, the tests that need it say so and pass.

use std::path::PathBuf;

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::upload_media_request::Piece;
use lockstep_proto::v1::video::Source;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

type Client = InferenceServiceClient<Channel>;

fn ffmpeg() -> Option<PathBuf> {
    let named = std::env::var_os("LOCKSTEP_FFMPEG").map(PathBuf::from);
    let of_system = || {
        let folders = std::env::var_os("PATH")?;
        std::env::split_paths(&folders).map(|folder| folder.join("ffmpeg")).find(|path| path.is_file())
    };
    let found = named.or_else(of_system);
    if found.is_none() {
        println!("left out: there is no ffmpeg; LOCKSTEP_FFMPEG names one");
    }
    found
}

fn hostile(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/hostile").join(name)).expect(name)
}

fn chat(source: Source) -> v1::Chat {
    let video = v1::Video { source: Some(source), max_pixels: Some(8_000), ..Default::default() };
    let parts = [v1::part::Part::Video(video), v1::part::Part::Text("What moves?".into())];
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    v1::Chat { messages: vec![v1::Message { role: v1::Role::User.into(), parts }], tools: vec![] }
}

async fn ask(client: &mut Client, source: Source) -> Result<v1::GenerateResponse, Status> {
    let request = v1::GenerateRequest {
        chat: Some(chat(source)),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(v1::Stopping { max_tokens: Some(4), ignore_eos: Some(true), ..Default::default() }),
        ..Default::default()
    };
    Ok(client.generate(request).await?.into_inner())
}

fn data(file: Vec<u8>) -> Source {
    Source::Data(file.into())
}

async fn uploaded(client: &mut Client, file: Vec<u8>) -> Result<Source, Status> {
    let kind = v1::MediaKind::Video.into();
    let header = v1::UploadHeader { kind, size_bytes: file.len() as u64, cache_salt: None };
    let pieces = [Piece::Header(header), Piece::Chunk(file.into())];
    let pieces = pieces.map(|piece| v1::UploadMediaRequest { piece: Some(piece) });
    let response = client.upload_media(futures::stream::iter(pieces)).await?.into_inner();
    Ok(Source::MediaId(response.media_id))
}

#[tokio::test]
async fn other_videos_are_answered() -> anyhow::Result<()> {
    let Some(ffmpeg) = ffmpeg() else { return Ok(()) };
    let ffmpeg = ffmpeg.to_str().expect("a path of words");
    let arguments = ["--dtype", "f32", "--max-image-tokens", "1024", "--ffmpeg", ffmpeg, "--log", "info"];
    let server = Server::start(&root().join("tests/checkpoints/a"), &arguments)?;
    assert!(server.output().contains("ffmpeg decodes videos of other codecs"), "{}", server.output());
    let mut client = Client::connect(format!("http://{}", server.address())).await?;
    let own = std::fs::read(root().join("tests/videos/reordered.mp4"))?;
    let before = ask(&mut client, data(own.clone())).await?;
    for name in ["hevc.mp4", "vp9.mp4", "av1.mp4", "vp8.webm", "mjpeg.avi"] {
        let file = hostile(&format!("refused_video_{name}"));
        let answer = ask(&mut client, data(file.clone())).await?;
        let started = answer.started.expect("what was understood");
        assert_eq!(started.media[0].timestamps_s, [0.0, 0.2, 0.4, 0.6], "{name}");
        assert_eq!(answer.usage.expect("what it cost").completion_tokens, 4);
        let counted = v1::CountTokensRequest { chat: Some(chat(data(file.clone()))), ..Default::default() };
        let counted = client.count_tokens(counted).await?.into_inner();
        assert_eq!(counted.prompt_tokens, started.prompt_tokens, "{name}");
        let by_id = uploaded(&mut client, file.clone()).await?;
        assert_eq!(ask(&mut client, by_id).await?.choices, answer.choices, "{name}");
        for sixteenths in [1, 5, 9, 13] {
            let cut = file[..file.len() * sixteenths / 16].to_vec();
            if let Err(refused) = ask(&mut client, data(cut)).await {
                let faults =
                    refused.get_error_details().bad_request().expect("fields").field_violations.clone();
                assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
                assert!(faults[0].field.ends_with("video.data"), "{faults:?}");
            }
        }
    }
    for file in
        [hostile("refused_text.png"), hostile("refused_video_audio_only.mp4"), b"\x1A\x45\xDF\xA3no".to_vec()]
    {
        let refused = uploaded(&mut client, file).await.expect_err("no video");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    assert_eq!(ask(&mut client, data(own)).await?.choices, before.choices);
    Ok(())
}

/// Before anything is loaded.
#[test]
fn a_program_that_is_no_ffmpeg_is_refused() -> anyhow::Result<()> {
    for (program, why) in [
        ("/nowhere/ffmpeg", "No such file"),
        ("/etc", "is not a program"),
        ("/etc/passwd", "is not a program"),
        ("/bin/true", "does not say its version"),
    ] {
        let ended = Server::run_to_end(&root().join("tests/checkpoints/a"), &["--ffmpeg", program])?;
        assert_eq!(ended.code, Some(1), "{program}: {}", ended.output);
        let told = ended.output.contains(&format!("--ffmpeg {program}: ")) && ended.output.contains(why);
        assert!(told && !ended.output.contains("loading"), "{}", ended.output);
    }
    Ok(())
}
