//! `lockstep demo`: the whole system on one machine, on a small random checkpoint that it makes itself.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Args;
use lockstep_client::{Client, Completed, Event, Image, Media, Part, Request, Video};
use lockstep_shard::weights::random::RandomModel;
use serde_json::json;

use crate::config::{Config, ServeArgs};
use crate::serve::Server;

/// See the whole system work, on a small random checkpoint.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Number of tensor-parallel shards, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub world_size: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "TOKENS", default_value_t = 40)]
    pub max_tokens: u32,
}

struct Exhibit {
    name: &'static str,
    show: fn(&'static [u8]) -> Part,
    data: &'static [u8],
    question: &'static str,
}

const EXHIBITS: [Exhibit; 4] = [
    Exhibit {
        name: "cat.jpg",
        show: picture,
        data: include_bytes!("../../tests/pictures/cat.jpg"),
        question: "What animal is this?",
    },
    Exhibit {
        name: "coffee.jpg",
        show: picture,
        data: include_bytes!("../../tests/pictures/coffee.jpg"),
        question: "What stands on the table?",
    },
    Exhibit {
        name: "rocket.jpg",
        show: picture,
        data: include_bytes!("../../tests/pictures/rocket.jpg"),
        question: "Where does it fly?",
    },
    Exhibit {
        name: "bunny.mp4",
        show: video,
        data: include_bytes!("../../tests/videos/bunny.mp4"),
        question: "What does the rabbit do?",
    },
];

fn picture(data: &'static [u8]) -> Part {
    Image::new(data).into()
}

fn video(data: &'static [u8]) -> Part {
    Video::new(data).into()
}

/// A vocabulary of 256 bytes, the first merges of the real tokenizer, and the 22 control tokens.
const TOKENIZER: &str = include_str!("../../tests/checkpoints/a/tokenizer.json");
const CHAT_TEMPLATE: &str = include_str!("../../tests/checkpoints/a/chat_template.json");

/// Runs the demonstration.
///
/// # Errors
/// When the server does not start or an answer fails.
pub async fn demo(args: DemoArgs) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().context("making a folder for the checkpoint")?;
    write_checkpoint(folder.path())?;
    println!("Lockstep demo");
    println!();
    println!(
        "The checkpoint is small and random: it has the architecture of Qwen2.5-VL and has learnt nothing."
    );
    println!(
        "What follows shows that pictures and a video go in and tokens come out, not that anything is understood."
    );
    println!();
    let server = Server::start(config(folder.path(), &args)?, &mut |line| println!("{line}")).await?;
    let answers = answers(&server.address().to_string(), args.max_tokens).await;
    server.stop().await?;
    answers?;
    say_what_next();
    Ok(())
}

fn config(folder: &Path, args: &DemoArgs) -> anyhow::Result<Config> {
    Config::new(ServeArgs {
        world_size: args.world_size,
        listen: "127.0.0.1:0".to_owned(),
        name: Some("small-random".to_owned()),
        kv_tokens: Some(8_192),
        max_context_tokens: Some(4_096),
        max_image_tokens: Some(1_024),
        ..ServeArgs::new(folder)
    })
}

async fn answers(server: &str, max_tokens: u32) -> anyhow::Result<()> {
    let client = Client::connect(server).await?;
    for exhibit in &EXHIBITS {
        ask(&client, exhibit, max_tokens).await?;
    }
    Ok(())
}

async fn ask(client: &Client, exhibit: &Exhibit, max_tokens: u32) -> anyhow::Result<()> {
    println!();
    println!("{} · {}", exhibit.name, exhibit.question);
    let request = Request::new()
        .user(((exhibit.show)(exhibit.data), exhibit.question))
        .max_tokens(max_tokens)
        .temperature(0.7)
        .repetition_penalty(1.1)
        .seed(7);
    let mut stream = client.stream(&request).await?;
    while let Some(event) = stream.next().await {
        match event? {
            Event::Started(started) => {
                println!("  seen as {}", seen(started.media.first().context("a medium was sent")?));
                print!("  > ");
            }
            Event::Delta(delta) => {
                print!("{}", delta.text.escape_debug());
                std::io::stdout().flush()?;
            }
            Event::Finished(_) => println!(),
            Event::Completed(Completed { usage, timings }) => println!(
                "  {} tokens in, {} out; media {:.1} ms, vision {:.1} ms, prefill {:.1} ms, decode {:.1} ms",
                usage.prompt_tokens,
                usage.completion_tokens,
                timings.media_ms,
                timings.vision_ms,
                timings.prefill_ms,
                timings.decode_ms,
            ),
        }
    }
    Ok(())
}

fn seen(media: &Media) -> String {
    let size = format!("{} x {} pixels", media.resized_width, media.resized_height);
    match (&media.timestamps_s[..], media.tokens) {
        ([], tokens) => format!("{size}, {tokens} tokens"),
        ([first, .., last], tokens) => {
            let count = media.timestamps_s.len();
            format!("{count} frames of {size}, of seconds {first:.2} to {last:.2}, {tokens} tokens")
        }
        ([_], tokens) => format!("a frame of {size}, {tokens} tokens"),
    }
}

fn say_what_next() {
    println!();
    println!("To get real answers, serve a real checkpoint from its folder, and ask it:");
    println!();
    println!("  lockstep serve --model /path/to/Qwen2.5-VL-7B-Instruct --world-size 2");
    println!("  lockstep ask --image tests/pictures/cat.jpg \"What is this?\"");
    println!("  lockstep ask --video tests/videos/bunny.mp4 \"What happens?\"");
    println!();
    println!("(`cargo run --release --` stands for `lockstep` in a source tree.)");
}

fn write_checkpoint(folder: &Path) -> anyhow::Result<()> {
    let tokenizer: serde_json::Value = serde_json::from_str(TOKENIZER).context("the bundled tokenizer")?;
    let tokens = tokenizer["added_tokens"].as_array().context("the bundled tokenizer has added tokens")?;
    let id = |content: &str| {
        let token = tokens.iter().find(|token| token["content"] == content);
        token
            .and_then(|token| token["id"].as_u64())
            .with_context(|| format!("the bundled tokenizer has {content}"))
    };
    let last = tokens.iter().filter_map(|token| token["id"].as_u64()).max().context("the last token")?;
    let model = RandomModel {
        vocab_size: last as usize + 1,
        hidden_size: 256,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        intermediate_size: 704,
        vision_hidden_size: 160,
        vision_depth: 4,
        vision_num_heads: 4,
        vision_intermediate_size: 428,
        seed: 2026,
    };
    model.write_weights(folder)?;
    let config = json!({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": false,
        "vision_start_token_id": id("<|vision_start|>")?,
        "vision_end_token_id": id("<|vision_end|>")?,
        "image_token_id": id("<|image_pad|>")?,
        "video_token_id": id("<|video_pad|>")?,
        "vision_config": {
            "depth": model.vision_depth,
            "hidden_act": "silu",
            "hidden_size": model.vision_hidden_size,
            "intermediate_size": model.vision_intermediate_size,
            "num_heads": model.vision_num_heads,
            "in_chans": 3,
            "out_hidden_size": model.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
    });
    let preprocessor = json!({
        "min_pixels": 3136,
        "max_pixels": 401_408,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
    });
    let generation =
        json!({"eos_token_id": [id("<|im_end|>")?, id("<|endoftext|>")?], "temperature": 0.000_001});
    for (name, value) in [
        ("config.json", config),
        ("preprocessor_config.json", preprocessor),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", json!({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})),
        ("chat_template.json", serde_json::from_str(CHAT_TEMPLATE)?),
    ] {
        std::fs::write(folder.join(name), value.to_string()).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}
