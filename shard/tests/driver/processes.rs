//! Processes that find the stand-ins by their names, and share memory.
//!
//! The other process is this program again, which then runs one of the ignored tests below.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    ptr,
    time::{Duration, Instant},
};

use cudarc::driver::sys::{CUipcMemHandle, CUresult};

use super::{
    gpu::{Pinned, allocate, download, enter, enter_loaded, number, stream, synchronize, upload},
    libraries,
};

/// Set in a process that is to be the other one.
const IS_CHILD: &str = "LOCKSTEP_TEST_IS_CHILD";

/// Whether this is the other process of a test: its tests do nothing where they are run for themselves.
pub fn is_child() -> bool {
    env::var_os(IS_CHILD).is_some()
}

/// A process that runs the ignored test of this name.
pub fn child(test: &str, settings: &[(&str, String)]) -> Child {
    Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", libraries::folder())
        .env(IS_CHILD, "1")
        .envs(settings.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What a child says about the test, line by line, after a mark.
const MARK: &str = "child: ";

pub fn say(what: &str) {
    println!("\n{MARK}{what}");
}

pub fn hear(child: &mut Child) -> String {
    // Unbuffered beyond a line, so that a later call finds what follows.
    let mut lines = BufReader::with_capacity(1, child.stdout.as_mut().unwrap()).lines();
    loop {
        let line = lines.next().expect("the child says something").unwrap();
        if let Some(said) = line.strip_prefix(MARK) {
            return said.to_owned();
        }
    }
}

/// Waits for a line from the parent, or its end.
pub fn wait_for_parent() {
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

fn to_text(handle: &CUipcMemHandle) -> String {
    handle.reserved.iter().map(|&byte| format!("{:02x}", byte as u8)).collect()
}

fn from_text(text: &str) -> CUipcMemHandle {
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap() as _;
    CUipcMemHandle { reserved: std::array::from_fn(byte) }
}

#[test]
fn memory_is_shared_between_processes() {
    enter(number::SHARED);
    let mut child = child("processes::shares_memory", &[]);
    let handle = from_text(&hear(&mut child));
    let mut address = 0;
    ok!(cuIpcOpenMemHandle_v2(&mut address, handle, 1));
    assert_eq!(download::<u32>(address, 1 << 20), vec![5; 1 << 20]);
    ok!(cuMemsetD32_v2(address, 6, 1 << 20));
    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    assert_eq!(hear(&mut child), "6");
    assert!(child.wait().unwrap().success());
    // What was opened outlives the process that allocated it.
    assert_eq!(download::<u32>(address, 1), [6]);
    ok!(cuIpcCloseMemHandle(address));
    let again = cuda!(cuIpcOpenMemHandle_v2(&mut address, handle, 1));
    assert_eq!(again, CUresult::CUDA_ERROR_INVALID_VALUE);
}

#[test]
#[ignore = "the other process of a test"]
fn shares_memory() {
    if !is_child() {
        return;
    }
    enter_loaded(number::PEER);
    let address = upload(&vec![5_u32; 1 << 20]);
    let mut handle = CUipcMemHandle { reserved: [0; 64] };
    ok!(cuIpcGetMemHandle(&mut handle, address));
    say(&to_text(&handle));
    wait_for_parent();
    say(&download::<u32>(address, 1)[0].to_string());
}

#[test]
fn a_delay_shows_what_is_not_synchronized() {
    let settings = [("LOCKSTEP_EMULATED_DELAY_US", "100000".to_owned())];
    let mut child = child("processes::copies_with_a_delay", &settings);
    assert_eq!(hear(&mut child), "late");
    assert!(child.wait().unwrap().success());
}

#[test]
#[ignore = "the other process of a test"]
fn copies_with_a_delay() {
    if !is_child() {
        return;
    }
    enter_loaded(number::SHARED);
    let (stream, from, to) = (stream(), upload(&[7_u32]), allocate(4));
    let results: Vec<Pinned> = (0..4).map(|_| Pinned::new(&[0])).collect();
    let start = Instant::now();
    for result in &results {
        ok!(cuMemcpyDtoDAsync_v2(to, from, 4, stream));
        ok!(cuMemcpyDtoHAsync_v2(result.as_ptr(), to, 4, stream));
    }
    let is_late = results[3].read() == [0];
    synchronize(stream);
    assert_eq!(results[3].read(), [7]);
    assert!(start.elapsed() > Duration::from_millis(10));
    say(if is_late { "late" } else { "early" });
}

#[test]
fn a_handle_of_nothing_is_refused() {
    enter(number::SHARED);
    let mut address = 0;
    let nothing = CUipcMemHandle { reserved: [0; 64] };
    let result = cuda!(cuIpcOpenMemHandle_v2(&mut address, nothing, 1));
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE);
    let pinned = Pinned::new(&[1, 2]);
    let mut handle = nothing;
    let result = cuda!(cuIpcGetMemHandle(&mut handle, pinned.as_ptr() as u64));
    assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE);
    let mut on_device = 0;
    ok!(cuMemHostGetDevicePointer_v2(&mut on_device, pinned.as_ptr(), 0));
    assert_eq!(download::<u32>(on_device, 2), [1, 2]);
    ok!(cuMemFreeHost(pinned.as_ptr()));
    let again = cuda!(cuMemFreeHost(ptr::without_provenance_mut(1)));
    assert_eq!(again, CUresult::CUDA_ERROR_INVALID_VALUE);
}
