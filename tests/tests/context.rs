//! How long a prompt may be: what is told, what is refused, and that nothing is done for a prompt that is refused.

use std::path::PathBuf;

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt;

type Client = InferenceServiceClient<Channel>;

/// The checkpoint whose configuration asks for YaRN: 4 times 128 tokens.
fn yarn() -> PathBuf {
    root().join("tests/checkpoints/f")
}

async fn connect(server: &Server) -> anyhow::Result<Client> {
    Ok(InferenceServiceClient::connect(format!("http://{}", server.address())).await?)
}

fn chat(parts: Vec<v1::part::Part>) -> v1::Chat {
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    v1::Chat { messages: vec![v1::Message { role: v1::Role::User.into(), parts }], tools: vec![] }
}

/// One token for each space and each "x" of it.
fn text(words: usize) -> v1::part::Part {
    v1::part::Part::Text("x ".repeat(words))
}

async fn count(client: &mut Client, chat: &v1::Chat) -> anyhow::Result<v1::CountTokensResponse> {
    let request = v1::CountTokensRequest { chat: Some(chat.clone()), cache_salt: None };
    Ok(client.count_tokens(request).await?.into_inner())
}

fn ask(chat: v1::Chat) -> v1::GenerateRequest {
    let stopping = v1::Stopping { ignore_eos: Some(true), ..Default::default() };
    v1::GenerateRequest { chat: Some(chat), stopping: Some(stopping), ..Default::default() }
}

#[tokio::test]
async fn the_context_is_32768_tokens_and_more_by_flag() -> anyhow::Result<()> {
    let folder = root().join("tests/checkpoints/a");
    for (flags, expected) in [(&[][..], 32_768), (&["--max-context-tokens", "100000"][..], 100_000)] {
        let server = Server::start(&folder, flags)?;
        let mut client = connect(&server).await?;
        let model = client.get_model(v1::GetModelRequest {}).await?.into_inner();
        assert_eq!(model.max_context_tokens, expected);
    }
    Ok(())
}

#[test]
fn more_than_yarn_makes_is_refused_before_loading() -> anyhow::Result<()> {
    let ended = Server::run_to_end(&yarn(), &["--max-context-tokens", "513"])?;
    assert_eq!(ended.code, Some(1));
    let words = "--max-context-tokens 513: the checkpoint's context with YaRN is 512";
    assert!(ended.output.contains(words), "{}", ended.output);
    assert!(!ended.output.contains("memory of shard"), "{}", ended.output);
    Ok(())
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_refused_by_the_numbers_of_its_price() -> anyhow::Result<()> {
    let server = Server::start(&yarn(), &["--world-size", "2"])?;
    let mut client = connect(&server).await?;
    let (mut served, mut refused) = (None, None);
    for words in 200..300 {
        let chat = chat(vec![text(words)]);
        let told = count(&mut client, &chat).await?;
        assert_eq!(told.max_context_tokens, 512);
        if told.prompt_tokens < 512 {
            served = Some((told.prompt_tokens, chat));
        } else {
            refused = Some((told.prompt_tokens, chat));
            break;
        }
    }
    let (prompt_tokens, chat) = served.context("a prompt that fits")?;
    let answer = client.generate(ask(chat)).await?.into_inner();
    let usage = answer.usage.context("usage")?;
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (prompt_tokens, 512 - prompt_tokens));
    assert!(prompt_tokens > 4 * 120, "{prompt_tokens}");

    let (prompt_tokens, chat) = refused.context("a prompt that does not fit")?;
    let status = client.generate(ask(chat)).await.expect_err("it is too long");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let fault = &status.get_details_bad_request().context("a BadRequest")?.field_violations[0];
    let expected = format!("the prompt has {prompt_tokens} tokens; with its answer it may have 512");
    assert_eq!((fault.field.as_str(), fault.description.as_str()), ("chat", expected.as_str()));
    Ok(())
}

/// A picture whose file ends in the middle can only be found out by decoding it.
#[tokio::test]
async fn a_prompt_beyond_the_context_is_refused_before_its_pictures_are_decoded() -> anyhow::Result<()> {
    let server = Server::start(&yarn(), &[])?;
    let mut client = connect(&server).await?;
    let whole = std::fs::read(root().join("tests/pictures/scene_260x180.png"))?;
    let picture = |side: u32| {
        let source = Some(v1::image::Source::Data(whole[..whole.len() / 2].to_vec().into()));
        let (resized_width, resized_height) = (Some(side), Some(side));
        v1::part::Part::Image(v1::Image { source, resized_width, resized_height, ..Default::default() })
    };
    // 100 tokens of picture and about 200 of text: neither is too long by itself.
    for (parts, why) in [
        (vec![picture(280), text(40), picture(280)], "image"),
        (vec![picture(280), text(40), picture(560)], "the prompt has"),
        (vec![picture(280), text(260)], "the prompt has"),
    ] {
        let chat = chat(parts);
        let told = count(&mut client, &chat).await?.prompt_tokens;
        let status = client.generate(ask(chat)).await.expect_err("cut short");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let details = status.get_details_bad_request().context("a BadRequest")?;
        let said = format!("{details:?}");
        assert!(said.contains(why), "{said}");
        assert_eq!(said.contains(&format!("the prompt has {told} tokens")), told >= 512, "{said}");
    }
    Ok(())
}

#[test]
fn another_kind_of_stretching_is_refused_by_name() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for entry in std::fs::read_dir(yarn())? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["rope_scaling"]["type"] = "dynamic".into();
    std::fs::write(&path, serde_json::to_vec(&config)?)?;
    let ended = Server::run_to_end(folder.path(), &[])?;
    assert_eq!(ended.code, Some(1));
    for words in ["rope_scaling.type: \"dynamic\" is not supported", "yarn"] {
        assert!(ended.output.contains(words), "{words:?} is not said:\n{}", ended.output);
    }
    Ok(())
}
