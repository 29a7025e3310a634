use std::{ops::Range, sync::Arc};

use super::super::testing::*;
use super::super::{CpuDevice, CpuOptions, InstructionSet, Rows};
use crate::collective::{Checker, Collective, GroupLost};
use crate::device::{Activations, AttentionHeads, DType, Device, DeviceError, RankDevice, StepRows};
use crate::progress::Progress;

const SHAPES: [(usize, usize); 8] =
    [(0, 16), (1, 1), (3, 16), (2, 0), (5, 37), (700, 48), (1, 3584), (33, 342)];

/// Runs an operation on every device and compares it with the expected numbers, and the devices' bits with each other.
fn check(
    what: &str,
    expected: &[f64],
    tolerance: f64,
    operation: impl Fn(&CpuDevice) -> super::super::Tensor,
) {
    let mut first: Option<Vec<f32>> = None;
    for (name, device) in devices() {
        let out = operation(&device);
        assert_close(expected, out.data(), tolerance, &format!("{what}, {name}"));
        let first = first.get_or_insert_with(|| out.data().to_vec());
        assert_same_bits(first, out.data(), &format!("{what}, {name}"));
    }
}

#[test]
fn residual_and_norm() {
    for (rows, cols) in SHAPES {
        let mut numbers = Numbers::new(cols as u64);
        let (x, residual) = (numbers.vec(rows * cols), numbers.vec(rows * cols));
        let weight = numbers.vec(cols);
        for with_residual in [false, true] {
            let what = format!("norm of {rows} x {cols}, residual: {with_residual}");
            let sums: Vec<f64> = x
                .iter()
                .zip(&residual)
                .map(|(&x, &r)| f64::from(if with_residual { x + r } else { x }))
                .collect();
            let mut normed = Vec::new();
            for row in sums.chunks(cols.max(1)) {
                let mean = row.iter().map(|x| x * x).sum::<f64>() / cols as f64;
                normed.extend(row.iter().zip(&weight).map(|(x, &w)| x / (mean + 1e-6).sqrt() * f64::from(w)));
            }
            let run = |device: &CpuDevice| {
                let norm = device.pack_norm(weight.clone(), 1e-6).expect("it packs");
                let x = device.upload(rows, cols, &x).expect("room");
                let residual = with_residual.then(|| device.upload(rows, cols, &residual).expect("room"));
                device.reduce_residual_norm(x, residual, &norm).expect("it reduces")
            };
            check(&what, &normed, 2e-6, |device| run(device).0);
            check(&what, &sums, 0.0, |device| run(device).1);
            for (name, device) in devices() {
                let (whole, sum) = run(&device);
                let norm = device.pack_norm(weight.clone(), 1e-6).expect("it packs");
                let rows = rows / 3..rows;
                let part = device.norm(&sum, rows.clone(), &norm).expect("room");
                let whole = &whole.data()[rows.start * cols..rows.end * cols];
                assert_same_bits(whole, part.data(), &format!("{what}, of the sum's rows {rows:?}, {name}"));
            }
        }
    }
}

#[test]
fn gated_silu_and_gelu() {
    for (rows, cols) in SHAPES {
        let mut numbers = Numbers::new(cols as u64);
        let x: Vec<f32> = numbers.vec(2 * rows * cols).into_iter().map(|x| 8.0 * x).collect();
        let mut expected = Vec::new();
        for row in x.chunks(2 * cols.max(1)) {
            let (gate, up) = row.split_at(cols);
            expected.extend(gate.iter().zip(up).map(|(&gate, &up)| {
                let gate = f64::from(gate);
                gate / (1.0 + (-gate).exp()) * f64::from(up)
            }));
        }
        check(&format!("silu of {rows} x {cols}"), &expected, 1e-5, |device| {
            device.gated_silu(&device.upload(rows, 2 * cols, &x).expect("room")).expect("room")
        });
        // The precision of gelu itself is tested where it is defined.
        let tanh_form: Vec<f64> = x
            .iter()
            .map(|&x| f64::from(x))
            .map(|x| {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            })
            .collect();
        check(&format!("gelu of {rows} x {cols}"), &tanh_form, 1e-3, |device| {
            let mut x = device.upload(rows, 2 * cols, &x).expect("room");
            device.gelu(&mut x).expect("it computes");
            x
        });
    }
}

#[test]
fn rotary_turns_queries_and_keys_only() {
    for (rows, num_query, num_kv, head_dim) in
        [(3, 2, 1, 8), (40, 7, 1, 128), (5, 3, 3, 80), (2, 0, 0, 16), (0, 2, 2, 20)]
    {
        let mut numbers = Numbers::new(head_dim as u64);
        let cols = (num_query + 2 * num_kv) * head_dim;
        let (x, half) = (numbers.vec(rows * cols), head_dim / 2);
        let angles = numbers.vec(rows * half);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for row in 0..rows {
            for head in 0..num_query + num_kv {
                for i in 0..half {
                    let (c, s) = (f64::from(cos[row * half + i]), f64::from(sin[row * half + i]));
                    let at = row * cols + head * head_dim + i;
                    let (a, b) = (f64::from(x[at]), f64::from(x[at + half]));
                    (expected[at], expected[at + half]) = (a * c - b * s, b * c + a * s);
                }
            }
        }
        let upload = |device: &CpuDevice| {
            let qkv = device.upload(rows, cols, &x).expect("room");
            let cos = device.upload(rows, half, &cos).expect("room");
            (qkv, cos, device.upload(rows, half, &sin).expect("room"))
        };
        check("rotary", &expected, 2e-7, |device| {
            let (mut qkv, cos, sin) = upload(device);
            let kv_of_query = (0..num_query).map(|head| head * num_kv / num_query).collect();
            let heads = AttentionHeads { kv_of_query, num_kv, head_dim };
            let mut cache = device.kv_cache(DType::F32, 1, &heads, 2).expect("room");
            let slots: Vec<u32> = (0..rows as u32).collect();
            let rows = StepRows {
                token_ids: &slots,
                drawn: &[],
                slots: &slots,
                sequences: &[],
                heads: &heads,
                cos,
                sin,
            };
            let rows = device.rows(rows).expect("room");
            device.rotary_append(&mut qkv, &heads, &rows, &mut cache, 0).expect("it rotates");
            qkv
        });
        if num_query == num_kv {
            check("vision rotary", &expected, 2e-7, |device| {
                let (mut qkv, cos, sin) = upload(device);
                device.vision_rotary(&mut qkv, num_query, &cos, &sin).expect("it rotates");
                qkv
            });
        }
    }
}

/// Rows of which only the tokens matter.
fn tokens(device: &CpuDevice, token_ids: &[u32]) -> Rows {
    let (cos, sin) = (device.empty(0, 0).expect("room"), device.empty(0, 0).expect("room"));
    let heads = &AttentionHeads { kv_of_query: vec![], num_kv: 0, head_dim: 2 };
    device
        .rows(StepRows { token_ids, drawn: &[], slots: token_ids, sequences: &[], heads, cos, sin })
        .expect("room")
}

#[test]
fn rows_are_embedded_gathered_copied_and_joined() {
    for (_, device) in devices() {
        for dtype in [DType::F32, DType::Bf16] {
            let (matrix, values) = matrix(&mut Numbers::new(1), 40, 6, dtype);
            let table = device.pack_linear(matrix, None).expect("it packs");
            let x = device.embedding(&table, 100, &tokens(&device, &[139, 99, 100, 140, 117])).expect("room");
            let row = |id: usize| &values[(id - 100) * 6..(id - 99) * 6];
            let zeros = &[0.0; 6][..];
            let expected = [row(139), zeros, row(100), zeros, row(117)].concat();
            assert_eq!(device.download(&x).expect("it downloads"), expected);
            let gathered = device.gather_rows(&x, &[4, 0, 4]).expect("room");
            assert_eq!(gathered.data(), [row(117), row(139), row(117)].concat());
            let mut target = device.empty(4, 6).expect("room");
            device.copy_rows(&gathered, &mut target, 1).expect("it copies");
            assert_eq!(target.data(), [zeros, row(117), row(139), row(117)].concat());
            let joined = device.join_rows(target, 2).expect("it joins");
            assert_eq!((joined.rows(), joined.cols()), (2, 12));
            assert_eq!(joined.row(1), [row(139), row(117)].concat());
        }
        let (nothing, _) = matrix(&mut Numbers::new(1), 0, 6, DType::F32);
        let nothing = device.pack_linear(nothing, None).expect("it packs");
        assert_eq!(device.embedding(&nothing, 0, &tokens(&device, &[3])).expect("room").data(), [0.0; 6]);
    }
}

#[test]
fn features_are_written_and_inserted() {
    for (_, device) in devices() {
        let mut features = device.features(3, 2).expect("room");
        let x = device.upload(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).expect("room");
        device.write_features(&mut features, &x, &[127, 5]).expect("it writes");
        let mut target = device.upload(3, 3, &[9.0; 9]).expect("room");
        device.insert_features(&mut target, &features, &[(2, 127), (0, 5)], false).expect("it inserts");
        assert_eq!(target.data(), [4.0, 5.0, 6.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0]);
        device.insert_features(&mut target, &features, &[(0, 5)], true).expect("it inserts");
        assert_eq!(target.data()[..3], [0.0; 3]);
    }
}

#[test]
fn a_hash_sees_every_bit_of_its_rows() {
    let (_, device) = devices().remove(0);
    let base = Numbers::new(1).vec(35);
    let hash = |x: &[f32], rows: Range<usize>| {
        device.hash(&device.upload(5, 7, x).expect("room"), rows).expect("it hashes")
    };
    let expected = hash(&base, 0..5);
    assert_eq!(hash(&base, 0..5), expected);
    assert_ne!(hash(&base, 0..4), expected);
    let rows = device.upload(2, 7, &base[14..28]).expect("room");
    assert_eq!(hash(&base, 2..4), device.hash(&rows, 0..2).expect("it hashes"));
    for index in 0..base.len() {
        for bit in 0..32 {
            let mut x = base.clone();
            x[index] = f32::from_bits(x[index].to_bits() ^ 1 << bit);
            assert_ne!(hash(&x, 0..5), expected, "bit {bit} of element {index}");
        }
    }
}

/// A group whose other rank holds twice what this one does, or is dead.
struct Pair {
    alive: bool,
}

impl Collective for Pair {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        2
    }
    fn all_reduce_sum(&self, data: &mut [f32]) -> Result<(), GroupLost> {
        data.iter_mut().for_each(|x| *x *= 3.0);
        if self.alive { Ok(()) } else { Err(GroupLost) }
    }
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>, GroupLost> {
        if self.alive { Ok(vec![mine.to_vec(), vec![0]]) } else { Err(GroupLost) }
    }
    fn check(&self) -> Result<(), GroupLost> {
        if self.alive { Ok(()) } else { Err(GroupLost) }
    }
    fn checker(&self) -> Checker {
        let alive = self.alive;
        Box::new(move || if alive { Ok(()) } else { Err(GroupLost) })
    }
    fn barrier(&self) -> Result<(), GroupLost> {
        Ok(())
    }
}

fn one_of_two(alive: bool, workspace_bytes: usize) -> CpuDevice {
    let options = CpuOptions {
        threads: 1,
        cpus: Vec::new(),
        workspace_bytes,
        instruction_set: None,
        collective: Box::new(Pair { alive }),
        progress: Arc::new(Progress::new(1)),
    };
    CpuDevice::new(options).expect("a small device starts")
}

#[test]
fn ranks_are_summed_before_the_norm_and_a_lost_group_is_told() {
    let device = one_of_two(true, 4096);
    let norm = device.pack_norm(vec![1.0, 2.0], 0.0).expect("it packs");
    let run = |device: &CpuDevice| {
        let x = device.upload(1, 2, &[1.0, 0.0])?;
        let residual = device.upload(1, 2, &[0.0, 4.0])?;
        device.reduce_residual_norm(x, Some(residual), &norm)
    };
    let (normed, sum) = run(&device).expect("both live");
    assert_eq!(sum.data(), [3.0, 4.0]);
    let length = 12.5_f32.sqrt();
    assert!((normed.data()[0] - 3.0 / length).abs() < 1e-6 && (normed.data()[1] - 8.0 / length).abs() < 1e-6);
    assert_eq!(device.all_gather(&[7]).expect("both live"), [vec![7], vec![0]]);
    let mut lost = one_of_two(false, 4096);
    assert!(matches!(run(&lost), Err(DeviceError::GroupLost)));
    assert!(matches!(lost.all_gather(&[7]), Err(DeviceError::GroupLost)));
    assert_eq!(lost.used_workspace_bytes(), 0);
    lost.leave_group().expect("it leaves");
    assert!(matches!(run(&lost), Err(DeviceError::GroupLost)));
    lost.join_group(Box::new(Pair { alive: true })).expect("it joins");
    assert_eq!(run(&lost).expect("in a new group").1.data(), [3.0, 4.0]);
    assert_eq!(lost.used_workspace_bytes(), 0);
}

#[test]
fn a_workspace_that_is_too_small_says_what_it_lacks() {
    let device = one_of_two(true, 4096);
    let error = device.upload(40, 40, &[0.0; 1600]).err().expect("6400 bytes do not fit").to_string();
    assert!(error.contains("4096 bytes") && error.contains("40 x 40"), "{error}");
    assert!(InstructionSet::detect().is_available());
}
