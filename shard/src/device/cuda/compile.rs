//! One kernel source becomes a cubin: NVRTC compiles it for the GPU at hand.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::fmt;
use std::ptr;

use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::libraries::{self, LibraryError, Version};

/// What a GPU can do, by its compute capability: 9.0 is Hopper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    major: u32,
    minor: u32,
}

impl Arch {
    /// Ampere: the first whose tensor cores multiply bf16.
    pub const OLDEST: Self = Self { major: 8, minor: 0 };

    /// Hopper: the only one whose warpgroups multiply with `wgmma`.
    pub const HOPPER: Self = Self { major: 9, minor: 0 };

    /// The architecture of a compute capability; `None` before [`Arch::OLDEST`].
    pub fn new(major: u32, minor: u32) -> Option<Self> {
        let arch = Self { major, minor };
        (arch >= Self::OLDEST && minor < 10).then_some(arch)
    }

    /// What NVRTC calls it. Where kernels use instructions that one generation alone has, the name ends with `a`: such
    /// code runs on this compute capability and no other.
    pub fn target(self) -> String {
        let accelerated = matches!((self.major, self.minor), (9 | 10, 0));
        format!("sm_{}{}", self.number(), if accelerated { "a" } else { "" })
    }

    /// As NVRTC counts: 90 for 9.0.
    fn number(self) -> u32 {
        self.major * 10 + self.minor
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A file of source code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file's name; a header's is what `#include` says.
    pub file: &'static str,
    /// What is in it.
    pub text: &'static str,
}

/// What NVRTC made.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Code that the driver loads.
    pub cubin: Vec<u8>,
    /// What the compiler and the assembler said; of each kernel, the registers that it uses and spills.
    pub log: String,
}

/// Why there are no kernels.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// There is no NVRTC.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// An NVRTC from before the GPU.
    #[error(
        "NVRTC {nvrtc} does not know the compute capability {arch} of this GPU (it knows {known:?}): install a newer NVRTC, \
         e.g. the PyPI wheel nvidia-cuda-nvrtc"
    )]
    UnknownArch {
        /// The GPU's.
        arch: Arch,
        /// NVRTC's version.
        nvrtc: Version,
        /// Those that it knows, 90 for 9.0.
        known: Vec<c_int>,
    },
    /// A source does not compile.
    #[error("{file} does not compile for {target} ({error}):\n{log}")]
    Failed {
        /// The file.
        file: &'static str,
        /// The architecture.
        target: String,
        /// NVRTC's name for what went wrong.
        error: String,
        /// The compiler's words.
        log: String,
    },
    /// Another call of NVRTC failed.
    #[error("{call} failed: {error}")]
    Nvrtc {
        /// The function.
        call: &'static str,
        /// NVRTC's name for what went wrong.
        error: String,
    },
}

/// A compiler for one architecture.
#[derive(Clone, Debug)]
pub struct Compiler {
    arch: Arch,
    version: Version,
}

impl Compiler {
    /// Asks whether NVRTC is there and knows the architecture.
    ///
    /// # Errors
    /// It is not, or does not.
    pub fn new(arch: Arch) -> Result<Self, CompileError> {
        let version = libraries::nvrtc()?;
        let known = known_archs()?;
        check_known(arch, version, known)?;
        Ok(Self { arch, version })
    }

    /// NVRTC's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What it compiles for.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The options that it compiles with.
    pub fn options(&self) -> Vec<String> {
        vec![
            format!("--gpu-architecture={}", self.arch.target()),
            "--std=c++17".into(),
            // A product and a sum are fused where the source says so and nowhere else: the same bits in every kernel.
            "--fmad=false".into(),
            // The log tells of each kernel what it uses and spills.
            "--ptxas-options=-v".into(),
        ]
    }

    /// Compiles a source that may include the headers. Threads may do so at once.
    ///
    /// # Errors
    /// It does not compile.
    pub fn compile(&self, source: Source, headers: &[Source]) -> Result<Compiled, CompileError> {
        let program = Program::new(source, headers)?;
        let result = program.compile(&self.options());
        let log = program.log();
        if let Err(NvrtcError(error)) = result {
            let (file, target) = (source.file, self.arch.target());
            return Err(CompileError::Failed { file, target, error: error_text(error), log });
        }
        Ok(Compiled { cubin: program.cubin()?, log })
    }
}

fn check_known(arch: Arch, nvrtc: Version, known: Vec<c_int>) -> Result<(), CompileError> {
    if known.iter().any(|&number| u32::try_from(number) == Ok(arch.number())) {
        return Ok(());
    }
    Err(CompileError::UnknownArch { arch, nvrtc, known })
}

fn known_archs() -> Result<Vec<c_int>, CompileError> {
    let mut count = 0;
    // SAFETY: `libraries::nvrtc` found the library; it writes one number.
    check("nvrtcGetNumSupportedArchs", unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) })?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: it writes as many numbers as it said.
    check("nvrtcGetSupportedArchs", unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) })?;
    Ok(known)
}

fn check(call: &'static str, result: nvrtcResult) -> Result<(), CompileError> {
    result.result().map_err(|NvrtcError(error)| CompileError::Nvrtc { call, error: error_text(error) })
}

fn error_text(error: nvrtcResult) -> String {
    // SAFETY: the text is NVRTC's own, and stays.
    unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(error)) }.to_string_lossy().into_owned()
}

/// A program of NVRTC's, until it is dropped.
struct Program(nvrtcProgram);

impl Program {
    fn new(source: Source, headers: &[Source]) -> Result<Self, CompileError> {
        let c_string = |text: &str| CString::new(text).expect("sources have no zero bytes");
        let (text, file) = (c_string(source.text), c_string(source.file));
        let texts: Vec<CString> = headers.iter().map(|header| c_string(header.text)).collect();
        let names: Vec<CString> = headers.iter().map(|header| c_string(header.file)).collect();
        let (texts, names) = (pointers(&texts), pointers(&names));
        let count = c_int::try_from(headers.len()).expect("few headers");
        let mut program = ptr::null_mut();
        // SAFETY: all texts end with a zero and live through the call, which copies them; there are `count` headers.
        let created = unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                file.as_ptr(),
                count,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        check("nvrtcCreateProgram", created)?;
        Ok(Self(program))
    }

    fn compile(&self, options: &[String]) -> Result<(), NvrtcError> {
        // SAFETY: the program lives as long as `self`, and no other thread has it.
        unsafe { cudarc::nvrtc::result::compile_program(self.0, options) }
    }

    /// Empty where NVRTC does not give it: an error that comes with it is worth more than the log.
    fn log(&self) -> String {
        // SAFETY: as in `compile`.
        let log = unsafe { cudarc::nvrtc::result::get_program_log(self.0) }.unwrap_or_default();
        // A character has a sign on some processors and none on others.
        let bytes: Vec<u8> = log.into_iter().flat_map(c_char::to_ne_bytes).collect();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim_end().to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, CompileError> {
        let mut len = 0;
        // SAFETY: as in `compile`; it writes one number.
        check("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(self.0, &mut len) })?;
        let mut cubin = vec![0_u8; len];
        // SAFETY: as in `compile`; it writes as many bytes as it said.
        check("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) })?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: as in `compile`, and it is not used again. Nothing can be done about an error.
        let _ = unsafe { cudarc::nvrtc::result::destroy_program(self.0) };
    }
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ptr()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_follow_compute_capabilities() {
        let target = |major, minor| Arch::new(major, minor).map(Arch::target);
        assert_eq!(target(8, 0).as_deref(), Some("sm_80"));
        assert_eq!(target(8, 9).as_deref(), Some("sm_89"));
        assert_eq!(target(9, 0).as_deref(), Some("sm_90a"));
        assert_eq!(target(10, 0).as_deref(), Some("sm_100a"));
        assert_eq!(target(10, 3).as_deref(), Some("sm_103"));
        assert_eq!(target(12, 0).as_deref(), Some("sm_120"));
        assert_eq!(target(7, 5), None);
        // Nothing has such a number, and it would be read as another one's.
        assert_eq!(target(9, 10), None);
        assert_eq!(Arch::new(12, 1).unwrap().to_string(), "12.1");
    }

    #[test]
    fn an_older_nvrtc_says_what_it_knows() {
        let nvrtc = Version { major: 12, minor: 0, patch: 0 };
        let hopper = Arch::new(9, 0).unwrap();
        check_known(hopper, nvrtc, vec![80, 89, 90]).unwrap();
        let error = check_known(Arch::new(10, 0).unwrap(), nvrtc, vec![80, 89, 90]).unwrap_err().to_string();
        assert!(error.contains("NVRTC 12.0 does not know the compute capability 10.0"), "{error}");
        assert!(error.contains("[80, 89, 90]"), "{error}");
    }

    #[test]
    fn an_error_names_the_file_and_has_the_log() {
        let error = CompileError::Failed {
            file: "gemv.cu",
            target: "sm_90a".into(),
            error: "NVRTC_ERROR_COMPILATION".into(),
            log: "gemv.cu(3): error: expected a \";\"".into(),
        };
        let text = error.to_string();
        assert!(text.starts_with("gemv.cu does not compile for sm_90a"), "{text}");
        assert!(text.ends_with("gemv.cu(3): error: expected a \";\""), "{text}");
    }
}
