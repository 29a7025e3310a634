//! Answers of the demonstration checkpoint are right, not only the same: whole, in slices, under load, after faults, from the cache, through
//! every client. And they are wrong when something on the way is.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use lockstep_client::Client;
use lockstep_tests::exam::{Subject, Task, checkpoint, grade, pass, take, take_counted, tasks, wide};
use lockstep_tests::faults::{recoveries, until};
use lockstep_tests::server::{Server, binary, signal};
use serde_json::Value;

/// What is right of each subject, at least; the checkpoint is a little better than that on these drawings.
const LEAST: [(Subject, f64); 6] = [
    (Subject::One, 0.8),
    (Subject::Two, 0.7),
    (Subject::Count, 0.75),
    (Subject::Box, 0.9),
    (Subject::Motion, 0.9),
    (Subject::Second, 0.85),
];
const NUMBER: usize = 48;
const AT_A_TIME: usize = 4;

fn least(subject: Subject) -> f64 {
    LEAST.iter().find(|(one, _)| *one == subject).map_or(1.0, |(_, least)| *least)
}

async fn client(server: &Server) -> anyhow::Result<Client> {
    Ok(Client::connect(server.address()).await?)
}

#[tokio::test]
async fn answers_are_right_at_every_world_size() -> anyhow::Result<()> {
    let exam = LEAST.iter().map(|(subject, least)| Ok((*subject, *least, tasks(*subject, NUMBER, 1)?)));
    let exam = exam.collect::<anyhow::Result<Vec<_>>>()?;
    for (world_size, dtype) in [("1", "f32"), ("2", "bf16"), ("4", "bf16")] {
        let server = Server::start(&checkpoint(), &["--world-size", world_size, "--dtype", dtype])?;
        let client = client(&server).await?;
        for (subject, least, tasks) in &exam {
            let answers = take(&client, tasks, AT_A_TIME).await?;
            println!("{world_size} x {dtype}, {subject:?}: {:.2}", grade(tasks, &answers));
            pass(tasks, &answers, *least).with_context(|| format!("{world_size} x {dtype}, {subject:?}"))?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn boxes_are_the_references_to_the_pixel() -> anyhow::Result<()> {
    let tasks = wide()?;
    for world_size in ["1", "2", "3"] {
        let server = Server::start(&checkpoint(), &["--world-size", world_size, "--dtype", "f32"])?;
        pass(&tasks, &take(&client(&server).await?, &tasks, AT_A_TIME).await?, 1.0)?;
    }
    Ok(())
}

/// Tasks of all subjects in turn.
fn mixed(number: usize, seed: u64) -> anyhow::Result<Vec<Task>> {
    let mut subjects = LEAST
        .iter()
        .map(|(subject, _)| Ok(tasks(*subject, number, seed)?.into_iter()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut mixed = vec![];
    for _ in 0..number {
        mixed.extend(subjects.iter_mut().filter_map(Iterator::next));
    }
    Ok(mixed)
}

#[tokio::test]
async fn answers_are_right_when_many_ask_at_once_and_shards_are_killed() -> anyhow::Result<()> {
    let tasks = mixed(40, 2)?;
    let least = LEAST.iter().map(|(_, least)| least).sum::<f64>() / LEAST.len() as f64;
    let server = Server::start(&checkpoint(), &["--world-size", "2"])?;
    let alone = take(&client(&server).await?, &tasks, 1).await?;
    pass(&tasks, &alone, least)?;
    drop(server);

    // On another server nothing is in the cache. Its steps are small, so that the crowd is there for long enough.
    let server = Server::start(&checkpoint(), &["--world-size", "2", "--max-step-tokens", "64"])?;
    let client = client(&server).await?;
    let answered = AtomicUsize::new(0);
    let crowd = take_counted(&client, &tasks, 24, &answered);
    // A request that shards die of three times is given up: between two faults all that were there at the first are answered.
    let faults = async {
        for killed in 1.. {
            let enough = || answered.load(Ordering::Relaxed) >= killed * 60;
            while !enough() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let pid = *server.shard_pids().first().context("a shard")?;
            signal(pid, "KILL")?;
            until("the shards are back", &server, || (recoveries(&server) >= killed).then_some(())).await?;
        }
        anyhow::Ok(())
    };
    let crowd = tokio::select! {
        crowd = crowd => crowd?,
        Err(error) = faults => return Err(error),
    };
    let killed = recoveries(&server);
    println!("{killed} shards were killed");
    assert!(killed >= 2, "{killed} faults while {} were asked", tasks.len());
    for ((task, alone), crowd) in tasks.iter().zip(&alone).zip(&crowd) {
        assert_eq!(crowd.text(), alone.text(), "{}", task.question.text);
    }
    Ok(())
}

#[tokio::test]
async fn answers_are_right_about_what_was_computed_for_others() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--world-size", "2"])?;
    let client = client(&server).await?;
    for subject in [Subject::Two, Subject::Motion] {
        let tasks = tasks(subject, NUMBER, 3)?;
        let first = take(&client, &tasks, AT_A_TIME).await?;
        let second = take(&client, &tasks, AT_A_TIME).await?;
        for (task, (first, second)) in tasks.iter().zip(first.iter().zip(&second)) {
            assert_eq!(first.text(), second.text(), "{}", task.question.text);
            assert!(second.usage.cached_tokens > 0, "{:?}", second.usage);
        }
        pass(&tasks, &second, least(subject))?;
    }
    Ok(())
}

#[tokio::test]
async fn the_verb_ask_tells_what_is_right() -> anyhow::Result<()> {
    let server = Server::start(&checkpoint(), &["--world-size", "2"])?;
    let tasks = tasks(Subject::One, 12, 4)?;
    let folder = tempfile::tempdir()?;
    let mut right = 0;
    for (index, task) in tasks.iter().enumerate() {
        let picture = folder.path().join(format!("{index}.png"));
        let [lockstep_client::Part::Image(image)] = &task.parts[..] else { anyhow::bail!("one picture") };
        fs::write(&picture, image.data())?;
        let mut command = Command::new(binary()?);
        command.args(["ask", "--server", server.address(), "--json", "--image"]).arg(&picture);
        let output = command.arg(&task.question.text).stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        right += usize::from(task.question.is_right(answer["text"].as_str().context("a text")?));
    }
    assert!(right >= 10, "{right} of 12");
    Ok(())
}

/// Something that is wrong on the way, made by a change of the checkpoint's files, and a subject that suffers.
struct Mutation {
    name: &'static str,
    /// None: boxes in wide pictures, to the pixel.
    subject: Option<Subject>,
    make: fn(&Path) -> anyhow::Result<()>,
}

const MUTATIONS: [Mutation; 7] = [
    Mutation { name: "red and blue are swapped", subject: Some(Subject::One), make: swap_channels },
    Mutation {
        name: "pixels are not normalized",
        subject: Some(Subject::One),
        make: |folder| {
            set(folder, "preprocessor_config.json", "/image_mean", serde_json::json!([0.0, 0.0, 0.0]))?;
            set(folder, "preprocessor_config.json", "/image_std", serde_json::json!([1.0, 1.0, 1.0]))
        },
    },
    Mutation {
        name: "sections of M-RoPE are others",
        subject: Some(Subject::Box),
        make: |folder| {
            set(folder, "config.json", "/rope_scaling/mrope_section", serde_json::json!([6, 4, 6]))
        },
    },
    Mutation {
        name: "there are no windows",
        subject: None,
        make: |folder| set(folder, "config.json", "/vision_config/window_size", serde_json::json!(1120)),
    },
    Mutation {
        name: "there are only windows",
        subject: None,
        make: |folder| {
            set(folder, "config.json", "/vision_config/fullatt_block_indexes", serde_json::json!([]))
        },
    },
    Mutation {
        name: "time runs at half its pace",
        subject: Some(Subject::Second),
        make: |folder| set(folder, "config.json", "/vision_config/tokens_per_second", serde_json::json!(1)),
    },
    Mutation {
        name: "rope turns at another pace",
        subject: Some(Subject::Box),
        make: |folder| set(folder, "config.json", "/rope_theta", serde_json::json!(1_000_000.0)),
    },
];

/// What a wrong answer more or less may make of a grade.
const MARGIN: f64 = 0.1;

#[tokio::test]
async fn what_is_wrong_on_the_way_makes_answers_wrong() -> anyhow::Result<()> {
    for Mutation { name, subject, make } in &MUTATIONS {
        let folder = tempfile::tempdir()?;
        for file in fs::read_dir(checkpoint())? {
            let file = file?;
            fs::copy(file.path(), folder.path().join(file.file_name()))?;
        }
        let tasks = subject.map_or_else(wide, |subject| tasks(subject, NUMBER, 1))?;
        let least = subject.map_or(1.0, least);
        let sound = graded(folder.path(), &tasks).await?;
        make(folder.path())?;
        let mutated = graded(folder.path(), &tasks).await?;
        println!("{name}, {subject:?}: {mutated:.2}, not {sound:.2}");
        assert!(sound >= least, "before {name}: {sound:.2} of {subject:?} are right");
        assert!(
            mutated < least - MARGIN,
            "{name}: {mutated:.2} of {subject:?} are right; {least} would pass"
        );
    }
    Ok(())
}

async fn graded(folder: &Path, tasks: &[Task]) -> anyhow::Result<f64> {
    let server = Server::start(folder, &["--world-size", "1", "--dtype", "f32"])?;
    let answers = take(&client(&server).await?, tasks, AT_A_TIME).await?;
    Ok(grade(tasks, &answers))
}

#[test]
fn the_demonstration_answers_and_leaves_a_picture() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let sheet = folder.path().join("sheet.png");
    let mut command = Command::new(binary()?);
    command.args(["demo", "--seed", "1", "--sheet"]).arg(&sheet).current_dir(folder.path());
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let score = said.lines().find(|line| line.contains("answers are right")).context("a score")?;
    let numbers: Vec<usize> = score.split_whitespace().filter_map(|word| word.parse().ok()).take(2).collect();
    assert!(numbers[0] * 10 >= numbers[1] * 7, "{said}");
    assert!(image::open(&sheet)?.width() > 1_000);

    let output = command.args(["--sheet", "/no/such/folder/sheet.png"]).output()?;
    assert!(!output.status.success());
    Ok(())
}

/// Sets a value of a JSON file that is there.
fn set(folder: &Path, file: &str, pointer: &str, value: Value) -> anyhow::Result<()> {
    let path = folder.join(file);
    let mut document: Value = serde_json::from_slice(&fs::read(&path)?)?;
    *document.pointer_mut(pointer).with_context(|| format!("{file} has {pointer}"))? = value;
    Ok(fs::write(path, document.to_string())?)
}

/// As if pictures were blue, green, red.
fn swap_channels(folder: &Path) -> anyhow::Result<()> {
    let path = folder.join("model.safetensors");
    let mut file = fs::read(&path)?;
    let header = 8 + u64::from_le_bytes(file[..8].try_into()?) as usize;
    let tensors: Value = serde_json::from_slice(&file[8..header])?;
    let tensor = &tensors["visual.patch_embed.proj.weight"];
    let number = |value: &Value| value.as_u64().map(|number| number as usize).context("a number");
    let begin = header + number(&tensor["data_offsets"][0])?;
    let end = header + number(&tensor["data_offsets"][1])?;
    // [out, 3, ...]
    let of_channel = (end - begin) / number(&tensor["shape"][0])? / 3;
    for out in file[begin..end].chunks_exact_mut(3 * of_channel) {
        let (red, rest) = out.split_at_mut(of_channel);
        red.swap_with_slice(&mut rest[of_channel..]);
    }
    Ok(fs::write(path, file)?)
}
