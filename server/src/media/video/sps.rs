//! What a sequence parameter set of H.264 says (ITU-T H.264, 7.3.2.1.1 and annex E), read before anything is decoded.

use super::error::{VideoError, malformed};

/// The kind of network abstraction layer unit that a sequence parameter set is.
pub(super) const NAL_SPS: u8 = 7;
/// Reference frames to count their order by; more are not allowed.
const MAX_ORDER_FRAMES: u32 = 255;

/// A sequence parameter set: how large frames are and what their samples mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sps {
    /// Width in pixels of what is decoded, a multiple of 16.
    pub(super) coded_width: u32,
    /// Height in pixels of what is decoded, a multiple of 16.
    pub(super) coded_height: u32,
    /// Width in pixels of what is shown.
    pub(super) width: u32,
    /// Height in pixels of what is shown.
    pub(super) height: u32,
    /// Whether samples use all 256 values, not 16 to 235.
    pub(super) full_range: bool,
    /// `matrix_coefficients`; 2, unspecified, where nothing is said.
    pub(super) matrix: u8,
}

impl Sps {
    /// Reads a sequence parameter set, its header byte included. The shape of pixels (`sample_aspect_ratio`) is ignored, as
    /// the reference's decoders do.
    ///
    /// # Errors
    /// A broken set, or a kind of H.264 that is not decoded.
    pub(super) fn read(nal: &[u8]) -> Result<Self, VideoError> {
        match nal.split_first() {
            Some((header, rest)) if header & 0x1F == NAL_SPS => {
                parse(&mut Bits { bytes: &unescaped(rest), at: 0 })
            }
            _ => Err(broken()),
        }
    }
}

fn broken() -> VideoError {
    malformed("its sequence parameter set is broken")
}

/// Takes out the bytes that keep start codes from appearing (7.4.1).
fn unescaped(nal: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(nal.len());
    let mut zeros = 0;
    for byte in nal {
        if zeros >= 2 && *byte == 3 {
            zeros = 0;
            continue;
        }
        zeros = if *byte == 0 { zeros + 1 } else { 0 };
        bytes.push(*byte);
    }
    bytes
}

fn parse(bits: &mut Bits<'_>) -> Result<Sps, VideoError> {
    let profile = bits.read(8)?;
    // Constraint flags and level.
    bits.read(16)?;
    bits.exp_golomb()?;
    match profile {
        66 | 77 => {}
        100 => parse_high(bits)?,
        88 => return Err(VideoError::Unsupported("H.264 of the extended profile")),
        110 | 122 | 244 => {
            return Err(VideoError::Unsupported("H.264 of more than 8 bits or of full colour"));
        }
        _ => return Err(VideoError::Unsupported("H.264 of a rare profile")),
    }
    // log2_max_frame_num_minus4
    bits.exp_golomb()?;
    parse_picture_order(bits)?;
    // max_num_ref_frames, gaps_in_frame_num_value_allowed_flag
    bits.exp_golomb()?;
    bits.read(1)?;
    let coded_width = macroblocks(bits)?;
    let coded_height = macroblocks(bits)?;
    if bits.read(1)? == 0 {
        return Err(VideoError::Unsupported("interlaced"));
    }
    // direct_8x8_inference_flag
    bits.read(1)?;
    let mut crop = [0_u32; 4];
    if bits.read(1)? == 1 {
        for side in &mut crop {
            // Of samples of 4:2:0, two at a time are cropped.
            *side = bits.exp_golomb()?.checked_mul(2).ok_or_else(broken)?;
        }
    }
    let shown = |coded: u32, crop: [u32; 2]| {
        let left = crop[0].checked_add(crop[1]).and_then(|crop| coded.checked_sub(crop));
        left.filter(|left| *left > 0).ok_or_else(broken)
    };
    let width = shown(coded_width, [crop[0], crop[1]])?;
    let height = shown(coded_height, [crop[2], crop[3]])?;
    let (full_range, matrix) = if bits.read(1)? == 1 { parse_colour(bits)? } else { (false, 2) };
    Ok(Sps { coded_width, coded_height, width, height, full_range, matrix })
}

/// A side in macroblocks, less one, as pixels.
fn macroblocks(bits: &mut Bits<'_>) -> Result<u32, VideoError> {
    let side = bits.exp_golomb()?.checked_add(1).and_then(|side| side.checked_mul(16));
    // No level has a side of more than 16,384 pixels.
    side.filter(|side| *side <= 16_384).ok_or_else(|| malformed("its frames are larger than H.264 allows"))
}

/// What the high profile adds: samples of 8 bits of 4:2:0 are taken.
fn parse_high(bits: &mut Bits<'_>) -> Result<(), VideoError> {
    if bits.exp_golomb()? != 1 {
        return Err(VideoError::Unsupported("H.264 without colour or of full colour"));
    }
    if bits.exp_golomb()? != 0 || bits.exp_golomb()? != 0 {
        return Err(VideoError::Unsupported("H.264 of more than 8 bits or of full colour"));
    }
    // qpprime_y_zero_transform_bypass_flag
    bits.read(1)?;
    if bits.read(1)? == 1 {
        for list in 0..8 {
            if bits.read(1)? == 1 {
                skip_scaling_list(bits, if list < 6 { 16 } else { 64 })?;
            }
        }
    }
    Ok(())
}

/// 7.3.2.1.1.1
fn skip_scaling_list(bits: &mut Bits<'_>, size: usize) -> Result<(), VideoError> {
    let (mut last, mut next) = (8_i64, 8_i64);
    for _ in 0..size {
        if next != 0 {
            next = (last + bits.signed()?).rem_euclid(256);
        }
        if next != 0 {
            last = next;
        }
    }
    Ok(())
}

fn parse_picture_order(bits: &mut Bits<'_>) -> Result<(), VideoError> {
    match bits.exp_golomb()? {
        0 => {
            bits.exp_golomb()?;
        }
        1 => {
            bits.read(1)?;
            bits.signed()?;
            bits.signed()?;
            let frames = bits.exp_golomb()?;
            if frames > MAX_ORDER_FRAMES {
                return Err(broken());
            }
            for _ in 0..frames {
                bits.signed()?;
            }
        }
        2 => {}
        _ => return Err(broken()),
    }
    Ok(())
}

/// Range and matrix of the video usability information (E.1.1), of which nothing further is read.
fn parse_colour(bits: &mut Bits<'_>) -> Result<(bool, u8), VideoError> {
    // The shape of pixels; 255 stands for one that is spelled out.
    if bits.read(1)? == 1 && bits.read(8)? == 255 {
        bits.read(32)?;
    }
    // Overscan.
    if bits.read(1)? == 1 {
        bits.read(1)?;
    }
    if bits.read(1)? == 0 {
        return Ok((false, 2));
    }
    bits.read(3)?;
    let full_range = bits.read(1)? == 1;
    if bits.read(1)? == 0 {
        return Ok((full_range, 2));
    }
    // Primaries and transfer characteristics.
    bits.read(16)?;
    Ok((full_range, bits.read(8)? as u8))
}

/// Bits, most significant first.
struct Bits<'a> {
    bytes: &'a [u8],
    /// In bits.
    at: usize,
}

impl Bits<'_> {
    /// The next `count` bits, at most 32.
    fn read(&mut self, count: usize) -> Result<u32, VideoError> {
        let mut value = 0;
        for _ in 0..count {
            let byte = self.bytes.get(self.at / 8).ok_or_else(broken)?;
            value = (value << 1) | u32::from((byte >> (7 - self.at % 8)) & 1);
            self.at += 1;
        }
        Ok(value)
    }

    /// ue(v), 9.1.
    fn exp_golomb(&mut self) -> Result<u32, VideoError> {
        let mut zeros = 0;
        while self.read(1)? == 0 {
            zeros += 1;
            if zeros > 31 {
                return Err(broken());
            }
        }
        Ok((1_u32 << zeros) - 1 + self.read(zeros)?)
    }

    /// se(v), 9.1.1.
    fn signed(&mut self) -> Result<i64, VideoError> {
        let code = i64::from(self.exp_golomb()?);
        Ok(if code % 2 == 1 { (code + 1) / 2 } else { -code / 2 })
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Bits as text, spaces ignored, filled up with zeros.
    fn sps(bits: &str) -> Vec<u8> {
        let bits: Vec<u8> = bits.bytes().filter(|c| *c != b' ').map(|c| c - b'0').collect();
        let bytes = bits.chunks(8).map(|chunk| {
            let byte = chunk.iter().fold(0, |byte, bit| (byte << 1) | bit);
            byte << (8 - chunk.len())
        });
        [0x67].into_iter().chain(bytes).collect()
    }

    const BASELINE: &str = "01000010 00000000 00001010";
    /// Id 0, frame numbers of 4 bits, order of kind 2, one reference frame, no gaps.
    const PLAIN: &str = "1 1 011 010 0";

    #[test]
    fn reads_the_size() {
        // 4 x 3 macroblocks, progressive, two rows cropped below, no more.
        let nal = sps(&format!("{BASELINE} {PLAIN} 00100 011 1 1 1 1 1 1 010 0 1"));
        let expected =
            Sps { coded_width: 64, coded_height: 48, width: 64, height: 46, full_range: false, matrix: 2 };
        assert_eq!(Sps::read(&nal).unwrap(), expected);
    }

    #[test]
    fn reads_range_and_matrix() {
        let colour = "1 0 0 1 101 1 1 00000001 00000001 00000001";
        let nal = sps(&format!("{BASELINE} {PLAIN} 00100 011 1 1 0 {colour} 1"));
        let read = Sps::read(&nal).unwrap();
        assert_eq!((read.full_range, read.matrix), (true, 1));
        // A spelled-out shape of pixels, and overscan.
        let colour =
            "1 1 11111111 0000000000000001 0000000000000010 1 0 1 101 0 1 00000110 00000110 00000110";
        let nal = sps(&format!("{BASELINE} {PLAIN} 00100 011 1 1 0 {colour} 1"));
        let read = Sps::read(&nal).unwrap();
        assert_eq!((read.full_range, read.matrix), (false, 6));
    }

    #[test]
    fn reads_the_high_profile() {
        // A scaling list of 16 that ends at once (8 - 8 = 0), order of kind 0.
        let high = "01100100 00000000 00001010";
        let lists = "1 1 000010001 0000000";
        let nal = sps(&format!("{high} 1 010 1 1 0 {lists} 1 1 1 010 0 00100 011 1 1 0 0 1"));
        let read = Sps::read(&nal).unwrap();
        assert_eq!((read.width, read.height), (64, 48));
    }

    #[test]
    fn refuses_what_is_not_decoded() {
        let interlaced = sps(&format!("{BASELINE} {PLAIN} 00100 011 0 1 1 0 0 1"));
        assert_eq!(Sps::read(&interlaced), Err(VideoError::Unsupported("interlaced")));
        for profile in [88, 110, 122, 244, 118, 44, 0] {
            let nal = sps(&format!("{profile:08b} 00000000 00001010 {PLAIN} 00100 011 1 1 0 0 1"));
            assert!(matches!(Sps::read(&nal), Err(VideoError::Unsupported(_))), "{profile}");
        }
        let full_colour = sps("01100100 00000000 00001010 1 00100 1 1 0 0");
        assert!(matches!(Sps::read(&full_colour), Err(VideoError::Unsupported(_))));
        // All is cropped away.
        let nothing = sps(&format!("{BASELINE} {PLAIN} 1 1 1 1 1 00101 00101 1 1 0 1"));
        assert!(matches!(Sps::read(&nothing), Err(VideoError::Malformed(_))));
        for nal in [&[][..], &[0x67], &[0x68, 66, 0, 10, 0xFF, 0xFF], &[0x67; 4], &[0x67, 66, 0, 10, 0, 0]] {
            assert!(matches!(Sps::read(nal), Err(VideoError::Malformed(_))), "{nal:?}");
        }
    }

    #[test]
    fn takes_out_what_keeps_start_codes_away() {
        assert_eq!(unescaped(&[0, 0, 3, 1, 0, 0, 3, 0, 0, 3]), [0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(unescaped(&[3, 0, 3, 0, 0, 0, 3]), [3, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn random_bytes_are_read_or_refused() {
        let mut rng = StdRng::seed_from_u64(4);
        for _ in 0..20_000 {
            let start = [0x67, [66, 77, 100][rng.random_range(0..3)]];
            let rest: Vec<u8> = (0..rng.random_range(0..60)).map(|_| rng.random()).collect();
            let nal = [&start[..], &rest].concat();
            if let Ok(sps) = Sps::read(&nal) {
                assert!(sps.width > 0 && sps.width <= sps.coded_width && sps.coded_width <= 16_384);
                assert!(sps.height > 0 && sps.height <= sps.coded_height && sps.coded_height <= 16_384);
            }
        }
    }
}
