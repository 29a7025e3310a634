//! A look at a JPEG's markers. The decoder fills what a truncated file lacks with gray and says nothing; and the time
//! that it needs grows with the number of scans, which a small file can have many of.

/// The most scans that are decoded. Encoders write about ten.
const MAX_SCANS: usize = 100;

/// What is wrong with a JPEG's markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum JpegFault {
    /// No end-of-image marker.
    #[error("it ends before its end-of-image marker")]
    Truncated,
    /// More scans than any encoder writes.
    #[error("it has more than {MAX_SCANS} scans")]
    TooManyScans,
}

/// Walks the markers of a JPEG up to its end-of-image marker (ITU T.81, annex B).
pub(super) fn check_markers(file: &[u8]) -> Result<(), JpegFault> {
    let mut at = 0;
    let mut scans = 0;
    loop {
        let rest = file.get(at..).ok_or(JpegFault::Truncated)?;
        // Inside a scan this skips its data; between segments there is nothing to skip in a sound file.
        at += rest.iter().position(|byte| *byte == 0xFF).ok_or(JpegFault::Truncated)? + 1;
        match *file.get(at).ok_or(JpegFault::Truncated)? {
            // A padding byte: the marker's code is still to come.
            0xFF => {}
            // An escaped 0xFF in the data of a scan, a restart, the start of the image, or a temporary marker.
            0x00 | 0x01 | 0xD0..=0xD8 => at += 1,
            0xD9 => return Ok(()),
            code => {
                let length = file.get(at + 1..at + 3).ok_or(JpegFault::Truncated)?;
                at += 1 + usize::from(u16::from_be_bytes([length[0], length[1]]));
                scans += usize::from(code == 0xDA);
                if scans > MAX_SCANS {
                    return Err(JpegFault::TooManyScans);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCAN: [u8; 7] = [0xFF, 0xDA, 0, 3, 9, 0xFF, 0];

    #[test]
    fn finds_the_end_and_not_that_of_a_thumbnail() {
        let with_thumbnail = [0xFF, 0xD8, 0xFF, 0xE1, 0, 6, 0xFF, 0xD8, 0xFF, 0xD9];
        assert_eq!(check_markers(&with_thumbnail), Err(JpegFault::Truncated));
        let whole = [&with_thumbnail[..], &SCAN, &[0xFF, 0xD3, 7, 0xFF, 0xFF, 0xD9, 1, 2]].concat();
        assert_eq!(check_markers(&whole), Ok(()));
        for length in 0..whole.len() - 2 {
            assert_eq!(check_markers(&whole[..length]), Err(JpegFault::Truncated), "{length}");
        }
    }

    #[test]
    fn counts_scans() {
        let file = |scans| [&[0xFF, 0xD8][..], &SCAN.repeat(scans), &[0xFF, 0xD9]].concat();
        assert_eq!(check_markers(&file(MAX_SCANS)), Ok(()));
        assert_eq!(check_markers(&file(MAX_SCANS + 1)), Err(JpegFault::TooManyScans));
    }
}
