//! Drawing from the most probable tokens only: top-k, top-p and min-p over what the ranks offer.
//!
//! In the order of [`Offered::best_first`] each of the three keeps a prefix, so all of them keep the shortest, and the draw
//! is the Gumbel-max over it, with the noise of [`crate::runner::noise`]: exact, and independent of how the vocabulary is
//! split. A rank offers its best [`MAX_OFFERED`] tokens and the mass of the others. Merged, these are the best of the
//! vocabulary down to the largest of the ranks' last ones. Mostly that settles the draw; if not, all logits are needed.
//!
//! Sums are in f64: over the offered tokens in order, then over the tails in rank order. All ranks have the same bits. The
//! tails' last bits depend on the world size, as those of the logits do.

use super::draw::Choice;
use crate::device::{Offer, Offered, RowSampling, Truncation};
use crate::runner::noise::{MAX_GUMBEL, gumbel};

/// Tokens that a rank offers for one draw.
pub const MAX_OFFERED: usize = 256;

impl Truncation {
    /// The truncation to the `top_k` best (0: all), `top_p` and `min_p`; `None` where all tokens stay.
    pub fn new(top_k: usize, top_p: f32, min_p: f32) -> Option<Self> {
        let cuts = top_k > 0 || top_p < 1.0 || min_p > 0.0;
        cuts.then_some(Self { top_k: (top_k > 0).then_some(top_k), top_p, min_p })
    }

    /// How many tokens each rank offers at first.
    pub fn num_offered(&self) -> usize {
        self.top_k.map_or(MAX_OFFERED, |top_k| top_k.min(MAX_OFFERED))
    }

    /// The token to draw at a row, or `None` where the offers of all ranks do not settle it. `best_of_all` is the draw of the
    /// same row without truncation.
    pub fn choose(&self, offers: &[&Offer], row: &RowSampling<'_>, best_of_all: Choice) -> Option<Choice> {
        let merged = Merged::new(offers);
        let Kept { count, is_settled } = merged.kept(self);
        let kept = &merged.best[..count];
        // The best of all tokens, once it is among the kept ones, is also their best.
        if kept.iter().any(|token| token.token_id == best_of_all.token_id) {
            return Some(best_of_all);
        }
        if is_settled { draw(kept, row.noise_key) } else { None }
    }
}

/// Bytes of the host that draws from the best tokens take at most: the offers for `max_rows` rows, as found, sent, received
/// and read; and the offers of all of one row's tokens, also in pieces and merged.
pub fn host_bytes(max_rows: usize, vocab_size: usize, world_size: usize) -> usize {
    let first = max_rows * MAX_OFFERED.min(vocab_size) * (2 + 2 * world_size);
    let second = vocab_size * 6;
    (first + second) * size_of::<Offered>()
}

/// How many of the best tokens may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kept {
    /// So many may be for certain.
    count: usize,
    /// And no others.
    is_settled: bool,
}

/// The offers of all ranks.
struct Merged {
    best: Vec<Offered>,
    /// How many of `best` are the best of the whole vocabulary, too.
    num_known: usize,
    /// Tokens of the vocabulary.
    num_ids: usize,
    /// Sum of the weights of all tokens.
    mass: f64,
}

impl Merged {
    fn new(offers: &[&Offer]) -> Self {
        let mut best: Vec<Offered> = offers.iter().flat_map(|offer| offer.best.iter().copied()).collect();
        best.sort_by(Offered::best_first);
        // What a rank does not offer comes after the last that it does.
        let known = |offer: &Offer| match offer.best.last() {
            _ if offer.best.len() == offer.num_ids => best.len(),
            Some(last) => best.partition_point(|token| token.best_first(last).is_le()),
            None => 0,
        };
        let num_known = offers.iter().map(|offer| known(offer)).min().unwrap_or(0);
        let largest = best.first().copied();
        let tails = offers
            .iter()
            .filter_map(|offer| Some(offer.tail_sum_exp * weight(offer.best.first()?, largest.as_ref()?)));
        let mass = mass(&best) + tails.sum::<f64>();
        Self { num_known, num_ids: offers.iter().map(|offer| offer.num_ids).sum(), mass, best }
    }

    fn kept(&self, truncation: &Truncation) -> Kept {
        let Truncation { top_k, top_p, min_p } = *truncation;
        let pool = top_k.map_or(self.num_ids, |top_k| top_k.min(self.num_ids));
        let known = &self.best[..self.num_known.min(pool)];
        // The mass of the pool, or bounds of it where its last tokens are not known.
        let (least, most) = if known.len() == pool {
            (mass(known), mass(known))
        } else if pool == self.num_ids {
            (self.mass, self.mass)
        } else {
            (mass(known), self.mass)
        };
        let count = |mass: f64| {
            let enough = if top_p < 1.0 { f64::from(top_p) * mass } else { f64::INFINITY };
            let count = prefix(known, enough, f64::from(min_p));
            if known.len() == pool { count.or(Some(pool)) } else { count }
        };
        let surely = count(least);
        Kept { count: surely.unwrap_or(known.len()), is_settled: surely.is_some() && surely == count(most) }
    }
}

/// Probability, relative to that of the best token.
fn weight(token: &Offered, best: &Offered) -> f64 {
    (f64::from(token.scaled) - f64::from(best.scaled)).exp()
}

/// Sum of the weights of tokens from the best on.
fn mass(tokens: &[Offered]) -> f64 {
    tokens.iter().map(|token| weight(token, &tokens[0])).sum()
}

/// How many of `tokens`, from the best on, have the mass `enough`, or as many as have a weight of `min_weight`; `None` where
/// all of them stay, and others might.
fn prefix(tokens: &[Offered], enough: f64, min_weight: f64) -> Option<usize> {
    let mut sum = 0.0;
    for (count, token) in tokens.iter().enumerate() {
        let weight = weight(token, &tokens[0]);
        if sum >= enough || weight < min_weight {
            return Some(count);
        }
        sum += weight;
    }
    (sum >= enough).then_some(tokens.len())
}

/// The best of `kept` with its noise, the smaller id on a tie.
fn draw(kept: &[Offered], noise_key: u64) -> Option<Choice> {
    let mut best: Option<(f32, Offered)> = None;
    for token in kept {
        let score = token.scaled + gumbel(noise_key, token.token_id);
        match best {
            // They descend: no noise could lift this one or any later one to the best.
            Some((most, _)) if token.scaled + MAX_GUMBEL < most => break,
            Some((most, other)) if score < most || (score == most && other.token_id < token.token_id) => {}
            _ => best = Some((score, *token)),
        }
    }
    best.map(|(_, token)| Choice { token_id: token.token_id, logit: token.logit })
}

#[cfg(test)]
mod tests;
