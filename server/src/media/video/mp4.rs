//! MP4 files of H.264: which bytes are which frame, when each is shown, and which way up.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use image::metadata::Orientation;
use re_mp4::{ElstBox, Mp4, Sample, StsdBoxContent, Track};

use super::boxes::{self, Kind, keep_video_only};
use super::edits::Edits;
use super::error::{VideoError, VideoLimits, malformed};
use super::sampling::FrameTimes;
use super::sps::Sps;
use super::yuv::Colours;

/// The most bytes of a frame that the decoder takes: those of the largest frame of level 5.2.
const MAX_SAMPLE_BYTES: usize = 7_077_888;

/// A track of H.264, whose frames are not decoded yet.
#[derive(Debug, Clone)]
pub(super) struct H264Track {
    /// How a frame is turned to be upright.
    pub(super) orientation: Orientation,
    /// How large frames are and what their samples mean.
    pub(super) sps: Sps,
    /// The same as a conversion.
    pub(super) colours: Colours,
    /// Sequence and picture parameter sets that the frames refer to.
    pub(super) parameter_sets: Vec<Vec<u8>>,
    /// Bytes of the length before each unit of a frame: 1, 2 or 4.
    pub(super) length_bytes: usize,
    /// Where each frame is in the file, in decoding order.
    pub(super) samples: Vec<Range<usize>>,
    /// Of each frame that is shown, how many frames of the track come before it in the order of their times.
    pub(super) ranks: Vec<usize>,
    /// When each of these is shown; the first one at 0.
    pub(super) times: FrameTimes,
}

impl H264Track {
    /// Reads the headers of a file. What is not needed of them is overwritten.
    ///
    /// # Errors
    /// Anything that keeps the track from being decoded, or that is over a limit, as far as headers tell.
    pub(super) fn open(file: &mut [u8], limits: &VideoLimits) -> Result<Self, VideoError> {
        let kept = keep_video_only(file, limits)?;
        if kept.codec != *b"avc1" {
            return Err(VideoError::UnsupportedCodec(codec_name(kept.codec)));
        }
        let mp4 = demuxed(&file[..kept.boxes_end])?;
        let track = mp4.tracks().values().next().ok_or(VideoError::NoVideoTrack)?;
        let configuration = match &track.trak(&mp4).mdia.minf.stbl.stsd.contents {
            StsdBoxContent::Avc1(entry) => &entry.avcc.contents,
            _ => return Err(malformed("its video track says nothing about its codec")),
        };
        let sps = configuration.sequence_parameter_sets.first();
        let sps = Sps::read(&sps.ok_or_else(|| malformed("it has no sequence parameter set"))?.bytes)?;
        let colours = Colours::new(sps.matrix, sps.full_range)?;
        let order = Order::new(&mp4, track)?;
        let matrix = &track.trak(&mp4).tkhd.matrix;
        let orientation = orientation([matrix.a, matrix.b, matrix.c, matrix.d]);
        let size = (sps.coded_width, sps.coded_height);
        limits.check(size, track.samples.len(), order.times.duration_s())?;
        let samples = track.samples.iter().map(|sample| byte_range(sample, file.len()));
        let samples = samples.collect::<Result<Vec<_>, _>>()?;
        // Decoding costs time by the byte, also where frames share theirs.
        if samples.iter().map(Range::len).fold(0, usize::saturating_add) > file.len() {
            return Err(malformed("its frames have more bytes than the file"));
        }
        let sets = configuration.sequence_parameter_sets.iter().chain(&configuration.picture_parameter_sets);
        Ok(Self {
            orientation,
            sps,
            colours,
            parameter_sets: sets.map(|set| set.bytes.clone()).collect(),
            length_bytes: length_bytes(configuration.length_size_minus_one)?,
            samples,
            ranks: order.ranks,
            times: order.times,
        })
    }

    /// Pixels of all frames of the track.
    pub(super) fn decoded_pixels(&self) -> u64 {
        let frame = u64::from(self.sps.coded_width) * u64::from(self.sps.coded_height);
        frame.saturating_mul(self.samples.len() as u64)
    }

    /// Width and height in pixels of upright frames.
    pub(super) fn size(&self) -> (u32, u32) {
        use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
        match self.orientation {
            Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH => (self.sps.height, self.sps.width),
            _ => (self.sps.width, self.sps.height),
        }
    }
}

thread_local! {
    /// Whether a panic of this thread is one that [`demuxed`] expects.
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

/// The demuxer panics on tables that contradict each other, which is as good as an error: it holds nothing. Nobody is told
/// of such a panic but the one who sent the file.
fn demuxed(file: &[u8]) -> Result<Mp4, VideoError> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !IS_QUIET.get() {
                usual(panic);
            }
        }));
    });
    IS_QUIET.set(true);
    let read = catch_unwind(AssertUnwindSafe(|| Mp4::read_bytes(file)));
    IS_QUIET.set(false);
    match read {
        Ok(Ok(mp4)) => Ok(mp4),
        Ok(Err(error)) => Err(malformed(error.to_string())),
        Err(_) => Err(malformed("its tables of samples contradict each other")),
    }
}

fn codec_name(codec: Kind) -> String {
    let known = match &codec {
        b"hvc1" | b"hev1" | b"dvh1" | b"dvhe" => "HEVC",
        b"vp08" => "VP8",
        b"vp09" => "VP9",
        b"av01" => "AV1",
        b"mp4v" => "MPEG-4 part 2",
        b"avc2" | b"avc3" | b"avc4" => "H.264 with parameter sets among its frames",
        b"encv" => "encryption",
        _ => return boxes::name(codec),
    };
    known.into()
}

fn length_bytes(less_one: u8) -> Result<usize, VideoError> {
    match less_one & 3 {
        2 => Err(malformed("the lengths in its frames have three bytes")),
        less_one => Ok(usize::from(less_one) + 1),
    }
}

fn byte_range(sample: &Sample, file_bytes: usize) -> Result<Range<usize>, VideoError> {
    let start = usize::try_from(sample.offset).ok();
    let size = usize::try_from(sample.size).ok();
    let range = start.zip(size).and_then(|(start, size)| Some(start..start.checked_add(size)?));
    match range {
        Some(range) if range.end > file_bytes => Err(malformed("it ends before its frames do")),
        Some(range) if range.len() > MAX_SAMPLE_BYTES => Err(malformed("a frame has too many bytes")),
        Some(range) => Ok(range),
        None => Err(malformed("a frame's place is out of range")),
    }
}

/// The order and the times of a track's frames.
struct Order {
    ranks: Vec<usize>,
    times: FrameTimes,
}

impl Order {
    fn new(mp4: &Mp4, track: &Track) -> Result<Self, VideoError> {
        let timescales = (track.timescale, u64::from(mp4.moov.mvhd.timescale));
        if timescales.0 == 0 || timescales.1 == 0 {
            return Err(malformed("it has no ticks in a second"));
        }
        let list = track.trak(mp4).edts.as_ref().and_then(|edits| edits.elst.as_ref());
        let edits = Edits::new(&list.map(edit_entries).unwrap_or_default(), timescales)?;
        let mut frames = media_times(mp4, track)?;
        frames.sort_by_key(|(time, _)| *time);
        let shown: Vec<_> = frames
            .iter()
            .enumerate()
            .filter_map(|(rank, (time, duration))| Some((rank, edits.shown_at(*time)?, *duration)))
            .collect();
        let (Some(first), Some(last)) = (shown.first(), shown.last()) else {
            return Err(VideoError::NoFrames);
        };
        let origin = first.1;
        let seconds = |ticks: i64| (i128::from(ticks) - i128::from(origin)) as f64 / timescales.0 as f64;
        let end =
            last.1.checked_add_unsigned(last.2).ok_or_else(|| malformed("its times are out of range"))?;
        let times_s = shown.iter().map(|frame| seconds(frame.1)).collect();
        let times = FrameTimes::new(times_s, seconds(end))?;
        Ok(Self { ranks: shown.iter().map(|frame| frame.0).collect(), times })
    }
}

/// Durations and beginnings; of an edit that shows nothing, the beginning is -1.
fn edit_entries(list: &ElstBox) -> Vec<(u64, Option<u64>)> {
    let nothing = if list.version == 1 { u64::MAX } else { u32::MAX.into() };
    let start = |time: u64| (time != nothing).then_some(time);
    list.entries.iter().map(|entry| (entry.segment_duration, start(entry.media_time))).collect()
}

/// When each frame is shown and for how long, in decoding order and ticks of the media.
///
/// The demuxer moves the times of a whole movie so that the first is 0, which edit lists know nothing of: that is undone.
/// It reads the negative offsets of fragments as positive ones, lets a fragment begin where the one before ended, whatever
/// its own header says, and takes the last frame's duration from a header that need not be there: so are these.
fn media_times(mp4: &Mp4, track: &Track) -> Result<Vec<(i64, u64)>, VideoError> {
    let table = &track.trak(mp4).mdia.minf.stbl;
    let fragmented = table.stsz.sample_count == 0;
    let first = track.samples.first().ok_or(VideoError::NoFrames)?;
    let first_offset =
        table.ctts.as_ref().and_then(|offsets| Some(i64::from(offsets.entries.first()?.sample_offset)));
    let moved =
        if fragmented { 0 } else { first_offset.unwrap_or(0).saturating_sub(first.composition_timestamp) };
    let mut times: Vec<_> = track
        .samples
        .iter()
        .map(|sample| {
            let offset = sample.composition_timestamp.saturating_sub(sample.decode_timestamp);
            let wrapped = if fragmented && offset >= 1 << 31 { 1 << 32 } else { 0 };
            let time = sample.composition_timestamp.saturating_sub(wrapped).saturating_add(moved);
            (time, sample.duration)
        })
        .collect();
    if fragmented {
        begin_fragments(mp4, track, &mut times);
    }
    if let (false, Some(last), Some(run)) = (fragmented, times.last_mut(), table.stts.entries.last()) {
        last.1 = run.sample_delta.into();
    }
    Ok(times)
}

/// Moves the times of each fragment's frames to where its own header says that it begins: of a recording with gaps, parts
/// are missing between two.
fn begin_fragments(mp4: &Mp4, track: &Track, times: &mut [(i64, u64)]) {
    let mut first = 0;
    for fragment in mp4.moofs.iter().flat_map(|moof| &moof.trafs) {
        let num_frames: usize = fragment.truns.iter().map(|run| run.sample_count as usize).sum();
        let frames = times.iter_mut().skip(first).take(num_frames);
        if let (Some(begin), Some(sample)) = (&fragment.tfdt, track.samples.get(first)) {
            let begin = i64::try_from(begin.base_media_decode_time).unwrap_or(i64::MAX);
            let late = begin.saturating_sub(sample.decode_timestamp);
            frames.for_each(|(time, _)| *time = time.saturating_add(late));
        }
        first += num_frames;
    }
}

/// How a track's matrix (a, b, c, d) turns its frames. Anything but quarter turns and mirrors is left out.
fn orientation(matrix: [i32; 4]) -> Orientation {
    // A point (x, y) of a frame is shown at (a x + c y, b x + d y), y pointing down.
    match matrix.map(i32::signum) {
        [0, 1, -1, 0] => Orientation::Rotate90,
        [-1, 0, 0, -1] => Orientation::Rotate180,
        [0, -1, 1, 0] => Orientation::Rotate270,
        [-1, 0, 0, 1] => Orientation::FlipHorizontal,
        [1, 0, 0, -1] => Orientation::FlipVertical,
        [0, 1, 1, 0] => Orientation::Rotate90FlipH,
        [0, -1, -1, 0] => Orientation::Rotate270FlipH,
        _ => Orientation::NoTransforms,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::mp4_writer::{MovieSpec, movie};
    use super::*;

    /// 64 x 48 pixels, as the tests of `sps.rs` spell it out.
    const SPS: [u8; 7] = [0x67, 66, 0, 10, 0b1101_1010, 0b0001_0001, 0b1110_0100];

    fn spec(num_samples: usize) -> MovieSpec {
        let samples = (0..num_samples).map(|sample| vec![sample as u8; 5 + sample]).collect();
        MovieSpec { samples, parameter_sets: (SPS.to_vec(), vec![0x68, 1]), ..Default::default() }
    }

    fn opened(spec: &MovieSpec) -> Result<H264Track, VideoError> {
        H264Track::open(&mut movie(spec), &VideoLimits::default())
    }

    #[test]
    fn finds_frames_and_their_times() {
        let mut file = movie(&MovieSpec { with_sound: true, ..spec(4) });
        let track = H264Track::open(&mut file, &VideoLimits::default()).unwrap();
        for (sample, range) in track.samples.iter().enumerate() {
            assert_eq!(file[range.clone()], vec![sample as u8; 5 + sample]);
        }
        assert_eq!(track.ranks, [0, 1, 2, 3]);
        assert_eq!(track.times.times_s(), [0.0, 0.04, 0.08, 0.12]);
        assert_eq!(track.times.duration_s(), 0.16);
        assert_eq!((track.size(), track.length_bytes), ((64, 48), 4));
        assert_eq!(track.parameter_sets, [SPS.to_vec(), vec![0x68, 1]]);
    }

    /// Decoded I P B B P B, shown I B B P B P, with the edit that skips the delay.
    #[test]
    fn reordered_frames_are_shown_in_order() {
        let offsets = vec![1024, 2048, 512, 512, 1536, 512];
        let track =
            opened(&MovieSpec { offsets: offsets.clone(), edits: vec![(240, 1024)], ..spec(6) }).unwrap();
        assert_eq!(track.ranks, [0, 1, 2, 3, 4, 5]);
        assert_eq!(track.times.times_s(), [0.0, 0.04, 0.08, 0.12, 0.16, 0.2]);
        let without_edit = opened(&MovieSpec { offsets, ..spec(6) }).unwrap();
        assert_eq!(without_edit.times, track.times);
        let negative = vec![0, 1024, -512, -512, 512, -512];
        let track = opened(&MovieSpec { offsets: negative, ..spec(6) }).unwrap();
        assert_eq!(track.times, without_edit.times);
    }

    #[test]
    fn trimmed_frames_are_decoded_and_not_shown() {
        // From the third frame on, for three frames.
        let track = opened(&MovieSpec { edits: vec![(120, 1024)], ..spec(10) }).unwrap();
        assert_eq!(track.samples.len(), 10);
        assert_eq!(track.ranks, [2, 3, 4]);
        assert_eq!(track.times.times_s(), [0.0, 0.04, 0.08]);
        let nothing = opened(&MovieSpec { edits: vec![(120, 999_999)], ..spec(10) });
        assert_eq!(nothing.unwrap_err(), VideoError::NoFrames);
    }

    #[test]
    fn rates_may_vary() {
        let track = opened(&MovieSpec { durations: vec![128, 1280, 12_800, 6400], ..spec(4) }).unwrap();
        assert_eq!(track.times.times_s(), [0.0, 0.01, 0.11, 1.11]);
        assert_eq!(track.times.duration_s(), 1.61);
    }

    #[test]
    fn matrices_turn_frames() {
        const ONE: i32 = 0x1_0000;
        for (matrix, expected, size) in [
            ([ONE, 0, 0, ONE], Orientation::NoTransforms, (64, 48)),
            ([0, ONE, -ONE, 0], Orientation::Rotate90, (48, 64)),
            ([-ONE, 0, 0, -ONE], Orientation::Rotate180, (64, 48)),
            ([0, -ONE, ONE, 0], Orientation::Rotate270, (48, 64)),
            ([-ONE, 0, 0, ONE], Orientation::FlipHorizontal, (64, 48)),
            ([46_341, 46_341, -46_341, 46_341], Orientation::NoTransforms, (64, 48)),
        ] {
            let track = opened(&MovieSpec { matrix, ..spec(2) }).unwrap();
            assert_eq!((track.orientation, track.size()), (expected, size));
        }
    }

    #[test]
    fn refuses_what_is_not_there() {
        assert_eq!(opened(&spec(0)).unwrap_err(), VideoError::NoFrames);
        let no_ticks = opened(&MovieSpec { timescales: (0, 1000), ..spec(2) });
        assert!(matches!(no_ticks, Err(VideoError::Malformed(_))));
        let mut other_codec = movie(&spec(2));
        let entry = other_codec.windows(4).rposition(|window| window == b"avc1").unwrap();
        other_codec[entry..entry + 4].copy_from_slice(b"hvc1");
        let error = H264Track::open(&mut other_codec, &VideoLimits::default()).unwrap_err();
        assert_eq!(error, VideoError::UnsupportedCodec("HEVC".into()));
    }

    /// Where a box of this type is.
    fn at(file: &[u8], kind: &[u8; 4]) -> usize {
        file.windows(4).position(|window| window == kind).unwrap() - 4
    }

    #[test]
    fn frames_do_not_share_their_bytes() {
        let mut file = movie(&MovieSpec { samples: vec![vec![1; 400]; 6], ..spec(0) });
        assert!(H264Track::open(&mut file.clone(), &VideoLimits::default()).is_ok());
        // Longer than they are, and a chunk for each, all at the beginning.
        let sizes = at(&file, b"stsz") + 20;
        for size in file[sizes..sizes + 6 * 4].chunks_mut(4) {
            size.copy_from_slice(&1000_u32.to_be_bytes());
        }
        let (chunks, offsets) = (at(&file, b"stsc"), at(&file, b"stco"));
        file[chunks + 20..chunks + 24].copy_from_slice(&1_u32.to_be_bytes());
        let start = file[offsets + 16..offsets + 20].to_vec();
        file[offsets + 12..offsets + 16].copy_from_slice(&6_u32.to_be_bytes());
        file.splice(offsets + 20..offsets + 20, start.repeat(5));
        for kind in [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stco"] {
            let place = at(&file, kind);
            let size = u32::from_be_bytes(file[place..][..4].try_into().unwrap()) + 20;
            file[place..place + 4].copy_from_slice(&size.to_be_bytes());
        }
        let error = H264Track::open(&mut file, &VideoLimits::default()).unwrap_err();
        assert_eq!(error, malformed("its frames have more bytes than the file"));
    }

    /// The demuxer panics on these.
    #[test]
    fn tables_that_contradict_each_other_are_faults() {
        let mut file = movie(&spec(4));
        let chunks = at(&file, b"stsc");
        file[chunks + 12..chunks + 16].fill(0);
        let error = demuxed(&file).map(|_| ()).unwrap_err();
        assert_eq!(error, malformed("its tables of samples contradict each other"));
    }

    /// A live recording of which a part was lost.
    #[test]
    fn fragments_begin_when_they_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/videos/fragmented.mp4");
        let whole = std::fs::read(path).unwrap();
        let times = |mut file: Vec<u8>| {
            H264Track::open(&mut file, &VideoLimits::default()).unwrap().times.times_s().to_vec()
        };
        // The last fragment's header: version 1, a time of eight bytes.
        let begin = at(&whole, b"mdat") + at(&whole[at(&whole, b"mdat")..], b"tfdt") + 12;
        let ticks = u64::from_be_bytes(whole[begin..begin + 8].try_into().unwrap());
        let timescale =
            u64::from(u32::from_be_bytes(whole[at(&whole, b"mdhd") + 20..][..4].try_into().unwrap()));
        let mut late = whole.clone();
        late[begin..begin + 8].copy_from_slice(&(ticks + 10 * timescale).to_be_bytes());
        let (whole, late) = (times(whole), times(late));
        let gaps = whole.iter().zip(&late).map(|(whole, late)| late - whole);
        let (before, after): (Vec<f64>, Vec<f64>) = gaps.partition(|gap| *gap < 5.0);
        assert!(before.len() > 3 && before.iter().all(|gap| *gap == 0.0), "{before:?}");
        assert!(after.len() > 1 && after.iter().all(|gap| (gap - 10.0).abs() < 1e-9), "{after:?}");
    }

    /// What the colours of frames are is known before any is decoded.
    #[test]
    fn colours_are_refused_by_headers() {
        // 64 x 48 pixels with the matrix 8, YCgCo.
        let bits = "1 1 011 010 0 00100 011 1 1 0 1 0 0 1 101 1 1 00000001 00000001 00001000 1";
        let bits: Vec<u8> = bits.bytes().filter(|bit| *bit != b' ').collect();
        let bytes = bits.chunks(8).map(|byte| {
            let value = byte.iter().fold(0, |value, bit| (value << 1) | (bit - b'0'));
            value << (8 - byte.len())
        });
        let sps: Vec<u8> = [0x67, 66, 0, 10].into_iter().chain(bytes).collect();
        assert_eq!(Sps::read(&sps).unwrap().matrix, 8);
        let parameter_sets = (sps, vec![0x68, 1]);
        let refused = opened(&MovieSpec { parameter_sets, ..spec(2) }).unwrap_err();
        assert!(matches!(refused, VideoError::Unsupported(_)), "{refused}");
    }

    /// The most that may be, of everything, is read in a moment.
    #[test]
    fn headers_take_no_longer_than_their_size() {
        let edits = (0..256).map(|edit| (1, edit * 100)).collect();
        let samples = vec![vec![7]; 54_000];
        let longest = MovieSpec { samples, offsets: vec![1; 54_000], durations: vec![1], edits, ..spec(0) };
        let started = Instant::now();
        assert_eq!(opened(&longest).unwrap().samples.len(), 54_000);
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    }

    #[test]
    fn refuses_by_headers() {
        let limits = VideoLimits { max_duration_s: 0.1, ..Default::default() };
        let error = H264Track::open(&mut movie(&spec(4)), &limits).unwrap_err();
        assert!(matches!(error, VideoError::TooLong { .. }), "{error}");
        let limits = VideoLimits { max_frame_pixels: 64 * 48 - 1, ..Default::default() };
        let error = H264Track::open(&mut movie(&spec(4)), &limits).unwrap_err();
        assert!(matches!(error, VideoError::FrameTooLarge { width: 64, height: 48, .. }), "{error}");
    }

    /// Files with a few bytes of their headers changed are opened or refused, and frames are never outside the file.
    #[test]
    fn broken_headers_are_opened_or_refused() {
        use rand::rngs::StdRng;
        use rand::{Rng, SeedableRng};

        let mut rng = StdRng::seed_from_u64(5);
        let whole = movie(&MovieSpec { offsets: vec![512; 8], edits: vec![(320, 512)], ..spec(8) });
        let opened = (0..5000)
            .filter(|_| {
                let mut file = whole.clone();
                for _ in 0..rng.random_range(1..4) {
                    let at = rng.random_range(0..file.len());
                    file[at] = if rng.random() { rng.random() } else { [0, 1, 255][rng.random_range(0..3)] };
                }
                let end = file.len();
                match H264Track::open(&mut file, &VideoLimits::default()) {
                    Ok(track) => {
                        assert!(track.samples.iter().all(|range| range.end <= end));
                        assert!(track.ranks.iter().all(|rank| *rank < track.samples.len()));
                        true
                    }
                    Err(_) => false,
                }
            })
            .count();
        assert!(opened > 100, "{opened}");
    }
}
