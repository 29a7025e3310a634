//! `lockstep serve --device cuda` over gRPC, on stand-ins for CUDA's libraries that run the kernels' own sources on the CPU: all of the
//! server and of its shards but the GPUs. These compute thousands of times slower, so questions are few and pictures small.

#[path = "../../../shard/tests/emulation/libraries.rs"]
#[allow(dead_code)]
mod libraries;

mod answers;
mod faults;
mod goldens;
mod memory;
mod refusals;
mod repeatable;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::TryStreamExt;
use lockstep_client::{Answer, Choice, Client, Delta, Event, Image, Request, Video};
use lockstep_tests::exam::checkpoint;
use lockstep_tests::golden::root;
use lockstep_tests::server::{Ended, Server};

/// What all servers here have. What computes on stand-ins is given all at once and then silent for as long as it takes, which on a
/// busy machine is longer than a GPU may take; a killed process is noticed at once all the same. Compiled kernels are kept
/// nowhere: a real GPU would take the stand-in's for its own.
const COMMON: &str = "--device cuda --kernel-cache none --max-context-tokens 512 --feature-tokens 512 --max-image-tokens 64 \
                      --silence-timeout 60";

/// Room for the requests of a test. The stand-ins would fill all of a GPU otherwise, which is the host's memory here.
const KV: &str = "--kv-tokens 4096";

/// Longer than anything takes, also beside other tests on a small machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Two shards with a GPU each.
const NCCL: &str = "--world-size 2";
/// Two shards on one GPU.
const HOST: &str = "--world-size 2 --gpus 0,0";

fn words<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    arguments.iter().flat_map(|words| words.split_whitespace()).collect()
}

fn stand_ins<'a>(environment: &[(&'a str, &'a str)]) -> anyhow::Result<Vec<(&'a str, &'a str)>> {
    let folder = libraries::folder().to_str().context("a path of words")?;
    Ok([&[("LD_LIBRARY_PATH", folder)], environment].concat())
}

/// Starts a server on stand-ins.
fn start(arguments: &str) -> anyhow::Result<Server> {
    start_in(&[], arguments)
}

/// The same with variables for the stand-ins.
fn start_in(environment: &[(&str, &str)], arguments: &str) -> anyhow::Result<Server> {
    Server::start_in(&stand_ins(environment)?, &checkpoint(), &words(&[COMMON, KV, arguments]))
}

/// Runs a server on stand-ins that does not come up.
fn refused_in(environment: &[(&str, &str)], arguments: &[&str]) -> anyhow::Result<String> {
    let arguments = words(&[&[COMMON], arguments].concat());
    let Ended { code, output } = Server::run_to_end_in(&stand_ins(environment)?, &checkpoint(), &arguments)?;
    ensure!(code == Some(1), "it ended with {code:?}:\n{output}");
    Ok(output)
}

async fn client(server: &Server) -> anyhow::Result<Client> {
    Ok(Client::connect(server.address()).await?)
}

/// A picture of four tokens.
fn picture() -> anyhow::Result<Image> {
    Ok(Image::open(root().join("tests/pictures/shapes_224x168.png"))?.resized_width(56).resized_height(56))
}

/// A film of eight tokens.
fn film() -> anyhow::Result<Video> {
    let frame = |i: usize| std::fs::read(root().join(format!("tests/videos/frames/{i:02}.png")));
    let frames = (0..4).map(frame).collect::<Result<Vec<_>, _>>()?;
    Ok(Video::frames(frames, 2.0).min_pixels(784).max_pixels(3136))
}

/// Answers one by one, or what went wrong with the first that went wrong.
async fn one_by_one(client: &Client, requests: &[Request]) -> anyhow::Result<Vec<Answer>> {
    let mut answers = vec![];
    for request in requests {
        answers.push(client.generate(request).await?);
    }
    Ok(answers)
}

/// Answers of which none waits for another one.
async fn all_at_once(client: &Client, requests: &[Request]) -> anyhow::Result<Vec<Answer>> {
    let answers = requests.iter().map(|request| client.generate(request));
    Ok(futures::future::try_join_all(answers).await?)
}

/// An answer as its stream tells it. `heard` counts tokens as they come.
async fn streamed(client: &Client, request: &Request, heard: &AtomicUsize) -> anyhow::Result<Vec<Choice>> {
    let mut stream = client.stream(request).await?;
    let (mut parts, mut choices) = (HashMap::<u32, Vec<Delta>>::new(), vec![]);
    while let Some(event) = stream.try_next().await? {
        match event {
            Event::Delta(delta) => {
                heard.fetch_add(delta.token_ids.len(), Ordering::Relaxed);
                parts.entry(delta.choice).or_default().push(delta);
            }
            Event::Finished(finished) => {
                let parts = parts.remove(&finished.choice).context("an answer of no tokens")?;
                choices.push(Choice {
                    text: parts.iter().map(|delta| &delta.text[..]).collect(),
                    token_ids: parts.iter().flat_map(|delta| delta.token_ids.clone()).collect(),
                    logprobs: parts.into_iter().flat_map(|delta| delta.logprobs).collect(),
                    finished,
                });
            }
            Event::Started(_) | Event::Completed(_) => {}
        }
    }
    choices.sort_by_key(|choice| choice.finished.choice);
    Ok(choices)
}

/// Makes sure that answers are the same, to the bits of their log-probabilities.
fn same(what: &str, answers: &[Answer], expected: &[Answer]) -> anyhow::Result<()> {
    for (i, (answer, expected)) in answers.iter().zip(expected).enumerate() {
        same_choices(&format!("{what}, request {i}"), &answer.choices, &expected.choices)?;
    }
    ensure!(answers.len() == expected.len(), "{what}: {} answers, not {}", answers.len(), expected.len());
    Ok(())
}

fn same_choices(what: &str, choices: &[Choice], expected: &[Choice]) -> anyhow::Result<()> {
    let bits = |choice: &Choice| -> Vec<Vec<(u32, u32)>> {
        let positions = choice.logprobs.iter();
        let tokens = positions.map(|position| std::iter::once(&position.chosen).chain(&position.top));
        tokens.map(|of| of.map(|token| (token.token_id, token.logprob.to_bits())).collect()).collect()
    };
    for (choice, expected) in choices.iter().zip(expected) {
        ensure!(choice.text == expected.text, "{what}: {:?}, not {:?}", choice.text, expected.text);
        ensure!(choice.token_ids == expected.token_ids, "{what}: other tokens");
        ensure!(bits(choice) == bits(expected), "{what}: other log-probabilities");
        ensure!(choice.finished == expected.finished, "{what}: another end");
    }
    ensure!(choices.len() == expected.len(), "{what}: {} choices, not {}", choices.len(), expected.len());
    Ok(())
}
