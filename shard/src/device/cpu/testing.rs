//! What the tests of the kernels share.

use std::sync::Arc;

use half::bf16;

use super::instruction_set::InstructionSet;
use super::{CpuDevice, CpuOptions};
use crate::collective::Alone;
use crate::device::{DType, HostElements, HostMatrix};
use crate::progress::Progress;

/// A device with a workspace of 64 MiB.
pub fn device(set: InstructionSet, threads: usize) -> CpuDevice {
    let options = CpuOptions {
        threads,
        cpus: Vec::new(),
        workspace_bytes: 64 << 20,
        instruction_set: Some(set),
        collective: Box::new(Alone),
        progress: Arc::new(Progress::new(threads)),
    };
    CpuDevice::new(options).expect("a small device starts")
}

/// All instruction sets that this processor has and several numbers of threads; the first is the one to compare with.
pub fn devices() -> Vec<(String, CpuDevice)> {
    let mut devices = vec![("portable, 1 thread".to_string(), device(InstructionSet::Portable, 1))];
    for set in InstructionSet::available() {
        for threads in [1, 2, 3] {
            devices.push((format!("{set}, {threads} threads"), device(set, threads)));
        }
    }
    devices
}

/// The same, without the set that rounds activations: all give the same bits.
pub fn exact_devices() -> Vec<(String, CpuDevice)> {
    let mut devices = devices();
    devices.retain(|(_, device)| device.instruction_set() != InstructionSet::Avx512Bf16);
    devices
}

/// A seeded source of numbers.
pub struct Numbers(u64);

impl Numbers {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Some bits.
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// A number in -1..1.
    pub fn next(&mut self) -> f32 {
        self.bits() as f32 / (1_u32 << 30) as f32 - 1.0
    }

    /// So many numbers in -1..1.
    pub fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A matrix of weights, and its elements as the device will see them.
pub fn matrix(numbers: &mut Numbers, rows: usize, cols: usize, dtype: DType) -> (HostMatrix, Vec<f32>) {
    let values = round(dtype, numbers.vec(rows * cols));
    let data = match dtype {
        DType::F32 => HostElements::F32(values.clone()),
        DType::Bf16 => HostElements::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
    };
    (HostMatrix { rows, cols, data }, values)
}

/// Rounds to an element type.
pub fn round(dtype: DType, values: Vec<f32>) -> Vec<f32> {
    match dtype {
        DType::F32 => values,
        DType::Bf16 => values.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect(),
    }
}

/// Asserts that two results have the same bits.
pub fn assert_same_bits(expected: &[f32], got: &[f32], what: &str) {
    assert_eq!(expected.len(), got.len(), "{what}");
    for (index, (a, b)) in expected.iter().zip(got).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {index}: {a:e} became {b:e}");
    }
}

/// Asserts that a result is within `tolerance` of the expected one.
pub fn assert_close(expected: &[f64], got: &[f32], tolerance: f64, what: &str) {
    assert_eq!(expected.len(), got.len(), "{what}");
    for (index, (&a, &b)) in expected.iter().zip(got).enumerate() {
        let difference = (a - f64::from(b)).abs();
        assert!(difference <= tolerance, "{what}: element {index}: {b:e} instead of {a:e}");
    }
}
