//! The bytes of every token.

use std::collections::HashMap;

/// The bytes that each token stands for, by token id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    /// The bytes of all tokens, one after another.
    bytes: Vec<u8>,
    /// Where each token's bytes end in `bytes`.
    ends: Vec<usize>,
    /// Which tokens produce no text.
    silent: Vec<bool>,
}

impl Vocabulary {
    /// A table of the base tokens, written in the byte-level alphabet, and the added tokens, written as they are.
    ///
    /// Special added tokens are silent. Ids that no token has are silent and have no bytes.
    pub(crate) fn new<'a>(
        base: impl Iterator<Item = (&'a str, u32)>,
        added: impl Iterator<Item = (&'a str, u32, bool)>,
    ) -> Self {
        let alphabet = byte_level_alphabet();
        let mut tokens: Vec<(u32, Vec<u8>, bool)> =
            base.map(|(token, id)| (id, decode_byte_level(&alphabet, token), false)).collect();
        tokens.extend(added.map(|(content, id, special)| (id, content.as_bytes().to_vec(), special)));
        tokens.sort_by_key(|(id, ..)| *id);
        let mut table = Self { bytes: Vec::new(), ends: Vec::new(), silent: Vec::new() };
        for (id, token, silent) in tokens {
            while table.ends.len() < id as usize {
                table.push(&[], true);
            }
            if table.ends.len() == id as usize {
                table.push(&token, silent);
            }
        }
        table
    }

    fn push(&mut self, token: &[u8], silent: bool) {
        self.bytes.extend_from_slice(token);
        self.ends.push(self.bytes.len());
        self.silent.push(silent);
    }

    /// One more than the largest token id.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of a token, of a control token too; empty for ids that no token has (models pad their vocabulary).
    pub fn token_bytes(&self, token_id: u32) -> &[u8] {
        let index = token_id as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..end]
    }

    /// The bytes that a token adds to the text of an answer: none for special tokens, as with the reference's
    /// `skip_special_tokens`.
    pub fn text_bytes(&self, token_id: u32) -> &[u8] {
        match self.silent.get(token_id as usize) {
            Some(false) => self.token_bytes(token_id),
            _ => &[],
        }
    }
}

/// The byte that each character of the byte-level alphabet stands for: printable Latin-1 characters stand for
/// themselves, and the other bytes, in order, are the characters from U+0100 (GPT-2's `bytes_to_unicode`).
fn byte_level_alphabet() -> HashMap<char, u8> {
    let is_printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 0x100_u32;
    (0..=255_u8)
        .map(|byte| {
            if is_printable(byte) {
                return (char::from(byte), byte);
            }
            let stand_in = char::from_u32(next).expect("U+0100 to U+0143 are characters");
            next += 1;
            (stand_in, byte)
        })
        .collect()
}

/// A token outside the alphabet stands for its own UTF-8, as in the reference's byte-level decoder.
fn decode_byte_level(alphabet: &HashMap<char, u8>, token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_the_byte_level_alphabet() {
        let base = [("a", 0), ("Ġhello", 1), ("Ċ", 2), ("æ", 4), ("漢", 5)];
        let added = [("<|end|>", 6, true), ("<tool_call>", 7, false)];
        let table = Vocabulary::new(base.into_iter(), added.into_iter());
        assert_eq!(table.len(), 8);
        assert_eq!(table.token_bytes(1), b" hello");
        assert_eq!(table.token_bytes(2), b"\n");
        assert_eq!(table.token_bytes(3), b"");
        assert_eq!(table.token_bytes(4), [0xE6]);
        assert_eq!(table.token_bytes(5), "漢".as_bytes());
        assert_eq!(table.token_bytes(6), b"<|end|>");
        assert_eq!(table.text_bytes(6), b"");
        assert_eq!(table.text_bytes(7), b"<tool_call>");
        assert_eq!(table.text_bytes(1000), b"");
    }

    #[test]
    fn the_alphabet_has_every_byte_once() {
        let mut bytes: Vec<u8> = byte_level_alphabet().into_values().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}
