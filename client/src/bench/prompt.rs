//! Random text of a wanted number of tokens, by the server's own count.

use crate::{Client, Request};

/// Frequent short words: one token each, after a space, in the vocabularies at hand. The count below does not rely on it.
const WORDS: [&str; 48] = [
    "the", "and", "for", "with", "from", "this", "that", "have", "you", "not", "are", "was", "but", "all",
    "one", "can", "had", "has", "more", "when", "will", "there", "what", "about", "which", "their", "time",
    "would", "like", "other", "than", "into", "only", "some", "could", "these", "two", "may", "first",
    "then", "any", "new", "work", "over", "such", "most", "made", "after",
];

/// Enough to bracket any target from a bad guess, and a bound if the count does not behave.
const MAX_COUNTS: usize = 24;

/// The first `count` words of the endless random text of `seed`.
pub(crate) fn random_text(seed: u64, count: usize) -> String {
    let mut state = seed;
    let mut words = Vec::with_capacity(count);
    for _ in 0..count {
        words.push(WORDS[(split_mix_64(&mut state) % WORDS.len() as u64) as usize]);
    }
    words.join(" ")
}

/// Sebastiano Vigna's SplitMix64 (public domain, 2015): reproducible everywhere, and good enough for words.
fn split_mix_64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Makes texts whose prompt, chat template included, has `tokens` tokens.
pub(crate) struct PromptMaker<'a> {
    client: &'a Client,
    tokens: usize,
    /// How many words the last text took: the next one takes about as many.
    guess: usize,
}

impl<'a> PromptMaker<'a> {
    /// Prompts of `tokens` tokens by the count of the server behind `client`.
    pub(crate) fn new(client: &'a Client, tokens: u32) -> Self {
        let tokens = tokens as usize;
        PromptMaker { client, tokens, guess: tokens.max(1) }
    }

    /// The random text of `seed` of as many words as the wanted tokens take; where no number of words gives exactly
    /// that many, of the most words that stay below.
    pub(crate) async fn make(&mut self, seed: u64) -> anyhow::Result<String> {
        // Word counts known to give too few and too many tokens.
        let mut below: Option<usize> = None;
        let mut above: Option<usize> = None;
        let mut words = self.guess;
        for _ in 0..MAX_COUNTS {
            let text = random_text(seed, words);
            let counted =
                self.client.count_tokens(&Request::new().user(text.as_str())).await?.prompt_tokens as usize;
            if counted == self.tokens {
                self.guess = words;
                return Ok(text);
            }
            if counted > self.tokens {
                anyhow::ensure!(
                    words > 1,
                    "--prompt-tokens {} is too few: the chat template with one word has {counted}",
                    self.tokens
                );
                above = Some(words);
                words = words.saturating_sub(counted - self.tokens).max(1);
            } else {
                below = Some(words);
                words += self.tokens - counted;
            }
            if let (Some(below), Some(above)) = (below, above) {
                if above - below <= 1 {
                    break;
                }
                if words <= below || words >= above {
                    words = below.midpoint(above);
                }
            }
        }
        let words =
            below.ok_or_else(|| anyhow::anyhow!("the server's token counts do not grow with the text"))?;
        self.guess = words;
        Ok(random_text(seed, words))
    }
}
