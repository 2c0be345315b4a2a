//! Chat templates: messages to prompt text.
//!
//! A template is Jinja, taken from `chat_template.jinja`, else from `chat_template` of
//! `tokenizer_config.json` (a string, or a list of `{name, template}` of which `default` is used).
//! It runs as transformers runs it: blocks trimmed, loop controls, Python methods on strings and
//! maps, `tojson` as Python's `json.dumps(ensure_ascii=False)`, `raise_exception`, `strftime_now`
//! (in UTC), and the special tokens as variables.
//!
//! The rendered text holds its special tokens already: encode it without adding any.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, syntax::SyntaxConfig};
use serde::Serialize;
use serde_json::Value as Json;

use super::strftime::strftime;
use super::tokenizer::{one_line, read_bounded};
use crate::error::{Error, Result};

/// The largest template or tokenizer_config.json read.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Template instructions before a run counts as endless.
const FUEL: u64 = 50_000_000;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message by `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// The chat template of a model folder, with its special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    path: PathBuf,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Finds and compiles the template of a model folder; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::InvalidFile`] for broken JSON or a template that does not compile.
    pub fn from_model_dir(dir: &Path) -> Result<Option<Self>> {
        let config_path = dir.join("tokenizer_config.json");
        let config = if config_path.exists() { read_json(&config_path)? } else { Json::Null };
        let file = dir.join("chat_template.jinja");
        let (path, source) = if file.exists() {
            let bytes = read_bounded(&file, MAX_FILE_BYTES)?;
            let text = String::from_utf8(bytes)
                .map_err(|e| Error::InvalidFile { path: file.clone(), reason: format!("is not UTF-8: {e}") })?;
            (file, text)
        } else {
            match template_in_config(&config) {
                Some(text) => (config_path, text.to_owned()),
                None => return Ok(None),
            }
        };
        Self::compile(path, source, special_tokens(&config)).map(Some)
    }

    fn compile(path: PathBuf, source: String, special_tokens: Vec<(String, String)>) -> Result<Self> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let invalid = |e: minijinja::Error| Error::InvalidFile {
            path: path.clone(),
            reason: format!("chat template: {}", one_line(&e.to_string())),
        };
        env.set_syntax(syntax.map_err(invalid)?);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            strftime(&format, now.as_secs())
        });
        env.add_template_owned("chat", source).map_err(invalid)?;
        Ok(ChatTemplate { env, path, special_tokens })
    }

    /// The prompt text of a conversation; with `add_generation_prompt` the assistant's turn is
    /// opened at its end.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] with the template's own complaint.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut context: std::collections::BTreeMap<&str, Value> =
            self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))).collect();
        context.insert("messages", Value::from(minijinja::value::Serde(messages)));
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        self.env.get_template("chat").and_then(|template| template.render(context)).map_err(|e| Error::InvalidFile {
            path: self.path.clone(),
            reason: one_line(&format!("chat template: {e}")),
        })
    }
}

fn read_json(path: &Path) -> Result<Json> {
    serde_json::from_slice(&read_bounded(path, MAX_FILE_BYTES)?)
        .map_err(|e| Error::InvalidFile { path: path.to_owned(), reason: e.to_string() })
}

/// `chat_template` as a string, or the one named `default` of a list.
fn template_in_config(config: &Json) -> Option<&str> {
    match config.get("chat_template")? {
        Json::String(text) => Some(text),
        Json::Array(list) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Json::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str()),
        _ => None,
    }
}

/// `bos_token`, `eos_token` and the like: strings, or objects with `content`.
fn special_tokens(config: &Json) -> Vec<(String, String)> {
    let Some(fields) = config.as_object() else { return Vec::new() };
    fields
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.clone(), token.to_owned()))
        })
        .collect()
}

/// Python's `json.dumps(value, ensure_ascii=False)`: `", "` and `": "` between items unless
/// `indent` is given; nothing escaped for HTML.
fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<Value> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(64));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSpacing)).map_err(failed)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// `json.dumps`'s default separators.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        let tokens = vec![("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::compile(PathBuf::from("t.jinja"), source.to_owned(), tokens)?.render(messages, true)
    }

    #[test]
    fn blocks_are_trimmed_as_jinja_does_with_trim_and_lstrip_blocks() {
        let source =
            "{{ bos_token }}\n  {% for m in messages %}\n{{ m.role }}: {{ m['content'].strip() }}\n  {% endfor %}\nend";
        let messages = [Message::new("user", " hi "), Message::new("assistant", "ok")];
        assert_eq!(render(source, &messages).unwrap(), "<s>\nuser: hi\nassistant: ok\nend");
    }

    #[test]
    fn loop_controls_and_python_methods() {
        let source = "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content.upper().split('-')[-1] }}{% endfor %}";
        let messages = [Message::new("user", "a-b"), Message::new("user", "c")];
        assert_eq!(render(source, &messages).unwrap(), "B");
    }

    #[test]
    fn tojson_is_pythons() {
        let messages = [Message::new("user", "é <b> & 'x' \"q\"\n")];
        let expected = r#"{"role": "user", "content": "é <b> & 'x' \"q\"\n"}"#;
        assert_eq!(render("{{ messages[0] | tojson }}", &messages).unwrap(), expected);
        let pretty = "{\n  \"role\": \"user\",\n  \"content\": \"c\"\n}";
        assert_eq!(render("{{ messages[0] | tojson(indent=2) }}", &[Message::new("user", "c")]).unwrap(), pretty);
    }

    #[test]
    fn refusals_are_errors_with_the_templates_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err().to_string();
        assert!(error.contains("t.jinja") && error.contains("roles must alternate"), "{error}");
        let error = render("{% for x in messages %}", &[]).unwrap_err().to_string();
        assert!(error.contains("chat template") && !error.contains('\n'), "{error}");
        let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(render(endless, &[]).is_err(), "a template that would run for hours is stopped");
    }

    #[test]
    fn the_default_of_a_list_is_used() {
        let list: Json = serde_json::from_str(
            r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#,
        )
        .unwrap();
        assert_eq!(template_in_config(&list), Some("D"));
        let object: Json =
            serde_json::from_str(r#"{"bos_token": {"content": "<b>"}, "eos_token": "<e>", "x": 1}"#).unwrap();
        let tokens = special_tokens(&object);
        assert!(
            tokens.contains(&("bos_token".into(), "<b>".into()))
                && tokens.contains(&("eos_token".into(), "<e>".into()))
        );
    }
}
