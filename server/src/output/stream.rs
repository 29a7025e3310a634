//! The text of one answer, as its tokens come.

use std::sync::Arc;

use super::detokenizer::Detokenizer;
use super::stop::StopStrings;
use crate::prompt::Vocabulary;

/// What one token added.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    /// Text that became certain; may be empty.
    pub text: String,
    /// The stop string that is complete: the answer has ended, and the text before it has all been given out.
    pub stopped: Option<String>,
}

/// Detokenizer and stop strings of one answer.
#[derive(Debug, Clone)]
pub struct OutputStream {
    detokenizer: Detokenizer,
    stops: StopStrings,
    has_stopped: bool,
    /// Kept for its memory.
    decoded: String,
}

impl OutputStream {
    /// A stream at the start of an answer.
    pub fn new(vocabulary: Arc<Vocabulary>, stops: StopStrings) -> Self {
        Self { detokenizer: Detokenizer::new(vocabulary), stops, has_stopped: false, decoded: String::new() }
    }

    /// Takes the next token. After a stop string every piece is empty.
    pub fn push(&mut self, token_id: u32) -> Piece {
        self.take(|detokenizer, text| detokenizer.push(token_id, text))
    }

    /// The rest of the text, when the answer ends for another reason than a stop string. (An unfinished character
    /// becomes U+FFFD, which may still complete a stop string.)
    pub fn finish(&mut self) -> Piece {
        let mut piece = self.take(Detokenizer::finish);
        if piece.stopped.is_none() {
            self.stops.finish(&mut piece.text);
        }
        self.has_stopped = true;
        piece
    }

    fn take(&mut self, decode: impl FnOnce(&mut Detokenizer, &mut String)) -> Piece {
        let mut piece = Piece::default();
        if self.has_stopped {
            return piece;
        }
        self.decoded.clear();
        decode(&mut self.detokenizer, &mut self.decoded);
        piece.stopped = self.stops.push(&self.decoded, &mut piece.text).map(str::to_owned);
        self.has_stopped = piece.stopped.is_some();
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens: 0 "Hel", 1 "lo ", 2 and 3 the halves of "é", 4 "EN", 5 "D!", 6 special.
    fn stream(stops: &[&str]) -> OutputStream {
        let base = [("Hel", 0), ("loĠ", 1), ("Ã", 2), ("©", 3), ("EN", 4), ("D!", 5)];
        let vocabulary = Vocabulary::new(base.into_iter(), [("<|end|>", 6, true)].into_iter());
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        OutputStream::new(Arc::new(vocabulary), StopStrings::new(&stops).unwrap())
    }

    fn texts(stream: &mut OutputStream, tokens: &[u32]) -> Vec<String> {
        tokens.iter().map(|token| stream.push(*token).text).collect()
    }

    #[test]
    fn emits_whole_characters_and_no_special_tokens() {
        let mut stream = stream(&[]);
        assert_eq!(texts(&mut stream, &[0, 1, 2, 3, 6, 2]), ["Hel", "lo ", "", "é", "", ""]);
        assert_eq!(stream.finish(), Piece { text: "\u{FFFD}".into(), stopped: None });
        assert_eq!(stream.finish(), Piece::default());
    }

    #[test]
    fn stops_inside_and_across_tokens() {
        let mut stream = stream(&["END"]);
        assert_eq!(texts(&mut stream, &[0, 4, 1, 4]), ["Hel", "", "ENlo ", ""]);
        assert_eq!(stream.push(5), Piece { text: String::new(), stopped: Some("END".into()) });
        assert_eq!(stream.push(0), Piece::default());
        assert_eq!(stream.finish(), Piece::default());
    }

    #[test]
    fn gives_out_what_was_held_back_at_the_end() {
        let mut stream = stream(&["END"]);
        assert_eq!(stream.push(4).text, "");
        assert_eq!(stream.finish().text, "EN");
    }
}
