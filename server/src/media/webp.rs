//! The chunks of a WebP file (RFC 9649): an extended file says its size twice, and decoders believe both.

/// Bytes of the file's own header, and of each chunk's.
const FILE_HEADER: usize = 12;
const CHUNK_HEADER: usize = 8;
/// Bytes of an animation's frame before the chunks in it.
const FRAME_HEADER: usize = 16;

/// Whether every picture in a WebP file is within `width` x `height` pixels, by its own header: those are what a decoder
/// makes room for, before it compares them with the size that the file's header tells.
pub(super) fn is_within(file: &[u8], width: u32, height: u32) -> bool {
    let Some(chunks) = file.get(FILE_HEADER..) else { return true };
    are_within(chunks, (width, height))
}

fn are_within(mut rest: &[u8], size: (u32, u32)) -> bool {
    while let Some((header, body)) = rest.split_at_checked(CHUNK_HEADER) {
        let length = u32::from_le_bytes(header[4..8].try_into().expect("four bytes")) as usize;
        // The last chunk may be cut short.
        let (body, after) = body.split_at(length.min(body.len()));
        let fits = match &header[..4] {
            b"VP8 " => lossy_size(body).is_none_or(|own| own.0 <= size.0 && own.1 <= size.1),
            b"VP8L" => lossless_size(body).is_none_or(|own| own.0 <= size.0 && own.1 <= size.1),
            b"ANMF" => body.get(FRAME_HEADER..).is_none_or(|frame| are_within(frame, size)),
            _ => true,
        };
        if !fits {
            return false;
        }
        // Chunks begin at even offsets.
        rest = after.get(length % 2..).unwrap_or_default();
    }
    true
}

/// Width and height of a key frame of VP8 (RFC 6386, 9.1).
fn lossy_size(frame: &[u8]) -> Option<(u32, u32)> {
    let side =
        |at: usize| Some(u32::from(u16::from_le_bytes(frame.get(at..at + 2)?.try_into().ok()?) & 0x3FFF));
    Some((side(6)?, side(8)?))
}

/// Width and height of a lossless picture (RFC 9649, 3.4).
fn lossless_size(picture: &[u8]) -> Option<(u32, u32)> {
    let bits = u32::from_le_bytes(picture.get(1..5)?.try_into().ok()?);
    Some(((bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let padding = &[0][..body.len() % 2];
        [kind, &(body.len() as u32).to_le_bytes()[..], body, padding].concat()
    }

    fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
        [b"RIFF\0\0\0\0WEBP".to_vec(), chunks.concat()].concat()
    }

    fn lossy(width: u16, height: u16) -> Vec<u8> {
        let sides = [width, height].map(u16::to_le_bytes).concat();
        chunk(b"VP8 ", &[&[0, 0, 0, 0x9D, 1, 0x2A][..], &sides, &[0]].concat())
    }

    fn lossless(width: u32, height: u32) -> Vec<u8> {
        let bits = (width - 1) | ((height - 1) << 14);
        chunk(b"VP8L", &[&[0x2F][..], &bits.to_le_bytes(), &[0; 8]].concat())
    }

    #[test]
    fn every_picture_in_the_file_counts() {
        let canvas = chunk(b"VP8X", &[0; 10]);
        for (picture, fits) in [
            (lossy(28, 20), true),
            (lossy(29, 20), false),
            (lossy(28, 21), false),
            (lossless(28, 20), true),
            (lossless(16_384, 1), false),
            (lossless(1, 16_384), false),
        ] {
            assert_eq!(is_within(&file(&[canvas.clone(), picture.clone()]), 28, 20), fits);
            let frame = chunk(b"ANMF", &[vec![0; FRAME_HEADER], picture].concat());
            let all = [canvas.clone(), chunk(b"ANIM", &[0; 6]), chunk(b"EXIF", &[7; 5]), frame];
            assert_eq!(is_within(&file(&all), 28, 20), fits);
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_walked_to_its_end() {
        let whole = file(&[chunk(b"VP8X", &[0; 10]), lossy(28, 20), lossless(28, 20)]);
        for end in 0..whole.len() {
            assert!(is_within(&whole[..end], 28, 20));
        }
        assert!(is_within(&[0xFF; 100], 1, 1));
    }
}
