//! What the demonstration shows, drawn afresh, and what it asks about it.

use anyhow::Context;
use image::codecs::gif::{GifEncoder, Repeat};
use image::codecs::jpeg::JpegEncoder;
use image::{Delay, DynamicImage, Frame, ImageFormat, RgbImage};
use lockstep_client::{Image, Part, Video};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::draw::Shape;
use super::questions::Question;
use super::scenes::{Background, Direction, Film, Scene};

const CAT: &[u8] = include_bytes!("../../../tests/pictures/cat.jpg");
const ROCKET: &[u8] = include_bytes!("../../../tests/pictures/rocket.jpg");

/// Frames, and frames a second, of each film.
const FILM: (usize, u32) = (12, 2);

/// Something to look at, and questions about it.
pub struct Exhibit {
    /// What it is.
    pub title: String,
    /// Pictures, or a film.
    pub parts: Vec<Part>,
    /// What a person is shown of it.
    pub shown: Vec<RgbImage>,
    /// In the order in which they are asked.
    pub questions: Vec<Question>,
}

/// All exhibits. They have never been seen before, unless `rng` is where it was once.
///
/// # Errors
/// A picture of the binary's own cannot be decoded, or one that was drawn cannot be encoded.
pub fn all(rng: &mut StdRng) -> anyhow::Result<Vec<Exhibit>> {
    let photograph = |file| anyhow::Ok(image::load_from_memory(file)?.into_rgb8());
    let cat = photograph(CAT).context("cat.jpg")?;
    let rocket = photograph(ROCKET).context("rocket.jpg")?;
    let (on_cat, on_rocket) = (Background::Photograph(&cat), Background::Photograph(&rocket));
    Ok(vec![
        picture(rng, "a shape on a colour (PNG)", (224, 168), Background::Plain, 1, png)?,
        picture(rng, "a shape on a photograph of a cat (JPEG)", (280, 168), on_cat, 1, jpeg)?,
        picture(rng, "two shapes in noise (PNG)", (168, 224), Background::Noise, 2, png)?,
        picture(rng, "two shapes on a photograph of a rocket (JPEG)", (336, 224), on_rocket, 2, jpeg)?,
        pair(rng, "two pictures (PNG)", (140, 140))?,
        moving(rng, "a film in which something moves (GIF)", (168, 140), Background::Plain)?,
        appearing(rng, "a film in which something appears (frames)", (140, 112), on_cat)?,
    ])
}

fn picture(
    rng: &mut StdRng,
    title: &str,
    size: (u32, u32),
    background: Background<'_>,
    count: usize,
    file: fn(&RgbImage) -> anyhow::Result<Image>,
) -> anyhow::Result<Exhibit> {
    let (scene, what) = loop {
        let scene = Scene::random(rng, size, background, count);
        if let Some(what) = Question::what(&scene) {
            break (scene, what);
        }
    };
    let mut questions = vec![what, Question::how_many(&scene)];
    questions.extend(scene.shapes.iter().map(Question::whereabouts));
    let title = format!("{title}, {} x {} pixels", size.0, size.1);
    Ok(Exhibit { title, parts: vec![file(&scene.picture)?.into()], shown: vec![scene.picture], questions })
}

fn pair(rng: &mut StdRng, title: &str, size: (u32, u32)) -> anyhow::Result<Exhibit> {
    let [one, other] = [Background::Plain, Background::Noise].map(|back| Scene::random(rng, size, back, 1));
    let asked: &Shape =
        [&one, &other].choose(rng).and_then(|scene| scene.shapes.first()).context("a shape")?;
    let question = Question::which_picture(asked, [&one, &other]);
    Ok(Exhibit {
        title: format!("{title}, {} x {} pixels each", size.0, size.1),
        parts: vec![png(&one.picture)?.into(), png(&other.picture)?.into()],
        shown: vec![one.picture, other.picture],
        questions: vec![question],
    })
}

fn moving(rng: &mut StdRng, title: &str, size: (u32, u32), back: Background<'_>) -> anyhow::Result<Exhibit> {
    let direction = *Direction::ALL.choose(rng).context("a direction")?;
    let film = Film::moving(rng, size, back, direction, FILM);
    let questions = vec![Question::what_film(&film.shape), Question::which_way(&film.shape, direction)];
    let part = gif(&film)?.into();
    exhibit(title, size, film, part, questions)
}

fn appearing(
    rng: &mut StdRng,
    title: &str,
    size: (u32, u32),
    back: Background<'_>,
) -> anyhow::Result<Exhibit> {
    let second = rng.random_range(1..FILM.0 as u32 / FILM.1);
    let film = Film::appearing(rng, size, back, second, FILM);
    let questions = vec![Question::which_second(&film.shape, second)];
    let part = frames(&film)?.into();
    exhibit(title, size, film, part, questions)
}

fn exhibit(
    title: &str,
    size: (u32, u32),
    film: Film,
    part: Part,
    questions: Vec<Question>,
) -> anyhow::Result<Exhibit> {
    let (frames, rate) = (film.frames.len(), film.rate);
    let title = format!("{title}, {} s of {} x {} pixels", frames as u32 / rate, size.0, size.1);
    let shown = [0, frames / 2, frames - 1].map(|frame| film.frames[frame].clone()).into();
    Ok(Exhibit { title, parts: vec![part], shown, questions })
}

/// A picture as it is sent.
///
/// # Errors
/// It cannot be encoded.
pub fn png(picture: &RgbImage) -> anyhow::Result<Image> {
    let mut file = std::io::Cursor::new(vec![]);
    picture.write_to(&mut file, ImageFormat::Png)?;
    Ok(Image::new(file.into_inner()))
}

/// The same with what JPEG does to it.
///
/// # Errors
/// It cannot be encoded.
pub fn jpeg(picture: &RgbImage) -> anyhow::Result<Image> {
    let mut file = vec![];
    JpegEncoder::new_with_quality(&mut file, 92).encode_image(picture)?;
    Ok(Image::new(file))
}

/// A film as it is sent, to be taken as it is: its frames one by one.
///
/// # Errors
/// They cannot be encoded.
pub fn frames(film: &Film) -> anyhow::Result<Video> {
    let files = film.frames.iter().map(|frame| Ok(png(frame)?.data().clone()));
    let files = files.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(as_it_is(Video::frames(files, film.rate.into()), film))
}

/// The same as an animated GIF. Frames of more than 256 colours lose some of them.
///
/// # Errors
/// It cannot be encoded.
pub fn gif(film: &Film) -> anyhow::Result<Video> {
    let mut file = vec![];
    let mut encoder = GifEncoder::new(&mut file);
    encoder.set_repeat(Repeat::Infinite)?;
    for picture in &film.frames {
        let picture = DynamicImage::from(picture.clone()).into_rgba8();
        encoder.encode_frame(Frame::from_parts(
            picture,
            0,
            0,
            Delay::from_numer_denom_ms(1000, film.rate),
        ))?;
    }
    drop(encoder);
    Ok(as_it_is(Video::new(file).fps(film.rate.into()), film))
}

/// Frames of their own size; small ones would be enlarged.
fn as_it_is(video: Video, film: &Film) -> Video {
    let pixels = film.frames.first().map_or(0, |frame| frame.width() * frame.height());
    video.min_pixels(pixels).max_pixels(pixels)
}
