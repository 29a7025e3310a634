//! The verb `decode`: a process that decodes one video and can do nothing else.
//!
//! It reads a [`Job`] from standard input, gives up what decoding does not take, and writes [`READY`] to standard output, with
//! what is in force; or [`BROKEN`] and why not. Then it reads the video's file, and writes the frames, at the model's size:
//! [`FRAME`] and the pixels of each, then [`DONE`]; or [`FAULT`] and what is wrong. Its parent is the server, which trusts
//! nothing that comes back but its length. What happens before [`READY`] is nobody's fault but the server's.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::confine::{Bounds, confine};
use super::error::{VideoError, VideoLimits, malformed};
use super::file::{Frame, Video};
use crate::media::resize::resize;

/// Comes before the pixels of a frame.
pub(super) const FRAME: u8 = 1;
/// Comes after the last frame.
pub(super) const DONE: u8 = 2;
/// Comes before the length of what is wrong with the video, in two bytes, and that in words.
pub(super) const FAULT: u8 = 3;
/// Comes before what is in force, in two bytes.
pub(super) const READY: u8 = 4;
/// Comes before the length of what is wrong with the process, in two bytes, and that in words.
pub(super) const BROKEN: u8 = 5;

/// The most bytes of a job without its file.
const MAX_JOB_BYTES: u32 = 1 << 20;
/// Memory for the program itself and for a decoder of the largest frames, beside the file.
const MEMORY_BYTES: u64 = 1 << 30;

/// What is to be decoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Job {
    /// The process that waits for the frames.
    pub(super) parent: u32,
    /// Size of the file, which follows.
    pub(super) file_bytes: u64,
    /// Frames to give, in order, each once.
    pub(super) indices: Vec<usize>,
    /// Width and height in pixels to give them in.
    pub(super) size: (u32, u32),
    /// What is decoded at all.
    pub(super) limits: VideoLimits,
    /// Seconds that the processor may work on it.
    pub(super) cpu_seconds: u64,
}

impl Job {
    /// The job as it is sent: its length in four bytes, then itself.
    pub(super) fn message(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).expect("numbers and lists");
        let length = u32::try_from(json.len()).expect("at most a few thousand numbers");
        [&length.to_le_bytes()[..], &json[..]].concat()
    }

    fn read(input: &mut impl Read) -> io::Result<Self> {
        let mut length = [0; 4];
        input.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > MAX_JOB_BYTES {
            return Err(io::Error::other(format!("a job of {length} bytes")));
        }
        let mut json = vec![0; length as usize];
        input.read_exact(&mut json)?;
        Ok(serde_json::from_slice(&json)?)
    }
}

/// Does one job from standard input, after giving up what it does not take.
///
/// # Errors
/// There is no job, nobody to give frames to, or a limit that cannot be set.
pub fn decode_from_stdin() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let ready = Job::read(&mut input).and_then(|job| {
        let layers = confine(Bounds {
            parent: job.parent,
            memory_bytes: MEMORY_BYTES.saturating_add(job.file_bytes.saturating_mul(2)),
            cpu_seconds: job.cpu_seconds,
        })?;
        Ok((job, layers))
    });
    let (job, layers) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            say(&mut output, BROKEN, &error.to_string())?;
            output.flush()?;
            return Err(error);
        }
    };
    output.write_all(&[READY])?;
    output.write_all(&layers.to_bytes())?;
    // Whatever becomes of this process from here on, the server knows that it was ready.
    output.flush()?;
    work(&job, &mut input, &mut output)?;
    output.flush()
}

/// Writes what is wrong.
pub(super) fn say(output: &mut impl Write, kind: u8, words: &str) -> io::Result<()> {
    let length = u16::try_from(words.len()).unwrap_or(u16::MAX);
    output.write_all(&[kind])?;
    output.write_all(&length.to_le_bytes())?;
    output.write_all(&words.as_bytes()[..usize::from(length)])
}

/// Does a job. What is wrong with the video goes to `output`; an error is one of reading or writing.
fn work(job: &Job, input: &mut impl Read, output: &mut impl Write) -> io::Result<()> {
    let mut file = Vec::with_capacity(usize::try_from(job.file_bytes).map_err(io::Error::other)?);
    input.take(job.file_bytes).read_to_end(&mut file)?;
    let mut written = Ok(());
    let decoded = Video::open(file, &job.limits).and_then(|video| {
        if job.indices.last().is_some_and(|last| *last >= video.header().times.num_frames()) {
            return Err(malformed("it has fewer frames than it said"));
        }
        video.decode(&job.indices, |_, frame| {
            let Frame { width, height, pixels } = frame;
            let pixels = resize(pixels, (width, height), job.size).map_err(VideoError::Malformed)?;
            written = output.write_all(&[FRAME]).and_then(|()| output.write_all(&pixels));
            // Nobody reads any more: any fault ends the decoding.
            if written.is_err() { Err(VideoError::NoFrames) } else { Ok(()) }
        })
    });
    written?;
    match decoded {
        Ok(()) => output.write_all(&[DONE]),
        Err(fault) => say(output, FAULT, &fault.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::mp4_writer::{MovieSpec, movie};
    use super::*;

    fn job(file: &[u8]) -> Job {
        Job {
            parent: 1,
            file_bytes: file.len() as u64,
            indices: vec![0, 2],
            size: (28, 56),
            limits: VideoLimits::default(),
            cpu_seconds: 1,
        }
    }

    fn worked(job: &Job, file: &[u8]) -> Vec<u8> {
        let mut output = Vec::new();
        work(job, &mut &file[..], &mut output).unwrap();
        output
    }

    #[test]
    fn jobs_travel() {
        let job = job(b"123");
        let message = job.message();
        assert_eq!(Job::read(&mut &message[..]).unwrap(), job);
        assert!(Job::read(&mut &message[..10]).is_err());
        assert!(Job::read(&mut &u32::MAX.to_le_bytes()[..]).is_err());
    }

    #[test]
    fn frames_come_in_the_size_that_is_asked_for() {
        let file = super::super::file::tests::gif(4);
        let output = worked(&job(&file), &file);
        let frame = 28 * 56 * 3;
        assert_eq!(output.len(), 2 * (1 + frame) + 1);
        assert_eq!((output[0], output[1 + frame], output[2 * (1 + frame)]), (FRAME, FRAME, DONE));
        assert!(output[1..=frame].iter().all(|sample| *sample == 0xF0));
    }

    #[test]
    fn faults_come_in_words() {
        for (file, indices, fault) in [
            (b"hello".to_vec(), vec![0], "this is not a video: give MP4, GIF or animated WebP"),
            (
                movie(&MovieSpec::default()),
                vec![0],
                "the video cannot be decoded: its sequence parameter set is broken",
            ),
            (
                super::super::file::tests::gif(2),
                vec![0, 2],
                "the video cannot be decoded: it has fewer frames than it said",
            ),
        ] {
            let output = worked(&Job { indices, ..job(&file) }, &file);
            assert_eq!(output[0], FAULT);
            assert_eq!(usize::from(u16::from_le_bytes([output[1], output[2]])), fault.len());
            assert_eq!(String::from_utf8_lossy(&output[3..]), fault);
        }
    }
}
