//! The boxes of an MP4 file (ISO/IEC 14496-12), walked before the demuxer sees them.
//!
//! The demuxer trusts what it reads: it follows boxes of no size in circles, reads sizes of 64 bits wrongly where they lie in
//! other boxes, and makes as many samples as a few bytes say. So every box that it descends into is checked here, boxes,
//! samples and entries of tables are counted, and what is not needed (sound, further tracks, metadata) is turned into free
//! space, which it skips. What it does with the rest takes time in proportion to the file.

use super::error::{VideoError, VideoLimits, malformed};

/// The type of a box.
pub(super) type Kind = [u8; 4];

/// Boxes that are skipped by everybody.
const FREE: Kind = *b"free";
/// How deep boxes lie in each other in a sound file is eight or less.
const MAX_DEPTH: usize = 10;
/// Bytes of a visual sample entry before the boxes in it.
const VISUAL_ENTRY_BYTES: usize = 78;
/// Bytes of a box's header where its size has 64 bits.
const WIDE_HEADER: usize = 16;
/// Boxes that are looked at in one file, some of them several times: enough for thousands of fragments.
const MAX_BOXES: usize = 200_000;
/// Entries of an edit list; editors make one for each cut.
const MAX_EDITS: usize = 256;

/// Boxes of which the one around them has one. Of several the demuxer takes the last, of which nothing was checked.
const ONCE: [&Kind; 23] = [
    b"mvhd", b"mvex", b"tkhd", b"edts", b"elst", b"mdia", b"mdhd", b"hdlr", b"minf", b"dinf", b"dref",
    b"stbl", b"stsd", b"stts", b"ctts", b"stss", b"stsc", b"stsz", b"stco", b"co64", b"mfhd", b"tfhd",
    b"tfdt",
];
/// Tables with at most one entry for each sample. Version and flags come before the number of entries.
const TABLES: [&Kind; 6] = [b"stts", b"ctts", b"stss", b"stsc", b"stco", b"co64"];

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

impl Place {
    /// Whether its size has 64 bits.
    fn is_wide(&self) -> bool {
        self.body - self.start == WIDE_HEADER
    }
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
/// A broken file, one without a video track, one with too many frames, or a kind that the demuxer does not read right.
pub(super) fn keep_video_only(file: &mut [u8], limits: &VideoLimits) -> Result<KeptTrack, VideoError> {
    let mut boxes = Boxes { file, left: MAX_BOXES, limits };
    let top = boxes.top_level()?;
    let mut movies = top.iter().filter(|place| place.kind == *b"moov");
    let movie = *movies.next().ok_or_else(|| malformed("it has no movie header"))?;
    if movies.next().is_some() {
        return Err(malformed("it has several movie headers"));
    }
    let (id, codec, num_samples) = boxes.keep_one_track(movie)?;
    let mut num_in_fragments = 0_usize;
    for fragment in top.iter().filter(|place| place.kind == *b"moof") {
        boxes.check(*fragment, 0)?;
        for part in boxes.children(*fragment)? {
            if part.kind == *b"traf" {
                num_in_fragments = num_in_fragments.saturating_add(boxes.keep_fragment_of(part, id)?);
            }
        }
    }
    for other in &top {
        if !matches!(&other.kind, b"ftyp" | b"moov" | b"moof" | b"mdat") {
            boxes.free(*other);
        }
    }
    limits.check_frames(num_samples.saturating_add(num_in_fragments))?;
    // The demuxer goes on counting where the first ones ended, with the times of neither.
    if num_samples > 0 && num_in_fragments > 0 {
        return Err(VideoError::Unsupported("an MP4 file with frames both in its header and in fragments"));
    }
    Ok(KeptTrack { codec, boxes_end: top.last().map_or(0, |last| last.end) })
}

/// A file, while its boxes are looked at.
struct Boxes<'a> {
    file: &'a mut [u8],
    /// How many more boxes may be looked at.
    left: usize,
    limits: &'a VideoLimits,
}

impl Boxes<'_> {
    /// The boxes of the file, up to one without a size, which goes on to the end of the file and is never one of the headers.
    fn top_level(&mut self) -> Result<Vec<Place>, VideoError> {
        let mut places = Vec::new();
        let mut at = 0;
        while self.file.len() - at >= 8 && self.be32(at) != Some(0) {
            let place = self.place(at, self.file.len())?;
            if place.is_wide() && place.kind != *b"mdat" {
                return Err(too_wide(place));
            }
            at = place.end;
            places.push(place);
        }
        Ok(places)
    }

    /// The boxes that fill a box.
    fn children(&mut self, of: Place) -> Result<Vec<Place>, VideoError> {
        self.inside(of.body, of.end, 1)
    }

    /// The boxes of the file between two offsets, up to a rest of fewer than `least` bytes.
    fn inside(&mut self, from: usize, to: usize, least: usize) -> Result<Vec<Place>, VideoError> {
        let mut places = Vec::new();
        let mut at = from;
        while to - at >= least {
            let place = self.place(at, to)?;
            if place.is_wide() {
                return Err(too_wide(place));
            }
            at = place.end;
            places.push(place);
        }
        Ok(places)
    }

    /// The box at an offset, which ends at `to` at the latest. It is never empty: a walk over boxes always moves on.
    fn place(&mut self, start: usize, to: usize) -> Result<Place, VideoError> {
        self.left = self.left.checked_sub(1).ok_or_else(|| malformed("it has too many boxes"))?;
        let cut = || malformed("it ends before its boxes do");
        let kind = self.file.get(start..to).and_then(|rest| rest.get(4..8)).ok_or_else(cut)?;
        let kind = Kind::try_from(kind).expect("four bytes");
        let (header, size) = match self.be32(start).ok_or_else(cut)? {
            1 => (WIDE_HEADER, self.be64(start + 8).ok_or_else(cut)?),
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
    fn keep_one_track(&mut self, movie: Place) -> Result<(u32, Kind, usize), VideoError> {
        let mut videos = Vec::new();
        let mut extensions = None;
        let parts = self.children(movie)?;
        check_once(&parts)?;
        for part in parts {
            match &part.kind {
                b"trak" if self.handler(part)? == Some(*b"vide") => videos.push(part),
                b"mvhd" => {}
                b"mvex" => extensions = Some(part),
                _ => self.free(part),
            }
        }
        let first = *videos.first().ok_or(VideoError::NoVideoTrack)?;
        let mut kept = first;
        for track in &videos {
            if self.is_enabled(*track)? {
                kept = *track;
                break;
            }
        }
        for other in videos.into_iter().filter(|track| *track != kept) {
            self.free(other);
        }
        for part in self.children(kept)? {
            if !matches!(&part.kind, b"tkhd" | b"edts" | b"mdia") {
                self.free(part);
            }
        }
        let table = self
            .descend(kept, &[*b"mdia", *b"minf", *b"stbl"])?
            .ok_or_else(|| malformed("its video track has no sample table"))?;
        let codec = self.codec(table)?;
        let num_samples = self.num_samples(table)?;
        self.limits.check_frames(num_samples)?;
        self.check(kept, 0)?;
        let id = self.track_id(kept)?.ok_or_else(|| malformed("its video track has no header"))?;
        if let Some(extensions) = extensions {
            self.keep_one_extension(extensions, id)?;
        }
        Ok((id, codec, num_samples))
    }

    /// Keeps what fragments of one track have in common, and frees what others have: the demuxer looks for it in each.
    fn keep_one_extension(&mut self, extensions: Place, track_id: u32) -> Result<(), VideoError> {
        let mut is_kept = false;
        for part in self.children(extensions)? {
            let is_own = part.kind == *b"trex" && self.be32(part.body + 4) == Some(track_id);
            if is_kept || !is_own {
                self.free(part);
            }
            is_kept |= is_own;
        }
        // Without any, a movie says nothing about fragments.
        if !is_kept {
            self.free(extensions);
        }
        Ok(())
    }

    /// Frees a track fragment of another track. Returns how many samples the fragment has.
    fn keep_fragment_of(&mut self, fragment: Place, track_id: u32) -> Result<usize, VideoError> {
        let parts = self.children(fragment)?;
        let header = parts.iter().find(|part| part.kind == *b"tfhd");
        if header.and_then(|header| self.be32(header.body + 4)) != Some(track_id) {
            self.free(fragment);
            return Ok(0);
        }
        let mut runs = parts.iter().filter(|part| part.kind == *b"trun");
        let Some(run) = runs.next() else { return Ok(0) };
        // The demuxer takes the second for one that follows the first without a gap.
        if runs.next().is_some() {
            return Err(VideoError::Unsupported(
                "an MP4 file whose fragments have their frames at several places",
            ));
        }
        Ok(self.be32(run.body + 4).unwrap_or(0) as usize)
    }

    /// Checks every box that the demuxer descends into, and counts the entries of tables.
    fn check(&mut self, place: Place, depth: usize) -> Result<(), VideoError> {
        let skipped = match &place.kind {
            b"trak" | b"edts" | b"mdia" | b"minf" | b"dinf" | b"stbl" | b"moof" | b"traf" => 0,
            // Version, flags and a count come first.
            b"dref" | b"stsd" => 8,
            b"avc1" => VISUAL_ENTRY_BYTES,
            _ => return self.check_entries(place),
        };
        if depth == MAX_DEPTH {
            return Err(malformed("its boxes lie too deep in each other"));
        }
        let from = place.body.checked_add(skipped).filter(|from| *from <= place.end);
        let from = from.ok_or_else(|| malformed(format!("its box {} is cut short", name(place.kind))))?;
        // Of these two the demuxer reads no more than it needs; QuickTime ends their lists with four zero bytes.
        let is_loose = matches!(&place.kind, b"stsd" | b"avc1");
        let inner = self.inside(from, place.end, if is_loose { 8 } else { 1 })?;
        if place.kind == *b"avc1" && !inner.iter().any(|part| part.kind == *b"avcC") {
            return Err(malformed("its video track has no decoder configuration"));
        }
        check_once(&inner)?;
        // The demuxer reads the first box of these two whatever it is.
        if inner.is_empty() && matches!(&place.kind, b"edts" | b"stsd") {
            return Err(malformed(format!("its box {} is empty", name(place.kind))));
        }
        if inner.len() > 1 && place.kind == *b"stsd" {
            return Err(VideoError::Unsupported("an MP4 file whose frames have several descriptions"));
        }
        inner.into_iter().try_for_each(|part| self.check(part, depth + 1))
    }

    /// Checks how many entries a table says that it has.
    fn check_entries(&self, table: Place) -> Result<(), VideoError> {
        let most = match &table.kind {
            b"elst" => MAX_EDITS,
            kind if TABLES.contains(&kind) => self.limits.max_frames,
            _ => return Ok(()),
        };
        match self.be32(table.body + 4) {
            Some(entries) if entries as usize > most => {
                let kind = name(table.kind);
                Err(malformed(format!("its box {kind} has {entries} entries; at most {most}")))
            }
            _ => Ok(()),
        }
    }

    /// The first box of these types, each in the one before.
    fn descend(&mut self, from: Place, kinds: &[Kind]) -> Result<Option<Place>, VideoError> {
        let mut at = from;
        for kind in kinds {
            match self.children(at)?.into_iter().find(|part| part.kind == *kind) {
                Some(part) => at = part,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// What a track is: `vide`, `soun`, ...
    fn handler(&mut self, track: Place) -> Result<Option<Kind>, VideoError> {
        let handler = self.descend(track, &[*b"mdia", *b"hdlr"])?;
        Ok(handler.and_then(|handler| self.file.get(handler.body + 8..handler.body + 12)?.try_into().ok()))
    }

    /// Whether a track's header says that it is in use.
    fn is_enabled(&mut self, track: Place) -> Result<bool, VideoError> {
        let header = self.descend(track, &[*b"tkhd"])?;
        let version_and_flags = header.and_then(|header| self.be32(header.body));
        Ok(version_and_flags.is_some_and(|version_and_flags| version_and_flags & 1 == 1))
    }

    fn track_id(&mut self, track: Place) -> Result<Option<u32>, VideoError> {
        let Some(header) = self.descend(track, &[*b"tkhd"])? else { return Ok(None) };
        // Two times come before the id, of 4 or 8 bytes each.
        let at = if self.file.get(header.body) == Some(&1) { 20 } else { 12 };
        Ok(self.be32(header.body + at))
    }

    /// The type of a track's first sample entry.
    fn codec(&mut self, table: Place) -> Result<Kind, VideoError> {
        let none = || malformed("its video track says nothing about its codec");
        let descriptions = self.descend(table, &[*b"stsd"])?.ok_or_else(none)?;
        Ok(self.place(descriptions.body + 8, descriptions.end).map_err(|_| none())?.kind)
    }

    /// How many samples a sample table says there are.
    fn num_samples(&mut self, table: Place) -> Result<usize, VideoError> {
        let sizes = self.descend(table, &[*b"stsz"])?;
        let sizes =
            sizes.ok_or_else(|| malformed("its video track says nothing about the sizes of its frames"))?;
        Ok(self.be32(sizes.body + 8).unwrap_or(0) as usize)
    }

    /// Turns a box into free space.
    fn free(&mut self, place: Place) {
        self.file[place.start + 4..place.start + 8].copy_from_slice(&FREE);
    }

    fn be32(&self, at: usize) -> Option<u32> {
        Some(u32::from_be_bytes(self.file.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }

    fn be64(&self, at: usize) -> Option<u64> {
        Some(u64::from_be_bytes(self.file.get(at..at.checked_add(8)?)?.try_into().ok()?))
    }
}

/// Checks that what should be there once is not there twice.
fn check_once(parts: &[Place]) -> Result<(), VideoError> {
    for kind in ONCE {
        if parts.iter().filter(|part| part.kind == *kind).count() > 1 {
            return Err(malformed(format!("it has several boxes {}", name(*kind))));
        }
    }
    Ok(())
}

fn too_wide(place: Place) -> VideoError {
    malformed(format!("its box {} has a size of 64 bits", name(place.kind)))
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

    /// Where the last box of a type is: a file's first bytes name types, too.
    fn at(file: &[u8], kind: &[u8; 4]) -> usize {
        file.windows(4).rposition(|window| window == kind).unwrap() - 4
    }

    /// The file with more bytes at an offset, which lies in all of these boxes.
    fn inserted(mut file: Vec<u8>, offset: usize, bytes: &[u8], outer: &[&[u8; 4]]) -> Vec<u8> {
        // They all begin before the offset: their places are as before.
        for kind in outer {
            let place = at(&file, kind);
            let size = u32::from_be_bytes(file[place..][..4].try_into().unwrap()) + bytes.len() as u32;
            file[place..place + 4].copy_from_slice(&size.to_be_bytes());
        }
        file.splice(offset..offset, bytes.iter().copied());
        file
    }

    const TABLE: [&[u8; 4]; 5] = [b"moov", b"trak", b"mdia", b"minf", b"stbl"];
    const ENTRY: [&[u8; 4]; 7] = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"];

    #[test]
    fn what_is_checked_is_what_the_demuxer_reads() {
        let file = movie(&spec());
        let from = at(&file, b"stsz");
        let copy = file[from..at(&file, b"stco")].to_vec();
        assert!(problem(inserted(file.clone(), from, &copy, &TABLE)).contains("several boxes stsz"));
        let header = boxed(b"mvhd", &[0; 100]);
        let twice = inserted(file.clone(), at(&file, b"trak"), &header, &[b"moov"]);
        assert!(problem(twice).contains("several boxes mvhd"));
        let run = boxed(b"tfhd", &[&[0; 4][..], &1_u32.to_be_bytes()].concat()).repeat(2);
        let fragment = boxed(b"moof", &boxed(b"traf", &run));
        assert!(problem([file, fragment].concat()).contains("several boxes tfhd"));
    }

    /// The demuxer takes 8 bytes too few off such a size, and comes back to where it was.
    #[test]
    fn sizes_of_64_bits_are_for_data_only() {
        let file = movie(&spec());
        let data = at(&file, b"mdat");
        let size = (at(&file, b"moov") - data + 8) as u64;
        let mut wide = file.clone();
        wide[data..data + 4].copy_from_slice(&1_u32.to_be_bytes());
        wide.splice(data + 8..data + 8, size.to_be_bytes());
        assert!(kept(wide).is_ok());
        let mut circle = vec![0, 0, 0, 1];
        circle.extend(b"abcd\0\0\0\0\0\0\0\x18\0\0\0\0abcd");
        let wide = inserted(file.clone(), at(&file, b"avcC"), &circle, &ENTRY);
        assert!(problem(wide).contains("64 bits"));
        let wide = inserted(file.clone(), at(&file, b"stts"), &circle, &TABLE);
        assert!(problem(wide).contains("64 bits"));
        assert!(problem([file, circle].concat()).contains("64 bits"));
    }

    #[test]
    fn tables_have_no_more_entries_than_there_may_be_frames() {
        let file = movie(&MovieSpec { edits: vec![(40, 0)], offsets: vec![0; 5], ..spec() });
        for (kind, most) in [(b"elst", 256_u32), (b"stts", 54_000), (b"ctts", 54_000), (b"stco", 54_000)] {
            let entries = at(&file, kind) + 12;
            let with = |count: u32| {
                let mut file = file.clone();
                file[entries..entries + 4].copy_from_slice(&count.to_be_bytes());
                file
            };
            assert!(kept(with(most)).is_ok());
            assert!(problem(with(most + 1)).contains("entries; at most"), "{kind:?}");
        }
    }

    #[test]
    fn boxes_are_counted() {
        let many = boxed(b"free", &[]).repeat(MAX_BOXES);
        let file = movie(&spec());
        assert!(problem([file.clone(), many.clone()].concat()).contains("too many boxes"));
        assert!(problem([file.clone(), boxed(b"moof", &many)].concat()).contains("too many boxes"));
        assert!(kept([file, boxed(b"moof", &many[..8 * 1000])].concat()).is_ok());
    }

    /// What fragments of a track have in common.
    fn extension(track_id: u32) -> Vec<u8> {
        boxed(b"trex", &[&[0; 4][..], &track_id.to_be_bytes(), &[0; 16]].concat())
    }

    #[test]
    fn of_extensions_the_tracks_first_is_kept() {
        let file = movie(&spec());
        let all = [extension(7), extension(1), extension(1), extension(8).repeat(1000)].concat();
        let extended = inserted(file.clone(), at(&file, b"trak"), &boxed(b"mvex", &all), &[b"moov"]);
        let (_, after) = kept(extended).unwrap();
        assert_eq!((count(&after, b"mvex"), count(&after, b"trex")), (1, 1));
        assert_eq!(after[at(&after, b"trex")..][..32], extension(1));
        let of_others = boxed(b"mvex", &extension(7));
        let (_, after) = kept(inserted(file.clone(), at(&file, b"trak"), &of_others, &[b"moov"])).unwrap();
        assert_eq!(count(&after, b"mvex"), 0);
    }

    #[test]
    fn what_the_demuxer_does_not_read_right_is_unsupported() {
        let file = movie(&spec());
        let run = boxed(b"trun", &[&[0; 4][..], &1_u32.to_be_bytes()].concat());
        let header = boxed(b"tfhd", &[&[0; 4][..], &1_u32.to_be_bytes()].concat());
        let fragment = boxed(b"moof", &boxed(b"traf", &[header, run].concat()));
        assert!(matches!(kept([file.clone(), fragment].concat()), Err(VideoError::Unsupported(_))));
        let header = boxed(b"tfhd", &[&[0; 4][..], &1_u32.to_be_bytes()].concat());
        let run = boxed(b"trun", &[0; 8]);
        let fragment = boxed(b"moof", &boxed(b"traf", &[header, run.repeat(2)].concat()));
        assert!(matches!(kept([file.clone(), fragment].concat()), Err(VideoError::Unsupported(_))));
        let entry = file[at(&file, b"avc1")..at(&file, b"stts")].to_vec();
        let two = inserted(file.clone(), at(&file, b"stts"), &entry, &ENTRY[..6]);
        assert!(matches!(kept(two), Err(VideoError::Unsupported(_))));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_or_whole() {
        let file = movie(&MovieSpec { with_sound: true, ..spec() });
        for end in 8..file.len() {
            assert!(kept(file[..end].to_vec()).is_err(), "cut at {end} of {}", file.len());
        }
    }
}
