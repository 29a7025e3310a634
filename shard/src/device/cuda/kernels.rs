//! The kernels, loaded, and how they are launched.

use std::{ffi::c_void, ptr, rc::Rc};

use super::attention::{Tile, WIDE, WINDOW};
use super::driver::{Address, Function, Gpu, Module};
use super::linear::GEMM_SHARED_BYTES;
use crate::device::{DeviceError, Result};

/// Widths of heads that attention is compiled for.
pub const HEAD_DIMS: [usize; 4] = [32, 64, 80, 128];

/// Most rows that have a kernel of their own to multiply with.
pub const MAX_GEMV_ROWS: usize = 8;

/// Rows of the tiles of products of many rows.
const GEMM_ROWS: [usize; 3] = [16, 64, 128];

/// The most ranks that the kernels for sums over ranks know of, as `types.cuh` has it.
pub const MAX_RANKS: usize = 8;

/// Kernels that may begin before the one before them has ended, by how their names begin: those of a decode step that follow another
/// kernel.
const EARLY: [&str; 10] = [
    "gemv_",
    "gated_gemv_",
    "residual_norm",
    "one_shot_",
    "rotary_append",
    "paged_attention_split_",
    "paged_attention_combine_",
    "gated_silu",
    "hash_finish",
    "merge_candidates",
];

/// Whether a kernel may begin before the one before it has ended: it waits for that itself, as `types.cuh` says.
pub fn begins_early(kernel: &str) -> bool {
    EARLY.iter().any(|beginning| kernel.starts_with(beginning))
}

/// All kernels.
pub struct Kernels {
    pub one_shot_sum: Function,
    pub one_shot_residual_norm: Function,
    pub one_shot_gather: Function,
    pub residual_norm: Function,
    pub norm_rows: Function,
    pub gated_silu: Function,
    pub gelu: Function,
    pub embedding: Function,
    pub insert_features: Function,
    pub gather_rows: Function,
    pub scatter_rows: Function,
    pub rotary_angles: Function,
    pub rotary_append: Function,
    pub vision_rotary: Function,
    pub copy_blocks: Function,
    pub patches: Function,
    pub hash_words: Function,
    pub hash_finish: Function,
    pub candidate_pieces: Function,
    pub merge_candidates: Function,
    pub feed_tokens: Function,
    pub select_pieces: Function,
    pub merge_lists: Function,
    /// For one row, two, ...
    pub gemv: Vec<Function>,
    /// The same, with results in f32.
    pub gemv_f32: Vec<Function>,
    /// Gate and up at once, and the activation.
    pub gated_gemv: Vec<Function>,
    /// For tiles of more and more rows.
    pub gemm: Vec<Function>,
    /// The same, with results in f32.
    pub gemm_f32: Vec<Function>,
    attention: Vec<AttentionKernels>,
    _modules: Vec<Module>,
}

/// Attention for heads of one width.
pub struct AttentionKernels {
    pub whole: Function,
    pub split: Function,
    pub combine: Function,
    pub vision: Function,
    /// Where the GPU is a Hopper.
    pub wide: Option<WideAttention>,
}

/// Attention by warpgroups, for heads of one width.
pub struct WideAttention {
    pub paged: Function,
    pub vision: Function,
    /// For windows of few tokens.
    pub window: Function,
}

impl Kernels {
    /// Loads cubins, each with its module's name.
    ///
    /// # Errors
    /// A cubin is not for this GPU, or a kernel is missing.
    pub fn load(gpu: &Rc<Gpu>, cubins: &[(&str, &[u8])]) -> Result<Self> {
        let modules = cubins
            .iter()
            .map(|(name, cubin)| Ok((*name, Module::load(gpu, name, cubin)?)))
            .collect::<Result<Vec<_>>>()?;
        let module = |module_name: &str| {
            modules.iter().find(|(name, _)| *name == module_name).map(|(_, module)| module)
        };
        let function = |module_name: &str, kernel: &str| {
            let module = module(module_name)
                .ok_or_else(|| DeviceError::Failed(format!("there are no kernels {module_name}")))?;
            module.function(kernel, if module_name == "gemm" { GEMM_SHARED_BYTES } else { 0 })
        };
        let of_rows = |prefix: &str| -> Result<Vec<Function>> {
            (1..=MAX_GEMV_ROWS).map(|rows| function("gemv", &format!("{prefix}{rows}"))).collect()
        };
        let gemm = |rows: usize, suffix: &str| function("gemm", &format!("gemm_{rows}{suffix}"));
        let wide_attention = |module: &Module, dim: usize| {
            let function = |kernel: &str, tile: Tile| {
                module.function(&format!("sm90_{kernel}_attention_{dim}"), tile.shared_bytes(dim))
            };
            Ok::<_, DeviceError>(WideAttention {
                paged: function("paged", WIDE)?,
                vision: function("vision", WIDE)?,
                window: function("window", WINDOW)?,
            })
        };
        let attention = |dim: usize| {
            let function = |kernel: &str| function("attention", &format!("{kernel}_{dim}"));
            Ok(AttentionKernels {
                whole: function("paged_attention")?,
                split: function("paged_attention_split")?,
                combine: function("paged_attention_combine")?,
                vision: function("vision_attention")?,
                wide: module("attention_sm90").map(|module| wide_attention(module, dim)).transpose()?,
            })
        };
        Ok(Self {
            one_shot_sum: function("reduce", "one_shot_sum")?,
            one_shot_residual_norm: function("reduce", "one_shot_residual_norm")?,
            one_shot_gather: function("reduce", "one_shot_gather")?,
            residual_norm: function("rowwise", "residual_norm")?,
            norm_rows: function("rowwise", "norm_rows")?,
            gated_silu: function("rowwise", "gated_silu")?,
            gelu: function("rowwise", "gelu")?,
            embedding: function("rowwise", "embedding")?,
            insert_features: function("rowwise", "insert_features")?,
            gather_rows: function("rowwise", "gather_rows")?,
            scatter_rows: function("rowwise", "scatter_rows")?,
            rotary_angles: function("rotary", "rotary_angles")?,
            rotary_append: function("rotary", "rotary_append")?,
            vision_rotary: function("rotary", "vision_rotary")?,
            copy_blocks: function("rotary", "copy_blocks")?,
            patches: function("patches", "patches")?,
            hash_words: function("hash", "hash_words")?,
            hash_finish: function("hash", "hash_finish")?,
            candidate_pieces: function("sampling", "candidate_pieces")?,
            merge_candidates: function("sampling", "merge_candidates")?,
            feed_tokens: function("sampling", "feed_tokens")?,
            select_pieces: function("selection", "select_pieces")?,
            merge_lists: function("selection", "merge_lists")?,
            gemv: of_rows("gemv_")?,
            gemv_f32: of_rows("gemv_f32_")?,
            gated_gemv: of_rows("gated_gemv_")?,
            gemm: GEMM_ROWS.into_iter().map(|rows| gemm(rows, "")).collect::<Result<_>>()?,
            gemm_f32: GEMM_ROWS.into_iter().map(|rows| gemm(rows, "_f32")).collect::<Result<_>>()?,
            attention: HEAD_DIMS.into_iter().map(attention).collect::<Result<_>>()?,
            _modules: modules.into_iter().map(|(_, module)| module).collect(),
        })
    }

    /// Attention for heads of `head_dim`.
    ///
    /// # Errors
    /// It is not compiled for these.
    pub fn attention(&self, head_dim: usize) -> Result<&AttentionKernels> {
        let index = HEAD_DIMS.iter().position(|&dim| dim == head_dim).ok_or_else(|| {
            DeviceError::Failed(format!(
                "heads of {head_dim} columns: on CUDA they have one of {HEAD_DIMS:?}"
            ))
        })?;
        Ok(&self.attention[index])
    }
}

/// Launches a kernel: its function, grid, threads of a block, dynamic shared memory if there is any, and arguments.
macro_rules! launch {
    ($device:expr, $function:expr, $grid:expr, $block:expr, $($argument:expr),* $(,)?) => {
        launch!($device, $function, $grid, $block; 0, $($argument),*)
    };
    ($device:expr, $function:expr, $grid:expr, $block:expr; $shared:expr, $($argument:expr),* $(,)?) => {{
        $device.progress.pieces_of(0).count();
        // SAFETY: the arguments are those of the kernel, as its source lists them, with addresses of tensors and buffers that
        // are alive and as large as it says.
        unsafe { $device.gpu.launch($function, $grid, $block, $shared, &mut [$(Argument::place(&$argument)),*]) }
    }};
}
pub(super) use launch;

/// An argument of a kernel, of a type that is the same to the kernel: it is passed by value, whatever its size.
pub trait Argument {
    /// Where the value is, which the driver only reads.
    fn place(&self) -> *mut c_void
    where
        Self: Sized,
    {
        ptr::from_ref(self).cast_mut().cast()
    }
}

impl Argument for u64 {}
impl Argument for u32 {}
impl Argument for f32 {}

/// An address for each rank, 0 for those that there are not: `PerRank` of `types.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct PerRank(pub [Address; MAX_RANKS]);

impl Argument for PerRank {}

/// A number that a kernel takes in 32 bits.
///
/// # Panics
/// It is larger: a fault of this crate, whose sizes are bounded when a model is loaded.
pub fn count(number: usize) -> u32 {
    u32::try_from(number).expect("a kernel's number has 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::modules::{HOPPER_SOURCES, SOURCES};

    /// The names of kernels and their parameters. In a macro a name may have `##` in it.
    fn kernels() -> Vec<(String, Vec<String>)> {
        let sources = SOURCES.iter().chain(HOPPER_SOURCES);
        let texts = sources.flat_map(|source| source.text.split("extern \"C\" __global__").skip(1));
        let kernel = |text: &str| {
            let text = text.replace("\\\n", " ");
            let declared = match text.split_once("__launch_bounds__(") {
                Some((before, after)) if before.trim() == "void" => {
                    after.split_once(')').expect("bounds end").1
                }
                _ => text.trim_start().strip_prefix("void").expect("a kernel returns nothing"),
            };
            let (name, rest) = declared.split_once('(').expect("a kernel has parameters");
            let parameters = rest.split_once(')').expect("parameters end").0.split(',');
            (name.trim().to_owned(), parameters.map(|parameter| parameter.trim().to_owned()).collect())
        };
        texts.map(kernel).collect()
    }

    /// The compiler may read what never changes before the kernel waits: it was seen to do so.
    #[test]
    fn what_kernels_read_that_begin_early_is_not_said_to_be_constant() {
        let early: Vec<_> = kernels().into_iter().filter(|(name, _)| begins_early(name)).collect();
        for beginning in EARLY {
            assert!(early.iter().any(|(name, _)| name.starts_with(beginning)), "no kernel {beginning}");
        }
        for (name, parameters) in early {
            let is_constant =
                |parameter: &&String| parameter.contains("__restrict__") && !parameter.ends_with(" weight");
            assert_eq!(parameters.iter().find(is_constant), None, "{name}");
        }
    }
}
