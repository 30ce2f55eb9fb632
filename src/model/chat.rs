//! Chat templates: the Jinja text that turns messages into a prompt.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::error::{ModelError, Result};
use super::mapped::{read_json, read_side_file};
use super::tokenizer::Tokenizer;
use super::weights::Checkpoint;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A turn of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

const NAME: &str = "chat_template";

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template of a checkpoint: `chat_template.jinja` or `tokenizer_config.json` of a
    /// folder, `tokenizer.chat_template` of a GGUF file.
    ///
    /// # Errors
    /// `NoTemplate` when there is none; `Template` when it cannot be parsed.
    pub fn for_checkpoint(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Self> {
        let source = match checkpoint.gguf() {
            Some(gguf) => gguf.string("tokenizer.chat_template").map(str::to_owned),
            None => source_in_folder(checkpoint.path())?,
        };
        let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let eos = tokenizer.eos().or(checkpoint.config().eos.first().copied());
        Self::new(source.ok_or(ModelError::NoTemplate)?, &spelled(tokenizer.bos()), &spelled(eos))
    }

    /// Compiles a template; `bos` and `eos` become its variables `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// `Template`.
    pub fn new(source: String, bos: &str, eos: &str) -> Result<Self> {
        let mut env = Environment::new();
        // As the reference implementation renders: block tags leave neither their line's
        // indentation nor its end, and nothing is escaped.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(failure)?;
        env.set_syntax(syntax);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |what: String| {
            Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, what))
        });
        env.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            strftime(&format, now.map_or(0, |d| d.as_secs()))
        });
        env.add_filter("tojson", tojson);
        env.add_template_owned(NAME, source).map_err(failure)?;
        Ok(Self { env, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// Token ids of the prompt for a conversation, up to where the assistant's answer begins. A message that spells a
    /// special token says so as text: it begins no turn and ends none.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
        let marked: Vec<_> =
            messages.iter().map(|m| Message::new(&*m.role, tokenizer.mark(&m.content))).collect();
        tokenizer.encode_marked(&self.render(&marked, true)?)
    }

    /// The prompt for a conversation. With `add_generation_prompt` it ends where the assistant's
    /// answer begins.
    ///
    /// # Errors
    /// `Template`, also when the template itself refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.env.get_template(NAME).map_err(failure)?;
        template
            .render(context! {
                messages => Serde(messages),
                add_generation_prompt => add_generation_prompt,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
            })
            .map_err(failure)
    }
}

fn source_in_folder(folder: &std::path::Path) -> Result<Option<String>> {
    let file = folder.join("chat_template.jinja");
    if let Some(bytes) = read_side_file(&file)? {
        return String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| ModelError::corrupt(&file, "it is not valid UTF-8"));
    }
    let Some(config) = read_json(&folder.join("tokenizer_config.json"))? else {
        return Ok(None);
    };
    let template = match &config["chat_template"] {
        // A list of named templates; the default one is for conversations.
        serde_json::Value::Array(list) => {
            list.iter().find(|t| t["name"] == "default").map(|t| &t["template"])
        }
        single => Some(single),
    };
    Ok(template.and_then(|t| t.as_str()).map(str::to_owned))
}

/// The error and what caused it, in one sentence.
fn failure(error: minijinja::Error) -> ModelError {
    let mut what = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        what = format!("{what}: {inner}");
        source = inner.source();
    }
    ModelError::Template { what }
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it, which templates rely on.
fn tojson(value: Value, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent = kwargs.get::<Option<usize>>("indent")?;
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(&value).map_err(|e| {
        minijinja::Error::new(ErrorKind::BadSerialization, "cannot become JSON").with_source(e)
    })?;
    let mut out = String::new();
    write_json(&json, indent.map(|n| n.min(64)), 0, &mut out);
    Ok(out)
}

fn write_json(json: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    use serde_json::Value as J;
    let line = |depth: usize, out: &mut String| {
        if let Some(n) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(n * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match json {
        J::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                line(depth + 1, out);
                write_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        J::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                line(depth + 1, out);
                out.push_str(&J::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The usual `strftime` fields of a time in seconds since 1970, UTC.
fn strftime(format: &str, seconds: u64) -> String {
    let days = (seconds / 86_400) as i64;
    let clock = seconds % 86_400;
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    let (year, month, day) = civil(days);
    let (month_name, day_name) =
        (MONTHS[(month - 1) as usize], DAYS[(days + 4).rem_euclid(7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{second:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month (1 to 12) and day of a day number counted from 1970-01-01 (Gregorian calendar).
fn civil(days: i64) -> (i64, i64, i64) {
    // Count from 1 March of year 0, so that the leap day ends a year and a 400-year era has
    // 146,097 days.
    let from_march = days + 719_468;
    let era = from_march.div_euclid(146_097);
    let day_of_era = from_march.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        vec![Message::new("user", "Hi <&> there"), Message::new("assistant", "Yes?")]
    }

    #[test]
    fn blocks_are_trimmed_and_nothing_is_escaped() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if true %}\n{{ m.role }}: {{ m['content'].strip() }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nassistant:{% endif %}";
        let template = ChatTemplate::new(source.into(), "<s>", "</s>").unwrap();
        assert_eq!(
            template.render(&messages(), true).unwrap(),
            "<s>user: Hi <&> there\nassistant: Yes?\nassistant:"
        );
        assert_eq!(
            template.render(&messages(), false).unwrap(),
            "<s>user: Hi <&> there\nassistant: Yes?\n"
        );
    }

    #[test]
    fn a_template_may_refuse_with_its_own_words() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let template = ChatTemplate::new(source.into(), "", "").unwrap();
        let error = template.render(&messages(), true).unwrap_err().to_string();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_broken_template_is_an_error() {
        assert!(matches!(
            ChatTemplate::new("{% for %}".into(), "", ""),
            Err(ModelError::Template { .. })
        ));
    }

    #[test]
    fn tojson_writes_as_python_does() {
        let source = "{{ messages[0] | tojson }}{{ [1, 'a'] | tojson(indent=2) }}";
        let template = ChatTemplate::new(source.into(), "", "").unwrap();
        assert_eq!(
            template.render(&messages(), false).unwrap(),
            "{\"role\": \"user\", \"content\": \"Hi <&> there\"}[\n  1,\n  \"a\"\n]"
        );
    }

    #[test]
    fn dates_are_right() {
        let stamp = |s| strftime("%a %d %b %Y %H:%M:%S", s);
        assert_eq!(stamp(0), "Thu 01 Jan 1970 00:00:00");
        assert_eq!(stamp(1_709_210_096), "Thu 29 Feb 2024 12:34:56");
        assert_eq!(stamp(4_107_542_399), "Sun 28 Feb 2100 23:59:59");
        assert_eq!(stamp(4_107_542_400), "Mon 01 Mar 2100 00:00:00");
    }
}
