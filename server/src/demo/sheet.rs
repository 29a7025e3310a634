//! One picture of many, each beside what was asked and answered about it.

use image::{Rgb, RgbImage, imageops};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

use super::draw::{Bounds, blend};

const WIDTH: u32 = 1180;
/// Between things, and around them all.
const MARGIN: u32 = 20;
/// Where words begin.
const TEXT_LEFT: u32 = 560;
/// Between the tops of lines.
const LINE_HEIGHT: u32 = 24;
const PAPER: [u8; 3] = [255, 255, 255];
const INK: [u8; 3] = [24, 24, 24];
const PALE: [u8; 3] = [110, 110, 110];
const RIGHT: [u8; 3] = [0, 120, 50];
const WRONG: [u8; 3] = [190, 30, 30];
const TEXT_SIZE: RasterHeight = RasterHeight::Size20;

/// Pictures side by side, and words beside them.
#[derive(Debug)]
pub struct Entry {
    /// From left to right.
    pub pictures: Vec<RgbImage>,
    /// What they are.
    pub title: String,
    /// From top to bottom.
    pub answers: Vec<Answered>,
}

/// A question and its answer.
#[derive(Debug)]
pub struct Answered {
    /// What was asked.
    pub question: String,
    /// What was answered.
    pub answer: String,
    /// The box that the answer tells of the first picture.
    pub bounds: Option<Bounds>,
    /// Whether it is right.
    pub is_right: bool,
}

/// All entries, one below the other.
pub fn sheet(title: &str, entries: &[Entry]) -> RgbImage {
    let heights: Vec<_> = entries.iter().map(height).collect();
    let top = 2 * MARGIN + LINE_HEIGHT;
    let mut sheet = RgbImage::from_pixel(WIDTH, top + heights.iter().sum::<u32>(), Rgb(PAPER));
    write_line(&mut sheet, MARGIN, MARGIN, title, FontWeight::Bold, INK);
    let tops = heights.iter().scan(top, |next, height| {
        *next += height;
        Some(*next - height)
    });
    for (entry, top) in entries.iter().zip(tops) {
        place(&mut sheet, entry, top);
    }
    sheet
}

fn height(entry: &Entry) -> u32 {
    let pictures = entry.pictures.iter().map(RgbImage::height).max().unwrap_or(0);
    let lines = 1 + entry.answers.iter().map(|one| 1 + wrapped(&one.answer).len()).sum::<usize>();
    pictures.max(lines as u32 * LINE_HEIGHT) + MARGIN
}

fn place(sheet: &mut RgbImage, entry: &Entry, top: u32) {
    let mut left = MARGIN;
    for (index, picture) in entry.pictures.iter().enumerate() {
        let mut picture = picture.clone();
        if index == 0 {
            entry
                .answers
                .iter()
                .filter_map(|one| one.bounds)
                .for_each(|bounds| outline(&mut picture, bounds));
        }
        imageops::replace(sheet, &picture, left.into(), top.into());
        left += picture.width() + MARGIN / 2;
    }
    let mut line = top;
    let mut write = |text: &str, weight, color| {
        write_line(sheet, TEXT_LEFT, line, text, weight, color);
        line += LINE_HEIGHT;
    };
    write(&entry.title, FontWeight::Regular, PALE);
    for one in &entry.answers {
        write(&one.question, FontWeight::Regular, INK);
        let color = if one.is_right { RIGHT } else { WRONG };
        wrapped(&one.answer).into_iter().for_each(|text| write(text, FontWeight::Bold, color));
    }
}

/// An answer in lines that fit. A character that the font lacks takes one box.
fn wrapped(text: &str) -> Vec<&str> {
    let fits = ((WIDTH - TEXT_LEFT - MARGIN) as usize) / get_raster_width(FontWeight::Bold, TEXT_SIZE);
    let mut rest = text;
    let mut lines = vec![];
    while let Some((end, _)) = rest.char_indices().nth(fits) {
        let end = rest[..end].rfind(' ').map_or(end, |space| space + 1);
        lines.push(&rest[..end]);
        rest = &rest[end..];
    }
    lines.push(rest);
    lines
}

fn write_line(sheet: &mut RgbImage, left: u32, top: u32, text: &str, weight: FontWeight, color: [u8; 3]) {
    let width = get_raster_width(weight, TEXT_SIZE);
    for (index, character) in text.chars().enumerate() {
        // What the font lacks is shown as a full box.
        let left = left as usize + index * width;
        let raster = get_raster(character, weight, TEXT_SIZE);
        for (x, y) in (0..TEXT_SIZE.val()).flat_map(|y| (0..width).map(move |x| (x, y))) {
            let cover = raster.as_ref().map_or(255, |raster| raster.pixel(x, y).unwrap_or(0));
            blend(sheet, (left + x) as i32, top as i32 + y as i32, color, f32::from(cover) / 255.0);
        }
    }
}

/// A white frame with a black one around it, to be seen on anything.
fn outline(picture: &mut RgbImage, bounds: Bounds) {
    for (distance, color) in [(2, INK), (1, PAPER), (0, PAPER), (-1, INK)] {
        let Bounds { left, top, right, bottom } = bounds;
        let (left, top, right, bottom) =
            (left - distance, top - distance, right - 1 + distance, bottom - 1 + distance);
        for x in left..=right {
            blend(picture, x, top, color, 1.0);
            blend(picture, x, bottom, color, 1.0);
        }
        for y in top..=bottom {
            blend(picture, left, y, color, 1.0);
            blend(picture, right, y, color, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_answers_are_wrapped_between_words_and_lose_nothing() {
        let text = "a red circle, ".repeat(20);
        let lines = wrapped(&text);
        assert!(lines.len() > 2);
        let (last, others) = lines.split_last().unwrap();
        let fits = (WIDTH - TEXT_LEFT) as usize / get_raster_width(FontWeight::Bold, TEXT_SIZE);
        assert!(others.iter().all(|line| line.ends_with(' ') && line.len() <= fits) && last.len() <= fits);
        assert_eq!(lines.concat(), text);
        let endless = "x".repeat(200);
        assert_eq!(wrapped(&endless).concat(), endless);
    }

    #[test]
    fn pictures_boxes_and_words_are_on_the_sheet() {
        let picture = RgbImage::from_pixel(60, 50, Rgb([1, 2, 3]));
        let answer = |bounds| Answered { question: "?".into(), answer: "!".into(), bounds, is_right: true };
        let entry = |bounds| Entry {
            pictures: vec![picture.clone()],
            title: "t".into(),
            answers: vec![answer(bounds)],
        };
        let plain = sheet("title", &[entry(None)]);
        let framed = sheet("title", &[entry(Some(Bounds::square(10, 10, 20)))]);
        let count = |sheet: &RgbImage, color| sheet.pixels().filter(|pixel| pixel.0 == color).count();
        assert_eq!(count(&plain, [1, 2, 3]), 60 * 50);
        assert!(count(&framed, [1, 2, 3]) < 60 * 50);
        assert!(count(&plain, RIGHT) > 0);
    }
}
