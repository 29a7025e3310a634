//! An inference service in this process, for the tests: it answers with its own words and remembers what it was asked.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{Stream, StreamExt, TryStreamExt, stream};
use lockstep_proto::v1::{
    self,
    inference_service_server::{InferenceService, InferenceServiceServer},
    stream_generate_response::Event,
};
use tokio::{net::TcpListener, sync::Notify};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};

use crate::MediaId;

/// Tokens that the fake's chat template has around any text.
pub(crate) const TEMPLATE_TOKENS: u32 = 20;

/// A running fake. Each word is a token. The last text of the conversation says what it does:
/// `refuse` names two fields, `busy` is over its bound, `endless` never ends, `cut` ends early, `late` passes its deadline, `stall`
/// says nothing; anything else is answered with `You said: ` and that text.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    /// Where it listens.
    pub(crate) address: String,
    seen: Arc<Mutex<Vec<v1::GenerateRequest>>>,
    cancelled: Arc<Notify>,
    refuses_salts: bool,
    uploads: Arc<Mutex<Vec<Upload>>>,
}

/// A file that was uploaded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Upload {
    /// What it says.
    pub(crate) file: String,
    /// The salt that it came with.
    pub(crate) salt: Option<String>,
    /// How many pieces it came in, the header included.
    pub(crate) num_pieces: usize,
}

type Events = Pin<Box<dyn Stream<Item = Result<v1::StreamGenerateResponse, Status>> + Send>>;

impl Fake {
    /// Starts a fake on a free port.
    pub(crate) async fn start() -> Fake {
        Fake::default().listen().await
    }

    /// Starts a fake that answers UNIMPLEMENTED to a request with a cache salt.
    pub(crate) async fn start_without_salts() -> Fake {
        Fake { refuses_salts: true, ..Fake::default() }.listen().await
    }

    /// A fake at an address where nothing listens.
    pub(crate) fn nowhere() -> Fake {
        Fake { address: "127.0.0.1:1".to_owned(), ..Fake::default() }
    }

    async fn listen(mut self) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.address = listener.local_addr().unwrap().to_string();
        let service = InferenceServiceServer::new(self.clone());
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        self
    }

    /// The requests so far.
    pub(crate) fn seen(&self) -> Vec<v1::GenerateRequest> {
        self.seen.lock().unwrap().clone()
    }

    /// The uploads that are there.
    pub(crate) fn uploads(&self) -> std::sync::MutexGuard<'_, Vec<Upload>> {
        self.uploads.lock().unwrap()
    }

    /// Waits until an endless answer was dropped.
    pub(crate) async fn cancelled(&self) {
        tokio::time::timeout(Duration::from_secs(10), self.cancelled.notified())
            .await
            .expect("a cancellation");
    }
}

/// The role and the parts of each turn in short: texts as they are, media as their bytes in angle brackets.
pub(crate) fn transcript(request: &v1::GenerateRequest) -> Vec<String> {
    let messages = &request.chat.as_ref().unwrap().messages;
    messages.iter().map(|message| format!("{}: {}", message.role().as_str_name(), parts(message))).collect()
}

fn parts(message: &v1::Message) -> String {
    let shown = message.parts.iter().map(|part| match part.part.as_ref().unwrap() {
        v1::part::Part::Text(text) => text.clone(),
        v1::part::Part::Image(v1::Image { source: Some(v1::image::Source::Data(data)), .. }) => {
            format!("<{}>", String::from_utf8_lossy(data))
        }
        v1::part::Part::Video(v1::Video { source: Some(v1::video::Source::Data(data)), .. }) => {
            format!("<{}>", String::from_utf8_lossy(data))
        }
        v1::part::Part::Video(v1::Video { source: Some(v1::video::Source::Frames(given)), .. }) => {
            let frames: Vec<_> = given.frames.iter().map(|frame| String::from_utf8_lossy(frame)).collect();
            format!("<{}>", frames.join(", "))
        }
        v1::part::Part::Image(v1::Image { source: Some(v1::image::Source::MediaId(id)), .. }) => {
            format!("<id of {} bytes>", id.len())
        }
        other => panic!("an unexpected part: {other:?}"),
    });
    shown.collect::<Vec<_>>().join(" | ")
}

fn last_text(chat: &v1::Chat) -> &str {
    let parts = chat.messages.iter().flat_map(|message| &message.parts);
    let texts = parts.filter_map(|part| match &part.part {
        Some(v1::part::Part::Text(text)) => Some(text.as_str()),
        _ => None,
    });
    texts.last().unwrap_or_default()
}

fn prompt_tokens(chat: &v1::Chat) -> u32 {
    TEMPLATE_TOKENS + last_text(chat).split_whitespace().count() as u32
}

fn started(request: &v1::GenerateRequest) -> v1::Started {
    let chat = request.chat.as_ref().unwrap();
    let mut media = Vec::new();
    for (message_index, message) in chat.messages.iter().enumerate() {
        for (part_index, part) in message.parts.iter().enumerate() {
            if let Some(v1::part::Part::Image(image)) = &part.part {
                media.push(v1::MediaInfo {
                    kind: v1::MediaKind::Image.into(),
                    message_index: message_index as u32,
                    part_index: part_index as u32,
                    source_width: 640,
                    source_height: 480,
                    resized_width: image.resized_width.unwrap_or(644),
                    resized_height: image.resized_height.unwrap_or(476),
                    tokens: 391,
                    timestamps_s: Vec::new(),
                });
            }
        }
    }
    v1::Started {
        prompt_tokens: prompt_tokens(chat),
        cached_tokens: 0,
        media,
        seed: request.sampling.as_ref().and_then(|sampling| sampling.seed).unwrap_or(42),
        prompt_token_ids: vec![151644, 872],
    }
}

/// One answer, or as many as were asked for, in turns.
fn deltas(request: &v1::GenerateRequest) -> Vec<v1::Delta> {
    let mut deltas: Vec<v1::Delta> =
        (0..request.n.unwrap_or(1)).flat_map(|choice| deltas_of(request, choice)).collect();
    deltas.sort_by_key(|delta| delta.token_ids[0] % 1000);
    deltas
}

fn deltas_of(request: &v1::GenerateRequest, choice: u32) -> Vec<v1::Delta> {
    let stopping = request.stopping.clone().unwrap_or_default();
    let who = if choice == 0 { "You".to_owned() } else { format!("Number {choice}") };
    let reply = format!("{who} said: {}", last_text(request.chat.as_ref().unwrap()));
    let words: Vec<&str> = reply.split_inclusive(' ').collect();
    let whole = if stopping.ignore_eos() { u32::MAX } else { words.len() as u32 };
    let num_tokens = whole.min(stopping.max_tokens.unwrap_or(u32::MAX)).min(4096);
    let delta = |index: u32| {
        let text = words[index as usize % words.len()];
        let token = |token_id, logprob| v1::TokenLogprob { token_id, logprob, token: text.to_owned().into() };
        let top = |n| (0..n).map(|rank| token(100 + index + rank, -0.5 - rank as f32)).collect();
        let position = |n| v1::PositionLogprobs { chosen: Some(token(100 + index, -0.5)), top: top(n) };
        v1::Delta {
            choice,
            text: text.to_owned(),
            token_ids: vec![1000 * choice + 100 + index],
            logprobs: request.logprobs.map(position).into_iter().collect(),
        }
    };
    (0..num_tokens).map(delta).collect()
}

fn finished(choice: u32) -> v1::Finished {
    let reason = v1::FinishReason::StopToken.into();
    v1::Finished { choice, reason, stop_string: None, stop_token_id: Some(151645) }
}

fn usage(request: &v1::GenerateRequest, completion_tokens: usize) -> v1::Usage {
    v1::Usage {
        prompt_tokens: prompt_tokens(request.chat.as_ref().unwrap()),
        cached_tokens: 0,
        completion_tokens: completion_tokens as u32,
    }
}

const TIMINGS: v1::Timings = v1::Timings {
    queue_ms: 0.5,
    media_ms: 3.0,
    vision_ms: 20.0,
    prefill_ms: 10.0,
    decode_ms: 90.0,
    total_ms: 123.5,
};

impl Fake {
    fn admit(&self, request: &v1::GenerateRequest) -> Result<(), Status> {
        self.seen.lock().unwrap().push(request.clone());
        if self.refuses_salts && request.cache_salt.is_some() {
            return Err(Status::unimplemented("cache_salt"));
        }
        self.find_media(request.chat.as_ref().unwrap(), request.cache_salt.as_ref())?;
        match last_text(request.chat.as_ref().unwrap()) {
            "refuse" => {
                let mut details = ErrorDetails::new();
                details.add_bad_request_violation("sampling.temperature", "must be at most 100");
                details.add_bad_request_violation("chat.messages[0].parts[0].image", "is truncated");
                Err(Status::with_error_details(Code::InvalidArgument, "2 fields are at fault", details))
            }
            "busy" => {
                let mut details = ErrorDetails::new();
                details.set_retry_info(Some(Duration::from_secs(2)));
                Err(Status::with_error_details(Code::ResourceExhausted, "the queue is full", details))
            }
            _ => Ok(()),
        }
    }
}

impl Fake {
    /// Refuses a conversation that names media that were not uploaded with its salt.
    fn find_media(&self, chat: &v1::Chat, salt: Option<&String>) -> Result<(), Status> {
        let mut details = ErrorDetails::new();
        for (i, message) in chat.messages.iter().enumerate() {
            for (j, part) in message.parts.iter().enumerate() {
                let Some(v1::part::Part::Image(v1::Image {
                    source: Some(v1::image::Source::MediaId(id)),
                    ..
                })) = &part.part
                else {
                    continue;
                };
                let is_it = |upload: &Upload| {
                    MediaId::of(upload.file.as_bytes()).to_wire() == *id && upload.salt.as_ref() == salt
                };
                if !self.uploads().iter().any(is_it) {
                    let field = format!("chat.messages[{i}].parts[{j}].image.media_id");
                    details.add_bad_request_violation(field, "is not there");
                }
            }
        }
        if details.has_bad_request_violations() {
            return Err(Status::with_error_details(Code::NotFound, "media are not there", details));
        }
        Ok(())
    }
}

fn event(event: Event) -> Result<v1::StreamGenerateResponse, Status> {
    Ok(v1::StreamGenerateResponse { event: Some(event) })
}

/// Tells of a stream's end when it is dropped.
struct Guard(Arc<Notify>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[tonic::async_trait]
impl InferenceService for Fake {
    type StreamGenerateStream = Events;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let request = request.into_inner();
        self.admit(&request)?;
        if last_text(request.chat.as_ref().unwrap()) == "stall" {
            std::future::pending::<()>().await;
        }
        let choice = |index| {
            let deltas = deltas_of(&request, index);
            v1::Choice {
                text: deltas.iter().map(|delta| delta.text.as_str()).collect(),
                token_ids: deltas.iter().flat_map(|delta| delta.token_ids.clone()).collect(),
                logprobs: deltas.iter().flat_map(|delta| delta.logprobs.clone()).collect(),
                finished: Some(finished(index)),
            }
        };
        Ok(Response::new(v1::GenerateResponse {
            started: Some(started(&request)),
            choices: (0..request.n.unwrap_or(1)).map(choice).collect(),
            usage: Some(usage(&request, deltas(&request).len())),
            timings: Some(TIMINGS),
        }))
    }

    async fn stream_generate(
        &self,
        request: Request<v1::StreamGenerateRequest>,
    ) -> Result<Response<Events>, Status> {
        let request = request.into_inner().request.unwrap();
        self.admit(&request)?;
        let deltas = deltas(&request);
        let (num_tokens, first) = (deltas.len(), event(Event::Started(started(&request))));
        let deltas = deltas.into_iter().map(Event::Delta).map(event);
        let completed = v1::Completed { usage: Some(usage(&request, num_tokens)), timings: Some(TIMINGS) };
        let end = (0..request.n.unwrap_or(1)).map(|choice| Event::Finished(finished(choice)));
        let end: Vec<Event> = end.chain([Event::Completed(completed)]).collect();
        let events: Events = match last_text(request.chat.as_ref().unwrap()) {
            "endless" => {
                let more = deltas.collect::<Vec<_>>();
                let guard = Guard(self.cancelled.clone());
                let ticks = stream::iter([first]).chain(stream::iter(more).cycle()).then(move |item| {
                    let _held = &guard;
                    async move {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        item
                    }
                });
                Box::pin(ticks)
            }
            "stall" => Box::pin(stream::iter([first]).chain(stream::pending())),
            "cut" => Box::pin(stream::iter([first]).chain(stream::iter(deltas))),
            "late" => {
                let late = Status::deadline_exceeded("deadline exceeded while generating the answer");
                Box::pin(stream::iter([first]).chain(stream::iter(deltas)).chain(stream::iter([Err(late)])))
            }
            _ => Box::pin(
                stream::iter([first])
                    .chain(stream::iter(deltas))
                    .chain(stream::iter(end.into_iter().map(event))),
            ),
        };
        Ok(Response::new(events))
    }

    async fn count_tokens(
        &self,
        request: Request<v1::CountTokensRequest>,
    ) -> Result<Response<v1::CountTokensResponse>, Status> {
        let v1::CountTokensRequest { chat, cache_salt } = request.into_inner();
        let chat = chat.unwrap();
        self.find_media(&chat, cache_salt.as_ref())?;
        Ok(Response::new(v1::CountTokensResponse {
            prompt_tokens: prompt_tokens(&chat),
            media: Vec::new(),
            max_context_tokens: 32768,
        }))
    }

    async fn upload_media(
        &self,
        request: Request<Streaming<v1::UploadMediaRequest>>,
    ) -> Result<Response<v1::UploadMediaResponse>, Status> {
        use v1::upload_media_request::Piece;
        let pieces: Vec<_> = request.into_inner().try_collect().await?;
        let num_pieces = pieces.len();
        let mut pieces = pieces.into_iter().map(|piece| piece.piece.unwrap());
        let Some(Piece::Header(header)) = pieces.next() else { panic!("the header comes first") };
        let chunks = pieces.map(|piece| match piece {
            Piece::Chunk(chunk) => chunk,
            Piece::Header(_) => panic!("a second header"),
        });
        let file = chunks.collect::<Vec<_>>().concat();
        assert_eq!(header.size_bytes, file.len() as u64);
        let media_id = MediaId::of(&file).to_wire();
        let file = String::from_utf8(file).unwrap();
        self.uploads().push(Upload { file, salt: header.cache_salt, num_pieces });
        Ok(Response::new(v1::UploadMediaResponse { media_id }))
    }

    async fn get_model(
        &self,
        _: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let shard = |rank| v1::ShardMemory { rank, planned_bytes: 4 << 20, resident_bytes: 3 << 20 };
        Ok(Response::new(v1::GetModelResponse {
            name: "fake".into(),
            architecture: "Fake".into(),
            max_context_tokens: 32768,
            world_size: 2,
            device: "cpu".into(),
            dtype: "f32".into(),
            shards: vec![shard(0), shard(1)],
            version: "0".into(),
            ..Default::default()
        }))
    }
}
