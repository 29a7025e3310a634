//! Edit lists of MP4 (ISO/IEC 14496-12, 8.6.6): which part of a track is shown, and when.
//!
//! Encoders write one edit that skips the delay of reordered frames; phones and editors trim with them. Edits that show
//! parts of a track in another order, or twice, are not followed.

use super::error::{VideoError, malformed};

/// A part of a track that is shown, in ticks of the media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edit {
    /// The time of the media that it begins with.
    from: i64,
    /// The time of the media that it ends before.
    to: i64,
    /// When it is shown.
    shown_at: i64,
}

/// The parts of a track that are shown, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Edits(Vec<Edit>);

impl Edits {
    /// Reads a track's edit list; one that shows nothing counts as none. An entry has a duration, in ticks of the movie,
    /// and the time of the media that it begins with, if it shows any. `timescales` are the ticks per second of the media
    /// and of the movie.
    ///
    /// # Errors
    /// Edits out of order, or times that are none.
    pub(super) fn new(entries: &[(u64, Option<u64>)], timescales: (u64, u64)) -> Result<Self, VideoError> {
        let mut edits = Vec::new();
        let mut shown_at = 0_i64;
        for (duration, media_time) in entries {
            let duration = rescaled(*duration, timescales)?;
            if let Some(media_time) = media_time {
                let from = i64::try_from(*media_time).map_err(|_| out_of_range())?;
                // An edit of no duration, in a file of fragments, goes on to the end.
                let to = if duration == 0 {
                    i64::MAX
                } else {
                    from.checked_add(duration).ok_or_else(out_of_range)?
                };
                edits.push(Edit { from, to, shown_at });
            }
            shown_at = shown_at.checked_add(duration).ok_or_else(out_of_range)?;
        }
        if edits.windows(2).any(|pair| pair[0].to > pair[1].from) {
            return Err(VideoError::Unsupported("edited so that parts are shown in another order or twice"));
        }
        if edits.is_empty() {
            edits.push(Edit { from: i64::MIN, to: i64::MAX, shown_at: 0 });
        }
        Ok(Self(edits))
    }

    /// When a frame is shown, in ticks of the media from any beginning, if it is.
    pub(super) fn shown_at(&self, media_time: i64) -> Option<i64> {
        // Edits are in order and apart.
        let edit = self.0.get(self.0.partition_point(|edit| edit.to <= media_time))?;
        if media_time < edit.from {
            return None;
        }
        if edit.from == i64::MIN {
            return Some(media_time);
        }
        media_time.checked_sub(edit.from)?.checked_add(edit.shown_at)
    }
}

/// A duration of the movie in ticks of the media. Rounded up: a frame that begins in a part cut to the movie's coarser
/// ticks is shown.
fn rescaled(duration: u64, (media, movie): (u64, u64)) -> Result<i64, VideoError> {
    let ticks = (u128::from(duration) * u128::from(media)).div_ceil(u128::from(movie.max(1)));
    i64::try_from(ticks).map_err(|_| out_of_range())
}

fn out_of_range() -> VideoError {
    malformed("the times of its edit list are out of range")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMESCALES: (u64, u64) = (12_800, 1000);

    fn edits(entries: &[(u64, Option<u64>)]) -> Result<Edits, VideoError> {
        Edits::new(entries, TIMESCALES)
    }

    #[test]
    fn without_a_list_all_is_shown() {
        let all = edits(&[]).unwrap();
        for time in [-5, 0, 7, i64::MAX - 1] {
            assert_eq!(all.shown_at(time), Some(time));
        }
        assert_eq!(edits(&[(1000, None)]).unwrap(), all);
    }

    #[test]
    fn the_delay_of_reordered_frames_is_skipped() {
        let edits = edits(&[(10_000, Some(1024))]).unwrap();
        assert_eq!(edits.shown_at(1023), None);
        assert_eq!(edits.shown_at(1024), Some(0));
        assert_eq!(edits.shown_at(1024 + 127_999), Some(127_999));
        assert_eq!(edits.shown_at(1024 + 128_000), None);
    }

    #[test]
    fn parts_follow_each_other() {
        let edits = edits(&[(500, None), (1000, Some(0)), (100, None), (1000, Some(25_600))]).unwrap();
        assert_eq!(edits.shown_at(0), Some(6400));
        assert_eq!(edits.shown_at(12_800), None);
        assert_eq!(edits.shown_at(25_600), Some(6400 + 12_800 + 1280));
    }

    #[test]
    fn coarse_ticks_cut_no_frame() {
        // Frames of 1001 / 30000 s; the second begins after 33.4.
        let edits = Edits::new(&[(33, Some(0))], (30_000, 1000)).unwrap();
        assert_eq!((edits.shown_at(0), edits.shown_at(1001)), (Some(0), None));
    }

    #[test]
    fn other_orders_and_impossible_times_are_refused() {
        assert!(matches!(edits(&[(1000, Some(12_800)), (1000, Some(0))]), Err(VideoError::Unsupported(_))));
        assert!(matches!(edits(&[(1000, Some(0)), (1000, Some(0))]), Err(VideoError::Unsupported(_))));
        assert!(matches!(edits(&[(u64::MAX, Some(0))]), Err(VideoError::Malformed(_))));
        assert!(matches!(edits(&[(1 << 59, Some(1 << 62))]), Err(VideoError::Malformed(_))));
        assert!(matches!(edits(&[(0, Some(u64::MAX))]), Err(VideoError::Malformed(_))));
        assert!(Edits::new(&[], (0, 0)).is_ok());
    }
}
