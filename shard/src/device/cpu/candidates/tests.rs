use super::super::testing::*;
use super::*;
use crate::device::Device;

fn sampling<'a>(penalized_ids: &'a [u32], temperature: Option<f32>, key: u64) -> RowSampling<'a> {
    let penalty = RowSampling { penalized_ids, repetition_penalty: 1.3, ..RowSampling::default() };
    RowSampling { temperature, noise_key: key, logprobs: Some(5), ..penalty }
}

/// The obviously right way, one token after the other.
fn expected(logits: &[f32], first_id: u32, sampling: &RowSampling<'_>) -> Candidate {
    let mut best = (f32::NEG_INFINITY, first_id, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        let id = first_id + index as u32;
        let mut score = logit;
        if sampling.penalized_ids.contains(&id) {
            score = if logit > 0.0 { logit / 1.3 } else { logit * 1.3 };
        }
        if let Some(temperature) = sampling.temperature {
            score = score * (1.0 / temperature) + gumbel(sampling.noise_key, id);
        }
        if score > best.0 {
            best = (score, id, logit);
        }
    }
    let max_logit = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut top: Vec<_> = logits.iter().enumerate().map(|(i, &logit)| (first_id + i as u32, logit)).collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    top.truncate(sampling.logprobs.unwrap_or(0));
    Candidate {
        score: best.0,
        token_id: best.1,
        logit: best.2,
        max_logit,
        sum_exp: logits.iter().map(|&x| (f64::from(x) - f64::from(max_logit)).exp()).sum::<f64>() as f32,
        top,
        offer: None,
    }
}

fn assert_same(expected: &Candidate, got: &Candidate, what: &str) {
    let close = (expected.sum_exp - got.sum_exp).abs() <= 1e-5 * expected.sum_exp;
    assert!(close, "{what}: sum {} instead of {}", got.sum_exp, expected.sum_exp);
    let got = Candidate { sum_exp: expected.sum_exp, ..got.clone() };
    assert_eq!(expected, &got, "{what}");
}

#[test]
fn agrees_with_one_token_after_the_other() {
    let devices = devices();
    for num_ids in [1, 15, 16, 100, PIECE_LEN, 2 * PIECE_LEN + 77] {
        let mut numbers = Numbers::new(num_ids as u64);
        let cols = num_ids.next_multiple_of(16) + 16;
        // Few levels, so that there are ties; the padding would win if it were looked at.
        let logits: Vec<f32> = (0..3 * cols)
            .map(|i| if i % cols < num_ids { (numbers.next() * 40.0).round() / 4.0 } else { 1000.0 })
            .collect();
        let first_id = 3000;
        let penalized: Vec<u32> = (2990..3000 + num_ids as u32 + 10).step_by(3).collect();
        let rows =
            [sampling(&penalized, None, 1), sampling(&penalized, Some(0.7), 2), sampling(&[], Some(1.5), 3)];
        let mut first: Option<Vec<u32>> = None;
        for (name, device) in &devices {
            let x = device.upload(3, cols, &logits).expect("room");
            let got = device.candidates(&x, first_id, num_ids, &rows).expect("it samples");
            for (row, got) in got.iter().enumerate() {
                let expected = expected(&logits[row * cols..][..num_ids], first_id, &rows[row]);
                assert_same(&expected, got, &format!("{num_ids} ids, row {row}, {name}"));
            }
            let sums: Vec<u32> = got.iter().map(|got| got.sum_exp.to_bits()).collect();
            assert_eq!(first.get_or_insert_with(|| sums.clone()), &sums, "bits of sums with {name}");
        }
    }
}

/// All tokens to draw from, in order, the obviously right way.
fn scaled(logits: &[f32], first_id: u32, row: &RowSampling<'_>) -> Vec<Offered> {
    let factor = 1.0 / row.temperature.expect("a draw");
    let mut all: Vec<Offered> = (first_id..)
        .zip(logits)
        .map(|(token_id, &logit)| {
            let bias = row.logit_bias.iter().find(|one| one.0 == token_id).map_or(0.0, |one| one.1);
            let mut scaled = logit + bias;
            if row.penalized_ids.contains(&token_id) {
                scaled = if scaled > 0.0 { scaled / 1.3 } else { scaled * 1.3 };
            }
            if let Some((_, count)) = row.answer_counts.iter().find(|one| one.0 == token_id) {
                scaled -= 0.25 * *count as f32 + 0.5;
            }
            Offered { token_id, scaled: scaled * factor, logit }
        })
        .collect();
    let order = |a: &Offered, b: &Offered| b.scaled.partial_cmp(&a.scaled).expect("numbers");
    // Stable, so that ids ascend among equal ones.
    all.sort_by(order);
    all
}

#[test]
fn offers_are_the_best_tokens_and_the_mass_of_the_others() {
    let devices = devices();
    for num_ids in [1, 15, 16, 100, PIECE_LEN, 2 * PIECE_LEN + 77] {
        let mut numbers = Numbers::new(num_ids as u64);
        let cols = num_ids.next_multiple_of(16) + 16;
        // Few levels, so that there are ties, and zeros of both signs; the padding would win if it were looked at.
        let logits: Vec<f32> = (0..cols)
            .map(|i| if i < num_ids { (numbers.next() * 40.0).round() / 4.0 } else { 1000.0 })
            .collect();
        let first_id = 3000;
        let ids = |step| (2990..3000 + num_ids as u32 + 10).step_by(step);
        let (penalized, bias) = (ids(3).collect::<Vec<_>>(), ids(40).map(|id| (id, 2.5)).collect::<Vec<_>>());
        let counts: Vec<_> = ids(7).map(|id| (id, id % 3 + 1)).collect();
        let row = RowSampling {
            logit_bias: &bias,
            answer_counts: &counts,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..sampling(&penalized, Some(0.7), 2)
        };
        let all = scaled(&logits[..num_ids], first_id, &row);
        for num_offered in [1, 7, 256, num_ids, num_ids + 20] {
            let row = RowSampling { num_offered, ..row.clone() };
            let (best, others) = all.split_at(num_offered.min(num_ids));
            let tail: f64 =
                others.iter().map(|one| (f64::from(one.scaled) - f64::from(all[0].scaled)).exp()).sum();
            let mut first = None;
            for (name, device) in &devices {
                let what = format!("{num_offered} of {num_ids}, {name}");
                let x = device.upload(1, cols, &logits).expect("room");
                let got = device.candidates(&x, first_id, num_ids, std::slice::from_ref(&row));
                let got = got.expect("it samples").remove(0).offer.expect("asked for");
                assert_eq!(got.best, best, "{what}");
                assert_eq!(got.num_ids, num_ids, "{what}");
                assert!(
                    (got.tail_sum_exp - tail).abs() <= 1e-5 * tail,
                    "{what}: {} for {tail}",
                    got.tail_sum_exp
                );
                let bits = got.tail_sum_exp.to_bits();
                assert_eq!(*first.get_or_insert(bits), bits, "bits of the tail, {what}");
            }
        }
    }
}

#[test]
fn offers_of_extreme_logits_are_finite() {
    for (name, device) in devices() {
        let logits: Vec<f32> = (0..32).map(|i| [0.0, -0.0, f32::MAX, f32::MIN, 1e-40, -3.0][i % 6]).collect();
        let x = device.upload(1, 32, &logits).expect("room");
        for (temperature, num_offered) in [(1e-5, 3), (100.0, 3), (1e-5, 32)] {
            let row = RowSampling { num_offered, ..sampling(&[2, 3], Some(temperature), 5) };
            let got = device.candidates(&x, 0, 32, &[row]).expect("it samples").remove(0);
            let offer = got.offer.expect("asked for");
            assert!(offer.best.iter().all(|one| one.scaled.is_finite()), "{name}: {offer:?}");
            assert!(offer.tail_sum_exp.is_finite() && got.score.is_finite(), "{name}: {offer:?}");
        }
    }
}

#[test]
fn a_rank_without_vocabulary_offers_nothing() {
    for (_, device) in devices() {
        let x = device.empty(2, 16).expect("room");
        let offering = RowSampling { num_offered: 3, ..sampling(&[1], Some(1.0), 1) };
        let rows = [sampling(&[1], None, 1), offering];
        let candidates = device.candidates(&x, 0, 0, &rows).expect("it samples");
        for got in &candidates {
            assert_eq!((got.score, got.sum_exp, got.top.len()), (f32::NEG_INFINITY, 0.0, 0));
        }
        assert_eq!((&candidates[0].offer, &candidates[1].offer), (&None, &Some(Offer::default())));
        assert!(
            device
                .candidates(&device.empty(0, 16).expect("room"), 0, 16, &[])
                .expect("it samples")
                .is_empty()
        );
    }
}

#[test]
fn a_logit_that_is_not_finite_is_never_lost() {
    for (name, device) in devices() {
        for num_ids in [1, 15, 16, 100, 2 * PIECE_LEN + 77] {
            let cols = num_ids.next_multiple_of(16);
            for bad in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::INFINITY, f32::NEG_INFINITY] {
                for place in [0, num_ids / 2, num_ids - 1] {
                    // The padding is not finite either, and is not looked at.
                    let good: Vec<f32> =
                        (0..cols).map(|i| if i < num_ids { i as f32 } else { f32::NAN }).collect();
                    let mut logits = [good.clone(), good.clone(), good].concat();
                    logits[cols + place] = bad;
                    let x = device.upload(3, cols, &logits).expect("room");
                    let rows = [sampling(&[], None, 1), sampling(&[3], Some(0.7), 2), sampling(&[], None, 1)];
                    let got = device.candidates(&x, 0, num_ids, &rows).expect("it samples");
                    let what = format!("{bad} at {place} of {num_ids}, {name}");
                    assert!(got[1].max_logit.is_nan() && got[1].score.is_nan(), "{what}");
                    for other in [&got[0], &got[2]] {
                        assert_eq!(
                            (other.token_id, other.max_logit),
                            (num_ids as u32 - 1, num_ids as f32 - 1.0),
                            "{what}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn penalty_and_temperature_keep_finite_logits_numbers() {
    for (name, device) in devices() {
        let logits: Vec<f32> = (0..32).map(|i| [0.0, -0.0, f32::MAX, f32::MIN, 1e-40, -3.0][i % 6]).collect();
        let x = device.upload(1, 32, &logits).expect("room");
        let ids: Vec<u32> = (0..32).collect();
        for temperature in [None, Some(1e-5), Some(f32::MAX)] {
            for repetition_penalty in [f32::MIN_POSITIVE, 1e-40, 2.0, f32::MAX] {
                let row = RowSampling { repetition_penalty, ..sampling(&ids, temperature, 5) };
                let got = device.candidates(&x, 0, 32, &[row]).expect("it samples").remove(0);
                let what = format!("temperature {temperature:?}, penalty {repetition_penalty}, {name}");
                assert!(got.score > f32::NEG_INFINITY && got.max_logit == f32::MAX, "{what}: {got:?}");
            }
        }
    }
}

#[test]
fn noise_draws_tokens_by_their_probabilities() {
    let (_, device) = devices().remove(1);
    let logits: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125].map(f32::ln).to_vec();
    let draws = 4000;
    let x = device.upload(1, 4, &logits).expect("room");
    let mut counts = [0; 4];
    for key in 0..draws {
        let row = RowSampling { logprobs: None, ..sampling(&[], Some(1.0), key) };
        let got = device.candidates(&x, 0, 4, &[row]).expect("it samples");
        assert!(got[0].top.is_empty());
        counts[got[0].token_id as usize] += 1;
    }
    for (count, share) in counts.into_iter().zip([0.5, 0.25, 0.125, 0.125]) {
        let expected = draws as f64 * share;
        let deviations = (f64::from(count) - expected).abs() / (expected * (1.0 - share)).sqrt();
        assert!(deviations < 4.0, "{count} draws instead of {expected}");
    }
}
