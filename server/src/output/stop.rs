//! Stop strings in streamed text.

use crate::limits::{MAX_STOP_BYTES, MAX_STOP_STRINGS};

/// What is wrong with a request's stop strings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// There are too many.
    #[error("{count} stop strings; at most {MAX_STOP_STRINGS}")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// One is empty.
    #[error("stop string {index} is empty")]
    Empty {
        /// Which one.
        index: usize,
    },
    /// One is too long.
    #[error("stop string {index} has {bytes} bytes; at most {MAX_STOP_BYTES}")]
    TooLong {
        /// Which one.
        index: usize,
        /// Its length.
        bytes: usize,
    },
}

impl StopError {
    /// Which stop string is at fault; `None` for all of them together.
    pub fn index(&self) -> Option<usize> {
        match *self {
            StopError::TooMany { .. } => None,
            StopError::Empty { index } | StopError::TooLong { index, .. } => Some(index),
        }
    }
}

/// Finds the first stop string in text that comes in pieces.
///
/// The first is the one that is complete first; of several that are complete at the same place, the longest. So what is
/// found does not depend on how the text was cut. Text that may be the beginning of a stop string is held back. The
/// work is a few comparisons for each byte and stop string (Knuth, Morris and Pratt).
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

#[derive(Debug, Clone)]
struct Pattern {
    stop: String,
    /// For each length of a matched beginning, the length of the longest shorter beginning that it ends with.
    fallback: Vec<usize>,
    /// How many bytes of the beginning the text ends with.
    matched: usize,
}

impl StopStrings {
    /// A matcher at the start of an answer. Reports everything that is wrong at once.
    pub fn new(stops: &[String]) -> Result<Self, Vec<StopError>> {
        let mut errors = Vec::new();
        if stops.len() > MAX_STOP_STRINGS {
            errors.push(StopError::TooMany { count: stops.len() });
        }
        for (index, stop) in stops.iter().enumerate() {
            match stop.len() {
                0 => errors.push(StopError::Empty { index }),
                bytes if bytes > MAX_STOP_BYTES => errors.push(StopError::TooLong { index, bytes }),
                _ => {}
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self { patterns: stops.iter().map(|stop| Pattern::new(stop)).collect(), held: String::new() })
    }

    /// Takes more text. Appends to `out` what is certain to be part of the answer, and returns the stop string if one
    /// is complete; what follows it is dropped, and no more text may be pushed.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<&str> {
        self.held.push_str(text);
        let new_from = self.held.len() - text.len();
        for (at, byte) in text.bytes().enumerate() {
            // Every pattern takes the byte; of those that are complete the longest counts.
            let mut complete: Option<(usize, usize)> = None;
            for (index, pattern) in self.patterns.iter_mut().enumerate() {
                if pattern.advance(byte) {
                    complete = complete.max(Some((pattern.stop.len(), index)));
                }
            }
            if let Some((_, index)) = complete {
                let stop = &self.patterns[index].stop;
                out.push_str(&self.held[..new_from + at + 1 - stop.len()]);
                self.held.clear();
                return Some(stop);
            }
        }
        let hold = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        // A beginning of a stop string begins with a whole character, so this is between characters.
        let certain = self.held.len() - hold;
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// Appends to `out` what was held back, at the end of the answer.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

impl Pattern {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = fallback[length];
            }
            length += usize::from(bytes[at] == bytes[length]);
            fallback[at + 1] = length;
        }
        Self { stop: stop.to_owned(), fallback, matched: 0 }
    }

    /// Takes one byte; tells whether the stop string is complete. After that the pattern is not used again.
    fn advance(&mut self, byte: u8) -> bool {
        let bytes = self.stop.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn stops(stops: &[&str]) -> StopStrings {
        StopStrings::new(&stops.iter().map(|stop| (*stop).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    /// The text before the first stop string, found by looking at every beginning of the text.
    fn naive<'s>(stops: &[&'s str], text: &str) -> (String, Option<&'s str>) {
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let mut ending = stops.iter().filter(|stop| text[..end].ends_with(**stop)).collect::<Vec<_>>();
            ending.sort_by_key(|stop| stop.len());
            if let Some(stop) = ending.last() {
                return (text[..end - stop.len()].to_owned(), Some(stop));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn any_cutting_agrees_with_a_naive_search() {
        let mut rng = StdRng::seed_from_u64(4);
        const LETTERS: [&str; 4] = ["a", "b", "é", "漢"];
        for _ in 0..30_000 {
            let word = |rng: &mut StdRng, lengths: std::ops::Range<usize>| -> String {
                (0..rng.random_range(lengths)).map(|_| *LETTERS.choose(rng).unwrap()).collect()
            };
            let patterns: Vec<String> = (0..rng.random_range(0..4)).map(|_| word(&mut rng, 1..6)).collect();
            let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
            let text = word(&mut rng, 0..30);
            let mut matcher = stops(&patterns);
            let (mut out, mut stopped) = (String::new(), None);
            let mut piece = String::new();
            for c in text.chars() {
                piece.push(c);
                if rng.random_bool(0.4) {
                    stopped = matcher.push(&std::mem::take(&mut piece), &mut out).map(str::to_owned);
                    if stopped.is_some() {
                        break;
                    }
                }
            }
            if stopped.is_none() {
                stopped = matcher.push(&piece, &mut out).map(str::to_owned);
            }
            if stopped.is_none() {
                matcher.finish(&mut out);
            }
            let (expected, expected_stop) = naive(&patterns, &text);
            assert_eq!((out, stopped.as_deref()), (expected, expected_stop), "{patterns:?} in {text:?}");
        }
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut matcher = stops(&["###", "\nUser:"]);
        let mut out = String::new();
        assert_eq!(matcher.push("one ##", &mut out), None);
        assert_eq!(out, "one ");
        assert_eq!(matcher.push("two\nUs", &mut out), None);
        assert_eq!(out, "one ##two");
        assert_eq!(matcher.push("er: three", &mut out), Some("\nUser:"));
        assert_eq!(out, "one ##two");
    }

    #[test]
    fn reports_everything_that_is_wrong() {
        let mut bad = vec!["x".to_owned(); MAX_STOP_STRINGS - 1];
        bad.extend([String::new(), "y".repeat(MAX_STOP_BYTES + 1)]);
        assert_eq!(
            StopStrings::new(&bad).unwrap_err(),
            [
                StopError::TooMany { count: 17 },
                StopError::Empty { index: 15 },
                StopError::TooLong { index: 16, bytes: 257 }
            ]
        );
    }
}
