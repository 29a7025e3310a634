//! Decoding videos in child processes: a file that brings its decoder down costs its request only.

use std::ffi::OsString;
use std::io;
use std::process::Stdio;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};

use super::child::{DONE, FAULT, FRAME, Job};
use super::error::{VideoError, VideoLimits};
use super::file::Video;
use super::size::VideoSize;

/// Where videos are decoded.
#[derive(Debug, Clone)]
pub struct VideoDecoder {
    /// The program that has the verb `decode`, and its first arguments.
    pub command: Vec<OsString>,
    /// What is decoded at all.
    pub limits: VideoLimits,
    /// Seconds that the processor may work on one video.
    pub max_cpu_seconds: u64,
}

/// Why there are no frames.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The video is at fault.
    #[error(transparent)]
    Video(#[from] VideoError),
    /// No process could be started, or spoken to.
    #[error("the process that decodes videos: {0}")]
    Process(#[from] io::Error),
}

impl VideoDecoder {
    /// Decodes frames of a video at the size for the model: the pixels of the frames of these indices, one after another,
    /// rows top to bottom, three bytes (red, green, blue) a pixel. The indices are in order, and of frames that there are.
    ///
    /// Dropping the future ends the process: that is how deadlines are kept. The caller bounds how many run at once, and the
    /// memory of the frames ([`VideoSize::pixel_bytes`]).
    ///
    /// # Errors
    /// A video that cannot be decoded, whatever became of its process.
    pub async fn decode(
        &self,
        video: &Video,
        indices: &[usize],
        size: &VideoSize,
    ) -> Result<Vec<u8>, DecodeError> {
        let mut distinct = indices.to_vec();
        distinct.dedup();
        let job = Job {
            parent: std::process::id(),
            file_bytes: video.file().len() as u64,
            indices: distinct,
            size: (size.width, size.height),
            limits: self.limits,
            cpu_seconds: self.max_cpu_seconds,
        };
        let mut child = self.spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("it has no standard streams").into());
        };
        send(input, &job.message(), video.file()).await?;
        let frames = receive(output, indices, size).await?;
        let status = child.wait().await?;
        match frames {
            Received::Frames(pixels) => Ok(pixels),
            Received::Fault(words) => Err(VideoError::Decoding(words).into()),
            Received::Nothing => {
                Err(VideoError::Decoding(format!("the video's decoder ended: {status}")).into())
            }
        }
    }

    fn spawn(&self) -> io::Result<Child> {
        let program = self.command.first().ok_or_else(|| io::Error::other("no program is named"))?;
        let mut command = Command::new(program);
        command.args(&self.command[1..]).arg("decode").env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        command.spawn()
    }
}

/// Sends a job. A process that ends before it has read all of it says why on its standard output.
async fn send(mut input: ChildStdin, job: &[u8], file: &[u8]) -> io::Result<()> {
    for part in [job, file] {
        match input.write_all(part).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}

/// What a process had to say.
enum Received {
    Frames(Vec<u8>),
    Fault(String),
    /// It ended, or spoke nonsense.
    Nothing,
}

async fn receive(
    mut output: impl AsyncRead + Unpin,
    indices: &[usize],
    size: &VideoSize,
) -> io::Result<Received> {
    let frame_bytes = usize::try_from(size.pixel_bytes(1)).map_err(io::Error::other)?;
    let total = frame_bytes.checked_mul(indices.len()).ok_or_else(|| io::Error::other("too many frames"))?;
    let mut pixels = Vec::with_capacity(total);
    for (at, index) in indices.iter().enumerate() {
        if at > 0 && indices[at - 1] == *index {
            pixels.extend_from_within(pixels.len() - frame_bytes..);
            continue;
        }
        match output.read_u8().await {
            Ok(FRAME) => {
                let begin = pixels.len();
                pixels.resize(begin + frame_bytes, 0);
                if !whole(output.read_exact(&mut pixels[begin..]).await)? {
                    return Ok(Received::Nothing);
                }
            }
            Ok(FAULT) => {
                let mut words = String::new();
                let length = output.read_u16_le().await.unwrap_or(0);
                let read = output.take(length.into()).read_to_string(&mut words).await;
                return Ok(read.map_or(Received::Nothing, |_| Received::Fault(words)));
            }
            _ => return Ok(Received::Nothing),
        }
    }
    Ok(match output.read_u8().await {
        Ok(DONE) => Received::Frames(pixels),
        _ => Received::Nothing,
    })
}

/// Whether all was read; `false` if it ended before.
fn whole(read: io::Result<usize>) -> io::Result<bool> {
    match read {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::gif;
    use super::*;

    const SIZE: VideoSize = VideoSize { width: 2, height: 1, grid: [1, 1, 1], num_tokens: 1 };

    async fn received(output: &[u8], indices: &[usize]) -> String {
        match receive(output, indices, &SIZE).await.unwrap() {
            Received::Frames(pixels) => format!("{pixels:?}"),
            Received::Fault(words) => words,
            Received::Nothing => "nothing".into(),
        }
    }

    #[tokio::test]
    async fn what_comes_back_is_taken_by_its_length() {
        let frames = [FRAME, 1, 1, 1, 1, 1, 1, FRAME, 2, 2, 2, 2, 2, 2, DONE];
        let both = "[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]";
        assert_eq!(received(&frames, &[3, 7]).await, both);
        assert_eq!(
            received(&frames, &[3, 7, 7]).await,
            "[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]"
        );
        assert_eq!(received(&[FAULT, 2, 0, b'n', b'o'], &[3]).await, "no");
        for end in 0..frames.len() {
            assert_eq!(received(&frames[..end], &[3, 7]).await, "nothing", "{end}");
        }
        assert_eq!(received(&frames, &[3]).await, "nothing");
        assert_eq!(received(&[9; 20], &[3]).await, "nothing");
        assert_eq!(received(&[FAULT, 2, 0, 0xFF, 0xFF], &[3]).await, "nothing");
    }

    fn decoder(command: &[&str]) -> VideoDecoder {
        VideoDecoder {
            command: command.iter().map(OsString::from).collect(),
            limits: VideoLimits::default(),
            max_cpu_seconds: 10,
        }
    }

    #[tokio::test]
    async fn a_process_that_dies_is_the_videos_fault() {
        let video = Video::open(gif(4), &VideoLimits::default()).unwrap();
        for (command, how) in
            [("kill -SEGV $$", "signal: 11"), ("exit 3", "exit status: 3"), ("exit 0", "exit status: 0")]
        {
            let error =
                decoder(&["/bin/sh", "-c", command]).decode(&video, &[0, 1], &SIZE).await.unwrap_err();
            assert!(
                matches!(&error, DecodeError::Video(VideoError::Decoding(words)) if words.contains(how)),
                "{error}"
            );
        }
        let error = decoder(&["/nowhere"]).decode(&video, &[0], &SIZE).await.unwrap_err();
        assert!(matches!(error, DecodeError::Process(_)));
    }
}
