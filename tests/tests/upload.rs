//! Pictures and videos that are uploaded once and named by their ids.

use lockstep_client::{Client, Image, MediaKind, Request, Video};
use lockstep_proto::v1;
use lockstep_tests::beside::Service;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;
use lockstep_tests::uploads::{LIBRARY_BYTES, pieces, upload};
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn server() -> anyhow::Result<Server> {
    let bytes = LIBRARY_BYTES.to_string();
    Server::start(&root().join("tests/checkpoints/a"), &["--library-bytes", &bytes])
}

fn picture(name: &str) -> anyhow::Result<Vec<u8>> {
    Ok(std::fs::read(root().join("tests/pictures").join(name))?)
}

fn question(source: v1::image::Source, cache_salt: Option<&str>) -> v1::GenerateRequest {
    let image = v1::Image { source: Some(source), ..Default::default() };
    let parts = [v1::part::Part::Image(image), v1::part::Part::Text("What is this?".to_owned())];
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    let message = v1::Message { role: v1::Role::User.into(), parts };
    v1::GenerateRequest {
        chat: Some(v1::Chat { messages: vec![message], tools: vec![] }),
        stopping: Some(v1::Stopping { max_tokens: Some(8), ..Default::default() }),
        sampling: Some(v1::Sampling { temperature: Some(0.0), ..Default::default() }),
        cache_salt: cache_salt.map(str::to_owned),
        ..Default::default()
    }
}

fn by_id(id: &[u8], cache_salt: Option<&str>) -> v1::GenerateRequest {
    question(v1::image::Source::MediaId(id.to_vec().into()), cache_salt)
}

#[tokio::test]
async fn a_video_by_id_is_the_video() -> anyhow::Result<()> {
    let server = server()?;
    let client = Client::connect(server.address()).await?;
    let file = std::fs::read(root().join("tests/videos/main_bt709.mp4"))?;
    let ask = |video: Video| {
        let video = video.min_pixels(784).max_pixels(4_000);
        Request::new().user((video, "What moves?")).max_tokens(8).temperature(0.0)
    };
    let expected = client.generate(&ask(Video::new(file.clone()))).await?;
    let named = client.generate(&ask(Video::new(file.clone()).by_id())).await?;
    assert_eq!(named.choices, expected.choices);
    assert_eq!(named.started.media, expected.started.media);
    // What is there as a video is not there as a picture.
    let mut service = Service::connect(format!("http://{}", server.address())).await?;
    let as_picture = service.generate(by_id(blake3::hash(&file).as_bytes(), None)).await;
    assert_eq!(refusal(as_picture), (Code::NotFound, vec![MEDIA_ID.to_owned()]));
    let broken = client.upload(MediaKind::Video, file[..100].to_vec(), None).await.expect_err("it is cut");
    assert_eq!(broken.violations()[0].field, "chunk");
    Ok(())
}

/// The code of a refusal, and the fields that it names.
fn refusal<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, Vec<String>) {
    let status = result.expect_err("a refusal");
    let violations = status.get_details_bad_request().map_or(Vec::new(), |details| details.field_violations);
    (status.code(), violations.into_iter().map(|violation| violation.field).collect())
}

const MEDIA_ID: &str = "chat.messages[0].parts[0].image.media_id";

#[tokio::test]
async fn a_picture_by_id_is_the_picture() -> anyhow::Result<()> {
    let server = server()?;
    let mut service = Service::connect(format!("http://{}", server.address())).await?;
    let file = picture("noise_33x29.png")?;
    let id = upload(&mut service, pieces(v1::MediaKind::Image, &file, Some("salt"))).await?;
    assert_eq!(id, blake3::hash(&file).as_bytes());

    let sent = question(v1::image::Source::Data(file.into()), Some("salt"));
    let sent = service.generate(sent).await?.into_inner();
    let named = service.generate(by_id(&id, Some("salt"))).await?.into_inner();
    assert_eq!(named.choices, sent.choices);
    assert_eq!(named.started.unwrap().media, sent.started.clone().unwrap().media);
    let count = v1::CountTokensRequest { chat: by_id(&id, None).chat, cache_salt: Some("salt".to_owned()) };
    let counted = service.count_tokens(count).await?.into_inner();
    assert_eq!(counted.prompt_tokens, sent.started.unwrap().prompt_tokens);

    let not_found = (Code::NotFound, vec![MEDIA_ID.to_owned()]);
    assert_eq!(refusal(service.generate(by_id(&id, None)).await), not_found);
    assert_eq!(refusal(service.generate(by_id(&id, Some("other"))).await), not_found);
    assert_eq!(refusal(service.generate(by_id(&[0; 32], Some("salt"))).await), not_found);
    let mut foreign = tonic::Request::new(by_id(&id, Some("salt")));
    foreign.metadata_mut().insert("authorization", "Bearer other".parse()?);
    assert_eq!(refusal(service.generate(foreign).await), not_found);
    let count = v1::CountTokensRequest { chat: by_id(&id, None).chat, cache_salt: None };
    assert_eq!(refusal(service.count_tokens(count).await), not_found);
    Ok(())
}

#[tokio::test]
async fn the_client_uploads_again_what_had_to_go() -> anyhow::Result<()> {
    let server = server()?;
    let client = Client::connect(server.address()).await?;
    let file = picture("noise_33x29.png")?;
    let ask = |image: Image| Request::new().user((image, "What is this?")).max_tokens(8).temperature(0.0);
    let expected = client.generate(&ask(Image::new(file.clone()))).await?;
    let named = ask(Image::new(file.clone()).by_id());
    assert_eq!(client.generate(&named).await?.text(), expected.text());

    // Another one needs the room.
    client.upload(MediaKind::Image, picture("coffee.jpg")?, None).await?;
    let mut service = Service::connect(format!("http://{}", server.address())).await?;
    let gone = service.generate(by_id(blake3::hash(&file).as_bytes(), None)).await;
    assert_eq!(refusal(gone), (Code::NotFound, vec![MEDIA_ID.to_owned()]));

    assert_eq!(client.stream(&named).await?.collect().await?.text(), expected.text());
    Ok(())
}

/// An animation may stand for its first frame and for all of them, and is two uploads.
#[tokio::test]
async fn one_file_is_a_picture_and_a_video() -> anyhow::Result<()> {
    let server = server()?;
    let client = Client::connect(server.address()).await?;
    let file = bytes::Bytes::from(std::fs::read(root().join("tests/videos/moving.gif"))?);
    let media = (Image::new(file.clone()).by_id(), Video::new(file).by_id(), "What moves?");
    let answer = client.generate(&Request::new().user(media).max_tokens(2)).await?;
    assert_eq!(answer.started.media.len(), 2);
    Ok(())
}
