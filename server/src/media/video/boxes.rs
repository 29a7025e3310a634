//! The boxes of an MP4 file (ISO/IEC 14496-12), walked before the demuxer sees them.
//!
//! The demuxer trusts what it reads: it follows boxes of no size in circles, and makes as many samples as a few bytes say.
//! So every box that it descends into is checked here, samples are counted, and what is not needed (sound, further
//! tracks, metadata) is turned into free space, which it skips.

use super::error::{VideoError, VideoLimits, malformed};

/// The type of a box.
pub(super) type Kind = [u8; 4];

/// Boxes that are skipped by everybody.
const FREE: Kind = *b"free";
/// How deep boxes lie in each other in a sound file is eight or less.
const MAX_DEPTH: usize = 10;
/// Bytes of a visual sample entry before the boxes in it.
const VISUAL_ENTRY_BYTES: usize = 78;

/// Boxes that a file has once. Of several the demuxer takes the last, of which nothing was checked.
const ONCE: [&Kind; 17] = [
    b"tkhd", b"edts", b"elst", b"mdia", b"mdhd", b"hdlr", b"minf", b"dinf", b"dref", b"stbl", b"stsd",
    b"stts", b"ctts", b"stsc", b"stsz", b"stco", b"co64",
];

/// A box in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    kind: Kind,
    /// Offset of its header.
    start: usize,
    /// Offset of what is in it.
    body: usize,
    /// Offset of what follows it.
    end: usize,
}

/// What the one video track that was kept says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KeptTrack {
    /// Its codec, as the type of its sample entry.
    pub(super) codec: Kind,
    /// Where the last box ends that the demuxer may read.
    pub(super) boxes_end: usize,
}

/// Whether a file begins as MP4 does.
pub(super) fn is_mp4(file: &[u8]) -> bool {
    file.get(4..8) == Some(b"ftyp")
}

/// Checks the boxes of a file and frees all that is not its video, so that the demuxer can read the file.
///
/// # Errors
/// A broken file, one without a video track, or one with too many frames.
pub(super) fn keep_video_only(file: &mut [u8], limits: &VideoLimits) -> Result<KeptTrack, VideoError> {
    let top = top_level(file)?;
    let mut movies = top.iter().filter(|place| place.kind == *b"moov");
    let movie = *movies.next().ok_or_else(|| malformed("it has no movie header"))?;
    if movies.next().is_some() {
        return Err(malformed("it has several movie headers"));
    }
    let (id, codec, mut num_samples) = keep_one_track(file, movie)?;
    for fragment in top.iter().filter(|place| place.kind == *b"moof") {
        check(file, *fragment, 0)?;
        for part in children(file, fragment.body, fragment.end)? {
            if part.kind == *b"traf" {
                num_samples = num_samples.saturating_add(keep_fragment_of(file, part, id)?);
            }
        }
    }
    for other in &top {
        if !matches!(&other.kind, b"ftyp" | b"moov" | b"moof" | b"mdat") {
            free(file, *other);
        }
    }
    limits.check_frames(num_samples)?;
    Ok(KeptTrack { codec, boxes_end: top.last().map_or(0, |last| last.end) })
}

/// The boxes of a file, up to one without a size, which goes on to the end of the file and is never one of the headers.
fn top_level(file: &[u8]) -> Result<Vec<Place>, VideoError> {
    let mut places = Vec::new();
    let mut at = 0;
    while file.len() - at >= 8 {
        let place = match be32(file, at) {
            Some(0) => break,
            _ => place(file, at, file.len())?,
        };
        at = place.end;
        places.push(place);
    }
    Ok(places)
}

/// The boxes that fill `file[from..to]`.
fn children(file: &[u8], from: usize, to: usize) -> Result<Vec<Place>, VideoError> {
    let mut places = Vec::new();
    let mut at = from;
    while at < to {
        let place = place(file, at, to)?;
        at = place.end;
        places.push(place);
    }
    Ok(places)
}

/// The box at an offset, which ends at `to` at the latest. It is never empty: a walk over boxes always moves on.
fn place(file: &[u8], start: usize, to: usize) -> Result<Place, VideoError> {
    let cut = || malformed("it ends before its boxes do");
    let kind = file.get(start..to).and_then(|rest| rest.get(4..8)).ok_or_else(cut)?;
    let kind = Kind::try_from(kind).expect("four bytes");
    let (header, size) = match be32(file, start).ok_or_else(cut)? {
        1 => (16, be64(file, start + 8).ok_or_else(cut)?),
        size => (8, size.into()),
    };
    if size < header as u64 {
        return Err(malformed(format!("its box {} is {size} bytes long", name(kind))));
    }
    let end = usize::try_from(size).ok().and_then(|size| start.checked_add(size));
    let end = end.filter(|end| *end <= to).ok_or_else(cut)?;
    Ok(Place { kind, start, body: start + header, end })
}

/// Keeps the first enabled video track of a movie, or the first video track. Returns its id, codec and samples.
fn keep_one_track(file: &mut [u8], movie: Place) -> Result<(u32, Kind, usize), VideoError> {
    let mut videos = Vec::new();
    for part in children(file, movie.body, movie.end)? {
        match &part.kind {
            b"trak" if handler(file, part)? == Some(*b"vide") => videos.push(part),
            b"mvhd" | b"mvex" => check(file, part, 0)?,
            _ => free(file, part),
        }
    }
    let first = *videos.first().ok_or(VideoError::NoVideoTrack)?;
    let kept = videos.iter().copied().find(|track| is_enabled(file, *track)).unwrap_or(first);
    for other in videos.into_iter().filter(|track| *track != kept) {
        free(file, other);
    }
    for part in children(file, kept.body, kept.end)? {
        if !matches!(&part.kind, b"tkhd" | b"edts" | b"mdia") {
            free(file, part);
        }
    }
    let table = descend(file, kept, &[*b"mdia", *b"minf", *b"stbl"])?
        .ok_or_else(|| malformed("its video track has no sample table"))?;
    let codec = codec(file, table)?;
    check(file, kept, 0)?;
    let id = track_id(file, kept).ok_or_else(|| malformed("its video track has no header"))?;
    Ok((id, codec, num_samples(file, table)?))
}

/// Frees a track fragment of another track. Returns how many samples the fragment has.
fn keep_fragment_of(file: &mut [u8], fragment: Place, track_id: u32) -> Result<usize, VideoError> {
    let parts = children(file, fragment.body, fragment.end)?;
    let header = parts.iter().find(|part| part.kind == *b"tfhd");
    if header.and_then(|header| be32(file, header.body + 4)) != Some(track_id) {
        free(file, fragment);
        return Ok(0);
    }
    let runs = parts.iter().filter(|part| part.kind == *b"trun");
    let samples = runs.map(|run| be32(file, run.body + 4).unwrap_or(0) as usize);
    Ok(samples.fold(0, usize::saturating_add))
}

/// Checks every box that the demuxer descends into.
fn check(file: &[u8], place: Place, depth: usize) -> Result<(), VideoError> {
    let skipped = match &place.kind {
        b"trak" | b"edts" | b"mdia" | b"minf" | b"dinf" | b"stbl" | b"mvex" | b"moof" | b"traf" => 0,
        // Version, flags and a count come first.
        b"dref" | b"stsd" => 8,
        b"avc1" => VISUAL_ENTRY_BYTES,
        _ => return Ok(()),
    };
    if depth == MAX_DEPTH {
        return Err(malformed("its boxes lie too deep in each other"));
    }
    let from = place.body.checked_add(skipped).filter(|from| *from <= place.end);
    let from = from.ok_or_else(|| malformed(format!("its box {} is cut short", name(place.kind))))?;
    // Of these two the demuxer reads no more than it needs; QuickTime ends their lists with four zero bytes.
    let loose = matches!(&place.kind, b"stsd" | b"avc1");
    let inner =
        if loose { leading_children(file, from, place.end)? } else { children(file, from, place.end)? };
    if place.kind == *b"avc1" && !inner.iter().any(|part| part.kind == *b"avcC") {
        return Err(malformed("its video track has no decoder configuration"));
    }
    for kind in ONCE {
        if inner.iter().filter(|part| part.kind == *kind).count() > 1 {
            return Err(malformed(format!("it has several boxes {}", name(*kind))));
        }
    }
    // The demuxer reads the first box of these two whatever it is.
    if inner.is_empty() && matches!(&place.kind, b"edts" | b"stsd") {
        return Err(malformed(format!("its box {} is empty", name(place.kind))));
    }
    inner.into_iter().try_for_each(|part| check(file, part, depth + 1))
}

/// The boxes of `file[from..to]`, up to a rest that is too short for one.
fn leading_children(file: &[u8], from: usize, to: usize) -> Result<Vec<Place>, VideoError> {
    let mut places = Vec::new();
    let mut at = from;
    while to - at >= 8 {
        let place = place(file, at, to)?;
        at = place.end;
        places.push(place);
    }
    Ok(places)
}

/// The first box of these types, each in the one before.
fn descend(file: &[u8], from: Place, kinds: &[Kind]) -> Result<Option<Place>, VideoError> {
    let mut at = from;
    for kind in kinds {
        match children(file, at.body, at.end)?.into_iter().find(|part| part.kind == *kind) {
            Some(part) => at = part,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

/// What a track is: `vide`, `soun`, ...
fn handler(file: &[u8], track: Place) -> Result<Option<Kind>, VideoError> {
    let handler = descend(file, track, &[*b"mdia", *b"hdlr"])?;
    Ok(handler.and_then(|handler| file.get(handler.body + 8..handler.body + 12)?.try_into().ok()))
}

/// Whether a track's header says that it is in use.
fn is_enabled(file: &[u8], track: Place) -> bool {
    let header = descend(file, track, &[*b"tkhd"]).ok().flatten();
    header
        .and_then(|header| be32(file, header.body))
        .is_some_and(|version_and_flags| version_and_flags & 1 == 1)
}

fn track_id(file: &[u8], track: Place) -> Option<u32> {
    let header = descend(file, track, &[*b"tkhd"]).ok().flatten()?;
    // Two times come before the id, of 4 or 8 bytes each.
    let at = if *file.get(header.body)? == 1 { 20 } else { 12 };
    be32(file, header.body + at)
}

/// The type of a track's first sample entry.
fn codec(file: &[u8], table: Place) -> Result<Kind, VideoError> {
    let none = || malformed("its video track says nothing about its codec");
    let descriptions = descend(file, table, &[*b"stsd"])?.ok_or_else(none)?;
    Ok(place(file, descriptions.body + 8, descriptions.end).map_err(|_| none())?.kind)
}

/// How many samples a sample table says there are.
fn num_samples(file: &[u8], table: Place) -> Result<usize, VideoError> {
    let sizes = descend(file, table, &[*b"stsz"])?;
    let sizes =
        sizes.ok_or_else(|| malformed("its video track says nothing about the sizes of its frames"))?;
    Ok(be32(file, sizes.body + 8).unwrap_or(0) as usize)
}

/// Turns a box into free space.
fn free(file: &mut [u8], place: Place) {
    file[place.start + 4..place.start + 8].copy_from_slice(&FREE);
}

fn be32(file: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(file.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn be64(file: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(file.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// A box's type for people to read.
pub(super) fn name(kind: Kind) -> String {
    kind.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::super::mp4_writer::{MovieSpec, boxed, movie};
    use super::*;

    fn kept(mut file: Vec<u8>) -> Result<(KeptTrack, Vec<u8>), VideoError> {
        let kept = keep_video_only(&mut file, &VideoLimits::default())?;
        Ok((kept, file))
    }

    fn problem(file: Vec<u8>) -> String {
        kept(file).unwrap_err().to_string()
    }

    fn spec() -> MovieSpec {
        MovieSpec { samples: vec![vec![1, 2, 3]; 5], ..Default::default() }
    }

    fn count(file: &[u8], kind: &[u8; 4]) -> usize {
        file.windows(4).filter(|window| window == kind).count()
    }

    #[test]
    fn a_sound_file_is_left_as_it_is() {
        let file = movie(&spec());
        let (kept, after) = kept(file.clone()).unwrap();
        assert_eq!(kept, KeptTrack { codec: *b"avc1", boxes_end: file.len() });
        assert_eq!(after, file);
    }

    #[test]
    fn sound_and_metadata_are_freed() {
        let file = movie(&MovieSpec { with_sound: true, ..spec() });
        assert_eq!((count(&file, b"trak"), count(&file, b"udta")), (2, 1));
        let (_, after) = kept(file.clone()).unwrap();
        assert_eq!((count(&after, b"trak"), count(&after, b"udta")), (1, 0));
        assert_eq!(after.len(), file.len());
        let without_video = movie(&MovieSpec { handler: *b"soun", ..spec() });
        assert_eq!(kept(without_video).unwrap_err(), VideoError::NoVideoTrack);
    }

    #[test]
    fn a_rest_at_the_end_is_not_for_the_demuxer() {
        let mut file = movie(&spec());
        let end = file.len();
        file.extend([0; 7]);
        assert_eq!(kept(file.clone()).unwrap().0.boxes_end, end);
        file.extend(b"\0mdat");
        assert_eq!(kept(file).unwrap().0.boxes_end, end);
    }

    #[test]
    fn boxes_that_would_be_walked_for_ever_are_refused() {
        let file = movie(&spec());
        for kind in [b"stts", b"mdhd", b"stbl", b"dref", b"avcC", b"tkhd"] {
            let at = file.windows(4).position(|window| window == kind).unwrap() - 4;
            for size in [0_u32, 1, 7, u32::MAX] {
                let mut broken = file.clone();
                broken[at..at + 4].copy_from_slice(&size.to_be_bytes());
                assert!(matches!(kept(broken), Err(VideoError::Malformed(_))), "{kind:?} {size}");
            }
        }
    }

    #[test]
    fn the_depth_of_boxes_is_bounded() {
        let deep = (0..10_000).fold(Vec::new(), |inner, _| boxed(b"mdia", &inner));
        let file = [movie(&spec()), boxed(b"moof", &deep)].concat();
        assert!(problem(file).contains("too deep"));
    }

    #[test]
    fn frames_are_counted_before_they_are_made() {
        let mut file = movie(&spec());
        let at = file.windows(4).position(|window| window == b"stsz").unwrap();
        // A size for all, and a number that nothing backs.
        file[at + 8..at + 12].copy_from_slice(&1_u32.to_be_bytes());
        file[at + 12..at + 16].copy_from_slice(&u32::MAX.to_be_bytes());
        let error = kept(file).unwrap_err();
        assert_eq!(error, VideoError::TooManyFrames { frames: u32::MAX.into(), max: 54_000 });
        let run = boxed(b"trun", &[&[0; 4][..], &u32::MAX.to_be_bytes()].concat());
        let header = boxed(b"tfhd", &[&[0; 4][..], &1_u32.to_be_bytes()].concat());
        let fragment = boxed(b"moof", &boxed(b"traf", &[header, run].concat()));
        let file = [movie(&spec()), fragment].concat();
        assert!(matches!(kept(file).unwrap_err(), VideoError::TooManyFrames { .. }));
    }

    #[test]
    fn what_is_checked_is_what_the_demuxer_reads() {
        let file = movie(&spec());
        let at = |kind: &[u8; 4]| file.windows(4).position(|window| window == kind).unwrap() - 4;
        let mut twice = file.clone();
        let (from, sizes) = (at(b"stsz"), at(b"stco") - at(b"stsz"));
        let copy = file[from..from + sizes].to_vec();
        twice.splice(from..from, copy);
        for outer in [b"moov", b"trak", b"mdia", b"minf", b"stbl"] {
            let size = u32::from_be_bytes(file[at(outer)..][..4].try_into().unwrap()) + sizes as u32;
            // They all begin before the table: their places are as before.
            twice[at(outer)..at(outer) + 4].copy_from_slice(&size.to_be_bytes());
        }
        assert!(problem(twice).contains("several boxes stsz"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_or_whole() {
        let file = movie(&MovieSpec { with_sound: true, ..spec() });
        for end in 8..file.len() {
            assert!(kept(file[..end].to_vec()).is_err(), "cut at {end} of {}", file.len());
        }
    }
}
