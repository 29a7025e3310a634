//! Videos that are cut, of other codecs, without pictures, or with headers that lie. `tests/hostile/recipe` made them.

use lockstep_proto::v1;
use lockstep_proto::v1::video::Source;

use super::{Case, ask, text};
use crate::golden::root;

const FIELD: &str = "chat.messages[0].parts[1].video.data";
/// Videos of each container, to be cut.
const WHOLE: [&str; 4] = ["reordered.mp4", "fragmented.mp4", "moving.gif", "moving.webp"];

fn read(name: &str) -> anyhow::Result<Vec<u8>> {
    Ok(std::fs::read(root().join("tests").join(name))?)
}

fn video(source: Source) -> v1::Video {
    v1::Video { source: Some(source), min_pixels: Some(784), max_pixels: Some(4_000), ..Default::default() }
}

fn showing(video: v1::Video) -> v1::GenerateRequest {
    ask(vec![text("Watch:"), v1::part::Part::Video(video)])
}

fn file(data: Vec<u8>) -> v1::GenerateRequest {
    showing(video(Source::Data(data.into())))
}

pub(super) fn cases() -> anyhow::Result<Vec<Case>> {
    Ok([files()?, frames()?, options()?].concat())
}

fn files() -> anyhow::Result<Vec<Case>> {
    let mut cases = vec![Case::invalid("an empty video", file(vec![]), &[FIELD])];
    let mut names: Vec<String> = std::fs::read_dir(root().join("tests/hostile"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("refused_"))
        .collect();
    names.sort();
    for name in names {
        // Pictures that are refused are no better as videos.
        let data = read(&format!("hostile/{name}"))?;
        cases.push(Case::invalid(format!("{name} as a video"), file(data), &[FIELD]));
    }
    for name in WHOLE {
        let whole = read(&format!("videos/{name}"))?;
        cases.push(Case::served(name, file(whole.clone())));
        for sixteenths in 1..16 {
            let cut = whole[..whole.len() * sixteenths / 16].to_vec();
            cases.push(Case::invalid(format!("{sixteenths}/16 of {name}"), file(cut), &[FIELD]));
        }
    }
    Ok(cases)
}

/// Frames that are given one by one.
fn frames() -> anyhow::Result<Vec<Case>> {
    let picture = read("hostile/served_still.bmp")?;
    let other = read("hostile/served_1x1.png")?;
    let given = |frames: &[&Vec<u8>], timestamps_s: &[f64], rate: Option<f64>| {
        let frames = frames.iter().map(|frame| (*frame).clone().into()).collect();
        showing(video(Source::Frames(v1::VideoFrames { frames, timestamps_s: timestamps_s.to_vec(), rate })))
    };
    let field = |name: &str| format!("chat.messages[0].parts[1].video.frames.{name}");
    let [files, rate, times] = ["frames", "rate", "timestamps_s"].map(field);
    let [one, two] = [1, 2].map(|index| format!("{times}[{index}]"));
    let pictures = [&picture; 3];
    let mut cases = vec![
        Case::served("frames at a rate", given(&pictures, &[], Some(2.0))),
        Case::invalid("no frames", given(&[], &[], Some(2.0)), &[&files]),
        Case::invalid("769 frames", given(&[&other; 769], &[], Some(2.0)), &[&files]),
        Case::invalid("frames without times", given(&pictures, &[], None), &[&times]),
        Case::invalid(
            "frames with times and a rate",
            given(&pictures, &[0.0, 1.0, 2.0], Some(1.0)),
            &[&rate],
        ),
        Case::invalid("fewer times than frames", given(&pictures, &[0.0, 1.0], None), &[&times]),
        Case::invalid("times that go back", given(&pictures, &[1.0, 0.5, 2.0], None), &[&one]),
        Case::invalid("times all the same", given(&pictures, &[1.0; 3], None), &[&times]),
        Case::invalid(
            "times that are none",
            given(&pictures, &[0.0, f64::NAN, f64::INFINITY], None),
            &[&one, &two],
        ),
        Case::invalid("times in another age", given(&pictures, &[0.0, 1.0, 1e12], None), &[&two]),
        Case::invalid(
            "an empty frame",
            given(&[&picture, &vec![], &picture], &[], Some(2.0)),
            &[&format!("{files}[1]")],
        ),
        Case::invalid(
            "a frame of another size",
            given(&[&picture, &picture, &other], &[], Some(2.0)),
            &[&format!("{files}[2]")],
        ),
        Case::invalid(
            "a frame that is cut",
            given(&[&picture, &picture[..99].to_vec()], &[], Some(2.0)),
            &[&format!("{files}[1]")],
        ),
    ];
    for value in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE] {
        cases.push(Case::invalid(
            format!("{value} frames a second"),
            given(&pictures, &[], Some(value)),
            &[&rate],
        ));
    }
    Ok(cases)
}

/// Numbers that say what is taken of a video.
fn options() -> anyhow::Result<Vec<Case>> {
    let whole = read("videos/main_bt709.mp4")?;
    let with = |change: fn(&mut v1::Video)| {
        let mut video = video(Source::Data(whole.clone().into()));
        change(&mut video);
        showing(video)
    };
    let field = |name: &str| format!("chat.messages[0].parts[1].video.{name}");
    let [fps, max_frames, min_pixels, max_pixels, total_pixels] =
        ["fps", "max_frames", "min_pixels", "max_pixels", "total_pixels"].map(field);
    let nowhere = with(|video| video.source = None);
    Ok(vec![
        Case::served("no options", with(|_| ())),
        Case::served("a thousand frames a second", with(|video| video.fps = Some(1e3))),
        Case::served("a frame in a thousand years", with(|video| video.fps = Some(1e-12))),
        Case::invalid("fps 0", with(|video| video.fps = Some(0.0)), &[&fps]),
        Case::invalid("fps -1", with(|video| video.fps = Some(-1.0)), &[&fps]),
        Case::invalid("fps NaN", with(|video| video.fps = Some(f64::NAN)), &[&fps]),
        Case::invalid("fps infinite", with(|video| video.fps = Some(f64::INFINITY)), &[&fps]),
        Case::invalid("max_frames 0", with(|video| video.max_frames = Some(0)), &[&max_frames]),
        Case::invalid("max_frames 2^32-1", with(|video| video.max_frames = Some(u32::MAX)), &[&max_frames]),
        Case::invalid(
            "bounds of 0 pixels",
            with(|video| {
                (video.min_pixels, video.max_pixels, video.total_pixels) = (Some(0), Some(0), Some(0));
            }),
            &[&min_pixels, &max_pixels, &total_pixels],
        ),
        Case::invalid(
            "min_pixels above max_pixels",
            with(|video| video.min_pixels = Some(5_000)),
            &[&min_pixels],
        ),
        Case::invalid("a video from nowhere", nowhere, &["chat.messages[0].parts[1].video"]),
    ])
}
