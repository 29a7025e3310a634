//! The language model: `model.*` of the checkpoint.

use std::sync::Arc;

use crate::config::TextConfig;
use crate::device::{Activations, AttentionHeads, Device, Result, SequenceRows, StepRows};
use crate::layers::vocabulary::VocabSlice;
use crate::layers::{
    GatedMlp, HeadRange, LinearSpec, Parallel, QkvParallel, RowParallel, VocabParallelEmbedding, partition,
};
use crate::model::rope::MRope;
use crate::weights::Loader;

/// What one step computes: rows of several sequences, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The token of each row.
    pub token_ids: Vec<u32>,
    /// Rows whose token is a candidate of the step before: `(row, row of candidates)`.
    pub drawn: Vec<(u32, u32)>,
    /// The position of each row: time, height, width.
    pub positions: Vec<[u32; 3]>,
    /// Where each row's keys and values go: `block * KV_BLOCK_TOKENS + offset`.
    pub slots: Vec<u32>,
    /// Rows that are vision features instead of embeddings, and their slots: `(row, slot)`.
    pub features: Vec<(u32, u32)>,
    /// The sequences; their rows cover all rows.
    pub sequences: Vec<SequenceRows>,
    /// Rows after which a token is drawn.
    pub sample_rows: Vec<u32>,
}

/// The language model, without its head.
pub struct TextModel<D: Device> {
    embed_tokens: VocabParallelEmbedding<D>,
    layers: Vec<DecoderLayer<D>>,
    norm: D::Norm,
    rotary_emb: MRope,
    heads: AttentionHeads,
}

impl<D: Device> TextModel<D> {
    /// Loads `model.*` around a table of embeddings.
    pub fn load(
        loader: &mut Loader<'_, D>,
        config: &TextConfig,
        embed_tokens: Arc<VocabSlice<D>>,
        parallel: Parallel,
    ) -> Result<Self> {
        let head_dim = config.head_dim();
        let (num_query, num_kv) = (config.num_attention_heads, config.num_key_value_heads);
        let heads = partition::heads(num_query, num_kv, parallel.world_size)[parallel.rank].clone();
        let layers = (0..config.num_hidden_layers)
            .map(|i| DecoderLayer::load(loader, &format!("model.layers.{i}"), config, &heads, parallel))
            .collect::<Result<_>>()?;
        Ok(Self {
            embed_tokens: VocabParallelEmbedding::new(embed_tokens, parallel),
            layers,
            norm: loader.norm("model.norm", config.hidden_size, config.rms_norm_eps)?,
            rotary_emb: MRope::new(config),
            heads: heads.attention_heads(num_query, num_kv, head_dim),
        })
    }

    /// The heads that keys and values are kept of.
    pub fn heads(&self) -> &AttentionHeads {
        &self.heads
    }

    /// The normed hidden state of `batch.sample_rows`, `[sample rows, hidden]`, and a hash of that of all rows. Appends keys and
    /// values of all rows to the cache.
    pub fn forward(
        &self,
        device: &D,
        batch: &Batch,
        cache: &mut D::KvCache,
        features: &D::Features,
    ) -> Result<(D::Tensor, D::Hash)> {
        let Batch { token_ids, drawn, slots, sequences, .. } = batch;
        // cos, sin: [rows, head_dim / 2]
        let (cos, sin) = self.rotary_emb.tables(device, &batch.positions)?;
        let rows =
            device.rows(StepRows { token_ids, drawn, slots, sequences, heads: &self.heads, cos, sin })?;
        let h = if batch.features.is_empty() {
            device.replay(&rows, || self.hidden(device, &rows, cache, features, &[]))?
        } else {
            self.hidden(device, &rows, cache, features, &batch.features)?
        };
        let hash = device.hash(&h, 0..h.rows())?;
        Ok((device.gather_rows(&h, &batch.sample_rows)?, hash)) // [sample rows, hidden]
    }

    /// The normed hidden state of all rows, `[rows, hidden]`.
    fn hidden(
        &self,
        device: &D,
        rows: &D::Rows,
        cache: &mut D::KvCache,
        features: &D::Features,
        feature_rows: &[(u32, u32)],
    ) -> Result<D::Tensor> {
        let x = self.embed_tokens.forward(device, rows, features, feature_rows)?; // [rows, hidden]
        let first_norm = self.layers.first().map_or(&self.norm, |layer| &layer.input_layernorm);
        let (mut h, mut residual) = device.reduce_residual_norm(x, None, first_norm)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let next_norm = self.layers.get(i + 1).map_or(&self.norm, |next| &next.input_layernorm);
            let x = layer.self_attn.forward(device, &h, &self.heads, rows, cache, i)?;
            drop(h);
            (h, residual) =
                device.reduce_residual_norm(x, Some(residual), &layer.post_attention_layernorm)?;
            let x = layer.mlp.forward(device, &h)?;
            drop(h);
            (h, residual) = device.reduce_residual_norm(x, Some(residual), next_norm)?;
        }
        Ok(h)
    }
}

struct DecoderLayer<D: Device> {
    input_layernorm: D::Norm,
    self_attn: Attention<D>,
    post_attention_layernorm: D::Norm,
    mlp: GatedMlp<D>,
}

impl<D: Device> DecoderLayer<D> {
    fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        config: &TextConfig,
        heads: &HeadRange,
        parallel: Parallel,
    ) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let sizes = [hidden, config.intermediate_size];
        Ok(Self {
            input_layernorm: loader.norm(&format!("{prefix}.input_layernorm"), hidden, eps)?,
            self_attn: Attention::load(loader, &format!("{prefix}.self_attn"), config, heads, parallel)?,
            post_attention_layernorm: loader.norm(
                &format!("{prefix}.post_attention_layernorm"),
                hidden,
                eps,
            )?,
            mlp: GatedMlp::load(loader, &format!("{prefix}.mlp"), sizes, false, parallel)?,
        })
    }
}

struct Attention<D: Device> {
    qkv_proj: QkvParallel<D>,
    o_proj: RowParallel<D>,
}

impl<D: Device> Attention<D> {
    fn load(
        loader: &mut Loader<'_, D>,
        prefix: &str,
        config: &TextConfig,
        heads: &HeadRange,
        parallel: Parallel,
    ) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        let num_heads = [config.num_attention_heads, config.num_key_value_heads];
        let qkv_proj = QkvParallel::load(loader, prefix, hidden, num_heads, heads, head_dim)?;
        let o_proj = format!("{prefix}.o_proj");
        let o_proj = LinearSpec { prefix: &o_proj, outputs: hidden, inputs: hidden, bias: false };
        let o_proj = RowParallel::load_heads(loader, o_proj, heads, head_dim, parallel)?;
        Ok(Self { qkv_proj, o_proj })
    }

    /// `[rows, hidden] -> [rows, hidden]`, to be reduced.
    fn forward(
        &self,
        device: &D,
        x: &D::Tensor,
        heads: &AttentionHeads,
        rows: &D::Rows,
        cache: &mut D::KvCache,
        layer: usize,
    ) -> Result<D::Tensor> {
        let mut qkv = self.qkv_proj.forward(device, x)?; // [rows, (num_query + 2 num_kv) * head_dim]
        device.rotary_append(&mut qkv, heads, rows, cache, layer)?;
        // [rows, num_query * head_dim]
        let attended = device.paged_attention(&qkv, heads, rows, cache, layer)?;
        drop(qkv);
        self.o_proj.forward(device, &attended)
    }
}
