//! A checkpoint on disk: safetensors files, mapped, their tensors by name.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";

/// Something that a checkpoint lacks or has wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckpointFault {
    /// A file is not there or cannot be read.
    File {
        /// The file's name.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor is not there.
    Missing {
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor has another shape than the configuration asks for.
    Shape {
        /// The tensor's name.
        tensor: String,
        /// The shape that it has.
        found: Vec<usize>,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor's elements are of a type that is not read.
    Dtype {
        /// The tensor's name.
        tensor: String,
        /// The type.
        found: String,
    },
    /// Two tensors stand for the same weights.
    Twice {
        /// The tensor's name.
        tensor: String,
        /// The files that it is in.
        files: [String; 2],
    },
}

impl fmt::Display for CheckpointFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, problem } => write!(f, "{file}: {problem}"),
            Self::Missing { tensor } => write!(f, "tensor {tensor} is missing"),
            Self::Shape { tensor, found, expected } => {
                write!(f, "tensor {tensor} has shape {found:?} instead of {expected:?}")
            }
            Self::Dtype { tensor, found } => {
                write!(f, "tensor {tensor} is of type {found}; BF16, F16 and F32 are read")
            }
            Self::Twice { tensor, files } => {
                write!(f, "tensor {tensor} is in {} and in {}", files[0], files[1])
            }
        }
    }
}

/// Why a checkpoint cannot be used: all that is wrong with it.
#[derive(Debug)]
pub struct CheckpointError {
    /// The checkpoint's folder.
    pub dir: PathBuf,
    /// What is wrong. Not empty.
    pub faults: Vec<CheckpointFault>,
}

impl fmt::Display for CheckpointError {
    /// A checkpoint of another shape has hundreds of faults; all are in `faults`, the text ends after some.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 40;
        write!(f, "the checkpoint in {} cannot be used", self.dir.display())?;
        for fault in self.faults.iter().take(SHOWN) {
            write!(f, "\n  {fault}")?;
        }
        match self.faults.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

impl std::error::Error for CheckpointError {}

/// Mapped safetensors files.
pub struct Checkpoint {
    dir: PathBuf,
    /// By name.
    files: Vec<(String, Mmap)>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor in the map.
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes.
    pub shape: &'a [usize],
    /// Row-major, little-endian, of any alignment.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Maps the files of a folder: those that `model.safetensors.index.json` lists, or `model.safetensors`.
    /// Reports all faults at once.
    ///
    /// The files must not change while they are mapped.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let mut checkpoint = Self { dir: dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        let mut faults = Vec::new();
        if !dir.is_dir() {
            faults.push(file_fault(dir.display(), "is not a folder"));
        } else if dir.join(INDEX_FILE).is_file() {
            checkpoint.open_indexed(&mut faults);
        } else if dir.join(SINGLE_FILE).is_file() {
            checkpoint.open_files(&[SINGLE_FILE.to_owned()], &mut faults);
        } else {
            faults.push(file_fault(dir.display(), format!("has neither {SINGLE_FILE} nor {INDEX_FILE}")));
        }
        if faults.is_empty() { Ok(checkpoint) } else { Err(checkpoint.error(faults)) }
    }

    /// An error about this checkpoint.
    pub fn error(&self, faults: Vec<CheckpointFault>) -> CheckpointError {
        CheckpointError { dir: self.dir.clone(), faults }
    }

    /// A tensor, by the name that it has in the released checkpoints.
    pub fn get(&self, name: &str) -> Option<TensorRef<'_>> {
        let entry = self.tensors.get(name)?;
        Some(TensorRef {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &self.files[entry.file].1[entry.bytes.clone()],
        })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names and bytes of its files.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(name, map)| (name.as_str(), &map[..]))
    }

    /// Names of all tensors, as the released checkpoints have them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn open_indexed(&mut self, faults: &mut Vec<CheckpointFault>) {
        let weight_map = match read_index(&self.dir.join(INDEX_FILE)) {
            Ok(weight_map) => weight_map,
            Err(problem) => return faults.push(file_fault(INDEX_FILE, problem)),
        };
        let mut files: Vec<String> = weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        self.open_files(&files, faults);
        if faults.is_empty() {
            // A tensor of a file that is missing is not told again.
            let lost =
                weight_map.keys().filter(|name| !self.tensors.contains_key(released_name(name).as_ref()));
            faults.extend(lost.map(|name| CheckpointFault::Missing { tensor: name.clone() }));
        }
    }

    fn open_files(&mut self, names: &[String], faults: &mut Vec<CheckpointFault>) {
        let mut file_of: BTreeMap<String, &str> = BTreeMap::new();
        for name in names {
            let (map, entries) = match open_file(&self.dir.join(name), self.files.len()) {
                Ok(opened) => opened,
                Err(problem) => {
                    faults.push(file_fault(name, problem));
                    continue;
                }
            };
            self.files.push((name.clone(), map));
            for (tensor, entry) in entries {
                let tensor = released_name(&tensor).into_owned();
                if let Some(other) = file_of.insert(tensor.clone(), name) {
                    let files = [other.to_owned(), name.clone()];
                    faults.push(CheckpointFault::Twice { tensor: tensor.clone(), files });
                }
                self.tensors.insert(tensor, entry);
            }
        }
    }
}

fn file_fault(file: impl fmt::Display, problem: impl Into<String>) -> CheckpointFault {
    CheckpointFault::File { file: file.to_string(), problem: problem.into() }
}

/// The name that a tensor has in the released checkpoints; transformers 5 writes others.
fn released_name(name: &str) -> std::borrow::Cow<'_, str> {
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        format!("model.{rest}").into()
    } else if let Some(rest) = name.strip_prefix("model.visual.") {
        format!("visual.{rest}").into()
    } else {
        name.into()
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let index: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let weight_map = index.get("weight_map").and_then(Value::as_object).ok_or("has no weight_map")?;
    let entry = |(tensor, file): (&String, &Value)| {
        let file = file.as_str().ok_or_else(|| format!("weight_map.{tensor} is not a file's name"))?;
        if Path::new(file).file_name().is_none_or(|name| name != file) {
            return Err(format!("weight_map.{tensor} leads outside of the folder"));
        }
        Ok((tensor.clone(), file.to_owned()))
    };
    weight_map.iter().map(entry).collect()
}

fn open_file(path: &Path, index: usize) -> Result<(Mmap, Vec<(String, Entry)>), String> {
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "is missing".to_owned(),
        _ => error.to_string(),
    })?;
    // SAFETY: The map is only read. The caller of `Checkpoint::open` promises that nobody changes the file
    // meanwhile; whoever breaks that gets other weights or SIGBUS, as with any mapped file.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|error| format!("is truncated or not a safetensors file: {error}"))?;
    let data_start = header + size_of::<u64>();
    if metadata.data_len() > map.len() - data_start {
        return Err("is truncated".to_owned());
    }
    let entries = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let bytes = data_start + start..data_start + end;
            (name, Entry { file: index, dtype: info.dtype, shape: info.shape.clone(), bytes })
        })
        .collect();
    Ok((map, entries))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use super::*;

    fn write(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), bytes).expect("consistent"))
        });
        safetensors::serialize_to_file(views, None::<HashMap<String, String>>, path).expect("written");
    }

    fn index(dir: &Path, weight_map: &Value) {
        let index = serde_json::json!({ "weight_map": weight_map });
        std::fs::write(dir.join(INDEX_FILE), index.to_string()).expect("written");
    }

    fn faults(dir: &Path) -> Vec<String> {
        let error = Checkpoint::open(dir).err().expect("faults");
        error.faults.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn names_of_both_kinds_are_the_same_tensors() {
        let dir = tempfile::tempdir().expect("a folder");
        let bytes = || 1f32.to_le_bytes().to_vec();
        let names = ["model.language_model.norm.weight", "model.visual.merger.ln_q.weight", "lm_head.weight"];
        let tensors = names.map(|name| (name, Dtype::F32, &[1][..], bytes()));
        write(&dir.path().join(SINGLE_FILE), &tensors);
        let checkpoint = Checkpoint::open(dir.path()).expect("opens");
        let found: Vec<_> = checkpoint.names().collect();
        assert_eq!(found, ["lm_head.weight", "model.norm.weight", "visual.merger.ln_q.weight"]);
        let tensor = checkpoint.get("model.norm.weight").expect("there");
        assert_eq!((tensor.shape, tensor.bytes), (&[1][..], &bytes()[..]));
    }

    #[test]
    fn missing_truncated_and_foreign_files_are_told_together() {
        let dir = tempfile::tempdir().expect("a folder");
        index(
            dir.path(),
            &serde_json::json!({"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}),
        );
        write(&dir.path().join("1.safetensors"), &[("a", Dtype::F32, &[4], vec![0; 16])]);
        let whole = std::fs::read(dir.path().join("1.safetensors")).expect("read");
        std::fs::write(dir.path().join("1.safetensors"), &whole[..whole.len() - 1]).expect("written");
        std::fs::write(dir.path().join("3.safetensors"), b"PK").expect("written");
        let faults = faults(dir.path());
        assert!(faults[0].starts_with("1.safetensors: is truncated"), "{faults:?}");
        assert_eq!(faults[1], "2.safetensors: is missing");
        assert!(faults[2].starts_with("3.safetensors: is truncated or not"), "{faults:?}");
    }

    #[test]
    fn an_index_must_tell_the_truth() {
        let dir = tempfile::tempdir().expect("a folder");
        write(&dir.path().join("1.safetensors"), &[("a", Dtype::F32, &[1], vec![0; 4])]);
        index(dir.path(), &serde_json::json!({"a": "1.safetensors", "b": "1.safetensors"}));
        assert_eq!(faults(dir.path()), ["tensor b is missing"]);
        index(dir.path(), &serde_json::json!({"a": "../1.safetensors"}));
        assert_eq!(faults(dir.path()), [format!("{INDEX_FILE}: weight_map.a leads outside of the folder")]);
    }

    #[test]
    fn an_empty_folder_says_what_it_lacks() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(faults(dir.path())[0].contains("neither model.safetensors nor"));
        assert!(faults(&dir.path().join("gone"))[0].contains("is not a folder"));
    }
}
