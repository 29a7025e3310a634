//! Sizes and pixels compared with the reference's.

use std::fs;

use serde_json::Value;

use super::decode::Source;
use super::resize::resize;
use super::{PictureLimits, PictureOptions, PicturePreparer, smart_resize};
use crate::checkpoint::ModelFiles;
use crate::goldens;

const RESIZE: &str = "tests/goldens/resize.json";

fn decoded(file: &str) -> ((u32, u32), Vec<u8>) {
    let file = fs::read(goldens::path(file)).unwrap();
    let source = Source::open(&file, 1 << 26).unwrap();
    ((source.header.width, source.header.height), source.decode().unwrap())
}

#[test]
fn smart_resize_agrees_with_the_reference() {
    let golden = goldens::json(RESIZE);
    let factor = golden["factor"].as_u64().unwrap() as u32;
    let cases = golden["smart_resize"].as_array().unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let n = goldens::numbers(case);
        let size = smart_resize(n[0], n[1], factor, n[2].into(), n[3].into());
        assert_eq!(size, Some((n[4].into(), n[5].into())), "{case}");
    }
    for case in golden["refused"].as_array().unwrap() {
        let n = goldens::numbers(case);
        assert_eq!(smart_resize(n[0], n[1], factor, n[2].into(), n[3].into()), None, "{case}");
    }
}

#[test]
fn resized_pixels_are_the_references_bits() {
    let golden = goldens::json(RESIZE);
    let cases = golden["pixels"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let (from, pixels) = match case["file"].as_str() {
            Some(file) => decoded(file),
            None => formula(&case["formula"]),
        };
        let side = |name: &str| case[name].as_u64().unwrap() as u32;
        let resized = resize(pixels, from, (side("width"), side("height"))).unwrap();
        assert_eq!(goldens::sha256_hex(&resized), case["sha256"].as_str().unwrap(), "{case}");
    }
}

fn formula(sides: &Value) -> ((u32, u32), Vec<u8>) {
    let sides = goldens::numbers(sides);
    let (width, height) = (sides[0], sides[1]);
    let sample = |x: u32, y: u32, c: u32| ((x * 7 + y * 13 + c * 29 + (x * y) % 31) % 256) as u8;
    let pixels =
        (0..height).flat_map(|y| (0..width).flat_map(move |x| [0, 1, 2].map(|c| sample(x, y, c)))).collect();
    ((width, height), pixels)
}

#[test]
fn transparency_is_laid_on_white_as_pillow_does() {
    let transparent = decoded("tests/pictures/transparent_100x76.png");
    assert_eq!(transparent, decoded("tests/pictures/transparent_100x76_on_white.png"));
}

#[test]
fn photographs_are_near_the_references_pixels() {
    let (size, ours) = decoded("tests/goldens/cat_140x84.png");
    let (from, cat) = decoded("tests/pictures/cat.jpg");
    let resized = resize(cat, from, size).unwrap();
    let differences: Vec<u8> = ours.iter().zip(&resized).map(|(a, b)| a.abs_diff(*b)).collect();
    let largest = differences.iter().max().unwrap();
    let differing = differences.iter().filter(|difference| **difference > 0).count();
    assert!(*largest <= 4, "a sample differs by {largest}");
    assert!(differing * 5 < differences.len(), "{differing} of {} samples differ", differences.len());
}

/// The pictures of every case of every checkpoint: sizes, grids and pixels.
#[tokio::test]
async fn pictures_of_all_cases_agree() {
    for checkpoint in goldens::CHECKPOINTS {
        let folder = goldens::path(&format!("tests/checkpoints/{checkpoint}"));
        let files = ModelFiles::open(&folder).unwrap();
        let preparer = PicturePreparer::new(files.picture, PictureLimits::default());
        for case in goldens::cases(&format!("tests/goldens/{checkpoint}.json")) {
            let parts =
                case["messages"].as_array().unwrap().iter().flat_map(|m| m["parts"].as_array().unwrap());
            for (index, part) in parts.filter(|part| part["image"].is_string()).enumerate() {
                let what = format!("{checkpoint}: {}: picture {index}", case["name"]);
                let file = fs::read(goldens::path(part["image"].as_str().unwrap())).unwrap();
                let picture = preparer.prepare(file.into(), options(part)).await.unwrap();
                assert_eq!(
                    picture.measure.size.grid.to_vec(),
                    goldens::numbers(&case["grids"][index]),
                    "{what}"
                );
                let resized = goldens::numbers(&case["resized"][index]);
                let size = picture.measure.size;
                assert_eq!([size.width, size.height].to_vec(), resized, "{what}");
                if part["image"].as_str().unwrap().ends_with(".png") {
                    let sha256 = case["pixel_sha256"][index].as_str().unwrap();
                    assert_eq!(goldens::sha256_hex(&picture.pixels), sha256, "{what}");
                }
            }
        }
    }
}

fn options(part: &Value) -> PictureOptions {
    let option = |name: &str| part[name].as_u64().map(|value| value as u32);
    PictureOptions {
        min_pixels: option("min_pixels"),
        max_pixels: option("max_pixels"),
        resized_width: option("resized_width"),
        resized_height: option("resized_height"),
    }
}
