//! A client that goes away makes room for the next one.

use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::golden::root;
use lockstep_tests::server::Server;
use tonic::transport::Channel;

/// Tokens that the cache of keys and values holds.
const CAPACITY: u32 = 8_192;
/// How long both live.
const WAIT: Duration = Duration::from_millis(300);

type Client = InferenceServiceClient<Channel>;

fn chat(text: String) -> v1::Chat {
    let parts = vec![v1::Part { part: Some(v1::part::Part::Text(text)) }];
    v1::Chat { messages: vec![v1::Message { role: v1::Role::User.into(), parts }], tools: vec![] }
}

fn request(chat: v1::Chat, max_tokens: u32) -> v1::StreamGenerateRequest {
    let stopping =
        v1::Stopping { max_tokens: Some(max_tokens), ignore_eos: Some(true), ..Default::default() };
    let request = v1::GenerateRequest { chat: Some(chat), stopping: Some(stopping), ..Default::default() };
    v1::StreamGenerateRequest { request: Some(request) }
}

async fn num_tokens(client: &mut Client, chat: v1::Chat) -> anyhow::Result<u32> {
    let counted = client.count_tokens(v1::CountTokensRequest { chat: Some(chat), cache_salt: None }).await?;
    Ok(counted.into_inner().prompt_tokens)
}

/// A conversation that fills nearly the whole cache.
async fn filling(client: &mut Client) -> anyhow::Result<v1::Chat> {
    let words = |count: u32| chat("again ".repeat(count as usize));
    let (few, many) = (num_tokens(client, words(100)).await?, num_tokens(client, words(200)).await?);
    let count = 100 * (CAPACITY - 64 - few) / (many - few);
    let chat = words(100 + count);
    let tokens = num_tokens(client, chat.clone()).await?;
    assert!((CAPACITY - 200..CAPACITY - 8).contains(&tokens), "{tokens} tokens fill the cache");
    Ok(chat)
}

#[tokio::test]
async fn a_cancelled_stream_leaves_its_blocks_to_the_next_request() -> anyhow::Result<()> {
    let (checkpoint, capacity) = (root().join("tests/checkpoints/a"), CAPACITY.to_string());
    let arguments = ["--kv-tokens", &capacity, "--max-image-tokens", "1024", "--max-step-tokens", "2048"];
    let server = Server::start(&checkpoint, &arguments)?;
    let mut client = Client::connect(format!("http://{}", server.address())).await?;
    let second = filling(&mut client).await?;

    let first = request(chat("A very long story.".to_owned()), CAPACITY);
    let mut first = client.stream_generate(first).await?.into_inner();
    first.message().await?.expect("the story begins");
    let begun = Instant::now();
    for _ in 0..100 {
        first.message().await?.expect("the story goes on");
    }
    let whole_story = begun.elapsed() * CAPACITY / 100;
    let submitted = Instant::now();
    let mut second = client.stream_generate(request(second, 4)).await?.into_inner();
    assert!(matches!(second.message().await?.and_then(|message| message.event), Some(Event::Started(_))));
    let waiting = tokio::spawn(async move {
        let mut completed = None;
        while let Some(message) = second.message().await? {
            if let Some(Event::Completed(event)) = message.event {
                completed = Some(event);
            }
        }
        anyhow::Ok(completed.expect("the last event"))
    });
    tokio::time::sleep(WAIT).await;
    let cancelled = submitted.elapsed();
    drop(first);

    let completed = waiting.await??;
    let (usage, timings) = (completed.usage.expect("usage"), completed.timings.expect("timings"));
    assert_eq!(usage.completion_tokens, 4);
    let queued = Duration::from_secs_f64(timings.queue_ms / 1e3);
    println!("waited {queued:?}; cancelled after {cancelled:?}; the whole story: {whole_story:?}");
    assert!(queued >= WAIT, "there was room for both: it waited {queued:?}");
    assert!(queued < cancelled + whole_story / 4, "{queued:?}, of these {cancelled:?} for good reason");
    Ok(())
}
