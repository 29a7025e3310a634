//! Which of CUDA's libraries are on this machine, and whether the GPU is one that the kernels run on.
//!
//! The binary links none of them: it starts where there are none. cudarc loads each at its first call, and panics where
//! it cannot; so whoever is about to call one asks here first, and gets an error that says what to install.
#![allow(unsafe_code)]

use std::error::Error;
use std::ffi::{CStr, c_int};
use std::fmt;

use cudarc::driver::result::{DriverError, device};
use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use cudarc::{cublaslt, driver, nccl, nvrtc};

use super::compile::Arch;
pub use super::library_error::LibraryError;

/// The oldest driver: the first that loads code for the compute capability 9.0 with its own instructions, which NVRTC 12
/// was the first to make. The calls that Lockstep makes are no younger.
pub const OLDEST_DRIVER: Version = Version { major: 12, minor: 0, patch: 0 };

/// The oldest NVRTC, for the same reason.
pub const OLDEST_NVRTC: Version = OLDEST_DRIVER;

/// The oldest NCCL: the first that makes and ends a communicator without blocking, so that ranks can give up on one that
/// does not come.
pub const OLDEST_NCCL: Version = Version { major: 2, minor: 14, patch: 0 };

/// The version of a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number. Code is compatible within it.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third; 0 where the library does not tell it.
    pub patch: u32,
}

impl Version {
    /// From one number, as CUDA's driver tells it: 12040 is 12.4.
    fn of_driver(number: c_int) -> Self {
        let number = number.unsigned_abs();
        Self { major: number / 1000, minor: number % 1000 / 10, patch: 0 }
    }

    /// From one number, as cuBLASLt and NCCL (from 2.9 on) tell it: 22803 is 2.28.3.
    fn of_library(number: usize) -> Self {
        let number = u32::try_from(number).unwrap_or(0);
        Self { major: number / 10_000, minor: number % 10_000 / 100, patch: number % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.patch > 0 { write!(f, ".{}", self.patch) } else { Ok(()) }
    }
}

/// What a rank is going to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The GPU, counted as the driver counts those that the process may see.
    pub ordinal: usize,
    /// GPUs in the group.
    pub world_size: usize,
}

/// A GPU that the kernels run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its ordinal.
    pub ordinal: usize,
    /// What its maker calls it.
    pub name: String,
    /// What to compile for.
    pub arch: Arch,
}

/// What there is. Its `Display` is a line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Libraries {
    /// The newest CUDA that the driver knows.
    pub driver: Version,
    /// NVRTC, which compiles the kernels.
    pub nvrtc: Version,
    /// cuBLASLt, which multiplies large matrices where it is there; Lockstep's own kernels serve where it is not.
    pub cublas_lt: Option<Version>,
    /// NCCL; not asked for where a group has one GPU.
    pub nccl: Option<Version>,
    /// GPUs that this process sees.
    pub num_gpus: usize,
    /// The one that was asked for.
    pub gpu: Gpu,
}

impl Libraries {
    /// Looks for what is wanted.
    ///
    /// # Errors
    /// Something that is needed is not there, or too old; the first such thing is named.
    pub fn find(wanted: Wanted) -> Result<Self, LibraryError> {
        let driver = driver()?;
        let (gpu, num_gpus) = gpu(wanted.ordinal)?;
        let nvrtc = nvrtc()?;
        check_loads(nvrtc, driver)?;
        let nccl = if wanted.world_size > 1 { Some(nccl(wanted.world_size)?) } else { None };
        Ok(Self { driver, nvrtc, cublas_lt: cublas_lt(), nccl, num_gpus, gpu })
    }
}

impl fmt::Display for Libraries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpu, num_gpus, driver, nvrtc, .. } = self;
        write!(f, "GPU {} of {num_gpus}, {}, compute capability {}", gpu.ordinal, gpu.name, gpu.arch)?;
        write!(f, "; driver of CUDA {driver}, NVRTC {nvrtc}, ")?;
        match self.cublas_lt {
            Some(version) => write!(f, "cuBLASLt {version}")?,
            None => f.write_str("no cuBLASLt (libcublasLt was not found: Lockstep's own kernels serve)")?,
        }
        self.nccl.map_or(Ok(()), |version| write!(f, ", NCCL {version}"))
    }
}

/// The newest CUDA that the driver knows; it is initialised then.
///
/// # Errors
/// There is no driver, it is too old, or it does not work.
pub fn driver() -> Result<Version, LibraryError> {
    // SAFETY: loads a library of NVIDIA's, which asks nothing of whoever loads it.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(LibraryError::NoDriver { reason: why_not_loaded(&candidates("cuda")) });
    }
    let mut number = 0;
    // SAFETY: the library is there, and writes one number.
    let asked = unsafe { driver::sys::cuDriverGetVersion(&mut number) };
    asked.result().map_err(|error| driver_error("cuDriverGetVersion", error))?;
    let found = Version::of_driver(number);
    if found < OLDEST_DRIVER {
        return Err(LibraryError::OldDriver { found });
    }
    match driver::result::init() {
        Ok(()) => Ok(found),
        Err(DriverError(driver::sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Err(LibraryError::NoGpu),
        Err(error) => Err(driver_error("cuInit", error)),
    }
}

/// The GPU `ordinal`, and how many there are. [`driver`] comes first.
///
/// # Errors
/// There is no such GPU, or it is too old.
pub fn gpu(ordinal: usize) -> Result<(Gpu, usize), LibraryError> {
    let count = device::get_count().map_err(|error| driver_error("cuDeviceGetCount", error))?;
    let count = usize::try_from(count).unwrap_or(0);
    let in_range = c_int::try_from(ordinal).ok().filter(|_| ordinal < count);
    let Some(index) = in_range else {
        return Err(if count == 0 {
            LibraryError::NoGpu
        } else {
            LibraryError::NoSuchGpu { ordinal, count }
        });
    };
    let gpu = device::get(index).map_err(|error| driver_error("cuDeviceGet", error))?;
    let name = device::get_name(gpu).map_err(|error| driver_error("cuDeviceGetName", error))?;
    let attribute = |which| {
        // SAFETY: `gpu` is the driver's own.
        let value = unsafe { device::get_attribute(gpu, which) };
        let value = value.map_err(|error| driver_error("cuDeviceGetAttribute", error))?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    match Arch::new(major, minor) {
        Some(arch) => Ok((Gpu { ordinal, name, arch }, count)),
        None => Err(LibraryError::OldGpu { ordinal, name, major, minor }),
    }
}

/// NVRTC's version.
///
/// # Errors
/// It is not there, or too old.
pub fn nvrtc() -> Result<Version, LibraryError> {
    // SAFETY: as for the driver.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(LibraryError::NoNvrtc { reason: why_not_loaded(&candidates("nvrtc")) });
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and writes two numbers.
    let asked = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    asked.result().map_err(|error| LibraryError::Nvrtc(error.to_string()))?;
    let found = Version { major: major.unsigned_abs(), minor: minor.unsigned_abs(), patch: 0 };
    if found < OLDEST_NVRTC { Err(LibraryError::OldNvrtc { found }) } else { Ok(found) }
}

/// cuBLASLt's version; `None` where it is not there.
pub fn cublas_lt() -> Option<Version> {
    // SAFETY: as for the driver; the version is asked for only where the library is there.
    unsafe {
        cublaslt::sys::is_culib_present().then(|| Version::of_library(cublaslt::sys::cublasLtGetVersion()))
    }
}

/// NCCL's version, for a group of `world_size`.
///
/// # Errors
/// It is not there, or too old.
pub fn nccl(world_size: usize) -> Result<Version, LibraryError> {
    // SAFETY: as for the driver.
    if !unsafe { nccl::sys::is_culib_present() } {
        return Err(match open("libnccl.so.2") {
            Ok(()) => LibraryError::NcclUnderOtherName { world_size },
            Err(_) => LibraryError::NoNccl { world_size, reason: why_not_loaded(&candidates("nccl")) },
        });
    }
    let mut number = 0;
    // SAFETY: the library is there, and writes one number.
    let asked = unsafe { nccl::sys::ncclGetVersion(&mut number) };
    asked.result().map_err(|error| LibraryError::Nccl(format!("{:?}", error.0)))?;
    let found = Version::of_library(number.unsigned_abs() as usize);
    if found < OLDEST_NCCL { Err(LibraryError::OldNccl { found }) } else { Ok(found) }
}

/// Cubins are loaded by every driver of their major version of CUDA, and by later ones.
fn check_loads(nvrtc: Version, driver: Version) -> Result<(), LibraryError> {
    if nvrtc.major > driver.major { Err(LibraryError::NvrtcTooNew { nvrtc, driver }) } else { Ok(()) }
}

fn driver_error(call: &'static str, error: DriverError) -> LibraryError {
    let said = |text: Result<&CStr, DriverError>| match text {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    };
    LibraryError::Driver { call, name: said(error.error_name()), text: said(error.error_string()) }
}

/// The loader's words about a library that is there and lacks something itself, where there is such a one.
fn why_not_loaded(files: &[String]) -> String {
    let reasons = files.iter().filter_map(|file| open(file).err());
    let mut of_files = reasons.filter(|reason| !reason.contains("No such file or directory"));
    of_files.next().map_or_else(String::new, |reason| format!(" ({reason})"))
}

/// The names under which cudarc looks for a library.
fn candidates(library: &str) -> Vec<String> {
    cudarc::get_lib_name_candidates(library)
}

fn open(name: &str) -> Result<(), String> {
    // SAFETY: as for the driver; nothing of it is used.
    match unsafe { libloading::Library::new(name) } {
        Ok(_) => Ok(()),
        Err(error) => Err(error.source().map_or_else(|| error.to_string(), ToString::to_string)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V13: Version = Version { major: 13, minor: 0, patch: 0 };

    #[test]
    fn versions_are_read_from_their_numbers() {
        assert_eq!(Version::of_driver(12040).to_string(), "12.4");
        assert_eq!(Version::of_driver(13000), V13);
        assert_eq!(Version::of_library(22803).to_string(), "2.28.3");
        assert_eq!(Version::of_library(130_002).to_string(), "13.0.2");
        // NCCL before 2.9 counted otherwise, and is refused either way.
        assert!(Version::of_library(2708) < OLDEST_NCCL);
        assert!(Version::of_driver(11080) < OLDEST_DRIVER && OLDEST_DRIVER <= Version::of_driver(12000));
    }

    #[test]
    fn code_of_a_later_major_version_is_refused() {
        check_loads(V13, Version { minor: 2, ..V13 }).unwrap();
        check_loads(Version { minor: 2, ..V13 }, V13).unwrap();
        check_loads(Version { major: 12, ..V13 }, V13).unwrap();
        let error = check_loads(V13, Version { major: 12, minor: 4, patch: 0 }).unwrap_err().to_string();
        assert!(error.contains("NVRTC 13.0") && error.contains("CUDA 12.4"), "{error}");
        assert!(error.contains("nvidia-cuda-nvrtc-cu12"), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_loaded_is_told_from_one_that_is_not_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let missing = "libno_such_library.so".to_owned();
        assert_eq!(why_not_loaded(std::slice::from_ref(&missing)), "");
        let reason = why_not_loaded(&[missing, file.path().to_str().unwrap().to_owned()]);
        assert!(reason.starts_with(" (/") && reason.ends_with(')'), "{reason}");
        assert!(candidates("nvrtc").contains(&"libnvrtc.so.13".to_owned()));
        assert!(
            !candidates("nccl").contains(&"libnccl.so.2".to_owned()),
            "the advice to make a link is out of date"
        );
    }

    #[test]
    fn looking_for_libraries_never_panics() {
        // SAFETY: as for the driver.
        let has_driver = unsafe { driver::sys::is_culib_present() };
        let error = Libraries::find(Wanted { ordinal: usize::MAX, world_size: 2 }).unwrap_err();
        assert_eq!(!has_driver, matches!(error, LibraryError::NoDriver { .. }), "{error}");
        let _ = (nvrtc(), cublas_lt(), nccl(2));
    }

    #[test]
    fn the_line_for_the_log_tells_all_versions() {
        let gpu = Gpu { ordinal: 1, name: "NVIDIA H100".into(), arch: Arch::new(9, 0).unwrap() };
        let mut found =
            Libraries { driver: V13, nvrtc: V13, cublas_lt: None, nccl: Some(OLDEST_NCCL), num_gpus: 2, gpu };
        let text = found.to_string();
        assert!(
            text.starts_with("GPU 1 of 2, NVIDIA H100, compute capability 9.0; driver of CUDA 13.0"),
            "{text}"
        );
        assert!(text.contains("no cuBLASLt") && text.ends_with("NCCL 2.14"), "{text}");
        found.cublas_lt = Some(Version::of_library(130_100));
        assert!(found.to_string().contains("cuBLASLt 13.1"));
    }
}
