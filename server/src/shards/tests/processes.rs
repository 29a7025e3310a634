//! Groups of processes that compute nothing, and that die or stop.

use std::{
    ffi::OsString,
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::*;

/// The command that runs [`fake_shard_process`] of this test program. A shell turns the arguments that libtest would
/// not understand into environment variables.
fn fake_process(scene: &str) -> ShardSource {
    let script = r#"LOCKSTEP_FAKE_SCENE=$1 LOCKSTEP_FAKE_LISTEN=$4 exec "$0" \
        --exact shards::tests::processes::fake_shard_process --ignored --nocapture"#;
    let program = std::env::current_exe().unwrap();
    let mut command: Vec<OsString> = ["/bin/sh", "-c", script].map(OsString::from).into();
    command.extend([program.into(), scene.into()]);
    ShardSource::Children { command: Some(command) }
}

#[test]
#[ignore = "is a process that other tests start"]
fn fake_shard_process() {
    let (Ok(scene), Ok(listen)) =
        (std::env::var("LOCKSTEP_FAKE_SCENE"), std::env::var("LOCKSTEP_FAKE_LISTEN"))
    else {
        return;
    };
    let socket = PathBuf::from(listen.strip_prefix("unix:").unwrap());
    let first = socket.file_name().unwrap().to_string_lossy().starts_with("rank-0");
    let fake = match scene.as_str() {
        // Rank 1 dies, and rank 0 waits for it for ever.
        "dies" if first => Fake { hangs_at: Some(1), ..Fake::new() },
        "dies" => Fake { dies_at: Some(1), ..Fake::new() },
        "lives" | "stops" => Fake::new(),
        // What it loads changes with every process.
        "rots" => Fake { weights_checksum: std::process::id().into(), ..Fake::new() },
        "refuses" => Fake { refuses: Some("no model here".into()), ..Fake::new() },
        "falls" => Fake { falls: true, ..Fake::new() },
        // Loads when the server starts, and never again.
        "loads-once" if socket.to_string_lossy().ends_with("-0") => Fake::new(),
        "loads-once" => Fake { refuses: Some("no model any more".into()), ..Fake::new() },
        other => panic!("no scene {other}"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { fake.serve(&socket).await }).unwrap();
}

/// Ids of this test program's children that play a scene.
fn fakes_alive(scene: &str) -> Vec<String> {
    let (scene, parent) =
        (format!("LOCKSTEP_FAKE_SCENE={scene}\0"), format!("PPid:\t{}\n", std::process::id()));
    let contains = |file: PathBuf, text: &str| {
        std::fs::read(file).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text))
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let fakes = processes.filter(|process| {
        contains(process.path().join("environ"), &scene) && contains(process.path().join("status"), &parent)
    });
    fakes.map(|process| process.file_name().into_string().unwrap()).collect()
}

fn signal(pid: &str, signal: &str) {
    assert!(std::process::Command::new("kill").args([signal, pid]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_is_noticed_while_nothing_runs_and_dropping_the_group_kills_the_rest() {
    let config = GroupConfig { source: fake_process("lives"), ..config(2) };
    let (progress, _) = watch::channel(vec![]);
    let (mut group, _) = Group::start(&config, &progress).await.unwrap();
    let pids = fakes_alive("lives");
    assert_eq!(pids.len(), 2);
    signal(&pids[0], "-9");
    assert_eq!(group.receive().await, Err(Broken));
    let GroupError::ShardDied { status, .. } = group.diagnose().await else { panic!("not told as a death") };
    assert!(status.contains("signal: 9"), "{status}");
    drop(group);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !fakes_alive("lives").is_empty() {
        assert!(Instant::now() < deadline, "a shard outlived its group");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_process_is_told_with_its_last_words_and_started_again() {
    let config = GroupConfig { source: fake_process("dies"), ..config(2) };
    let (progress, _) = watch::channel(vec![]);
    let (mut group, _) = Group::start(&config, &progress).await.unwrap();
    let before = fakes_alive("dies");
    assert_eq!(before.len(), 2);
    run(&mut group, plan(0)).await.unwrap();
    let began = Instant::now();
    let error = run(&mut group, plan(1)).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10));
    let GroupError::ShardDied { rank, status, last_words } = &error else { panic!("not told as a death") };
    assert_eq!((*rank, status.as_str()), (1, "exit status: 7"));
    assert_eq!(last_words.last().map(String::as_str), Some("step 1 was too much for me"));

    group.restart(&error).await.unwrap();
    assert_eq!(group.meeting.num_files(), 1);
    let after = fakes_alive("dies");
    assert_eq!((after.len(), after.iter().filter(|pid| before.contains(pid)).count()), (2, 1));
    for step in 0..3 {
        assert_eq!(run(&mut group, plan(step)).await.unwrap().step, step);
    }
    group.shutdown().await;
    assert!(fakes_alive("dies").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_process_is_silent_and_started_again() {
    let config = GroupConfig { source: fake_process("stops"), ..config(2) };
    let (progress, _) = watch::channel(vec![]);
    let (mut group, _) = Group::start(&config, &progress).await.unwrap();
    let before = fakes_alive("stops");
    signal(&before[0], "-STOP");
    assert_eq!(group.receive().await, Err(Broken), "it is noticed without work");
    let error = group.diagnose().await;
    assert!(matches!(&error, GroupError::Silent { ranks, .. } if ranks.len() == 1), "{error}");
    group.restart(&error).await.unwrap();
    let after = fakes_alive("stops");
    assert_eq!((after.len(), after.contains(&before[0]), after.contains(&before[1])), (2, false, true));
    run(&mut group, plan(0)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_does_not_start_leaves_no_process() {
    let config = GroupConfig { source: fake_process("refuses"), ..config(3) };
    let (progress, _) = watch::channel(vec![]);
    let error = Group::start(&config, &progress).await.err().unwrap();
    assert_eq!(error.to_string(), "shards 0, 1, 2: no model here");
    assert!(fakes_alive("refuses").is_empty());
}

#[tokio::test]
async fn a_program_that_ends_at_once_is_told_with_its_last_words() {
    let command = ["/bin/sh", "-c", "echo wrong machine >&2; exit 4"].map(OsString::from);
    let config = GroupConfig { source: ShardSource::Children { command: Some(command.into()) }, ..config(2) };
    let (progress, _) = watch::channel(vec![]);
    let error = Group::start(&config, &progress).await.err().unwrap();
    let expected = "shards 0, 1: died (exit status: 4), its last words:\n  wrong machine";
    assert_eq!(error.to_string(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_that_fall_after_the_first_are_part_of_its_fault() {
    let config = GroupConfig { source: fake_process("falls"), ..config(3) };
    let (progress, _) = watch::channel(vec![]);
    let (mut group, _) = Group::start(&config, &progress).await.unwrap();
    let before = fakes_alive("falls");
    signal(&before[0], "-9");
    assert_eq!(group.receive().await, Err(Broken));
    let fault = group.diagnose().await;
    group.restart(&fault).await.unwrap();
    let after = fakes_alive("falls");
    assert!(after.len() == 3 && after.iter().all(|pid| !before.contains(pid)), "{before:?}, {after:?}");
    run(&mut group, plan(0)).await.unwrap();
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_ranks_were_to_meet_stays_open_until_they_have_met_elsewhere() {
    let config = GroupConfig { source: fake_process("loads-once"), ..config(2) };
    let (progress, _) = watch::channel(vec![]);
    let (mut group, _) = Group::start(&config, &progress).await.unwrap();
    signal(&fakes_alive("loads-once")[0], "-9");
    assert_eq!(group.receive().await, Err(Broken));
    let mut fault = group.diagnose().await;
    for count in 2..4 {
        fault = group.restart(&fault).await.unwrap_err();
        assert!(fault.to_string().contains("no model any more"), "{fault}");
        assert_eq!(group.meeting.num_files(), count);
    }
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_reads_other_weights_than_before_is_refused() {
    let config = GroupConfig { source: fake_process("rots"), ..config(2) };
    let (progress, _) = watch::channel(vec![]);
    let (mut group, _) = Group::start(&config, &progress).await.unwrap();
    signal(&fakes_alive("rots")[0], "-9");
    assert_eq!(group.receive().await, Err(Broken));
    let fault = group.diagnose().await;
    let again = group.restart(&fault).await.unwrap_err();
    assert!(again.to_string().contains("read other weights than when the server started"), "{again}");
    assert_eq!(again.suspects().len(), 1);
    group.shutdown().await;
}
