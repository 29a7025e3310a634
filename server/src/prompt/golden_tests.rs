//! Token ids compared with the reference's.

use std::sync::OnceLock;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::{Chat, MediaSpan, MediaTokens, Medium, Message, Part, PromptEncoder, PromptError, Role};
use crate::checkpoint::ModelFiles;
use crate::goldens;
use crate::limits::{MAX_PROMPT_BYTES, MAX_PROMPT_TIME};
use crate::media::MediaKind;

fn encoder(folder: &std::path::Path) -> PromptEncoder {
    let files = ModelFiles::open(folder).unwrap();
    let tokens = media_tokens(&files);
    PromptEncoder::new(files.tokenizer, files.template, tokens).unwrap()
}

fn media_tokens(files: &ModelFiles) -> MediaTokens {
    let id = |content| files.tokenizer.control_id(content).unwrap();
    MediaTokens { image: id("<|image_pad|>"), video: id("<|video_pad|>") }
}

/// The full tokenizer takes a while to load.
fn full() -> &'static PromptEncoder {
    static FULL: OnceLock<PromptEncoder> = OnceLock::new();
    FULL.get_or_init(|| encoder(goldens::full_tokenizer_folder().path()))
}

fn checkpoint(name: &str) -> PromptEncoder {
    encoder(&goldens::path(&format!("tests/checkpoints/{name}")))
}

/// A golden's conversation; `num_tokens` has one count for each picture and video.
fn chat(messages: &Value, num_tokens: &[usize]) -> Chat {
    let mut num_tokens = num_tokens.iter();
    let mut part = |part: &Value| match part["text"].as_str() {
        Some(text) => Part::Text(text.into()),
        None => {
            let kind = if part["image"].is_string() { MediaKind::Image } else { MediaKind::Video };
            Part::Medium(Medium { kind, num_tokens: *num_tokens.next().unwrap() })
        }
    };
    let messages = messages.as_array().unwrap().iter().map(|message| Message {
        role: match message["role"].as_str().unwrap() {
            "system" => Role::System,
            "assistant" => Role::Assistant,
            _ => Role::User,
        },
        parts: message["parts"].as_array().unwrap().iter().map(&mut part).collect(),
    });
    Chat { messages: messages.collect(), tools: Vec::new() }
}

fn user(text: &str) -> Chat {
    let parts = vec![Part::Text(text.into())];
    Chat { messages: vec![Message { role: Role::User, parts }], tools: Vec::new() }
}

/// The bytes of tokens, control tokens written out.
fn bytes(encoder: &PromptEncoder, token_ids: &[u32]) -> Vec<u8> {
    let vocabulary = encoder.tokenizer().vocabulary();
    token_ids.iter().flat_map(|id| vocabulary.token_bytes(*id)).copied().collect()
}

fn controls(encoder: &PromptEncoder, token_ids: &[u32]) -> Vec<u32> {
    let is_control = |id: &u32| encoder.tokenizer().controls().any(|token| token.id == *id);
    token_ids.iter().copied().filter(is_control).collect()
}

#[test]
fn prompts_of_all_cases_agree() {
    for name in [&goldens::CHECKPOINTS[..], &["a_videos", "d_videos", "g_videos"]].concat() {
        let encoder = checkpoint(&name[..1]);
        for case in goldens::cases(&format!("tests/goldens/{name}.json")) {
            let grids: Vec<_> = case["grids"].as_array().unwrap().iter().map(goldens::numbers).collect();
            let num_tokens: Vec<usize> =
                grids.iter().map(|grid| grid.iter().product::<u32>() as usize / 4).collect();
            let prompt = encoder.encode(&chat(&case["messages"], &num_tokens)).unwrap();
            assert_eq!(prompt.token_ids, goldens::numbers(&case["input_ids"]), "{name}: {}", case["name"]);
            let spans: Vec<usize> = prompt.media.iter().map(|span| span.num_tokens).collect();
            assert_eq!(spans, num_tokens);
            for MediaSpan { first_token, num_tokens } in prompt.media {
                let pad = prompt.token_ids[first_token];
                let run = &prompt.token_ids[first_token - 1..first_token + num_tokens + 1];
                assert!(run[1..=num_tokens].iter().all(|id| *id == pad));
                assert!(run[0] != pad && run[num_tokens + 1] != pad);
            }
        }
    }
}

fn one_token(kind: &MediaKind) -> Medium {
    Medium { kind: *kind, num_tokens: 1 }
}

#[test]
fn the_corpus_is_encoded_as_the_reference_does() {
    let encoder = full();
    let cases = goldens::cases("tests/tokenizer/corpus.json");
    assert!(cases.len() > 300);
    for case in cases {
        let (text, ids) = (case["text"].as_str().unwrap(), goldens::numbers(&case["ids"]));
        let encoded = match case["kind"].as_str().unwrap() {
            "plain" => encoder.tokenizer().encode_text(text).unwrap(),
            _ => {
                encoder
                    .encode_rendered(text, |placed| placed.iter().map(one_token).collect())
                    .unwrap()
                    .token_ids
            }
        };
        assert_eq!(encoded, ids, "{case}");
        let decoded = case["decoded"].as_str().unwrap_or(text);
        assert_eq!(String::from_utf8(bytes(encoder, &ids)).unwrap(), decoded);
    }
}

#[test]
fn control_tokens_typed_by_a_user_stay_text() {
    let cases = goldens::cases("tests/goldens/control_tokens.json");
    assert!(!cases.is_empty());
    for case in cases {
        let chat = chat(&case["messages"], &[]);
        let prompt = match case["checkpoint"].as_str() {
            Some(folder) => encoder(&goldens::path(folder)).encode(&chat),
            None => full().encode(&chat),
        };
        assert_eq!(prompt.unwrap().token_ids, goldens::numbers(&case["input_ids"]), "{}", case["name"]);
    }
}

/// Whatever users write, in however many parts, the prompt holds the control tokens that the template places, no other,
/// and what was written survives.
#[test]
fn any_text_survives_and_places_no_control_token() {
    const PIECES: [&str; 21] = [
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<tool_call>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        "im_start|>",
        "\u{F0000}",
        "\u{F0001}",
        "\u{F0000}\u{F0001}",
        "user\n",
        " ",
        "é",
        "漢字",
        "😀",
        "word",
        "\n\n",
    ];
    let encoder = full();
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..2_000 {
        let mut chat = Chat::default();
        let mut written = String::new();
        let mut expected_controls = vec!["<|im_start|>", "<|im_end|>"];
        written.push_str("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n");
        for _ in 0..rng.random_range(1..4) {
            let role = if rng.random() { Role::User } else { Role::Assistant };
            written.push_str(&format!("<|im_start|>{}\n", role.as_str()));
            expected_controls.push("<|im_start|>");
            let mut parts = Vec::new();
            for _ in 0..rng.random_range(1..4) {
                if rng.random_bool(0.2) {
                    let (kind, pad) = match rng.random() {
                        true => (MediaKind::Image, "<|image_pad|>"),
                        false => (MediaKind::Video, "<|video_pad|>"),
                    };
                    parts.push(Part::Medium(Medium { kind, num_tokens: 2 }));
                    let run = ["<|vision_start|>", pad, pad, "<|vision_end|>"];
                    written.push_str(&run.concat());
                    expected_controls.extend(run);
                } else {
                    let text: String =
                        (0..rng.random_range(0..6)).map(|_| *PIECES.choose(&mut rng).unwrap()).collect();
                    written.push_str(&text);
                    parts.push(Part::Text(text));
                }
            }
            written.push_str("<|im_end|>\n");
            expected_controls.push("<|im_end|>");
            chat.messages.push(Message { role, parts });
        }
        written.push_str("<|im_start|>assistant\n");
        expected_controls.push("<|im_start|>");
        let prompt = encoder.encode(&chat).unwrap();
        assert_eq!(String::from_utf8(bytes(encoder, &prompt.token_ids)).unwrap(), written);
        let expected: Vec<u32> = expected_controls
            .iter()
            .map(|content| encoder.tokenizer().control_id(content).unwrap())
            .collect();
        assert_eq!(controls(encoder, &prompt.token_ids), expected, "{chat:?}");
    }
}

/// Parts of text are given to the template as a list; a single text as a string must give the same.
#[test]
fn the_released_template_takes_lists_and_strings_alike() {
    let encoder = full();
    let as_list = encoder.encode(&user("Hello <b> there")).unwrap();
    let rendered = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello <b> there\
                    <|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(as_list, encoder.encode_rendered(rendered, |_| Vec::new()).unwrap());
}

#[test]
fn refuses_what_it_cannot_encode() {
    let encoder = full();
    let long = "a".repeat(MAX_PROMPT_BYTES + 1);
    assert!(matches!(encoder.encode(&user(&long)), Err(PromptError::TooLong { .. })));
    let mut chat = user("hi");
    chat.tools.push(super::Tool { name: "f".into(), description: "".into(), parameters: Value::Null });
    assert_eq!(encoder.encode(&chat), Err(PromptError::ToolsUnsupported));
}

/// The slowest texts that are let in: runs that the pattern does not split, runs that make it look back, and marks that
/// the normalization has to sort.
#[test]
fn the_longest_texts_are_encoded_within_the_bound() {
    let encoder = full();
    let units =
        ["a", " ", "\n", " \n", "<", "'", "\u{0301}", "\u{0301}\u{0323}", "漢", "𝕏", "1", "\u{F0000}"];
    for unit in units {
        let text = unit.repeat(MAX_PROMPT_BYTES / unit.len());
        let started = std::time::Instant::now();
        assert!(encoder.encode(&user(&text)).is_ok(), "{unit:?}");
        let elapsed = started.elapsed();
        // The bound is for the program as it is shipped.
        let is_within = elapsed < MAX_PROMPT_TIME || cfg!(debug_assertions);
        assert!(is_within, "{unit:?} took {elapsed:?}");
    }
}

#[tokio::test]
async fn encodes_off_the_async_threads() {
    let encoder = std::sync::Arc::new(checkpoint("a"));
    let prompt = encoder.encode_off_thread(user("hello")).await.unwrap();
    assert_eq!(prompt, encoder.encode(&user("hello")).unwrap());
    let long = "a".repeat(MAX_PROMPT_BYTES + 1);
    let error = encoder.encode_off_thread(user(&long)).await.unwrap_err();
    assert_eq!(error.fault().unwrap().0, "messages");
}

/// A template that places no medium where there is one is found when the encoder is made.
#[test]
fn a_template_without_media_is_refused_at_start() {
    let files = ModelFiles::open(&goldens::path("tests/checkpoints/a")).unwrap();
    let tokens = media_tokens(&files);
    let template = super::ChatTemplate::new("{{ messages[0].role }}", Default::default()).unwrap();
    let error = PromptEncoder::new(files.tokenizer, template, tokens).unwrap_err();
    let media = vec![MediaKind::Image, MediaKind::Video];
    assert_eq!(error, PromptError::Pads { placed: Vec::new(), media });
    assert_eq!(error.fault(), None);
}
