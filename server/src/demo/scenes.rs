//! Pictures and films of shapes that nobody has seen before, with what is true of them.

use image::imageops::{FilterType, crop_imm, resize};
use image::{Rgb, RgbImage};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::draw::{Bounds, Color, Kind, Shape};

/// How far what is behind a shape is from its colour: a distance in red, green and blue.
const CONTRAST: f64 = 90.0;
/// Pixels on a side of a shape.
const MIN_SIDE: i32 = 34;
const MAX_SIDE: i32 = 90;
/// Pixels between two shapes.
const GAP: i32 = 8;
/// How often places are tried on one background, and how many backgrounds.
const TRIES: usize = 60;
const BACKGROUNDS: usize = 1_000;
/// The noise of a pixel is the sum of so many random numbers from -100 to 100, in hundredths of the deviation.
const NOISE_TERMS: i32 = 3;

/// What a picture's shapes lie on.
#[derive(Debug, Clone, Copy)]
pub enum Background<'a> {
    /// One colour.
    Plain,
    /// One colour and noise.
    Noise,
    /// A piece of a photograph.
    Photograph(&'a RgbImage),
}

impl Background<'_> {
    /// One of `size`, which a photograph is enlarged to if it is smaller.
    fn draw(self, rng: &mut StdRng, (width, height): (u32, u32)) -> RgbImage {
        match self {
            Background::Plain | Background::Noise => {
                let color: [u8; 3] = rng.random();
                let deviation = if matches!(self, Background::Noise) { rng.random_range(5..30) } else { 0 };
                RgbImage::from_fn(width, height, |_, _| {
                    let noise = (0..NOISE_TERMS).map(|_| rng.random_range(-100..=100)).sum::<i32>();
                    Rgb(color.map(|level| (i32::from(level) + noise * deviation / 100).clamp(0, 255) as u8))
                })
            }
            Background::Photograph(photograph) => {
                let most = (photograph.width() as f32 / width as f32)
                    .min(photograph.height() as f32 / height as f32);
                let scale = if most > 1.0 { rng.random_range(1.0..most) } else { most };
                let piece = |side: u32| (side as f32 * scale) as u32;
                let (across, down) = (piece(width), piece(height));
                let left = rng.random_range(0..=photograph.width() - across);
                let top = rng.random_range(0..=photograph.height() - down);
                let piece = crop_imm(photograph, left, top, across, down).to_image();
                resize(&piece, width, height, FilterType::CatmullRom)
            }
        }
    }
}

/// Whether something of the colour can be told from what is behind it, on the whole.
fn stands_out(picture: &RgbImage, bounds: Bounds, color: Color) -> bool {
    let (mut sum, mut near, mut count) = (0.0, 0, 0);
    for (x, y) in (bounds.top..bounds.bottom).flat_map(|y| (bounds.left..bounds.right).map(move |x| (x, y))) {
        let behind = picture.get_pixel(x as u32, y as u32).0;
        let squares = behind.iter().zip(color.rgb()).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2));
        let distance = squares.sum::<f64>().sqrt();
        sum += distance;
        near += i32::from(distance < CONTRAST / 2.0);
        count += 1;
    }
    sum / f64::from(count) >= CONTRAST && f64::from(near) < 0.2 * f64::from(count)
}

/// A picture, and the shapes in it.
#[derive(Debug, Clone)]
pub struct Scene {
    /// What is seen.
    pub picture: RgbImage,
    /// No two of them alike.
    pub shapes: Vec<Shape>,
}

impl Scene {
    /// A picture of `size` pixels with `count` shapes that lie apart, no two of which have the same name.
    ///
    /// # Panics
    /// So many shapes do not fit.
    pub fn random(rng: &mut StdRng, size: (u32, u32), background: Background<'_>, count: usize) -> Self {
        for _ in 0..BACKGROUNDS {
            let mut picture = background.draw(rng, size);
            let mut shapes: Vec<Shape> = vec![];
            for _ in 0..TRIES {
                if shapes.len() == count {
                    break;
                }
                let shape = random_shape(rng, size, count);
                let is_free = shapes
                    .iter()
                    .all(|other| other.name() != shape.name() && shape.bounds.is_apart(other.bounds, GAP));
                if is_free && stands_out(&picture, shape.bounds, shape.color) {
                    shapes.push(shape);
                }
            }
            if shapes.len() == count {
                shapes.iter().for_each(|shape| shape.paint(&mut picture));
                return Scene { picture, shapes };
            }
        }
        panic!("{count} shapes do not fit on {} x {} pixels of {background:?}", size.0, size.1);
    }

    /// What is there, in the words that the checkpoint has learnt; nothing where the order of shapes is not clear.
    pub fn description(&self) -> Option<String> {
        match &self.shapes[..] {
            [] => Some("nothing".to_owned()),
            [shape] => Some(shape.name_with_article()),
            [one, other] => describe_two(one, other),
            more => describe_more(more),
        }
    }
}

fn random_shape(rng: &mut StdRng, (width, height): (u32, u32), count: usize) -> Shape {
    let (width, height) = (width as i32, height as i32);
    let largest = if count < 2 { 0.75 } else { 0.5 };
    let largest = MAX_SIDE.min((f64::from(width.min(height)) * largest) as i32).max(MIN_SIDE);
    let side = rng.random_range(MIN_SIDE..=largest);
    let (left, top) = (rng.random_range(0..=width - side), rng.random_range(0..=height - side));
    let kind = *Kind::ALL.choose(rng).expect("there are kinds");
    let color = *Color::ALL.choose(rng).expect("there are colours");
    Shape { kind, color, bounds: Bounds::square(left, top, side) }
}

/// Two shapes whose centres are nearer to one another than these pixels are not told apart by an axis; half of that tells more apart.
const CLEARLY_APART: i32 = 20;

fn describe_two(one: &Shape, other: &Shape) -> Option<String> {
    let ((x1, y1), (x2, y2)) = (one.bounds.doubled_centre(), other.bounds.doubled_centre());
    let (across, down) = ((x1 - x2).abs(), (y1 - y2).abs());
    let (long, short) = (across.max(down), across.min(down));
    if long < 2 * CLEARLY_APART || 10 * long < 14 * short {
        return None;
    }
    let (word, is_first) = if across > down { ("left of", x1 < x2) } else { ("above", y1 < y2) };
    let (first, second) = if is_first { (one, other) } else { (other, one) };
    Some(format!("{} {word} {}", first.name_with_article(), second.name_with_article()))
}

fn describe_more(shapes: &[Shape]) -> Option<String> {
    let mut ordered: Vec<_> = shapes.iter().collect();
    ordered.sort_by_key(|shape| shape.bounds.doubled_centre().0);
    // Of doubled centres, this is half of it.
    let middles = ordered.iter().map(|shape| shape.bounds.doubled_centre().0);
    if middles.clone().zip(middles.skip(1)).any(|(a, b)| b - a < CLEARLY_APART) {
        return None;
    }
    let names: Vec<_> = ordered.iter().map(|shape| shape.name_with_article()).collect();
    let (last, others) = names.split_last().expect("more than two");
    Some(format!("{} and {last}", others.join(", ")))
}

/// Where something moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Direction {
    Left,
    Right,
    Up,
    Down,
}

impl Direction {
    /// All directions.
    pub const ALL: [Direction; 4] = [Direction::Left, Direction::Right, Direction::Up, Direction::Down];

    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Left => "left",
            Direction::Right => "right",
            Direction::Up => "up",
            Direction::Down => "down",
        }
    }

    fn step(self) -> (i32, i32) {
        match self {
            Direction::Left => (-1, 0),
            Direction::Right => (1, 0),
            Direction::Up => (0, -1),
            Direction::Down => (0, 1),
        }
    }
}

/// Frames at a rate, and the one shape in them.
#[derive(Debug, Clone)]
pub struct Film {
    /// All of one size.
    pub frames: Vec<RgbImage>,
    /// Frames a second.
    pub rate: u32,
    /// As it is in the first frame in which it is seen.
    pub shape: Shape,
}

impl Film {
    /// A film of two frames or more, in which a shape moves, evenly, by at least a quarter of the way that there is.
    ///
    /// # Panics
    /// No shape can be seen on such a background, or there is no way to go.
    pub fn moving(
        rng: &mut StdRng,
        size: (u32, u32),
        background: Background<'_>,
        direction: Direction,
        (num_frames, rate): (usize, u32),
    ) -> Self {
        let (right, down) = direction.step();
        for _ in 0..BACKGROUNDS {
            let empty = background.draw(rng, size);
            let shape = random_shape(rng, size, 1);
            let side = shape.bounds.right - shape.bounds.left;
            let room = if right == 0 { size.1 as i32 } else { size.0 as i32 } - side;
            let way = rng.random_range(room / 4..=room);
            let start = rng.random_range(0..=room - way) + if right + down < 0 { way } else { 0 };
            let bounds = if right == 0 {
                Bounds::square(shape.bounds.left, start, side)
            } else {
                Bounds::square(start, shape.bounds.top, side)
            };
            let at = |frame: usize| {
                let gone = (way as f32 * frame as f32 / (num_frames - 1) as f32).round() as i32;
                bounds.moved(right * gone, down * gone)
            };
            if way < 24
                || ![0, num_frames / 2, num_frames - 1]
                    .iter()
                    .all(|i| stands_out(&empty, at(*i), shape.color))
            {
                continue;
            }
            let frames = (0..num_frames).map(|frame| {
                let mut picture = empty.clone();
                Shape { bounds: at(frame), ..shape }.paint(&mut picture);
                picture
            });
            return Film { frames: frames.collect(), rate, shape: Shape { bounds, ..shape } };
        }
        panic!("nothing moves on {} x {} pixels of {background:?}", size.0, size.1);
    }

    /// A film in which a shape appears at a second, before the last frame, and stays.
    ///
    /// # Panics
    /// No shape can be seen on such a background.
    pub fn appearing(
        rng: &mut StdRng,
        size: (u32, u32),
        background: Background<'_>,
        second: u32,
        (num_frames, rate): (usize, u32),
    ) -> Self {
        for _ in 0..BACKGROUNDS {
            let empty = background.draw(rng, size);
            let shape = random_shape(rng, size, 1);
            if !stands_out(&empty, shape.bounds, shape.color) {
                continue;
            }
            let mut full = empty.clone();
            shape.paint(&mut full);
            let first = (second * rate) as usize;
            let frames =
                (0..num_frames).map(|frame| if frame < first { empty.clone() } else { full.clone() });
            return Film { frames: frames.collect(), rate, shape };
        }
        panic!("nothing is seen on {} x {} pixels of {background:?}", size.0, size.1);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn shape(kind: Kind, color: Color, left: i32, top: i32) -> Shape {
        Shape { kind, color, bounds: Bounds::square(left, top, 40) }
    }

    fn described(shapes: Vec<Shape>) -> Option<String> {
        Scene { picture: RgbImage::new(1, 1), shapes }.description()
    }

    #[test]
    fn descriptions_say_what_is_where() {
        let red = shape(Kind::Circle, Color::Red, 100, 10);
        let blue = shape(Kind::Square, Color::Blue, 10, 20);
        let orange = shape(Kind::Star, Color::Orange, 50, 120);
        assert_eq!(described(vec![]).as_deref(), Some("nothing"));
        assert_eq!(described(vec![orange]).as_deref(), Some("an orange star"));
        assert_eq!(described(vec![red, blue]).as_deref(), Some("a blue square left of a red circle"));
        assert_eq!(described(vec![orange, blue]).as_deref(), Some("a blue square above an orange star"));
        let three = described(vec![red, blue, orange]);
        assert_eq!(three.as_deref(), Some("a blue square, an orange star and a red circle"));
        let diagonal = shape(Kind::Square, Color::Blue, 20, 90);
        assert_eq!(described(vec![red, diagonal]), None);
    }

    #[test]
    fn scenes_have_what_was_asked_for() {
        let mut rng = StdRng::seed_from_u64(1);
        for count in 0..4 {
            let scene = Scene::random(&mut rng, (224, 168), Background::Noise, count);
            assert_eq!((scene.shapes.len(), scene.picture.dimensions()), (count, (224, 168)));
            for (index, one) in scene.shapes.iter().enumerate() {
                assert!(one.bounds.left >= 0 && one.bounds.right <= 224);
                assert!(one.bounds.top >= 0 && one.bounds.bottom <= 168);
                let mut before = scene.shapes[..index].iter();
                assert!(
                    before.all(|other| one.bounds.is_apart(other.bounds, GAP) && one.name() != other.name())
                );
            }
        }
    }

    #[test]
    fn films_do_what_was_asked_for() {
        let mut rng = StdRng::seed_from_u64(2);
        let film = Film::appearing(&mut rng, (112, 112), Background::Plain, 2, (8, 2));
        assert_eq!(film.frames[0], film.frames[3]);
        assert_ne!(film.frames[3], film.frames[4]);
        assert_eq!(film.frames[4], film.frames[7]);
        for direction in Direction::ALL {
            let film = Film::moving(&mut rng, (140, 112), Background::Plain, direction, (6, 2));
            assert_eq!(film.frames.len(), 6);
            assert!(film.frames.windows(2).all(|pair| pair[0] != pair[1]), "{direction:?}");
        }
    }
}
