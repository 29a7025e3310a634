//! The checkpoint's own chat template: Jinja, as transformers renders it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::value::{Kwargs, Value, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::json;

use super::chat::{Chat, Part};
use super::escape::Escaper;
use super::python::{DumpStyle, json_dumps, strftime};
use crate::media::MediaKind;

/// The one template of the environment.
const NAME: &str = "chat_template";

/// Control tokens that a template may name by their part: `bos_token`, `eos_token` and so on.
pub type SpecialTokens = BTreeMap<String, String>;

/// Why a template did not work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template called `raise_exception`: the conversation is not one that it takes.
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template is not valid, or does what is not supported.
    #[error("the chat template failed: {0}")]
    Failed(String),
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    takes_tools: bool,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// The environment is that of transformers' `apply_chat_template`: blocks take the line break after them and the
    /// white space before them, loops can `break`, and `raise_exception`, `strftime_now` and an unescaped `tojson` are
    /// there. Times are in UTC.
    pub fn new(source: &str, special_tokens: SpecialTokens) -> Result<Self, TemplateError> {
        if !Escaper::accepts_template(source) {
            return Err(TemplateError::Failed(
                "it holds a private-use character that is reserved here".into(),
            ));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(format, SystemTime::now()));
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| TemplateError::Failed(with_line(&error)))?;
        let template = environment.get_template(NAME).expect("it was just added");
        let takes_tools = template.undeclared_variables(false).contains("tools");
        Ok(Self { environment, special_tokens, takes_tools })
    }

    /// Whether the template does anything with tools.
    pub fn takes_tools(&self) -> bool {
        self.takes_tools
    }

    /// Renders a conversation up to where the model's answer begins. User text in the result is escaped.
    pub(super) fn render(&self, chat: &Chat, escaper: &Escaper) -> Result<String, TemplateError> {
        let messages: Vec<serde_json::Value> = chat
            .messages
            .iter()
            .map(|message| {
                let content: Vec<_> = message.parts.iter().map(|part| part_value(part, escaper)).collect();
                json!({"role": message.role.as_str(), "content": content})
            })
            .collect();
        self.render_messages(messages.into(), tools_value(chat, escaper))
    }

    fn render_messages(
        &self,
        messages: serde_json::Value,
        tools: serde_json::Value,
    ) -> Result<String, TemplateError> {
        let mut context: BTreeMap<&str, Value> = self
            .special_tokens
            .iter()
            .map(|(name, content)| (name.as_str(), Value::from(content.as_str())))
            .collect();
        context.insert("messages", Value::from_serialize(messages));
        context.insert("tools", Value::from_serialize(tools));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(true));
        let template = self.environment.get_template(NAME).expect("it was added when this was made");
        template.render(context).map_err(|error| match error.kind() {
            ErrorKind::InvalidOperation if error.detail().is_some_and(|text| text.starts_with(RAISED)) => {
                TemplateError::Refused(error.detail().unwrap_or_default()[RAISED.len()..].to_owned())
            }
            _ => TemplateError::Failed(with_line(&error)),
        })
    }
}

fn part_value(part: &Part, escaper: &Escaper) -> serde_json::Value {
    match part {
        Part::Text(text) => json!({"type": "text", "text": escaper.escape(text)}),
        Part::Medium(medium) => match medium.kind {
            MediaKind::Image => json!({"type": "image"}),
            MediaKind::Video => json!({"type": "video"}),
        },
    }
}

/// Tools as transformers passes them, or null: templates ask `if tools`.
fn tools_value(chat: &Chat, escaper: &Escaper) -> serde_json::Value {
    if chat.tools.is_empty() {
        return serde_json::Value::Null;
    }
    let tools = chat.tools.iter().map(|tool| {
        json!({
            "type": "function",
            "function": {
                "name": escaper.escape(&tool.name),
                "description": escaper.escape(&tool.description),
                "parameters": escape_json(&tool.parameters, escaper),
            },
        })
    });
    tools.collect()
}

fn escape_json(value: &serde_json::Value, escaper: &Escaper) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::String(text) => escaper.escape(text).into(),
        Value::Array(items) => items.iter().map(|item| escape_json(item, escaper)).collect(),
        Value::Object(entries) => entries
            .iter()
            .map(|(key, item)| (escaper.escape(key).into_owned(), escape_json(item, escaper)))
            .collect(),
        scalar => scalar.clone(),
    }
}

/// Marks an error as raised by the template itself.
const RAISED: &str = "raise_exception: ";

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

/// The `tojson` of transformers: as `json.dumps` with `ensure_ascii=False`, and nothing escaped for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let mut style = DumpStyle::default();
    style.ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(style.ensure_ascii);
    style.indent = options.get("indent")?;
    style.sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(style.sort_keys);
    if let Some(separators) = options.get::<Option<Value>>("separators")? {
        let separators: Vec<Value> = separators.try_iter()?.collect();
        (style.item_separator, style.key_separator) = from_args(&separators)?;
    }
    options.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(json_dumps(&json, &style))
}

fn with_line(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("line {line}: {error}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::chat::{Message, Role, Tool};
    use super::*;

    fn escaper() -> Escaper {
        Escaper::new([("<|im_start|>".to_owned(), 1), ("<|im_end|>".to_owned(), 2)]).unwrap()
    }

    fn text_chat(text: &str) -> Chat {
        let parts = vec![Part::Text(text.into())];
        Chat { messages: vec![Message { role: Role::User, parts }], tools: Vec::new() }
    }

    fn render(source: &str, chat: &Chat) -> Result<String, TemplateError> {
        let rendered = ChatTemplate::new(source, SpecialTokens::new())?.render(chat, &escaper())?;
        Ok(escaper().unescape(&rendered))
    }

    #[test]
    fn renders_as_jinja_with_trimmed_blocks() {
        let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'][0]['text'].strip() }}]\n  {% break %}{% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &text_chat(" hi ")).unwrap(), "[hi]\n");
    }

    #[test]
    fn dumps_tools_in_their_own_order_and_without_html_escapes() {
        let mut chat = text_chat("x");
        chat.tools.push(Tool {
            name: "find".into(),
            description: "<b>é</b>".into(),
            parameters: json!({"type": "object", "properties": {"z": {"type": "string"}, "a": {}}}),
        });
        let source = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}";
        let expected = r#"{"type": "function", "function": {"name": "find", "description": "<b>é</b>", "parameters": {"type": "object", "properties": {"z": {"type": "string"}, "a": {}}}}}"#;
        assert_eq!(render(source, &chat).unwrap(), expected);
        assert!(ChatTemplate::new(source, SpecialTokens::new()).unwrap().takes_tools());
        assert!(!ChatTemplate::new("{{ messages }}", SpecialTokens::new()).unwrap().takes_tools());
    }

    #[test]
    fn tells_a_refusal_from_a_failure() {
        let refused = render("{{ raise_exception('no ' ~ messages[0].role) }}", &text_chat("x"));
        assert_eq!(refused, Err(TemplateError::Refused("no user".into())));
        assert!(matches!(render("{{ messages.nope() }}", &text_chat("x")), Err(TemplateError::Failed(_))));
        assert!(matches!(render("{% if %}", &text_chat("x")), Err(TemplateError::Failed(_))));
        assert!(matches!(render("\u{F0000}", &text_chat("x")), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn names_special_tokens() {
        let tokens = SpecialTokens::from([("eos_token".to_owned(), "<|im_end|>".to_owned())]);
        let template = ChatTemplate::new("{{ eos_token }}{{ bos_token }}", tokens).unwrap();
        assert_eq!(template.render(&text_chat("x"), &escaper()).unwrap(), "<|im_end|>");
    }
}
