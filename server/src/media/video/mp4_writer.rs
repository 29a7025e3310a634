//! MP4 files for tests: one track of video, with whatever is wrong with it.

/// What a movie has.
pub(super) struct MovieSpec {
    /// In pixels.
    pub(super) size: (u16, u16),
    /// Ticks per second of the media and of the movie.
    pub(super) timescales: (u32, u32),
    /// Each sample's bytes, in decoding order.
    pub(super) samples: Vec<Vec<u8>>,
    /// How long each sample lasts, in ticks of the media; the last one holds for all that follow.
    pub(super) durations: Vec<u32>,
    /// How much later than it is decoded each sample is shown; empty: not at all.
    pub(super) offsets: Vec<i32>,
    /// Duration in ticks of the movie and start in ticks of the media (-1: nothing is shown) of each edit.
    pub(super) edits: Vec<(u32, i32)>,
    /// a, b, c, d of the track's matrix.
    pub(super) matrix: [i32; 4],
    /// Sequence and picture parameter sets.
    pub(super) parameter_sets: (Vec<u8>, Vec<u8>),
    /// The kind of track.
    pub(super) handler: [u8; 4],
    /// Whether a track of sound and metadata are there as well.
    pub(super) with_sound: bool,
}

impl Default for MovieSpec {
    fn default() -> Self {
        Self {
            size: (64, 48),
            timescales: (12_800, 1000),
            samples: Vec::new(),
            durations: vec![512],
            offsets: Vec::new(),
            edits: Vec::new(),
            matrix: [0x1_0000, 0, 0, 0x1_0000],
            parameter_sets: (vec![0x67, 66, 0, 10], vec![0x68]),
            handler: *b"vide",
            with_sound: false,
        }
    }
}

/// A box of a type, with what is in it.
pub(super) fn boxed(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let size = u32::try_from(content.len() + 8).unwrap();
    [&size.to_be_bytes()[..], kind, content].concat()
}

/// A box that begins with a version and flags.
fn full(kind: &[u8; 4], version_and_flags: u32, words: &[u32]) -> Vec<u8> {
    let words: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    boxed(kind, &[&version_and_flags.to_be_bytes()[..], &words].concat())
}

/// The file: its type, its samples one after another, then the movie's header.
pub(super) fn movie(spec: &MovieSpec) -> Vec<u8> {
    let file_type = boxed(b"ftyp", b"isom\0\0\x02\0isomavc1");
    let data = boxed(b"mdat", &spec.samples.concat());
    let first_sample = u32::try_from(file_type.len() + 8).unwrap();
    let mut parts = vec![movie_header(spec), track(spec, 1, first_sample)];
    if spec.with_sound {
        let sound = MovieSpec { handler: *b"soun", samples: spec.samples.clone(), ..Default::default() };
        parts.insert(1, track(&sound, 2, first_sample));
        parts.push(boxed(b"udta", b"no box at all"));
    }
    [file_type, data, boxed(b"moov", &parts.concat())].concat()
}

fn movie_header(spec: &MovieSpec) -> Vec<u8> {
    let mut words = vec![0, 0, spec.timescales.1, 0, 0x1_0000, 0x0100_0000, 0, 0];
    words.extend([0x1_0000, 0, 0, 0, 0x1_0000, 0, 0, 0, 0x4000_0000]);
    words.extend([0; 6]);
    words.push(3);
    full(b"mvhd", 0, &words)
}

fn duration(spec: &MovieSpec, sample: usize) -> u32 {
    spec.durations[sample.min(spec.durations.len() - 1)]
}

fn track(spec: &MovieSpec, id: u32, first_sample: u32) -> Vec<u8> {
    let (width, height) = (u32::from(spec.size.0), u32::from(spec.size.1));
    let [a, b, c, d] = spec.matrix.map(|value| value as u32);
    let mut header = vec![0, 0, id, 0, 0, 0, 0, 0, 0];
    header.extend([a, b, 0, c, d, 0, 0, 0, 0x4000_0000, width << 16, height << 16]);
    let mut parts = vec![full(b"tkhd", 3, &header)];
    if !spec.edits.is_empty() {
        let mut words = vec![spec.edits.len() as u32];
        words.extend(spec.edits.iter().flat_map(|(duration, start)| [*duration, *start as u32, 0x1_0000]));
        parts.push(boxed(b"edts", &full(b"elst", 0, &words)));
    }
    let total: u32 = (0..spec.samples.len()).map(|sample| duration(spec, sample)).sum();
    let kind = u32::from_be_bytes(spec.handler);
    let media = [
        full(b"mdhd", 0, &[0, 0, spec.timescales.0, total, 0x55C4_0000]),
        full(b"hdlr", 0, &[0, kind, 0, 0, 0, 0]),
        boxed(b"minf", &[data_information(), sample_table(spec, first_sample)].concat()),
    ];
    parts.push(boxed(b"mdia", &media.concat()));
    boxed(b"trak", &parts.concat())
}

fn data_information() -> Vec<u8> {
    let count = [0, 0, 0, 0, 0, 0, 0, 1];
    boxed(b"dinf", &boxed(b"dref", &[&count[..], &full(b"url ", 1, &[])].concat()))
}

fn sample_table(spec: &MovieSpec, first_sample: u32) -> Vec<u8> {
    let num_samples = spec.samples.len() as u32;
    let mut times = vec![num_samples];
    times.extend((0..spec.samples.len()).flat_map(|sample| [1, duration(spec, sample)]));
    let mut sizes = vec![0, num_samples];
    sizes.extend(spec.samples.iter().map(|sample| sample.len() as u32));
    let mut parts = vec![
        sample_description(spec),
        full(b"stts", 0, &times),
        full(b"stsc", 0, &[1, 1, num_samples.max(1), 1]),
        full(b"stsz", 0, &sizes),
        full(b"stco", 0, &[1, first_sample]),
    ];
    if !spec.offsets.is_empty() {
        let mut words = vec![num_samples];
        words.extend(spec.offsets.iter().flat_map(|offset| [1, *offset as u32]));
        parts.push(full(b"ctts", 1 << 24, &words));
    }
    boxed(b"stbl", &parts.concat())
}

fn sample_description(spec: &MovieSpec) -> Vec<u8> {
    let (sps, pps) = &spec.parameter_sets;
    let length = |set: &[u8]| (set.len() as u16).to_be_bytes();
    let mut configuration = vec![1, 66, 0, 10, 0xFF, 0xE1];
    configuration.extend([&length(sps)[..], &sps[..], &[1], &length(pps), &pps[..]].concat());
    let mut entry = vec![0; 78];
    entry[7] = 1;
    entry[24..26].copy_from_slice(&spec.size.0.to_be_bytes());
    entry[26..28].copy_from_slice(&spec.size.1.to_be_bytes());
    entry.extend(boxed(b"avcC", &configuration));
    let count = [0, 0, 0, 0, 0, 0, 0, 1];
    boxed(b"stsd", &[&count[..], &boxed(b"avc1", &entry)].concat())
}
