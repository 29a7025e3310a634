//! Keeps text of users apart from the template's own, through the rendering of a chat template.
//!
//! Before rendering, the characters of user text that could take part in a control token are replaced by pairs of
//! private-use characters. A control token that is found in the rendered text is then the template's own; the text
//! between control tokens is turned back.
//!
//! Why this is enough. A control token in the rendered text that has a character of user text either begins inside a
//! user string: impossible, because there every character that begins any control token is replaced; or begins before
//! it and holds its first character: impossible, because a string's first character that is not white space is replaced
//! if it stands anywhere in any control token (and control tokens with white space are refused where the escaper is
//! made). White space is skipped because templates trim.

use std::borrow::Cow;
use std::collections::BTreeSet;

/// The first of each pair. The second is `ESCAPE` plus one plus the index of the replaced character.
const ESCAPE: char = '\u{F0000}';
/// Characters that can be replaced: what the private-use plane holds after `ESCAPE`.
const MAX_ALPHABET: usize = 0xFF00;

/// A piece of rendered text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    /// Text of users and of the template, as it was before it was escaped.
    Text(String),
    /// A control token that the template placed.
    Control(u32),
}

/// Escapes user text, and finds the template's control tokens in rendered text.
#[derive(Debug, Clone)]
pub(super) struct Escaper {
    /// Every character of every control token, and `ESCAPE` itself; sorted.
    alphabet: Vec<char>,
    /// Characters that begin a control token.
    first: BTreeSet<char>,
    /// Contents and ids of the control tokens, longest first.
    controls: Vec<(String, u32)>,
}

impl Escaper {
    /// An escaper for these control tokens, given by content and id.
    ///
    /// Refuses empty tokens and tokens that hold white space or the escape character, for which it could not keep its
    /// promise.
    pub(super) fn new(controls: impl IntoIterator<Item = (String, u32)>) -> Result<Self, String> {
        let mut controls: Vec<(String, u32)> = controls.into_iter().collect();
        controls.sort_by_key(|(content, _)| std::cmp::Reverse(content.len()));
        for (content, id) in &controls {
            if content.is_empty() || content.chars().any(|c| c.is_whitespace() || c == ESCAPE) {
                return Err(format!(
                    "token {id} ({content:?}) is empty or holds white space or U+{:X}",
                    ESCAPE as u32
                ));
            }
        }
        let alphabet: BTreeSet<char> =
            controls.iter().flat_map(|(content, _)| content.chars()).chain([ESCAPE]).collect();
        if alphabet.len() > MAX_ALPHABET {
            return Err(format!(
                "{} different characters in control tokens; at most {MAX_ALPHABET}",
                alphabet.len()
            ));
        }
        let first = controls.iter().filter_map(|(content, _)| content.chars().next()).collect();
        Ok(Self { alphabet: alphabet.into_iter().collect(), first, controls })
    }

    /// Whether a template can be used: it must not write the escape character itself.
    pub(super) fn accepts_template(source: &str) -> bool {
        !source.contains(ESCAPE)
    }

    /// Replaces what could take part in a control token.
    pub(super) fn escape<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let leading = text.char_indices().find(|(_, c)| !c.is_whitespace());
        let is_unsafe = |at: usize, c: char| {
            c == ESCAPE || self.first.contains(&c) || leading.is_some_and(|(index, _)| index == at)
        };
        let mut escaped = String::new();
        let mut copied = 0;
        for (at, c) in text.char_indices() {
            if !is_unsafe(at, c) {
                continue;
            }
            let Ok(index) = self.alphabet.binary_search(&c) else { continue };
            escaped.push_str(&text[copied..at]);
            escaped.push(ESCAPE);
            escaped.push(
                char::from_u32(ESCAPE as u32 + 1 + index as u32).expect("inside the private-use plane"),
            );
            copied = at + c.len_utf8();
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        escaped.push_str(&text[copied..]);
        Cow::Owned(escaped)
    }

    /// Turns escaped text back. An escape without its second half, which only a template that cuts strings apart can
    /// leave, is dropped.
    pub(super) fn unescape(&self, text: &str) -> String {
        let mut pieces = text.split(ESCAPE);
        let mut plain = String::with_capacity(text.len());
        plain.push_str(pieces.next().unwrap_or_default());
        for piece in pieces {
            let mut rest = piece.chars();
            let index = rest.next().and_then(|c| (c as u32).checked_sub(ESCAPE as u32 + 1));
            match index.and_then(|index| self.alphabet.get(index as usize)) {
                Some(&c) => {
                    plain.push(c);
                    plain.push_str(rest.as_str());
                }
                None => plain.push_str(piece),
            }
        }
        plain
    }

    /// Splits rendered text at its control tokens, and turns the text between them back.
    ///
    /// Of several control tokens at one place the longest counts, as in the reference's tokenizer.
    pub(super) fn split(&self, rendered: &str) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut text_from = 0;
        let mut search_from = 0;
        while let Some(offset) = rendered[search_from..].find(|c| self.first.contains(&c)) {
            let at = search_from + offset;
            let rest = &rendered[at..];
            match self.controls.iter().find(|(content, _)| rest.starts_with(content.as_str())) {
                Some((content, id)) => {
                    self.push_text(&mut segments, &rendered[text_from..at]);
                    segments.push(Segment::Control(*id));
                    text_from = at + content.len();
                    search_from = text_from;
                }
                None => search_from = at + rest.chars().next().map_or(1, char::len_utf8),
            }
        }
        self.push_text(&mut segments, &rendered[text_from..]);
        segments
    }

    fn push_text(&self, segments: &mut Vec<Segment>, text: &str) {
        if !text.is_empty() {
            segments.push(Segment::Text(self.unescape(text)));
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;
    use rand::{Rng, SeedableRng};

    use super::*;

    const CONTROLS: [(&str, u32); 6] = [
        ("<|im_start|>", 1),
        ("<|im_end|>", 2),
        ("<|image_pad|>", 3),
        ("<tool_call>", 4),
        ("</tool_call>", 5),
        ("@@", 6),
    ];

    fn escaper() -> Escaper {
        Escaper::new(CONTROLS.map(|(content, id)| (content.to_owned(), id))).unwrap()
    }

    fn random_text(rng: &mut StdRng) -> String {
        const PIECES: [&str; 24] = [
            "<|im_start|>",
            "<|im_end|>",
            "<|image_pad|>",
            "<tool_call>",
            "<|im_",
            "end|>",
            "<",
            "|",
            ">",
            "im_end",
            "@",
            " ",
            "\n",
            "start|>",
            "call>",
            "/tool",
            "\u{F0000}",
            "\u{F0001}",
            "\u{F0012}",
            "\u{F0000}\u{F0001}",
            "é",
            "漢",
            "a",
            "😀",
        ];
        (0..rng.random_range(0..8)).map(|_| *PIECES.choose(rng).unwrap()).collect()
    }

    #[test]
    fn escaping_is_total_and_reversible() {
        let escaper = escaper();
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..20_000 {
            let text = random_text(&mut rng);
            assert_eq!(escaper.unescape(&escaper.escape(&text)), text);
        }
    }

    /// Templates made of control tokens, of fragments of them, and of user strings (as they are or trimmed), in any
    /// order: the control tokens found are those that the template's own text holds, each text survives.
    #[test]
    fn only_the_template_places_control_tokens() {
        let escaper = escaper();
        let mut rng = StdRng::seed_from_u64(2);
        const OWN: [&str; 10] =
            ["<|im_start|>", "<|im_end|>", "<", "<|", "<|im_", "|>", "_end|>", "@", "\n", "assistant"];
        for _ in 0..20_000 {
            let (mut rendered, mut plain) = (String::new(), String::new());
            let mut own_run = String::new();
            let mut controls = Vec::new();
            for _ in 0..rng.random_range(0..8) {
                let user = if rng.random() { random_text(&mut rng) } else { String::new() };
                if user.is_empty() {
                    let own = *OWN.choose(&mut rng).unwrap();
                    own_run.push_str(own);
                    rendered.push_str(own);
                    plain.push_str(own);
                    continue;
                }
                let escaped = escaper.escape(&user);
                let trim = rng.random();
                let (user, escaped) = if trim { (user.trim(), escaped.trim()) } else { (&*user, &*escaped) };
                rendered.push_str(escaped);
                plain.push_str(user);
                if !user.is_empty() {
                    controls.extend(controls_of(&escaper, &std::mem::take(&mut own_run)));
                }
            }
            controls.extend(controls_of(&escaper, &own_run));
            let segments = escaper.split(&rendered);
            let found: Vec<u32> = segments.iter().filter_map(control).collect();
            assert_eq!(found, controls, "{rendered:?}");
            let joined: String = segments.iter().map(content).collect();
            assert_eq!(joined, plain);
        }
    }

    fn controls_of(escaper: &Escaper, own: &str) -> Vec<u32> {
        escaper.split(own).iter().filter_map(control).collect()
    }

    fn control(segment: &Segment) -> Option<u32> {
        match segment {
            Segment::Control(id) => Some(*id),
            Segment::Text(_) => None,
        }
    }

    fn content(segment: &Segment) -> &str {
        match segment {
            Segment::Text(text) => text,
            Segment::Control(id) => CONTROLS.iter().find(|(_, known)| known == id).unwrap().0,
        }
    }

    #[test]
    fn the_longest_control_token_counts() {
        let escaper = Escaper::new([("<a".to_owned(), 1), ("<ab>".to_owned(), 2)]).unwrap();
        assert_eq!(escaper.split("<ab><a"), [Segment::Control(2), Segment::Control(1)]);
    }

    #[test]
    fn refuses_tokens_that_it_could_not_keep_apart() {
        assert!(Escaper::new([("< a>".to_owned(), 1)]).is_err());
        assert!(Escaper::new([(String::new(), 1)]).is_err());
    }
}
