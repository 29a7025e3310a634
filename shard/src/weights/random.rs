//! Small random checkpoints in the Hugging Face layout: for tests, never for answers.

use std::fs;
use std::io;
use std::path::Path;

use half::bf16;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

/// Dimensions of a random checkpoint. Names are those of `config.json`.
#[derive(Clone, Debug)]
pub struct RandomModel {
    /// Tokens, control tokens included.
    pub vocab_size: usize,
    /// Width of the text model.
    pub hidden_size: usize,
    /// Its layers.
    pub num_hidden_layers: usize,
    /// Its query heads.
    pub num_attention_heads: usize,
    /// Its heads of keys and values.
    pub num_key_value_heads: usize,
    /// Width of its MLP.
    pub intermediate_size: usize,
    /// Width of the vision tower.
    pub vision_hidden_size: usize,
    /// Its blocks.
    pub vision_depth: usize,
    /// Its heads.
    pub vision_num_heads: usize,
    /// Width of its MLP.
    pub vision_intermediate_size: usize,
    /// Seed of the weights.
    pub seed: u64,
}

/// Pixels in a patch times channels: 2 frames of 14 x 14 in RGB.
const PATCH_ELEMENTS: [usize; 4] = [3, 2, 14, 14];
/// Patches that are merged into a token.
const MERGED_PATCHES: usize = 4;

impl RandomModel {
    /// Writes `model.safetensors` in bf16 to `folder`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_weights(&self, folder: &Path) -> io::Result<()> {
        let mut random = SmallRng::seed_from_u64(self.seed);
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .shapes()
            .into_iter()
            .map(|(name, shape)| {
                let data = fill(&mut random, &name, &shape);
                (name, shape, data)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, data)| {
            let view = TensorView::new(Dtype::BF16, shape.clone(), data).map_err(io::Error::other)?;
            Ok((name.as_str(), view))
        });
        let views = views.collect::<io::Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, None).map_err(io::Error::other)?;
        fs::write(folder.join("model.safetensors"), bytes)
    }

    /// Names and shapes of all tensors, as released checkpoints have them.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut shapes = Vec::new();
        self.vision_shapes(&mut shapes);
        self.text_shapes(&mut shapes);
        shapes
    }

    fn vision_shapes(&self, shapes: &mut Vec<(String, Vec<usize>)>) {
        let (width, mlp) = (self.vision_hidden_size, self.vision_intermediate_size);
        let joined = MERGED_PATCHES * width;
        let mut patch = vec![width];
        patch.extend(PATCH_ELEMENTS);
        shapes.push(("visual.patch_embed.proj.weight".to_owned(), patch));
        for block in 0..self.vision_depth {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("visual.blocks.{block}.{name}"), shape.to_vec()));
            };
            add("norm1.weight", &[width]);
            add("norm2.weight", &[width]);
            for (name, outputs, inputs) in [
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.gate_proj", mlp, width),
                ("mlp.up_proj", mlp, width),
                ("mlp.down_proj", width, mlp),
            ] {
                add(&format!("{name}.weight"), &[outputs, inputs]);
                add(&format!("{name}.bias"), &[outputs]);
            }
        }
        shapes.push(("visual.merger.ln_q.weight".to_owned(), vec![width]));
        for (layer, outputs) in [(0, joined), (2, self.hidden_size)] {
            shapes.push((format!("visual.merger.mlp.{layer}.weight"), vec![outputs, joined]));
            shapes.push((format!("visual.merger.mlp.{layer}.bias"), vec![outputs]));
        }
    }

    fn text_shapes(&self, shapes: &mut Vec<(String, Vec<usize>)>) {
        let hidden = self.hidden_size;
        let kv = hidden / self.num_attention_heads * self.num_key_value_heads;
        shapes.push(("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden]));
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[hidden]);
            add("post_attention_layernorm.weight", &[hidden]);
            for (name, outputs) in [("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)] {
                add(&format!("self_attn.{name}.weight"), &[outputs, hidden]);
                add(&format!("self_attn.{name}.bias"), &[outputs]);
            }
            add("self_attn.o_proj.weight", &[hidden, hidden]);
            add("mlp.gate_proj.weight", &[self.intermediate_size, hidden]);
            add("mlp.up_proj.weight", &[self.intermediate_size, hidden]);
            add("mlp.down_proj.weight", &[hidden, self.intermediate_size]);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
        shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
    }
}

/// Norms start at one; biases are small; matrices keep the variance of their input.
fn fill(random: &mut SmallRng, name: &str, shape: &[usize]) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let fan_in: usize = shape[1..].iter().product();
    let is_norm = name.contains("norm") || name.ends_with("ln_q.weight");
    let scale = match shape.len() {
        1 => 0.02,
        _ => (3.0 / fan_in as f32).sqrt(),
    };
    let mut bytes = Vec::with_capacity(2 * count);
    for _ in 0..count {
        let uniform: f32 = random.random_range(-1.0..1.0);
        let value = if is_norm { 1.0 } else { scale * uniform };
        bytes.extend(bf16::from_f32(value).to_le_bytes());
    }
    bytes
}
