//! What ffmpeg's muxer `framecrc` writes of one stream: a line for each fact, then one for each packet. None of it is trusted.

use super::super::error::{VideoError, VideoLimits, malformed};
use super::super::sampling::FrameTimes;

/// Bytes of a line; those of packets have about a hundred.
pub(super) const MAX_LINE_BYTES: usize = 1024;
/// Lines of facts about the stream; there are about eight.
const MAX_FACTS: usize = 64;
/// Times beyond this have no exact number of seconds.
const MAX_TICKS: i64 = 1 << 52;
/// The flag of a packet that is decoded and not shown, since an edit list cuts it off.
const DISCARD: u32 = 4;

/// A frame as it lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet {
    /// When it is shown, in ticks.
    time: i64,
    /// How long, in ticks; 0 where the file does not say.
    duration: i64,
    is_shown: bool,
}

/// A stream, as far as its lines are read.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Listing {
    num_facts: usize,
    size: Option<(u32, u32)>,
    /// Seconds of a tick, as a fraction.
    tick: Option<(u32, u32)>,
    packets: Vec<Packet>,
}

/// When frames are shown.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Times {
    /// As the project has them, the first at 0.
    pub(super) times: FrameTimes,
    /// Half a tick before each, in seconds of the file: no other frame is between the two.
    pub(super) starts_s: Vec<f64>,
}

impl Listing {
    /// Reads a line.
    ///
    /// # Errors
    /// A line that the muxer does not write, or of a frame that has no time; too many of them.
    pub(super) fn push(&mut self, line: &str, limits: &VideoLimits) -> Result<(), VideoError> {
        if line.starts_with('#') {
            self.num_facts += 1;
            if self.num_facts > MAX_FACTS {
                return Err(nonsense());
            }
            return self.push_fact(line);
        }
        limits.check_frames(self.packets.len() + 1)?;
        self.packets.push(packet(line)?);
        Ok(())
    }

    fn push_fact(&mut self, line: &str) -> Result<(), VideoError> {
        let pair = |value: &str, between| -> Result<(u32, u32), VideoError> {
            let (first, second) = value.trim().split_once(between).ok_or_else(nonsense)?;
            let (first, second) = first.parse().ok().zip(second.parse().ok()).ok_or_else(nonsense)?;
            if first == 0 || second == 0 { Err(nonsense()) } else { Ok((first, second)) }
        };
        if let Some(value) = line.strip_prefix("#tb 0:") {
            self.tick = Some(pair(value, '/')?);
        } else if let Some(value) = line.strip_prefix("#dimensions 0:") {
            self.size = Some(pair(value, 'x')?);
        }
        Ok(())
    }

    /// How many frames there are, shown or not.
    pub(super) fn num_frames(&self) -> usize {
        self.packets.len()
    }

    /// Width and height in pixels.
    pub(super) fn size(&self) -> Result<(u32, u32), VideoError> {
        self.size.ok_or_else(nonsense)
    }

    /// When frames are shown, in the order of their times.
    ///
    /// # Errors
    /// No frame that is shown, or times that are out of range.
    pub(super) fn times(&self) -> Result<Times, VideoError> {
        let (numerator, denominator) = self.tick.ok_or_else(nonsense)?;
        let mut shown: Vec<_> = self.packets.iter().filter(|packet| packet.is_shown).collect();
        shown.sort_by_key(|packet| packet.time);
        let (Some(first), Some(last)) = (shown.first(), shown.last()) else {
            return Err(VideoError::NoFrames);
        };
        let seconds = |ticks: f64| ticks * f64::from(numerator) / f64::from(denominator);
        let since = |time: i64| seconds((time - first.time) as f64);
        let times_s: Vec<f64> = shown.iter().map(|packet| since(packet.time)).collect();
        let times = match last.duration {
            0 => FrameTimes::at_times(times_s)?,
            duration => FrameTimes::new(times_s, since(last.time + duration))?,
        };
        let starts_s = shown.iter().map(|packet| seconds(packet.time as f64 - 0.5)).collect();
        Ok(Times { times, starts_s })
    }
}

/// Stream, time of decoding, time, duration, size and checksum of a packet, then its flags, unless it is an ordinary key
/// frame, and what else there is.
fn packet(line: &str) -> Result<Packet, VideoError> {
    let mut fields = line.split(',').map(str::trim);
    let mut field = || fields.next().ok_or_else(nonsense);
    let (stream, _, time, duration) = (field()?, field()?, field()?, field()?);
    let (_size, _checksum) = (field()?, field()?);
    if stream != "0" {
        return Err(nonsense());
    }
    if time == "NOPTS" {
        return Err(malformed("it does not say when its frames are shown"));
    }
    let ticks = |field: &str, least| {
        let ticks = field.parse().map_err(|_| nonsense())?;
        if (least..=MAX_TICKS).contains(&ticks) {
            Ok(ticks)
        } else {
            Err(malformed("its times are out of range"))
        }
    };
    let flags = match fields.find_map(|field| field.strip_prefix("F=0x")) {
        Some(flags) => u32::from_str_radix(flags, 16).map_err(|_| nonsense())?,
        None => 0,
    };
    Ok(Packet {
        time: ticks(time, -MAX_TICKS)?,
        duration: ticks(duration, 0)?,
        is_shown: flags & DISCARD == 0,
    })
}

/// No ffmpeg writes this.
fn nonsense() -> VideoError {
    malformed("ffmpeg says nothing sensible about it")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: &str = "#software: Lavf61.1.100\n#tb 0: 1/1000\n#codec_id 0: vp9\n#dimensions 0: 64x48\n";

    fn read(text: &str) -> Result<Listing, VideoError> {
        let mut listing = Listing::default();
        let limits = VideoLimits { max_frames: 4, ..Default::default() };
        text.lines().try_for_each(|line| listing.push(line, &limits)).map(|()| listing)
    }

    #[test]
    fn frames_are_in_the_order_of_their_times() {
        let listing = read(&format!(
            "{FACTS}0,       -400,        200,      200,      624, 0x2a8c39b3\n\
             0,       -200,       -200,      200,       59, 0xe4831b9d, F=0x5\n\
             0,          0,        600,      100,      169, 0x252c4e79, F=0x0\n\
             0,        200,        400,      200,       42, 0xe25b1a30, F=0x10, S=1,       10, 0x1\n"
        ))
        .unwrap();
        assert_eq!((listing.size(), listing.num_frames()), (Ok((64, 48)), 4));
        let Times { times, starts_s } = listing.times().unwrap();
        assert_eq!(times, FrameTimes::new(vec![0.0, 0.2, 0.4], 0.5).unwrap());
        assert_eq!(starts_s, [0.1995, 0.3995, 0.5995]);
    }

    #[test]
    fn the_last_frame_may_have_no_duration() {
        let listing = read(&format!("{FACTS}0,0,0,0,1,0x1\n0,100,100,0,1,0x1\n")).unwrap();
        assert_eq!(listing.times().unwrap().times.duration_s(), 0.2);
    }

    #[test]
    fn lies_are_refused() {
        for packets in [
            "0, 0, NOPTS, 1, 1, 0x0",
            "1, 0, 0, 1, 1, 0x0",
            "0, 0, 0, -1, 1, 0x0",
            "0, 0, 9223372036854775807, 1, 1, 0x0",
            "0, 0, -9223372036854775808, 1, 1, 0x0",
            "0, 0, 99999999999999999999, 1, 1, 0x0",
            "0, 0, 0, 1, 1, 0x0, F=0xZ",
            "0, 0, 0, 1",
            "",
            "0,0,0,1,1,0x0\n0,0,0,1,1,0x0\n0,0,0,1,1,0x0\n0,0,0,1,1,0x0\n0,0,0,1,1,0x0",
            "#dimensions 0: -1x48",
            "#dimensions 0: 64",
            "#dimensions 0: 0x48",
            "#tb 0: 1/0",
            "#tb 0: 4294967296/1",
        ] {
            assert!(read(&format!("{FACTS}{packets}\n")).is_err(), "{packets}");
        }
        assert!(read(&"#x\n".repeat(65)).is_err());
        assert_eq!(read(FACTS).unwrap().times(), Err(VideoError::NoFrames));
        assert!(read("0,0,0,1,1,0x0\n").unwrap().times().is_err());
        assert!(read("").unwrap().size().is_err());
        let discarded = read(&format!("{FACTS}0,0,0,1,1,0x0,F=0x4\n")).unwrap();
        assert_eq!(discarded.times(), Err(VideoError::NoFrames));
    }
}
