//! The tokenizer-side files of a model folder: tokenizer, chat template, generation defaults, picture processor.
//!
//! The model's own `config.json` is the shards' to read: they describe the model to the server.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::media::PictureProcessor;
use crate::prompt::{AddedToken, ChatTemplate, PromptTokenizer, SpecialTokens};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE_JINJA: &str = "chat_template.jinja";
const TEMPLATE_JSON: &str = "chat_template.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";
const PROCESSOR_CONFIG: &str = "processor_config.json";

/// The tokens of `tokenizer_config.json` that templates may name.
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

/// One thing that is wrong with a model folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointFault {
    /// The file's name in the folder.
    pub file: String,
    /// The field in it; empty if the file as a whole is at fault.
    pub field: String,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for CheckpointFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field.as_str() {
            "" => write!(f, "{}: {}", self.file, self.problem),
            field => write!(f, "{}: {field}: {}", self.file, self.problem),
        }
    }
}

/// Everything that is wrong with a model folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointError {
    /// The folder.
    pub folder: PathBuf,
    /// At least one.
    pub faults: Vec<CheckpointFault>,
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the model folder {} cannot be served:", self.folder.display())?;
        self.faults.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for CheckpointError {}

/// How tokens are drawn when a request does not say, and which tokens end an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// Tokens that end an answer, without repetitions.
    pub eos_token_ids: Vec<u32>,
    /// 0 is greedy: what the reference does unless `do_sample` is set. `None` if the file says nothing.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 is all.
    pub top_k: Option<u32>,
    /// Above 0; 1 is none.
    pub repetition_penalty: Option<f32>,
}

/// What the server reads of a model folder.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// The folder.
    pub folder: PathBuf,
    /// The tokenizer.
    pub tokenizer: PromptTokenizer,
    /// The chat template.
    pub template: ChatTemplate,
    /// Defaults of sampling, and end tokens.
    pub generation: GenerationDefaults,
    /// How pictures are sized and normalized.
    pub picture: PictureProcessor,
}

impl ModelFiles {
    /// Reads and checks the files. Reports everything that is wrong with them at once.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let mut reader = Reader { folder, faults: Vec::new() };
        let config = reader.tokenizer_config();
        let tokenizer = reader.tokenizer(&config);
        let template = reader.template(&config);
        let generation = reader.generation(&config, tokenizer.as_ref());
        let picture = reader.picture();
        match (tokenizer, template, picture) {
            (Some(tokenizer), Some(template), Some(picture)) if reader.faults.is_empty() => {
                Ok(Self { folder: folder.to_owned(), tokenizer, template, generation, picture })
            }
            _ => Err(CheckpointError { folder: folder.to_owned(), faults: reader.faults }),
        }
    }
}

/// What is used of `tokenizer_config.json`.
#[derive(Default)]
struct TokenizerConfig {
    added_tokens: Vec<AddedToken>,
    special_tokens: SpecialTokens,
    chat_template: Value,
}

/// A file's JSON, or the object at one field of it.
#[derive(Clone, Copy)]
struct Section<'j> {
    file: &'static str,
    /// Where the object stands in the file; empty for the whole.
    prefix: &'static str,
    json: &'j Value,
}

impl<'j> Section<'j> {
    fn whole(file: &'static str, json: &'j Value) -> Self {
        Self { file, prefix: "", json }
    }

    fn value(&self, path: &str) -> &'j Value {
        path.split('.').fold(self.json, |value, key| &value[key])
    }

    fn name(&self, path: &str) -> String {
        if self.prefix.is_empty() { path.to_owned() } else { format!("{}.{path}", self.prefix) }
    }
}

/// Reads files and collects their faults.
struct Reader<'a> {
    folder: &'a Path,
    faults: Vec<CheckpointFault>,
}

impl Reader<'_> {
    fn fault(&mut self, file: &str, field: impl Into<String>, problem: impl ToString) {
        let problem = problem.to_string();
        self.faults.push(CheckpointFault { file: file.into(), field: field.into(), problem });
    }

    /// The text of a file, or `None` if there is no such file or it could not be read, which is a fault.
    fn text(&mut self, file: &str) -> Option<String> {
        match fs::read_to_string(self.folder.join(file)) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.fault(file, "", error);
                None
            }
        }
    }

    /// The object in a JSON file, or `None` as for [`Self::text`].
    fn json(&mut self, file: &str) -> Option<Value> {
        let text = self.text(file)?;
        match serde_json::from_str(&text) {
            Ok(json @ Value::Object(_)) => Some(json),
            Ok(_) => {
                self.fault(file, "", "is not a JSON object");
                None
            }
            Err(error) => {
                self.fault(file, "", format!("is not valid JSON: {error}"));
                None
            }
        }
    }

    fn required_json(&mut self, file: &str) -> Option<Value> {
        if !self.folder.join(file).exists() {
            self.fault(file, "", "is missing");
            return None;
        }
        self.json(file)
    }

    /// A field, named by its path with dots, or `None` if it is missing or null, or of another type, which is a fault.
    fn field<T: DeserializeOwned>(&mut self, section: Section, path: &str) -> Option<T> {
        let value = section.value(path);
        if value.is_null() {
            return None;
        }
        match serde_json::from_value(value.clone()) {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(section.file, section.name(path), error);
                None
            }
        }
    }

    /// A field that must satisfy `check`; `wanted` says what that is.
    fn checked<T: DeserializeOwned>(
        &mut self,
        section: Section,
        path: &str,
        wanted: &str,
        check: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let value = self.field(section, path)?;
        if check(&value) {
            return Some(value);
        }
        let problem = format!("is {}, not {wanted}", section.value(path));
        self.fault(section.file, section.name(path), problem);
        None
    }

    fn tokenizer_config(&mut self) -> TokenizerConfig {
        let Some(json) = self.required_json(TOKENIZER_CONFIG) else { return TokenizerConfig::default() };
        let added: BTreeMap<String, Value> =
            self.field(Section::whole(TOKENIZER_CONFIG, &json), "added_tokens_decoder").unwrap_or_default();
        let mut config =
            TokenizerConfig { chat_template: json["chat_template"].clone(), ..Default::default() };
        for (id, token) in added {
            let parsed = id.parse().map_err(|_| "is not a token id".to_owned());
            let token = parsed.and_then(|id| match serde_json::from_value(token) {
                Ok(token) => Ok(AddedToken { id, ..token }),
                Err(error) => Err(error.to_string()),
            });
            match token {
                Ok(token) => config.added_tokens.push(token),
                Err(problem) => self.fault(TOKENIZER_CONFIG, format!("added_tokens_decoder.{id}"), problem),
            }
        }
        for name in SPECIAL_TOKENS {
            // Written as a string, or as an object with the string in it.
            let content = json[name]["content"].as_str().or_else(|| json[name].as_str());
            if let Some(content) = content {
                config.special_tokens.insert(name.to_owned(), content.to_owned());
            }
        }
        config
    }

    fn tokenizer(&mut self, config: &TokenizerConfig) -> Option<PromptTokenizer> {
        let json = self.required_json(TOKENIZER)?;
        match PromptTokenizer::from_json(json, &config.added_tokens) {
            Ok(tokenizer) => Some(tokenizer),
            Err(faults) => {
                for fault in faults {
                    self.fault(TOKENIZER, fault.field, fault.problem);
                }
                None
            }
        }
    }

    /// The template of the first file that has one, in the reference's order.
    fn template(&mut self, config: &TokenizerConfig) -> Option<ChatTemplate> {
        let (file, source) = self.template_source(config)?;
        match ChatTemplate::new(&source, config.special_tokens.clone()) {
            Ok(template) => Some(template),
            Err(error) => {
                self.fault(file, if file == TEMPLATE_JINJA { "" } else { "chat_template" }, error);
                None
            }
        }
    }

    fn template_source(&mut self, config: &TokenizerConfig) -> Option<(&'static str, String)> {
        if let Some(source) = self.text(TEMPLATE_JINJA) {
            return Some((TEMPLATE_JINJA, source));
        }
        if let Some(json) = self.json(TEMPLATE_JSON) {
            let template = Section::whole(TEMPLATE_JSON, &json);
            return self
                .checked(template, "chat_template", "a template", |_| true)
                .map(|source| (TEMPLATE_JSON, source));
        }
        let templates = &config.chat_template;
        // Either the template, or a list of named ones.
        let named =
            || templates.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
        if let Some(source) = templates.as_str().or_else(named) {
            return Some((TOKENIZER_CONFIG, source.to_owned()));
        }
        let problem = format!("no chat template here, in {TEMPLATE_JINJA} or in {TEMPLATE_JSON}");
        self.fault(TOKENIZER_CONFIG, "chat_template", problem);
        None
    }

    fn generation(
        &mut self,
        config: &TokenizerConfig,
        tokenizer: Option<&PromptTokenizer>,
    ) -> GenerationDefaults {
        let json = self.json(GENERATION_CONFIG).unwrap_or_default();
        let file = Section::whole(GENERATION_CONFIG, &json);
        let mut defaults = GenerationDefaults {
            temperature: self.checked(file, "temperature", "from 0 to 100", |t| (0.0..=100.0).contains(t)),
            top_p: self.checked(file, "top_p", "above 0, at most 1", |p| *p > 0.0 && *p <= 1.0),
            top_k: self.field(file, "top_k"),
            repetition_penalty: self
                .checked(file, "repetition_penalty", "above 0, at most 100", |r| *r > 0.0 && *r <= 100.0),
            eos_token_ids: Vec::new(),
        };
        let samples: Option<bool> = self.field(file, "do_sample");
        if json.is_object() && samples != Some(true) {
            defaults.temperature = Some(0.0);
        }
        let eos: Vec<u32> = match json["eos_token_id"] {
            Value::Array(_) => self.field(file, "eos_token_id").unwrap_or_default(),
            _ => self.field(file, "eos_token_id").into_iter().collect(),
        };
        for id in eos {
            if !defaults.eos_token_ids.contains(&id) {
                defaults.eos_token_ids.push(id);
            }
        }
        if defaults.eos_token_ids.is_empty()
            && let Some(tokenizer) = tokenizer
        {
            let content = config.special_tokens.get("eos_token");
            match content.and_then(|content| tokenizer.control_id(content)) {
                Some(id) => defaults.eos_token_ids.push(id),
                None => {
                    let problem = format!(
                        "names no token that ends an answer, and {GENERATION_CONFIG} has no eos_token_id"
                    );
                    self.fault(TOKENIZER_CONFIG, "eos_token", problem);
                }
            }
        }
        defaults
    }

    /// The picture processor, from its own file or from the newer one that holds all processors.
    fn picture(&mut self) -> Option<PictureProcessor> {
        if self.folder.join(PREPROCESSOR_CONFIG).exists() {
            let json = self.json(PREPROCESSOR_CONFIG)?;
            return self.picture_processor(Section::whole(PREPROCESSOR_CONFIG, &json));
        }
        match self.json(PROCESSOR_CONFIG) {
            Some(json) if json["image_processor"].is_object() => self.picture_processor(Section {
                file: PROCESSOR_CONFIG,
                prefix: "image_processor",
                json: &json["image_processor"],
            }),
            _ => {
                let problem = format!("is missing, and {PROCESSOR_CONFIG} has no image_processor");
                self.fault(PREPROCESSOR_CONFIG, "", problem);
                None
            }
        }
    }

    fn picture_processor(&mut self, file: Section) -> Option<PictureProcessor> {
        let faults_before = self.faults.len();
        let defaults = PictureProcessor::default();
        for flag in ["do_resize", "do_rescale", "do_normalize"] {
            self.checked(file, flag, "true: nothing else is supported", |value| *value);
        }
        self.checked(file, "resample", "3 (bicubic)", |resample: &u64| *resample == 3);
        self.checked(file, "rescale_factor", "1/255", |factor: &f64| (factor - 1.0 / 255.0).abs() < 1e-9);
        let mut pixels = |older, newer, default| {
            let mut bound = |path| {
                self.checked(file, path, "from 1 to 2^32 - 1", |pixels: &u64| (1..1 << 32).contains(pixels))
            };
            // Both are looked at, so that the faults of both are reported; the older name counts, as in the reference.
            let (older, newer) = (bound(older), bound(newer));
            older.or(newer).unwrap_or(default)
        };
        let min_pixels = pixels("min_pixels", "size.shortest_edge", defaults.min_pixels);
        let max_pixels = pixels("max_pixels", "size.longest_edge", defaults.max_pixels);
        if min_pixels > max_pixels {
            let problem = format!("the least is {min_pixels} and the most {max_pixels} pixels");
            self.fault(file.file, file.name("min_pixels"), problem);
        }
        let mut side = |path, default| {
            self.checked(file, path, "from 1 to 1024", |side| (1..=1024).contains(side)).unwrap_or(default)
        };
        let is_positive = |values: &[f32; 3]| values.iter().all(|value| *value > 0.0 && value.is_finite());
        let processor = PictureProcessor {
            min_pixels,
            max_pixels,
            patch_size: side("patch_size", defaults.patch_size),
            merge_size: side("merge_size", defaults.merge_size),
            // Frames are taken two by two.
            temporal_patch_size: self
                .checked(file, "temporal_patch_size", "2", |frames| *frames == 2_u32)
                .unwrap_or(defaults.temporal_patch_size),
            image_mean: self
                .checked(file, "image_mean", "three numbers", |mean: &[f32; 3]| {
                    mean.iter().all(|m| m.is_finite())
                })
                .unwrap_or(defaults.image_mean),
            image_std: self
                .checked(file, "image_std", "three numbers above 0", is_positive)
                .unwrap_or(defaults.image_std),
        };
        (self.faults.len() == faults_before).then_some(processor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::goldens;

    fn copy_of_a() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in [TOKENIZER, TOKENIZER_CONFIG, TEMPLATE_JSON, GENERATION_CONFIG, PREPROCESSOR_CONFIG] {
            let from = goldens::path("tests/checkpoints/a").join(file);
            fs::copy(from, folder.path().join(file)).unwrap();
        }
        folder
    }

    fn write(folder: &tempfile::TempDir, file: &str, json: &Value) {
        fs::write(folder.path().join(file), json.to_string()).unwrap();
    }

    fn read(folder: &tempfile::TempDir, file: &str) -> Value {
        serde_json::from_slice(&fs::read(folder.path().join(file)).unwrap()).unwrap()
    }

    fn faults(folder: &tempfile::TempDir) -> Vec<(String, String)> {
        let error = ModelFiles::open(folder.path()).unwrap_err();
        error.faults.into_iter().map(|fault| (fault.file, fault.field)).collect()
    }

    #[test]
    fn reads_the_released_files() {
        let folder = goldens::full_tokenizer_folder();
        let files = ModelFiles::open(folder.path()).unwrap();
        assert_eq!(files.generation.eos_token_ids, [151_645, 151_643]);
        assert_eq!(files.generation.temperature, Some(1e-6));
        assert_eq!(files.generation.repetition_penalty, Some(1.05));
        assert_eq!((files.picture.min_pixels, files.picture.max_pixels), (3136, 12_845_056));
        assert_eq!(files.tokenizer.vocabulary().len(), 151_665);
        assert_eq!(files.tokenizer.controls().count(), 22);
        assert!(!files.template.takes_tools());
    }

    #[test]
    fn an_empty_folder_names_every_file() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<String> = faults(&folder).into_iter().map(|(file, _)| file).collect();
        for file in [TOKENIZER, TOKENIZER_CONFIG, PREPROCESSOR_CONFIG] {
            assert!(files.iter().any(|named| named == file), "{file} in {files:?}");
        }
    }

    #[test]
    fn reports_faults_of_all_files_at_once() {
        let folder = copy_of_a();
        fs::write(folder.path().join(TEMPLATE_JINJA), "{% if %}").unwrap();
        fs::write(folder.path().join(TOKENIZER), "{").unwrap();
        write(&folder, GENERATION_CONFIG, &json!({"temperature": -1, "top_p": "x", "eos_token_id": "y"}));
        let preprocessor =
            json!({"size": {"shortest_edge": 0}, "image_std": [1, 2], "resample": 2, "do_resize": false});
        write(&folder, PREPROCESSOR_CONFIG, &preprocessor);
        let faults = faults(&folder);
        for (file, field) in [
            (TOKENIZER, ""),
            (TEMPLATE_JINJA, ""),
            (GENERATION_CONFIG, "temperature"),
            (GENERATION_CONFIG, "top_p"),
            (GENERATION_CONFIG, "eos_token_id"),
            (PREPROCESSOR_CONFIG, "size.shortest_edge"),
            (PREPROCESSOR_CONFIG, "image_std"),
            (PREPROCESSOR_CONFIG, "resample"),
            (PREPROCESSOR_CONFIG, "do_resize"),
        ] {
            assert!(faults.contains(&(file.into(), field.into())), "{file}: {field} in {faults:?}");
        }
    }

    #[test]
    fn takes_newer_forms_of_the_files() {
        let folder = copy_of_a();
        let template = read(&folder, TEMPLATE_JSON)["chat_template"].as_str().unwrap().to_owned();
        fs::remove_file(folder.path().join(TEMPLATE_JSON)).unwrap();
        fs::write(folder.path().join(TEMPLATE_JINJA), template).unwrap();
        fs::remove_file(folder.path().join(PREPROCESSOR_CONFIG)).unwrap();
        let size = json!({"shortest_edge": 784, "longest_edge": 7840});
        write(&folder, PROCESSOR_CONFIG, &json!({"image_processor": {"size": size, "patch_size": 14}}));
        fs::remove_file(folder.path().join(GENERATION_CONFIG)).unwrap();
        let files = ModelFiles::open(folder.path()).unwrap();
        assert_eq!((files.picture.min_pixels, files.picture.max_pixels), (784, 7840));
        let end = files.tokenizer.control_id("<|im_end|>").unwrap();
        assert_eq!(files.generation, GenerationDefaults { eos_token_ids: vec![end], ..Default::default() });
    }

    #[test]
    fn older_pixel_bounds_override_newer_ones() {
        let folder = copy_of_a();
        let size = json!({"shortest_edge": 784, "longest_edge": 7840});
        write(&folder, PREPROCESSOR_CONFIG, &json!({"size": size, "max_pixels": 1000}));
        let files = ModelFiles::open(folder.path()).unwrap();
        assert_eq!((files.picture.min_pixels, files.picture.max_pixels), (784, 1000));
    }

    #[test]
    fn greedy_unless_the_file_says_to_sample() {
        let folder = copy_of_a();
        write(&folder, GENERATION_CONFIG, &json!({"temperature": 0.7, "eos_token_id": [2, 1, 2]}));
        let generation = ModelFiles::open(folder.path()).unwrap().generation;
        assert_eq!((generation.temperature, generation.eos_token_ids), (Some(0.0), vec![2, 1]));
    }
}
