//! How positions turn queries and keys: `rope_scaling` or `rope_parameters`.

use super::fields::Fields;

/// YaRN (Peng et al., 2023) as transformers computes it: slow frequencies are divided by the factor, fast ones stay, those
/// between are mixed, and cosines and sines are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context becomes; at least 1.
    pub factor: f64,
    /// Tokens of the context that the model was trained on.
    pub original_max_position_embeddings: usize,
    /// Frequencies that turn more often than this within the original context stay as they are.
    pub beta_fast: f64,
    /// Frequencies that turn less often are divided by the factor.
    pub beta_slow: f64,
    /// Whether the bounds between them are rounded outwards to whole frequencies.
    pub truncate: bool,
    /// What cosines and sines are multiplied by.
    pub attention_factor: f64,
}

impl Yarn {
    /// Tokens of the context that it makes.
    pub fn context_tokens(&self) -> usize {
        // A saturating cast: a context beyond every integer is as good as the largest.
        (self.factor * self.original_max_position_embeddings as f64) as usize
    }
}

/// What the language model's rotary embedding is made from.
pub(super) struct TextRope {
    pub(super) theta: f64,
    pub(super) mrope_section: Vec<usize>,
    pub(super) yarn: Option<Yarn>,
}

/// `0.1 mscale ln(scale) + 1`, the paper's equation 22.
fn mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

impl Fields<'_, '_> {
    /// The rotary embedding of the language model, whose fields these are.
    pub(super) fn text_rope(&mut self, max_position_embeddings: usize) -> TextRope {
        let outer_theta = self.number("rope_theta", 1e6);
        // As the reference has it, the older field wins where both are present.
        let field = if self.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
        if self.get(field).is_none() {
            return TextRope { theta: outer_theta, mrope_section: vec![16, 24, 24], yarn: None };
        }
        let outer_context = self.get("original_max_position_embeddings").cloned();
        let mut rope = self.nested(field);
        rope.rope_type(&["default", "mrope", "yarn"]);
        let is_yarn = rope.is_yarn();
        if is_yarn && outer_context.as_ref() != rope.get("original_max_position_embeddings") {
            // The reference reads the one or the other by the layout of the file.
            if let Some(other) = outer_context {
                rope.fault(
                    "original_max_position_embeddings",
                    format!("differs from {other} outside of {field}"),
                );
            }
        }
        TextRope {
            theta: rope.number("rope_theta", outer_theta),
            mrope_section: rope.sizes("mrope_section", &[16, 24, 24]),
            yarn: is_yarn.then(|| rope.yarn(max_position_embeddings)),
        }
    }

    /// Refuses a type that is not supported. Where both fields are present the newer one counts and the older one may only
    /// say what kind of model it is.
    pub(super) fn rope_type(&mut self, supported: &[&str]) {
        for field in ["rope_type", "type"] {
            let Some(value) = self.get(field) else { continue };
            if !value.as_str().is_some_and(|kind| supported.contains(&kind)) {
                let problem = format!("{value} is not supported yet; {supported:?} are");
                self.fault(field, problem);
            }
        }
    }

    fn is_yarn(&mut self) -> bool {
        let yarn = |field| self.get(field).map(|kind| kind.as_str() == Some("yarn"));
        let (newer, older) = (yarn("rope_type"), yarn("type"));
        if newer == Some(false) && older == Some(true) {
            // The reference would not stretch anything, which is hardly what was meant.
            self.fault("type", "is \"yarn\", and rope_type is not");
        }
        newer.or(older).unwrap_or(false)
    }

    fn yarn(&mut self, max_position_embeddings: usize) -> Yarn {
        let original = self.size("original_max_position_embeddings", Some(max_position_embeddings));
        let ratio = max_position_embeddings as f64 / original as f64;
        if self.map.is_some_and(|map| !map.contains_key("factor")) {
            self.fault("factor", "is missing");
        }
        // A factor of null asks for the ratio of the two contexts.
        let factor = self.number("factor", ratio);
        if factor < 1.0 {
            self.fault("factor", format!("{factor} is less than 1"));
        }
        let (beta_fast, beta_slow) = (self.number("beta_fast", 32.0), self.number("beta_slow", 1.0));
        if beta_fast < beta_slow {
            self.fault("beta_fast", format!("{beta_fast} is less than beta_slow, {beta_slow}"));
        }
        if self.number("partial_rotary_factor", 1.0) != 1.0 {
            self.fault("partial_rotary_factor", "is not supported: M-RoPE turns whole heads");
        }
        // Either of the two alone is ignored, as the reference does.
        let scales = ["mscale", "mscale_all_dim"].map(|field| self.number(field, 1.0));
        let both = self.get("mscale").is_some() && self.get("mscale_all_dim").is_some();
        let scales = if both { scales } else { [1.0, 0.0] };
        let inferred = mscale(factor, scales[0]) / mscale(factor, scales[1]);
        Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            truncate: self.get("truncate").is_none() || self.flag("truncate"),
            attention_factor: self.number("attention_factor", inferred),
        }
    }
}
