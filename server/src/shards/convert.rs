//! Between the scheduler's types and the protocol with the shards. Protobuf ends here.

use std::collections::HashMap;

use bytes::Bytes;
use lockstep_proto::shard as pb;
use opentelemetry::trace::SpanContext;

use super::types::{MemoryPlan, ModelDescription, ResidentMemory};
use crate::scheduler::{
    Admission, BlockCopy, BlockId, Chunk, DrawFailure, Encode, MediaHash, Medium, Sampled, SampledToken,
    SamplingParams, SeqId, StepPlan, StepResult, TokenProbability,
};

/// The plan as every rank gets it, with the traces of sequences that it admits.
pub(super) fn run_request(
    plan: &StepPlan,
    (group, epoch): (u64, u64),
    traces: &HashMap<SeqId, SpanContext>,
) -> pb::RunRequest {
    let admission = |entering: &Admission| pb::Admission {
        trace: traces.get(&entering.id).map(trace_context),
        ..admission(entering)
    };
    pb::RunRequest {
        group,
        epoch,
        step: plan.step,
        admissions: plan.admissions.iter().map(admission).collect(),
        encodes: plan.encodes.iter().map(encode).collect(),
        chunks: plan.chunks.iter().map(chunk).collect(),
        copies: plan.copies.iter().map(copy).collect(),
        releases: plan.releases.iter().map(|id| id.0).collect(),
        evictions: plan.evictions.iter().map(media_hash).collect(),
    }
}

/// The result that rank 0 told, checked against the plan that it answers.
///
/// # Errors
/// In words: the answer is of another step, or lacks tokens that the plan asked for, or has others.
pub(super) fn step_result(
    plan: &StepPlan,
    epoch: u64,
    response: pb::RunResponse,
) -> Result<StepResult, String> {
    if (response.epoch, response.step) != (epoch, plan.step) {
        let (theirs, step) = (response.epoch, response.step);
        return Err(format!(
            "answers step {step} of epoch {theirs}, not step {} of epoch {epoch}",
            plan.step
        ));
    }
    let asked: Vec<&Chunk> = plan.chunks.iter().filter(|chunk| chunk.max_new_tokens > 0).collect();
    if response.sampled.len() != asked.len() {
        let drawn = response.sampled.len();
        return Err(format!(
            "drew tokens for {drawn} sequences in step {}, not for {}",
            plan.step,
            asked.len()
        ));
    }
    for (sampled, chunk) in response.sampled.iter().zip(asked) {
        // A failure stands for a token that is missing.
        let failures = usize::from(draw_failure(sampled).is_some());
        let sound = 1 - failures..=chunk.max_new_tokens as usize - failures;
        if sampled.sequence_id != chunk.id.0 || !sound.contains(&sampled.tokens.len()) {
            let (count, id) = (sampled.tokens.len(), sampled.sequence_id);
            let most = chunk.max_new_tokens;
            return Err(format!(
                "drew {count} tokens for sequence {id}, not up to {most} for sequence {}",
                chunk.id
            ));
        }
    }
    Ok(StepResult {
        step: response.step,
        sampled: response.sampled.into_iter().map(sampled).collect(),
        vision_us: response.vision_us,
        step_us: response.step_us,
    })
}

pub(super) fn media_hash(hash: &MediaHash) -> Bytes {
    Bytes::copy_from_slice(&hash.0)
}

pub(super) fn grid([t, h, w]: [u32; 3]) -> pb::Grid {
    pb::Grid { t, h, w }
}

fn admission(admission: &Admission) -> pb::Admission {
    pb::Admission {
        sequence_id: admission.id.0,
        token_ids: admission.token_ids.clone(),
        num_prompt_tokens: admission.num_prompt_tokens,
        media: admission.media.iter().map(media_span).collect(),
        sampling: Some(sampling(&admission.sampling)),
        num_computed_tokens: admission.num_computed_tokens,
        blocks: blocks(&admission.blocks),
        trace: None,
    }
}

fn trace_context(request: &SpanContext) -> pb::TraceContext {
    pb::TraceContext {
        trace_id: Bytes::copy_from_slice(&request.trace_id().to_bytes()),
        span_id: Bytes::copy_from_slice(&request.span_id().to_bytes()),
    }
}

fn media_span(medium: &Medium) -> pb::MediaSpan {
    pb::MediaSpan {
        hash: media_hash(&medium.hash),
        first_token: medium.first_token,
        grid: Some(grid(medium.grid)),
        seconds_per_grid_t: medium.seconds_per_grid_t,
    }
}

fn sampling(sampling: &SamplingParams) -> pb::SamplingParams {
    pb::SamplingParams {
        temperature: sampling.temperature,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
        branch: sampling.branch,
        logprobs: sampling.logprobs,
        top_k: sampling.top_k,
        top_p: Some(sampling.top_p),
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: sampling.logit_bias.iter().map(logit_bias).collect(),
    }
}

fn logit_bias((token_id, bias): &(u32, f32)) -> pb::LogitBias {
    pb::LogitBias { token_id: *token_id, bias: *bias }
}

fn encode(encode: &Encode) -> pb::Encode {
    pb::Encode {
        hash: media_hash(&encode.hash),
        feature_blocks: blocks(&encode.feature_blocks),
        from: encode.from,
        to: encode.to,
    }
}

fn chunk(chunk: &Chunk) -> pb::Chunk {
    pb::Chunk {
        sequence_id: chunk.id.0,
        start: chunk.start,
        length: chunk.length,
        new_blocks: blocks(&chunk.new_blocks),
        max_new_tokens: chunk.max_new_tokens,
    }
}

fn copy(copy: &BlockCopy) -> pb::BlockCopy {
    pb::BlockCopy { source: copy.source.0, target: copy.target.0 }
}

fn blocks(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|block| block.0).collect()
}

fn sampled(sampled: pb::Sampled) -> Sampled {
    let token = |token: pb::SampledToken| SampledToken {
        token_id: token.token_id,
        logprob: token.logprob,
        top: token.top.into_iter().map(probability).collect(),
    };
    Sampled {
        id: SeqId(sampled.sequence_id),
        failure: draw_failure(&sampled),
        tokens: sampled.tokens.into_iter().map(token).collect(),
    }
}

fn draw_failure(sampled: &pb::Sampled) -> Option<DrawFailure> {
    match sampled.failure() {
        pb::DrawFailure::Unspecified => None,
        pb::DrawFailure::LogitsNotFinite => Some(DrawFailure::LogitsNotFinite),
    }
}

fn probability(probability: pb::TokenProbability) -> TokenProbability {
    TokenProbability { token_id: probability.token_id, logprob: probability.logprob }
}

impl From<pb::ModelDescription> for ModelDescription {
    fn from(told: pb::ModelDescription) -> Self {
        Self {
            architecture: told.architecture,
            vocab_size: told.vocab_size,
            max_context_tokens: told.max_context_tokens,
            image_token_id: told.image_token_id,
            video_token_id: told.video_token_id,
            vision_start_token_id: told.vision_start_token_id,
            vision_end_token_id: told.vision_end_token_id,
            patch_size: told.patch_size,
            merge_size: told.merge_size,
            temporal_patch_size: told.temporal_patch_size,
            kv_block_tokens: told.kv_block_tokens,
            feature_block_tokens: told.feature_block_tokens,
            kv_blocks: told.kv_blocks,
            feature_blocks: told.feature_blocks,
            instruction_set: told.instruction_set,
            vision_stages: told.vision_stages,
            attending_stages: told.attending_stages,
            attention_tokens: told.attention_tokens,
        }
    }
}

impl From<pb::MemoryPlan> for MemoryPlan {
    fn from(told: pb::MemoryPlan) -> Self {
        Self {
            weights_bytes: told.weights_bytes,
            kv_bytes: told.kv_bytes,
            features_bytes: told.features_bytes,
            workspace_bytes: told.workspace_bytes,
            collective_bytes: told.collective_bytes,
            media_bytes: told.media_bytes,
            process_bytes: told.process_bytes,
            staging_bytes: told.staging_bytes,
            on_gpu: told.on_gpu,
            graphs_bytes: told.graphs_bytes,
            pinned_bytes: told.pinned_bytes,
        }
    }
}

impl From<pb::GetMemoryResponse> for ResidentMemory {
    fn from(told: pb::GetMemoryResponse) -> Self {
        Self { anonymous_bytes: told.anonymous_bytes, shared_bytes: told.shared_bytes }
    }
}
