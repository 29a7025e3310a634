//! What every device has to know to make patches of pixels.

use super::PatchLayout;

/// Values of each channel for each level of a pixel.
pub type Levels = [[f32; 256]; 3];

/// Normalized values of all levels: `(level / 255 - mean) / std`.
pub fn levels(image: &PatchLayout) -> Box<Levels> {
    let mut levels = Box::new([[0.0; 256]; 3]);
    for (channel, values) in levels.iter_mut().enumerate() {
        let (mean, std) = (f64::from(image.mean[channel]), f64::from(image.std[channel]));
        for (level, value) in values.iter_mut().enumerate() {
            *value = ((level as f64 / 255.0 - mean) / std) as f32;
        }
    }
    levels
}

/// Elements of a patch.
pub fn patch_len(image: &PatchLayout) -> usize {
    3 * image.temporal_patch_size * image.patch_size * image.patch_size
}

/// Checks that the pixels are whole frames, enough of them, and that all patches of `order` are in the grid. Returns the number of
/// frames.
///
/// # Errors
/// What is wrong, in words.
pub fn check_patches(pixels: &[u8], image: &PatchLayout, order: &[u32]) -> Result<usize, String> {
    let [t, h, w] = image.grid;
    let frame_len = h * w * image.patch_size * image.patch_size * 3;
    let num_patches = t * h * w;
    if let Some(patch) = order.iter().find(|&&patch| patch as usize >= num_patches) {
        return Err(format!("patch {patch} is not in a grid of {t} x {h} x {w} patches"));
    }
    if frame_len == 0 {
        return Ok(0);
    }
    if !pixels.len().is_multiple_of(frame_len) || (pixels.is_empty() && !order.is_empty()) {
        return Err(format!("{} bytes of pixels are not whole frames of {frame_len} bytes", pixels.len()));
    }
    Ok(pixels.len() / frame_len)
}
