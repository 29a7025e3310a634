//! Faults of every kind in the middle of what a rank does. A server makes a pause of each, after which its streams have the tokens
//! that they would have had.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use lockstep_proto::v1;
use lockstep_proto::v1::part::Part;
use lockstep_tests::beside::connect;
use lockstep_tests::faults::{order, recoveries, until};
use lockstep_tests::golden::root;
use lockstep_tests::hostile::ask;
use lockstep_tests::replay::answer;
use lockstep_tests::server::{Server, other_binary};

const KINDS: [&str; 6] = ["flip", "hang", "exhaust", "panic", "kill", "stop"];
const PHASES: [&str; 4] = ["picture", "video", "prefill", "decode"];
/// Meetings of the ranks in a phase before the fault.
const AFTER: u32 = 3;
const MAX_TOKENS: u32 = 24;

fn checkpoint() -> PathBuf {
    root().join("tests/checkpoints/a")
}

/// A server whose second rank takes orders from a folder.
fn faulty(folder: &Path) -> anyhow::Result<Server> {
    let program = other_binary("faulty-shard")?;
    // More patience than usual, so that nobody else is accused on a busy machine.
    let patience = ["--silence-timeout", "4"];
    let arguments = ["--world-size", "2", "--max-step-tokens", "128", "--shard-program", &program];
    let arguments = [&arguments[..], &patience].concat();
    let folder = folder.to_str().context("a path of words")?;
    Server::start_in(&[("LOCKSTEP_FAULTS", folder)], &checkpoint(), &arguments)
}

/// One that no other number's shares a computed part with, and that has a phase.
fn request(phase: &str, number: u32) -> anyhow::Result<v1::GenerateRequest> {
    let file = |name: &str| std::fs::read(root().join("tests/pictures").join(name));
    let text = |text: String| Part::Text(text);
    let parts = match phase {
        "picture" => {
            let source = Some(v1::image::Source::Data(file("cat.jpg")?.into()));
            let image = v1::Image {
                source,
                resized_width: Some(28 * (4 + number)),
                resized_height: Some(84),
                ..Default::default()
            };
            vec![Part::Image(image), text("What animal is this?".into())]
        }
        "video" => {
            let frames = vec![file("noise_56x56.png")?.into(); 2 * number as usize];
            let frames = v1::VideoFrames { frames, rate: Some(2.0), ..Default::default() };
            let video = v1::Video { source: Some(v1::video::Source::Frames(frames)), ..Default::default() };
            vec![Part::Video(video), text("What happens?".into())]
        }
        "prefill" => vec![text(format!("{number} times: {}", "say it again. ".repeat(60)))],
        _ => vec![text(format!("{number} words, please."))],
    };
    let mut request = ask(parts);
    request.sampling =
        Some(v1::Sampling { temperature: Some(0.9), seed: Some(number.into()), ..Default::default() });
    request.stopping =
        Some(v1::Stopping { max_tokens: Some(MAX_TOKENS), ignore_eos: Some(true), ..Default::default() });
    request.logprobs = Some(0);
    Ok(request)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_any_kind_in_any_phase_is_a_pause() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let sound = Server::start(&checkpoint(), &["--world-size", "2", "--max-step-tokens", "128"])?;
    let faulty = faulty(folder.path())?;
    let (mut of_sound, mut of_faulty) = (connect(&sound).await?, connect(&faulty).await?);
    let cases = PHASES.iter().flat_map(|phase| KINDS.iter().map(move |kind| (*phase, *kind)));
    for ((phase, kind), number) in cases.zip(1..) {
        let request = request(phase, number)?;
        let (expected, _) = answer(&mut of_sound, &request).await?;
        ensure!(expected.len() == MAX_TOKENS as usize, "{phase}: {} tokens", expected.len());
        order(folder.path(), 1, &format!("{kind} {AFTER} {phase}"))?;
        let (printed, before) = (faulty.output().len(), recoveries(&faulty));
        let (tokens, _) =
            answer(&mut of_faulty, &request).await.with_context(|| format!("{kind} in {phase}"))?;
        ensure!(tokens == expected, "{kind} in {phase}: {tokens:?} is not {expected:?}");
        until("not back", &faulty, || (recoveries(&faulty) == before + 1).then_some(())).await?;
        ensure!(!folder.path().join("1").exists(), "{kind} in {phase}: the order was not taken");
        // Of two that differ nobody knows which one is right. Otherwise the one that is sound keeps its weights.
        let lost = if kind == "flip" { "of 2 shards [0, 1] load" } else { "of 2 shards [1] load" };
        let printed = faulty.output().split_off(printed);
        ensure!(printed.contains(lost), "{kind} in {phase}:\n{printed}");
        ensure!(printed.contains("the ranks diverged") == (kind == "flip"), "{kind} in {phase}:\n{printed}");
    }
    assert_eq!(faulty.stop()?.code, Some(0));
    Ok(())
}

/// A server that is ready has computed a text, a picture and a video: what is planted in such a step has happened by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_phase_is_met_before_a_server_is_ready() -> anyhow::Result<()> {
    for phase in PHASES {
        let folder = tempfile::tempdir()?;
        order(folder.path(), 1, &format!("kill 0 {phase}"))?;
        let server = faulty(folder.path())?;
        until("no fault", &server, || (recoveries(&server) == 1).then_some(())).await?;
        assert!(!folder.path().join("1").exists(), "{phase}: the order was not taken");
    }
    Ok(())
}
