//! What the server itself costs, beside a shard that answers at once. `tests/pace/frontend.sh` prints the figures.
//!
//! `LOCKSTEP_FRONTEND_STREAMS=n` takes that many streams instead of 1,000, `LOCKSTEP_FRONTEND_CONNECTIONS=n` spreads them over that
//! many connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::crowd::{self, Client};
use lockstep_tests::golden::root;
use lockstep_tests::hostile::ask;
use lockstep_tests::number;
use lockstep_tests::server::{Server, other_binary, processor_time};
use tokio::sync::Semaphore;

/// The most processor time of the server for a token of one of very many streams.
const MOST_PER_TOKEN: Duration = Duration::from_micros(20);
/// The most time from one token of a lone stream to the next.
const MOST_PER_STEP: Duration = Duration::from_micros(100);
const STREAMS: u64 = 1_000;
const CONNECTIONS: u64 = 8;
/// Tokens of each of many streams that are measured, and the most that it may have while others begin.
const TOKENS: u64 = 400;
const MAX_TOKENS: u64 = 4_000;
/// Tokens of the lone stream, which comes several times.
const ALONE_TOKENS: u64 = 2_000;
const REPEATS: u64 = 11;
/// Streams that begin at a time: the server has as many places for prompts and some more.
const AT_ONCE: usize = 100;
const POLL: Duration = Duration::from_millis(1);

fn start(streams: u64, tokens: u64) -> anyhow::Result<Server> {
    let shard = other_binary("instant-shard")?;
    let kv_tokens = streams * (tokens + 64);
    let numbers = format!(
        "--max-running {streams} --max-step-tokens {} --max-waiting {streams} --kv-tokens {kv_tokens}",
        // Enough for prompts beside all streams that run already.
        4 * streams + 512
    );
    let arguments: Vec<_> = numbers.split(' ').chain(["--shard-program", &shard]).collect();
    Server::start(&root().join("tests/checkpoints/a"), &arguments)
}

fn story(tokens: u64) -> v1::StreamGenerateRequest {
    let mut request = ask(vec![v1::part::Part::Text("A story.".to_owned())]);
    request.stopping =
        Some(v1::Stopping { max_tokens: Some(tokens as u32), ignore_eos: Some(true), ..Default::default() });
    v1::StreamGenerateRequest { request: Some(request) }
}

/// What many streams have in common.
#[derive(Default)]
struct Streams {
    begun: AtomicU64,
    tokens: AtomicU64,
    ended: AtomicU64,
}

impl Streams {
    /// Takes a stream to its end. Its begin is told by dropping `place`.
    async fn listen<T>(&self, client: &mut Client, tokens: u64, place: T) -> anyhow::Result<v1::Completed> {
        let taken = self.take(client, tokens, place).await;
        self.ended.fetch_add(1, Ordering::Relaxed);
        taken
    }

    async fn take<T>(&self, client: &mut Client, tokens: u64, place: T) -> anyhow::Result<v1::Completed> {
        let mut stream = client.stream_generate(story(tokens)).await?.into_inner();
        let mut place = Some(place);
        while let Some(message) = stream.message().await? {
            match message.event {
                Some(Event::Delta(delta)) => {
                    if place.take().is_some() {
                        self.begun.fetch_add(1, Ordering::Relaxed);
                    }
                    self.tokens.fetch_add(delta.token_ids.len() as u64, Ordering::Relaxed);
                }
                Some(Event::Completed(completed)) => return Ok(completed),
                _ => {}
            }
        }
        anyhow::bail!("a stream ended before it was complete")
    }

    /// Waits until all have begun, or one has ended.
    async fn have_begun(&self, count: u64) {
        while self.begun.load(Ordering::Relaxed) < count && !self.one_ended() {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until they have had that many tokens, or one has ended.
    async fn have_taken(&self, tokens: u64) {
        while self.tokens() < tokens && !self.one_ended() {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether one has ended.
    fn one_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed) > 0
    }

    fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_of_many_streams_costs_the_server_little() -> anyhow::Result<()> {
    let count = number("LOCKSTEP_FRONTEND_STREAMS", STREAMS)?;
    let connections = number("LOCKSTEP_FRONTEND_CONNECTIONS", CONNECTIONS)?;
    let server = start(count, MAX_TOKENS)?;
    let clients = crowd::connect(&server, connections).await?;
    let (streams, places) = (Arc::new(Streams::default()), Arc::new(Semaphore::new(AT_ONCE)));
    let listeners: Vec<_> = (0..count)
        .map(|i| {
            let mut client = clients[(i % connections) as usize].clone();
            let (streams, places) = (streams.clone(), places.clone());
            tokio::spawn(async move {
                let place = places.acquire_owned().await?;
                streams.listen(&mut client, MAX_TOKENS, place).await
            })
        })
        .collect();
    // What is measured is all of them, since the last one's first token.
    streams.have_begun(count).await;
    let (since, before, first) = (Instant::now(), processor_time(server.pid())?, streams.tokens());
    streams.have_taken(first + count * TOKENS).await;
    let (took, after, last) = (since.elapsed(), processor_time(server.pid())?, streams.tokens());
    if streams.one_ended() {
        for listener in listeners {
            listener.await??;
        }
        anyhow::bail!("a stream had its {MAX_TOKENS} tokens before all had begun and had {TOKENS} more");
    }
    listeners.iter().for_each(tokio::task::JoinHandle::abort);
    let tokens = last - first;
    let each = (after - before).div_f64(tokens as f64);
    println!(
        "{count} streams over {connections} connections: {each:.1?} of the server's processor time for each of {tokens} tokens, \
         {:.0} tokens/s",
        tokens as f64 / took.as_secs_f64()
    );
    assert!(each <= MOST_PER_TOKEN, "a token takes {each:?} of the server's processor time");
    Ok(())
}

#[tokio::test]
#[ignore = "measures time, which others on the machine take"]
async fn an_empty_step_takes_little_time() -> anyhow::Result<()> {
    let server = start(1, ALONE_TOKENS)?;
    let mut client = crowd::connect(&server, 1).await?.remove(0);
    let mut steps = Vec::new();
    let before = processor_time(server.pid())?;
    for _ in 0..REPEATS {
        let completed = Streams::default().listen(&mut client, ALONE_TOKENS, ()).await?;
        let decode_ms = completed.timings.context("timings")?.decode_ms;
        steps.push(Duration::from_secs_f64(decode_ms / 1e3).div_f64((ALONE_TOKENS - 1) as f64));
    }
    let cost = (processor_time(server.pid())? - before).div_f64((REPEATS * ALONE_TOKENS) as f64);
    steps.sort_unstable();
    let (least, median) = (steps[0], steps[steps.len() / 2]);
    println!(
        "one stream: {median:.1?} from token to token, {least:.1?} in the best of {REPEATS} runs; {cost:.1?} of the server's \
         processor time for each"
    );
    // Others on the machine make a step longer, and never shorter.
    assert!(least <= MOST_PER_STEP, "an empty step takes {least:?}");
    Ok(())
}
