//! A video as it is sent: a file, or pictures one by one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use lockstep_proto::v1;

use crate::{Image, ImageError, MediaId};

/// A video's file or frames, what is taken of it, and the size that the model sees it at.
#[derive(Debug, Clone, PartialEq)]
pub struct Video {
    source: Source,
    fps: Option<f64>,
    max_frames: Option<u32>,
    min_pixels: Option<u32>,
    max_pixels: Option<u32>,
    total_pixels: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
enum Source {
    File(Bytes, Option<MediaId>),
    Frames { frames: Vec<Bytes>, timestamps_s: Vec<f64>, rate: Option<f64> },
}

/// Why files cannot be sent as a video.
#[derive(Debug, thiserror::Error)]
pub enum VideoError {
    /// The file or folder could not be read.
    #[error("cannot read the video {path}: {error}")]
    Read {
        /// The file or folder.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The file begins like no video.
    #[error(
        "{path} is not a video: its first bytes are not those of an MP4, GIF, WebP, WebM, AVI, FLV, Ogg or MPEG file"
    )]
    Format {
        /// The file.
        path: String,
    },
    /// A folder without files.
    #[error("{path} holds no pictures to send as frames")]
    NoFrames {
        /// The folder.
        path: String,
    },
    /// A file of the folder is no picture.
    #[error(transparent)]
    Frame(#[from] ImageError),
}

impl Video {
    /// A video from the bytes of its file: MP4 (H.264), GIF or animated WebP; others where the server has an ffmpeg.
    pub fn new(data: impl Into<Bytes>) -> Self {
        Video::of(Source::File(data.into(), None))
    }

    /// A video from a file. A file whose first bytes are not those of a video is refused here, before it travels.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, VideoError> {
        let path = path.as_ref();
        let data = fs::read(path).map_err(|error| unreadable(path, error))?;
        if !looks_like_a_video(&data) {
            return Err(VideoError::Format { path: path.display().to_string() });
        }
        Ok(Video::new(data))
    }

    /// A video from pictures' files, `rate` of them a second. All are taken as they are.
    pub fn frames<T: Into<Bytes>>(frames: impl IntoIterator<Item = T>, rate: f64) -> Self {
        let frames = frames.into_iter().map(Into::into).collect();
        Video::of(Source::Frames { frames, timestamps_s: Vec::new(), rate: Some(rate) })
    }

    /// A video from pictures' files, each with the second at which it is shown. All are taken as they are.
    pub fn frames_at<T: Into<Bytes>>(frames: impl IntoIterator<Item = (f64, T)>) -> Self {
        let (timestamps_s, frames) = frames.into_iter().map(|(time, frame)| (time, frame.into())).unzip();
        Video::of(Source::Frames { frames, timestamps_s, rate: None })
    }

    /// A video from the pictures of a folder in the order of their names, byte by byte, `rate` of them a second. Folders in
    /// it and files whose names begin with a dot are left out; any other file must be a picture.
    pub fn open_frames(folder: impl AsRef<Path>, rate: f64) -> Result<Self, VideoError> {
        let folder = folder.as_ref();
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(|error| unreadable(folder, error))? {
            let entry = entry.map_err(|error| unreadable(folder, error))?;
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !is_hidden && !entry.path().is_dir() {
                paths.push(entry.path());
            }
        }
        if paths.is_empty() {
            return Err(VideoError::NoFrames { path: folder.display().to_string() });
        }
        paths.sort_unstable_by(|a: &PathBuf, b| {
            a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes())
        });
        let frames = paths.iter().map(|path| Ok(Image::open(path)?.data().clone()));
        Ok(Video::frames(frames.collect::<Result<Vec<_>, VideoError>>()?, rate))
    }

    fn of(source: Source) -> Self {
        let (min_pixels, max_pixels, total_pixels) = (None, None, None);
        Video { source, fps: None, max_frames: None, min_pixels, max_pixels, total_pixels }
    }

    /// Send 32 bytes in place of the file, which is uploaded when the server does not have it. For videos that are sent often, as
    /// in a conversation. Frames that are given one by one are sent as they are.
    pub fn by_id(mut self) -> Self {
        if let Source::File(file, id) = &mut self.source {
            *id = Some(MediaId::of(file));
        }
        self
    }

    /// The file, if it is sent by its id.
    pub(crate) fn file_by_id(&self) -> Option<&Bytes> {
        match &self.source {
            Source::File(file, Some(_)) => Some(file),
            Source::File(_, None) | Source::Frames { .. } => None,
        }
    }

    /// Take this many frames per second of a file.
    pub fn fps(mut self, fps: f64) -> Self {
        self.fps = Some(fps);
        self
    }

    /// Take at most this many frames of a file.
    pub fn max_frames(mut self, frames: u32) -> Self {
        self.max_frames = Some(frames);
        self
    }

    /// Enlarge each frame to at least this many pixels.
    pub fn min_pixels(mut self, pixels: u32) -> Self {
        self.min_pixels = Some(pixels);
        self
    }

    /// Reduce each frame to at most this many pixels.
    pub fn max_pixels(mut self, pixels: u32) -> Self {
        self.max_pixels = Some(pixels);
        self
    }

    /// Reduce all frames to at most this many pixels together, two neighbours counted as one.
    pub fn total_pixels(mut self, pixels: u64) -> Self {
        self.total_pixels = Some(pixels);
        self
    }

    /// The video as it travels.
    pub(crate) fn to_wire(&self) -> v1::Video {
        let source = match &self.source {
            Source::File(_, Some(id)) => v1::video::Source::MediaId(id.to_wire()),
            Source::File(data, None) => v1::video::Source::Data(data.clone()),
            Source::Frames { frames, timestamps_s, rate } => v1::video::Source::Frames(v1::VideoFrames {
                frames: frames.clone(),
                timestamps_s: timestamps_s.clone(),
                rate: *rate,
            }),
        };
        v1::Video {
            source: Some(source),
            fps: self.fps,
            max_frames: self.max_frames,
            min_pixels: self.min_pixels,
            max_pixels: self.max_pixels,
            total_pixels: self.total_pixels,
        }
    }
}

fn unreadable(path: &Path, error: io::Error) -> VideoError {
    VideoError::Read { path: path.display().to_string(), error }
}

fn looks_like_a_video(data: &[u8]) -> bool {
    let is_riff = data.starts_with(b"RIFF") && matches!(data.get(8..12), Some(b"WEBP" | b"AVI "));
    // Names of the boxes that MP4 files begin with.
    let is_mp4 = matches!(
        data.get(4..8),
        Some(b"ftyp" | b"styp" | b"moov" | b"moof" | b"mdat" | b"free" | b"skip" | b"wide")
    );
    // Packets of an MPEG transport stream have 188 bytes.
    let is_stream = [0, 188, 376].iter().all(|at| data.get(*at) == Some(&b'G'));
    let others: [&[u8]; 4] = [b"GIF8", b"\x1a\x45\xdf\xa3", b"FLV\x01", b"OggS"];
    is_riff || is_mp4 || is_stream || others.iter().any(|head| data.starts_with(head))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_said_travels() {
        let wire =
            Video::new("film").fps(0.5).max_frames(8).min_pixels(1).max_pixels(2).total_pixels(3).to_wire();
        let expected = v1::Video {
            source: Some(v1::video::Source::Data("film".into())),
            fps: Some(0.5),
            max_frames: Some(8),
            min_pixels: Some(1),
            max_pixels: Some(2),
            total_pixels: Some(3),
        };
        assert_eq!(wire, expected);
        let by_id = Video::new("film").by_id();
        assert_eq!(by_id.to_wire().source, Some(v1::video::Source::MediaId(MediaId::of(b"film").to_wire())));
        assert_eq!(by_id.file_by_id(), Some(&Bytes::from("film")));
        let sent = |video: Video| match video.to_wire().source {
            Some(v1::video::Source::Frames(frames)) => frames,
            other => panic!("{other:?}"),
        };
        let frames = vec![Bytes::from("a"), Bytes::from("b")];
        let at_rate = v1::VideoFrames { frames: frames.clone(), timestamps_s: vec![], rate: Some(29.97) };
        assert_eq!(sent(Video::frames(["a", "b"], 29.97)), at_rate);
        let at_times = v1::VideoFrames { frames, timestamps_s: vec![0.5, 2.0], rate: None };
        assert_eq!(sent(Video::frames_at([(0.5, "a"), (2.0, "b")])), at_times);
    }

    #[test]
    fn the_pictures_of_a_folder_are_frames_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, data: &str| fs::write(folder.path().join(name), data).unwrap();
        for name in ["b.gif", "a10.gif", "a2.gif"] {
            write(name, &format!("GIF89a {name}"));
        }
        write(".hidden", "no picture");
        fs::create_dir(folder.path().join("a0")).unwrap();
        let Source::Frames { frames, rate, .. } = Video::open_frames(folder.path(), 2.0).unwrap().source
        else {
            panic!("frames were opened")
        };
        assert_eq!(
            (frames, rate),
            (["a10", "a2", "b"].map(|name| Bytes::from(format!("GIF89a {name}.gif"))).to_vec(), Some(2.0))
        );

        write("notes.txt", "no picture");
        let error = Video::open_frames(folder.path(), 2.0).unwrap_err().to_string();
        assert!(error.contains("notes.txt is not a picture"), "{error}");
        let error = Video::open_frames(folder.path().join("a0"), 2.0).unwrap_err().to_string();
        assert!(error.contains("a0 holds no pictures"), "{error}");
        let error = Video::open_frames(folder.path().join("none"), 2.0).unwrap_err().to_string();
        assert!(error.contains("none: No such file"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_video_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("film.mp4");
        for head in [
            &b"\0\0\0\x20ftypisom"[..],
            b"GIF89a",
            b"RIFF....WEBP",
            b"RIFF....AVI ",
            b"\x1a\x45\xdf\xa3 webm",
            b"OggS",
            &b"G".repeat(400),
        ] {
            fs::write(&path, head).unwrap();
            assert!(Video::open(&path).is_ok(), "{head:?}");
        }
        for head in [&b""[..], b"\x89PNG\r\n\x1a\n", b"RIFF....WAVE", b"Go"] {
            fs::write(&path, head).unwrap();
            let error = Video::open(&path).unwrap_err().to_string();
            assert!(error.contains("film.mp4 is not a video"), "{error}");
        }
    }
}
