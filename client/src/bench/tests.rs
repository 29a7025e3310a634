//! `bench` against a fake server.

use std::{collections::HashSet, fs};

use clap::{Args, FromArgMatches};
use serde_json::Value;

use super::{
    BenchArgs,
    prompt::{PromptMaker, random_text},
    report::Spread,
    run::measure,
};
use crate::{
    Client,
    fake::{Fake, TEMPLATE_TOKENS},
};

fn parse(line: &[&str]) -> BenchArgs {
    let command = BenchArgs::augment_args(clap::Command::new("bench"));
    let matches = command.try_get_matches_from(std::iter::once(&"bench").chain(line)).unwrap();
    BenchArgs::from_arg_matches(&matches).unwrap()
}

#[tokio::test]
async fn a_run_reports_lengths_times_and_memory() {
    let fake = Fake::start().await;
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("cat.gif");
    fs::write(&image, "GIF89a").unwrap();
    let args = parse(&[
        "--server",
        &fake.address,
        "--concurrency",
        "3",
        "--requests",
        "7",
        "--prompt-tokens",
        "50",
        "--max-tokens",
        "10",
        "--image",
        image.to_str().unwrap(),
        "--resized-width",
        "1036",
        "--resized-height",
        "672",
        "--seed",
        "5",
    ]);

    let report = measure(&args).await.unwrap();
    let json: Value = serde_json::to_value(&report).unwrap();

    assert_eq!(json["completed"], 7);
    assert_eq!(report.num_failed(), 0);
    assert_eq!(json["prompt_tokens"]["min"], 50.0);
    assert_eq!(json["prompt_tokens"]["max"], 50.0);
    assert_eq!(json["server_ms"]["vision"]["median"], 20.0);
    assert_eq!(json["server_ms"]["prefill"]["p95"], 10.0);
    assert_eq!(json["server_ms"]["decode_per_token"]["median"], 10.0, "90 ms for 9 tokens after the first");
    assert_eq!(json["picture"]["resized_width"], 1036);
    assert_eq!(json["shards"][1]["resident_bytes"], 3 << 20);
    assert!(json["ttft_ms"]["median"].as_f64().unwrap() > 0.0);

    let seen = fake.seen();
    assert_eq!(seen.len(), 3 + 7, "the warm-up is as wide as the run");
    for request in &seen {
        let stopping = request.stopping.clone().unwrap();
        assert_eq!((stopping.max_tokens, stopping.ignore_eos), (Some(10), Some(true)));
    }
    let salts: HashSet<_> = seen.iter().map(|request| request.cache_salt.clone().unwrap()).collect();
    assert_eq!(salts.len(), seen.len(), "no request may profit from another");
    let seeds: HashSet<_> = seen.iter().map(|request| request.sampling.clone().unwrap().seed).collect();
    assert_eq!(seeds, (5..15).map(Some).collect());

    let mut table = Vec::new();
    report.write(&mut table).unwrap();
    let table = String::from_utf8(table).unwrap();
    assert!(
        table.contains("as 1036x672 (391 tokens)") && table.contains("shard 1: 3.0 MiB resident"),
        "{table}"
    );
}

#[tokio::test]
async fn a_server_without_salts_is_measured_without() {
    let fake = Fake::start_without_salts().await;
    let args = parse(&["--server", &fake.address, "--requests", "2", "--max-tokens", "1"]);
    let report = measure(&args).await.unwrap();
    assert_eq!(report.num_failed(), 0);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["completed"], 2);
    assert_eq!(json["tpot_ms"], Value::Null, "one token has no time per further token");
}

#[tokio::test]
async fn prompts_are_as_long_as_asked_and_differ() {
    let fake = Fake::start().await;
    let client = Client::connect(&fake.address).await.unwrap();
    let mut maker = PromptMaker::new(&client, 1000);
    let (a, b) = (maker.make(1).await.unwrap(), maker.make(2).await.unwrap());
    let words = 1000 - TEMPLATE_TOKENS as usize;
    assert_eq!((a.split(' ').count(), b.split(' ').count()), (words, words));
    assert_ne!(a, b);
    let error = PromptMaker::new(&client, 5).make(1).await.unwrap_err().to_string();
    assert!(
        error.contains("--prompt-tokens 5 is too few: the chat template with one word has 21"),
        "{error}"
    );
}

#[test]
fn random_text_is_the_same_again() {
    assert_eq!(random_text(7, 4), random_text(7, 4));
    assert!(random_text(7, 5).starts_with(&random_text(7, 4)));
    assert_ne!(random_text(7, 8), random_text(8, 8));
}

#[test]
fn percentiles_are_by_nearest_rank() {
    assert_eq!(Spread::new(vec![]), None);
    let one = Spread::new(vec![3.0]).unwrap();
    assert_eq!((one.min, one.median, one.p95, one.max), (3.0, 3.0, 3.0, 3.0));
    let twenty = Spread::new((1..=20).rev().map(f64::from).collect()).unwrap();
    assert_eq!((twenty.min, twenty.median, twenty.p95, twenty.max), (1.0, 10.5, 19.0, 20.0));
}
