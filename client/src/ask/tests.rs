//! `ask` against a fake server.

use std::{
    fs,
    io::{self, Write},
};

use clap::{Args, FromArgMatches};
use lockstep_proto::v1;
use serde_json::{Value, json};

use super::{
    AskArgs,
    args::PartArg,
    media::{MediumKind, Setting},
    run::{Console, run},
};
use crate::fake::{Fake, transcript};

fn parse(line: &[&str]) -> Result<AskArgs, clap::Error> {
    let command = AskArgs::augment_args(clap::Command::new("ask"));
    let matches = command.try_get_matches_from(std::iter::once(&"ask").chain(line))?;
    AskArgs::from_arg_matches(&matches)
}

fn console(input: &str) -> Console<&[u8], Vec<u8>, Vec<u8>> {
    Console { input: input.as_bytes(), output: Vec::new(), notes: Vec::new(), interactive: false }
}

/// Runs `ask` and returns its output, its remarks, and its error.
async fn asked(fake: &Fake, line: &[&str], input: &str) -> (String, String, Option<String>) {
    let args = parse(&[line, &["--server", &fake.address]].concat()).unwrap();
    let mut console = console(input);
    let error = run(&args, &mut console).await.err().map(|error| format!("{error:#}"));
    (String::from_utf8(console.output).unwrap(), String::from_utf8(console.notes).unwrap(), error)
}

/// A folder with the files a.png and b.png, which hold no more than a picture's first bytes and their name.
fn pictures() -> (tempfile::TempDir, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = folder.path().join(name);
        fs::write(&path, format!("GIF89a {name}")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (a, b) = (path("a.png"), path("b.png"));
    (folder, a, b)
}

#[tokio::test]
async fn parts_are_sent_in_the_order_of_the_command_line() {
    let fake = Fake::start().await;
    let (_folder, a, b) = pictures();

    let (output, _, error) =
        asked(&fake, &["Look:", "--image", &a, "and", "--seed", "3", "--image", &b, "Compare."], "").await;

    assert_eq!((output.as_str(), error), ("You said: Compare.\n", None));
    let expected = ["ROLE_USER: Look: | <GIF89a a.png> | and | <GIF89a b.png> | Compare."];
    assert_eq!(transcript(&fake.seen()[0]), expected);
}

#[test]
fn a_setting_belongs_to_the_medium_before_it_or_to_all() {
    use Setting::{Fps, MaxFrames, MaxPixels, MinPixels, ResizedHeight, ResizedWidth, TotalPixels};
    let line = "--max-pixels 1000 --fps 4 --image a --min-pixels=500 --image b --max-pixels 2000 --resized-width 56 \
                --resized-height 28 --video c --max-frames 8 --total-pixels 9000 --frames d --fps 1.5";
    let args = parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap();
    let media: Vec<_> = args
        .parts
        .iter()
        .map(|part| match part {
            PartArg::Medium(medium) => (medium.path.to_str().unwrap(), medium.kind, &medium.settings[..]),
            PartArg::Text(text) => panic!("an unexpected text: {text}"),
        })
        .collect();
    let (all, image) = (MaxPixels(1000), MediumKind::Image);
    assert_eq!(media[0], ("a", image, &[all, MinPixels(500)][..]));
    assert_eq!(media[1], ("b", image, &[all, MaxPixels(2000), ResizedWidth(56), ResizedHeight(28)][..]));
    assert_eq!(media[2], ("c", MediumKind::Video, &[all, Fps(4.0), MaxFrames(8), TotalPixels(9000)][..]));
    assert_eq!(media[3], ("d", MediumKind::Frames, &[all, Fps(4.0), Fps(1.5)][..]));
}

#[test]
fn a_setting_that_fits_nothing_is_refused() {
    for (line, words) in [
        ("--fps 2 --image a", "--fps is given, but nothing that it is for: a video"),
        ("--resized-width 28 --video a", "--resized-width is given, but nothing that it is for: a picture"),
        ("--image a --fps 2", "--fps after a: it is for a video"),
        ("--video a --resized-height 28", "--resized-height after a: it is for a picture"),
        ("--frames a --fps 2 --max-frames 4", "--max-frames after a: it is for a video (--video)"),
        ("--frames a", "--frames a needs --fps"),
    ] {
        let error = parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap_err().to_string();
        assert!(error.contains(words), "{line}: {error}");
    }
}

#[tokio::test]
async fn videos_are_sent_with_their_settings() {
    let fake = Fake::start().await;
    let (folder, a, _) = pictures();
    let folder = folder.path().to_str().unwrap();
    let line = [
        "--frames",
        folder,
        "--fps",
        "1.5",
        "then",
        "--video",
        &a,
        "--fps",
        "4",
        "--max-frames",
        "8",
        "Compare.",
    ];

    let (output, _, error) = asked(&fake, &line, "").await;

    assert_eq!((output.as_str(), error), ("You said: Compare.\n", None));
    let expected = ["ROLE_USER: <GIF89a a.png, GIF89a b.png> | then | <GIF89a a.png> | Compare."];
    assert_eq!(transcript(&fake.seen()[0]), expected);
    let parts = fake.seen().remove(0).chat.unwrap().messages.remove(0).parts;
    let sent = |index: usize| match parts[index].part.clone() {
        Some(v1::part::Part::Video(video)) => video,
        other => panic!("{other:?}"),
    };
    assert_eq!((sent(0).fps, sent(2).fps, sent(2).max_frames), (None, Some(4.0), Some(8)));
    let Some(v1::video::Source::Frames(frames)) = sent(0).source else { panic!("frames were sent") };
    assert_eq!((frames.rate, frames.timestamps_s.len()), (Some(1.5), 0));
}

#[test]
fn a_command_line_without_a_question_is_refused() {
    assert!(parse(&[]).unwrap_err().to_string().contains("nothing to ask"));
    assert!(parse(&["--min-pixels", "9", "Hi"]).unwrap_err().to_string().contains("a picture (--image)"));
    assert!(parse(&["--timeout", "0", "Hi"]).is_err());
    for wrong in ["7", "x=1", "7=", "4294967296=1"] {
        let words = parse(&["--logit-bias", wrong, "Hi"]).unwrap_err().to_string();
        assert!(words.contains("--logit-bias"), "{words}");
    }
    assert!(parse(&["--chat"]).unwrap().parts.is_empty());
}

#[tokio::test]
async fn settings_travel_as_they_were_typed() {
    let fake = Fake::start().await;
    let line = [
        "--system",
        "Be brief.",
        "--max-tokens",
        "2",
        "--temperature",
        "0",
        "--seed",
        "0",
        "--repetition-penalty",
        "1.05",
        "--top-k",
        "0",
        "--top-p",
        "0.5",
        "--min-p",
        "0.25",
        "--presence-penalty",
        "-1",
        "--frequency-penalty",
        "-0.5",
        "--logit-bias",
        "7=-2.5",
        "--logit-bias",
        "0=4",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
        "--logprobs",
        "0",
        "Hi",
    ];

    let (output, _, error) = asked(&fake, &line, "").await;

    assert_eq!((output.as_str(), error), ("You said: \n", None));
    let request = &fake.seen()[0];
    assert_eq!(transcript(request), ["ROLE_SYSTEM: Be brief.", "ROLE_USER: Hi"]);
    let sampling = request.sampling.clone().unwrap();
    assert_eq!(
        (sampling.temperature, sampling.seed, sampling.repetition_penalty),
        (Some(0.0), Some(0), Some(1.05))
    );
    assert_eq!((sampling.top_k, sampling.top_p, sampling.min_p), (Some(0), Some(0.5), Some(0.25)));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (Some(-1.0), Some(-0.5)));
    assert_eq!(sampling.logit_bias, std::collections::HashMap::from([(7, -2.5), (0, 4.0)]));
    let stopping = request.stopping.clone().unwrap();
    assert_eq!((stopping.max_tokens, stopping.ignore_eos), (Some(2), Some(true)));
    assert_eq!((stopping.stop, request.logprobs), (vec!["a".to_owned(), "b".to_owned()], Some(0)));
}

#[tokio::test]
async fn json_is_one_object_with_everything() {
    let fake = Fake::start().await;
    let (_folder, a, _) = pictures();
    let line = ["--image", &a, "what", "--json", "--logprobs", "2", "--seed", "18446744073709551615"];

    let (output, _, error) = asked(&fake, &line, "").await;

    assert_eq!(error, None);
    let position = |id: u32| json!({ "id": id, "logprob": -0.5, "top": [{ "id": id, "logprob": -0.5 }, { "id": id + 1, "logprob": -1.5 }] });
    let expected = json!({
        "text": "You said: what",
        "token_ids": [100, 101, 102],
        "prompt_tokens": 21,
        "prompt_token_ids": [151644, 872],
        "logprobs": [position(100), position(101), position(102)],
        "media": [{
            "kind": "image", "message_index": 0, "part_index": 0, "source_width": 640, "source_height": 480,
            "resized_width": 644, "resized_height": 476, "tokens": 391, "timestamps_s": [],
        }],
        "finish_reason": "stop_token",
        "stop_string": null,
        "usage": { "prompt_tokens": 21, "cached_tokens": 0, "completion_tokens": 3 },
        "timings_ms": {
            "queue": 0.5, "media": 3.0, "vision": 20.0, "prefill": 10.0, "decode": 90.0, "total": 123.5,
        },
        "seed": u64::MAX,
    });
    assert_eq!(serde_json::from_str::<Value>(&output).unwrap(), expected);
    assert_eq!(output.lines().count(), 1);
}

#[tokio::test]
async fn several_answers_are_printed_one_after_the_other() {
    let fake = Fake::start().await;

    let (output, _, error) = asked(&fake, &["what", "--n", "3"], "").await;
    let expected = "[1]\nYou said: what\n[2]\nNumber 1 said: what\n[3]\nNumber 2 said: what\n";
    assert_eq!((output.as_str(), error), (expected, None));
    assert_eq!(fake.seen()[0].n, Some(3));

    let (output, _, _) = asked(&fake, &["what", "-n", "2", "--json"], "").await;
    let choice = |text: &str, token_ids: &[u32]| {
        json!({
            "text": text, "token_ids": token_ids, "logprobs": null, "finish_reason": "stop_token", "stop_string": null,
        })
    };
    let summary = serde_json::from_str::<Value>(&output).unwrap();
    let second = choice("Number 1 said: what", &[1100, 1101, 1102, 1103]);
    assert_eq!(summary["choices"], json!([choice("You said: what", &[100, 101, 102]), second]));
    assert_eq!(
        (&summary["text"], &summary["usage"]["completion_tokens"]),
        (&json!("You said: what"), &json!(7))
    );

    let (output, _, _) = asked(&fake, &["late", "-n", "2"], "").await;
    assert_eq!(output, "[1]\nYou said: late\n[2]\nNumber 1 said: late\n");
    let (output, _, error) = asked(&fake, &["late", "-n", "2", "--json"], "").await;
    let cut = serde_json::from_str::<Value>(&output).unwrap();
    assert_eq!(
        cut["choices"][1],
        json!({ "text": "Number 1 said: late", "token_ids": [1100, 1101, 1102, 1103] })
    );
    assert_eq!(cut["error"], json!(error.unwrap()));
}

#[tokio::test]
async fn a_refusal_is_one_message_with_the_fields() {
    let fake = Fake::start().await;
    let (output, _, error) = asked(&fake, &["refuse"], "").await;
    assert_eq!(output, "");
    assert_eq!(
        error.as_deref(),
        Some(
            "INVALID_ARGUMENT: 2 fields are at fault\n  sampling.temperature: must be at most 100\n  \
             chat.messages[0].parts[0].image: is truncated"
        )
    );
}

#[tokio::test]
async fn what_came_before_the_deadline_is_printed() {
    let fake = Fake::start().await;

    let (output, _, error) = asked(&fake, &["late"], "").await;
    assert_eq!(output, "You said: late\n");
    assert_eq!(error.as_deref(), Some("DEADLINE_EXCEEDED: deadline exceeded while generating the answer"));

    let (output, _, error) = asked(&fake, &["late", "--json"], "").await;
    let cut = json!({ "text": "You said: late", "token_ids": [100, 101, 102], "error": error.unwrap() });
    assert_eq!(serde_json::from_str::<Value>(&output).unwrap(), cut);
}

#[tokio::test]
async fn a_bad_file_is_refused_before_anything_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    fs::write(&text, "no picture").unwrap();
    // An attempt to connect would fail with another message.
    let nowhere = Fake::nowhere();

    let (_, _, error) = asked(&nowhere, &["--image", text.to_str().unwrap(), "Hi"], "").await;
    assert!(error.as_ref().unwrap().contains("notes.txt is not a picture"), "{error:?}");
    let (_, _, error) = asked(&nowhere, &["--image", "/nowhere/cat.jpg", "Hi"], "").await;
    assert!(error.as_ref().unwrap().contains("/nowhere/cat.jpg: No such file"), "{error:?}");
    let (_, _, error) = asked(&nowhere, &["--video", text.to_str().unwrap(), "Hi"], "").await;
    assert!(error.as_ref().unwrap().contains("notes.txt is not a video"), "{error:?}");
    let (_, _, error) = asked(&nowhere, &["Hi"], "").await;
    assert!(error.as_ref().unwrap().contains("lockstep serve"), "{error:?}");
}

#[tokio::test]
async fn a_conversation_goes_on_with_its_history() {
    let fake = Fake::start().await;
    let line = ["--chat", "--system", "Be brief.", "one"];

    let (output, notes, error) = asked(&fake, &line, "two\n\n  refuse  \nthree\n/exit\nfour\n").await;

    assert_eq!(output, "You said: one\nYou said: two\nYou said: three\n");
    assert!(notes.starts_with("error: INVALID_ARGUMENT"), "{notes}");
    assert_eq!(error.as_deref(), Some("1 of the questions got no answer"));
    let seen = fake.seen();
    assert_eq!(seen.len(), 4, "one, two, refuse, three");
    let expected = [
        "ROLE_SYSTEM: Be brief.",
        "ROLE_USER: one",
        "ROLE_ASSISTANT: You said: one",
        "ROLE_USER: two",
        "ROLE_ASSISTANT: You said: two",
        "ROLE_USER: three",
    ];
    assert_eq!(transcript(&seen[3]), expected, "what was refused is forgotten");
}

#[tokio::test]
async fn a_conversation_may_begin_on_standard_input() {
    let fake = Fake::start().await;
    let (output, _, error) = asked(&fake, &["--chat", "--json"], "one\ntwo").await;
    assert_eq!(error, None);
    let texts: Vec<_> = output
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(texts, ["You said: one", "You said: two"]);
}

#[tokio::test]
async fn log_probabilities_are_remarks_unless_json() {
    let fake = Fake::start().await;
    let (output, notes, _) = asked(&fake, &["Hi", "--logprobs", "1"], "").await;
    assert_eq!(output, "You said: Hi\n");
    assert_eq!(notes.lines().next(), Some("\"You \" (100) -0.5000  | \"You \" (100) -0.5000"));
}

/// A pipe whose reader goes away after the first write.
struct ShortPipe(usize);

impl Write for ShortPipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0 -= 1;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_cancels_the_request() {
    let fake = Fake::start().await;
    let args = parse(&["endless", "--chat", "--server", &fake.address]).unwrap();
    let mut console =
        Console { input: &b"more\n"[..], output: ShortPipe(1), notes: Vec::new(), interactive: false };

    let error = run(&args, &mut console).await.unwrap_err();

    // What `ask` takes for a quiet end.
    assert_eq!(error.downcast_ref::<io::Error>().unwrap().kind(), io::ErrorKind::BrokenPipe);
    fake.cancelled().await;
    assert_eq!(fake.seen().len(), 1);
}
