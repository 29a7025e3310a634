//! Videos of other codecs and containers, by an ffmpeg that the operator names.
//!
//! It runs three times for a video, each time in a process that is confined before it is ffmpeg (`launch.rs`), with the
//! file, in memory, as its standard input: it lists the packets without decoding them, it decodes one frame, which tells
//! the size that upright frames have, and after the video is admitted it decodes all of it and sends the frames that are
//! taken. What it says is text and bytes whose number is known.

mod listing;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout};

use super::confine::Layers;
use super::container::Container;
use super::error::{VideoLimits, malformed};
use super::file::VideoHeader;
use super::launch::{ConfineArgs, NOT_STARTED};
use super::prepare::PrepareError;
use super::process::{DecodeError, Start, ended, next, spawn, started, whole};
use super::size::VideoSize;
use crate::media::resize::resize;
use crate::workers::Place;
use listing::{Listing, MAX_LINE_BYTES, Times};

/// Address space: ffmpeg itself, and as many frames of the largest size as decoders keep.
const MEMORY_BYTES: u64 = 2 << 30;
/// How long it may take to say its version.
const CHECK_TIME: Duration = Duration::from_secs(20);
/// Standard input as a file, which can be read in any order: MP4 may have its header at the end. Versions before 6 have no
/// better name for it.
const INPUT: &str = "file:/proc/self/fd/0";

/// Decodes what the server does not decode by itself.
#[derive(Debug, Clone)]
pub struct Ffmpeg {
    /// The program that has the verb `confine`, and its first arguments.
    command: Vec<OsString>,
    /// ffmpeg: an absolute path without links.
    program: PathBuf,
    /// What is decoded at all.
    limits: VideoLimits,
    /// Seconds that the processor may work on one video, each time.
    max_cpu_seconds: u64,
}

/// A video that ffmpeg has read and not decoded yet.
#[derive(Debug)]
pub(super) struct Film {
    ffmpeg: Ffmpeg,
    /// The file, which nobody can change.
    input: File,
    container: Container,
    /// What ffmpeg says of it.
    pub(super) header: VideoHeader,
    /// Of each frame that is shown, a second of the file that comes before it and after the frame before.
    starts_s: Vec<f64>,
}

/// An ffmpeg that is at work.
struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
    layers: Layers,
}

impl Ffmpeg {
    /// Runs the ffmpeg `program` by the verb `confine` of a program.
    pub fn new(command: Vec<OsString>, program: PathBuf, limits: VideoLimits, max_cpu_seconds: u64) -> Self {
        Self { command, program, limits, max_cpu_seconds }
    }

    /// Asks it for its version, in a process that is confined as all others will be, and tells the operator.
    ///
    /// # Errors
    /// No answer, or that of another program.
    pub async fn check(&self) -> anyhow::Result<()> {
        let asking = async {
            let mut running = self.run(vec!["-version".into()], Stdio::null()).await?;
            let mut line = Vec::new();
            (&mut running.output).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await?;
            Ok::<_, DecodeError>((running.layers, String::from_utf8_lossy(&line).into_owned()))
        };
        let asked = tokio::time::timeout(CHECK_TIME, asking).await;
        let (Layers { landlock, seccomp }, line) =
            asked.map_err(|_| anyhow!("it does not answer"))?.context("it cannot be run")?;
        let version = line.strip_prefix("ffmpeg version ").and_then(|rest| rest.split(' ').next());
        let version = version
            .context("confined, with its libraries in the system's folders, it does not say its version")?;
        tracing::info!(version, ?landlock, ?seccomp, "ffmpeg decodes videos of other codecs, confined");
        Ok(())
    }

    /// Reads what headers say: packets are listed, and one frame is decoded.
    ///
    /// # Errors
    /// A file that ffmpeg does not read, or that is over a limit; a process that is the server's fault or the machine's.
    pub(super) async fn open(
        &self,
        place: &Arc<Place>,
        file: Bytes,
        container: Container,
    ) -> Result<Film, PrepareError> {
        let input = place.run(move || in_memory(&file)).await?.map_err(|error| no_memory(&error))?;
        let copied = ["-c", "copy", "-f", "framecrc", "-"].map(OsString::from);
        let listing = self.list(&input, container, &copied).await?;
        let Times { times, starts_s } = listing.times()?;
        let num_frames = listing.num_frames();
        self.limits.check(listing.size()?, num_frames, times.duration_s())?;
        let decoded = ["-frames:v", "1", "-c:v", "rawvideo", "-f", "framecrc", "-"].map(OsString::from);
        let (width, height) = self.list(&input, container, &decoded).await?.size()?;
        self.limits.check((width, height), num_frames, times.duration_s())?;
        let decoded_pixels = u64::from(width) * u64::from(height) * num_frames as u64;
        let header = VideoHeader { width, height, times, decoded_pixels };
        Ok(Film { ffmpeg: self.clone(), input, container, header, starts_s })
    }

    /// What ffmpeg lists when it is given a file and these arguments of what to write.
    async fn list(
        &self,
        input: &File,
        container: Container,
        arguments: &[OsString],
    ) -> Result<Listing, DecodeError> {
        let mut running = self.run_on(input, container, arguments).await?;
        let mut listing = Listing::default();
        let mut line = Vec::new();
        loop {
            line.clear();
            (&mut running.output).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).await?;
            match line.split_last() {
                None => break,
                Some((b'\n', line)) => listing.push(&String::from_utf8_lossy(line), &self.limits)?,
                Some(_) => return Err(malformed("ffmpeg was interrupted").into()),
            }
        }
        self.end(running).await?;
        Ok(listing)
    }

    /// Gives ffmpeg a file.
    async fn run_on(
        &self,
        input: &File,
        container: Container,
        arguments: &[OsString],
    ) -> Result<Running, DecodeError> {
        let max_pixels = self.limits.max_frame_pixels;
        let demuxer = container.demuxer();
        // Nothing but the input is opened; times are those of the file; pictures on covers are no videos.
        let common = format!(
            "-nostdin -hide_banner -loglevel error -protocol_whitelist file -fflags +genpts -max_pixels {max_pixels} \
             -threads 1 -filter_threads 1 -copyts -f {demuxer} -i {INPUT} -map 0:V:0"
        );
        let arguments = common.split(' ').map(OsString::from).chain(arguments.iter().cloned()).collect();
        self.run(arguments, Stdio::from(input.try_clone()?)).await
    }

    async fn run(&self, arguments: Vec<OsString>, input: Stdio) -> Result<Running, DecodeError> {
        let args = ConfineArgs {
            parent: std::process::id(),
            memory_bytes: MEMORY_BYTES,
            cpu_seconds: self.max_cpu_seconds,
            command: [vec![self.program.clone().into()], arguments].concat(),
        };
        let mut child = spawn(&self.command, &args.to_arguments(), input)?;
        let output = child.stdout.take().ok_or_else(|| io::Error::other("it has no standard output"))?;
        let mut output = BufReader::new(output);
        match started(&mut output).await? {
            Start::Ready(layers) => Ok(Running { child, output, layers }),
            Start::Broken(words) => Err(io::Error::other(words).into()),
            Start::End => Err(ended(child.wait().await?, false, self.max_cpu_seconds)),
        }
    }

    /// Waits for the end of an ffmpeg that has said everything.
    async fn end(&self, mut running: Running) -> Result<(), DecodeError> {
        let status = running.child.wait().await?;
        match status.code() {
            Some(0) => Ok(()),
            Some(NOT_STARTED) => Err(io::Error::other("it could not become ffmpeg").into()),
            Some(_) => Err(malformed("ffmpeg cannot read it").into()),
            None => Err(ended(status, true, self.max_cpu_seconds)),
        }
    }
}

impl Film {
    /// Decodes frames of a video at the size for the model, as [`super::VideoDecoder::decode`] does. The frames are resized
    /// here, one at a time.
    ///
    /// # Errors
    /// As of [`Ffmpeg::open`], and a frame that is missing.
    pub(super) async fn decode(
        &self,
        place: &Arc<Place>,
        indices: &[usize],
        size: &VideoSize,
    ) -> Result<Vec<u8>, PrepareError> {
        let from = (self.header.width, self.header.height);
        let frame_bytes = u64::from(from.0) * u64::from(from.1) * 3;
        let frame_bytes = usize::try_from(frame_bytes).map_err(io::Error::other)?;
        let total = usize::try_from(size.pixel_bytes(indices.len())).map_err(io::Error::other)?;
        let starts: Vec<f64> = indices.iter().map(|index| self.starts_s[*index]).collect();
        let mut running =
            self.ffmpeg.run_on(&self.input, self.container, &frame_arguments(&starts, from)).await?;
        let mut pixels = Vec::with_capacity(total);
        for (at, start) in starts.iter().enumerate() {
            if at > 0 && starts[at - 1] == *start {
                pixels.extend_from_within(pixels.len() - total / indices.len()..);
                continue;
            }
            let mut frame = vec![0; frame_bytes];
            if !whole(running.output.read_exact(&mut frame).await)? {
                self.ffmpeg.end(running).await?;
                return Err(malformed("not all of its frames can be decoded").into());
            }
            let to = (size.width, size.height);
            pixels.extend(place.run(move || resize(frame, from, to)).await?.map_err(malformed)?);
        }
        if next(&mut running.output).await?.is_some() {
            // Where frames change their size, filters begin anew and take one more.
            return Err(malformed("it has more frames than it said, or of several sizes").into());
        }
        self.ffmpeg.end(running).await?;
        Ok(pixels)
    }
}

/// A file that processes can be given, which none of them can change.
fn in_memory(file: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut memory = File::from(memfd_create("lockstep-video", flags)?);
    memory.write_all(file)?;
    fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(memory)
}

fn no_memory(error: &io::Error) -> PrepareError {
    DecodeError::NoRoom(error.to_string()).into()
}

/// Arguments that make ffmpeg write the pixels of the frames that follow these seconds, each once, upright, in this size.
///
/// `select` counts the seconds that have passed, and takes a frame when there are more of them than when the last was taken.
/// A packet that is no frame, as encoders of VP8 make some, is thereby the frame after it.
fn frame_arguments(starts_s: &[f64], (width, height): (u32, u32)) -> Vec<OsString> {
    let passed = num_passed(starts_s);
    // Colours are converted as ffmpeg does it unless told otherwise, since the reference's decoders do so, too.
    // ffmpeg repeats and drops frames to keep a rate, and versions differ in how to forbid it; at one frame in 100,000
    // seconds, nothing of the kind happens.
    let filters = format!(
        "select='st(1,{passed});gt(ld(1),ld(0))+0*st(0,ld(1))',setpts=N*100000/TB,\
         scale={width}:{height}:flags=bicubic"
    );
    let output = "-r 1/100000 -c:v rawvideo -pix_fmt rgb24 -f rawvideo -";
    [OsString::from("-vf"), filters.into()].into_iter().chain(output.split(' ').map(OsString::from)).collect()
}

/// An expression for how many of these seconds have passed. Newer versions bound the depth of expressions: this one is as deep
/// as a tree of its terms.
fn num_passed(starts_s: &[f64]) -> String {
    match starts_s {
        [] => "0".into(),
        [start] => format!("gte(t,{start})"),
        _ => {
            let (earlier, later) = starts_s.split_at(starts_s.len() / 2);
            format!("({}+{})", num_passed(earlier), num_passed(later))
        }
    }
}
