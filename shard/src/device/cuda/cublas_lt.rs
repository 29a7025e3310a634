//! Products of many rows with a matrix of weights, by cuBLASLt.
#![allow(unsafe_code)]

use std::{cell::RefCell, ffi::c_void, ptr, rc::Rc};

use cudarc::cublaslt::{
    result::{self, CublasError},
    sys,
};

use super::driver::{Address, DeviceBuffer, Gpu};
use super::recent::Recent;
use crate::device::{DType, DeviceError, Result};

/// Memory that a product may work in. The library's own advice for GPUs from compute capability 9.0 on.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// Shapes whose algorithms are kept. A model has six matrices of different shapes, and steps have many numbers of rows.
const MAX_PLANS: usize = 1024;

/// `CUBLAS_OP_T`, which the bindings to this library lack.
const TRANSPOSED: i32 = 1;

/// The library, opened.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer,
    plans: RefCell<Recent<Shape, Plan>>,
    gpu: Rc<Gpu>,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    dtype: DType,
    has_bias: bool,
}

/// One product, `y = x W^T + bias`: `x` is `[rows, inputs]`, `weight` `[outputs, inputs]`, both of bf16 as the bias is, `y`
/// `[rows, outputs]` of `dtype`.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub x: Address,
    pub weight: Address,
    pub bias: Option<Address>,
    pub y: Address,
    pub rows: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub dtype: DType,
}

fn failed(what: &'static str) -> impl Fn(CublasError) -> DeviceError {
    move |error| DeviceError::Failed(format!("cuBLASLt: {what}: {:?}", error.0))
}

impl CublasLt {
    /// Opens the library, which was found to be there.
    ///
    /// # Errors
    /// It does not open, or the GPU has no memory for it.
    pub fn new(gpu: &Rc<Gpu>) -> Result<Self> {
        let workspace = DeviceBuffer::new(gpu, WORKSPACE_BYTES, "cuBLASLt")?;
        let handle = result::create_handle().map_err(failed("it does not open"))?;
        Ok(Self { handle, workspace, plans: RefCell::new(Recent::new(MAX_PLANS)), gpu: gpu.clone() })
    }

    /// Multiplies, in the stream's order.
    ///
    /// # Errors
    /// The library has no algorithm, or refuses.
    pub fn multiply(&self, product: &Product) -> Result<()> {
        let Product { rows, inputs, outputs, dtype, bias, .. } = *product;
        let shape = Shape { rows, inputs, outputs, dtype, has_bias: bias.is_some() };
        let mut plans = self.plans.borrow_mut();
        // What a step before it used is still there when a step is kept as a graph, in which none may be made.
        if plans.get(&shape).is_none() {
            plans.insert(shape, Plan::new(self.handle, &shape, bias)?);
        }
        let plan = plans.get(&shape).expect("it is there now");
        if let Some(bias) = bias {
            plan.describe(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the addresses are of live tensors and buffers of these shapes; the numbers are read during the call.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                product.weight as *const c_void,
                plan.weight.0,
                product.x as *const c_void,
                plan.x.0,
                product.y as *const c_void,
                plan.y.0,
                product.y as *mut c_void,
                plan.y.0,
                &plan.algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                self.gpu.stream().cast(),
            )
        }
        .map_err(failed("a product is refused"))
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.get_mut().clear();
        // SAFETY: opened once, and closed once; what it gave the stream is waited for by its workspace, which goes after it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// How a shape is multiplied. The library counts columns first: what is row-major here is its transpose there, so that it
/// multiplies `W` (transposed back) by `x^T` and gives `y^T`.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    weight: Layout,
    x: Layout,
    y: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, shape: &Shape, bias: Option<Address>) -> Result<Self> {
        let Shape { rows, inputs, outputs, dtype, .. } = *shape;
        let y = match dtype {
            DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        };
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
        let description = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )
        .map_err(failed("no description of a product"))?;
        let mut plan = Self {
            description,
            weight: Layout::new(bf16, inputs, outputs)?,
            x: Layout::new(bf16, inputs, rows)?,
            y: Layout::new(y, outputs, rows)?,
            // SAFETY: it is plain numbers, and chosen below before it is used.
            algorithm: unsafe { std::mem::zeroed() },
        };
        type Attribute = sys::cublasLtMatmulDescAttributes_t;
        plan.describe(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        // Some bias is there before an algorithm is chosen: not every one can add it.
        if let Some(bias) = bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            plan.describe(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            plan.describe(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(bf16 as i32))?;
            plan.describe(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        plan.algorithm = plan.choose(handle)?;
        Ok(plan)
    }

    fn describe<T: Copy>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the library copies as many bytes as it is told, of a value of the attribute's type.
        unsafe {
            result::set_matmul_desc_attribute(
                self.description,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
        .map_err(failed("a product cannot be described"))
    }

    fn choose(&self, handle: sys::cublasLtHandle_t) -> Result<sys::cublasLtMatmulAlgo_t> {
        let preference = result::create_matmul_pref().map_err(failed("no preference"))?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: all that is named was made here and lives; the library copies the number.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                attribute,
                ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                let (weight, x, y) = (self.weight.0, self.x.0, self.y.0);
                result::get_matmul_algo_heuristic(handle, self.description, weight, x, y, y, preference)
            })
        };
        // SAFETY: made above, and given back once.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        Ok(found.map_err(failed("it has no algorithm for a product"))?.algo)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made once, and given back once.
        let _ = unsafe { result::destroy_matmul_desc(self.description) };
    }
}

/// How a matrix lies, its columns one after the other.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: sys::cudaDataType_t, rows: usize, cols: usize) -> Result<Self> {
        let layout = result::create_matrix_layout(dtype, rows as u64, cols as u64, rows as i64);
        Ok(Self(layout.map_err(failed("no layout of a matrix"))?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made once, and given back once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}
