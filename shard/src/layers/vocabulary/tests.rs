//! Draws of whole groups of ranks over known logits: the same at every world size, and as probable as they should be.

use std::{sync::Arc, thread};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::collective::{Alone, Collective, DEFAULT_SLOT_BYTES, SharedMemory};
use crate::device::cpu::{CpuDevice, CpuOptions};
use crate::device::{HostElements, HostMatrix, Truncation};
use crate::layers::truncation::MAX_OFFERED;
use crate::progress::Progress;
use crate::runner::noise::noise_key;

/// Inputs of the head. Only the first is not zero, so that the weights of a token are its logit and zeros.
const HIDDEN: usize = 16;
/// Rows that are drawn at a time.
const ROWS: usize = 100;

/// One rank of a group whose head gives `logits` for a hidden state of 1.
struct Rank {
    device: CpuDevice,
    head: VocabParallelHead<CpuDevice>,
}

impl Rank {
    fn new(logits: &[f32], collective: Box<dyn Collective>) -> Self {
        let parallel = Parallel { rank: collective.rank(), world_size: collective.world_size() };
        let options = CpuOptions {
            threads: 1,
            cpus: Vec::new(),
            workspace_bytes: 8 << 20,
            instruction_set: None,
            collective,
            progress: Arc::new(Progress::new(1)),
        };
        let device = CpuDevice::new(options).expect("a small device starts");
        let ColumnRange { cols: ids, padded } = partition::vocabulary(logits.len(), parallel);
        let mut data = vec![0.0; padded * HIDDEN];
        for (row, &logit) in data.chunks_exact_mut(HIDDEN).zip(&logits[ids.clone()]) {
            row[0] = logit;
        }
        let matrix = HostMatrix { rows: padded, cols: HIDDEN, data: HostElements::F32(data) };
        let linear = device.pack_linear(matrix, None).expect("packed");
        let slice = VocabSlice { linear, first_id: ids.start as u32, num_ids: ids.len() };
        Self { device, head: VocabParallelHead::new(Arc::new(slice)) }
    }

    /// Draws for `rows`, at hidden states of `inputs`.
    fn draw(&self, inputs: &[f32], rows: &[RowSampling<'_>]) -> Vec<Option<Drawn>> {
        let mut hidden = vec![0.0; inputs.len() * HIDDEN];
        hidden.chunks_exact_mut(HIDDEN).zip(inputs).for_each(|(row, input)| row[0] = *input);
        let hidden = self.device.upload(inputs.len(), HIDDEN, &hidden).expect("room");
        self.head.draw(&self.device, &hidden, rows).expect("drawn")
    }
}

/// What every rank of a group draws for `rows`, at hidden states of `inputs`; all draw the same.
fn draws(logits: &[f32], world_size: usize, inputs: &[f32], rows: &[RowSampling<'_>]) -> Vec<Option<Drawn>> {
    let work = |collective: Box<dyn Collective>| -> Vec<Option<Drawn>> {
        let rank = Rank::new(logits, collective);
        inputs
            .chunks(ROWS)
            .zip(rows.chunks(ROWS))
            .flat_map(|(inputs, rows)| rank.draw(inputs, rows))
            .collect()
    };
    if world_size == 1 {
        return work(Box::new(Alone));
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("group");
    SharedMemory::create(&path, world_size, DEFAULT_SLOT_BYTES).expect("created");
    let mut of_ranks: Vec<_> = thread::scope(|scope| {
        let (path, work) = (&path, &work);
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let collective = SharedMemory::join(path, rank, world_size, DEFAULT_SLOT_BYTES);
                    work(Box::new(collective.expect("joined")))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    });
    assert!(of_ranks.iter().all(|of_rank| *of_rank == of_ranks[0]), "all ranks draw the same");
    of_ranks.swap_remove(0)
}

/// Probabilities of all tokens, computed plainly from the definition, in f64.
fn distribution(logits: &[f32], row: &RowSampling<'_>) -> Vec<f64> {
    let temperature = f64::from(row.temperature.expect("a draw"));
    let mut tokens: Vec<(usize, f64)> = (0..logits.len())
        .map(|id| {
            let mut logit = f64::from(logits[id]);
            logit += row
                .logit_bias
                .iter()
                .filter(|one| one.0 == id as u32)
                .map(|one| f64::from(one.1))
                .sum::<f64>();
            if row.penalized_ids.contains(&(id as u32)) {
                let penalty = f64::from(row.repetition_penalty);
                logit = if logit > 0.0 { logit / penalty } else { logit * penalty };
            }
            if let Some((_, count)) = row.answer_counts.iter().find(|one| one.0 == id as u32) {
                logit -=
                    f64::from(row.frequency_penalty) * f64::from(*count) + f64::from(row.presence_penalty);
            }
            (id, logit / temperature)
        })
        .collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    let largest = tokens[0].1;
    let mut weights: Vec<(usize, f64)> = tokens.iter().map(|(id, x)| (*id, (x - largest).exp())).collect();
    if let Some(Truncation { top_k, top_p, min_p }) = row.truncation {
        weights.truncate(top_k.unwrap_or(usize::MAX));
        let total: f64 = weights.iter().map(|one| one.1).sum();
        let mut before = 0.0;
        weights.retain(|(_, weight)| {
            let is_kept = (top_p == 1.0 || before < f64::from(top_p) * total) && *weight >= f64::from(min_p);
            before += weight;
            is_kept
        });
    }
    let total: f64 = weights.iter().map(|one| one.1).sum();
    let mut probabilities = vec![0.0; logits.len()];
    weights.into_iter().for_each(|(id, weight)| probabilities[id] = weight / total);
    probabilities
}

/// The chi-square statistic of `counts` and its degrees of freedom; tokens that are expected less than 5 times count as one.
fn chi_square(counts: &[u32], probabilities: &[f64]) -> (f64, f64) {
    let draws: u32 = counts.iter().sum();
    let (mut statistic, mut cells, mut rare) = (0.0, 0.0, (0.0, 0.0));
    for (&count, probability) in counts.iter().zip(probabilities) {
        let (count, expected) = (f64::from(count), probability * f64::from(draws));
        assert!(expected > 0.0 || count == 0.0, "a token was drawn that must not be");
        if expected < 5.0 {
            rare = (rare.0 + count, rare.1 + expected);
        } else {
            statistic += (count - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    if rare.1 > 0.0 {
        statistic += (rare.0 - rare.1).powi(2) / rare.1.max(1.0);
        cells += 1.0;
    }
    (statistic, cells - 1.0)
}

/// What a chi-square statistic passes once in 1,000 (Wilson and Hilferty, 1931).
fn critical_value(freedom: f64) -> f64 {
    let variance = 2.0 / (9.0 * freedom);
    freedom * (1.0 - variance + 3.09 * variance.sqrt()).powi(3)
}

fn random_logits(len: usize) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(8);
    // The sum of several, so that few tokens stand out as in a model's logits.
    (0..len).map(|_| (0..6).map(|_| rng.random_range(-2.0..2.0_f32)).sum()).collect()
}

/// A mixture of settings at a temperature, with the truncation `(top_k, top_p, min_p)`.
fn mixture(temperature: f32, (top_k, top_p, min_p): (usize, f32, f32)) -> RowSampling<'static> {
    let truncation = Truncation::new(top_k, top_p, min_p);
    let num_offered = truncation.map_or(0, |truncation| truncation.num_offered());
    RowSampling { temperature: Some(temperature), truncation, num_offered, ..RowSampling::default() }
}

/// Settings with every kind of penalty.
fn penalized(row: RowSampling<'static>) -> RowSampling<'static> {
    RowSampling {
        logit_bias: &[(3, 4.5), (500, 6.0), (899, -3.0)],
        penalized_ids: &[0, 3, 7, 100, 400, 500, 700],
        repetition_penalty: 1.3,
        answer_counts: &[(500, 2), (7, 1), (401, 4)],
        presence_penalty: 0.7,
        frequency_penalty: -0.4,
        ..row
    }
}

#[test]
fn draws_are_as_probable_as_the_definition_says_at_every_world_size() {
    const DRAWS: usize = 8000;
    let logits = random_logits(900);
    let mixtures = [
        mixture(0.8, (50, 1.0, 0.0)),
        mixture(1.0, (0, 0.9, 0.0)),
        mixture(1.3, (0, 1.0, 0.05)),
        penalized(mixture(1.5, (40, 0.8, 0.02))),
        penalized(mixture(1.0, (0, 1.0, 0.0))),
        // Flat, so that offers do not reach.
        mixture(8.0, (0, 0.95, 0.0)),
        penalized(mixture(8.0, (400, 0.9, 0.0))),
    ];
    for (i, mixture) in mixtures.iter().enumerate() {
        let rows: Vec<_> = (0..DRAWS)
            .map(|draw| RowSampling { noise_key: noise_key(i as u64, 0, draw as u32), ..mixture.clone() })
            .collect();
        let inputs = vec![1.0; DRAWS];
        let drawn = |world_size| -> Vec<u32> {
            let drawn = draws(&logits, world_size, &inputs, &rows).into_iter();
            drawn.map(|drawn| drawn.expect("finite logits").token_id).collect()
        };
        let alone = drawn(1);
        assert!(drawn(3) == alone, "mixture {i} at world sizes 1 and 3");
        let mut counts = vec![0; logits.len()];
        alone.iter().for_each(|id| counts[*id as usize] += 1);
        let (statistic, freedom) = chi_square(&counts, &distribution(&logits, mixture));
        // Passed by chance once in 1,000; at these fixed seeds, never.
        let critical = critical_value(freedom);
        assert!(statistic < critical, "mixture {i}: {statistic} of {critical} at {freedom} degrees");
        println!("mixture {i}: chi-square {statistic:.1} of {critical:.1}, {freedom} degrees of freedom");
    }
}

#[test]
fn tokens_beyond_the_offers_are_drawn_too() {
    let logits: Vec<f32> = (0..3000).map(|id| id as f32 * -1e-3).collect();
    let inputs = [1.0; 60];
    for truncation in [(0, 0.9, 0.0), (2500, 1.0, 0.0), (0, 1.0, 0.1)] {
        let rows: Vec<_> = (0..60)
            .map(|key| RowSampling { noise_key: key, logprobs: Some(2), ..mixture(1.0, truncation) })
            .collect();
        let alone = draws(&logits, 1, &inputs, &rows);
        for world_size in [2, 3, 8] {
            let group = draws(&logits, world_size, &inputs, &rows);
            for (one, other) in group.iter().zip(&alone) {
                let (one, other) = (one.as_ref().expect("drawn"), other.as_ref().expect("drawn"));
                assert_eq!(one.token_id, other.token_id, "{truncation:?} at world size {world_size}");
                let logprob = |drawn: &Drawn| drawn.logprob.expect("asked for");
                assert!((logprob(one) - logprob(other)).abs() < 1e-5);
            }
        }
        // Logits descend, so that what lies beyond the offers is known by its id.
        let largest = alone.iter().flatten().map(|drawn| drawn.token_id).max();
        assert!(largest > Some(MAX_OFFERED as u32), "{truncation:?}: at most {largest:?}");
    }
}

#[test]
fn log_probabilities_are_those_of_the_token_that_is_drawn() {
    let logits = random_logits(900);
    let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    let row = penalized(mixture(2.0, (30, 0.95, 0.0)));
    let rows: Vec<_> =
        (0..200).map(|key| RowSampling { noise_key: key, logprobs: Some(1), ..row.clone() }).collect();
    let best = (0..900).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).map(|id| id as u32);
    for drawn in draws(&logits, 3, &[1.0; 200], &rows) {
        let Drawn { token_id, logprob, top } = drawn.expect("finite logits");
        let expected = f64::from(logits[token_id as usize]) - sum.ln();
        assert!((f64::from(logprob.expect("asked for")) - expected).abs() < 1e-5);
        // The model's own distribution has no penalties.
        assert_eq!(top.first().map(|(id, _)| *id), best);
    }
}

#[test]
fn a_row_of_logits_that_are_not_finite_fails_alone() {
    let logits = random_logits(900);
    let rows: Vec<_> = [(50, 1.0, 0.0), (0, 0.95, 0.0), (0, 0.99, 0.0)]
        .into_iter()
        .map(|truncation| RowSampling { noise_key: 5, ..mixture(8.0, truncation) })
        .collect();
    for world_size in [1, 3] {
        let healthy = draws(&logits, world_size, &[1.0; 3], &rows);
        for bad in [f32::NAN, f32::INFINITY] {
            let got = draws(&logits, world_size, &[1.0, bad, 1.0], &rows);
            assert_eq!((&got[0], &got[1], &got[2]), (&healthy[0], &None, &healthy[2]));
        }
    }
}
