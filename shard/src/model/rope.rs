//! Rotary embeddings: the frequencies of the angles that queries and keys are turned by.
//!
//! Frequencies are f32, as the reference has them.

use std::f64::consts::PI;

use crate::config::{TextConfig, Yarn};
use crate::device::{Angles, Device, Result};

/// `base^(-2i / dim)` for `i < dim / 2`, in the reference's steps of rounding.
fn inverse_frequencies(base: f64, dim: usize) -> Vec<f32> {
    (0..dim).step_by(2).map(|i| 1.0 / base.powf(f64::from(i as f32 / dim as f32)) as f32).collect()
}

/// YaRN's frequencies for heads of `dim` (Peng et al. 2023, section 3.2), in the reference's steps of rounding: what turns
/// often within the original context stays, what hardly turns is slowed down by the factor, a ramp lies between.
fn yarn_frequencies(base: f64, dim: usize, yarn: &Yarn) -> Vec<f32> {
    let original = yarn.original_max_position_embeddings as f64;
    // The frequency that turns so often within the original context, as a real-valued index.
    let turning = |times: f64| (dim as f64 * (original / (times * 2.0 * PI)).ln()) / (2.0 * base.ln());
    let (mut low, mut high) = (turning(yarn.beta_fast), turning(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min((dim - 1) as f64));
    if low == high {
        high += 0.001;
    }
    let fast = inverse_frequencies(base, dim).into_iter().enumerate();
    fast.map(|(i, fast)| {
        let wavelength = base.powf(f64::from((2 * i) as f32 / dim as f32)) as f32;
        let slow = 1.0 / (yarn.factor as f32 * wavelength);
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let kept = 1.0 - ramp;
        slow * (1.0 - kept) + fast * kept
    })
    .collect()
}

/// M-RoPE: each frequency turns with one of time, height and width (Qwen2-VL paper, section 2.1).
pub struct MRope {
    /// For each frequency, its value and the axis that it turns with.
    frequencies: Vec<(f32, usize)>,
    /// What cosines and sines are multiplied by.
    attention_factor: f32,
}

impl MRope {
    /// Of the language model: `mrope_section` says how many frequencies belong to each axis, in turn; the sum is
    /// `head_dim / 2`.
    pub fn new(config: &TextConfig) -> Self {
        let sections = config.mrope_section.iter().enumerate();
        let axes = sections.flat_map(|(i, &len)| std::iter::repeat_n(i % 3, len));
        let (theta, head_dim) = (config.rope_theta, config.head_dim());
        let (frequencies, attention_factor) = match &config.yarn {
            None => (inverse_frequencies(theta, head_dim), 1.0),
            Some(yarn) => (yarn_frequencies(theta, head_dim, yarn), yarn.attention_factor as f32),
        };
        Self { frequencies: frequencies.into_iter().zip(axes).collect(), attention_factor }
    }

    /// Cosines and sines of rows at `positions` (time, height, width), `[rows, head_dim / 2]` each.
    pub fn tables<D: Device>(&self, device: &D, positions: &[[u32; 3]]) -> Result<(D::Tensor, D::Tensor)> {
        device.angles(&self.angles(positions))
    }

    fn angles<'a>(&'a self, positions: &'a [[u32; 3]]) -> Angles<'a> {
        Angles { frequencies: &self.frequencies, scale: self.attention_factor, positions }
    }
}

/// The rotary embedding of the vision tower: the first half of the frequencies turns with the row, the
/// second, which is the same, with the column.
pub struct AxialRope {
    /// For each frequency, its value and the axis that it turns with.
    frequencies: Vec<(f32, usize)>,
}

impl AxialRope {
    /// For heads of `head_dim`, a multiple of 4.
    pub fn new(theta: f64, head_dim: usize) -> Self {
        let frequencies = inverse_frequencies(theta, head_dim / 2);
        let along = |axis| frequencies.iter().map(move |frequency| (*frequency, axis));
        Self { frequencies: along(0).chain(along(1)).collect() }
    }

    /// Cosines and sines of patches at `positions` (row, column), `[patches, head_dim / 2]` each.
    pub fn tables<D: Device>(&self, device: &D, positions: &[[u32; 2]]) -> Result<(D::Tensor, D::Tensor)> {
        let positions: Vec<[u32; 3]> = positions.iter().map(|&[row, column]| [row, column, 0]).collect();
        device.angles(&self.angles(&positions))
    }

    fn angles<'a>(&'a self, positions: &'a [[u32; 3]]) -> Angles<'a> {
        Angles { frequencies: &self.frequencies, scale: 1.0, positions }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Config;

    fn table(angles: &Angles<'_>) -> (Vec<f32>, Vec<f32>) {
        let len = angles.positions.len() * angles.frequencies.len();
        let (mut cos, mut sin) = (vec![0.0; len], vec![0.0; len]);
        angles.fill(&mut cos, &mut sin);
        (cos, sin)
    }

    /// The smallest configuration of a language model with so wide heads.
    fn text_config(head_dim: usize, theta: f64, rope: &Value, max_position_embeddings: &Value) -> TextConfig {
        let config = json!({
            "architectures": [crate::config::ARCHITECTURE], "hidden_size": 2 * head_dim, "intermediate_size": 1,
            "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 200_000, "rope_theta": theta,
            "rope_scaling": rope, "max_position_embeddings": max_position_embeddings,
            "vision_config": {
                "depth": 32, "hidden_size": 4, "intermediate_size": 1, "num_heads": 1, "out_hidden_size": 2 * head_dim,
            },
        });
        Config::from_json(config.as_object().expect("an object")).expect("valid").text
    }

    #[test]
    fn frequencies_turn_with_their_axis() {
        let rope = json!({ "type": "mrope", "mrope_section": [2, 3, 3] });
        let rope = MRope::new(&text_config(16, 1e6, &rope, &json!(4096)));
        let (cos, sin) = table(&rope.angles(&[[5, 0, 0], [0, 7, 0], [0, 0, 9]]));
        for (row, (axis, position)) in [(0..2, 5.0), (2..5, 7.0), (5..8, 9.0)].into_iter().enumerate() {
            for i in 0..8 {
                let angle = if axis.contains(&i) { position * 1e6f64.powf(-(i as f64) / 8.0) } else { 0.0 };
                assert!((f64::from(cos[row * 8 + i]) - angle.cos()).abs() < 1e-5);
                assert!((f64::from(sin[row * 8 + i]) - angle.sin()).abs() < 1e-5);
            }
        }
    }

    /// What the reference makes of configurations: `make_yarn.py` says how.
    #[test]
    fn yarn_is_the_references() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/yarn.json");
        let golden = std::fs::read_to_string(path).expect("the golden");
        let golden: Value = serde_json::from_str(&golden).expect("JSON");
        let mut stretched = 0;
        for case in golden["cases"].as_array().expect("cases") {
            let number = |field: &str| case[field].as_f64().expect("a number");
            let theta = number("rope_theta");
            let config = text_config(
                number("head_dim") as usize,
                theta,
                &case["rope_scaling"],
                &golden["max_position_embeddings"],
            );
            let rope = MRope::new(&config);
            let what = &case["rope_scaling"];
            assert_eq!(rope.attention_factor, number("attention_factor") as f32, "{what}");
            let expected: Vec<f32> =
                case["inv_freq"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            assert_eq!(rope.frequencies.len(), expected.len());
            for ((found, _), expected) in rope.frequencies.iter().zip(&expected) {
                // Its power is not always the nearest number; a few units in the last place may lie between.
                let error = (found - expected).abs() / expected;
                assert!(error <= 4.0 * f32::EPSILON, "{what}: {found} is not {expected}");
            }
            let plain = inverse_frequencies(theta, config.head_dim());
            stretched += usize::from(rope.frequencies.iter().zip(&plain).any(|((a, _), b)| a != b));
            // The attention factor is in the tables, also of position 0.
            let (cos, _) = table(&rope.angles(&[[0; 3]]));
            assert!(cos.iter().all(|cos| *cos == rope.attention_factor), "{what}");
        }
        assert!(stretched > 30, "{stretched}");
    }

    #[test]
    fn patches_turn_with_row_then_column() {
        let rope = AxialRope::new(10_000.0, 16);
        let angle = |i: usize| [3.0, 4.0][i / 4] * 10_000f64.powf(-((i % 4) as f64) / 4.0);
        // Alone, and as the last of so many that their numbers are turned first.
        for rows in [1, 24] {
            let positions: Vec<[u32; 3]> = (1..rows).map(|i| [i % 5, 0, 0]).chain([[3, 4, 0]]).collect();
            let (cos, sin) = table(&rope.angles(&positions));
            assert_eq!((cos.len(), sin.len()), (8 * positions.len(), 8 * positions.len()));
            for (i, (cos, sin)) in cos[cos.len() - 8..].iter().zip(&sin[sin.len() - 8..]).enumerate() {
                assert!((f64::from(*sin) - angle(i).sin()).abs() < 1e-6);
                assert!((f64::from(*cos) - angle(i).cos()).abs() < 1e-6);
            }
        }
    }
}
