//! Decoding videos in child processes: a file that brings its decoder down costs its request only.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Once};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};

use super::child::{BROKEN, DONE, FAULT, FRAME, Job, READY};
use super::confine::{Force, Layers};
use super::error::{VideoError, VideoLimits};
use super::file::Video;
use super::size::VideoSize;

/// Processes, one after the other, that try to decode one video where they are killed.
const MAX_PROCESSES: u32 = 3;

/// Where videos are decoded.
#[derive(Debug, Clone)]
pub struct VideoDecoder {
    /// The program that has the verb `decode`, and its first arguments.
    pub command: Vec<OsString>,
    /// What is decoded at all.
    pub limits: VideoLimits,
    /// Seconds that the processor may work on one video.
    pub max_cpu_seconds: u64,
    told: Arc<Once>,
}

/// Why there are no frames.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The video is at fault.
    #[error(transparent)]
    Video(#[from] VideoError),
    /// The machine has no room for a process.
    #[error("there is no room to decode a video: {0}")]
    NoRoom(String),
    /// The process was killed, again and again.
    #[error("the process that decodes a video was killed: {0}")]
    Killed(ExitStatus),
    /// No process could be started, made ready, or spoken to.
    #[error("the process that decodes videos: {0}")]
    Process(#[from] io::Error),
}

impl VideoDecoder {
    /// Decodes by the verb `decode` of a program.
    pub fn new(command: Vec<OsString>, limits: VideoLimits, max_cpu_seconds: u64) -> Self {
        Self { command, limits, max_cpu_seconds, told: Arc::new(Once::new()) }
    }

    /// Decodes frames of a video at the size for the model: the pixels of the frames of these indices, one after another,
    /// rows top to bottom, three bytes (red, green, blue) a pixel. The indices are in order, and of frames that there are.
    ///
    /// Dropping the future ends the process: that is how deadlines are kept. The caller bounds how many run at once, and
    /// the memory of the frames ([`VideoSize::pixel_bytes`]). A process that is killed is not the video's fault: another one begins
    /// anew.
    ///
    /// # Errors
    /// A video that cannot be decoded, whatever became of its process once it was ready; a process that did not get so
    /// far; processes that were killed.
    pub async fn decode(
        &self,
        video: &Video,
        indices: &[usize],
        size: &VideoSize,
    ) -> Result<Vec<u8>, DecodeError> {
        let mut processes = 1;
        loop {
            match self.decode_once(video, indices, size).await {
                Err(error @ DecodeError::Killed(_)) if processes < MAX_PROCESSES => tracing::warn!("{error}"),
                decoded => return decoded,
            }
            processes += 1;
        }
    }

    async fn decode_once(
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
        let mut child = spawn(&self.command, &["decode".into()], Stdio::piped())?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("it has no standard streams").into());
        };
        send(input, &job.message(), video.file()).await?;
        let (layers, received) = receive(output, indices, size).await?;
        if let Some(layers) = layers {
            self.told.call_once(|| tell(layers));
        }
        match received {
            Received::Frames(pixels) => return Ok(pixels),
            Received::Fault(words) => return Err(VideoError::Decoding(words).into()),
            Received::Broken(words) => return Err(io::Error::other(words).into()),
            Received::Nonsense => {
                return Err(VideoError::Decoding("the video's decoder gave no frames".into()).into());
            }
            Received::End => {}
        }
        Err(ended(child.wait().await?, layers.is_some(), self.max_cpu_seconds))
    }
}

/// What it means that a process ended before it said so.
pub(super) fn ended(status: ExitStatus, was_ready: bool, cpu_seconds: u64) -> DecodeError {
    match status.signal() {
        // Sent by nobody but a kernel that is short of memory.
        Some(libc::SIGKILL) => DecodeError::Killed(status),
        _ if !was_ready => io::Error::other(format!("it ended before it was ready: {status}")).into(),
        Some(libc::SIGXCPU) => {
            VideoError::Decoding(format!("decoding the video took more than {cpu_seconds} s of work")).into()
        }
        _ => VideoError::Decoding(format!("the video's decoder ended: {status}")).into(),
    }
}

/// Starts a process of a program, which is killed when nobody waits for it any more.
pub(super) fn spawn(
    program: &[OsString],
    arguments: &[OsString],
    input: Stdio,
) -> Result<Child, DecodeError> {
    let (program, first) = program.split_first().ok_or_else(|| io::Error::other("no program is named"))?;
    let mut command = Command::new(program);
    command.args(first).args(arguments).env_clear();
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    command.spawn().map_err(|error| match is_shortage(&error) {
        true => DecodeError::NoRoom(error.to_string()),
        false => error.into(),
    })
}

/// Whether a process could not be started because others have what it takes.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::ENOMEM))
}

/// Tells the operator what keeps processes that decode from files, network and system calls.
fn tell(Layers { landlock, seccomp }: Layers) {
    if (landlock, seccomp) == (Force::Whole, Force::Whole) {
        tracing::info!("processes that decode videos are confined by limits, Landlock and seccomp");
    } else {
        tracing::warn!(
            ?landlock,
            ?seccomp,
            "this kernel confines processes that decode videos less than it could"
        );
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
    /// Something is wrong with the video.
    Fault(String),
    /// Something is wrong with the process.
    Broken(String),
    /// What no decoder of ours says.
    Nonsense,
    /// It ended.
    End,
}

/// What a process says first.
pub(super) enum Start {
    /// That it is confined, and by what.
    Ready(Layers),
    /// What keeps it from that.
    Broken(String),
    /// Nothing.
    End,
}

/// What a process says before it looks at what a client sent.
pub(super) async fn started(output: &mut (impl AsyncRead + Unpin)) -> io::Result<Start> {
    let mut layers = [0; 2];
    match next(output).await? {
        Some(READY) if whole(output.read_exact(&mut layers).await)? => {}
        Some(BROKEN) => return Ok(words(output).await?.map_or(Start::End, Start::Broken)),
        Some(READY) | None => return Ok(Start::End),
        Some(_) => return Ok(Start::Broken("it said something else than that it is ready".into())),
    }
    let nothing = || Start::Broken("it does not say what confines it".into());
    Ok(Layers::from_bytes(layers).map_or_else(nothing, Start::Ready))
}

/// All that a process says: what confines it, if it got so far, and what came of its work.
async fn receive(
    mut output: impl AsyncRead + Unpin,
    indices: &[usize],
    size: &VideoSize,
) -> io::Result<(Option<Layers>, Received)> {
    match started(&mut output).await? {
        Start::Ready(layers) => Ok((Some(layers), frames(output, indices, size).await?)),
        Start::Broken(words) => Ok((None, Received::Broken(words))),
        Start::End => Ok((None, Received::End)),
    }
}

async fn frames(
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
        match next(&mut output).await? {
            Some(FRAME) => {
                let begin = pixels.len();
                pixels.resize(begin + frame_bytes, 0);
                if !whole(output.read_exact(&mut pixels[begin..]).await)? {
                    return Ok(Received::End);
                }
            }
            Some(FAULT) => return Ok(words(output).await?.map_or(Received::Nonsense, Received::Fault)),
            Some(_) => return Ok(Received::Nonsense),
            None => return Ok(Received::End),
        }
    }
    Ok(match next(&mut output).await? {
        Some(DONE) => Received::Frames(pixels),
        Some(_) => Received::Nonsense,
        None => Received::End,
    })
}

/// The next byte, if there is one.
pub(super) async fn next(output: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<u8>> {
    let mut byte = [0];
    Ok(whole(output.read_exact(&mut byte).await)?.then_some(byte[0]))
}

/// Words after their length, if they are all there and are words.
async fn words(mut output: impl AsyncRead + Unpin) -> io::Result<Option<String>> {
    let mut length = [0; 2];
    if !whole(output.read_exact(&mut length).await)? {
        return Ok(None);
    }
    let mut words = vec![0; usize::from(u16::from_le_bytes(length))];
    let is_whole = whole(output.read_exact(&mut words).await)?;
    Ok(is_whole.then_some(words).and_then(|words| String::from_utf8(words).ok()))
}

/// Whether all was read; `false` if it ended before.
pub(super) fn whole(read: io::Result<usize>) -> io::Result<bool> {
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

    /// What is made of what comes back from a process that was ready.
    async fn received(output: &[u8], indices: &[usize]) -> String {
        let ready = [&[READY, 2, 1][..], output].concat();
        let (layers, received) = receive(&ready[..], indices, &SIZE).await.unwrap();
        assert_eq!(layers, Some(Layers { landlock: Force::Whole, seccomp: Force::Part }));
        match received {
            Received::Frames(pixels) => format!("{pixels:?}"),
            Received::Fault(words) => words,
            Received::Broken(words) => panic!("{words}"),
            Received::Nonsense => "nonsense".into(),
            Received::End => "end".into(),
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
            assert_eq!(received(&frames[..end], &[3, 7]).await, "end", "{end}");
        }
        assert_eq!(received(&frames, &[3]).await, "nonsense");
        assert_eq!(received(&[9; 20], &[3]).await, "nonsense");
        assert_eq!(received(&[FAULT, 2, 0, 0xFF, 0xFF], &[3]).await, "nonsense");
        assert_eq!(received(&[FAULT, 2, 0, b'n'], &[3]).await, "nonsense");
    }

    #[tokio::test]
    async fn nothing_counts_before_it_is_ready() {
        for (said, broken) in [
            (&[][..], None),
            (&[READY, 2], None),
            (&[BROKEN, 2, 0, b'n'], None),
            (&[BROKEN, 2, 0, b'n', b'o'], Some("no")),
            (&[READY, 2, 3, FRAME], Some("it does not say what confines it")),
            (&[FRAME, 1, 1, 1, 1, 1, 1, DONE], Some("it said something else than that it is ready")),
        ] {
            let (layers, received) = receive(said, &[3], &SIZE).await.unwrap();
            assert_eq!(layers, None);
            match (received, broken) {
                (Received::Broken(words), Some(broken)) => assert_eq!(words, broken),
                (Received::End, None) => {}
                _ => panic!("{said:?}"),
            }
        }
    }

    /// What becomes of a video whose process does this.
    async fn became(command: &str) -> DecodeError {
        let video = Video::open(gif(4), &VideoLimits::default()).unwrap();
        let command = ["/bin/sh", "-c", command].iter().map(OsString::from).collect();
        let decoder = VideoDecoder::new(command, VideoLimits::default(), 10);
        decoder.decode(&video, &[0, 1], &SIZE).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_video_outlives_a_process_that_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let tries = dir.path().join("tries");
        let once_more = |end: &str| {
            format!("echo >> {0}; [ $(wc -l < {0}) -gt 2 ] && {end}; kill -KILL $$", tries.display())
        };
        let error = became(&once_more("exit 3")).await;
        assert!(matches!(error, DecodeError::Process(_)), "the third process ended by itself: {error}");
        std::fs::remove_file(&tries).unwrap();
        let error = became(&once_more("kill -KILL $$")).await;
        assert!(matches!(error, DecodeError::Killed(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&tries).unwrap().len(), MAX_PROCESSES as usize);
    }

    #[tokio::test]
    async fn a_process_that_dies_is_the_videos_fault_once_it_was_ready() {
        for (command, how) in [
            ("kill -SEGV $$", "signal: 11"),
            ("kill -ABRT $$", "signal: 6"),
            ("kill -XCPU $$", "more than 10 s of work"),
            ("exit 3", "exit status: 3"),
            ("exit 0", "exit status: 0"),
        ] {
            let error = became(&format!("printf '\\004\\002\\002'; {command}")).await;
            assert!(
                matches!(&error, DecodeError::Video(VideoError::Decoding(words)) if words.contains(how)),
                "{error}"
            );
            let error = became(command).await;
            assert!(matches!(error, DecodeError::Process(_)), "{error}");
        }
        for command in ["kill -KILL $$", "printf '\\004\\002\\002'; kill -KILL $$"] {
            let error = became(command).await;
            assert!(matches!(error, DecodeError::Killed(_)), "{error}");
        }
        let error = became("printf '\\005\\002\\000no'").await;
        assert!(matches!(&error, DecodeError::Process(error) if error.to_string() == "no"), "{error}");
    }

    #[tokio::test]
    async fn a_process_that_cannot_be_started_is_the_servers_fault() {
        let video = Video::open(gif(4), &VideoLimits::default()).unwrap();
        let decoder = VideoDecoder::new(vec!["/nowhere".into()], VideoLimits::default(), 10);
        let error = decoder.decode(&video, &[0], &SIZE).await.unwrap_err();
        assert!(matches!(error, DecodeError::Process(_)));
        for (code, expected) in [(libc::EMFILE, true), (libc::EAGAIN, true), (libc::ENOENT, false)] {
            assert_eq!(is_shortage(&io::Error::from_raw_os_error(code)), expected);
        }
    }
}
