//! Compiles the stand-ins for CUDA's libraries (`libraries/*.cpp` beside this file), with the kernels' own sources in them, and
//! loads them into this process or names their folder for another one.
//!
//! They are compiled once for a state of their sources: the folder's name has its hash. Processes that come at the same time wait
//! for the first of them.
#![allow(unsafe_code)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
    thread,
};

use anyhow::{Context, Result, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// The parts of `libcuda.so` besides the kernels.
const DRIVER: [&str; 6] = ["capture", "copies", "device", "launch", "memory", "streams"];

/// The libraries beside `libcuda.so`, and the source of each.
const OTHERS: [(&str, &str); 3] =
    [("libnvrtc.so", "nvrtc"), ("libnccl.so", "nccl"), ("libcublasLt.so", "cublaslt")];

/// The machine's own instructions make the emulation faster; none may fuse what the kernels did not.
const FLAGS: [&str; 10] = [
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-semantic-interposition",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-Wno-unknown-pragmas",
];

/// The folder with the libraries, for `LD_LIBRARY_PATH` of a process that is to find them.
pub fn folder() -> &'static Path {
    // An error is kept as well: what does not compile once does not the next time.
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| compiled().map_err(|error| format!("{error:#}")));
    folder
        .as_deref()
        .unwrap_or_else(|error| panic!("the stand-ins for CUDA's libraries do not compile: {error}"))
}

/// Loads the libraries into this process. What asks for one by its name afterwards is given what is loaded.
pub fn load() {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        for name in ["libcuda.so"].into_iter().chain(OTHERS.map(|(name, _)| name)) {
            // SAFETY: loading runs what the libraries do at their start, which is to write down their kernels.
            let library = unsafe { Library::open(Some(folder().join(name)), RTLD_NOW | RTLD_GLOBAL) };
            // Never unloaded: their threads run until the process ends.
            std::mem::forget(library.expect("a stand-in loads"));
        }
    });
}

/// The folder of the crate `shard`. Tests of other crates of the workspace have this file in them, too, and use what was compiled for
/// any of them: all folders are named in the same way.
fn shard() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("shard")
}

fn emulation() -> PathBuf {
    shard().join("tests/emulation")
}

fn kernels() -> PathBuf {
    shard().join("src/device/cuda/kernels")
}

fn compiler() -> std::ffi::OsString {
    env::var_os("CXX").unwrap_or_else(|| "c++".into())
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|path| path.is_file());
    files.sort();
    Ok(files)
}

/// Of all that the libraries are made of: sources, compiler, and the processor's instructions.
fn hash() -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for folder in [emulation(), emulation().join("libraries"), kernels()] {
        for file in files_in(&folder)? {
            hasher.update(file.as_os_str().as_encoded_bytes());
            hasher.update(&fs::read(&file)?);
        }
    }
    hasher.update(FLAGS.join(" ").as_bytes());
    hasher.update(&Command::new(compiler()).arg("--version").output()?.stdout);
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let instructions =
        processor.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    hasher.update(instructions.unwrap_or_default().as_bytes());
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

fn compiled() -> Result<PathBuf> {
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = parent.join(format!("cuda-stand-ins-{}", hash()?));
    let lock = fs::File::create(parent.join("cuda-stand-ins.lock"))?;
    lock.lock()?;
    if !folder.exists() {
        let temporary = tempfile::tempdir_in(parent)?;
        compile(temporary.path())?;
        fs::rename(temporary.keep(), &folder)?;
    }
    Ok(folder)
}

/// An object, and what compiles it.
struct Object {
    path: PathBuf,
    command: Command,
}

fn object(source: &str, name: &str, to: &Path) -> Object {
    let path = to.join(format!("{name}.o"));
    let mut command = Command::new(compiler());
    command.args(FLAGS).arg("-I").arg(kernels()).arg("-I").arg(emulation()).arg("-c");
    command.arg(emulation().join("libraries").join(format!("{source}.cpp"))).arg("-o").arg(&path);
    Object { path, command }
}

/// The kernels of each of their source files, and of the probes that the emulation is tested with.
fn kernel_objects(to: &Path) -> Result<Vec<Object>> {
    let sources = files_in(&kernels())?.into_iter().chain([emulation().join("probes.cu")]);
    let sources = sources.filter(|path| path.extension().is_some_and(|extension| extension == "cu"));
    let objects = sources.map(|path| {
        let name = path.file_stem().and_then(|name| name.to_str()).context("a file's name is UTF-8")?;
        let mut object = object("kernels", &format!("kernels-{name}"), to);
        object.command.arg(format!("-DEMULATE_{}", name.to_uppercase()));
        Ok(object)
    });
    objects.collect()
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().context("tests of the CUDA device need a C++ compiler")?;
    ensure!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Runs the commands, as many at a time as there are processors. They are taken from the end.
fn run_all(commands: Vec<Command>) -> Result<()> {
    let commands = Mutex::new(commands);
    let worker = || -> Result<()> {
        loop {
            let next = commands.lock().expect("no worker panics").pop();
            let Some(mut command) = next else { return Ok(()) };
            run(&mut command)?;
        }
    };
    thread::scope(|scope| {
        let count = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })
}

fn link(name: &str, objects: &[PathBuf], to: &Path) -> Result<()> {
    let mut command = Command::new(compiler());
    command.args(["-shared", "-pthread"]).arg(format!("-Wl,-soname,{name}")).args(objects);
    if name != "libcuda.so" {
        command.arg("-L").arg(to).args(["-lcuda", "-Wl,-z,defs", "-Wl,-rpath,$ORIGIN"]);
    }
    run(command.arg("-o").arg(to.join(name)))
}

fn compile(to: &Path) -> Result<()> {
    let mut driver: Vec<Object> = DRIVER.map(|name| object(name, name, to)).into();
    driver.extend(kernel_objects(to)?);
    let others = OTHERS.map(|(library, source)| (library, object(source, source, to)));
    let driver_paths: Vec<PathBuf> = driver.iter().map(|object| object.path.clone()).collect();
    let other_paths = others.each_ref().map(|(library, object)| (*library, object.path.clone()));

    let all = others.into_iter().map(|(_, object)| object).chain(driver);
    run_all(all.map(|object| object.command).collect())?;
    link("libcuda.so", &driver_paths, to)?;
    for (library, path) in &other_paths {
        link(library, std::slice::from_ref(path), to)?;
    }
    for path in driver_paths.iter().chain(other_paths.iter().map(|(_, path)| path)) {
        fs::remove_file(path)?;
    }
    Ok(())
}
