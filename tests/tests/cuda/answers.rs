//! Answers of a model on GPUs are right, and those of the same model on CPUs but for rounding.

use std::sync::atomic::AtomicUsize;

use anyhow::{Context, ensure};
use lockstep_client::{Answer, Choice, Client, Request};
use lockstep_tests::exam::{Subject, Task, checkpoint, pass, tasks};
use lockstep_tests::server::Server;

use super::{HOST, NCCL, all_at_once, client, one_by_one, same, same_choices, start, streamed, words};

/// What is asked, so often: what short answers there are to, since every token takes a quarter of a second.
const ASKED: [(Subject, usize); 4] =
    [(Subject::One, 3), (Subject::Count, 3), (Subject::Motion, 1), (Subject::Second, 1)];
/// What part of the answers is right at least.
const LEAST: f64 = 0.8;
/// Most probable tokens that are told beside each.
const TOP: usize = 4;
/// How far log-probabilities may be from those of CPUs. Both round activations and sums to bf16, each at other places, and are up to
/// as far from f32.
const LOGPROB_TOLERANCE: f32 = 0.25;

/// Questions about pictures and films of a few dozen tokens.
fn exam() -> anyhow::Result<Vec<Task>> {
    let exam = ASKED.map(|(subject, number)| tasks(subject, number, 1));
    Ok(exam.into_iter().collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn requests(tasks: &[Task]) -> Vec<Request> {
    tasks.iter().map(|task| task.request().temperature(0.0).logprobs(TOP as u32)).collect()
}

/// What CPUs answer.
async fn of_cpus(requests: &[Request]) -> anyhow::Result<Vec<Answer>> {
    let server = Server::start(&checkpoint(), &words(&["--max-context-tokens 512"]))?;
    one_by_one(&client(&server).await?, requests).await
}

/// Makes sure that an answer is another one's, as far as rounding may tell: up to where it first draws another token, which must have
/// been about as probable.
fn agrees(gpu: &Choice, cpu: &Choice) -> anyhow::Result<()> {
    for (i, (gpu, cpu)) in gpu.logprobs.iter().zip(&cpu.logprobs).enumerate() {
        let best = cpu.chosen.logprob;
        if gpu.chosen.token_id != cpu.chosen.token_id {
            let other = cpu.top.iter().find(|token| token.token_id == gpu.chosen.token_id);
            let other = other.with_context(|| format!("token {i}: {:?} is none of {cpu:?}", gpu.chosen))?;
            ensure!(best - other.logprob < LOGPROB_TOLERANCE, "token {i}: {:?}, not {cpu:?}", gpu.chosen);
            return Ok(());
        }
        ensure!(
            (gpu.chosen.logprob - best).abs() < LOGPROB_TOLERANCE,
            "token {i} has log-probability {}, not {best}",
            gpu.chosen.logprob
        );
    }
    ensure!(gpu.token_ids == cpu.token_ids, "{:?}, not {:?}", gpu.text, cpu.text);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_right_at_every_world_size() -> anyhow::Result<()> {
    let tasks = exam()?;
    let requests = requests(&tasks);
    let cpu = of_cpus(&requests).await?;
    pass(&tasks, &cpu, LEAST).context("on CPUs")?;
    for arguments in ["--world-size 1", NCCL, HOST, "--world-size 4"] {
        let began = std::time::Instant::now();
        let server = start(arguments)?;
        println!("{arguments} starts in {:?}", began.elapsed());
        let gpu = all_at_once(&client(&server).await?, &requests).await?;
        println!("{arguments} in {:?}", began.elapsed());
        pass(&tasks, &gpu, LEAST).context(arguments)?;
        let differences = gpu.iter().zip(&cpu).filter(|(gpu, cpu)| gpu.text() != cpu.text()).count();
        println!("{differences} of {} texts differ", gpu.len());
        for ((gpu, cpu), task) in gpu.iter().zip(&cpu).zip(&tasks) {
            agrees(gpu.first(), cpu.first())
                .with_context(|| format!("{arguments}: {}", task.question.text))?;
        }
    }
    Ok(())
}

/// Tokens of the answers that do not end by themselves.
const TOKENS: u32 = 4;

fn drawn(text: &str) -> Request {
    Request::new()
        .user(text)
        .max_tokens(TOKENS)
        .ignore_eos(true)
        .temperature(2.5)
        .repetition_penalty(1.0)
        .seed(5)
}

async fn tokens(client: &Client, request: Request) -> anyhow::Result<Vec<u32>> {
    Ok(client.generate(&request).await?.first().token_ids.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_draw_and_to_answer_works() -> anyhow::Result<()> {
    let server = start(NCCL)?;
    let client = client(&server).await?;
    let best = drawn("What is in the picture?").temperature(0.0);
    let whole = client.generate(&best.clone().logprobs(3)).await?;
    let greedy = whole.first().token_ids.clone();
    ensure!(
        greedy.len() == TOKENS as usize
            && whole.first().logprobs.iter().all(|position| position.top.len() == 3)
    );
    for position in &whole.first().logprobs {
        ensure!(position.chosen == position.top[0] && position.chosen.logprob <= 0.0, "{position:?}");
        ensure!(position.top.is_sorted_by(|one, two| one.logprob >= two.logprob), "{position:?}");
    }
    let stream = streamed(&client, &best.clone().logprobs(3), &AtomicUsize::new(0)).await?;
    same_choices("streamed", &stream, &whole.choices)?;

    let request = drawn("What is in the picture?");
    let some = tokens(&client, request.clone()).await?;
    ensure!(some == tokens(&client, request.clone()).await?, "a seed draws the same again");
    ensure!(some != greedy && some != tokens(&client, request.clone().seed(6)).await?, "seeds draw");
    for narrow in [request.clone().top_p(1e-6), request.clone().top_k(1), request.clone().min_p(1.0)] {
        ensure!(tokens(&client, narrow).await? == greedy, "the narrowest truncation leaves the best token");
    }
    let (wide, forced) = (request.clone().top_p(0.9).top_k(300), request.clone().logit_bias(77, 100.0));
    ensure!(
        tokens(&client, wide).await?.len() == TOKENS as usize
            && tokens(&client, forced).await? == [77; TOKENS as usize]
    );
    let punished = tokens(&client, best.clone().logit_bias(77, 40.0).frequency_penalty(2.0)).await?;
    ensure!(punished[0] == 77 && punished.len() == TOKENS as usize, "{punished:?}");
    let never = best.clone().logit_bias(greedy[0], -100.0).repetition_penalty(1.2).presence_penalty(0.5);
    ensure!(!tokens(&client, never).await?.contains(&greedy[0]), "what is forbidden is not drawn");

    let two = client.generate(&request.clone().n(2)).await?;
    let [one, other] = &two.choices[..] else { anyhow::bail!("two answers: {two:?}") };
    ensure!(one.token_ids == some && other.token_ids != some, "the first is who would have come alone");

    // CPUs draw the same: noise depends on seed, place and token, and is mostly larger than what rounding changes.
    let cpu = Server::start(&checkpoint(), &words(&["--max-context-tokens 512"]))?;
    let cpu = super::client(&cpu).await?.generate(&request.n(2)).await?;
    ensure!(cpu.choices == two.choices, "{cpu:?}, not {two:?}");
    Ok(())
}

/// What waits for nothing on a GPU comes too early: random delays of all that a stream does show it. Nobody is beside a request here,
/// so that its bits are the same.
#[tokio::test(flavor = "multi_thread")]
async fn delays_of_a_gpu_change_nothing() -> anyhow::Result<()> {
    let text = || drawn("Is there a picture?").logprobs(2);
    let media = text().user((super::picture()?, super::film()?, "What is in the picture?"));
    // Without lists of tokens steps are begun before the ones before are told.
    let requests = [text(), media, text().logprobs(0)];
    for arguments in [NCCL, HOST] {
        let prompt = one_by_one(&client(&start(arguments)?).await?, &requests).await?;
        let server = super::start_in(&[("LOCKSTEP_EMULATED_DELAY_US", "200")], arguments)?;
        let delayed = one_by_one(&client(&server).await?, &requests).await?;
        same(arguments, &delayed, &prompt)?;
    }
    Ok(())
}
