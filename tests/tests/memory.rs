//! A rank holds what it planned.

use std::path::Path;

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_shard::weights::random::RandomModel;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;

/// A checkpoint of about 130 MB, large enough that the process itself does not hide the plan.
fn write_checkpoint(folder: &Path) -> anyhow::Result<()> {
    let small = root().join("tests/checkpoints/a");
    for entry in std::fs::read_dir(&small)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(entry.path(), folder.join(entry.file_name()))?;
        }
    }
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(small.join("config.json"))?)?;
    let model = RandomModel {
        vocab_size: config["vocab_size"].as_u64().expect("a number") as usize,
        hidden_size: 1024,
        num_hidden_layers: 6,
        num_attention_heads: 16,
        num_key_value_heads: 4,
        intermediate_size: 2816,
        vision_hidden_size: 320,
        vision_depth: 4,
        vision_num_heads: 4,
        vision_intermediate_size: 856,
        seed: 1,
    };
    model.write_weights(folder)?;
    for (field, value) in [
        ("hidden_size", model.hidden_size),
        ("num_hidden_layers", model.num_hidden_layers),
        ("num_attention_heads", model.num_attention_heads),
        ("num_key_value_heads", model.num_key_value_heads),
        ("intermediate_size", model.intermediate_size),
    ] {
        config[field] = value.into();
    }
    config["tie_word_embeddings"] = false.into();
    config["rope_scaling"] = serde_json::json!({"type": "mrope", "mrope_section": [8, 12, 12]});
    let vision = &mut config["vision_config"];
    for (field, value) in [
        ("hidden_size", model.vision_hidden_size),
        ("depth", model.vision_depth),
        ("num_heads", model.vision_num_heads),
        ("intermediate_size", model.vision_intermediate_size),
        ("out_hidden_size", model.hidden_size),
    ] {
        vision[field] = value.into();
    }
    vision["fullatt_block_indexes"] = serde_json::json!([1, 3]);
    std::fs::write(folder.join("config.json"), config.to_string())?;
    Ok(())
}

#[tokio::test]
async fn resident_memory_is_within_a_tenth_of_the_plan() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    write_checkpoint(folder.path())?;
    for (world_size, dtype) in [("1", "bf16"), ("3", "bf16"), ("2", "f32")] {
        let arguments = ["--world-size", world_size, "--dtype", dtype, "--max-image-tokens", "1024"];
        let server = Server::start(folder.path(), &arguments)?;
        let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
        for _ in 0..2 {
            check(&mut client, &format!("{world_size} shards, {dtype}")).await?;
            ask_about_a_picture(&mut client).await?;
        }
    }
    Ok(())
}

type Client = InferenceServiceClient<tonic::transport::Channel>;

async fn check(client: &mut Client, context: &str) -> anyhow::Result<()> {
    let model = client.get_model(v1::GetModelRequest {}).await?.into_inner();
    assert_eq!(model.shards.len(), model.world_size as usize);
    for shard in model.shards {
        let ratio = shard.resident_bytes as f64 / shard.planned_bytes as f64;
        println!(
            "{context}, rank {}: resident / planned = {ratio:.3} of {}",
            shard.rank, shard.planned_bytes
        );
        assert!(
            (0.9..=1.1).contains(&ratio),
            "{context}, rank {}: resident / planned = {ratio:.3}",
            shard.rank
        );
    }
    Ok(())
}

async fn ask_about_a_picture(client: &mut Client) -> anyhow::Result<()> {
    let data = std::fs::read(root().join("tests/pictures/scene_260x180.png"))?;
    let source = Some(v1::image::Source::Data(data.into()));
    let parts = [
        v1::part::Part::Image(v1::Image { source, ..Default::default() }),
        v1::part::Part::Text("What is this?".to_owned()),
    ];
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    let message = v1::Message { role: v1::Role::User.into(), parts };
    let request = v1::GenerateRequest {
        chat: Some(v1::Chat { messages: vec![message], tools: vec![] }),
        stopping: Some(v1::Stopping { max_tokens: Some(8), ignore_eos: Some(true), ..Default::default() }),
        ..Default::default()
    };
    let response = client.generate(request).await?.into_inner();
    assert_eq!(response.usage.expect("usage").completion_tokens, 8);
    Ok(())
}
