//! Whole answers of a checkpoint whose heads are as wide as the family's, against the reference's.

use anyhow::{Context, ensure};
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::{self, Case, largest_error, request, root};
use lockstep_tests::server::Server;

use super::{COMMON, HOST, KV, NCCL, stand_ins, words};

/// A text, pictures and videos of a few tokens.
const CASES: [(&str, &[&str]); 2] = [
    ("g", &["several_turns", "tiny_picture", "many_windows", "three_pictures_between_text"]),
    ("g_videos", &["odd_number_of_frames", "video_then_picture"]),
];

/// Tokens of each answer: on stand-ins each takes a while.
const TOKENS: usize = 8;

fn cases() -> anyhow::Result<Vec<Case>> {
    let mut cases = vec![];
    for (file, names) in CASES {
        let golden = golden::read(file)?;
        let named = golden.cases.into_iter().filter(|case| names.contains(&&case.name[..]));
        let before = cases.len();
        cases.extend(named);
        ensure!(cases.len() == before + names.len(), "{file} has all of {names:?}");
    }
    Ok(cases)
}

/// As on CPUs: the error is at most twice that of the reference's own bf16. A token that is drawn in place of the reference's was about
/// as probable.
fn check(case: &Case, response: v1::GenerateResponse) -> anyhow::Result<f32> {
    let started = response.started.context("what was understood")?;
    ensure!(started.prompt_token_ids == case.input_ids, "another prompt");
    let choice = response.choices.first().context("a choice")?;
    let bound = 2.0 * case.full_bf16_max_error;
    let same = choice.token_ids.iter().zip(&case.greedy).take_while(|(a, b)| a == b).count();
    let error = largest_error(case, choice, same)?;
    ensure!(error <= bound, "log-probabilities differ by {error}, which is more than {bound}");
    if let Some(position) = choice.logprobs.get(same) {
        let of_reference = position.top.iter().find(|token| token.token_id == case.greedy[same]);
        let (best, other) =
            (position.top.first().context("a best token")?, of_reference.context("among the best")?);
        ensure!(best.logprob - other.logprob <= 2.0 * bound, "token {same} is {best:?}, not {other:?}");
    }
    ensure!(choice.token_ids.len() == TOKENS, "{} tokens", choice.token_ids.len());
    Ok(error / bound)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_references() -> anyhow::Result<()> {
    let cases = cases()?;
    for arguments in ["--world-size 1", NCCL, HOST] {
        let arguments_of_all = words(&[COMMON, KV, arguments]);
        let checkpoint = root().join("tests/checkpoints/g");
        let server = Server::start_in(&stand_ins(&[])?, &checkpoint, &arguments_of_all)?;
        let client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
        let answers = cases.iter().map(|case| {
            let mut client = client.clone();
            async move { anyhow::Ok(client.generate(request(case, 1.0, TOKENS)?).await?.into_inner()) }
        });
        for (case, answer) in cases.iter().zip(futures::future::try_join_all(answers).await?) {
            let context = format!("{arguments}: {}", case.name);
            let part = check(case, answer).with_context(|| context.clone())?;
            println!("{context}: {part:.2} of the largest error that may be");
        }
    }
    Ok(())
}
