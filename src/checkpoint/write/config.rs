//! JSON files changed in one place: every other field keeps its text, its place and its digits.

use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::decoder::tokenizer::read_bounded;
use crate::error::{Error, Result};

const QUANTIZATION: &str = "quantization_config";
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The fields of a JSON object, in order, as text.
struct RawObject(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RawObject;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<RawObject, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = access.next_entry()? {
                    fields.push(field);
                }
                Ok(RawObject(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl RawObject {
    fn read(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path, MAX_FILE_BYTES)?;
        let object: RawObject = serde_json::from_slice(&bytes)
            .map_err(|error| Error::InvalidFile { path: path.to_owned(), reason: format!("is not JSON: {error}") })?;
        let mut names: Vec<&str> = object.0.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(object),
            Some(pair) => Err(Error::InvalidFile { path: path.to_owned(), reason: format!("has {:?} twice", pair[0]) }),
        }
    }

    /// Puts a field in, among sorted names at its place, else at the end.
    fn insert(&mut self, name: &str, value: Box<RawValue>) {
        let sorted = self.0.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let end = self.0.len();
        let place = self.0.iter().position(|(other, _)| sorted && other.as_str() > name).unwrap_or(end);
        self.0.insert(place, (name.to_owned(), value));
    }

    /// One field a line, indented by two as transformers does.
    fn to_text(&self) -> String {
        let field = |(name, value): &(String, Box<RawValue>)| format!("  {}: {}", Value::from(name.as_str()), value);
        let fields: Vec<String> = self.0.iter().map(field).collect();
        format!("{{\n{}\n}}\n", fields.join(",\n"))
    }
}

/// Refuses a configuration that says the model is quantized.
pub(super) fn check(path: &Path) -> Result<()> {
    fn empty(value: &Value) -> bool {
        value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
    }
    let object = RawObject::read(path)?;
    let Some((_, raw)) = object.0.iter().find(|(name, _)| name == QUANTIZATION) else { return Ok(()) };
    let value: Value = serde_json::from_str(raw.get()).unwrap_or(Value::Null);
    if empty(&value) {
        return Ok(());
    }
    let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
    Err(Error::UnsupportedModel {
        path: path.to_owned(),
        field: format!("{QUANTIZATION}.quant_method"),
        value: method.to_owned(),
        supported: "a model that is not quantized and has no KV scheme; take the one this was made from".into(),
    })
}

/// The text of `config.json` with this `quantization_config`.
pub(super) fn with_scheme(path: &Path, scheme: &Value) -> Result<Vec<u8>> {
    let mut object = RawObject::read(path)?;
    object.0.retain(|(name, _)| name != QUANTIZATION);
    // Lines of the block are one level deeper in the file.
    let text = format!("{scheme:#}").replace('\n', "\n  ");
    object.insert(QUANTIZATION, raw(path, text)?);
    Ok(object.to_text().into_bytes())
}

/// The text of `tokenizer.json` without truncation and padding, which calibration tools leave there;
/// `None` if it has none.
pub(super) fn without_truncation(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut object = RawObject::read(path)?;
    let mut changed = false;
    for (name, value) in &mut object.0 {
        if matches!(name.as_str(), "truncation" | "padding") && value.get() != "null" {
            (*value, changed) = (raw(path, "null".into())?, true);
        }
    }
    Ok(changed.then(|| object.to_text().into_bytes()))
}

fn raw(path: &Path, text: String) -> Result<Box<RawValue>> {
    RawValue::from_string(text)
        .map_err(|error| Error::InvalidFile { path: path.to_owned(), reason: format!("cannot be changed: {error}") })
}
