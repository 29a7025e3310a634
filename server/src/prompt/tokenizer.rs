//! The checkpoint's tokenizer, in two halves: one for text, which knows no control token, and the table of control
//! tokens.
//!
//! Taking the control tokens out of the tokenizer is what makes user text safe: a flag such as
//! `encode_special_tokens` is not enough, because some of the added tokens of Qwen2.5 are not "special".

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::vocabulary::Vocabulary;

/// Token ids above this are refused: the tables by id would be absurdly large.
const MAX_TOKEN_ID: u64 = (1 << 24) - 1;

/// Words of which each thread that encodes keeps the tokens: the first ones that it meets. Ten times as many, as the library would
/// keep, are megabytes a thread.
const KEPT_WORDS: usize = 1_024;

/// A token that stands beside the vocabulary: a control token.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct AddedToken {
    /// Its id.
    #[serde(default)]
    pub id: u32,
    /// How it is written in templates.
    pub content: String,
    /// Whether it is left out of the text of answers.
    #[serde(default)]
    pub special: bool,
    /// Whether it matches only as a whole word.
    #[serde(default)]
    pub single_word: bool,
    /// Whether it takes the white space before it.
    #[serde(default)]
    pub lstrip: bool,
    /// Whether it takes the white space after it.
    #[serde(default)]
    pub rstrip: bool,
}

/// What is wrong with a tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct TokenizerFault {
    /// The field of `tokenizer.json`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Encodes text without control tokens, and names the control tokens.
#[derive(Debug, Clone)]
pub struct PromptTokenizer {
    plain: Tokenizer,
    /// By id.
    controls: BTreeMap<u32, AddedToken>,
    vocabulary: Arc<Vocabulary>,
}

impl PromptTokenizer {
    /// Builds the two halves from the content of `tokenizer.json` and from the tokens that
    /// `tokenizer_config.json` adds to it. Returns all faults at once.
    pub fn from_json(mut json: Value, more_added: &[AddedToken]) -> Result<Self, Vec<TokenizerFault>> {
        let mut faults = Faults::default();
        faults.check_kind(&json, "model", "BPE");
        faults.check_kind(&json, "decoder", "ByteLevel");
        let controls = faults.controls(&json, more_added);
        let vocabulary = faults.vocabulary(&json, &controls);
        for (field, empty) in [
            ("added_tokens", Value::Array(Vec::new())),
            ("post_processor", Value::Null),
            ("truncation", Value::Null),
            ("padding", Value::Null),
        ] {
            json[field] = empty;
        }
        let plain = serde_json::to_vec(&json).map_err(|error| error.to_string());
        let plain = plain.and_then(|text| Tokenizer::from_bytes(text).map_err(|error| error.to_string()));
        match plain {
            Ok(mut plain) if faults.0.is_empty() => {
                let mut model = plain.get_model().clone();
                model.resize_cache(KEPT_WORDS);
                plain.with_model(model);
                Ok(Self { plain, controls, vocabulary: Arc::new(vocabulary) })
            }
            Ok(_) => Err(faults.0),
            Err(problem) => {
                faults.push("(the whole)", problem);
                Err(faults.0)
            }
        }
    }

    /// Encodes text, in which no control token is known.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, String> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding = self.plain.encode_fast(text, false).map_err(|error| error.to_string())?;
        match encoding.get_ids().iter().find(|id| self.controls.contains_key(id)) {
            Some(id) => Err(format!("text was encoded as the control token {id}")),
            None => Ok(encoding.get_ids().to_vec()),
        }
    }

    /// The id of a control token, by how it is written.
    pub fn control_id(&self, content: &str) -> Option<u32> {
        self.controls.values().find(|token| token.content == content).map(|token| token.id)
    }

    /// All control tokens, by id.
    pub fn controls(&self) -> impl Iterator<Item = &AddedToken> {
        self.controls.values()
    }

    /// The bytes of every token.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }
}

/// Collects what is wrong, so that all of it is said at once.
#[derive(Default)]
struct Faults(Vec<TokenizerFault>);

impl Faults {
    fn push(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        self.0.push(TokenizerFault { field: field.into(), problem: problem.into() });
    }

    fn check_kind(&mut self, json: &Value, field: &str, wanted: &str) {
        let kind = json[field]["type"].as_str();
        // Older files leave the type of a BPE model out.
        if kind != Some(wanted) && !(field == "model" && kind.is_none() && json[field].is_object()) {
            self.push(
                format!("{field}.type"),
                format!("is {}; only {wanted:?} is supported", json[field]["type"]),
            );
        }
    }

    /// The union of the added tokens of both files.
    fn controls(&mut self, json: &Value, more_added: &[AddedToken]) -> BTreeMap<u32, AddedToken> {
        let mut controls: BTreeMap<u32, AddedToken> = BTreeMap::new();
        let own = match &json["added_tokens"] {
            Value::Null => Vec::new(),
            tokens => serde_json::from_value(tokens.clone()).unwrap_or_else(|error| {
                self.push("added_tokens", error.to_string());
                Vec::new()
            }),
        };
        for token in own.iter().chain(more_added) {
            let field = format!("added_tokens[{}]", token.id);
            let other =
                controls.values().find(|other| other.content == token.content && other.id != token.id);
            if let Some(other) = other {
                self.push(field, format!("{:?} has the ids {} and {}", token.content, other.id, token.id));
            } else if let Some(other) = controls.get(&token.id).filter(|other| other.content != token.content)
            {
                self.push(field, format!("is both {:?} and {:?}", other.content, token.content));
            } else if token.lstrip || token.rstrip || token.single_word {
                self.push(field, "lstrip, rstrip and single_word are not supported");
            } else if u64::from(token.id) > MAX_TOKEN_ID {
                self.push(field, format!("the id is above {MAX_TOKEN_ID}"));
            } else {
                controls.insert(token.id, token.clone());
            }
        }
        controls
    }

    fn vocabulary(&mut self, json: &Value, controls: &BTreeMap<u32, AddedToken>) -> Vocabulary {
        let no_tokens = serde_json::Map::new();
        let tokens = json["model"]["vocab"].as_object().unwrap_or(&no_tokens);
        if tokens.is_empty() {
            self.push("model.vocab", "is missing or empty");
        }
        let mut base = Vec::with_capacity(tokens.len());
        for (token, id) in tokens {
            match id.as_u64().filter(|id| *id <= MAX_TOKEN_ID) {
                // A base token with the id of a control token is that control token, in files that list them twice.
                Some(id) if controls.contains_key(&(id as u32)) => {}
                Some(id) => base.push((token.as_str(), id as u32)),
                None => self.push(
                    format!("model.vocab[{token:?}]"),
                    format!("is {id}, not a token id up to {MAX_TOKEN_ID}"),
                ),
            }
        }
        let added = controls.values().map(|token| (token.content.as_str(), token.id, token.special));
        Vocabulary::new(base.into_iter(), added)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Letters, the space and a few merges; `<tool>` is a control token that is not special.
    pub(crate) fn small_json() -> Value {
        let mut vocab = serde_json::Map::new();
        for (id, c) in ('!'..='~').chain(['Ġ', 'Ċ']).enumerate() {
            vocab.insert(c.to_string(), id.into());
        }
        vocab.insert("ab".into(), 96.into());
        json!({
            "version": "1.0",
            "added_tokens": [
                {"id": 97, "content": "<|end|>", "special": true, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false},
                {"id": 98, "content": "<tool>", "special": false, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false},
            ],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
        })
    }

    #[test]
    fn text_never_becomes_a_control_token() {
        let tokenizer = PromptTokenizer::from_json(small_json(), &[]).unwrap();
        let ids = tokenizer.encode_text("ab<tool><|end|>").unwrap();
        assert_eq!(ids[0], 96);
        assert!(ids.iter().all(|id| *id < 97), "{ids:?}");
        let bytes: Vec<u8> =
            ids.iter().flat_map(|id| tokenizer.vocabulary().text_bytes(*id)).copied().collect();
        assert_eq!(bytes, b"ab<tool><|end|>");
        assert_eq!(tokenizer.control_id("<tool>"), Some(98));
        assert_eq!(tokenizer.control_id("tool"), None);
    }

    #[test]
    fn adds_the_tokens_of_the_configuration() {
        let more: AddedToken =
            serde_json::from_value(json!({"id": 99, "content": "<more>", "special": true})).unwrap();
        let tokenizer = PromptTokenizer::from_json(small_json(), &[more]).unwrap();
        assert_eq!(tokenizer.control_id("<more>"), Some(99));
        assert_eq!(tokenizer.vocabulary().len(), 100);
    }

    #[test]
    fn reports_all_faults_at_once() {
        let mut json = small_json();
        json["decoder"] = Value::Null;
        json["added_tokens"][0]["lstrip"] = true.into();
        json["model"]["vocab"]["a"] = "x".into();
        let clash: AddedToken = serde_json::from_value(json!({"id": 98, "content": "<other>"})).unwrap();
        let faults = PromptTokenizer::from_json(json, &[clash]).unwrap_err();
        let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
        for field in ["decoder.type", "added_tokens[97]", "added_tokens[98]", "model.vocab[\"a\"]"] {
            assert!(fields.contains(&field), "{field} in {faults:?}");
        }
    }
}
