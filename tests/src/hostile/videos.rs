//! Videos that are cut, empty, mislabelled, silent, endless, or that lie about what they hold.

use lockstep_proto::v1;
use lockstep_proto::v1::video::Source;

use super::{Case, ask, text};
use crate::golden::root;

const FIELD: &str = "chat.messages[0].parts[1].video";

fn read(path: &str) -> anyhow::Result<Vec<u8>> {
    Ok(std::fs::read(root().join("tests").join(path))?)
}

/// A question about a video of small frames.
fn showing(source: Source) -> v1::GenerateRequest {
    let video = v1::Video {
        source: Some(source),
        min_pixels: Some(784),
        max_pixels: Some(8_000),
        ..Default::default()
    };
    ask(vec![text("Look:"), v1::part::Part::Video(video)])
}

fn film(data: Vec<u8>) -> v1::GenerateRequest {
    showing(Source::Data(data.into()))
}

fn refused(name: impl Into<String>, data: Vec<u8>) -> Case {
    Case::invalid(name, film(data), &[&format!("{FIELD}.data")])
}

pub(super) fn cases() -> anyhow::Result<Vec<Case>> {
    Ok([files()?, cut()?, lies()?, frames()?].concat())
}

fn files() -> anyhow::Result<Vec<Case>> {
    let mut cases =
        vec![refused("an empty video", vec![]), refused("bytes that are no video", vec![0xA5; 4096])];
    for name in ["reordered.mp4", "rotated.mp4", "fragmented.mp4", "moving.gif", "moving.webp"] {
        cases.push(Case::served(name, film(read(&format!("videos/{name}"))?)));
    }
    cases.push(refused("interlaced.mp4", read("videos/interlaced.mp4")?));
    for name in [
        "served_still.bmp",
        "served_still.webp",
        "served_1x1.png",
        "refused_65535x65535.gif",
        "refused_pdf.pdf",
    ] {
        cases.push(refused(format!("{name} as a video"), read(&format!("hostile/{name}"))?));
    }
    Ok(cases)
}

fn cut() -> anyhow::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for name in ["reordered.mp4", "moving.gif", "moving.webp"] {
        let whole = read(&format!("videos/{name}"))?;
        for sixteenths in 1..16 {
            let cut = whole[..whole.len() * sixteenths / 16].to_vec();
            cases.push(refused(format!("{sixteenths}/16 of {name}"), cut));
        }
    }
    Ok(cases)
}

/// A film whose first box of a kind has other bytes at an offset from its name.
fn patched(kind: &[u8; 4], patches: &[(usize, u32)]) -> anyhow::Result<Vec<u8>> {
    let mut film = read("videos/reordered.mp4")?;
    let at = film.windows(4).position(|name| name == kind);
    let at = at.ok_or_else(|| anyhow::anyhow!("the film has no {}", String::from_utf8_lossy(kind)))?;
    for (offset, value) in patches {
        film[at + offset..at + offset + 4].copy_from_slice(&value.to_be_bytes());
    }
    Ok(film)
}

/// Offsets are those of ISO/IEC 14496-12, from the name of the box: version and flags, then the fields.
fn lies() -> anyhow::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (name, kind, patches) in [
        ("four billion frames", b"stsz", &[(12, u32::MAX)][..]),
        ("no frames", b"stsz", &[(12, 0)]),
        ("frames of four billion bytes each", b"stsz", &[(8, u32::MAX)]),
        ("a frame that is larger than the file", b"stsz", &[(16, 0x7FFF_FFFF)]),
        ("frames beyond the end of the file", b"stco", &[(12, u32::MAX - 9)]),
        ("frames on top of the headers", b"stco", &[(12, 0)]),
        ("times of four billion frames", b"stts", &[(8, 1), (12, u32::MAX)]),
        ("times of no frames", b"stts", &[(8, 0)]),
        ("four billion chunks", b"stsc", &[(8, u32::MAX)]),
        ("no ticks in a second", b"mdhd", &[(16, 0)]),
        ("a video that is none", b"hdlr", &[(12, u32::from_be_bytes(*b"soun"))]),
        ("a movie that is none", b"moov", &[(0, u32::from_be_bytes(*b"free"))]),
        ("a description of four billion formats", b"stsd", &[(8, u32::MAX)]),
        ("a box that is larger than the file", b"moov", &[(4, u32::MAX)]),
    ] {
        cases.push(refused(name, patched(kind, patches)?));
    }
    Ok(cases)
}

fn frames() -> anyhow::Result<Vec<Case>> {
    let frame = read("videos/frames/00.png")?;
    let given = |count: usize, rate: f64| v1::VideoFrames {
        frames: vec![frame.clone().into(); count],
        timestamps_s: vec![],
        rate: Some(rate),
    };
    let at = |times: &[f64]| v1::VideoFrames {
        rate: None,
        timestamps_s: times.to_vec(),
        ..given(times.len(), 1.0)
    };
    let field = |name: &str| format!("{FIELD}.frames.{name}");
    let mut cases = vec![
        Case::served("one frame", showing(Source::Frames(given(1, 1.0)))),
        Case::served("frames of no time", showing(Source::Frames(given(2, f64::MAX)))),
        Case::served("frames at given times", showing(Source::Frames(at(&[0.0, 0.5, 14_400.0])))),
        Case::invalid("no frames", showing(Source::Frames(given(0, 1.0))), &[&field("frames")]),
        Case::invalid("769 frames", showing(Source::Frames(given(769, 1.0))), &[&field("frames")]),
        Case::invalid(
            "times out of order",
            showing(Source::Frames(at(&[1.0, 0.5]))),
            &[&field("timestamps_s[1]")],
        ),
    ];
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE] {
        let request = showing(Source::Frames(given(2, rate)));
        cases.push(Case::invalid(format!("{rate} frames a second"), request, &[&field("rate")]));
    }
    for time in [-1.0, f64::NAN, f64::INFINITY, f64::MAX] {
        let request = showing(Source::Frames(at(&[0.0, time])));
        cases.push(Case::invalid(format!("a frame at {time} s"), request, &[&field("timestamps_s[1]")]));
    }
    Ok(cases)
}
