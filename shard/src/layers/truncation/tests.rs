//! Sets and draws against a plain reference, however the vocabulary is split and however little is offered.

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

/// Tokens of the whole vocabulary. Their logits are not their scaled ones, so that one is not taken for the other.
fn vocabulary(scaled: &[f32]) -> Vec<Offered> {
    let token = |(id, &scaled): (u32, &f32)| Offered { token_id: id, scaled, logit: scaled + id as f32 };
    (0..).zip(scaled).map(token).collect()
}

/// What may be drawn, told with the words of the definition.
fn kept_by_definition(tokens: &[Offered], truncation: &Truncation) -> Vec<Offered> {
    let mut kept = tokens.to_vec();
    kept.sort_by(|a, b| b.scaled.partial_cmp(&a.scaled).expect("numbers").then(a.token_id.cmp(&b.token_id)));
    kept.truncate(truncation.top_k.unwrap_or(usize::MAX));
    let weights: Vec<f64> = kept.iter().map(|token| weight(token, &kept[0])).collect();
    let total: f64 = weights.iter().sum();
    let reached =
        |count: &usize| weights[..*count].iter().sum::<f64>() / total >= f64::from(truncation.top_p);
    let by_top_p = if truncation.top_p < 1.0 { (1..kept.len()).find(reached) } else { None };
    let by_min_p = weights.iter().position(|weight| *weight < f64::from(truncation.min_p));
    kept.truncate(by_top_p.unwrap_or(kept.len()).min(by_min_p.unwrap_or(kept.len())));
    kept
}

fn best_with_noise(tokens: &[Offered], noise_key: u64) -> Choice {
    let score = |token: &Offered| token.scaled + gumbel(noise_key, token.token_id);
    let best = tokens
        .iter()
        .max_by(|a, b| score(a).partial_cmp(&score(b)).expect("numbers").then(b.token_id.cmp(&a.token_id)))
        .expect("not empty");
    Choice { token_id: best.token_id, logit: best.logit }
}

/// What a rank with these tokens offers.
fn offer(tokens: &[Offered], num_offered: usize) -> Offer {
    let mut best = tokens.to_vec();
    best.sort_by(Offered::best_first);
    let others = best.split_off(num_offered.min(best.len()));
    let tail_sum_exp = others.iter().map(|token| weight(token, &best[0])).sum();
    Offer { best, num_ids: tokens.len(), tail_sum_exp }
}

/// The ranks' slices: anywhere, also empty.
fn split(rng: &mut SmallRng, tokens: &[Offered], world_size: usize) -> Vec<Vec<Offered>> {
    let mut ends: Vec<usize> = (1..world_size).map(|_| rng.random_range(0..=tokens.len())).collect();
    ends.sort_unstable();
    ends.push(tokens.len());
    let mut start = 0;
    let slice = |end| tokens[std::mem::replace(&mut start, end)..end].to_vec();
    ends.into_iter().map(slice).collect()
}

fn row(noise_key: u64) -> RowSampling<'static> {
    RowSampling { noise_key, ..RowSampling::default() }
}

/// The choice at a first round with `num_offered` tokens of each rank, and, if that does not settle it, of all tokens.
fn chosen(
    slices: &[Vec<Offered>],
    num_offered: usize,
    truncation: &Truncation,
    noise_key: u64,
) -> (Choice, bool) {
    let best = best_with_noise(&slices.concat(), noise_key);
    let choose = |num_offered| {
        let offers: Vec<Offer> = slices.iter().map(|slice| offer(slice, num_offered)).collect();
        truncation.choose(&offers.iter().collect::<Vec<_>>(), &row(noise_key), best)
    };
    match choose(num_offered) {
        Some(choice) => (choice, true),
        None => (choose(usize::MAX).expect("all tokens are known"), false),
    }
}

/// Logits of several characters: smooth, of few levels and so full of ties, flat, and with one that stands out.
fn random_logits(rng: &mut SmallRng, len: usize) -> Vec<f32> {
    let kind = rng.random_range(0..4);
    let mut logits: Vec<f32> = (0..len)
        .map(|_| match kind {
            0 => rng.random_range(-8.0..8.0),
            1 => f32::from(rng.random_range(-3_i8..4)),
            2 => 0.25,
            _ => rng.random_range(-1.0..1.0),
        })
        .collect();
    if kind == 3 {
        logits[rng.random_range(0..len)] = 12.0;
    }
    logits
}

fn random_truncation(rng: &mut SmallRng, len: usize) -> Truncation {
    loop {
        let top_k = if rng.random() { 0 } else { rng.random_range(1..len + 20) };
        let top_p = if rng.random() { 1.0 } else { rng.random_range(0.001..0.999) };
        let min_p = if rng.random() { 0.0 } else { rng.random_range(0.0..1.0_f32).powi(4) };
        if let Some(truncation) = Truncation::new(top_k, top_p, min_p) {
            return truncation;
        }
    }
}

#[test]
fn every_split_draws_what_the_definition_says() {
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut settled, mut not_settled) = (0, 0);
    for round in 0..3000 {
        let len = rng.random_range(1..300);
        let tokens = vocabulary(&random_logits(&mut rng, len));
        let truncation = random_truncation(&mut rng, len);
        let kept = kept_by_definition(&tokens, &truncation);
        // From too few to all that there are.
        let num_offered = truncation.top_k.unwrap_or(len).min([1, 4, 32, 1000][round % 4]);
        let world_size = 1 + round % 8;
        let slices = split(&mut rng, &tokens, world_size);
        for noise_key in 0..5 {
            let (choice, at_first) = chosen(&slices, num_offered, &truncation, noise_key);
            let expected = best_with_noise(&kept, noise_key);
            assert_eq!(choice, expected, "round {round}: {truncation:?} of {len} on {world_size} ranks");
            if at_first { settled += 1 } else { not_settled += 1 }
        }
    }
    assert!(settled > 5000 && not_settled > 1000, "{settled} and {not_settled}: both happen");
}

#[test]
fn a_set_is_settled_as_soon_as_it_is_known() {
    let tokens = vocabulary(&[3.0, 1.0, 2.0, 0.0, -1.0, -2.0]);
    let kept = |num_offered: usize, truncation: Option<Truncation>| {
        let slices = [offer(&tokens[..2], num_offered), offer(&tokens[2..], num_offered)];
        let Kept { count, is_settled } =
            Merged::new(&slices.iter().collect::<Vec<_>>()).kept(&truncation.expect("it cuts"));
        (count, is_settled)
    };
    // Of 3, 2, 1, 0: weights 1, 0.37, 0.14, 0.05 of 1.58. The first rank's 3 hides its 1, and the second's 2 its 0.
    assert_eq!(kept(1, Truncation::new(1, 1.0, 0.0)), (1, true));
    assert_eq!(kept(1, Truncation::new(2, 1.0, 0.0)), (1, false));
    assert_eq!(kept(1, Truncation::new(0, 0.6, 0.0)), (1, true));
    assert_eq!(kept(1, Truncation::new(0, 0.7, 0.0)), (1, false));
    assert_eq!(kept(1, Truncation::new(0, 1.0, 0.9)), (1, false));
    // With two from each, the first rank has nothing left to hide.
    assert_eq!(kept(2, Truncation::new(0, 0.7, 0.0)), (2, true));
    assert_eq!(kept(2, Truncation::new(0, 1.0, 0.1)), (3, true));
    assert_eq!(kept(2, Truncation::new(0, 1.0, 0.04)), (4, false));
    // The mass of five is not known, but lies between that of four and that of all.
    assert_eq!(kept(2, Truncation::new(5, 0.8, 0.0)), (2, true));
    assert_eq!(kept(2, Truncation::new(5, 0.999, 0.0)), (4, false));
    assert_eq!(kept(4, Truncation::new(0, 1.0, 0.001)), (6, true));
    assert_eq!(kept(4, Truncation::new(7, 1.0, 0.0)), (6, true));
}

#[test]
fn ties_go_to_the_smaller_token_at_every_boundary() {
    let tokens = vocabulary(&[0.5; 40]);
    for world_size in [1, 2, 5] {
        let slices: Vec<_> = tokens.chunks(40 / world_size).map(<[_]>::to_vec).collect();
        for count in [1, 7, 8, 9, 40] {
            let by_top_k = Truncation::new(count, 1.0, 0.0).expect("it cuts");
            // A share that ends within a token keeps this one, too.
            let by_top_p = Truncation::new(0, (count as f32 - 0.5) / 40.0, 0.0).expect("it cuts");
            for truncation in [by_top_k, by_top_p] {
                assert_eq!(kept_by_definition(&tokens, &truncation), tokens[..count]);
                for noise_key in 0..200 {
                    let (choice, _) = chosen(&slices, 8, &truncation, noise_key);
                    assert_eq!(choice, best_with_noise(&tokens[..count], noise_key));
                }
            }
        }
    }
}

#[test]
fn equal_scores_go_to_the_smaller_token() {
    // So large that noise is rounded away.
    let tokens = vocabulary(&[1e30; 6]);
    let truncation = Truncation::new(4, 1.0, 0.0).expect("it cuts");
    let best = Choice { token_id: 5, logit: 0.0 };
    let offers = [offer(&tokens[3..], 4), offer(&tokens[..3], 4)];
    let choice = truncation.choose(&offers.iter().collect::<Vec<_>>(), &row(1), best);
    assert_eq!(choice.map(|choice| choice.token_id), Some(0));
}

#[test]
fn extreme_logits_keep_at_least_one_token() {
    for scaled in [[f32::MAX, f32::MIN, 0.0], [f32::MIN; 3], [f32::MAX; 3], [1e-40, -1e-40, 0.0]] {
        for truncation in [(1, 1.0, 0.0), (0, f32::MIN_POSITIVE, 0.0), (0, 1.0, 1.0), (0, 0.999, 0.0)] {
            let truncation = Truncation::new(truncation.0, truncation.1, truncation.2).expect("it cuts");
            let tokens = vocabulary(&scaled);
            let expected = best_with_noise(&kept_by_definition(&tokens, &truncation), 3);
            for num_offered in [1, 3] {
                let slices = [tokens[..1].to_vec(), tokens[1..].to_vec()];
                assert_eq!(chosen(&slices, num_offered, &truncation, 3).0, expected, "{scaled:?}");
            }
        }
    }
}

#[test]
fn what_cuts_nothing_is_none() {
    assert_eq!(Truncation::new(0, 1.0, 0.0), None);
    assert_eq!(Truncation::new(50, 1.0, 0.0).map(|one| one.num_offered()), Some(50));
    assert_eq!(Truncation::new(1000, 0.5, 0.0).map(|one| one.num_offered()), Some(MAX_OFFERED));
    assert_eq!(Truncation::new(0, 1.0, 0.1).map(|one| one.num_offered()), Some(MAX_OFFERED));
}
