//! Reading a JSON object field by field.

use serde_json::{Map, Value};

use super::ConfigFault;

/// An object of the file, read field by field; what is wrong is collected.
pub(super) struct Fields<'m, 'f> {
    /// What stands before a field's name: empty, or ends with a dot.
    pub(super) prefix: String,
    /// `None`: the object is missing, which is reported once.
    pub(super) map: Option<&'m Map<String, Value>>,
    pub(super) faults: &'f mut Vec<ConfigFault>,
}

impl<'m> Fields<'m, '_> {
    pub(super) fn fault(&mut self, field: &str, problem: impl Into<String>) {
        let field = format!("{}{field}", self.prefix);
        self.faults.push(ConfigFault { field, problem: problem.into() });
    }

    pub(super) fn nested(&mut self, name: &str) -> Fields<'m, '_> {
        let map = self.get(name).and_then(Value::as_object);
        if map.is_none() && self.map.is_some() {
            self.fault(name, "is missing or not an object");
        }
        Fields { prefix: format!("{}{name}.", self.prefix), map, faults: self.faults }
    }

    pub(super) fn get(&self, field: &str) -> Option<&'m Value> {
        self.map?.get(field).filter(|value| !value.is_null())
    }

    /// A positive integer; `default` when it is absent, and a fault when there is no default.
    pub(super) fn size(&mut self, field: &str, default: Option<usize>) -> usize {
        // Every size fits u32: products of two then fit 64 bits.
        match self.get(field).map(|value| value.as_u64().filter(|&n| 0 < n && n <= u64::from(u32::MAX))) {
            Some(Some(n)) => n as usize,
            Some(None) => {
                self.fault(field, "is not a positive integer");
                1
            }
            None => default.unwrap_or_else(|| {
                if self.map.is_some() {
                    self.fault(field, "is missing");
                }
                1
            }),
        }
    }

    pub(super) fn token_id(&mut self, field: &str, default: u32) -> u32 {
        match self.get(field).map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok())) {
            Some(Some(id)) => id,
            Some(None) => {
                self.fault(field, "is not a token id");
                default
            }
            None => default,
        }
    }

    /// A positive number.
    pub(super) fn number(&mut self, field: &str, default: f64) -> f64 {
        match self.get(field).map(|value| value.as_f64().filter(|&x| x > 0.0 && x.is_finite())) {
            Some(Some(x)) => x,
            Some(None) => {
                self.fault(field, "is not a positive number");
                default
            }
            None => default,
        }
    }

    pub(super) fn flag(&mut self, field: &str) -> bool {
        match self.get(field).map(Value::as_bool) {
            Some(Some(flag)) => flag,
            Some(None) => {
                self.fault(field, "is not true or false");
                false
            }
            None => false,
        }
    }

    pub(super) fn sizes(&mut self, field: &str, default: &[usize]) -> Vec<usize> {
        let Some(value) = self.get(field) else { return default.to_vec() };
        let sizes = value.as_array().and_then(|list| {
            list.iter().map(|item| item.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        });
        sizes.unwrap_or_else(|| {
            self.fault(field, "is not a list of integers");
            default.to_vec()
        })
    }
}
