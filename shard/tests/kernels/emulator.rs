//! Compiles the emulation around a source of kernels, and runs kernels of it, each in a process of its own.
//! `tests/emulation/emulate.cpp` describes the form of a request.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context, Result, bail, ensure};
use half::bf16;
use tempfile::TempDir;

/// A source file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Rowwise,
    Rotary,
    Gemv,
    Attention,
    Patches,
    /// Not kernels that anything uses: what the emulation itself is tested with.
    Probes,
}

const NUM_SOURCES: usize = 6;

impl Source {
    fn name(self) -> &'static str {
        match self {
            Source::Rowwise => "rowwise",
            Source::Rotary => "rotary",
            Source::Gemv => "gemv",
            Source::Attention => "attention",
            Source::Patches => "patches",
            Source::Probes => "probes",
        }
    }
}

/// A compiled source.
pub struct Program {
    path: PathBuf,
    /// Where a changed source and its program are, until they are dropped.
    _folder: Option<TempDir>,
}

impl Program {
    /// The source as it is, compiled once for all tests of the process.
    pub fn of(source: Source) -> &'static Program {
        static PROGRAMS: [OnceLock<Program>; NUM_SOURCES] = [const { OnceLock::new() }; NUM_SOURCES];
        PROGRAMS[source as usize].get_or_init(|| {
            let folder = temporary_folder().expect("the build has a folder for temporary files");
            let compiled = compile(source, &kernels_folder(), folder.path()).expect("the kernels compile");
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulate-{}", source.name()));
            fs::rename(compiled, &path).expect("the program moves");
            Program { path, _folder: None }
        })
    }

    /// A copy of the source in which `from`, which is in `file` once, is replaced.
    pub fn changed(source: Source, file: &str, from: &str, to: &str) -> Result<Program> {
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
        let path = compile(source, folder.path(), folder.path())?;
        Ok(Program { path, _folder: Some(folder) })
    }
}

fn temporary_folder() -> Result<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

fn kernels_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/cuda/kernels")
}

fn compile(source: Source, kernels: &Path, to: &Path) -> Result<PathBuf> {
    let emulation = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulation");
    let program = to.join("program");
    let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing"])
        .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"])
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
element!(f32);
element!(bf16);

fn bytes_of<T: Element>(elements: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements.len() * T::BYTES);
    elements.iter().for_each(|element| element.append(&mut bytes));
    bytes
}

/// A kernel, its grid, and its arguments in their order.
pub struct Launch {
    kernel: String,
    grid: [usize; 3],
    block: usize,
    dynamic_shared_bytes: usize,
    seed: u64,
    num_arguments: u32,
    arguments: Vec<u8>,
    output_bytes: Vec<usize>,
}

impl Launch {
    /// A launch without arguments. `seed` is that of the order of threads and blocks.
    pub fn new(kernel: impl Into<String>, grid: [usize; 3], block: usize, seed: u64) -> Self {
        Self {
            kernel: kernel.into(),
            grid,
            block,
            dynamic_shared_bytes: 0,
            seed,
            num_arguments: 0,
            arguments: Vec::new(),
            output_bytes: Vec::new(),
        }
    }

    /// With so much shared memory beside what the kernel declares.
    pub fn dynamic_shared_bytes(mut self, bytes: usize) -> Self {
        self.dynamic_shared_bytes = bytes;
        self
    }

    fn argument(mut self, kind: u8, bytes: &[u8]) -> Self {
        self.num_arguments += 1;
        self.arguments.push(kind);
        self.arguments.extend(bytes);
        self
    }

    fn buffer(self, kind: u8, bytes: &[u8]) -> Self {
        let mut launch = self.argument(kind, &(bytes.len() as u64).to_le_bytes());
        launch.arguments.extend(bytes);
        launch
    }

    /// A number.
    pub fn u32(self, value: usize) -> Self {
        let value = u32::try_from(value).expect("a number of 32 bits");
        self.argument(0, &value.to_le_bytes())
    }

    /// A number.
    pub fn u64(self, value: usize) -> Self {
        self.argument(1, &(value as u64).to_le_bytes())
    }

    /// A number.
    pub fn f32(self, value: f32) -> Self {
        self.argument(0, &value.to_le_bytes())
    }

    /// A buffer that the kernel may not change.
    pub fn input<T: Element>(self, elements: &[T]) -> Self {
        self.buffer(2, &bytes_of(elements))
    }

    /// A buffer that the kernel changes, and what is in it before.
    pub fn output<T: Element>(mut self, elements: &[T]) -> Self {
        let bytes = bytes_of(elements);
        self.output_bytes.push(bytes.len());
        self.buffer(3, &bytes)
    }

    /// A buffer, or a null pointer.
    pub fn optional<T: Element>(self, elements: Option<&[T]>) -> Self {
        match elements {
            Some(elements) => self.input(elements),
            None => self.argument(4, &[]),
        }
    }

    /// The buffer of an earlier argument.
    pub fn same_as(self, argument: u32) -> Self {
        self.argument(5, &argument.to_le_bytes())
    }

    /// Runs the kernel. An error says what the emulation or a sanitizer reported.
    pub fn run(self, program: &Program) -> Result<Outputs> {
        let mut request = Vec::new();
        (self.kernel.len() as u32).append(&mut request);
        request.extend(self.kernel.as_bytes());
        let block = [self.block, 1, 1];
        for number in self.grid.into_iter().chain(block).chain([self.dynamic_shared_bytes]) {
            u32::try_from(number)?.append(&mut request);
        }
        request.extend(self.seed.to_le_bytes());
        self.num_arguments.append(&mut request);
        request.extend(&self.arguments);

        let mut child = Command::new(&program.path)
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
        ensure!(
            output.stdout.len() == self.output_bytes.iter().sum::<usize>(),
            "an answer of another length"
        );
        Ok(Outputs { bytes: output.stdout, lengths: self.output_bytes.into_iter() })
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
