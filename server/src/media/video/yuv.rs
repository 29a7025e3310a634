//! Frames of luma and subsampled colour to RGB.

use super::error::VideoError;

/// Bits after the point of the numbers that are computed with.
const FRACTION_BITS: u32 = 16;

/// A decoded frame of 4:2:0: planes of luma and of two colour differences, which have half its width and height.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes<'a> {
    /// In pixels, both even.
    pub(super) size: (usize, usize),
    /// Rows of luma.
    pub(super) y: &'a [u8],
    /// Rows of blue less luma.
    pub(super) u: &'a [u8],
    /// Rows of red less luma.
    pub(super) v: &'a [u8],
    /// Bytes from one row of luma to the next, and of either colour difference.
    pub(super) strides: (usize, usize),
}

/// What samples mean, as numbers with [`FRACTION_BITS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Colours {
    black: i32,
    luma: i32,
    red_of_v: i32,
    green_of_u: i32,
    green_of_v: i32,
    blue_of_u: i32,
}

impl Colours {
    /// For `matrix_coefficients` and range as H.264 has them (table E-5; equations E-19 and following). Without a word
    /// about it the matrix is that of BT.601, as in ffmpeg, which the reference's decoders are made of.
    ///
    /// # Errors
    /// A matrix that is not one over luma and two colour differences.
    pub(super) fn new(matrix: u8, full_range: bool) -> Result<Self, VideoError> {
        let (red, blue) = match matrix {
            1 => (0.2126, 0.0722),
            2 | 5 | 6 => (0.299, 0.114),
            4 => (0.30, 0.11),
            7 => (0.212, 0.087),
            9 => (0.2627, 0.0593),
            _ => return Err(VideoError::Unsupported("of colours without a plain matrix")),
        };
        let green = 1.0 - red - blue;
        let (black, luma_range, colour_range) =
            if full_range { (0, 255.0, 255.0) } else { (16, 219.0, 224.0) };
        let fixed = |value: f64| (value * f64::from(1 << FRACTION_BITS)).round() as i32;
        let colour = 255.0 / colour_range;
        Ok(Self {
            black,
            luma: fixed(255.0 / luma_range),
            red_of_v: fixed(2.0 * (1.0 - red) * colour),
            green_of_u: fixed(-2.0 * blue * (1.0 - blue) / green * colour),
            green_of_v: fixed(-2.0 * red * (1.0 - red) / green * colour),
            blue_of_u: fixed(2.0 * (1.0 - blue) * colour),
        })
    }

    fn rgb(&self, y: u8, u: u8, v: u8) -> [u8; 3] {
        let half = 1 << (FRACTION_BITS - 1);
        let luma = (i32::from(y) - self.black) * self.luma + half;
        let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
        let byte = |value: i32| (value >> FRACTION_BITS).clamp(0, 255) as u8;
        [
            byte(luma + v * self.red_of_v),
            byte(luma + u * self.green_of_u + v * self.green_of_v),
            byte(luma + u * self.blue_of_u),
        ]
    }
}

impl Planes<'_> {
    /// Rows top to bottom, three bytes (red, green, blue) a pixel. Each four pixels share one colour, as in ffmpeg's plain
    /// conversion. `None` if the planes are smaller than they should be.
    pub(super) fn to_rgb(self, colours: &Colours) -> Option<Vec<u8>> {
        let (width, height) = self.size;
        let mut pixels = Vec::with_capacity(width.checked_mul(height)?.checked_mul(3)?);
        for row in 0..height {
            let y = row_of(self.y, row, self.strides.0, width)?;
            let u = row_of(self.u, row / 2, self.strides.1, width.div_ceil(2))?;
            let v = row_of(self.v, row / 2, self.strides.1, width.div_ceil(2))?;
            for (x, y) in y.iter().enumerate() {
                pixels.extend(colours.rgb(*y, u[x / 2], v[x / 2]));
            }
        }
        Some(pixels)
    }
}

fn row_of(plane: &[u8], row: usize, stride: usize, length: usize) -> Option<&[u8]> {
    let start = row.checked_mul(stride)?;
    plane.get(start..start.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn colours(matrix: u8, full_range: bool) -> Colours {
        Colours::new(matrix, full_range).unwrap()
    }

    /// Black, white and the primary colours, as BT.601 and BT.709 write them.
    #[test]
    fn known_colours() {
        let bt601 = colours(6, false);
        for (yuv, rgb) in [
            ([16, 128, 128], [0, 0, 0]),
            ([235, 128, 128], [255, 255, 255]),
            ([81, 90, 240], [254, 0, 0]),
            ([145, 54, 34], [0, 255, 1]),
            ([41, 240, 110], [0, 0, 255]),
        ] {
            let near = bt601.rgb(yuv[0], yuv[1], yuv[2]);
            assert!(near.iter().zip(rgb).all(|(a, b)| a.abs_diff(b) <= 1), "{yuv:?}: {near:?}, not {rgb:?}");
        }
        let bt709 = colours(1, false);
        for (yuv, rgb) in
            [([63, 102, 240], [255, 0, 0]), ([173, 42, 26], [0, 255, 0]), ([32, 240, 118], [0, 0, 255])]
        {
            let near = bt709.rgb(yuv[0], yuv[1], yuv[2]);
            assert!(near.iter().zip(rgb).all(|(a, b)| a.abs_diff(b) <= 2), "{yuv:?}: {near:?}, not {rgb:?}");
        }
    }

    #[test]
    fn full_range_keeps_grays() {
        for gray in 0..=255 {
            assert_eq!(colours(1, true).rgb(gray, 128, 128), [gray; 3]);
            assert_eq!(colours(6, true).rgb(gray, 128, 128), [gray; 3]);
        }
        assert_eq!(colours(6, false).rgb(0, 128, 128), [0; 3]);
        assert_eq!(colours(6, false).rgb(255, 128, 128), [255; 3]);
    }

    #[test]
    fn nothing_said_is_bt601() {
        assert_eq!(colours(2, false), colours(5, false));
        assert_ne!(colours(2, false), colours(1, false));
        for matrix in [0, 3, 8, 10, 11, 255] {
            assert!(matches!(Colours::new(matrix, false), Err(VideoError::Unsupported(_))));
        }
    }

    #[test]
    fn agrees_with_floating_point() {
        let colours = colours(1, false);
        for y in (0..=255).step_by(5) {
            for u in (0..=255).step_by(5) {
                for v in (0..=255).step_by(5) {
                    let luma = (f64::from(y) - 16.0) * 255.0 / 219.0;
                    let (blue, red) = (f64::from(u) - 128.0, f64::from(v) - 128.0);
                    let scale = 255.0 / 224.0;
                    let exact = [
                        luma + 1.5748 * scale * red,
                        luma - 0.187_324 * scale * blue - 0.468_124 * scale * red,
                        luma + 1.8556 * scale * blue,
                    ];
                    for (ours, exact) in colours.rgb(y, u, v).into_iter().zip(exact) {
                        assert!((f64::from(ours) - exact.clamp(0.0, 255.0)).abs() < 0.51, "{y} {u} {v}");
                    }
                }
            }
        }
    }

    #[test]
    fn four_pixels_share_a_colour_and_strides_are_skipped() {
        let (y, u, v) = ([10, 20, 99, 30, 40, 99], [128, 77], [128, 77]);
        let planes = Planes { size: (2, 2), y: &y, u: &u, v: &v, strides: (3, 2) };
        let pixels = planes.to_rgb(&colours(6, true)).unwrap();
        assert_eq!(pixels, [10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 40, 40]);
    }

    #[test]
    fn planes_that_are_too_small_are_refused() {
        let plane = [0; 16];
        let planes = |size, strides| Planes { size, y: &plane, u: &plane[..4], v: &plane[..4], strides };
        assert!(planes((4, 4), (4, 2)).to_rgb(&colours(6, true)).is_some());
        assert!(planes((4, 4), (5, 2)).to_rgb(&colours(6, true)).is_none());
        assert!(planes((4, 4), (4, 3)).to_rgb(&colours(6, true)).is_none());
        assert!(planes((4, 6), (4, 2)).to_rgb(&colours(6, true)).is_none());
        assert!(planes((usize::MAX, 2), (4, 2)).to_rgb(&colours(6, true)).is_none());
    }
}
