//! Protobuf ends here: messages become the runner's own types, every number checked for having a meaning.
//!
//! What depends on the runner's state (ids, bounds of caches) the runner checks itself.

use lockstep_proto::shard as pb;

use crate::device::Truncation;
use crate::runner::step::{
    Admission, Chunk, DrawFailure, Encode, Fault, Grid, InField, MediaHash, MediaSpan, Sampling, SeqId, Step,
    StepError, StepResult,
};

/// Below this, a temperature is greedy.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// What a step asks for.
///
/// # Errors
/// The first field without a meaning.
pub fn step(request: pb::RunRequest) -> Result<Step, StepError> {
    Ok(Step {
        releases: request.releases.into_iter().map(SeqId).collect(),
        evictions: each(request.evictions, "evictions", |hash, field| {
            media_hash(&hash).in_field(|| field.into())
        })?,
        admissions: each(request.admissions, "admissions", admission)?,
        encodes: each(request.encodes, "encodes", |encode, field| {
            let hash = media_hash(&encode.hash).in_field(|| format!("{field}.hash"))?;
            let pb::Encode { feature_blocks, from, to, .. } = encode;
            Ok(Encode { hash, feature_blocks, from, to })
        })?,
        copies: request.copies.into_iter().map(|copy| (copy.source, copy.target)).collect(),
        chunks: request.chunks.into_iter().map(chunk).collect(),
    })
}

/// The answer to a step. Only rank 0 says what was drawn.
pub fn response(epoch: u64, step: u64, rank: usize, result: StepResult) -> pb::RunResponse {
    let sampled = if rank == 0 { result.sampled } else { Vec::new() };
    let sampled = sampled.into_iter().map(|sampled| pb::Sampled {
        sequence_id: sampled.id.0,
        tokens: sampled.tokens.into_iter().map(sampled_token).collect(),
        failure: sampled.failure.map(draw_failure).unwrap_or_default().into(),
    });
    pb::RunResponse {
        epoch,
        step,
        state_hash: result.state_hash,
        sampled: sampled.collect(),
        vision_us: result.vision_us,
        step_us: result.step_us,
    }
}

/// A hash of 32 bytes.
pub fn media_hash(bytes: &[u8]) -> Result<MediaHash, Fault> {
    bytes.try_into().map(MediaHash).map_err(|_| Fault::HashLength(bytes.len()))
}

/// A grid that is there and not empty.
pub fn grid(grid: Option<pb::Grid>) -> Result<Grid, Fault> {
    let pb::Grid { t, h, w } = grid.ok_or(Fault::Missing)?;
    if t == 0 || h == 0 || w == 0 { Err(Fault::Number(0.0)) } else { Ok(Grid { t, h, w }) }
}

/// Converts each item of a list, with the path of its field.
fn each<T, U>(
    items: Vec<T>,
    list: &str,
    convert: impl Fn(T, &str) -> Result<U, StepError>,
) -> Result<Vec<U>, StepError> {
    items.into_iter().enumerate().map(|(i, item)| convert(item, &format!("{list}[{i}]"))).collect()
}

fn admission(admission: pb::Admission, field: &str) -> Result<Admission, StepError> {
    let media = admission
        .media
        .into_iter()
        .enumerate()
        .map(|(i, span)| media_span(span, &format!("{field}.media[{i}]")));
    let params = admission.sampling.ok_or(Fault::Missing).in_field(|| format!("{field}.sampling"))?;
    Ok(Admission {
        id: SeqId(admission.sequence_id),
        token_ids: admission.token_ids,
        num_prompt_tokens: admission.num_prompt_tokens as usize,
        media: media.collect::<Result<_, _>>()?,
        sampling: sampling(params, &format!("{field}.sampling"))?,
        num_computed_tokens: admission.num_computed_tokens as usize,
        blocks: admission.blocks,
    })
}

fn media_span(span: pb::MediaSpan, field: &str) -> Result<MediaSpan, StepError> {
    let seconds = span.seconds_per_grid_t;
    if !seconds.is_finite() || seconds < 0.0 {
        return Err(StepError::invalid(format!("{field}.seconds_per_grid_t"), Fault::Number(seconds)));
    }
    Ok(MediaSpan {
        hash: media_hash(&span.hash).in_field(|| format!("{field}.hash"))?,
        first_token: span.first_token as usize,
        grid: grid(span.grid).in_field(|| format!("{field}.grid"))?,
        seconds_per_grid_t: (seconds > 0.0).then_some(seconds),
    })
}

fn sampling(params: pb::SamplingParams, field: &str) -> Result<Sampling, StepError> {
    let checked = |name: &str, value: f32, valid: bool| {
        let fault = Fault::Number(f64::from(value));
        if valid && value.is_finite() {
            Ok(value)
        } else {
            Err(StepError::invalid(format!("{field}.{name}"), fault))
        }
    };
    let temperature = checked("temperature", params.temperature, params.temperature >= 0.0)?;
    let temperature = (temperature >= LEAST_TEMPERATURE).then_some(temperature);
    let (top_p, min_p) = (params.top_p.unwrap_or(1.0), params.min_p);
    let truncation = Truncation::new(
        params.top_k as usize,
        checked("top_p", top_p, top_p > 0.0 && top_p <= 1.0)?,
        checked("min_p", min_p, (0.0..=1.0).contains(&min_p))?,
    );
    let penalty = params.repetition_penalty;
    let logit_bias = params.logit_bias.iter().enumerate().map(|(i, pb::LogitBias { token_id, bias })| {
        Ok((*token_id, checked(&format!("logit_bias[{i}].bias"), *bias, true)?))
    });
    Ok(Sampling {
        // A greedy draw is the first of the order that a truncation cuts.
        truncation: temperature.and(truncation),
        temperature,
        repetition_penalty: checked("repetition_penalty", penalty, penalty > 0.0)?,
        presence_penalty: checked("presence_penalty", params.presence_penalty, true)?,
        frequency_penalty: checked("frequency_penalty", params.frequency_penalty, true)?,
        logit_bias: logit_bias.collect::<Result<_, StepError>>()?,
        seed: params.seed,
        branch: params.branch,
        logprobs: params.logprobs.map(|n| n as usize),
    })
}

fn chunk(chunk: pb::Chunk) -> Chunk {
    Chunk {
        id: SeqId(chunk.sequence_id),
        start: chunk.start as usize,
        length: chunk.length as usize,
        new_blocks: chunk.new_blocks,
        max_new_tokens: chunk.max_new_tokens as usize,
    }
}

fn draw_failure(failure: DrawFailure) -> pb::DrawFailure {
    match failure {
        DrawFailure::LogitsNotFinite => pb::DrawFailure::LogitsNotFinite,
    }
}

fn sampled_token(token: crate::runner::step::SampledToken) -> pb::SampledToken {
    let top = token.top.into_iter().map(|(token_id, logprob)| pb::TokenProbability { token_id, logprob });
    pb::SampledToken { token_id: token.token_id, logprob: token.logprob, top: top.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> pb::RunRequest {
        let span = pb::MediaSpan {
            hash: vec![3; 32].into(),
            first_token: 1,
            grid: Some(pb::Grid { t: 1, h: 2, w: 4 }),
            seconds_per_grid_t: 0.0,
        };
        let sampling = pb::SamplingParams {
            temperature: 0.7,
            repetition_penalty: 1.0,
            seed: 5,
            branch: 1,
            logprobs: Some(2),
            top_k: 40,
            top_p: Some(0.9),
            min_p: 0.1,
            presence_penalty: 0.5,
            frequency_penalty: -0.25,
            logit_bias: vec![pb::LogitBias { token_id: 3, bias: -100.0 }],
        };
        let admission = pb::Admission {
            sequence_id: 9,
            token_ids: vec![1, 2, 2, 3],
            num_prompt_tokens: 4,
            media: vec![span],
            sampling: Some(sampling),
            num_computed_tokens: 3,
            blocks: vec![6],
            trace: None,
        };
        pb::RunRequest { admissions: vec![admission], ..Default::default() }
    }

    fn refusal(change: impl FnOnce(&mut pb::Admission)) -> String {
        let mut request = request();
        change(&mut request.admissions[0]);
        step(request).unwrap_err().to_string()
    }

    #[test]
    fn a_picture_has_no_seconds_and_a_small_temperature_is_greedy() {
        let mut request = request();
        let admission = step(request.clone()).unwrap().admissions.remove(0);
        assert_eq!(admission.media[0].seconds_per_grid_t, None);
        assert_eq!((admission.num_computed_tokens, &admission.blocks[..]), (3, &[6][..]));
        let mut expected = Sampling {
            temperature: Some(0.7),
            truncation: Some(Truncation { top_k: Some(40), top_p: 0.9, min_p: 0.1 }),
            presence_penalty: 0.5,
            frequency_penalty: -0.25,
            logit_bias: vec![(3, -100.0)],
            seed: 5,
            branch: 1,
            logprobs: Some(2),
            ..Sampling::default()
        };
        assert_eq!(admission.sampling, expected);
        request.admissions[0].sampling.as_mut().unwrap().temperature = 1e-6;
        request.admissions[0].media[0].seconds_per_grid_t = 0.5;
        let admission = step(request).unwrap().admissions.remove(0);
        assert_eq!(admission.media[0].seconds_per_grid_t, Some(0.5));
        (expected.temperature, expected.truncation) = (None, None);
        assert_eq!(admission.sampling, expected);
    }

    #[test]
    fn faults_name_their_field() {
        let sampling = |change: fn(&mut pb::SamplingParams)| {
            refusal(move |admission| change(admission.sampling.as_mut().unwrap()))
        };
        assert_eq!(
            sampling(|s| s.temperature = -1.0),
            "admissions[0].sampling.temperature: -1 is out of range"
        );
        assert!(sampling(|s| s.temperature = f32::NAN).contains("sampling.temperature"));
        assert!(refusal(|a| a.sampling = None).contains("admissions[0].sampling: is missing"));
        assert!(refusal(|a| a.media[0].grid = None).contains("admissions[0].media[0].grid: is missing"));
        assert!(refusal(|a| a.media[0].grid.as_mut().unwrap().w = 0).contains("media[0].grid"));
        assert!(
            refusal(|a| a.media[0].seconds_per_grid_t = f64::NAN).contains("media[0].seconds_per_grid_t")
        );
        let short = refusal(|a| a.media[0].hash = vec![1; 31].into());
        assert_eq!(short, "admissions[0].media[0].hash: has 31 bytes, must have 32");
        let evictions =
            pb::RunRequest { evictions: vec![vec![0; 32].into(), bytes::Bytes::new()], ..Default::default() };
        assert!(step(evictions).unwrap_err().to_string().starts_with("evictions[1]: has 0 bytes"));
    }

    #[test]
    fn every_number_of_sampling_must_have_a_meaning() {
        type Set = fn(&mut pb::SamplingParams, f32);
        const NOT_FINITE: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let fields: [(&str, &[f32], Set); 6] = [
            ("repetition_penalty", &[0.0, -1.0], |s, bad| s.repetition_penalty = bad),
            ("top_p", &[0.0, -0.5, 1.5], |s, bad| s.top_p = Some(bad)),
            ("min_p", &[-0.5, 1.5], |s, bad| s.min_p = bad),
            ("presence_penalty", &[], |s, bad| s.presence_penalty = bad),
            ("frequency_penalty", &[], |s, bad| s.frequency_penalty = bad),
            ("logit_bias[0].bias", &[], |s, bad| s.logit_bias[0].bias = bad),
        ];
        for (name, out_of_range, set) in fields {
            for bad in out_of_range.iter().chain(&NOT_FINITE) {
                let words = refusal(|admission| set(admission.sampling.as_mut().unwrap(), *bad));
                assert!(words.starts_with(&format!("admissions[0].sampling.{name}: ")), "{bad}: {words}");
            }
        }
    }

    #[test]
    fn only_rank_0_says_what_was_drawn() {
        let token =
            crate::runner::step::SampledToken { token_id: 4, logprob: Some(-0.5), top: vec![(4, -0.5)] };
        let failed = crate::runner::step::Sampled {
            id: SeqId(10),
            tokens: vec![],
            failure: Some(DrawFailure::LogitsNotFinite),
        };
        let drawn = crate::runner::step::Sampled { id: SeqId(9), tokens: vec![token], failure: None };
        let sampled = vec![drawn, failed];
        let result = StepResult { state_hash: 7, sampled, vision_us: 1, step_us: 2 };
        let first = response(3, 8, 0, result.clone());
        assert_eq!((first.epoch, first.step, first.state_hash), (3, 8, 7));
        assert_eq!(first.sampled[0].tokens[0].top[0].token_id, 4);
        assert_eq!(first.sampled[0].failure(), pb::DrawFailure::Unspecified);
        assert_eq!(first.sampled[1].failure(), pb::DrawFailure::LogitsNotFinite);
        assert!(response(3, 8, 1, result).sampled.is_empty());
    }
}
