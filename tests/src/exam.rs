//! Questions about fresh drawings, put to a server that serves the demonstration checkpoint, and how many of its answers are right.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use lockstep::demo::exhibits::{frames, gif, png};
use lockstep::demo::questions::{Expected, Question};
use lockstep::demo::scenes::{Background, Direction, Film, Scene};
use lockstep_client::{Answer, Client, Image, Part, Request, Video};
use rand::Rng;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::golden::root;

/// More than the longest answer.
const MAX_TOKENS: u32 = 80;
/// Longer than all tasks of a test take.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Frames, and frames a second, of each film.
const FILM: (usize, u32) = (10, 2);

/// A question, with what it is about.
pub struct Task {
    /// Pictures or a film.
    pub parts: Vec<Part>,
    /// What is asked.
    pub question: Question,
}

/// What a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One shape: what it is.
    One,
    /// Two shapes: what they are, and how they lie to one another.
    Two,
    /// Up to two shapes: how many.
    Count,
    /// One shape: its box.
    Box,
    /// A shape in a film: where it moves.
    Motion,
    /// A shape in a film: when it appears.
    Second,
}

/// The folder of the checkpoint.
pub fn checkpoint() -> PathBuf {
    root().join("tests/checkpoints/shapes")
}

/// Tasks of one kind, the same ones for the same seed. Pictures are 5 to 12 tokens wide, on plain, noisy and photographic backgrounds that
/// nothing was learnt from.
///
/// # Errors
/// The photograph is not there.
pub fn tasks(subject: Subject, number: usize, seed: u64) -> anyhow::Result<Vec<Task>> {
    let photograph = image::open(root().join("tests/pictures/cat.jpg")).context("cat.jpg")?.into_rgb8();
    // Subjects do not share pictures.
    let mut rng = StdRng::seed_from_u64(seed * 8 + subject as u64);
    (0..number)
        .map(|index| {
            let background = match index % 3 {
                0 => Background::Plain,
                1 => Background::Noise,
                _ => Background::Photograph(&photograph),
            };
            task(subject, &mut rng, background)
        })
        .collect()
}

fn task(subject: Subject, rng: &mut StdRng, background: Background<'_>) -> anyhow::Result<Task> {
    const STILL: [(u32, u32); 6] = [(140, 140), (196, 140), (224, 168), (168, 224), (252, 252), (336, 140)];
    const MOVING: [(u32, u32); 3] = [(112, 112), (140, 112), (168, 140)];
    let size = *STILL.choose(rng).context("a size")?;
    let film_size = *MOVING.choose(rng).context("a size")?;
    let (parts, question) = match subject {
        Subject::One | Subject::Two => loop {
            let count = if subject == Subject::One { 1 } else { 2 };
            let scene = Scene::random(rng, size, background, count);
            if let Some(question) = Question::what(&scene) {
                break (vec![png(&scene.picture)?.into()], question);
            }
        },
        Subject::Count => {
            let count = rng.random_range(0..=2);
            let scene = Scene::random(rng, size, background, count);
            (vec![png(&scene.picture)?.into()], Question::how_many(&scene))
        }
        Subject::Box => {
            let scene = Scene::random(rng, size, background, 1);
            (vec![png(&scene.picture)?.into()], Question::whereabouts(&scene.shapes[0]))
        }
        Subject::Motion => {
            let direction = *Direction::ALL.choose(rng).context("a direction")?;
            let film = Film::moving(rng, film_size, background, direction, FILM);
            (vec![film_as_sent(&film, background)?.into()], Question::which_way(&film.shape, direction))
        }
        Subject::Second => {
            let second = rng.random_range(1..FILM.0 as u32 / FILM.1);
            let film = Film::appearing(rng, film_size, background, second, FILM);
            (vec![film_as_sent(&film, background)?.into()], Question::which_second(&film.shape, second))
        }
    };
    Ok(Task { parts, question })
}

/// Few colours as a GIF, and as many as there are on other backgrounds frame by frame.
fn film_as_sent(film: &Film, background: Background<'_>) -> anyhow::Result<Video> {
    if matches!(background, Background::Plain) { gif(film) } else { frames(film) }
}

impl Task {
    /// What is sent.
    pub fn request(&self) -> Request {
        let parts = self.parts.iter().cloned().chain([self.question.text.as_str().into()]);
        Request::new().user(parts.collect::<Vec<_>>()).max_tokens(MAX_TOKENS).timeout(TIMEOUT)
    }

    /// Whether an answer is right.
    pub fn is_right(&self, answer: &Answer) -> bool {
        self.question.is_right(answer.text())
    }
}

/// Answers to tasks, in their order, of which so many are asked at a time. `answered` counts them.
///
/// # Errors
/// A request failed.
pub async fn take_counted(
    client: &Client,
    tasks: &[Task],
    at_a_time: usize,
    answered: &AtomicUsize,
) -> anyhow::Result<Vec<Answer>> {
    let answers = stream::iter(tasks).map(|task| async move {
        let answer = client.generate(&task.request()).await?;
        answered.fetch_add(1, Ordering::Relaxed);
        anyhow::Ok(answer)
    });
    answers.buffered(at_a_time).try_collect().await
}

/// The same, uncounted.
///
/// # Errors
/// A request failed.
pub async fn take(client: &Client, tasks: &[Task], at_a_time: usize) -> anyhow::Result<Vec<Answer>> {
    take_counted(client, tasks, at_a_time, &AtomicUsize::new(0)).await
}

/// Boxes of shapes in wide pictures, with what the reference answers in f32, to the pixel, which is right.
///
/// # Errors
/// The goldens are not there.
pub fn wide() -> anyhow::Result<Vec<Task>> {
    #[derive(serde::Deserialize)]
    struct Golden {
        picture: String,
        question: String,
        answer: String,
    }
    let folder = root().join("tests/shapes/goldens");
    let goldens: Vec<Golden> = serde_json::from_slice(&std::fs::read(folder.join("answers.json"))?)?;
    let task = |golden: Golden| {
        let question = Question { text: golden.question, expected: Expected::Text(golden.answer) };
        Ok(Task { parts: vec![Image::open(folder.join(golden.picture))?.into()], question })
    };
    goldens.into_iter().map(task).collect()
}

/// What part of the answers is right, 0 to 1.
pub fn grade(tasks: &[Task], answers: &[Answer]) -> f64 {
    let right = tasks.iter().zip(answers).filter(|(task, answer)| task.is_right(answer)).count();
    right as f64 / tasks.len() as f64
}

/// Makes sure that enough answers are right.
///
/// # Errors
/// They are not; with some of those that are wrong.
pub fn pass(tasks: &[Task], answers: &[Answer], least: f64) -> anyhow::Result<()> {
    let grade = grade(tasks, answers);
    let wrong = tasks.iter().zip(answers).filter(|(task, answer)| !task.is_right(answer));
    let wrong: Vec<_> = wrong
        .take(5)
        .map(|(task, answer)| {
            format!("{}: {:?}, not {:?}", task.question.text, answer.text(), task.question.expected)
        })
        .collect();
    ensure!(grade >= least, "{grade:.2} of the answers are right, less than {least}; {}", wrong.join("; "));
    Ok(())
}
