//! Compiles the emulation around a source of kernels, and runs kernels of it, each in a process of its own.
//! `tests/emulation/emulate.cpp` describes the form of a request.
//!
//! Where `LOCKSTEP_TEST_GPU` names a GPU, the same launches go to that one (`gpu.rs`), with the same oracles.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context, Result, bail, ensure};
use half::bf16;
use lockstep_shard::device::cuda::begins_early;
use tempfile::TempDir;

use super::gpu;

/// A source file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Rowwise,
    Rotary,
    Gemv,
    Gemm,
    Reduce,
    Attention,
    AttentionSm90,
    Patches,
    Sampling,
    Selection,
    Hash,
    /// Not kernels that anything uses: what the emulation itself is tested with.
    Probes,
}

const NUM_SOURCES: usize = 12;

impl Source {
    /// The file's name without its ending.
    pub fn name(self) -> &'static str {
        match self {
            Source::Rowwise => "rowwise",
            Source::Rotary => "rotary",
            Source::Gemv => "gemv",
            Source::Gemm => "gemm",
            Source::Reduce => "reduce",
            Source::Attention => "attention",
            Source::AttentionSm90 => "attention_sm90",
            Source::Patches => "patches",
            Source::Sampling => "sampling",
            Source::Selection => "selection",
            Source::Hash => "hash",
            Source::Probes => "probes",
        }
    }
}

/// A compiled source.
pub enum Program {
    /// A program of the emulation.
    Emulated {
        path: PathBuf,
        /// Where a changed source and its program are, until they are dropped.
        _folder: Option<TempDir>,
    },
    /// Kernels of a GPU.
    OnGpu(gpu::Kernels),
}

impl Program {
    /// The source as it is, compiled once for all tests of the process.
    pub fn of(source: Source) -> &'static Program {
        static PROGRAMS: [OnceLock<Program>; NUM_SOURCES] = [const { OnceLock::new() }; NUM_SOURCES];
        PROGRAMS[source as usize].get_or_init(|| {
            if let Some(ordinal) = gpu::ordinal() {
                return Program::OnGpu(gpu::Kernels::of(ordinal, source).expect("the kernels compile"));
            }
            let folder = temporary_folder().expect("the build has a folder for temporary files");
            let compiled = compile(source, &kernels_folder(), folder.path(), "address,undefined");
            let compiled = compiled.expect("the kernels compile");
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulate-{}", source.name()));
            fs::rename(compiled, &path).expect("the program moves");
            Program::Emulated { path, _folder: None }
        })
    }

    /// A copy of the source in which `from`, which is in `file` once, is replaced.
    pub fn changed(source: Source, file: &str, from: &str, to: &str) -> Result<Program> {
        if let Some(ordinal) = gpu::ordinal() {
            return Ok(Program::OnGpu(gpu::Kernels::changed(ordinal, source, file, from, to)?));
        }
        let folder = temporary_folder()?;
        for entry in fs::read_dir(kernels_folder())? {
            let entry = entry?;
            fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
        }
        let path = folder.path().join(file);
        let text = fs::read_to_string(&path)?;
        let count = text.matches(from).count();
        ensure!(count == 1, "{file} has {count} places that read {from:?}");
        fs::write(&path, text.replace(from, to))?;
        // Without looking for undefined behaviour, which takes half of a compilation: the faults of kernels are others.
        let path = compile(source, folder.path(), folder.path(), "address")?;
        Ok(Program::Emulated { path, _folder: Some(folder) })
    }
}

fn temporary_folder() -> Result<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

fn kernels_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/cuda/kernels")
}

fn compile(source: Source, kernels: &Path, to: &Path, sanitizers: &str) -> Result<PathBuf> {
    let emulation = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulation");
    let program = to.join("program");
    let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(&compiler)
        // No product and sum are fused, as the kernels are to be compiled.
        .args(["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=off"])
        .arg(format!("-fsanitize={sanitizers}"))
        .arg("-fno-sanitize-recover=undefined")
        .arg(format!("-DEMULATE_{}", source.name().to_uppercase()))
        .arg("-I")
        .arg(kernels)
        .arg(emulation.join("emulate.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .with_context(|| format!("{} runs: the tests of kernels need a C++ compiler", compiler.display()))?;
    ensure!(
        output.status.success(),
        "{source:?} does not compile:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(program)
}

/// An element of a buffer.
pub trait Element: Copy {
    /// Bytes of one.
    const BYTES: usize;
    /// Appends it, little-endian.
    fn append(self, to: &mut Vec<u8>);
    /// Reads it from its bytes.
    fn read(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($type:ty) => {
        impl Element for $type {
            const BYTES: usize = size_of::<$type>();
            fn append(self, to: &mut Vec<u8>) {
                to.extend(self.to_le_bytes());
            }
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("the bytes of one element"))
            }
        }
    };
}

element!(u8);
element!(u32);
element!(u64);
element!(f32);
element!(f64);
element!(bf16);

fn bytes_of<T: Element>(elements: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements.len() * T::BYTES);
    elements.iter().for_each(|element| element.append(&mut bytes));
    bytes
}

/// An argument of a kernel, or what is to happen to one.
pub enum Argument {
    /// A number of four bytes or eight.
    Number(Vec<u8>),
    /// A buffer that the kernel may not change.
    Input(Vec<u8>),
    /// One that no kernel changes, so that it may be read before the kernel before has ended.
    Weights(Vec<u8>),
    /// A buffer that the kernel changes, and what is in it before.
    Output(Vec<u8>),
    /// A null pointer.
    Null,
    /// The buffer of an earlier argument.
    SameAs(u32),
    /// A structure of the pointers that so many next arguments are.
    Pointers(u32),
    /// What is written to the buffer of an earlier argument while the kernel waits.
    WrittenLater {
        /// Which argument's.
        argument: u32,
        /// From which byte on.
        first: u64,
        /// What.
        bytes: Vec<u8>,
    },
}

impl Argument {
    /// Appends it as the emulation reads it.
    fn append(&self, to: &mut Vec<u8>) {
        let buffer = |to: &mut Vec<u8>, kind: u8, bytes: &[u8]| {
            to.push(kind);
            to.extend((bytes.len() as u64).to_le_bytes());
            to.extend(bytes);
        };
        let number = |to: &mut Vec<u8>, kind: u8, bytes: &[u8]| {
            to.push(kind);
            to.extend(bytes);
        };
        match self {
            Argument::Number(bytes) => number(to, u8::from(bytes.len() == 8), bytes),
            Argument::Input(bytes) => buffer(to, 2, bytes),
            Argument::Weights(bytes) => buffer(to, 8, bytes),
            Argument::Output(bytes) => buffer(to, 3, bytes),
            Argument::Null => to.push(4),
            Argument::SameAs(argument) => number(to, 5, &argument.to_le_bytes()),
            Argument::Pointers(count) => number(to, 6, &count.to_le_bytes()),
            Argument::WrittenLater { argument, first, bytes } => {
                number(to, 7, &argument.to_le_bytes());
                to.extend(first.to_le_bytes());
                to.extend((bytes.len() as u64).to_le_bytes());
                to.extend(bytes);
            }
        }
    }
}

/// A kernel, its grid, and its arguments in their order.
pub struct Launch {
    pub kernel: String,
    pub grid: [usize; 3],
    pub block: usize,
    pub dynamic_shared_bytes: usize,
    seed: u64,
    pub arguments: Vec<Argument>,
}

impl Launch {
    /// A launch without arguments. `seed` is that of the order of threads and blocks.
    pub fn new(kernel: impl Into<String>, grid: [usize; 3], block: usize, seed: u64) -> Self {
        Self { kernel: kernel.into(), grid, block, dynamic_shared_bytes: 0, seed, arguments: Vec::new() }
    }

    /// With so much shared memory beside what the kernel declares.
    pub fn dynamic_shared_bytes(mut self, bytes: usize) -> Self {
        self.dynamic_shared_bytes = bytes;
        self
    }

    fn argument(mut self, argument: Argument) -> Self {
        self.arguments.push(argument);
        self
    }

    /// A number.
    pub fn u32(self, value: usize) -> Self {
        let value = u32::try_from(value).expect("a number of 32 bits");
        self.argument(Argument::Number(value.to_le_bytes().into()))
    }

    /// A number.
    pub fn u64(self, value: usize) -> Self {
        self.argument(Argument::Number((value as u64).to_le_bytes().into()))
    }

    /// A number.
    pub fn f32(self, value: f32) -> Self {
        self.argument(Argument::Number(value.to_le_bytes().into()))
    }

    /// A buffer that the kernel may not change.
    pub fn input<T: Element>(self, elements: &[T]) -> Self {
        self.argument(Argument::Input(bytes_of(elements)))
    }

    /// A buffer that no kernel changes.
    pub fn weights<T: Element>(self, elements: &[T]) -> Self {
        self.argument(Argument::Weights(bytes_of(elements)))
    }

    /// A buffer that the kernel changes, and what is in it before.
    pub fn output<T: Element>(self, elements: &[T]) -> Self {
        self.argument(Argument::Output(bytes_of(elements)))
    }

    /// A buffer, or a null pointer.
    pub fn optional<T: Element>(self, elements: Option<&[T]>) -> Self {
        match elements {
            Some(elements) => self.input(elements),
            None => self.argument(Argument::Null),
        }
    }

    /// The buffer of an earlier argument.
    pub fn same_as(self, argument: u32) -> Self {
        self.argument(Argument::SameAs(argument))
    }

    /// A structure of the pointers that the next `count` arguments are.
    pub fn pointers(self, count: usize) -> Self {
        self.argument(Argument::Pointers(count as u32))
    }

    /// What somebody else writes to the buffer of an earlier argument, from element `first` on, while the kernel waits, and after
    /// what was given to be written before.
    pub fn written_later<T: Element>(self, argument: u32, first: usize, elements: &[T]) -> Self {
        let (first, bytes) = ((first * T::BYTES) as u64, bytes_of(elements));
        self.argument(Argument::WrittenLater { argument, first, bytes })
    }

    /// How many arguments there are, those of a structure counted one by one: the index of the next.
    pub fn num_arguments(&self) -> u32 {
        self.arguments.len() as u32
    }

    /// Runs the kernel. An error says what the emulation or a sanitizer reported, or a GPU's driver.
    pub fn run(self, program: &Program) -> Result<Outputs> {
        let bytes = match program {
            Program::Emulated { path, .. } => self.emulate(path)?,
            Program::OnGpu(kernels) => kernels.run(&self).with_context(|| self.kernel.clone())?,
        };
        let output_bytes = self.arguments.iter().filter_map(|argument| match argument {
            Argument::Output(bytes) => Some(bytes.len()),
            _ => None,
        });
        let lengths: Vec<usize> = output_bytes.collect();
        ensure!(bytes.len() == lengths.iter().sum::<usize>(), "an answer of another length");
        Ok(Outputs { bytes, lengths: lengths.into_iter() })
    }

    fn emulate(&self, path: &Path) -> Result<Vec<u8>> {
        let mut request = Vec::new();
        (self.kernel.len() as u32).append(&mut request);
        request.extend(self.kernel.as_bytes());
        let block = [self.block, 1, 1];
        for number in self.grid.into_iter().chain(block).chain([self.dynamic_shared_bytes]) {
            u32::try_from(number)?.append(&mut request);
        }
        // As production launches it.
        u8::from(begins_early(&self.kernel)).append(&mut request);
        request.extend(self.seed.to_le_bytes());
        self.num_arguments().append(&mut request);
        self.arguments.iter().for_each(|argument| argument.append(&mut request));

        let mut child = Command::new(path)
            // What a process did not free is no fault of a kernel.
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        // It answers when it has read all. If it ended before, its status says more than what was not written.
        let written = child.stdin.take().expect("a pipe").write_all(&request);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let report = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {}\n{report}", self.kernel, output.status);
        }
        written?;
        Ok(output.stdout)
    }
}

/// The buffers that a kernel changed.
pub struct Outputs {
    bytes: Vec<u8>,
    lengths: std::vec::IntoIter<usize>,
}

impl Outputs {
    /// The next of them.
    pub fn take<T: Element>(&mut self) -> Vec<T> {
        let length = self.lengths.next().expect("a kernel gives no more buffers");
        self.bytes.drain(..length).as_slice().chunks_exact(T::BYTES).map(T::read).collect()
    }
}
