//! From pixels to patches.
#![allow(unsafe_code)]

use half::bf16;

use super::arena::Tensor;
use super::device::{CudaDevice, THREADS};
use super::driver::{Address, DeviceBuffer};
use super::kernels::{Argument, count, launch};
use crate::device::patches::{check_patches, levels, patch_len};
use crate::device::{DeviceError, PatchLayout, Result};

/// Bytes of the GPU of what the levels of pixels become, of three colours.
pub const LEVELS_BYTES: usize = 3 * 256 * size_of::<bf16>();

/// What the levels of pixels become.
pub struct Levels {
    mean: [f32; 3],
    std: [f32; 3],
    values: DeviceBuffer,
}

impl CudaDevice {
    /// See [`Device::patches`](crate::device::Device::patches).
    ///
    /// The pixels of the rows of patches that `order` is in go to the GPU: of a large picture, which is worked on in bands,
    /// each band once.
    pub(super) fn to_patches(&self, pixels: &[u8], image: &PatchLayout, order: &[u32]) -> Result<Tensor> {
        let num_frames = check_patches(pixels, image, order).map_err(DeviceError::Failed)?;
        let cols = patch_len(image);
        let out = self.tensor(order.len(), cols)?;
        if out.bytes() == 0 {
            return Ok(out);
        }
        let [_, h, w] = image.grid;
        // Rows of patches, counted over all temporal patches: a band makes sense within one.
        let patch_rows = order.iter().map(|patch| *patch as usize / w);
        let band = match (patch_rows.clone().min(), patch_rows.max()) {
            (Some(first), Some(last)) if image.grid[0] == 1 => first..last + 1,
            _ => 0..h,
        };
        let row_bytes = w * image.patch_size * image.patch_size * 3;
        let (frame_bytes, band_bytes) = (h * row_bytes, band.len() * row_bytes);
        if num_frames * band_bytes > self.pixels.bytes() {
            return Err(DeviceError::Failed(format!(
                "{} bytes of pixels; there is room for {}",
                num_frames * band_bytes,
                self.pixels.bytes()
            )));
        }
        for frame in 0..num_frames {
            let first = frame * frame_bytes + band.start * row_bytes;
            let to = self.pixels.address() + (frame * band_bytes) as Address;
            self.staging.send(&pixels[first..first + band_bytes], to)?;
        }
        let shift = if image.grid[0] == 1 { (band.start * w) as u32 } else { 0 };
        let order: Vec<u32> = order.iter().map(|patch| patch - shift).collect();
        launch!(
            self,
            &self.kernels.patches,
            [order.len(), 1, 1],
            THREADS,
            self.pixels.address(),
            count(num_frames),
            count(band.len()),
            count(w),
            count(image.patch_size),
            count(image.temporal_patch_size),
            self.levels(image)?,
            self.staging.put(&order)?,
            out.address(),
        )?;
        Ok(out)
    }

    /// The table of what pixels become, for the normalization of `image`.
    fn levels(&self, image: &PatchLayout) -> Result<Address> {
        let mut kept = self.levels.borrow_mut();
        if let Some(levels) = &*kept
            && levels.mean == image.mean
            && levels.std == image.std
        {
            return Ok(levels.values.address());
        }
        let values: Vec<bf16> = levels(image).iter().flatten().map(|value| bf16::from_f32(*value)).collect();
        let values = self.filled(&values, "levels of pixels")?;
        let address = values.address();
        *kept = Some(Levels { mean: image.mean, std: image.std, values });
        Ok(address)
    }
}
