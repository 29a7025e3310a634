use super::super::testing::*;
use crate::device::Device;

fn expected(qkv: &[f32], num_heads: usize, head_dim: usize, cu_seqlens: &[u32], rows: usize) -> Vec<f64> {
    let cols = num_heads * head_dim;
    let part =
        |row: usize, part: usize, head: usize| &qkv[(3 * row + part) * cols + head * head_dim..][..head_dim];
    let mut out = vec![0.0; rows * cols];
    for window in cu_seqlens.windows(2) {
        let window = window[0] as usize..window[1] as usize;
        for row in window.clone() {
            for head in 0..num_heads {
                let scores: Vec<f64> = window
                    .clone()
                    .map(|other| {
                        let products = part(row, 0, head).iter().zip(part(other, 1, head));
                        products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
                            / (head_dim as f64).sqrt()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                for d in 0..head_dim {
                    let weighted = scores.iter().zip(window.clone());
                    let weighted =
                        weighted.map(|(s, other)| (s - largest).exp() * f64::from(part(other, 2, head)[d]));
                    out[row * cols + head * head_dim + d] = weighted.sum::<f64>() / sum;
                }
            }
        }
    }
    out
}

#[test]
fn agrees_with_f64_in_windows_of_every_kind() {
    let devices = devices();
    for (num_heads, head_dim, cu_seqlens) in [
        (1, 80, vec![0, 64, 128]),
        (3, 20, vec![0, 1, 1, 34, 66, 161]),
        (2, 8, vec![0, 500]),
        (1, 16, vec![0]),
        (2, 16, vec![]),
        (0, 80, vec![0, 3]),
        (1, 130, vec![0, 40]),
    ] {
        let rows = cu_seqlens.last().copied().unwrap_or(0) as usize;
        let mut numbers = Numbers::new(rows as u64);
        let cols = num_heads * head_dim;
        let qkv: Vec<f32> = numbers.vec(3 * rows * cols).into_iter().map(|x| 3.0 * x).collect();
        let expected = expected(&qkv, num_heads, head_dim, &cu_seqlens, rows);
        let mut first: Option<Vec<f32>> = None;
        for (name, device) in &devices {
            let what = format!("{num_heads} heads of {head_dim} in {cu_seqlens:?}, {name}");
            let input = device.upload(rows, 3 * cols, &qkv).expect("room");
            let attend = |rows| device.vision_attention(&input, num_heads, head_dim, &cu_seqlens, rows);
            let out = attend(0..rows).expect("room");
            assert_close(&expected, out.data(), 3e-5, &what);
            assert_same_bits(first.get_or_insert_with(|| out.data().to_vec()), out.data(), &what);
            for part in [0..rows / 3, rows / 3..rows, rows / 2..rows / 2 + rows.min(1)] {
                let of_part = attend(part.clone()).expect("room");
                let whole = &out.data()[part.start * cols..part.end * cols];
                assert_same_bits(whole, of_part.data(), &format!("rows {part:?} of {what}"));
            }
        }
    }
}
