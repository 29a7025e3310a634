//! The model again, plain and slow, over candle tensors in f32: nothing is fused, split, cached or reordered
//! cleverly. Follows `modeling_qwen2_5_vl.py` of transformers 5.23 step by step.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType, Device, IndexOp, Result, Tensor};
use lockstep_shard::config::{Config, Yarn};
use lockstep_shard::model::Normalization;

use super::ranks::{Picture, Prompt};

/// The whole model with all its weights.
pub struct Oracle {
    config: Config,
    normalization: Normalization,
    tensors: HashMap<String, Tensor>,
}

impl Oracle {
    pub fn load(dir: &Path, normalization: Normalization) -> Self {
        let config = Config::open(dir).expect("a valid configuration");
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                for (name, tensor) in candle_core::safetensors::load(&path, &Device::Cpu).expect("tensors") {
                    let name =
                        name.replace("model.language_model.", "model.").replace("model.visual.", "visual.");
                    tensors.insert(name, tensor.to_dtype(DType::F32).expect("floats"));
                }
            }
        }
        Self { config, normalization, tensors }
    }

    /// Features of a picture, `[tokens, hidden]`.
    pub fn features(&self, picture: &Picture) -> Tensor {
        self.try_features(picture).expect("the oracle works")
    }

    /// Normed hidden states of all tokens, `[tokens, hidden]`.
    pub fn hidden(&self, prompt: &Prompt) -> Tensor {
        self.try_hidden(prompt).expect("the oracle works")
    }

    /// Log-probabilities after hidden states, `[rows, vocabulary]`.
    pub fn logprobs(&self, hidden: &Tensor) -> Vec<Vec<f32>> {
        let head = if self.config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        let logprobs = self.linear(hidden, head).and_then(|logits| {
            let max = logits.max_keepdim(D::Minus1)?;
            let log_sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?.log()?;
            logits.broadcast_sub(&max)?.broadcast_sub(&log_sum)?.to_vec2()
        });
        logprobs.expect("the oracle works")
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("tensor {name} is missing"))
    }

    fn linear(&self, x: &Tensor, prefix: &str) -> Result<Tensor> {
        let y = x.matmul(&self.get(&format!("{prefix}.weight")).t()?)?;
        match self.tensors.get(&format!("{prefix}.bias")) {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    fn norm(&self, x: &Tensor, prefix: &str, epsilon: f32) -> Result<Tensor> {
        let variance = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?;
        x.broadcast_div(&variance.sqrt()?)?.broadcast_mul(self.get(&format!("{prefix}.weight")))
    }

    fn mlp(&self, x: &Tensor, prefix: &str) -> Result<Tensor> {
        let gate = self.linear(x, &format!("{prefix}.gate_proj"))?.silu()?;
        let up = self.linear(x, &format!("{prefix}.up_proj"))?;
        self.linear(&(gate * up)?, &format!("{prefix}.down_proj"))
    }

    fn try_features(&self, picture: &Picture) -> Result<Tensor> {
        let vision = &self.config.vision;
        let (patches, positions) = self.patches(picture);
        let (window_index, cu_window_seqlens) = self.windows(picture.grid);
        let [t, h, w] = picture.grid;
        let cu_seqlens: Vec<usize> = (0..=t).map(|frame| frame * h * w).collect();
        let weight = self.get("visual.patch_embed.proj.weight").flatten_from(1)?;
        let merge_unit = vision.merge_unit();
        let order: Vec<u32> = window_index
            .iter()
            .flat_map(|&token| (0..merge_unit).map(move |i| (token * merge_unit + i) as u32))
            .collect();
        let mut x =
            patches.matmul(&weight.t()?)?.index_select(&Tensor::new(order.clone(), &Device::Cpu)?, 0)?;
        let quarter = vision.head_dim() / 4;
        let angles: Vec<f32> = order
            .iter()
            .flat_map(|&patch| positions[patch as usize])
            .flat_map(|coordinate| {
                (0..quarter).map(move |i| {
                    coordinate as f32 * (1.0 / 10_000f32.powf((2 * i) as f32 / (2 * quarter) as f32))
                })
            })
            .collect();
        let angles = Tensor::from_vec(angles, (order.len(), 2 * quarter), &Device::Cpu)?;
        for block in 0..vision.depth {
            let prefix = format!("visual.blocks.{block}");
            let full = vision.fullatt_block_indexes.contains(&block);
            let bounds = if full { &cu_seqlens } else { &cu_window_seqlens };
            let h = self.norm(&x, &format!("{prefix}.norm1"), 1e-6)?;
            let qkv = self.linear(&h, &format!("{prefix}.attn.qkv"))?;
            let attended = attend_within(&qkv, vision.num_heads, &angles, bounds)?;
            x = (x + self.linear(&attended, &format!("{prefix}.attn.proj"))?)?;
            let h = self.norm(&x, &format!("{prefix}.norm2"), 1e-6)?;
            x = (x + self.mlp(&h, &format!("{prefix}.mlp"))?)?;
        }
        let x = self.norm(&x, "visual.merger.ln_q", 1e-6)?;
        let x = x.reshape((window_index.len(), merge_unit * vision.hidden_size))?;
        let x = self.linear(&x, "visual.merger.mlp.0")?.gelu_erf()?;
        let x = self.linear(&x, "visual.merger.mlp.2")?;
        let mut reverse = vec![0u32; window_index.len()];
        for (row, &token) in window_index.iter().enumerate() {
            reverse[token] = row as u32;
        }
        x.index_select(&Tensor::new(reverse, &Device::Cpu)?, 0)
    }

    /// Patches as the reference's processor flattens them (four of a token are neighbours), and the row and
    /// column of each.
    fn patches(&self, picture: &Picture) -> (Tensor, Vec<[usize; 2]>) {
        let vision = &self.config.vision;
        let (side, merge, frames) =
            (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size);
        let [t, h, w] = picture.grid;
        let num_frames = picture.pixels.len() / (h * side * w * side * 3);
        let (mut values, mut positions) = (Vec::new(), Vec::new());
        for time in 0..t {
            for (top, left) in (0..h / merge).flat_map(|top| (0..w / merge).map(move |left| (top, left))) {
                for (inner_row, inner_col) in (0..merge).flat_map(|row| (0..merge).map(move |col| (row, col)))
                {
                    let (row, col) = (top * merge + inner_row, left * merge + inner_col);
                    positions.push([row, col]);
                    for channel in 0..3 {
                        for frame in (0..frames).map(|i| (time * frames + i).min(num_frames - 1)) {
                            for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
                                let (y, x) = (row * side + y, col * side + x);
                                let pixel =
                                    picture.pixels[((frame * h * side + y) * w * side + x) * 3 + channel];
                                let (mean, std) = (self.normalization.mean, self.normalization.std);
                                values.push((f32::from(pixel) / 255.0 - mean[channel]) / std[channel]);
                            }
                        }
                    }
                }
            }
        }
        let shape = (positions.len(), vision.patch_values());
        (Tensor::from_vec(values, shape, &Device::Cpu).expect("patches"), positions)
    }

    /// `get_vision_window_index`, with its padding and all.
    fn windows(&self, [t, h, w]: [usize; 3]) -> (Vec<usize>, Vec<usize>) {
        let vision = &self.config.vision;
        let side = vision.window_size / vision.spatial_merge_size / vision.patch_size;
        let (h, w) = (h / vision.spatial_merge_size, w / vision.spatial_merge_size);
        let (num_h, num_w) = ((h + side - h % side) / side, (w + side - w % side) / side);
        let (mut index, mut cu_seqlens) = (Vec::new(), vec![0]);
        for time in 0..t {
            for (window_h, window_w) in (0..num_h).flat_map(|y| (0..num_w).map(move |x| (y, x))) {
                for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
                    let (y, x) = (window_h * side + y, window_w * side + x);
                    if y < h && x < w {
                        index.push((time * h + y) * w + x);
                    }
                }
                cu_seqlens.push(index.len() * vision.merge_unit());
            }
        }
        cu_seqlens.dedup();
        (index, cu_seqlens)
    }

    fn try_hidden(&self, prompt: &Prompt) -> Result<Tensor> {
        let text = &self.config.text;
        let (heads, kv_heads, head_dim) =
            (text.num_attention_heads, text.num_key_value_heads, text.head_dim());
        let ids = Tensor::new(prompt.token_ids.clone(), &Device::Cpu)?;
        let mut x = self.get("model.embed_tokens.weight").index_select(&ids, 0)?;
        if !prompt.pictures.is_empty() {
            let features: Vec<Tensor> =
                prompt.pictures.iter().map(|picture| self.try_features(picture)).collect::<Result<_>>()?;
            let features = Tensor::cat(&features, 0)?;
            let mut next = 0;
            let rows: Vec<Tensor> = (0..prompt.token_ids.len())
                .map(|i| {
                    if prompt.token_ids[i] != self.config.image_token_id {
                        return x.i(i..i + 1);
                    }
                    next += 1;
                    features.i(next - 1..next)
                })
                .collect::<Result<_>>()?;
            x = Tensor::cat(&rows, 0)?;
        }
        let angles = self.text_angles(prompt)?;
        let n = prompt.token_ids.len();
        let mask: Vec<f32> =
            (0..n * n).map(|i| if i % n > i / n { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?;
        for layer in 0..text.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            let h = self.norm(&x, &format!("{prefix}.input_layernorm"), text.rms_norm_eps)?;
            let project = |name: &str, num: usize| {
                self.linear(&h, &format!("{prefix}.self_attn.{name}"))?.reshape((n, num, head_dim))
            };
            let scale = text.yarn.map_or(1.0, |yarn| yarn.attention_factor);
            let q = (rotate(&project("q_proj", heads)?, &angles)? * scale)?;
            let k = (rotate(&project("k_proj", kv_heads)?, &angles)? * scale)?;
            let v = project("v_proj", kv_heads)?;
            let attended: Vec<Tensor> = (0..heads)
                .map(|head| {
                    let kv = head / (heads / kv_heads);
                    attend(&q.i((.., head))?, &k.i((.., kv))?, &v.i((.., kv))?, Some(&mask))
                })
                .collect::<Result<_>>()?;
            let attended = Tensor::cat(&attended, 1)?;
            x = (x + self.linear(&attended, &format!("{prefix}.self_attn.o_proj"))?)?;
            let h = self.norm(&x, &format!("{prefix}.post_attention_layernorm"), text.rms_norm_eps)?;
            x = (x + self.mlp(&h, &format!("{prefix}.mlp"))?)?;
        }
        self.norm(&x, "model.norm", text.rms_norm_eps)
    }

    /// `[tokens, head_dim / 2]`.
    fn text_angles(&self, prompt: &Prompt) -> Result<Tensor> {
        let text = &self.config.text;
        let half = text.head_dim() / 2;
        let mut axes = Vec::new();
        for (section, &len) in text.mrope_section.iter().enumerate() {
            axes.extend(vec![section % 3; len]);
        }
        let frequency = |i: usize| {
            let exponent = (2 * i) as f32 / (2 * half) as f32;
            let plain = 1.0 / (text.rope_theta as f32).powf(exponent);
            text.yarn.map_or(plain, |yarn| stretched(plain, i, 2 * half, text.rope_theta, &yarn))
        };
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles: Vec<f32> = prompt
            .positions
            .iter()
            .flat_map(|position| {
                let (axes, frequencies) = (&axes, &frequencies);
                (0..half).map(move |i| position[axes[i]] as f32 * frequencies[i])
            })
            .collect();
        Tensor::from_vec(angles, (prompt.positions.len(), half), &Device::Cpu)
    }
}

/// `_compute_yarn_parameters`: frequency `i` of a head of `dim`, whose plain value is given.
fn stretched(plain: f32, i: usize, dim: usize, theta: f64, yarn: &Yarn) -> f32 {
    let correction_dim = |num_rotations: f64| {
        let length = yarn.original_max_position_embeddings as f64;
        dim as f64 * (length / (num_rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    };
    let (low, high) = (correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow));
    assert!(yarn.truncate, "no checkpoint here asks for the other");
    let (low, high) = (low.floor().max(0.0), high.ceil().min(dim as f64 - 1.0));
    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
    (f64::from(plain) * (ramp / yarn.factor + (1.0 - ramp))) as f32
}

/// `x * cos + rotate_half(x) * sin`, for `x` of `[n, heads, head_dim]` and angles of `[n, head_dim / 2]`.
fn rotate(x: &Tensor, angles: &Tensor) -> Result<Tensor> {
    let angles = Tensor::cat(&[angles, angles], 1)?.unsqueeze(1)?;
    let half = x.dim(2)? / 2;
    let rotated = Tensor::cat(&[&x.i((.., .., half..))?.neg()?, &x.i((.., .., ..half))?], 2)?;
    x.broadcast_mul(&angles.cos()?)? + rotated.broadcast_mul(&angles.sin()?)?
}

/// Attention of one head, `[n, head_dim]` each.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(1)? as f64).sqrt();
    let mut scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? * scale)?;
    if let Some(mask) = mask {
        scores = (scores + mask)?;
    }
    let max = scores.max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&max)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v.contiguous()?)
}

/// Attention of the vision tower: `qkv` is `[n, 3 * heads * head_dim]`, `bounds` are of windows.
fn attend_within(qkv: &Tensor, heads: usize, angles: &Tensor, bounds: &[usize]) -> Result<Tensor> {
    let (n, width) = qkv.dims2()?;
    let head_dim = width / 3 / heads;
    let qkv = qkv.reshape((n, 3, heads, head_dim))?;
    let q = rotate(&qkv.i((.., 0))?, angles)?;
    let k = rotate(&qkv.i((.., 1))?, angles)?;
    let v = qkv.i((.., 2))?;
    let windows: Vec<Tensor> = bounds
        .windows(2)
        .map(|window| {
            let rows = window[0]..window[1];
            let of_heads: Vec<Tensor> = (0..heads)
                .map(|head| {
                    let of = |x: &Tensor| x.i((rows.clone(), head));
                    attend(&of(&q)?, &of(&k)?, &of(&v)?, None)
                })
                .collect::<Result<_>>()?;
            Tensor::cat(&of_heads, 1)
        })
        .collect::<Result<_>>()?;
    Tensor::cat(&windows, 0)
}
