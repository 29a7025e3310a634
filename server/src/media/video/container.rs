//! What a file that is not read here begins as: whether it is a video at all, and what ffmpeg shall read it as.

use super::boxes::is_mp4;
use super::error::VideoError;

/// Bytes between the beginnings of packets of an MPEG transport stream.
const TS_PACKET_BYTES: usize = 188;

/// A container that ffmpeg may be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    Mp4,
    Matroska,
    Avi,
    MpegTs,
    Flv,
    Ogg,
}

impl Container {
    /// What a file begins as.
    pub(super) fn of(file: &[u8]) -> Option<Self> {
        let packets = [0, TS_PACKET_BYTES, 2 * TS_PACKET_BYTES];
        if is_mp4(file) {
            Some(Self::Mp4)
        } else if file.starts_with(b"\x1A\x45\xDF\xA3") {
            Some(Self::Matroska)
        } else if file.starts_with(b"RIFF") && file.get(8..12) == Some(b"AVI ") {
            Some(Self::Avi)
        } else if file.starts_with(b"FLV\x01") {
            Some(Self::Flv)
        } else if file.starts_with(b"OggS") {
            Some(Self::Ogg)
        } else if packets.iter().all(|at| file.get(*at) == Some(&b'G')) {
            Some(Self::MpegTs)
        } else {
            None
        }
    }

    /// What ffmpeg shall read a file as that is refused with `error`, if it may take it.
    pub(super) fn for_ffmpeg(error: &VideoError, file: &[u8]) -> Option<Self> {
        match error {
            VideoError::UnsupportedCodec(_)
            | VideoError::UnsupportedContainer(_)
            | VideoError::Unsupported(_) => Self::of(file),
            _ => None,
        }
    }

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Mp4 => "MP4",
            Self::Matroska => "WebM or Matroska",
            Self::Avi => "AVI",
            Self::MpegTs => "MPEG transport stream",
            Self::Flv => "Flash video",
            Self::Ogg => "Ogg",
        }
    }

    /// ffmpeg's part that reads it. Naming one keeps a file from choosing among all of them, some of which open further
    /// files.
    pub(super) fn demuxer(self) -> &'static str {
        match self {
            Self::Mp4 => "mov",
            Self::Matroska => "matroska",
            Self::Avi => "avi",
            Self::MpegTs => "mpegts",
            Self::Flv => "flv",
            Self::Ogg => "ogg",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_by_their_first_bytes() {
        let mut stream = vec![0; 400];
        for packet in stream.chunks_mut(TS_PACKET_BYTES) {
            packet[0] = b'G';
        }
        for (file, container) in [
            (&b"\0\0\0\x20ftypisom"[..], Some(Container::Mp4)),
            (b"\x1A\x45\xDF\xA3\x9F", Some(Container::Matroska)),
            (b"RIFF\0\0\0\0AVI LIST", Some(Container::Avi)),
            (b"FLV\x01\x05", Some(Container::Flv)),
            (b"OggS\0", Some(Container::Ogg)),
            (&stream, Some(Container::MpegTs)),
            (b"RIFF\0\0\0\0WAVE", None),
            (b"GGGGGGGG", None),
            (b"#EXTM3U\nfile:///etc/passwd", None),
            (b"", None),
        ] {
            assert_eq!(Container::of(file), container, "{file:?}");
        }
    }

    #[test]
    fn what_is_broken_is_not_handed_on() {
        let file = b"\0\0\0\x20ftypisom";
        let codec = VideoError::UnsupportedCodec("HEVC".into());
        assert_eq!(Container::for_ffmpeg(&codec, file), Some(Container::Mp4));
        assert_eq!(Container::for_ffmpeg(&codec, b"GIF89a"), None);
        for error in [VideoError::NoFrames, VideoError::NotAVideo, VideoError::Malformed("no".into())] {
            assert_eq!(Container::for_ffmpeg(&error, file), None);
        }
    }
}
