//! M-RoPE positions: where each token stands in time, height and width.
//!
//! Text advances all three axes together. A token of a medium stands at its own place of the medium's merged grid, and
//! text after a medium continues at the largest position used so far plus one, over all three axes (Qwen2-VL paper,
//! section 2.1). Of a video, the temporal index is scaled to `tokens_per_second` and cut to an integer.

use thiserror::Error;

/// What of the model decides positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PositionGeometry {
    /// Patches on a side of a token.
    pub merge_size: u32,
    /// Temporal positions per second of a video.
    pub tokens_per_second: f32,
}

/// A medium in a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MediumRun {
    /// Index of its first token.
    pub first_token: usize,
    /// Patches in time, height and width.
    pub grid: [u32; 3],
    /// Seconds between temporal patches of a video; `None` for a picture, whose temporal patches are one apart.
    pub seconds_per_grid_t: Option<f64>,
}

impl MediumRun {
    /// Tokens of the medium, where `merge_size` divides its height and width.
    pub fn num_tokens(&self, merge_size: u32) -> usize {
        let [t, h, w] = self.grid.map(|n| n as usize);
        let merge = merge_size as usize;
        t * (h / merge) * (w / merge)
    }
}

/// Media that do not fit a sequence. `index` counts its media.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum PositionError {
    /// A medium without tokens, or cut through a token.
    #[error("media[{index}].grid: {grid:?} is empty or no multiple of the merge size {merge_size}")]
    Grid {
        /// Which medium.
        index: usize,
        /// Its grid.
        grid: [u32; 3],
        /// Patches on a side of a token.
        merge_size: u32,
    },
    /// A medium that begins before the one ahead of it ends.
    #[error(
        "media[{index}].first_token: {first_token} is before token {previous_end}, where the medium ahead ends"
    )]
    Overlap {
        /// Which medium.
        index: usize,
        /// Where it begins.
        first_token: usize,
        /// Where the medium ahead of it ends.
        previous_end: usize,
    },
    /// A medium that ends after the sequence.
    #[error("media[{index}]: ends at token {end} of {num_tokens}")]
    PastEnd {
        /// Which medium.
        index: usize,
        /// Where it ends.
        end: usize,
        /// Tokens that may hold media.
        num_tokens: usize,
    },
    /// Positions that no sequence reaches.
    #[error("media[{index}].seconds_per_grid_t: {seconds} gives positions out of range")]
    Seconds {
        /// Which medium.
        index: usize,
        /// Seconds between its temporal patches.
        seconds: f64,
    },
}

/// No position is larger: beyond it, neighbouring angles are the same number in single precision.
const MAX_POSITION: f32 = (1 << 24) as f32;

/// The positions of a sequence: of its prompt, and of every token that follows, however many come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Positions {
    runs: Vec<Run>,
}

/// A placed medium.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    first_token: usize,
    /// One past its last token.
    end: usize,
    /// Position that its three axes start from.
    origin: u32,
    /// Position of the token after it.
    next: u32,
    /// Tokens down and across.
    height: u32,
    width: u32,
    /// Temporal positions between temporal patches.
    interval: f32,
}

impl Run {
    fn position(&self, token: usize) -> [u32; 3] {
        let offset = (token - self.first_token) as u32;
        let frame = self.height * self.width;
        let (t, in_frame) = (offset / frame, offset % frame);
        [
            self.origin + temporal_index(t, self.interval),
            self.origin + in_frame / self.width,
            self.origin + in_frame % self.width,
        ]
    }
}

/// The reference multiplies in single precision and drops the fraction.
fn temporal_index(t: u32, interval: f32) -> u32 {
    (t as f32 * interval) as u32
}

impl Positions {
    /// Places `media`, which are in order and within the first `num_tokens` tokens.
    ///
    /// # Errors
    /// The first medium that does not fit.
    pub fn new(
        num_tokens: usize,
        media: &[MediumRun],
        geometry: PositionGeometry,
    ) -> Result<Self, PositionError> {
        let mut placed = Self::default();
        for (index, medium) in media.iter().enumerate() {
            let run = placed.place(index, medium, geometry)?;
            if run.end > num_tokens {
                return Err(PositionError::PastEnd { index, end: run.end, num_tokens });
            }
            placed.runs.push(run);
        }
        Ok(placed)
    }

    /// Time, height and width of token `index`.
    pub fn of(&self, index: usize) -> [u32; 3] {
        let before = self.runs.partition_point(|run| run.end <= index);
        match self.runs.get(before) {
            Some(run) if run.first_token <= index => run.position(index),
            _ => [self.text_position(before, index); 3],
        }
    }

    /// Position of text token `index`, which has `before` media ahead of it.
    fn text_position(&self, before: usize, index: usize) -> u32 {
        let (end, next) =
            before.checked_sub(1).map_or((0, 0), |last| (self.runs[last].end, self.runs[last].next));
        next + (index - end) as u32
    }

    fn place(
        &self,
        index: usize,
        medium: &MediumRun,
        geometry: PositionGeometry,
    ) -> Result<Run, PositionError> {
        let MediumRun { first_token, grid, .. } = *medium;
        let [t, h, w] = grid;
        let merge_size = geometry.merge_size;
        if t == 0 || h == 0 || w == 0 || !h.is_multiple_of(merge_size) || !w.is_multiple_of(merge_size) {
            return Err(PositionError::Grid { index, grid, merge_size });
        }
        let previous_end = self.runs.last().map_or(0, |run| run.end);
        if first_token < previous_end {
            return Err(PositionError::Overlap { index, first_token, previous_end });
        }
        let interval = match medium.seconds_per_grid_t {
            None => 1.0,
            Some(seconds) => geometry.tokens_per_second * seconds as f32,
        };
        let last_t = (t - 1) as f32 * interval;
        if !(0.0..=MAX_POSITION).contains(&last_t) {
            let seconds = medium.seconds_per_grid_t.unwrap_or(0.0);
            return Err(PositionError::Seconds { index, seconds });
        }
        let (height, width) = (h / merge_size, w / merge_size);
        let origin = self.text_position(self.runs.len(), first_token);
        let largest = temporal_index(t - 1, interval).max(height - 1).max(width - 1);
        let tokens = u64::from(t) * u64::from(height) * u64::from(width);
        // A grid of more tokens than any sequence ends past every sequence, whatever the size of `usize`.
        let end = first_token.saturating_add(usize::try_from(tokens).unwrap_or(usize::MAX));
        Ok(Run {
            first_token,
            end,
            origin,
            next: origin.saturating_add(largest).saturating_add(1),
            height,
            width,
            interval,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: PositionGeometry = PositionGeometry { merge_size: 2, tokens_per_second: 2.0 };

    fn picture(first_token: usize, grid: [u32; 3]) -> MediumRun {
        MediumRun { first_token, grid, seconds_per_grid_t: None }
    }

    #[test]
    fn text_advances_all_axes() {
        let positions = Positions::new(4, &[], GEOMETRY).unwrap();
        assert_eq!([0, 3, 900].map(|i| positions.of(i)), [[0; 3], [3; 3], [900; 3]]);
    }

    #[test]
    fn text_after_a_picture_continues_after_its_longer_side() {
        // Two text tokens, a picture of 2 x 3 tokens, text.
        let positions = Positions::new(9, &[picture(2, [1, 4, 6])], GEOMETRY).unwrap();
        let all: Vec<_> = (0..10).map(|i| positions.of(i)).collect();
        assert_eq!(all[2..8], [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]);
        assert_eq!(all[8..], [[5; 3], [6; 3]]);
    }

    #[test]
    fn text_after_a_long_video_continues_after_its_last_moment() {
        let video = MediumRun { first_token: 1, grid: [5, 2, 4], seconds_per_grid_t: Some(1.7) };
        let positions = Positions::new(12, &[video], GEOMETRY).unwrap();
        let times: Vec<_> = (0..5).map(|t| positions.of(1 + 2 * t)[0] - 1).collect();
        assert_eq!(times, [0, 3, 6, 10, 13]);
        assert_eq!(positions.of(11), [15; 3]);
    }

    #[test]
    fn neighbouring_media_need_no_text_between() {
        let media = [picture(0, [1, 2, 4]), picture(2, [1, 4, 2])];
        let positions = Positions::new(4, &media, GEOMETRY).unwrap();
        assert_eq!(positions.of(2), [2, 2, 2]);
        assert_eq!(positions.of(3), [2, 3, 2]);
        assert_eq!(positions.of(4), [4; 3]);
    }

    #[test]
    fn media_that_do_not_fit_are_refused_by_name() {
        let refused = |num_tokens, media: &[MediumRun]| {
            Positions::new(num_tokens, media, GEOMETRY).unwrap_err().to_string()
        };
        assert!(refused(9, &[picture(0, [1, 3, 4])]).contains("media[0].grid"));
        assert!(refused(9, &[picture(0, [0, 2, 4])]).contains("media[0].grid"));
        assert!(refused(9, &[picture(0, [1, 2, 4]), picture(1, [1, 2, 2])]).contains("media[1].first_token"));
        assert!(refused(3, &[picture(2, [1, 2, 4])]).contains("ends at token 4 of 3"));
        for seconds in [f64::NAN, -1.0, f64::INFINITY, 1e30] {
            let video = MediumRun { first_token: 0, grid: [2, 2, 2], seconds_per_grid_t: Some(seconds) };
            assert!(refused(9, &[video]).contains("seconds_per_grid_t"), "{seconds}");
        }
        let huge = picture(0, [u32::MAX, u32::MAX - 1, u32::MAX - 1]);
        assert!(Positions::new(9, &[huge], GEOMETRY).is_err());
    }
}
