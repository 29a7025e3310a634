//! What becomes of a video when ffmpeg does this and that: a shell says what it says.

use super::super::sampling::SamplingOptions;
use super::super::size::{VideoOptions, VideoProcessor};
use super::super::{TokenBounds, VideoDecoder, VideoInput, VideoPreparer, VideoSource};
use super::*;
use crate::media::medium::{Blame, MediumInfo};
use crate::media::{Medium, PictureLimits, PicturePreparer, PictureProcessor};

/// What begins as WebM does, and then says nothing.
const FILE: &[u8] = b"\x1A\x45\xDF\xA3";
/// That it is confined.
const READY: &str = "printf '\\004\\002\\002'";
const FACTS: &str = "#tb 0: 1/1000\\n#dimensions 0: 64x48\\n";
/// Frames of half a second.
const PACKETS: &str = "0, 0, 0, 500, 9, 0x1\\n0, 500, 1000, 500, 9, 0x1, F=0x0\\n0, 1000, 500, 500, 9, 0x1, F=0x0\\n\
                       0, 1500, 1500, 500, 9, 0x1, F=0x0\\n";
/// Of a turned picture.
const FRAME: &str = "#tb 0: 1/2\\n#dimensions 0: 48x64\\n0, 0, 0, 1, 9216, 0x1\\n";
const FRAME_BYTES: usize = 64 * 48 * 3;

/// A preparer with an ffmpeg that does one of these things: when it lists, when it decodes a frame, when it decodes all.
fn preparer(list: &str, frame: &str, frames: &str) -> VideoPreparer {
    let script = format!(
        "{READY}; case \"$*\" in *' -c copy '*) {list};; *' -frames:v 1 '*) {frame};; *) {frames};; esac"
    );
    of_script(&script)
}

fn of_script(script: &str) -> VideoPreparer {
    let command: Vec<OsString> = ["/bin/sh", "-c", script].map(Into::into).to_vec();
    let limits = VideoLimits { max_frames: 100, ..Default::default() };
    let decoder = VideoDecoder::new(vec!["/nowhere".into()], limits, 10);
    let ffmpeg = Ffmpeg::new(command, "/nowhere".into(), limits, 10);
    let time = Duration::from_secs(60);
    VideoPreparer::new(VideoProcessor::default(), decoder, TokenBounds::same(16_384), time)
        .with_ffmpeg(Some(ffmpeg))
}

fn said(words: &str) -> String {
    format!("printf '{words}'")
}

fn sound() -> [String; 3] {
    let bytes = format!("head -c {} /dev/zero", 4 * FRAME_BYTES);
    [said(&format!("{FACTS}{PACKETS}")), said(FRAME), bytes]
}

fn pictures() -> PicturePreparer {
    PicturePreparer::new(PictureProcessor::default(), PictureLimits::default())
}

fn input() -> VideoInput {
    let source = VideoSource::File(Bytes::from_static(FILE));
    VideoInput { source, sampling: SamplingOptions::default(), options: VideoOptions::default() }
}

async fn prepared(list: &str, frame: &str, frames: &str) -> Result<Medium, PrepareError> {
    preparer(list, frame, frames).prepare(&pictures(), input()).await
}

/// What the client is told.
async fn refused(list: &str, frame: &str, frames: &str) -> String {
    match prepared(list, frame, frames).await.unwrap_err().blame() {
        Blame::Fields(fields) => {
            assert!(fields.len() == 1 && fields[0].0 == "data", "{fields:?}");
            fields[0].1.clone()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn frames_are_taken_as_they_come() {
    let [list, frame, _] = sound();
    let frames = "head -c 18432 /dev/zero; head -c 18432 /dev/zero | tr '\\000' '\\200'";
    let medium = prepared(&list, &frame, frames).await.unwrap();
    let MediumInfo { source, timestamps_s, decoded_pixels, seconds_per_grid_t, .. } = &medium.info;
    assert_eq!((*source, *decoded_pixels), ((48, 64), 4 * 48 * 64));
    assert_eq!((timestamps_s, *seconds_per_grid_t), (&vec![0.0, 0.5, 1.0, 1.5], 1.0));
    let (dark, light) = medium.pixels.split_at(medium.pixels.len() / 2);
    assert!(dark.iter().all(|sample| *sample == 0) && light.iter().all(|sample| *sample == 0x80));
    let measured = preparer(&list, &frame, "exit 1").measure(&pictures(), input()).await.unwrap();
    assert_eq!(measured, medium.info);
    preparer(&list, &frame, "exit 1").inspect(Bytes::from_static(FILE)).await.unwrap();
}

#[tokio::test]
async fn lies_are_refused() {
    let [list, frame, frames] = sound();
    for (bytes, words) in [
        (0, "not all of its frames"),
        (4 * FRAME_BYTES - 1, "not all of its frames"),
        (4 * FRAME_BYTES + 1, "more frames than it said"),
    ] {
        let said = refused(&list, &frame, &format!("head -c {bytes} /dev/zero")).await;
        assert!(said.contains(words), "{said}");
    }
    let said = refused(&list, &frame, "yes").await;
    assert!(said.contains("more frames"), "{said}");
    let endless = format!("{}; yes '0, 0, 0, 500, 9, 0x1'", self::said(FACTS));
    assert!(refused(&endless, &frame, &frames).await.contains("101 frames; at most 100"));
    for (facts, words) in [
        ("#tb 0: 1/1000\\n#dimensions 0: -64x48\\n", "nothing sensible"),
        ("#tb 0: 1/1000\\n#dimensions 0: 64000x48000\\n", "64000 x 48000"),
        ("#tb 0: 1000/1\\n#dimensions 0: 64x48\\n", "seconds long"),
        ("#tb 0: 1/1000\\n", "nothing sensible"),
    ] {
        let said = refused(&self::said(&format!("{facts}{PACKETS}")), &frame, &frames).await;
        assert!(said.contains(words), "{facts}: {said}");
    }
    let large = self::said("#dimensions 0: 64000x48000\\n");
    assert!(refused(&list, &large, &frames).await.contains("64000 x 48000"));
    let line = "head -c 9999999 /dev/zero";
    assert!(refused(line, &frame, &frames).await.contains("interrupted"));
    assert!(refused("true", &frame, &frames).await.contains("nothing sensible"));
    assert!(refused(&self::said(FACTS), &frame, &frames).await.contains("no frames"));
}

#[tokio::test]
async fn an_ffmpeg_that_dies_is_the_videos_fault_once_it_was_ready() {
    let [list, frame, frames] = sound();
    for (end, words) in [
        ("exit 1", "ffmpeg cannot read it"),
        ("kill -SEGV $$", "signal: 11"),
        ("kill -XCPU $$", "more than 10 s of work"),
    ] {
        for at in 0..3 {
            let mut steps = [list.clone(), frame.clone(), frames.clone()];
            steps[at] = format!("{}; {end}", steps[at]);
            let said = refused(&steps[0], &steps[1], &steps[2]).await;
            assert!(said.contains(words), "{said}");
        }
    }
    for (script, is_load) in [
        ("kill -KILL $$".to_owned(), true),
        (format!("{READY}; kill -KILL $$"), true),
        ("exit 3".into(), false),
        (format!("{READY}; exit 127"), false),
        ("printf '\\005\\002\\000no'".into(), false),
    ] {
        let error = of_script(&script).prepare(&pictures(), input()).await.unwrap_err();
        let is_expected = match error.blame() {
            Blame::Load(_) => is_load,
            Blame::Server(_) => !is_load,
            Blame::Fields(_) => false,
        };
        assert!(is_expected, "{script}: {error}");
    }
}

/// How deadlines and clients that go away are heard of.
#[tokio::test]
async fn an_ffmpeg_that_hangs_is_ended() {
    let pictures = pictures();
    let [list, frame, _] = sound();
    for (index, steps) in
        [["exec sleep 1001.25", "", ""], [&list, &frame, "exec sleep 1001.25"]].iter().enumerate()
    {
        let preparer = preparer(steps[0], steps[1], steps[2]);
        let waited = tokio::time::timeout(Duration::from_millis(500), preparer.prepare(&pictures, input()));
        assert!(waited.await.is_err(), "{index}");
        let is_asleep = || {
            let folders = std::fs::read_dir("/proc").unwrap().flatten();
            let mut lines = folders.filter_map(|folder| std::fs::read(folder.path().join("cmdline")).ok());
            lines.any(|line| line == b"sleep\x001001.25\0")
        };
        let mut tries = 0..500;
        while is_asleep() {
            assert!(tries.next().is_some(), "it is still there");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Files that are read here do not get there, nor those that are broken or no videos.
#[tokio::test]
async fn only_other_codecs_and_containers_are_handed_on() {
    let preparer = of_script("exit 9");
    let gif = super::super::file::tests::gif(4);
    preparer.inspect(gif.clone().into()).await.unwrap();
    for file in [&gif[..20], b"\0\0\0\x18ftypisom0000isomavc1", b"\x89PNG\r\n\x1a\n0000", b"", b"#EXTM3U\n"] {
        let error = preparer.inspect(Bytes::copy_from_slice(file)).await.unwrap_err();
        assert!(matches!(error.blame(), Blame::Fields(_)), "{error}");
    }
}

#[tokio::test]
async fn without_ffmpeg_its_flag_is_named() {
    let [list, frame, frames] = sound();
    let preparer = preparer(&list, &frame, &frames).with_ffmpeg(None);
    let error = preparer.inspect(Bytes::from_static(FILE)).await.unwrap_err().to_string();
    for words in ["WebM or Matroska, is not supported", "frames one by one", "started with --ffmpeg"] {
        assert!(error.contains(words), "{error}");
    }
}

/// A file of this program's own tests that stands for another program.
#[tokio::test]
async fn another_program_is_no_ffmpeg() {
    let check = async |script: &str| {
        let command: Vec<OsString> = ["/bin/sh", "-c", script].map(Into::into).to_vec();
        Ffmpeg::new(command, "/nowhere".into(), VideoLimits::default(), 10).check().await
    };
    check(&format!("{READY}; echo ffmpeg version n7.1 Copyright")).await.unwrap();
    for script in
        [format!("{READY}; echo true (GNU coreutils) 9.7"), format!("{READY}; exit 127"), "exit 1".into()]
    {
        assert!(check(&script).await.is_err(), "{script}");
    }
}

/// As deep as a tree, not as a list.
#[test]
fn many_seconds_are_counted() {
    assert_eq!(num_passed(&[-0.5, 1.0, 2.25]), "(gte(t,-0.5)+(gte(t,1)+gte(t,2.25)))");
    let many: Vec<f64> = (0..768).map(f64::from).collect();
    let words = num_passed(&many);
    let depth = words.chars().scan(0, |depth, character| {
        *depth += match character {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        Some(*depth)
    });
    assert_eq!(depth.max(), Some(11));
}
