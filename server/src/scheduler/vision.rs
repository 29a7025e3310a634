//! What vision encoding costs, and how far a budget gets with it.
//!
//! The tower takes the temporal patches of a medium one after the other, each stage after stage. Work is counted in units of
//! one token in one stage, in the order in which it is done (temporal patch, stage, token), so that how far a medium is, is
//! one number.

use super::types::Medium;

/// What the vision tower tells of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisionCosts {
    /// Stages that every temporal patch goes through, at least 1.
    pub num_stages: u32,
    /// Those in which every token attends to all of its temporal patch, from 0.
    pub attending_stages: Vec<u32>,
    /// Tokens in a temporal patch with which attending to them costs as much as the rest of a stage, at least 1.
    pub attention_tokens: u32,
}

/// How much work a medium is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MediumWork {
    /// Tokens of a temporal patch.
    frame_tokens: u64,
    /// Units in all.
    pub total: u64,
}

impl VisionCosts {
    /// The work of a medium.
    pub(super) fn work(&self, medium: &Medium) -> MediumWork {
        MediumWork {
            frame_tokens: u64::from(medium.num_tokens / medium.grid[0].max(1)),
            total: u64::from(medium.num_tokens) * u64::from(self.num_stages),
        }
    }

    /// How far work that is at `from` gets with `tokens` of a step's budget, and how many of these it takes.
    ///
    /// A token through all stages is priced like a token of text, and one that attends to many more accordingly. With the
    /// released checkpoints, whose towers have the same dimensions, a token meets 2.6 billion weights there, against 2.8 (3B),
    /// 6.5 (7B) and more in the text: a step full of pictures is no longer than one full of text.
    pub(super) fn advance(&self, work: MediumWork, from: u64, tokens: u32) -> (u64, u32) {
        let price = self.token_price();
        let budget = u64::from(tokens) * price;
        let (mut at, mut left) = (from, budget);
        while at < work.total {
            let unit = self.unit_price(at, work.frame_tokens);
            let until_next_stage = work.frame_tokens - at % work.frame_tokens;
            let units = until_next_stage.min(left / unit);
            at += units;
            left -= units * unit;
            if units < until_next_stage {
                break;
            }
        }
        (at, (budget - left).div_ceil(price) as u32)
    }

    /// Prices are in parts of which a unit that attends to its window has `attention_tokens`.
    fn token_price(&self) -> u64 {
        u64::from(self.num_stages) * u64::from(self.attention_tokens)
    }

    /// The price of the unit at `at`. At most that of a token, so that no budget is too small to get on: with the released
    /// checkpoints this holds back the price from 67,000 tokens in a temporal patch on.
    fn unit_price(&self, at: u64, frame_tokens: u64) -> u64 {
        let stage = at / frame_tokens % u64::from(self.num_stages);
        let attends = self.attending_stages.iter().any(|&attending| u64::from(attending) == stage);
        let attended = if attends { frame_tokens } else { 0 };
        (u64::from(self.attention_tokens) + attended).min(self.token_price())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::MediaHash;

    fn medium(t: u32, frame_tokens: u32) -> Medium {
        let hash = MediaHash([1; 32]);
        let num_tokens = t * frame_tokens;
        Medium { hash, first_token: 0, num_tokens, grid: [t, 2, 2 * frame_tokens], seconds_per_grid_t: 0.0 }
    }

    /// The released checkpoints'.
    fn released() -> VisionCosts {
        VisionCosts { num_stages: 36, attending_stages: vec![8, 17, 26, 35], attention_tokens: 1922 }
    }

    #[test]
    fn a_small_picture_costs_a_little_more_than_its_tokens() {
        let costs = released();
        let work = costs.work(&medium(1, 391));
        assert_eq!(work.total, 391 * 36);
        assert_eq!(costs.advance(work, 0, 512), (work.total, 400));
        assert_eq!(costs.advance(work, 0, 400), (work.total, 400));
        assert!(costs.advance(work, 0, 399).0 < work.total);
        // A video of as many tokens in smaller temporal patches attends to less.
        let work = costs.work(&medium(17, 23));
        assert_eq!(costs.advance(work, 0, 512), (work.total, 392));
    }

    #[test]
    fn the_largest_picture_takes_many_steps_none_of_which_exceeds_the_budget() {
        let costs = released();
        let work = costs.work(&medium(1, 16_384));
        let (mut at, mut steps) = (0, 0);
        while at < work.total {
            let (to, spent) = costs.advance(work, at, 512);
            assert!(to > at && spent <= 512);
            (at, steps) = (to, steps + 1);
        }
        assert_eq!(steps, 63);
    }

    #[test]
    fn any_budget_gets_on() {
        let costs = VisionCosts { num_stages: 2, attending_stages: vec![1], attention_tokens: 3 };
        let work = costs.work(&medium(2, 1000));
        assert_eq!(costs.advance(work, 0, 1), (2, 1));
        assert_eq!(costs.advance(work, 1000, 1), (1001, 1));
        assert_eq!(costs.advance(work, 3999, 9), (4000, 1));
        assert_eq!(costs.advance(work, 0, 0), (0, 0));
    }
}
