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
    Ok([files()?, lies()?, frames()?, options()?].concat())
}

/// A sound file with bytes in place of others: each this far behind a box's type.
fn changed(name: &str, changes: &[(&[u8; 4], usize, &[u8])]) -> anyhow::Result<Vec<u8>> {
    let mut file = read(&format!("videos/{name}"))?;
    for (kind, offset, bytes) in changes {
        let found = file.windows(4).position(|window| window == *kind);
        let at = found.ok_or_else(|| anyhow::anyhow!("{name} has no box {kind:?}"))? + 4 + offset;
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Ok(file)
}

/// One frame, shown for no time.
fn still() -> anyhow::Result<Vec<u8>> {
    let (one, none) = ([0, 0, 0, 1], [0; 4]);
    changed("main_bt709.mp4", &[(b"stsz", 8, &one), (b"stts", 4, &one), (b"stts", 12, &none)])
}

/// Frames of one pixel each on a screen of nine million: a small file, and hours of work.
fn large_screen() -> Vec<u8> {
    let mut file = b"GIF89a".to_vec();
    let sides = [4_000_u16, 2_300].map(u16::to_le_bytes).concat();
    file.extend([&sides[..], &[0; 3]].concat());
    let frame = [0x2C, 0, 0, 0, 0, 1, 0, 1, 0, 0x80, 0, 0, 0, 255, 255, 255, 2, 2, 0x4C, 1, 0];
    file.extend(frame.repeat(200));
    file.push(0x3B);
    file
}

/// Headers that contradict themselves, and sums that no single number tells.
fn lies() -> anyhow::Result<Vec<Case>> {
    let with_fps = |fps: f64| -> anyhow::Result<v1::GenerateRequest> {
        let still = video(Source::Data(still()?.into()));
        Ok(showing(v1::Video { fps: Some(fps), ..still }))
    };
    let no_chunks = changed("reordered.mp4", &[(b"stsc", 4, &[0; 4])])?;
    let no_times = changed("reordered.mp4", &[(b"stts", 4, &[0; 4])])?;
    let billions = changed("reordered.mp4", &[(b"stsz", 4, &[0, 0, 0, 1]), (b"stsz", 8, &[0xFF; 4])])?;
    let many_entries = changed("reordered.mp4", &[(b"stco", 4, &[0xFF; 4])])?;
    let fps = "chat.messages[0].parts[1].video.fps";
    let large = video(Source::Data(large_screen().into()));
    let parts = |count: usize| vec![v1::part::Part::Video(large.clone()); count];
    Ok(vec![
        Case::served("a still of no duration", file(still()?)),
        Case::served("a still, seldom", with_fps(7e-5)?),
        Case::invalid("a still, once in all time", with_fps(1e-320)?, &[fps]),
        Case::invalid("no chunks", file(no_chunks), &[FIELD]),
        Case::invalid("no times", file(no_times), &[FIELD]),
        Case::invalid("four billion frames", file(billions), &[FIELD]),
        Case::invalid("four billion places", file(many_entries), &[FIELD]),
        Case::invalid("eleven videos that are too many together", ask(parts(11)), &["chat"]),
    ])
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
    let [none, one, two] = [0, 1, 2].map(|index| format!("{times}[{index}]"));
    let pictures = [&picture; 3];
    let rated =
        v1::VideoFrames { frames: vec![picture.clone().into(); 2], rate: Some(1.0), timestamps_s: vec![] };
    let sampled = showing(v1::Video { fps: Some(1.0), max_frames: Some(4), ..video(Source::Frames(rated)) });
    let mut cases = vec![
        Case::served("frames at a rate", given(&pictures, &[], Some(2.0))),
        Case::served("frames hours apart", given(&pictures[..2], &[0.0, 14_400.0], None)),
        Case::served("frames at 1e300 a second", given(&pictures, &[], Some(1e300))),
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
        Case::invalid("times before the first", given(&pictures[..2], &[-1.0, 1e30], None), &[&none, &one]),
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
        Case::invalid(
            "a frame that is no picture",
            given(&[&picture, &b"no picture".to_vec()], &[], Some(2.0)),
            &[&format!("{files}[1]")],
        ),
        Case::invalid(
            "a choice among frames that are given",
            sampled,
            &["chat.messages[0].parts[1].video.fps", "chat.messages[0].parts[1].video.max_frames"],
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
        Case::invalid("a frame in a thousand years", with(|video| video.fps = Some(1e-12)), &[&fps]),
        Case::invalid("1e300 frames a second", with(|video| video.fps = Some(1e300)), &[&fps]),
        Case::invalid("fps 0", with(|video| video.fps = Some(0.0)), &[&fps]),
        Case::invalid("fps -1", with(|video| video.fps = Some(-1.0)), &[&fps]),
        Case::invalid("fps NaN", with(|video| video.fps = Some(f64::NAN)), &[&fps]),
        Case::invalid("fps infinite", with(|video| video.fps = Some(f64::INFINITY)), &[&fps]),
        Case::invalid(
            "fps NaN and max_frames 1",
            with(|video| (video.fps, video.max_frames) = (Some(f64::NAN), Some(1))),
            &[&fps, &max_frames],
        ),
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
