//! Resizing as the reference does it: torchvision's bicubic filter with antialiasing on 8-bit samples.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

/// Pixels on a side of the squares that are transposed at a time, so that both sides stay in the cache.
const TILE: usize = 32;

/// Resizes RGB pixels (rows top to bottom, three bytes each) from one size, (width, height), to another.
///
/// The library convolves columns before rows, torchvision rows before columns, and each rounds between the two; so the
/// library is given the transposed picture, which makes the two the same bits.
pub(super) fn resize(pixels: Vec<u8>, from: (u32, u32), to: (u32, u32)) -> Result<Vec<u8>, String> {
    if from == to {
        return Ok(pixels);
    }
    let transposed = transpose(&pixels, from);
    drop(pixels);
    let source = ImageRef::new(from.1, from.0, &transposed, PixelType::U8x3).map_err(|e| e.to_string())?;
    let mut target = Image::new(to.1, to.0, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    // Typed views, so that the library is compiled for this kind of pixel only: all of them were half of this crate's code.
    let views = source.typed_image::<U8x3>().zip(target.typed_image_mut());
    let (source, mut view) = views.expect("both are of this kind");
    Resizer::new().resize_typed(&source, &mut view, &options).map_err(|e| e.to_string())?;
    Ok(transpose(target.buffer(), (to.1, to.0)))
}

/// Turns rows into columns. `pixels` is a picture of (width, height).
fn transpose(pixels: &[u8], (width, height): (u32, u32)) -> Vec<u8> {
    let (width, height) = (width as usize, height as usize);
    let mut transposed = vec![0; pixels.len()];
    for top in (0..height).step_by(TILE) {
        for left in (0..width).step_by(TILE) {
            for y in top..height.min(top + TILE) {
                for x in left..width.min(left + TILE) {
                    let (from, to) = ((y * width + x) * 3, (x * height + y) * 3);
                    transposed[to..to + 3].copy_from_slice(&pixels[from..from + 3]);
                }
            }
        }
    }
    transposed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes() {
        let (width, height) = (70, 45);
        let pixels: Vec<u8> = (0..width * height * 3).map(|i| (i * 31 % 251) as u8).collect();
        let transposed = transpose(&pixels, (width, height));
        assert_eq!(transposed[3..6], pixels[width as usize * 3..][..3]);
        assert_eq!(transpose(&transposed, (height, width)), pixels);
    }

    #[test]
    fn the_same_size_is_left_alone() {
        let pixels: Vec<u8> = (0..27).collect();
        assert_eq!(resize(pixels.clone(), (3, 3), (3, 3)).unwrap(), pixels);
    }
}
