//! From pixels to patches.

use crate::device::{
    PatchLayout,
    patches::{Levels, check_patches, levels},
};

/// Pixels of one medium, as [`Device::patches`](crate::device::Device::patches) has them.
pub struct Patches<'a> {
    pixels: &'a [u8],
    image: &'a PatchLayout,
    order: &'a [u32],
    levels: Box<Levels>,
}

impl<'a> Patches<'a> {
    /// Checks that the pixels are whole frames, and enough of them.
    pub fn new(pixels: &'a [u8], image: &'a PatchLayout, order: &'a [u32]) -> Result<Self, String> {
        check_patches(pixels, image, order)?;
        Ok(Self { pixels, image, order, levels: levels(image) })
    }

    /// Writes output row `row`.
    pub fn write_row(&self, row: usize, to: &mut [f32]) {
        let [_, h, w] = self.image.grid;
        let size = self.image.patch_size;
        let row_len = w * size * 3;
        let frame_len = h * size * row_len;
        let num_frames = self.pixels.len() / frame_len;
        let patch = self.order[row] as usize;
        let (t, y, x) = (patch / (h * w), patch / w % h, patch % w);
        let mut lines = to.chunks_exact_mut(size);
        for channel in 0..3 {
            let levels = &self.levels[channel];
            for frame in 0..self.image.temporal_patch_size {
                let frame = (t * self.image.temporal_patch_size + frame).min(num_frames - 1);
                for line in 0..size {
                    let start = frame * frame_len + (y * size + line) * row_len + x * size * 3 + channel;
                    let to = lines.next().expect("a patch has lines of its size");
                    for (to, &pixel) in to.iter_mut().zip(self.pixels[start..].iter().step_by(3)) {
                        *to = levels[usize::from(pixel)];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::patches::patch_len;

    fn layout(grid: [usize; 3], patch_size: usize, temporal_patch_size: usize) -> PatchLayout {
        PatchLayout {
            grid,
            patch_size,
            temporal_patch_size,
            mean: [0.48, 0.46, 0.41],
            std: [0.27, 0.26, 0.28],
        }
    }

    #[test]
    fn every_pixel_is_where_it_belongs() {
        for (grid, num_frames) in [([1, 2, 3], 1), ([2, 4, 2], 4), ([2, 2, 2], 3), ([2, 2, 2], 1)] {
            let image = layout(grid, 3, 2);
            let [t, h, w] = grid;
            let (height, width) = (h * 3, w * 3);
            let pixel = |f: usize, y: usize, x: usize, c: usize| (f * 83 + y * 31 + x * 7 + c * 101) as u8;
            let mut pixels = Vec::new();
            for f in 0..num_frames {
                for y in 0..height {
                    for x in 0..width {
                        pixels.extend((0..3).map(|c| pixel(f, y, x, c)));
                    }
                }
            }
            let order: Vec<u32> = (0..(t * h * w) as u32).rev().collect();
            let patches = Patches::new(&pixels, &image, &order).expect("the sizes agree");
            for (row, &patch) in order.iter().enumerate() {
                let mut got = vec![0.0; patch_len(&image)];
                patches.write_row(row, &mut got);
                let patch = patch as usize;
                let (pt, py, px) = (patch / (h * w), patch / w % h, patch % w);
                let mut index = 0;
                for c in 0..3 {
                    for f in 0..2 {
                        for y in 0..3 {
                            for x in 0..3 {
                                let frame = (pt * 2 + f).min(num_frames - 1);
                                let value = f64::from(pixel(frame, py * 3 + y, px * 3 + x, c)) / 255.0;
                                let expected = (value - f64::from(image.mean[c])) / f64::from(image.std[c]);
                                assert!((f64::from(got[index]) - expected).abs() < 1e-6);
                                index += 1;
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pixels_that_do_not_fit_are_refused() {
        let image = layout([1, 2, 2], 2, 2);
        assert!(Patches::new(&[0; 48], &image, &[0, 3]).is_ok());
        assert!(Patches::new(&[0; 47], &image, &[0]).is_err());
        assert!(Patches::new(&[], &image, &[0]).is_err());
        assert!(Patches::new(&[], &image, &[]).is_ok());
        assert!(Patches::new(&[0; 48], &image, &[4]).is_err());
    }
}
