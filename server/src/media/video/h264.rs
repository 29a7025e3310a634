//! H.264 to frames, with OpenH264.
//!
//! OpenH264 is C++: a file that was made to can do with this process what it likes. Servers decode in a child process.

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};
use openh264::OpenH264API;
use openh264::decoder::{DecodedYUV, Decoder, DecoderConfig, Flush};
use openh264::formats::YUVSource;

use super::error::{VideoError, malformed};
use super::mp4::H264Track;
use super::sps::{NAL_SPS, Sps};
use super::yuv::Planes;

/// What comes before a unit in a stream of bytes (annex B).
const START_CODE: [u8; 4] = [0, 0, 0, 1];
/// A slice of a picture that refers to others, and of one that does not.
const NAL_SLICES: [u8; 2] = [1, 5];
/// A picture parameter set.
const NAL_PPS: u8 = 8;

/// Decodes the frames of a track that are `wanted` (indices of shown frames, ascending, each once), and gives each to
/// `take`, upright.
///
/// Frames come out of the decoder in the order in which they are shown, some later than they went in: the k-th that comes
/// out has the k-th time. A fault anywhere before the last wanted frame is a fault of the whole, since after it nothing
/// says which frame is which.
pub(super) fn decode(
    track: &H264Track,
    file: &[u8],
    wanted: &[usize],
    take: &mut dyn FnMut(usize, RgbImage) -> Result<(), VideoError>,
) -> Result<(), VideoError> {
    // With its default, flushing, the decoder gives frames before those that are shown earlier, and drops the latter.
    let config = DecoderConfig::new().flush_after_decode(Flush::NoFlush);
    let mut decoder = Decoder::with_api_config(OpenH264API::from_source(), config).map_err(decoder_fault)?;
    let mut output = Output { track, wanted, num_out: 0, take };
    let mut stream = Vec::new();
    for set in &track.parameter_sets {
        push_unit(&mut stream, set, &track.sps)?;
    }
    for (index, range) in track.samples.iter().enumerate() {
        let sample = file.get(range.clone()).ok_or_else(|| malformed("it ends before its frames do"))?;
        if !push_sample(&mut stream, sample, track)? {
            return Err(malformed(format!("its frame {index} holds no picture")));
        }
        if let Some(frame) = decoder.decode(&stream).map_err(decoder_fault)? {
            output.put(&frame)?;
        }
        if output.wanted.is_empty() {
            return Ok(());
        }
        stream.clear();
    }
    for frame in decoder.flush_remaining().map_err(decoder_fault)? {
        output.put(&frame)?;
    }
    if output.wanted.is_empty() {
        return Ok(());
    }
    Err(malformed(format!("of its {} frames {} could be decoded", track.samples.len(), output.num_out)))
}

fn decoder_fault(error: openh264::Error) -> VideoError {
    malformed(format!("the H.264 decoder reports {:#x}", error.native_code()))
}

/// Appends what a sample holds of a picture, in the form that the decoder takes. Returns whether it holds one.
fn push_sample(stream: &mut Vec<u8>, mut sample: &[u8], track: &H264Track) -> Result<bool, VideoError> {
    let cut = || malformed("a frame is shorter than its parts");
    let mut holds_picture = false;
    while !sample.is_empty() {
        let (length, rest) = sample.split_at_checked(track.length_bytes).ok_or_else(cut)?;
        let length = length.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte));
        let (unit, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
        holds_picture |= push_unit(stream, unit, &track.sps)?;
        sample = rest;
    }
    Ok(holds_picture)
}

/// Appends a unit, if it is of a kind that decoding needs. Returns whether it is a slice.
fn push_unit(stream: &mut Vec<u8>, unit: &[u8], sps: &Sps) -> Result<bool, VideoError> {
    // The decoder would see units that nothing has looked at.
    if unit.windows(3).any(|bytes| bytes == [0, 0, 1]) {
        return Err(malformed("a part of a frame holds the start of another"));
    }
    let kind = unit.first().map_or(0, |header| header & 0x1F);
    match kind {
        2..=4 => return Err(VideoError::Unsupported("H.264 of partitioned slices")),
        NAL_SPS => {
            let new = Sps::read(unit)?;
            if (new.coded_width, new.coded_height) != (sps.coded_width, sps.coded_height) {
                return Err(VideoError::Unsupported("of frames that change their size"));
            }
            if (new.matrix, new.full_range) != (sps.matrix, sps.full_range) {
                return Err(VideoError::Unsupported("of frames that change the meaning of their colours"));
            }
        }
        NAL_PPS => {}
        _ if NAL_SLICES.contains(&kind) => {}
        // Remarks, filler, and what other codecs built on this one add.
        _ => return Ok(false),
    }
    stream.extend(START_CODE);
    stream.extend(unit);
    Ok(NAL_SLICES.contains(&kind))
}

/// Where decoded frames go.
struct Output<'a> {
    track: &'a H264Track,
    /// What is still to come.
    wanted: &'a [usize],
    /// Frames that came out of the decoder so far.
    num_out: usize,
    take: &'a mut dyn FnMut(usize, RgbImage) -> Result<(), VideoError>,
}

impl Output<'_> {
    fn put(&mut self, frame: &DecodedYUV<'_>) -> Result<(), VideoError> {
        let rank = self.num_out;
        self.num_out += 1;
        let Some((index, later)) = self.wanted.split_first() else { return Ok(()) };
        if self.track.ranks.get(*index) != Some(&rank) {
            return Ok(());
        }
        self.wanted = later;
        let sps = &self.track.sps;
        let (size, strides) = (frame.dimensions(), frame.strides());
        if size != (sps.width as usize, sps.height as usize) {
            return Err(VideoError::Unsupported("of frames that change their size"));
        }
        let planes =
            Planes { size, y: frame.y(), u: frame.u(), v: frame.v(), strides: (strides.0, strides.1) };
        let pixels =
            planes.to_rgb(&self.track.colours).ok_or_else(|| malformed("the decoder gave half a frame"))?;
        let image =
            RgbImage::from_raw(sps.width, sps.height, pixels).expect("as many pixels as were converted");
        (self.take)(*index, upright(image, self.track.orientation))
    }
}

fn upright(image: RgbImage, orientation: Orientation) -> RgbImage {
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    image.into_rgb8()
}

#[cfg(test)]
mod tests {
    use openh264::encoder::{Encoder, EncoderConfig, FrameRate, IntraFramePeriod, RateControlMode};
    use openh264::formats::YUVBuffer;

    use super::super::error::VideoLimits;
    use super::super::mp4_writer::{MovieSpec, movie};
    use super::*;

    const SIZE: (usize, usize) = (64, 48);

    /// A bright square on dark gray, one step further in every frame.
    fn picture(frame: usize) -> YUVBuffer {
        let (width, height) = SIZE;
        let luma = (0..width * height).map(|at| {
            let (x, y) = (at % width, at / width);
            if (16..32).contains(&y) && (4 * frame..4 * frame + 12).contains(&x) { 200 } else { 60 }
        });
        YUVBuffer::from_vec(luma.chain(vec![128; width * height / 2]).collect(), width, height)
    }

    /// The luma of an upright frame's pixel, near enough.
    fn is_bright(image: &RgbImage, x: usize, y: usize) -> bool {
        image.get_pixel(x as u32, y as u32).0[1] > 140
    }

    /// Units of a stream of bytes, without their start codes.
    fn units(stream: &[u8]) -> Vec<Vec<u8>> {
        openh264::nal_units(stream)
            .map(|unit| unit[unit.iter().position(|byte| *byte == 1).unwrap() + 1..].to_vec())
            .collect()
    }

    /// A movie of [`picture`]s.
    fn encoded(num_frames: usize) -> MovieSpec {
        let config = EncoderConfig::new()
            .skip_frames(false)
            .max_frame_rate(FrameRate::from_hz(25.0))
            .rate_control_mode(RateControlMode::Off)
            .intra_frame_period(IntraFramePeriod::from_num_frames(8));
        let mut encoder = Encoder::with_api_config(OpenH264API::from_source(), config).unwrap();
        let mut spec = MovieSpec::default();
        for frame in 0..num_frames {
            let mut sample = Vec::new();
            for unit in units(&encoder.encode(&picture(frame)).unwrap().to_vec()) {
                match unit[0] & 0x1F {
                    NAL_SPS => spec.parameter_sets.0 = unit,
                    NAL_PPS => spec.parameter_sets.1 = unit,
                    _ => {
                        sample.extend((unit.len() as u32).to_be_bytes());
                        sample.extend(unit);
                    }
                }
            }
            spec.samples.push(sample);
        }
        spec
    }

    fn decoded(spec: &MovieSpec, wanted: &[usize]) -> Result<Vec<(usize, RgbImage)>, VideoError> {
        let mut file = movie(spec);
        let track = H264Track::open(&mut file, &VideoLimits::default())?;
        let mut frames = Vec::new();
        decode(&track, &file, wanted, &mut |index, image| {
            frames.push((index, image));
            Ok(())
        })?;
        Ok(frames)
    }

    #[test]
    fn decodes_what_is_wanted() {
        let spec = encoded(10);
        for wanted in [&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[0, 9], &[3, 4, 7], &[5]] {
            let frames = decoded(&spec, wanted).unwrap();
            assert_eq!(frames.iter().map(|frame| frame.0).collect::<Vec<_>>(), wanted);
            for (index, image) in frames {
                assert_eq!(image.dimensions(), (64, 48));
                for x in 0..64 {
                    // Two pixels at the square's edges may be anything.
                    let inside = (4 * index + 2..4 * index + 10).contains(&x);
                    let outside = !(4 * index..4 * index + 12).contains(&(x + 1))
                        && !(4 * index..4 * index + 14).contains(&x);
                    assert!(!inside || is_bright(&image, x, 24), "frame {index}, {x}");
                    assert!(!outside || !is_bright(&image, x, 24), "frame {index}, {x}");
                    assert!(!is_bright(&image, x, 4));
                }
            }
        }
    }

    #[test]
    fn frames_are_turned_upright() {
        let spec = MovieSpec { matrix: [0, 0x1_0000, -0x1_0000, 0], ..encoded(2) };
        let frames = decoded(&spec, &[0, 1]).unwrap();
        let (index, image) = &frames[1];
        assert_eq!((*index, image.dimensions()), (1, (48, 64)));
        // A row of the file, top to bottom, is a column, right to left.
        assert!(
            is_bright(image, 47 - 24, 4 + 6) && !is_bright(image, 47 - 24, 40) && !is_bright(image, 4, 10)
        );
    }

    #[test]
    fn trimmed_frames_do_not_count() {
        let spec = MovieSpec { edits: vec![(160, 2 * 512)], ..encoded(8) };
        let frames = decoded(&spec, &[0, 3]).unwrap();
        let whole = decoded(&encoded(8), &[2, 5]).unwrap();
        assert_eq!((&frames[0].1, &frames[1].1), (&whole[0].1, &whole[1].1));
    }

    #[test]
    fn broken_frames_are_faults() {
        let whole = encoded(4);
        let broken = |samples: Vec<Vec<u8>>| {
            let spec =
                MovieSpec { samples, parameter_sets: whole.parameter_sets.clone(), ..Default::default() };
            decoded(&spec, &[0, 1, 2, 3]).unwrap_err()
        };
        let changed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut samples = whole.samples.clone();
            change(&mut samples[1]);
            broken(samples)
        };
        assert!(matches!(changed(&|sample| sample.truncate(3)), VideoError::Malformed(_)));
        assert!(matches!(changed(&|sample| sample[0] = 0x7F), VideoError::Malformed(_)));
        assert!(matches!(changed(&|sample| sample.clear()), VideoError::Malformed(_)));
        assert!(matches!(changed(&|sample| sample[4] = 6), VideoError::Malformed(_)));
        assert!(matches!(changed(&|sample| sample[4] = 2), VideoError::Unsupported(_)));
        assert!(matches!(changed(&|sample| sample.extend([0, 0, 0, 2, 0x67, 1])), VideoError::Malformed(_)));
        // A start code, after which the decoder would find a set of its own.
        assert_eq!(
            changed(&|sample| {
                sample.extend([0, 0, 0, 7, 0x41, 0, 0, 1, 0x67, 66, 0]);
            }),
            malformed("a part of a frame holds the start of another")
        );
        // The first frame, which all others refer to, is gone.
        assert!(matches!(
            broken([&whole.samples[1..], &whole.samples[..1]].concat()),
            VideoError::Malformed(_)
        ));
    }

    #[test]
    fn what_takes_a_frame_may_stop() {
        let mut file = movie(&encoded(3));
        let track = H264Track::open(&mut file, &VideoLimits::default()).unwrap();
        let stopped = decode(&track, &file, &[0, 1], &mut |_, _| Err(VideoError::NoFrames));
        assert_eq!(stopped, Err(VideoError::NoFrames));
    }
}
