//! Why a GPU cannot be used, in words that say what is missing and what to do about it.

use super::compile::Arch;
use super::libraries::{OLDEST_DRIVER, OLDEST_NCCL, OLDEST_NVRTC, Version};

/// Why a GPU cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// No library of the driver.
    #[error(
        "libcuda.so.1 (the NVIDIA driver) was not found: install the driver on the host, and start a container with its \
         GPUs (docker run --gpus all, or the nvidia runtime class){reason}"
    )]
    NoDriver {
        /// In brackets, the loader's words about a file that is there; empty where there is none.
        reason: String,
    },
    /// A driver before [`OLDEST_DRIVER`].
    #[error(
        "the NVIDIA driver is of CUDA {found}, and {OLDEST_DRIVER} or later is needed: install a newer driver"
    )]
    OldDriver {
        /// The newest CUDA that it knows.
        found: Version,
    },
    /// A call of the driver failed.
    #[error("{call} failed: {name} ({text})")]
    Driver {
        /// The function.
        call: &'static str,
        /// The error's name.
        name: String,
        /// What the driver says of it.
        text: String,
    },
    /// The driver works and sees no GPU.
    #[error(
        "the NVIDIA driver sees no GPU: give the container or the process one (docker run --gpus all, CUDA_VISIBLE_DEVICES)"
    )]
    NoGpu,
    /// An ordinal past the last GPU.
    #[error(
        "there is no GPU {ordinal}: this process sees {count} of them, counted from 0 (CUDA_VISIBLE_DEVICES)"
    )]
    NoSuchGpu {
        /// The ordinal that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// A GPU before [`Arch::OLDEST`].
    #[error(
        "GPU {ordinal}, {name}, has compute capability {major}.{minor}, and {} or later (Ampere) is needed: earlier \
         ones do not multiply bf16",
        Arch::OLDEST
    )]
    OldGpu {
        /// Its ordinal.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Compute capability before the dot.
        major: u32,
        /// Compute capability after the dot.
        minor: u32,
    },
    /// No library of NVRTC.
    #[error(
        "libnvrtc was not found: install CUDA's NVRTC, e.g. the PyPI wheel nvidia-cuda-nvrtc, and put its folder into \
         LD_LIBRARY_PATH{reason}"
    )]
    NoNvrtc {
        /// In brackets, the loader's words about a file that is there; empty where there is none.
        reason: String,
    },
    /// An NVRTC before [`OLDEST_NVRTC`].
    #[error(
        "NVRTC is {found}, and {OLDEST_NVRTC} or later is needed: install a newer one, e.g. the PyPI wheel \
         nvidia-cuda-nvrtc, and put its folder first into LD_LIBRARY_PATH"
    )]
    OldNvrtc {
        /// Its version.
        found: Version,
    },
    /// NVRTC does not say its version.
    #[error("nvrtcVersion failed: {0}")]
    Nvrtc(String),
    /// Code of a later major version than the driver's is not loaded.
    #[error(
        "NVRTC {nvrtc} makes code that this NVIDIA driver, of CUDA {driver}, does not load: install a driver of CUDA {} or \
         later, or NVRTC {} (PyPI has 12 as nvidia-cuda-nvrtc-cu12, later ones as nvidia-cuda-nvrtc)",
        nvrtc.major, driver.major
    )]
    NvrtcTooNew {
        /// NVRTC's version.
        nvrtc: Version,
        /// The newest CUDA that the driver knows.
        driver: Version,
    },
    /// No library of NCCL, which several GPUs need.
    #[error(
        "libnccl was not found, which the {world_size} GPUs of a group need: install NCCL, e.g. the PyPI wheel \
         nvidia-nccl-cu13, and put its folder into LD_LIBRARY_PATH, with a link libnccl.so to its libnccl.so.2{reason}"
    )]
    NoNccl {
        /// GPUs of the group.
        world_size: usize,
        /// In brackets, the loader's words about a file that is there; empty where there is none.
        reason: String,
    },
    /// NCCL is there under a name that is not looked for, as PyPI's wheel has it.
    #[error(
        "libnccl.so was not found, which the {world_size} GPUs of a group need, but libnccl.so.2 was, the only name in \
         PyPI's wheel: make a link to it, `ln -s libnccl.so.2 libnccl.so`, in its folder or in another one of LD_LIBRARY_PATH"
    )]
    NcclUnderOtherName {
        /// GPUs of the group.
        world_size: usize,
    },
    /// An NCCL before [`OLDEST_NCCL`].
    #[error("NCCL is {found}, and {OLDEST_NCCL} or later is needed: install a newer one")]
    OldNccl {
        /// Its version.
        found: Version,
    },
    /// NCCL does not say its version.
    #[error("ncclGetVersion failed: {0}")]
    Nccl(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(error: LibraryError, words: &[&str]) {
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }

    #[test]
    fn what_is_missing_is_told_and_what_to_do() {
        let reason = || " (libsome.so: invalid ELF header)".to_owned();
        let why = "LD_LIBRARY_PATH (libsome.so: invalid ELF header)";
        says(
            LibraryError::NoDriver { reason: String::new() },
            &["libcuda.so.1 (the NVIDIA driver) was not found: "],
        );
        says(
            LibraryError::NoNvrtc { reason: reason() },
            &["libnvrtc was not found: ", "nvidia-cuda-nvrtc", why],
        );
        says(
            LibraryError::NoNccl { world_size: 2, reason: String::new() },
            &["the 2 GPUs", "nvidia-nccl-cu13"],
        );
        says(
            LibraryError::NcclUnderOtherName { world_size: 8 },
            &["libnccl.so.2", "ln -s libnccl.so.2 libnccl.so"],
        );
        says(LibraryError::NoSuchGpu { ordinal: 4, count: 2 }, &["no GPU 4", "sees 2 of them"]);
        let (call, name, text) =
            ("cuInit", "CUDA_ERROR_STUB_LIBRARY".into(), "CUDA driver is a stub library".into());
        says(
            LibraryError::Driver { call, name, text },
            &["cuInit failed: CUDA_ERROR_STUB_LIBRARY (CUDA driver is a stub library)"],
        );
    }

    #[test]
    fn what_is_too_old_is_told_by_name() {
        let found = Version { major: 11, minor: 8, patch: 0 };
        says(LibraryError::OldDriver { found }, &["CUDA 11.8, and 12.0 or later"]);
        says(LibraryError::OldNvrtc { found }, &["NVRTC is 11.8, and 12.0 or later"]);
        says(
            LibraryError::OldNccl { found: Version { major: 2, ..found } },
            &["NCCL is 2.8, and 2.14 or later"],
        );
        says(
            LibraryError::OldGpu { ordinal: 0, name: "Tesla T4".into(), major: 7, minor: 5 },
            &["GPU 0, Tesla T4, has compute capability 7.5, and 8.0 or later"],
        );
    }
}
