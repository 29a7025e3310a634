//! All kernels, as sources in the binary and as cubins for the GPU at hand: from the cache where they are there, compiled
//! and kept where not.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::compile::{Arch, CompileError, Compiler, Source};
use super::cubin_cache::{CubinCache, Key};

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        &[$(Source { file: $file, text: include_str!(concat!("kernels/", $file)) }),*]
    };
}

/// The kernels for all architectures, one module each. Those that take longest to compile come first, so that they are begun first.
pub const SOURCES: &[Source] = sources![
    "attention.cu",
    "gemm.cu",
    "gemv.cu",
    "selection.cu",
    "sampling.cu",
    "reduce.cu",
    "rowwise.cu",
    "rotary.cu",
    "hash.cu",
    "patches.cu",
];

/// Kernels of instructions that Hopper alone has.
pub const HOPPER_SOURCES: &[Source] = sources!["attention_sm90.cu"];

/// What they include.
pub const HEADERS: &[Source] =
    sources!["types.cuh", "wgmma.cuh", "norm.cuh", "sampling.cuh", "attention.cuh"];

/// The kernels that there are for an architecture, one module each: those of its own first, which take longest to compile.
pub fn sources(arch: Arch) -> Vec<Source> {
    let own = if arch == Arch::HOPPER { HOPPER_SOURCES } else { &[] };
    own.iter().chain(SOURCES).copied().collect()
}

/// A module of kernels, to be loaded into the driver.
#[derive(Clone, Debug)]
pub struct Module {
    /// The source's name without its ending.
    pub name: &'static str,
    /// Code for the architecture.
    pub cubin: Vec<u8>,
    /// How it was compiled; `None` where it comes from the cache.
    pub compilation: Option<Compilation>,
}

/// How a module was compiled.
#[derive(Clone, Debug)]
pub struct Compilation {
    /// How long it took.
    pub elapsed: Duration,
    /// What the compiler and the assembler said.
    pub log: String,
}

/// All modules for an architecture, in the order of [`sources`].
///
/// `cache` is a folder for cubins: see [`default_folder`](super::cubin_cache::default_folder). What is not in it is
/// compiled, by as many threads as there are cores, and kept there. Several ranks may ask at once: one compiles, the
/// others wait for it. A cache that does not work is no error: there is a warning, and everything is compiled. `compiled` is
/// called as often as something is.
///
/// # Errors
/// NVRTC is not there or too old for the architecture, or a source does not compile.
pub fn modules(arch: Arch, cache: Option<&Path>, compiled: &dyn Fn()) -> Result<Vec<Module>, CompileError> {
    let start = Instant::now();
    let compiler = Compiler::new(arch)?;
    let cache = cache.and_then(|folder| {
        let opened = CubinCache::open(folder);
        opened
            .inspect_err(|error| tracing::warn!(?folder, %error, "there is no cache of compiled kernels"))
            .ok()
    });
    let modules = match &cache {
        Some(cache) => cached_modules(&compiler, cache, compiled)?,
        None => compile_all(&compiler, &sources(arch), compiled)?,
    };
    let num_compiled = modules.iter().filter(|module| module.compilation.is_some()).count();
    let elapsed_ms = start.elapsed().as_millis() as u64;
    tracing::info!(target = arch.target(), num_compiled, elapsed_ms, "kernels are ready");
    Ok(modules)
}

fn cached_modules(
    compiler: &Compiler,
    cache: &CubinCache,
    compiled: &dyn Fn(),
) -> Result<Vec<Module>, CompileError> {
    let sources = sources(compiler.arch());
    let read_all =
        || -> Vec<Option<Module>> { sources.iter().map(|source| read(compiler, cache, source)).collect() };
    let mut modules = read_all();
    if modules.iter().any(Option::is_none) {
        let _lock = cache.lock();
        // Whoever had the lock may have compiled what was not there before.
        modules = read_all();
        let is_missing = |(source, module): (&Source, &Option<Module>)| module.is_none().then_some(*source);
        let missing: Vec<Source> = sources.iter().zip(&modules).filter_map(is_missing).collect();
        let mut new = compile_all(compiler, &missing, compiled)?.into_iter();
        for (source, module) in sources.iter().zip(&mut modules).filter(|(_, module)| module.is_none()) {
            *module = new.next();
            let cubin = &module.as_ref().expect("all that was missing is compiled").cubin;
            if let Err(error) = cache.write(&key(compiler, source), cubin) {
                tracing::warn!(file = source.file, %error, "cannot keep a compiled kernel");
            }
        }
    }
    Ok(modules.into_iter().flatten().collect())
}

fn read(compiler: &Compiler, cache: &CubinCache, source: &Source) -> Option<Module> {
    let cubin = cache.read(&key(compiler, source))?;
    Some(Module { name: name(source), cubin, compilation: None })
}

fn key(compiler: &Compiler, source: &Source) -> Key {
    Key::new(name(source), source, HEADERS, &compiler.options(), compiler.arch(), compiler.version())
}

fn name(source: &Source) -> &'static str {
    source.file.strip_suffix(".cu").expect("kernels are in .cu files")
}

/// Compiles in parallel; the first error in the order of `sources` is told.
fn compile_all(
    compiler: &Compiler,
    sources: &[Source],
    compiled: &dyn Fn(),
) -> Result<Vec<Module>, CompileError> {
    let next = AtomicUsize::new(0);
    let (done, results) = mpsc::channel();
    let num_threads = thread::available_parallelism().map_or(1, usize::from).min(sources.len());
    let mut results: Vec<_> = thread::scope(|scope| {
        for _ in 0..num_threads {
            let (next, done) = (&next, done.clone());
            scope.spawn(move || {
                while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < sources.len())
                {
                    // Whoever receives waits for all.
                    let _ = done.send((i, compile(compiler, &sources[i])));
                }
            });
        }
        drop(done);
        results.into_iter().inspect(|_| compiled()).collect()
    });
    results.sort_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

fn compile(compiler: &Compiler, source: &Source) -> Result<Module, CompileError> {
    let start = Instant::now();
    let compiled = compiler.compile(*source, HEADERS)?;
    let elapsed = start.elapsed();
    tracing::debug!(
        file = source.file,
        elapsed_ms = elapsed.as_millis() as u64,
        log = compiled.log,
        "compiled"
    );
    Ok(Module {
        name: name(source),
        cubin: compiled.cubin,
        compilation: Some(Compilation { elapsed, log: compiled.log }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_kernel_file_is_in_the_tables() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/cuda/kernels");
        let mut files: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let all = SOURCES.iter().chain(HOPPER_SOURCES).chain(HEADERS);
        let mut listed: Vec<String> = all.map(|source| source.file.to_owned()).collect();
        files.sort();
        listed.sort();
        assert_eq!(files, listed);
    }

    #[test]
    fn every_include_is_a_header_of_the_table() {
        for source in SOURCES.iter().chain(HOPPER_SOURCES).chain(HEADERS) {
            let includes = source.text.lines().filter_map(|line| line.trim().strip_prefix("#include"));
            for include in includes {
                let file = include.trim().trim_matches('"');
                assert!(HEADERS.iter().any(|header| header.file == file), "{}: {include}", source.file);
            }
        }
    }
    #[test]
    fn hopper_alone_has_its_kernels() {
        let files = |major, minor| -> Vec<_> {
            sources(Arch::new(major, minor).unwrap()).iter().map(|source| source.file).collect()
        };
        assert_eq!(files(9, 0)[0], "attention_sm90.cu");
        assert_eq!(files(9, 0)[1..], files(8, 0));
        assert_eq!(files(10, 0), files(8, 0));
    }
}
