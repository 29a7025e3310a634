//! Coloured shapes, as the demonstration checkpoint was taught them (`tests/shapes/scenes.py` draws the same).

use std::f32::consts::PI;
use std::sync::LazyLock;

use image::{Rgb, RgbImage};

/// Sub-pixels on a side of a pixel.
const SUPERSAMPLING: u32 = 4;

/// What a shape looks like in its box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    Circle,
    Square,
    Triangle,
    Star,
    Cross,
    Ring,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 6] =
        [Kind::Circle, Kind::Square, Kind::Triangle, Kind::Star, Kind::Cross, Kind::Ring];

    /// Its name in questions and answers.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Circle => "circle",
            Kind::Square => "square",
            Kind::Triangle => "triangle",
            Kind::Star => "star",
            Kind::Cross => "cross",
            Kind::Ring => "ring",
        }
    }

    /// Whether a point of the square from -1 to 1 lies inside the shape; `y` grows downwards.
    fn covers(self, x: f32, y: f32) -> bool {
        match self {
            Kind::Circle => x.hypot(y) <= 1.0,
            Kind::Ring => (0.55..=1.0).contains(&x.hypot(y)),
            Kind::Square => true,
            Kind::Cross => x.abs() <= 0.34 || y.abs() <= 0.34,
            Kind::Triangle => x.abs() <= (y + 1.0) / 2.0,
            Kind::Star => is_inside(x, y, &*STAR),
        }
    }
}

static STAR: LazyLock<[(f32, f32); 10]> = LazyLock::new(star);

/// The corners of a star with five points that fills the square from -1 to 1.
fn star() -> [(f32, f32); 10] {
    let corner = |index: usize| {
        let (angle, radius) =
            (index as f32 * PI / 5.0 - PI / 2.0, if index.is_multiple_of(2) { 1.0 } else { 0.42 });
        (angle.cos() * radius, angle.sin() * radius)
    };
    let corners: [(f32, f32); 10] = std::array::from_fn(corner);
    let (left, right) = ends(corners.map(|corner| corner.0));
    let (top, bottom) = ends(corners.map(|corner| corner.1));
    let filling = |value: f32, low: f32, high: f32| (value - low) / (high - low) * 2.0 - 1.0;
    corners.map(|(x, y)| (filling(x, left, right), filling(y, top, bottom)))
}

fn ends(values: [f32; 10]) -> (f32, f32) {
    values.iter().fold((f32::MAX, f32::MIN), |(low, high), value| (low.min(*value), high.max(*value)))
}

/// Whether a point lies inside a polygon: an odd number of edges is to its right.
fn is_inside(x: f32, y: f32, corners: &[(f32, f32)]) -> bool {
    let edges = corners.iter().zip(corners.iter().cycle().skip(1));
    let crossed = edges
        .filter(|((x1, y1), (x2, y2))| (*y1 > y) != (*y2 > y) && x < (x2 - x1) * (y - y1) / (y2 - y1) + x1);
    !crossed.count().is_multiple_of(2)
}

/// A colour that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Color {
    Red,
    Orange,
    Yellow,
    Green,
    Blue,
    Purple,
    White,
    Black,
}

impl Color {
    /// All colours.
    pub const ALL: [Color; 8] = [
        Color::Red,
        Color::Orange,
        Color::Yellow,
        Color::Green,
        Color::Blue,
        Color::Purple,
        Color::White,
        Color::Black,
    ];

    /// Its name in questions and answers.
    pub fn name(self) -> &'static str {
        match self {
            Color::Red => "red",
            Color::Orange => "orange",
            Color::Yellow => "yellow",
            Color::Green => "green",
            Color::Blue => "blue",
            Color::Purple => "purple",
            Color::White => "white",
            Color::Black => "black",
        }
    }

    /// Red, green and blue.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Color::Red => [216, 38, 38],
            Color::Orange => [250, 140, 20],
            Color::Yellow => [245, 222, 50],
            Color::Green => [40, 160, 60],
            Color::Blue => [38, 84, 205],
            Color::Purple => [132, 50, 172],
            Color::White => [245, 245, 245],
            Color::Black => [18, 18, 18],
        }
    }
}

/// Where something is, in pixels; right and bottom are exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Bounds {
    pub left: i32,
    pub top: i32,
    pub right: i32,
    pub bottom: i32,
}

impl Bounds {
    /// A square.
    pub fn square(left: i32, top: i32, side: i32) -> Self {
        Bounds { left, top, right: left + side, bottom: top + side }
    }

    /// The same somewhere else.
    pub fn moved(self, right: i32, down: i32) -> Self {
        Bounds {
            left: self.left + right,
            top: self.top + down,
            right: self.right + right,
            bottom: self.bottom + down,
        }
    }

    /// Twice its centre, so that it is a whole number.
    pub fn doubled_centre(self) -> (i32, i32) {
        (self.left + self.right, self.top + self.bottom)
    }

    /// Whether at least `gap` pixels lie between the two, to the side or above.
    pub fn is_apart(self, other: Self, gap: i32) -> bool {
        self.right + gap <= other.left
            || other.right + gap <= self.left
            || self.bottom + gap <= other.top
            || other.bottom + gap <= self.top
    }

    /// What the two share of what they cover together, 0 to 1.
    pub fn overlap(self, other: Self) -> f64 {
        let area = |bounds: Bounds| {
            f64::from((bounds.right - bounds.left).max(0)) * f64::from((bounds.bottom - bounds.top).max(0))
        };
        let shared = area(Bounds {
            left: self.left.max(other.left),
            top: self.top.max(other.top),
            right: self.right.min(other.right),
            bottom: self.bottom.min(other.bottom),
        });
        if shared == 0.0 { 0.0 } else { shared / (area(self) + area(other) - shared) }
    }
}

/// One coloured shape; it fills its bounds, which are a square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Shape {
    pub kind: Kind,
    pub color: Color,
    pub bounds: Bounds,
}

impl Shape {
    /// Such as "red circle".
    pub fn name(&self) -> String {
        format!("{} {}", self.color.name(), self.kind.name())
    }

    /// Such as "an orange star".
    pub fn name_with_article(&self) -> String {
        let article = if self.color == Color::Orange { "an" } else { "a" };
        format!("{article} {}", self.name())
    }

    /// Draws it. What is outside of the picture is cut off.
    pub fn paint(&self, picture: &mut RgbImage) {
        let side = self.bounds.right - self.bounds.left;
        let steps = (side as u32 * SUPERSAMPLING) as f32;
        let at =
            |pixel: i32, step: u32| ((pixel as u32 * SUPERSAMPLING + step) as f32 + 0.5) / steps * 2.0 - 1.0;
        for (x, y) in (0..side).flat_map(|y| (0..side).map(move |x| (x, y))) {
            let inside = (0..SUPERSAMPLING * SUPERSAMPLING)
                .filter(|step| self.kind.covers(at(x, step % SUPERSAMPLING), at(y, step / SUPERSAMPLING)));
            let cover = inside.count() as f32 / (SUPERSAMPLING * SUPERSAMPLING) as f32;
            blend(picture, self.bounds.left + x, self.bounds.top + y, self.color.rgb(), cover);
        }
    }
}

/// Lays a colour on a pixel that it covers in part, if there is such a pixel.
pub fn blend(picture: &mut RgbImage, x: i32, y: i32, color: [u8; 3], cover: f32) {
    let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
    let Some(Rgb(pixel)) = picture.get_pixel_mut_checked(x, y) else { return };
    for (old, new) in pixel.iter_mut().zip(color) {
        *old = (f32::from(*old) + (f32::from(new) - f32::from(*old)) * cover + 0.5) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn painted(kind: Kind) -> RgbImage {
        let mut picture = RgbImage::from_pixel(48, 40, Rgb([255, 255, 255]));
        Shape { kind, color: Color::Black, bounds: Bounds::square(5, 3, 32) }.paint(&mut picture);
        picture
    }

    #[test]
    fn a_shape_fills_its_bounds_and_nothing_else() {
        for kind in Kind::ALL {
            let picture = painted(kind);
            let inked: Vec<_> =
                picture.enumerate_pixels().filter(|(_, _, pixel)| pixel.0 != [255; 3]).collect();
            let (left, right) = (inked.iter().map(|p| p.0).min(), inked.iter().map(|p| p.0).max());
            let (top, bottom) = (inked.iter().map(|p| p.1).min(), inked.iter().map(|p| p.1).max());
            assert_eq!((left, right, top, bottom), (Some(5), Some(36), Some(3), Some(34)), "{kind:?}");
        }
    }

    #[test]
    fn kinds_cover_as_much_as_their_geometry_says() {
        let ink = |kind| {
            let pixels: f64 = painted(kind).pixels().map(|pixel| 255.0 - f64::from(pixel.0[0])).sum();
            pixels / f64::from(255 - 18) / (32.0 * 32.0)
        };
        let quarter = std::f64::consts::FRAC_PI_4;
        for (kind, share) in [
            (Kind::Square, 1.0),
            (Kind::Circle, quarter),
            (Kind::Ring, quarter * (1.0 - 0.55 * 0.55)),
            (Kind::Triangle, 0.5),
            (Kind::Cross, 0.34 + 0.34 - 0.34 * 0.34),
            // Ten triangles with sides 1 and 0.42 and 36 degrees between them, of a box 1.902 wide and 1.809 high.
            (Kind::Star, 10.0 * 0.5 * 0.42 * 36.0_f64.to_radians().sin() / (1.9021 * 1.8090)),
        ] {
            assert!((ink(kind) - share).abs() < 0.02, "{kind:?} covers {}, not {share}", ink(kind));
        }
    }

    #[test]
    fn kinds_look_as_they_were_taught() {
        let taught =
            image::load_from_memory(include_bytes!("../../../tests/shapes/kinds.png")).unwrap().into_luma8();
        let mut picture = RgbImage::from_pixel(taught.width(), taught.height(), Rgb([255, 255, 255]));
        for (place, kind) in Kind::ALL.into_iter().enumerate() {
            let bounds = Bounds::square(4 + 48 * place as i32, 4, 40);
            Shape { kind, color: Color::Black, bounds }.paint(&mut picture);
        }
        let differences =
            picture.pixels().zip(taught.pixels()).map(|(drawn, taught)| drawn.0[0].abs_diff(taught.0[0]));
        // An edge that goes through the middle of a sub-pixel may fall to either side: of 16, two at most.
        assert!(differences.clone().all(|difference| difference <= 31));
        assert!(differences.filter(|difference| *difference > 1).count() < 20);
    }

    #[test]
    fn what_lies_outside_of_the_picture_is_cut_off() {
        let mut picture = RgbImage::from_pixel(20, 20, Rgb([255, 255, 255]));
        Shape { kind: Kind::Square, color: Color::Red, bounds: Bounds::square(-10, 12, 30) }
            .paint(&mut picture);
        assert_eq!(picture.get_pixel(0, 19).0, Color::Red.rgb());
        assert_eq!(picture.get_pixel(0, 11).0, [255; 3]);
    }

    #[test]
    fn overlap_is_what_is_shared_of_what_is_covered() {
        let one = Bounds::square(0, 0, 10);
        assert_eq!(one.overlap(one), 1.0);
        assert_eq!(one.overlap(one.moved(10, 0)), 0.0);
        assert_eq!(one.overlap(one.moved(5, 0)), 50.0 / 150.0);
    }
}
