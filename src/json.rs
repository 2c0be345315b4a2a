//! Reading JSON that nobody vouches for: a size limit, and fields by name with a typed error that
//! names file and field. `null` counts as absent everywhere, as in transformers.

use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The largest JSON file read. An index of a model with a million tensors stays below it.
const MAX_JSON_BYTES: u64 = 128 << 20;

/// Reads a whole file of at most [`MAX_JSON_BYTES`].
pub(crate) fn read_limited(path: &Path) -> Result<Vec<u8>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(Error::InvalidFile { path: path.to_owned(), reason: "is not a regular file".into() });
    }
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        let reason = format!("is larger than {MAX_JSON_BYTES} bytes, the limit for a JSON file");
        return Err(Error::InvalidFile { path: path.to_owned(), reason });
    }
    Ok(bytes)
}

/// Reads a JSON file whose root is an object. serde_json limits the depth to 128.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = read_limited(path)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Error::InvalidFile {
            path: path.to_owned(),
            reason: format!("the root is {}, expected an object", kind(&other)),
        }),
        Err(error) => Err(Error::InvalidFile { path: path.to_owned(), reason: format!("is not JSON: {error}") }),
    }
}

/// What a value is, in words.
pub(crate) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => format!("the string {:?}", shorten(s)),
        Value::Array(a) => format!("a list of {}", a.len()),
        Value::Object(_) => "an object".into(),
    }
}

/// None of the characters a control character: what a hostile file says ends up in one line of an error.
pub(crate) fn one_line(s: &str) -> String {
    s.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// The first 80 characters of [`one_line`].
pub(crate) fn shorten(s: &str) -> String {
    let s = one_line(s);
    let mut chars = s.chars();
    let mut short: String = chars.by_ref().take(80).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    short
}

/// One object of a JSON file, with its file and the path of fields that leads to it.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a> {
    pub path: &'a Path,
    /// `""` for the root, else `"rope_scaling."`.
    pub prefix: &'a str,
    pub map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// The value, unless absent or null.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// [`Error::InvalidFile`] about one field.
    pub fn invalid(&self, field: &str, reason: impl std::fmt::Display) -> Error {
        Error::InvalidFile { path: self.path.to_owned(), reason: format!("{}{field} {reason}", self.prefix) }
    }

    /// [`Error::UnsupportedModel`] about one field.
    pub fn unsupported(&self, field: &str, value: &str, supported: &str) -> Error {
        Error::UnsupportedModel {
            path: self.path.to_owned(),
            field: format!("{}{field}", self.prefix),
            value: shorten(value),
            supported: supported.to_owned(),
        }
    }

    fn wrong(&self, field: &str, value: &Value, expected: &str) -> Error {
        self.invalid(field, format_args!("is {}, expected {expected}", kind(value)))
    }

    /// A whole number in `range`.
    pub fn usize(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let expected = || format!("a whole number from {} to {}", range.start(), range.end());
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(field, value, &expected())),
        }
    }

    /// A whole number in `range` that must be there.
    pub fn required_usize(&self, field: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.usize(field, range)?.ok_or_else(|| self.invalid(field, "is missing"))
    }

    /// A finite number in `range`.
    pub fn f64(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && range.contains(&x) => Ok(Some(x)),
            _ => Err(self.wrong(field, value, &format!("a number from {:?} to {:?}", range.start(), range.end()))),
        }
    }

    pub fn bool(&self, field: &str) -> Result<Option<bool>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.wrong(field, other, "true or false")),
        }
    }

    pub fn str(&self, field: &str) -> Result<Option<&'a str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(field, other, "a string")),
        }
    }

    #[cfg(feature = "decoder")]
    pub fn array(&self, field: &str) -> Result<Option<&'a [Value]>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong(field, other, "a list")),
        }
    }

    pub fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.wrong(field, other, "an object")),
        }
    }

    /// Token ids: one, a list, or none. Negative ids (some files write -1 for "none") are dropped.
    #[cfg(feature = "decoder")]
    pub fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let one = |value: &Value| match value.as_i64() {
            Some(id) if id < 0 => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) => Ok(Some(id)),
                Err(_) => Err(self.wrong(field, value, "a token id")),
            },
            None => Err(self.wrong(field, value, "a token id or a list of them")),
        };
        let ids: Result<Vec<Option<u32>>> = match value {
            Value::Array(items) => items.iter().map(one).collect(),
            other => one(other).map(|id| vec![id]),
        };
        Ok(Some(ids?.into_iter().flatten().collect()))
    }
}
