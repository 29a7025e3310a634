//! What cannot be is said at the start: by name, all of it, and what to do about it.

use anyhow::ensure;
use lockstep_tests::exam::checkpoint;
use lockstep_tests::server::Server;

use super::{refused_in, words};

fn says(output: &str, expected: &[&str]) -> anyhow::Result<()> {
    for expected in expected {
        ensure!(output.contains(expected), "{expected:?} is not in:\n{output}");
    }
    Ok(())
}

#[test]
fn a_machine_without_a_driver_is_told_what_to_install() -> anyhow::Result<()> {
    if has_driver() {
        println!("left out: this machine has a driver");
        return Ok(());
    }
    let arguments = words(&["--device cuda --kernel-cache none --world-size 2"]);
    let ended = Server::run_to_end_in(&[("LD_LIBRARY_PATH", "")], &checkpoint(), &arguments)?;
    ensure!(ended.code == Some(1), "{ended:?}");
    says(&ended.output, &["libcuda.so.1", "was not found: install the driver", "docker run --gpus all"])
}

/// Whether the loader knows of a driver. Nothing is loaded: it would stay in this process.
fn has_driver() -> bool {
    let known = std::process::Command::new("ldconfig").arg("-p").output();
    let known =
        known.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    known.contains("libcuda.so") || std::path::Path::new("/dev/nvidiactl").exists()
}

#[test]
fn faults_of_flags_are_told_at_once() -> anyhow::Result<()> {
    let refused = |arguments: &str, expected: &[&str]| {
        let ended = Server::run_to_end(&checkpoint(), &words(&[arguments]))?;
        ensure!(ended.code == Some(1), "{arguments}: {ended:?}");
        says(&ended.output, expected)
    };
    refused(
        "--gpus 0 --sums host --kernel-cache none",
        &[
            "--gpus: is for --device cuda",
            "--sums: is for --device cuda",
            "--kernel-cache: is for --device cuda",
        ],
    )?;
    refused(
        "--device cuda --dtype f32 --gpus 0,1,0 --sums nccl --world-size 2 --gpu-memory 1.5",
        &[
            "--dtype f32: GPUs compute in bf16",
            "--gpus: names 3, there are 2 shards",
            "--sums nccl: shards share a GPU, which NCCL refuses",
            "--gpu-memory 1.5: must be above 0 and at most 1",
        ],
    )?;
    refused("--device cuda --gpu-memory 0", &["--gpu-memory 0: must be above 0 and at most 1"])?;
    refused(
        "--device cuda --world-size 4 --repeatable --sums nccl",
        &["--sums nccl: the order in which NCCL adds depends", "up to 2 shards"],
    )
}

#[test]
fn a_gpu_that_is_not_there_is_named() -> anyhow::Result<()> {
    let output = refused_in(&[("LOCKSTEP_EMULATED_GPUS", "2")], &["--world-size 3"])?;
    says(&output, &["shard 2: ", "there is no GPU 2: this process sees 2 of them"])?;
    let output = refused_in(&[("LOCKSTEP_EMULATED_GPUS", "2")], &["--gpus 7"])?;
    says(&output, &["there is no GPU 7"])
}
