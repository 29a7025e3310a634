//! The kernels through the real compiler, which needs no GPU: every source for every generation that is served, and the
//! cache of what was compiled.
//!
//! Where no NVRTC can be loaded these tests say that they are left out; with `LOCKSTEP_NVRTC=required` they fail. Compile
//! times and what kernels spill are printed: `cargo test --release -p lockstep-shard --test nvrtc -- --nocapture`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs, thread};

use lockstep_shard::device::cuda::compile::{Arch, CompileError, Compiler, Source};
use lockstep_shard::device::cuda::libraries;
use lockstep_shard::device::cuda::modules::{HOPPER_SOURCES, Module, SOURCES, modules, sources};
use lockstep_shard::device::cuda::probe::READ;

/// `paged_attention` holds its rows' results twice, of a split and of all before it, in as many registers as there are:
/// some words of them are spilled.
const MAY_SPILL: (&str, u32) = ("paged_attention_", 256);

/// A100, L40S, H100, B200.
fn archs() -> [Arch; 4] {
    [(8, 0), (8, 9), (9, 0), (10, 0)].map(|(major, minor)| Arch::new(major, minor).unwrap())
}

/// Whether there is an NVRTC to test with.
fn has_nvrtc() -> bool {
    match libraries::nvrtc() {
        Ok(version) => {
            println!("NVRTC {version}");
            true
        }
        Err(error) if env::var_os("LOCKSTEP_NVRTC").is_some_and(|value| value == "required") => {
            panic!("LOCKSTEP_NVRTC=required: {error}")
        }
        Err(error) => {
            println!("left out: {error}");
            false
        }
    }
}

#[test]
fn every_kernel_compiles_for_every_generation() {
    if !has_nvrtc() {
        return;
    }
    for arch in archs() {
        let (modules, sources) = (modules(arch, None, &|| ()).unwrap(), sources(arch));
        assert_eq!(modules.len(), sources.len());
        for (module, source) in modules.iter().zip(&sources) {
            let compilation = module.compilation.as_ref().unwrap();
            let what = format!("{} for {}", source.file, arch.target());
            println!("{what}: {} ms, {} bytes", compilation.elapsed.as_millis(), module.cubin.len());
            assert_is_cubin_of(&module.cubin, &entries(source), &what);
            check_spills(&compilation.log, &entries(source), &what);
            // Products that wait for one another, since registers are touched that the tensor cores have.
            assert!(!compilation.log.contains("serialized"), "{what}:\n{}", compilation.log);
            if HOPPER_SOURCES.contains(source) {
                print_registers(&compilation.log);
            }
        }
        let probe = Compiler::new(arch).unwrap().compile(READ, &[]).unwrap();
        assert_is_cubin_of(&probe.cubin, &entries(&READ), READ.file);
    }
}

/// A cubin is an ELF file for GPUs, with one section of code for each kernel.
fn assert_is_cubin_of(cubin: &[u8], entries: &[String], what: &str) {
    const EM_CUDA: [u8; 2] = [190, 0];
    assert!(cubin.starts_with(b"\x7fELF") && cubin[18..20] == EM_CUDA, "{what} is no cubin");
    assert!(!entries.is_empty(), "no kernel is found in {what}");
    let sections = cubin.split(|&byte| byte == 0).filter_map(|text| text.strip_prefix(b".text."));
    let names: BTreeSet<_> = sections.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    assert_eq!(Vec::from_iter(names), entries, "{what} has other kernels than its source");
}

/// Every kernel is told of, and none spills more registers than it may.
fn check_spills(log: &str, entries: &[String], what: &str) {
    let mut lines = log.lines();
    let mut told = Vec::new();
    while let Some(line) = lines.next() {
        let Some((_, entry)) = line.split_once("Function properties for ") else { continue };
        let properties = lines.next().unwrap_or_default();
        // What the compiler brings along, as the reduction of large angles.
        if entry.starts_with("__internal_") {
            continue;
        }
        let spilled =
            bytes_before(properties, "bytes spill stores").max(bytes_before(properties, "bytes spill loads"));
        if spilled > 0 {
            println!("  {entry} spills: {}", properties.trim_start_matches("ptxas").trim_matches([' ', '.']));
        }
        let allowed = if entry.starts_with(MAY_SPILL.0) { MAY_SPILL.1 } else { 0 };
        assert!(spilled <= allowed, "{what}: {entry} spills {spilled} bytes");
        told.push(entry.to_owned());
    }
    told.sort();
    assert_eq!(told, entries, "{what}: the assembler's log is of other kernels:\n{log}");
}

/// Registers decide how many blocks of warpgroups a processor holds.
fn print_registers(log: &str) {
    let mut entry = "";
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            entry = name;
        } else if let Some((_, used)) = line.split_once("Used ") {
            println!("  {entry}: {used}");
        }
    }
}

fn bytes_before(properties: &str, unit: &str) -> u32 {
    let number = properties.split(", ").find_map(|part| part.strip_suffix(unit));
    let number = number.and_then(|part| part.split_whitespace().last()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {unit} in {properties:?}"))
}

/// The names of a source's kernels, sorted: of those in it, and of those that its macros make.
fn entries(source: &Source) -> Vec<String> {
    let text = source.text.replace("\\\n", " ");
    let mut macros = Vec::new();
    let mut names = Vec::new();
    let mut plain = String::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        match line.strip_prefix("#define ").and_then(|rest| rest.split_once('(')) {
            Some((name, rest)) if rest.contains(ENTRY) => {
                let (parameters, body) = rest.split_once(')').expect("parameters end");
                macros.push((name, arguments(parameters), kernel_names(body)));
            }
            _ => plain = plain + line + "\n",
        }
    }
    names.extend(kernel_names(&plain));
    for line in plain.lines() {
        let Some((called, rest)) = line.split_once('(') else { continue };
        let Some((_, parameters, templates)) = macros.iter().find(|(name, ..)| *name == called) else {
            continue;
        };
        let arguments = arguments(rest.split_once(')').expect("arguments end").0);
        names.extend(templates.iter().map(|template| {
            let part = |part: &str| {
                parameters
                    .iter()
                    .position(|name| *name == part.trim())
                    .map_or(part.trim(), |i| arguments[i])
                    .to_owned()
            };
            template.split("##").map(part).collect::<String>()
        }));
    }
    names.sort();
    names
}

const ENTRY: &str = "extern \"C\" __global__";

fn arguments(list: &str) -> Vec<&str> {
    list.split(',').map(str::trim).collect()
}

/// What stands before the parameters of each kernel; in a macro it may have `##` in it.
fn kernel_names(text: &str) -> Vec<String> {
    let name = |declaration: &str| {
        let rest = match declaration.split_once("__launch_bounds__(") {
            Some((before, after)) if !before.contains('{') => after.split_once(')').expect("bounds end").1,
            _ => declaration,
        };
        let before = rest.split_once('(').expect("a kernel has parameters").0;
        before.trim().trim_start_matches("void").trim().to_owned()
    };
    text.split(ENTRY).skip(1).map(name).collect()
}

#[test]
fn ranks_that_start_at_once_compile_once_and_later_ones_not_at_all() {
    if !has_nvrtc() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let start = || modules(Arch::OLDEST, Some(home.path()), &|| ()).unwrap();
    let ranks: Vec<Vec<Module>> = thread::scope(|scope| {
        let ranks = [(); 3].map(|()| scope.spawn(start));
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(ranks.iter().map(|modules| compiled(modules).len()).sum::<usize>(), SOURCES.len());
    let cubins = |modules: &[Module]| modules.iter().map(|module| module.cubin.clone()).collect::<Vec<_>>();
    assert!(ranks.iter().all(|modules| cubins(modules) == cubins(&ranks[0])));

    let later = start();
    assert!(compiled(&later).is_empty() && cubins(&later) == cubins(&ranks[0]));

    damage(home.path(), "patches-");
    assert_eq!(compiled(&start()), ["patches"]);
    assert!(compiled(&start()).is_empty());
}

fn compiled(modules: &[Module]) -> Vec<&str> {
    modules.iter().filter(|module| module.compilation.is_some()).map(|module| module.name).collect()
}

/// Flips a bit in the middle of the file whose name begins with `prefix`.
fn damage(folder: &Path, prefix: &str) {
    let mut paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(prefix);
    let path = paths.find(is_it).unwrap();
    let mut contents = fs::read(&path).unwrap();
    let middle = contents.len() / 2;
    contents[middle] ^= 0x10;
    fs::write(path, contents).unwrap();
}

#[test]
fn a_folder_that_is_none_costs_the_cache_only() {
    if !has_nvrtc() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let modules = modules(Arch::OLDEST, Some(&file.path().join("cache")), &|| ()).unwrap();
    assert_eq!(compiled(&modules).len(), SOURCES.len());
}

#[test]
fn errors_of_the_compiler_name_the_file_and_the_line() {
    if !has_nvrtc() {
        return;
    }
    let text = "#include \"some.cuh\"\nextern \"C\" __global__ void f(int* x) { *x = ONE + two; }\n";
    let header = Source { file: "some.cuh", text: "#define ONE 1\n" };
    let compiler = Compiler::new(Arch::OLDEST).unwrap();
    let error = compiler.compile(Source { file: "broken.cu", text }, &[header]).unwrap_err().to_string();
    assert!(error.starts_with("broken.cu does not compile for sm_80"), "{error}");
    assert!(error.contains("broken.cu(2)") && error.contains("\"two\" is undefined"), "{error}");
}

#[test]
fn an_architecture_of_the_future_is_refused_by_name() {
    if !has_nvrtc() {
        return;
    }
    let error = Compiler::new(Arch::new(99, 0).unwrap()).unwrap_err();
    assert!(matches!(error, CompileError::UnknownArch { .. }), "{error}");
    assert!(error.to_string().contains("does not know the compute capability 99.0"), "{error}");
}

#[test]
fn names_of_kernels_are_found_in_sources() {
    let text = r#"
// extern "C" __global__ void not_this(int x) {}
extern "C" __global__ void __launch_bounds__(ROWS)
    plain(int* x) { f(x); }
extern "C" __global__ void no_bounds(int* x) { f(x); }
#define PAIR(D, KIND)                                      \
  extern "C" __global__ void __launch_bounds__(D) first_##D(int* x) { f<D>(x); } \
  extern "C" __global__ void second_##KIND##_##D(int* x) { f<D>(x); }
PAIR(32, a)
PAIR(64, b)
"#;
    let found = entries(&Source { file: "a.cu", text });
    assert_eq!(found, ["first_32", "first_64", "no_bounds", "plain", "second_a_32", "second_b_64"]);
}
