//! Pictures that are cut, empty, mislabelled, enormous, or only unusual. `tests/hostile/recipe` made them.

use lockstep_proto::v1;

use super::{Case, ask, text};
use crate::golden::root;

const FOLDER: &str = "tests/hostile";
const FIELD: &str = "chat.messages[0].parts[1].image.data";
/// Pictures of each format, to be cut.
const WHOLE: [&str; 6] =
    ["1_bit.png", "progressive.jpg", "still.webp", "still.gif", "still.bmp", "still.tiff"];

fn read(name: &str) -> anyhow::Result<Vec<u8>> {
    Ok(std::fs::read(root().join(FOLDER).join(name))?)
}

fn showing(data: Vec<u8>) -> v1::GenerateRequest {
    let image = v1::Image { source: Some(v1::image::Source::Data(data.into())), ..Default::default() };
    ask(vec![text("Look:"), v1::part::Part::Image(image)])
}

/// A WebP whose file says that it has one pixel, before a picture that has more.
fn two_sizes() -> anyhow::Result<Vec<u8>> {
    let picture = read("served_still.webp")?;
    let extended = [&b"VP8X\x0a\0\0\0"[..], &[0; 10]].concat();
    Ok([&picture[..12], &extended, &picture[12..]].concat())
}

pub(super) fn cases() -> anyhow::Result<Vec<Case>> {
    let mut cases = vec![
        Case::invalid("an empty picture", showing(vec![]), &[FIELD]),
        Case::invalid("a WebP of two sizes", showing(two_sizes()?), &[FIELD]),
    ];
    let mut names: Vec<String> = std::fs::read_dir(root().join(FOLDER))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for name in names {
        if name.starts_with("served_") {
            cases.push(Case::served(&name, showing(read(&name)?)));
        } else if name.starts_with("refused_") && !name.starts_with("refused_video_") {
            cases.push(Case::invalid(&name, showing(read(&name)?), &[FIELD]));
        }
    }
    for name in WHOLE {
        let whole = read(&format!("served_{name}"))?;
        for sixteenths in 1..16 {
            let cut = whole[..whole.len() * sixteenths / 16].to_vec();
            cases.push(Case::invalid(format!("{sixteenths}/16 of {name}"), showing(cut), &[FIELD]));
        }
    }
    Ok(cases)
}
