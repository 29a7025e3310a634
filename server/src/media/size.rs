//! The size at which the model sees a picture, and what that costs.

use crate::limits::MAX_ASPECT_RATIO;

/// How a checkpoint's pictures are sized and normalized: its picture processor.
#[derive(Debug, Clone, PartialEq)]
pub struct PictureProcessor {
    /// Pictures are enlarged to at least this many pixels.
    pub min_pixels: u64,
    /// Pictures are reduced to at most this many pixels.
    pub max_pixels: u64,
    /// Pixels on a side of a patch.
    pub patch_size: u32,
    /// Frames in a patch.
    pub temporal_patch_size: u32,
    /// Patches on a side of a token.
    pub merge_size: u32,
    /// Mean of red, green and blue, of values in 0..1.
    pub image_mean: [f32; 3],
    /// Their standard deviation.
    pub image_std: [f32; 3],
}

impl Default for PictureProcessor {
    /// The defaults of transformers' `Qwen2VLImageProcessor`.
    fn default() -> Self {
        Self {
            min_pixels: 56 * 56,
            max_pixels: 28 * 28 * 1280,
            patch_size: 14,
            temporal_patch_size: 2,
            merge_size: 2,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl PictureProcessor {
    /// Pixels on a side of a token.
    pub fn factor(&self) -> u32 {
        self.patch_size * self.merge_size
    }

    /// The size at which the model sees a picture of `width` x `height` pixels, neither of them 0.
    pub fn size(&self, width: u32, height: u32, options: &PictureOptions) -> Result<PictureSize, SizeError> {
        let faults = options.faults(self);
        if !faults.is_empty() {
            return Err(SizeError::Options(faults));
        }
        let (width, height) = match (options.resized_width, options.resized_height) {
            (Some(width), Some(height)) => (u64::from(width), u64::from(height)),
            _ => {
                let (min_pixels, max_pixels) = options.pixel_bounds(self);
                let factor = self.factor();
                let (height, width) = smart_resize(height, width, factor, min_pixels, max_pixels)
                    .ok_or(SizeError::AspectRatio { width, height })?;
                (width, height)
            }
        };
        let num_tokens = (width / u64::from(self.factor())) * (height / u64::from(self.factor()));
        match (u32::try_from(width), u32::try_from(height)) {
            (Ok(width), Ok(height)) => Ok(PictureSize {
                width,
                height,
                grid: [1, height / self.patch_size, width / self.patch_size],
                num_tokens,
            }),
            _ => Err(SizeError::Enormous { width, height }),
        }
    }
}

/// The size at which the model sees a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureSize {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Patches in time, height and width.
    pub grid: [u32; 3],
    /// Tokens in the prompt.
    pub num_tokens: u64,
}

impl PictureSize {
    /// Bytes of its pixels: red, green and blue.
    pub fn pixel_bytes(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height) * 3
    }
}

/// What a request says about the size of one picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PictureOptions {
    /// In place of the processor's.
    pub min_pixels: Option<u32>,
    /// In place of the processor's.
    pub max_pixels: Option<u32>,
    /// Exact width in pixels; together with the height.
    pub resized_width: Option<u32>,
    /// Exact height in pixels; together with the width.
    pub resized_height: Option<u32>,
}

/// What is wrong with one option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionFault {
    /// The field of [`PictureOptions`], which is also that of the public API.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl PictureOptions {
    /// Everything that is wrong with the options, whatever the picture is.
    pub fn faults(&self, processor: &PictureProcessor) -> Vec<OptionFault> {
        let mut faults = Vec::new();
        let mut fault = |field, problem: String| faults.push(OptionFault { field, problem });
        for (field, value) in [("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)] {
            if value == Some(0) {
                fault(field, "is 0; at least 1".into());
            }
        }
        let (min_pixels, max_pixels) = self.pixel_bounds(processor);
        if min_pixels > max_pixels {
            fault("min_pixels", format!("is {min_pixels}, above max_pixels, which is {max_pixels}"));
        }
        let factor = processor.factor();
        let sides = [("resized_width", self.resized_width), ("resized_height", self.resized_height)];
        for ((field, value), (other, other_value)) in [(sides[0], sides[1]), (sides[1], sides[0])] {
            match value {
                Some(value) if value == 0 || value % factor != 0 => {
                    fault(field, format!("is {value}, not a positive multiple of {factor}"));
                }
                None if other_value.is_some() => fault(field, format!("is missing, but {other} is set")),
                _ => {}
            }
        }
        faults
    }

    /// The bounds in force. One that is asked for moves the processor's own other bound out of its way.
    fn pixel_bounds(&self, processor: &PictureProcessor) -> (u64, u64) {
        let asked = (self.min_pixels.map(u64::from), self.max_pixels.map(u64::from));
        match asked {
            (None, None) => (processor.min_pixels, processor.max_pixels),
            (Some(min), None) => (min, processor.max_pixels.max(min)),
            (None, Some(max)) => (processor.min_pixels.min(max), max),
            (Some(min), Some(max)) => (min, max),
        }
    }
}

/// Why a picture has no size for the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// The options are wrong.
    #[error("{}", .0.iter().map(|fault| format!("{} {}", fault.field, fault.problem)).collect::<Vec<_>>().join("; "))]
    Options(Vec<OptionFault>),
    /// One side is too much longer than the other.
    #[error("of {width} x {height} pixels one side is more than {MAX_ASPECT_RATIO} times the other")]
    AspectRatio {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
    /// A side that does not even fit a number.
    #[error("it would be enlarged to {width} x {height} pixels")]
    Enormous {
        /// In pixels.
        width: u64,
        /// In pixels.
        height: u64,
    },
}

/// The height and width, multiples of `factor`, at which the model sees a picture, or `None` if one side is more than
/// 200 times the other: `smart_resize` of transformers 5.23, `models/qwen2_vl`.
///
/// Halves round to even, as in Python: 70 pixels become 56, not 84. The sides and `min_pixels` are not 0.
pub fn smart_resize(
    height: u32,
    width: u32,
    factor: u32,
    min_pixels: u64,
    max_pixels: u64,
) -> Option<(u64, u64)> {
    let longer = u64::from(height.max(width));
    if longer > MAX_ASPECT_RATIO * u64::from(height.min(width)) {
        return None;
    }
    let (h, w, f) = (f64::from(height), f64::from(width), f64::from(factor));
    let multiple = |multiples: f64| multiples as u64 * u64::from(factor);
    let rounded = |side: f64| multiple((side / f).round_ties_even());
    let (rounded_h, rounded_w) = (rounded(h), rounded(w));
    if rounded_h * rounded_w > max_pixels {
        Some(largest_within(height, width, factor, max_pixels))
    } else if rounded_h * rounded_w < min_pixels {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let enlarged = |side: f64| multiple((side * beta / f).ceil());
        Some((enlarged(h), enlarged(w)))
    } else {
        Some((rounded_h, rounded_w))
    }
}

/// The height and width, multiples of `factor`, at which a picture has at most `max_pixels`, but for sides of one `factor`:
/// what [`smart_resize`] reduces to.
pub fn largest_within(height: u32, width: u32, factor: u32, max_pixels: u64) -> (u64, u64) {
    let (h, w, f) = (f64::from(height), f64::from(width), f64::from(factor));
    let beta = ((h * w) / max_pixels as f64).sqrt();
    let reduced = |side: f64| (side / beta / f).floor().max(1.0) as u64 * u64::from(factor);
    (reduced(h), reduced(w))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(width: u32, height: u32, options: PictureOptions) -> Result<PictureSize, SizeError> {
        PictureProcessor::default().size(width, height, &options)
    }

    #[test]
    fn rounds_half_to_even() {
        assert_eq!(smart_resize(70, 98, 28, 1, 1 << 30), Some((56, 112)));
        assert_eq!(smart_resize(42, 126, 28, 1, 1 << 30), Some((56, 112)));
    }

    #[test]
    fn refuses_only_above_the_aspect_ratio() {
        assert!(smart_resize(1, 200, 28, 1, 1 << 30).is_some());
        assert!(smart_resize(1, 201, 28, 1, 1 << 30).is_none());
        let error = sized(1, 4_000_000_000, PictureOptions::default()).unwrap_err();
        assert_eq!(error, SizeError::AspectRatio { width: 1, height: 4_000_000_000 });
    }

    #[test]
    fn exact_sizes_override_the_bounds() {
        let options =
            PictureOptions { resized_width: Some(56), resized_height: Some(2800), ..Default::default() };
        let size = sized(5, 5, options).unwrap();
        assert_eq!(size, PictureSize { width: 56, height: 2800, grid: [1, 200, 4], num_tokens: 200 });
    }

    #[test]
    fn reports_all_option_faults_at_once() {
        let options = PictureOptions {
            min_pixels: Some(100),
            max_pixels: Some(0),
            resized_width: Some(57),
            resized_height: None,
        };
        let fields: Vec<_> =
            options.faults(&PictureProcessor::default()).iter().map(|fault| fault.field).collect();
        assert_eq!(fields, ["max_pixels", "min_pixels", "resized_width", "resized_height"]);
    }

    #[test]
    fn one_bound_moves_the_default_of_the_other() {
        let small =
            sized(1000, 1000, PictureOptions { max_pixels: Some(784), ..Default::default() }).unwrap();
        assert_eq!(small.num_tokens, 1);
        let large =
            sized(10, 10, PictureOptions { min_pixels: Some(2_000_000), ..Default::default() }).unwrap();
        assert!(u64::from(large.width) * u64::from(large.height) >= 2_000_000);
    }

    #[test]
    fn never_overflows() {
        for (width, height) in [(1, 1), (u32::MAX, u32::MAX), (u32::MAX, u32::MAX / 200 + 1), (1, 200)] {
            for pixels in [1, u32::MAX] {
                let options = PictureOptions {
                    min_pixels: Some(pixels),
                    max_pixels: Some(pixels),
                    ..Default::default()
                };
                let size = sized(width, height, options).unwrap();
                assert!(size.num_tokens > 0, "{width} x {height} at {pixels}: {size:?}");
            }
        }
    }
}
