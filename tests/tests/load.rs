//! Many people at once, for a while: texts, pictures, videos, conversations, some who leave and some who cannot wait long.
//!
//! Nobody gets an error that was not asked for, or another answer than somebody else got to the same request; memory stays what it
//! is after warm-up; everybody gets on. `LOCKSTEP_LOAD_STREAMS=n` takes that many people instead of 200, `LOCKSTEP_LOAD_SECONDS=n` that
//! long instead of 60, `LOCKSTEP_LOAD_SEED=n` other requests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::StreamExt;
use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;
use lockstep_tests::answers::{self, Answer};
use lockstep_tests::crowd::{self, Client};
use lockstep_tests::golden::root;
use lockstep_tests::number;
use lockstep_tests::pool::{self, Pool};
use lockstep_tests::server::{Server, resident_bytes};
use lockstep_tests::untimed::{self, within};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::{Code, Status};

const STREAMS: u64 = 200;
const SECONDS: u64 = 60;
const REQUESTS: usize = 63;
const CONNECTIONS: u64 = 16;
/// Sequences that run at a time. Most people wait, as they would.
const MAX_RUNNING: u32 = 64;
/// Tokens of the cache: not all of those that run keep their blocks to their end.
const KV_TOKENS: u32 = 16_384;
/// The longest time of somebody who cannot wait long: so long for each [`STREAMS`] people, who wait for each other.
const IMPATIENT: Duration = Duration::from_secs(3);
/// How late the word of a deadline may come on a machine that stands still for a moment.
const LATE: Duration = Duration::from_secs(5);
const TURNS: usize = 3;
/// How often memory is looked at.
const SAMPLES_PER_SECOND: u64 = 4;
/// How much more memory a process may have in the last quarter of a run than in the third one. The first half is warm-up.
const GROWTH: f64 = 1.05;
const GROWTH_BYTES: u64 = 4 << 20;
/// Nobody has fewer requests done than this part of what somebody in the middle has: some ask for more than others.
const LEAST_SHARE: f64 = 0.4;
/// Of a hundred people 99 do not wait so many times longer than somebody in the middle, but for these times, which a busy machine or
/// a large picture may take.
const TIMES: u32 = 3;
const FIRST_SLACK: Duration = Duration::from_secs(2);
const GAP_SLACK: Duration = Duration::from_secs(1);
/// Nor does anybody at all, but for this time: a machine that is shared stands still for a second or two now and then, and then
/// everybody waits.
const STANDSTILL: Duration = Duration::from_secs(8);
/// Up to so many people the server has room for all that they may send at a time.
const ROOM: u64 = 250;

/// What everybody shares.
struct Load {
    clients: Vec<Client>,
    untimed: untimed::Client,
    requests: Vec<v1::GenerateRequest>,
    /// The first answers to each request: all others must be the same.
    answers: Mutex<BTreeMap<usize, Vec<Answer>>>,
    end: Instant,
    seed: u64,
    /// The longest time of somebody who cannot wait long.
    patience: Duration,
}

/// What somebody got.
#[derive(Debug, Default)]
struct Person {
    tokens: u64,
    done: BTreeMap<&'static str, u64>,
    /// From sending to the first message with tokens.
    first: Vec<Duration>,
    /// Between messages of a stream.
    gaps: Vec<Duration>,
}

impl Person {
    fn note(&mut self, what: &'static str, answers: &[Answer]) {
        *self.done.entry(what).or_default() += 1;
        self.tokens += answers.iter().map(|answer| answer.tokens.len() as u64).sum::<u64>();
    }

    /// Takes a stream, and notes when its messages come.
    async fn listen(
        &mut self,
        client: &mut Client,
        request: v1::GenerateRequest,
        leave_after: usize,
    ) -> anyhow::Result<Vec<Answer>> {
        let n = request.n.unwrap_or(1) as usize;
        let mut last = Instant::now();
        let (mut first, mut gaps) = (None, Vec::new());
        let stream = loop {
            let request = v1::StreamGenerateRequest { request: Some(request.clone()) };
            match client.stream_generate(request).await {
                Err(status) if status.code() == Code::ResourceExhausted => self.wait(&status).await,
                stream => break stream?.into_inner(),
            }
        };
        let stream = stream.inspect(|message| {
            let Ok(v1::StreamGenerateResponse { event: Some(Event::Delta(_)) }) = message else { return };
            let gap = std::mem::replace(&mut last, Instant::now()).elapsed();
            if first.is_none() { first = Some(gap) } else { gaps.push(gap) }
        });
        let answers = answers::of_stream(stream, n, leave_after).await?;
        self.first.extend(first);
        self.gaps.append(&mut gaps);
        Ok(answers)
    }

    /// Does what a server that has no room asks for.
    async fn wait(&mut self, status: &Status) {
        self.note("refused for now", &[]);
        let hint = tonic_types::StatusExt::get_details_retry_info(status).and_then(|info| info.retry_delay);
        tokio::time::sleep(hint.unwrap_or_else(|| panic!("a hint: {status}"))).await;
    }
}

impl Load {
    /// One person, who asks again and again until it is time to go.
    async fn person(&self, number: u64) -> anyhow::Result<Person> {
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_add(number << 32));
        let mut client = self.clients[(number % CONNECTIONS) as usize].clone();
        let mut person = Person::default();
        while Instant::now() < self.end {
            let index = rng.random_range(0..self.requests.len());
            let request = self.requests[index].clone();
            match rng.random_range(0..10) {
                0..4 => {
                    let answers = person.listen(&mut client, request, usize::MAX).await?;
                    self.same(index, &answers).with_context(|| format!("request {index}, streamed"))?;
                    person.note("streamed", &answers);
                }
                4 | 5 => {
                    let answers = loop {
                        match client.generate(request.clone()).await {
                            Err(status) if status.code() == Code::ResourceExhausted => {
                                person.wait(&status).await
                            }
                            response => break answers::of_response(response?.into_inner())?,
                        }
                    };
                    self.same(index, &answers).with_context(|| format!("request {index}, whole"))?;
                    person.note("whole", &answers);
                }
                6 => {
                    let answers = person.listen(&mut client, request, rng.random_range(0..60)).await?;
                    self.same(index, &answers).with_context(|| format!("request {index}, left"))?;
                    person.note("left", &answers);
                }
                7 => {
                    let patience = self.patience.mul_f64(rng.random());
                    let given_up = tokio::time::timeout(patience, client.generate(request)).await;
                    match given_up {
                        Ok(Err(status)) if status.code() == Code::ResourceExhausted => {
                            person.wait(&status).await
                        }
                        Ok(response) => self.same(index, &answers::of_response(response?.into_inner())?)?,
                        Err(_) => {}
                    }
                    person.note("given up", &[]);
                }
                8 => self.hurry(&mut person, request, self.patience.mul_f64(rng.random())).await?,
                _ => converse(&mut person, &mut client, &mut rng).await?,
            }
        }
        Ok(person)
    }

    /// Compares answers with those that the same request got before, as far as they came.
    fn same(&self, index: usize, answers: &[Answer]) -> anyhow::Result<()> {
        let mut known = self.answers.lock().expect("nobody panics with it");
        if answers.iter().all(|answer| answer.end.is_some()) {
            known.entry(index).or_insert_with(|| answers.to_vec());
        }
        for (answer, known) in answers.iter().zip(known.get(&index).into_iter().flatten()) {
            if let Some(difference) = answer.difference(known) {
                anyhow::bail!("{difference}");
            }
        }
        Ok(())
    }

    /// Asks with a deadline.
    async fn hurry(
        &self,
        person: &mut Person,
        request: v1::GenerateRequest,
        timeout: Duration,
    ) -> anyhow::Result<()> {
        let sent = Instant::now();
        let answered = self.untimed.clone().generate(within(timeout, request)).await;
        let took = sent.elapsed();
        match answered {
            Ok(response) => person.note("in time", &answers::of_response(response.into_inner())?),
            Err(status) if status.code() == Code::DeadlineExceeded => person.note("too late", &[]),
            Err(status) if status.code() == Code::ResourceExhausted => person.wait(&status).await,
            Err(status) => return Err(status).context("with a deadline"),
        }
        anyhow::ensure!(took < timeout + LATE, "a deadline of {timeout:?} was told after {took:?}");
        Ok(())
    }
}

/// Asks about a picture, and again, with what was answered.
async fn converse(person: &mut Person, client: &mut Client, rng: &mut StdRng) -> anyhow::Result<()> {
    let mut request = pool::about_picture(rng)?;
    for _ in 0..TURNS {
        let answers = person.listen(client, request.clone(), usize::MAX).await.context("a conversation")?;
        let turns = &mut request.chat.as_mut().context("a chat")?.messages;
        let answered = answers.first().map(|answer| answer.text.clone()).filter(|text| !text.is_empty());
        turns.push(pool::message(v1::Role::Assistant, answered.unwrap_or_else(|| "-".to_owned())));
        turns.push(pool::message(v1::Role::User, "And what else?".to_owned()));
        person.note("turns", &answers);
    }
    Ok(())
}

/// Anonymous memory of processes over time.
async fn watch_memory(pids: Vec<u32>, end: Instant) -> Vec<(u32, Vec<u64>)> {
    let mut memory: Vec<_> = pids.into_iter().map(|pid| (pid, Vec::new())).collect();
    while Instant::now() < end {
        for (pid, samples) in &mut memory {
            samples.extend(resident_bytes(*pid));
        }
        tokio::time::sleep(Duration::from_millis(1000 / SAMPLES_PER_SECOND)).await;
    }
    memory
}

/// Of sorted values the one that this part of them does not exceed.
fn quantile<T: Copy>(sorted: &[T], part: f64) -> T {
    sorted[((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len()) - 1]
}

fn check_memory(memory: &[(u32, Vec<u64>)], server: u32) {
    for (pid, samples) in memory {
        let quarter = samples.len() / 4;
        let median = |samples: &[u64]| {
            let mut samples = samples.to_vec();
            samples.sort_unstable();
            quantile(&samples, 0.5)
        };
        let quarters: Vec<_> = samples.chunks(quarter.max(1)).take(4).map(median).collect();
        let name = if *pid == server { "server" } else { "shard" };
        println!(
            "memory of the {name} in each quarter: {:?} MB",
            quarters.iter().map(|b| b / 1_000_000).collect::<Vec<_>>()
        );
        let most = (quarters[2] as f64 * GROWTH) as u64 + GROWTH_BYTES;
        assert!(quarters[3] <= most, "the {name}'s memory grows: {quarters:?} bytes in each quarter");
    }
}

fn check_fairness(people: &[Person], streams: u64) {
    let sorted = |of: &dyn Fn(&Person) -> Vec<Duration>| {
        let mut all: Vec<_> = people.iter().flat_map(of).collect();
        all.sort_unstable();
        all
    };
    for (what, times, slack) in [
        ("from sending to the first token", sorted(&|person| person.first.clone()), FIRST_SLACK),
        ("between messages of a stream", sorted(&|person| person.gaps.clone()), GAP_SLACK),
    ] {
        let [median, p99, longest] = [0.5, 0.99, 1.0].map(|part| quantile(&times, part));
        println!("{what}: median {median:.1?}, 99 of 100 within {p99:.1?}, longest {longest:.1?}");
        assert!(p99 <= median * TIMES + slack, "{what}: {p99:?} is not rare, where {median:?} is usual");
        assert!(longest <= median * TIMES + STANDSTILL, "{what}: {longest:?}, where {median:?} is usual");
    }
    let mut done: Vec<u64> = people.iter().map(|person| person.done.values().sum()).collect();
    done.sort_unstable();
    let [least, median, most] = [0.0, 0.5, 1.0].map(|part| quantile(&done, part));
    println!("requests of each of {streams}: {least} to {most}, median {median}");
    assert!(least as f64 >= median as f64 * LEAST_SHARE, "somebody had {least} requests, others {median}");
}

#[tokio::test]
async fn many_people_get_what_they_ask_for_and_leave_nothing_behind() -> anyhow::Result<()> {
    let streams = number("LOCKSTEP_LOAD_STREAMS", STREAMS)?;
    let length = Duration::from_secs(number("LOCKSTEP_LOAD_SECONDS", SECONDS)?);
    let seed = number("LOCKSTEP_LOAD_SEED", 1)?;
    let arguments = format!(
        "--world-size 2 --max-image-tokens 256 --max-context-tokens 4096 --feature-tokens 8192 --kv-tokens {KV_TOKENS} \
         --max-running {MAX_RUNNING} --max-waiting {}",
        3 * streams
    );
    let server =
        Server::start(&root().join("tests/checkpoints/a"), &arguments.split(' ').collect::<Vec<_>>())?;
    let clients = crowd::connect(&server, CONNECTIONS).await?;
    let shards = server.shard_pids();
    let begun = Instant::now();
    let load = Arc::new(Load {
        clients,
        untimed: untimed::connect(server.address()).await?,
        requests: Pool::new(seed).take(REQUESTS)?,
        answers: Mutex::default(),
        end: begun + length,
        seed,
        patience: IMPATIENT.mul_f64((streams as f64 / STREAMS as f64).max(1.0)),
    });
    let memory = tokio::spawn(watch_memory([vec![server.pid()], shards.clone()].concat(), load.end));
    let people: Vec<_> = (0..streams)
        .map(|number| {
            let load = load.clone();
            tokio::spawn(async move { load.person(number).await.with_context(|| format!("person {number}")) })
        })
        .collect();
    let mut got = Vec::new();
    for person in people {
        got.push(person.await??);
    }
    let took = begun.elapsed();

    let mut done = BTreeMap::new();
    for (what, count) in got.iter().flat_map(|person| &person.done) {
        *done.entry(*what).or_insert(0) += count;
    }
    let tokens: u64 = got.iter().map(|person| person.tokens).sum();
    println!("{streams} people for {took:.0?}, seed {seed}: {tokens} tokens, {done:?}");
    check_fairness(&got, streams);
    check_memory(&memory.await?, server.pid());
    assert!(streams > ROOM || !done.contains_key("refused for now"), "{done:?}");
    for what in ["streamed", "whole", "left", "given up", "in time", "too late", "turns"] {
        assert!(done.contains_key(what), "nothing was {what}: {done:?}");
    }
    // Whoever left has left nothing: the same processes serve the next one.
    assert_eq!(server.child_pids().len(), shards.len());
    let answers = load.clients[0].clone().generate(load.requests[0].clone()).await?.into_inner();
    load.same(0, &answers::of_response(answers)?)?;
    drop(load);
    assert_eq!(server.stop()?.code, Some(0));
    Ok(())
}
