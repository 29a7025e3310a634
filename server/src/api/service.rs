//! The public service: convert, start, answer.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_server::InferenceService;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::convert::{self, Rules};
use super::expired;
use super::fault::Refusal;
use super::respond;
use super::upload::Uploads;
use crate::generation::{Frontend, Generation, Output};
use crate::limits::MAX_ANSWER_BYTES;
use crate::media::MediaLibrary;
use crate::model_info::ModelInfo;
use crate::request as domain;
use crate::shards::{GroupHandle, ResidentMemory};

/// About the bytes of a log-probability on the wire: 13 and those of its token, of which few have more than 12.
const LOGPROB_BYTES: u64 = 32;

/// The public API over a running engine.
pub struct Inference {
    frontend: Arc<Frontend>,
    model: Arc<ModelInfo>,
    rules: Rules,
    uploads: Uploads,
    shards: GroupHandle,
}

impl Inference {
    /// The service, with `library` for uploads.
    pub fn new(
        frontend: Arc<Frontend>,
        model: Arc<ModelInfo>,
        library: MediaLibrary,
        shards: GroupHandle,
    ) -> Self {
        let library = Arc::new(library);
        let processor = frontend.media.pictures.processor().clone();
        let rules = Rules { vocab_size: model.vocab_size, processor, library: library.clone() };
        Inference { frontend, model, rules, uploads: Uploads::new(library), shards }
    }

    async fn start(
        &self,
        proto: v1::GenerateRequest,
        form: Form,
        caller: Caller,
    ) -> Result<Generation, Refusal> {
        let request = convert::request(proto, &caller, &self.rules)?;
        if form == Form::Message {
            fits_a_message(&request, self.frontend.max_context_tokens)?;
        }
        self.frontend.start(request, caller.message, caller.trace).await
    }
}

/// How an answer is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Whole.
    Message,
    /// As it comes.
    Stream,
}

/// Refuses what may be too large for one message when it is complete, which would be known only then. Text and ids alone
/// never are.
fn fits_a_message(request: &domain::Request, max_context_tokens: u32) -> Result<(), Refusal> {
    let Some(alternatives) = request.logprobs else { return Ok(()) };
    let tokens = request.stopping.max_tokens.map_or(max_context_tokens, |most| most.min(max_context_tokens));
    let logprobs = u64::from(request.num_choices) * u64::from(tokens) * (u64::from(alternatives) + 1);
    if logprobs * LOGPROB_BYTES > MAX_ANSWER_BYTES as u64 {
        let why =
            format!("{logprobs} of them may not fit into one message: lower n or max_tokens, or stream");
        return Err(Refusal::field("logprobs", why));
    }
    Ok(())
}

type EventStream = Pin<Box<dyn Stream<Item = Result<v1::StreamGenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl InferenceService for Inference {
    async fn generate(
        &self,
        mut request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let caller = Caller::of("Generate", &mut request);
        let mut generation = self.start(request.into_inner(), Form::Message, caller).await?;
        let vocabulary = self.frontend.prompts.tokenizer().vocabulary();
        let started = Some(respond::started(&generation));
        let choices = vec![v1::Choice::default(); generation.num_choices()];
        let mut response = v1::GenerateResponse { started, choices, ..Default::default() };
        while let Some(output) = generation.next().await {
            match output? {
                Output::Begun => response.started = Some(respond::started(&generation)),
                Output::Token { choice, text, token } => {
                    let choice = &mut response.choices[choice];
                    choice.text.push_str(&text);
                    choice.token_ids.push(token.token_id);
                    choice.logprobs.extend(respond::logprobs(&token, vocabulary));
                }
                Output::Finished { choice: index, text, ending } => {
                    let choice = &mut response.choices[index];
                    choice.text.push_str(&text);
                    choice.finished = Some(respond::finished(index, &ending));
                }
                Output::Completed { usage, times } => {
                    response.usage = Some(respond::usage(&usage));
                    response.timings = Some(respond::timings(&times));
                }
                Output::Expired { texts, phase, usage, times } => {
                    for (choice, text) in response.choices.iter_mut().zip(texts) {
                        choice.text.push_str(&text);
                    }
                    response.usage = Some(respond::usage(&usage));
                    response.timings = Some(respond::timings(&times));
                    return Err(expired::with_answer(phase, response));
                }
            }
        }
        Ok(Response::new(response))
    }

    type StreamGenerateStream = EventStream;

    async fn stream_generate(
        &self,
        mut request: Request<v1::StreamGenerateRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let caller = Caller::of("StreamGenerate", &mut request);
        let Some(request) = request.into_inner().request else {
            return Err(Refusal::field("request", "is missing").into());
        };
        let generation = self.start(request, Form::Stream, caller).await?;
        let vocabulary = self.frontend.prompts.tokenizer().vocabulary().clone();
        let stream = async_stream::try_stream! {
            let mut generation = generation;
            while let Some(output) = generation.next().await {
                for event in respond::events(output?, &generation, &vocabulary) {
                    yield event?;
                }
            }
        };
        Ok(Response::new(Box::pin(stream)))
    }

    async fn count_tokens(
        &self,
        mut request: Request<v1::CountTokensRequest>,
    ) -> Result<Response<v1::CountTokensResponse>, Status> {
        let caller = Caller::of("CountTokens", &mut request);
        let messages = convert::conversation(request.into_inner(), &caller, &self.rules)?;
        let Caller { message, deadline, mut trace, .. } = caller;
        let priced = self.frontend.price(&messages, &message, deadline, &mut trace);
        let (prompt_tokens, infos) = priced.await?;
        Ok(Response::new(v1::CountTokensResponse {
            prompt_tokens: prompt_tokens as u32,
            media: infos.iter().map(|(place, info)| respond::medium(*place, info)).collect(),
            max_context_tokens: self.frontend.max_context_tokens,
        }))
    }

    async fn upload_media(
        &self,
        mut request: Request<Streaming<v1::UploadMediaRequest>>,
    ) -> Result<Response<v1::UploadMediaResponse>, Status> {
        let caller = Caller::of("UploadMedia", &mut request);
        let id = self.uploads.take(request.into_inner(), &caller, &self.frontend).await?;
        Ok(Response::new(v1::UploadMediaResponse { media_id: id.0.to_vec().into() }))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let memory = self.shards.memory().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let resident: Vec<u64> = memory.iter().map(ResidentMemory::total_bytes).collect();
        Ok(Response::new(self.model.describe(&resident)))
    }
}
