//! Products of matrices, against an oracle in f64.

use std::{ffi::c_void, ptr};

use cudarc::{
    cublaslt::{
        result::{
            create_handle, create_matmul_desc, create_matmul_pref, create_matrix_layout,
            get_matmul_algo_heuristic, matmul, set_matmul_desc_attribute, set_matmul_pref_attribute,
        },
        sys::{
            cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t as Attribute,
            cublasLtMatmulPreferenceAttributes_t, cublasStatus_t, cudaDataType_t,
        },
    },
    driver::sys::CUdeviceptr,
};
use half::bf16;

use super::gpu::{Gate, allocate, download, enter, number, stream, synchronize, upload};

const WORKSPACE_BYTES: usize = 1 << 20;

fn numbers(count: usize, seed: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32(((i * 37 + seed * 101) % 200) as f32 / 100.0 - 1.0)).collect()
}

/// D = alpha op(A) op(B) + beta D + bias, of columns: `rows` and `cols` of D, and `depth`.
#[derive(Clone, Copy, Debug)]
struct Product {
    rows: usize,
    cols: usize,
    depth: usize,
    transposes_a: bool,
    transposes_b: bool,
    alpha: f32,
    beta: f32,
    bias: Option<cudaDataType_t>,
    output: cudaDataType_t,
    /// Elements from a column to the next beyond the column's own.
    padding: usize,
}

fn pointer(address: CUdeviceptr) -> *mut c_void {
    ptr::without_provenance_mut(address as usize)
}

fn to_f64(address: CUdeviceptr, count: usize, data_type: cudaDataType_t) -> Vec<f64> {
    match data_type {
        cudaDataType_t::CUDA_R_16BF => download::<bf16>(address, count).into_iter().map(f64::from).collect(),
        _ => download::<f32>(address, count).into_iter().map(f64::from).collect(),
    }
}

fn upload_as(numbers: &[bf16], data_type: cudaDataType_t) -> CUdeviceptr {
    match data_type {
        cudaDataType_t::CUDA_R_16BF => upload(numbers),
        _ => upload(&numbers.iter().map(|x| x.to_f32()).collect::<Vec<_>>()),
    }
}

impl Product {
    fn shape_a(&self) -> (usize, usize) {
        if self.transposes_a { (self.depth, self.rows) } else { (self.rows, self.depth) }
    }

    fn shape_b(&self) -> (usize, usize) {
        if self.transposes_b { (self.cols, self.depth) } else { (self.depth, self.cols) }
    }

    fn check(&self) {
        enter(number::SHARED);
        let (shape_a, shape_b) = (self.shape_a(), self.shape_b());
        let len = |(rows, cols): (usize, usize)| (rows + self.padding) * cols;
        let (a, b, c) =
            (numbers(len(shape_a), 1), numbers(len(shape_b), 2), numbers(len((self.rows, self.cols)), 3));
        let bias = numbers(self.rows, 4);
        let (device_a, device_b, d) = (upload(&a), upload(&b), upload_as(&c, self.output));
        let device_bias = self.bias.map(|data_type| upload_as(&bias, data_type));
        self.run([device_a, device_b, d], device_bias);

        let got = to_f64(d, c.len(), self.output);
        let at = |numbers: &[bf16], shape: (usize, usize), row: usize, col: usize| {
            f64::from(numbers[col * (shape.0 + self.padding) + row])
        };
        for col in 0..self.cols {
            for row in 0..self.rows {
                let of_a =
                    |k| if self.transposes_a { at(&a, shape_a, k, row) } else { at(&a, shape_a, row, k) };
                let of_b =
                    |k| if self.transposes_b { at(&b, shape_b, col, k) } else { at(&b, shape_b, k, col) };
                let sum: f64 = (0..self.depth).map(|k| of_a(k) * of_b(k)).sum();
                let place = col * (self.rows + self.padding) + row;
                let bias = if self.bias.is_some() { f64::from(bias[row]) } else { 0.0 };
                let expected =
                    f64::from(self.alpha) * sum + f64::from(self.beta) * f64::from(c[place]) + bias;
                let tolerance = 0.004 * expected.abs() + 1e-4 * self.depth as f64;
                assert!((got[place] - expected).abs() <= tolerance, "{self:?}: {row}, {col}");
            }
        }
        // What lies between the columns is left as it was.
        let between = (0..self.cols).flat_map(|col| (0..self.padding).map(move |i| (col, i)));
        for (col, i) in between {
            let place = col * (self.rows + self.padding) + self.rows + i;
            assert_eq!(got[place], f64::from(c[place]));
        }
    }

    fn run(&self, [a, b, d]: [CUdeviceptr; 3], bias: Option<CUdeviceptr>) {
        let (stream, workspace) = (stream(), allocate(WORKSPACE_BYTES));
        let bf16 = cudaDataType_t::CUDA_R_16BF;
        let layout = |data_type, (rows, cols): (usize, usize)| {
            create_matrix_layout(data_type, rows as u64, cols as u64, (rows + self.padding) as i64).unwrap()
        };
        let (layout_a, layout_b) = (layout(bf16, self.shape_a()), layout(bf16, self.shape_b()));
        let layout_d = layout(self.output, (self.rows, self.cols));
        let desc =
            create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F).unwrap();
        let preference = create_matmul_pref().unwrap();
        let (transposes_a, transposes_b) = (i32::from(self.transposes_a), i32::from(self.transposes_b));
        let (epilogue, bias_type) = (cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS, self.bias);
        let max_bytes = WORKSPACE_BYTES as u64;
        let max_attribute = cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attributes have the types that cuBLAS gives them, all objects exist until the process ends, and the
        // buffers are as large as their layouts.
        unsafe {
            let set = |attribute, value: *const c_void, bytes| {
                set_matmul_desc_attribute(desc, attribute, value, bytes).unwrap();
            };
            set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, ptr::from_ref(&transposes_a).cast(), 4);
            set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, ptr::from_ref(&transposes_b).cast(), 4);
            if let (Some(bias), Some(bias_type)) = (bias, bias_type) {
                set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, ptr::from_ref(&epilogue).cast(), 4);
                set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, ptr::from_ref(&bias).cast(), 8);
                set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, ptr::from_ref(&bias_type).cast(), 4);
            }
            set_matmul_pref_attribute(preference, max_attribute, ptr::from_ref(&max_bytes).cast(), 8)
                .unwrap();
            let handle = create_handle().unwrap();
            let found =
                get_matmul_algo_heuristic(handle, desc, layout_a, layout_b, layout_d, layout_d, preference)
                    .unwrap();
            let gate = Gate::new(stream);
            let before = download::<u8>(d, 64);
            matmul(
                handle,
                desc,
                ptr::from_ref(&self.alpha).cast(),
                ptr::from_ref(&self.beta).cast(),
                pointer(a),
                layout_a,
                pointer(b),
                layout_b,
                pointer(d),
                layout_d,
                pointer(d),
                layout_d,
                &found.algo,
                pointer(workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
            .unwrap();
            assert_eq!(download::<u8>(d, 64), before);
            gate.open();
        }
        synchronize(stream);
    }
}

const PLAIN: Product = Product {
    rows: 24,
    cols: 7,
    depth: 40,
    transposes_a: false,
    transposes_b: false,
    alpha: 1.0,
    beta: 0.0,
    bias: None,
    output: cudaDataType_t::CUDA_R_16BF,
    padding: 0,
};

#[test]
fn products_are_those_of_their_matrices() {
    for transposes_a in [false, true] {
        for transposes_b in [false, true] {
            for padding in [0, 8] {
                Product { transposes_a, transposes_b, padding, ..PLAIN }.check();
            }
        }
    }
}

#[test]
fn products_are_scaled_and_added() {
    for output in [cudaDataType_t::CUDA_R_16BF, cudaDataType_t::CUDA_R_32F] {
        Product { output, alpha: 0.5, beta: 2.0, ..PLAIN }.check();
        for bias in [cudaDataType_t::CUDA_R_16BF, cudaDataType_t::CUDA_R_32F] {
            Product { output, bias: Some(bias), transposes_a: true, ..PLAIN }.check();
        }
    }
}

#[test]
fn matrices_that_do_not_fit_are_refused() {
    enter(number::SHARED);
    let bf16 = cudaDataType_t::CUDA_R_16BF;
    let desc =
        create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F).unwrap();
    let layout = |rows, cols| create_matrix_layout(bf16, rows, cols, rows as i64).unwrap();
    // SAFETY: all objects exist until the process ends.
    let result = unsafe {
        get_matmul_algo_heuristic(
            create_handle().unwrap(),
            desc,
            layout(8, 16),
            layout(24, 8),
            layout(8, 8),
            layout(8, 8),
            create_matmul_pref().unwrap(),
        )
    };
    assert_eq!(result.err().unwrap().0, cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE);
}
