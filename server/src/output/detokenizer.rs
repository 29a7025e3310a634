//! Tokens to text, as they come.

use std::sync::Arc;

use crate::prompt::Vocabulary;

/// Turns tokens into text, a token at a time, and never emits part of a character.
///
/// All the text together is what `String::from_utf8_lossy` makes of all the bytes together, which is what the
/// reference's byte-level decoder does: bytes that are no UTF-8 become U+FFFD.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    /// The beginning of a character, at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A detokenizer at the start of an answer.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, pending: Vec::new() }
    }

    /// Appends to `text` what becomes certain with this token.
    pub fn push(&mut self, token_id: u32, text: &mut String) {
        self.pending.extend_from_slice(self.vocabulary.text_bytes(token_id));
        let decoded = decode_complete(&self.pending, text);
        self.pending.drain(..decoded);
    }

    /// Appends to `text` what an unfinished character becomes at the end.
    pub fn finish(&mut self, text: &mut String) {
        text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.pending)));
    }
}

/// Appends all but an unfinished character at the end; returns how many bytes that were.
fn decode_complete(bytes: &[u8], text: &mut String) -> usize {
    let mut decoded = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        decoded += chunk.valid().len();
        let invalid = chunk.invalid();
        let is_last = decoded + invalid.len() == bytes.len();
        // `error_len` is `None` exactly where more bytes could still make a character.
        let is_unfinished =
            is_last && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if invalid.is_empty() || is_unfinished {
            continue;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        decoded += invalid.len();
    }
    decoded
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// However the bytes are cut, the text is that of all the bytes, and no piece of it is taken back.
    #[test]
    fn any_cutting_gives_the_lossy_text_of_the_whole() {
        let mut rng = StdRng::seed_from_u64(3);
        const PIECES: [&[u8]; 14] = [
            b"a",
            "é".as_bytes(),
            "漢".as_bytes(),
            "😀".as_bytes(),
            b"\xF0",
            b"\x9F",
            b"\x98",
            b"\x80",
            b"\xE6\xBC",
            b"\xC0\xAF",
            b"\xED\xA0\x80",
            b"\xFF",
            b"\xF4\x90",
            b" ",
        ];
        for _ in 0..50_000 {
            let bytes: Vec<u8> =
                (0..rng.random_range(0..8)).flat_map(|_| PIECES.choose(&mut rng).unwrap().to_vec()).collect();
            let (mut text, mut pending) = (String::new(), Vec::new());
            for byte in &bytes {
                pending.push(*byte);
                if rng.random_bool(0.5) {
                    let decoded = decode_complete(&pending, &mut text);
                    pending.drain(..decoded);
                    assert!(pending.len() <= 3);
                }
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
        }
    }
}
