//! Videos of other codecs and containers, decoded by a real ffmpeg: the one that LOCKSTEP_FFMPEG names, or that of the
//! system. Where there is none, these tests say so and pass.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use lockstep::media::video::{
    Ffmpeg, SamplingOptions, TokenBounds, VideoDecoder, VideoInput, VideoLimits, VideoOptions, VideoPreparer,
    VideoProcessor, VideoSource,
};
use lockstep::media::{
    Blame, MediaError, MediaPreparer, Medium, MediumInput, PictureLimits, PicturePreparer, PictureProcessor,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const LOCKSTEP: &str = env!("CARGO_BIN_EXE_lockstep");

fn ffmpeg() -> Option<PathBuf> {
    let named = std::env::var_os("LOCKSTEP_FFMPEG").map(PathBuf::from);
    let of_system = || {
        let folders = std::env::var_os("PATH")?;
        std::env::split_paths(&folders).map(|folder| folder.join("ffmpeg")).find(|path| path.is_file())
    };
    let found = named.or_else(of_system).map(|path| path.canonicalize().expect("LOCKSTEP_FFMPEG is there"));
    if found.is_none() {
        println!("left out: there is no ffmpeg; LOCKSTEP_FFMPEG names one");
    }
    found
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(name)).expect(name)
}

fn hostile(name: &str) -> Vec<u8> {
    file(&format!("hostile/refused_video_{name}"))
}

fn preparer(ffmpeg: &Path) -> MediaPreparer {
    let limits = VideoLimits::default();
    let decoder = VideoDecoder::new(vec![LOCKSTEP.into()], limits, 60);
    let ffmpeg = Ffmpeg::new(vec![LOCKSTEP.into()], ffmpeg.to_owned(), limits, 60);
    let time = Duration::from_secs(120);
    MediaPreparer {
        pictures: PicturePreparer::new(PictureProcessor::default(), PictureLimits::default()),
        videos: VideoPreparer::new(VideoProcessor::default(), decoder, TokenBounds::same(16_384), time)
            .with_ffmpeg(Some(ffmpeg)),
    }
}

/// All frames of a file.
async fn prepared(preparer: &MediaPreparer, file: Vec<u8>) -> Result<Medium, MediaError> {
    let source = VideoSource::File(file.into());
    let sampling = SamplingOptions { fps: Some(1000.0), max_frames: None };
    let input = VideoInput { source, sampling, options: VideoOptions::default() };
    preparer.prepare(MediumInput::Video(input)).await
}

/// How far the samples of two media are from each other: at most, and on average.
fn distance(one: &Medium, other: &Medium) -> (u8, f64) {
    assert_eq!((one.info.size, one.info.grid), (other.info.size, other.info.grid));
    let pairs = || one.pixels.iter().zip(&other.pixels[..]).map(|(a, b)| a.abs_diff(*b));
    let sum: f64 = pairs().map(f64::from).sum();
    (pairs().max().unwrap_or(0), sum / one.pixels.len() as f64)
}

fn assert_same_times(one: &Medium, other: &Medium, within: f64, what: &str) {
    assert_eq!(one.info.timestamps_s.len(), other.info.timestamps_s.len(), "{what}");
    for (a, b) in one.info.timestamps_s.iter().zip(&other.info.timestamps_s) {
        assert!((a - b).abs() <= within, "{what}: {a} and {b}");
    }
    let seconds = [one, other].map(|medium| medium.info.seconds_per_grid_t);
    assert!((seconds[0] - seconds[1]).abs() <= within, "{what}: {seconds:?}");
}

#[tokio::test]
async fn it_is_what_it_is_said_to_be() {
    let Some(program) = ffmpeg() else { return };
    let check = |program: PathBuf| async move {
        Ffmpeg::new(vec![LOCKSTEP.into()], program, VideoLimits::default(), 10).check().await
    };
    check(program).await.unwrap();
    for other in ["/bin/true", "/bin/sh", "/nowhere"] {
        let other = Path::new(other).canonicalize().unwrap_or(other.into());
        assert!(check(other.clone()).await.is_err(), "{other:?}");
    }
}

/// The same picture in every codec.
#[tokio::test]
async fn other_codecs_are_decoded() {
    let Some(ffmpeg) = ffmpeg() else { return };
    let preparer = preparer(&ffmpeg);
    let hevc = prepared(&preparer, hostile("hevc.mp4")).await.unwrap();
    assert_eq!((hevc.info.source, hevc.info.decoded_pixels), ((64, 48), 4 * 64 * 48));
    assert_eq!(hevc.info.timestamps_s, [0.0, 0.2, 0.4, 0.6]);
    let (first, last) = hevc.pixels.split_at(hevc.pixels.len() / 2);
    assert!(first != last);
    for name in ["vp9.mp4", "av1.mp4", "vp8.webm", "mjpeg.avi"] {
        let other = prepared(&preparer, hostile(name)).await.unwrap();
        let (_, mean) = distance(&hevc, &other);
        assert!(mean < 8.0, "{name}: {mean}");
        assert_same_times(&hevc, &other, 1e-9, name);
    }
}

/// Files that this program reads, with another name for their codec, so that it hands them on. Frames are compared after
/// both were resized, which makes a little more of their distance.
#[tokio::test]
async fn frames_are_those_of_the_own_decoder() {
    let Some(ffmpeg) = ffmpeg() else { return };
    let preparer = preparer(&ffmpeg);
    for name in ["reordered", "main_bt709", "full_range", "rotated", "fragmented", "variable_rate", "trimmed"]
    {
        let own = file(&format!("videos/{name}.mp4"));
        let mut other = own.clone();
        let label = other.windows(4).rposition(|four| four == b"avc1").expect("a codec");
        other[label..label + 4].copy_from_slice(b"avc3");
        let (own, other) =
            (prepared(&preparer, own).await.unwrap(), prepared(&preparer, other).await.unwrap());
        assert_same_times(&own, &other, 1e-9, name);
        assert_eq!(
            (own.info.source, own.info.decoded_pixels),
            (other.info.source, other.info.decoded_pixels)
        );
        let (most, mean) = distance(&own, &other);
        println!("{name}: at most {most}, {mean} on average");
        assert!(most <= 5, "{name}: {most}");
    }
    let interlaced = prepared(&preparer, file("videos/interlaced.mp4")).await.unwrap();
    assert_eq!(interlaced.info.source, (96, 64));
}

/// The same packets in another container: the same frames, at times that are as exact as the container has them.
#[tokio::test]
async fn containers_make_no_difference() {
    let Some(ffmpeg) = ffmpeg() else { return };
    let preparer = preparer(&ffmpeg);
    let folder = tempfile::tempdir().unwrap();
    for (name, containers) in [
        ("hevc.mp4", &["matroska", "mpegts", "mov"][..]),
        ("vp9.mp4", &["webm", "matroska"]),
        ("av1.mp4", &["webm"]),
        ("mjpeg.avi", &["matroska", "mov"]),
    ] {
        let source = hostile(name);
        std::fs::write(folder.path().join("source"), &source).unwrap();
        let whole = prepared(&preparer, source).await.unwrap();
        for container in containers {
            let mut remux = Command::new(&ffmpeg);
            remux.current_dir(folder.path()).args(["-loglevel", "error", "-y", "-i", "source", "-c", "copy"]);
            assert!(remux.args(["-f", container, "other"]).status().unwrap().success());
            let other = std::fs::read(folder.path().join("other")).unwrap();
            let other = prepared(&preparer, other).await.unwrap();
            let what = format!("{name} as {container}");
            assert_same_times(&whole, &other, 2e-3, &what);
            assert_eq!(distance(&whole, &other), (0, 0.0), "{what}");
        }
    }
}

/// What is cut or broken is answered or is its own fault, never the server's.
#[tokio::test]
async fn broken_files_cost_their_requests_only() {
    let Some(ffmpeg) = ffmpeg() else { return };
    let preparer = preparer(&ffmpeg);
    let mut rng = StdRng::seed_from_u64(11);
    let (mut decoded, mut refused) = (0, 0);
    for name in ["hevc.mp4", "vp9.mp4", "av1.mp4", "vp8.webm", "mjpeg.avi"] {
        let whole = hostile(name);
        let cut = (1..16).map(|sixteenths| whole[..whole.len() * sixteenths / 16].to_vec());
        let changed = (0..10).map(|_| {
            let mut file = whole.clone();
            for _ in 0..rng.random_range(1..10) {
                let at = rng.random_range(40..file.len());
                file[at] = rng.random();
            }
            file
        });
        let files: Vec<_> = cut.chain(changed).collect();
        for file in files {
            match prepared(&preparer, file).await {
                Ok(medium) => {
                    assert_eq!(medium.pixels.len() as u64, medium.info.pixel_bytes());
                    decoded += 1;
                }
                Err(error) => {
                    assert!(matches!(error.blame(), Blame::Fields(_)), "{name}: {error}");
                    refused += 1;
                }
            }
        }
        assert!(prepared(&preparer, whole).await.is_ok());
    }
    assert!(decoded > 10 && refused > 10, "{decoded} decoded, {refused} refused");
}

/// A program behind the verb that ffmpeg is behind.
fn confined(program: &str, arguments: &[&str]) -> Output {
    let program = Path::new(program).canonicalize().unwrap();
    let mut command = Command::new(LOCKSTEP);
    command.args(["confine", "--memory-bytes", "2000000000", "--cpu-seconds", "10", "--parent"]);
    command.arg(std::process::id().to_string()).arg("--").arg(program).args(arguments);
    command.env_clear().output().unwrap()
}

#[test]
fn what_ffmpeg_is_confined_to() {
    let run = |words: &str| {
        let output = confined("/bin/bash", &["-c", words]);
        let (layers, rest) = output.stdout.split_at_checked(3).expect("what confines it");
        assert_eq!(layers[0], 4, "{output:?}");
        (layers[1], String::from_utf8_lossy(rest).into_owned())
    };
    let (landlock, said) = run("echo works; read -r line < /etc/passwd && echo $line");
    assert!(said.starts_with("works\n"), "{said}");
    if landlock == 0 {
        println!("this kernel has no Landlock");
    } else {
        assert_eq!(said, "works\n");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("written");
    for words in [
        format!("exec 3<> /dev/tcp/127.0.0.1/{port}"),
        format!("echo no > {}", path.display()),
        "/bin/true".to_owned(),
        format!("kill -TERM {}", std::process::id()),
    ] {
        let (_, said) = run(&format!("{words} && echo worked"));
        assert_eq!(said, "", "{words}");
    }
    assert!(!path.exists());
    // One who is not its parent is not obeyed.
    let orphan = Command::new(LOCKSTEP)
        .args([
            "confine",
            "--memory-bytes",
            "2000000000",
            "--cpu-seconds",
            "10",
            "--parent",
            "1",
            "--",
            "/bin/true",
        ])
        .output()
        .unwrap();
    assert_eq!(orphan.stdout.first(), Some(&5));
}
