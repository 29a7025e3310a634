//! What goes wrong is said, by name, and disturbs nobody else.

use std::path::Path;
use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::{self, root};
use lockstep_tests::server::{Server, is_running, signal};
use tonic::Code;
use tonic_types::StatusExt;

fn checkpoint() -> std::path::PathBuf {
    root().join("tests/checkpoints/a")
}

/// A copy of a checkpoint, to be damaged.
fn copy(folder: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(checkpoint())? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.join(entry.file_name()))?;
    }
    Ok(())
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) -> anyhow::Result<()> {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path)?)?;
    edit(&mut config);
    std::fs::write(path, serde_json::to_vec(&config)?)?;
    Ok(())
}

#[test]
fn a_folder_without_files_is_refused_with_all_their_names() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let ended = Server::run_to_end(folder.path(), &[])?;
    assert_eq!(ended.code, Some(1));
    for name in ["config.json", "tokenizer.json", "chat_template", "preprocessor_config.json", "safetensors"]
    {
        assert!(ended.output.contains(name), "{name} is not named:\n{}", ended.output);
    }
    Ok(())
}

#[test]
fn an_unknown_architecture_and_wrong_shapes_are_refused_by_name() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    copy(folder.path())?;
    edit_config(folder.path(), |config| config["architectures"] = serde_json::json!(["LlamaForCausalLM"]))?;
    let ended = Server::run_to_end(folder.path(), &[])?;
    assert_eq!(ended.code, Some(1));
    assert!(ended.output.contains("LlamaForCausalLM"), "{}", ended.output);

    copy(folder.path())?;
    edit_config(folder.path(), |config| {
        let size = config["intermediate_size"].as_u64().expect("a number");
        config["intermediate_size"] = (size + 16).into();
    })?;
    let ended = Server::run_to_end(folder.path(), &["--world-size", "2"])?;
    assert_eq!(ended.code, Some(1));
    for name in ["mlp.gate_proj.weight", "mlp.down_proj.weight"] {
        assert!(ended.output.contains(name), "{name} is not named:\n{}", ended.output);
    }
    Ok(())
}

#[test]
fn what_can_be_known_before_loading_is_said_before_loading() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    copy(folder.path())?;
    let template = serde_json::json!({"chat_template": "{{ messages[0].role }}"}).to_string();
    std::fs::write(folder.path().join("chat_template.json"), template)?;
    let ended = Server::run_to_end(folder.path(), &["--max-context-tokens", "128001"])?;
    assert_eq!(ended.code, Some(1));
    for words in ["max_position_embeddings is 128000", "placed 0 pictures"] {
        assert!(ended.output.contains(words), "{words:?} is not said:\n{}", ended.output);
    }
    assert!(!ended.output.contains("memory of shard"), "{}", ended.output);

    copy(folder.path())?;
    edit_config(folder.path(), |config| config["image_token_id"] = 7.into())?;
    let ended = Server::run_to_end(folder.path(), &[])?;
    assert_eq!(ended.code, Some(1));
    assert!(ended.output.contains("picture token 7"), "{}", ended.output);
    assert!(!ended.output.contains("memory of shard"), "{}", ended.output);
    Ok(())
}

#[test]
fn a_world_size_or_memory_that_cannot_be_is_refused() -> anyhow::Result<()> {
    let ended = Server::run_to_end(&checkpoint(), &["--world-size", "9", "--max-running", "0"])?;
    assert_ne!(ended.code, Some(0));
    assert!(
        ended.output.contains("--world-size") && ended.output.contains("--max-running"),
        "{}",
        ended.output
    );
    let ended = Server::run_to_end(&checkpoint(), &["--max-connections", "4000000000"])?;
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.output.contains("--max-connections 4000000000: it takes 4000000128 open files"),
        "{}",
        ended.output
    );
    let ended = Server::run_to_end(&checkpoint(), &["--kv-tokens", "4000000000"])?;
    assert_eq!(ended.code, Some(1));
    assert!(ended.output.contains("bytes available per rank"), "{}", ended.output);
    Ok(())
}

#[test]
fn a_port_in_use_is_said() -> anyhow::Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let mut command = std::process::Command::new(lockstep_tests::server::binary()?);
    let output = command.args(["serve", "--listen", &address, "--model"]).arg(checkpoint()).output()?;
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains(&address) && words.contains("in use"), "{words}");
    Ok(())
}

fn text_request(text: &str, max_tokens: u32) -> v1::GenerateRequest {
    parts_request(vec![v1::part::Part::Text(text.to_owned())], max_tokens)
}

fn parts_request(parts: Vec<v1::part::Part>, max_tokens: u32) -> v1::GenerateRequest {
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    v1::GenerateRequest {
        chat: Some(v1::Chat {
            messages: vec![v1::Message { role: v1::Role::User.into(), parts }],
            tools: vec![],
        }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn greedy() -> v1::Sampling {
    v1::Sampling { temperature: Some(0.0), repetition_penalty: Some(1.0), ..Default::default() }
}

fn image(data: Vec<u8>) -> v1::part::Part {
    let source = Some(v1::image::Source::Data(data.into()));
    v1::part::Part::Image(v1::Image { source, ..Default::default() })
}

/// A PNG header that promises `width` x `height` pixels and holds none.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let whole = std::fs::read(root().join("tests/pictures/noise_33x29.png")).expect("the picture is there");
    let mut head = whole[..33].to_vec();
    head[16..20].copy_from_slice(&width.to_be_bytes());
    head[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&head[12..29]);
    head[29..33].copy_from_slice(&crc.to_be_bytes());
    head
}

/// CRC-32 as PNG has it (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[tokio::test]
async fn bad_pictures_name_their_field_and_disturb_nobody() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--world-size", "2", "--max-image-tokens", "1024"])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let quiet = client.generate(text_request("A long story, please.", 200)).await?.into_inner();

    let png = std::fs::read(root().join("tests/pictures/scene_112x140.png"))?;
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("truncated", png[..png.len() / 2].to_vec()),
        ("only a header", png[..40].to_vec()),
        ("empty", vec![]),
        ("not a picture", b"GIF? no, this is text".to_vec()),
        ("a picture of another kind inside", [&b"\x89PNG\r\n\x1a\n"[..], &[0xFF, 0xD8, 0xFF, 0xE0]].concat()),
        ("too large in the header", png_header(65_535, 65_535)),
        ("too long a shape", png_header(20_000, 10)),
    ];
    let busy = {
        let mut client = client.clone();
        tokio::spawn(async move { client.generate(text_request("A long story, please.", 200)).await })
    };
    for (what, data) in bad {
        let parts = vec![v1::part::Part::Text("What is this?".to_owned()), image(data)];
        let status = client.generate(parts_request(parts, 4)).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status}");
        let details = status.get_details_bad_request().expect("a BadRequest");
        let field = &details.field_violations[0].field;
        assert!(field.starts_with("chat.messages[0].parts[1].image"), "{what}: {field}");
    }
    let busy = busy.await??.into_inner();
    assert_eq!(busy.choices[0].token_ids, quiet.choices[0].token_ids);
    Ok(())
}

#[tokio::test]
async fn all_faults_of_a_request_are_named_at_once() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--max-image-tokens", "1024"])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let mut request = text_request("Hello", 0);
    request.sampling = Some(v1::Sampling {
        temperature: Some(f32::NAN),
        repetition_penalty: Some(-1.0),
        top_p: Some(0.0),
        presence_penalty: Some(2.5),
        logit_bias: [(1 << 30, f32::INFINITY)].into(),
        ..Default::default()
    });
    request.logprobs = Some(21);
    request.n = Some(17);
    request.chat.as_mut().expect("a chat").messages[0].role = 17;
    let status = client.generate(request).await.expect_err("faults");
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_details_bad_request().expect("a BadRequest");
    let mut fields: Vec<_> = details.field_violations.iter().map(|v| v.field.as_str()).collect();
    fields.sort_unstable();
    let expected = [
        "chat.messages[0].role",
        "logprobs",
        "n",
        "sampling.logit_bias[1073741824]",
        "sampling.logit_bias[1073741824]",
        "sampling.presence_penalty",
        "sampling.repetition_penalty",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
    ];
    assert_eq!(fields, expected);

    let mut request = text_request("Hello", 4);
    request.adapter = Some("mine".to_owned());
    let status = client.generate(request).await.expect_err("not there yet");
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().starts_with("adapter: "), "{status}");
    Ok(())
}

/// Two bytes of a message become a hundred in memory: they are counted before.
#[tokio::test]
async fn a_message_of_countless_fields_is_refused_before_it_is_decoded() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--max-image-tokens", "1024"])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let mut request = parts_request(vec![], 1);
    let empty = vec![v1::Part::default(); lockstep_proto::codec::MAX_REQUEST_FIELDS];
    request.chat.as_mut().expect("a chat").messages[0].parts = empty;
    let status = client.generate(request).await.expect_err("too many");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().starts_with("chat.messages.parts: "), "{status}");
    client.generate(parts_request(vec![v1::part::Part::Text("Hi".into())], 1)).await?;
    Ok(())
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_with_a_hint() -> anyhow::Result<()> {
    let limits = ["--max-running", "1", "--max-waiting", "1", "--max-image-tokens", "1024"];
    let server = Server::start(&checkpoint(), &limits)?;
    let client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let running = v1::StreamGenerateRequest { request: Some(text_request("Count.", 300)) };
    let mut running = client.clone().stream_generate(running).await?.into_inner();
    running.message().await?.expect("it has left the queue");
    let requests = (0..6).map(|_| {
        let mut client = client.clone();
        async move { client.generate(text_request("Count.", 300)).await }
    });
    let results = futures::future::join_all(requests).await;
    let (served, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert!(!served.is_empty(), "one waits");
    assert!(!refused.is_empty(), "the others are refused");
    for refused in refused {
        let status = refused.expect_err("refused");
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.get_details_retry_info().is_some(), "a retry hint");
    }
    Ok(())
}

fn picture_request(side: u32) -> anyhow::Result<v1::GenerateRequest> {
    let data = std::fs::read(root().join("tests/pictures/scene_260x180.png"))?;
    let (source, side) = (Some(v1::image::Source::Data(data.into())), Some(side));
    let image = v1::Image { source, resized_width: side, resized_height: side, ..Default::default() };
    Ok(parts_request(vec![v1::part::Part::Image(image), v1::part::Part::Text("What is this?".to_owned())], 4))
}

#[tokio::test]
async fn pictures_over_the_bound_in_bytes_are_refused_until_there_is_room() -> anyhow::Result<()> {
    // A picture of 448 x 448 pixels takes 602,112 bytes: one fits, two do not.
    let limits = ["--max-running", "1", "--max-image-tokens", "1024", "--max-media-bytes", "1000000"];
    let server = Server::start(&checkpoint(), &limits)?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let stream = |request| v1::StreamGenerateRequest { request: Some(request) };
    let running = stream(text_request("A very long story.", 20_000));
    let mut running = client.stream_generate(running).await?.into_inner();
    for _ in 0..3 {
        running.message().await?.expect("the story begins");
    }
    let long = text_request(&"long ".repeat(250_000), 4);
    let status = client.generate(long).await.expect_err("a message over the bound");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("1000000"), "{status}");
    let waiting = client.stream_generate(stream(picture_request(448)?)).await?.into_inner();

    let status = client.generate(picture_request(448)?).await.expect_err("no room for a second picture");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("1000000") && status.get_details_retry_info().is_some(), "{status}");
    let status = client.generate(picture_request(896)?).await.expect_err("no room for it ever");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");

    drop(waiting);
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut waiting = loop {
        match client.stream_generate(stream(picture_request(448)?)).await {
            Ok(stream) => break stream.into_inner(),
            Err(status) => assert!(Instant::now() < deadline, "a cancelled picture is not let go: {status}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    drop(running);
    while waiting.message().await?.is_some() {}
    client.generate(picture_request(448)?).await?;
    Ok(())
}

#[tokio::test]
async fn shards_do_not_outlive_a_killed_server() -> anyhow::Result<()> {
    let mut server = Server::start(&checkpoint(), &["--world-size", "2", "--max-image-tokens", "1024"])?;
    let shards = server.shard_pids();
    assert_eq!(shards.len(), 2);
    signal(server.pid(), "KILL")?;
    server.wait(Duration::from_secs(10))?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while shards.iter().any(|shard| is_running(*shard)) {
        assert!(Instant::now() < deadline, "shards live on");
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Makes the embeddings of `tokens` in a folder's checkpoint not a number.
fn break_embeddings(folder: &Path, tokens: &[u32]) -> anyhow::Result<()> {
    let path = folder.join("model.safetensors");
    let mut file = std::fs::read(&path)?;
    let start = 8 + u64::from_le_bytes(file[..8].try_into()?) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..start])?;
    let tensor = &header["model.embed_tokens.weight"];
    let numbers = |field: &str| serde_json::from_value::<Vec<usize>>(tensor[field].clone());
    let (offsets, shape) = (numbers("data_offsets")?, numbers("shape")?);
    let row_bytes = (offsets[1] - offsets[0]) / shape[0];
    for token in tokens {
        let row = start + offsets[0] + *token as usize * row_bytes;
        // All ones is not a number in every floating-point format.
        file[row..row + row_bytes].fill(0xFF);
    }
    std::fs::write(path, file)?;
    Ok(())
}

#[tokio::test]
async fn a_request_whose_logits_are_not_finite_fails_alone() -> anyhow::Result<()> {
    let golden = golden::read("a")?;
    let case = |name: &str| golden.cases.iter().find(|case| case.name == name).expect("the case is there");
    let (healthy, broken) = (case("text"), case("text_unicode"));
    let healthy_ids = [&healthy.input_ids[..], &healthy.greedy].concat();
    let only_broken: Vec<_> =
        broken.input_ids.iter().copied().filter(|id| !healthy_ids.contains(id)).collect();
    assert!(!only_broken.is_empty());
    let folder = tempfile::tempdir()?;
    copy(folder.path())?;
    break_embeddings(folder.path(), &only_broken)?;
    let server = Server::start(folder.path(), &["--world-size", "2", "--dtype", "f32"])?;
    let client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let ask = |case: &golden::Case| -> anyhow::Result<_> {
        // No further than the golden goes: after it a broken token might be drawn and break this answer, too.
        let max_tokens = healthy.greedy.len() as u32;
        let chat = Some(golden::chat(&case.messages)?);
        let request = v1::GenerateRequest { chat, sampling: Some(greedy()), ..text_request("", max_tokens) };
        let mut client = client.clone();
        Ok(async move { client.generate(request).await })
    };
    let (company, failed) = tokio::join!(ask(healthy)?, ask(broken)?);
    let failed = failed.expect_err("its logits are not finite");
    assert_eq!(failed.code(), Code::Internal, "{failed}");
    assert!(failed.message().contains("logits are not finite"), "{failed}");
    assert_eq!(company?.into_inner().choices[0].token_ids, healthy.greedy);
    Ok(())
}
