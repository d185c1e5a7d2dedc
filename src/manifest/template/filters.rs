//! The filters that templates have: the engine's harmless ones, and ours for writing a value into a file of a certain kind.
//!
//! Left out are those that make much out of little (`format`, `indent`, `batch`, `sum` …); those that collect or join are ours and capped.

use minijinja::{Environment, Error, ErrorKind, State, Value, filters, value::Kwargs};

use super::plain;

/// Bytes that one filter may produce.
const LEN_MAX: usize = 256 * 1024;
/// Elements that a filter takes or makes.
const ITEMS_MAX: usize = 4096;

/// All of them, for messages.
pub const NAMES: [&str; 34] = [
    "abs",
    "bool",
    "capitalize",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "ini",
    "int",
    "items",
    "join",
    "json",
    "last",
    "length",
    "line",
    "lines",
    "list",
    "lower",
    "map",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "select",
    "selectattr",
    "shell",
    "sort",
    "split",
    "trim",
    "unique",
    "upper",
    "xml",
    "yaml",
];

/// Adds filters and functions.
pub fn add(environment: &mut Environment<'_>) {
    environment.add_filter("abs", filters::abs);
    environment.add_filter("bool", filters::bool);
    environment.add_filter("capitalize", filters::capitalize);
    environment.add_filter("d", filters::default);
    environment.add_filter("default", filters::default);
    environment.add_filter("dictsort", filters::dictsort);
    environment.add_filter("first", filters::first);
    environment.add_filter("float", filters::float);
    environment.add_filter("int", filters::int);
    environment.add_filter("items", filters::items);
    environment.add_filter("last", filters::last);
    environment.add_filter("length", filters::length);
    environment.add_filter("lower", filters::lower);
    environment.add_filter("reject", filters::reject);
    environment.add_filter("rejectattr", filters::rejectattr);
    environment.add_filter("reverse", filters::reverse);
    environment.add_filter("select", filters::select);
    environment.add_filter("selectattr", filters::selectattr);
    environment.add_filter("trim", filters::trim);
    environment.add_filter("upper", filters::upper);
    environment.add_filter("list", |state: &State, value: Value| filters::list(state, limited(value)?));
    environment.add_filter("sort", |state: &State, value: Value, kwargs: Kwargs| filters::sort(state, limited(value)?, kwargs));
    environment.add_filter("unique", |state: &State, value: Value, kwargs: Kwargs| filters::unique(state, limited(value)?, kwargs));
    environment.add_filter("map", map);
    environment.add_filter("join", join);
    environment.add_filter("split", split);
    environment.add_filter("lines", |text: String| split(text, Some("\n".into())));
    environment.add_filter("replace", replace);
    environment.add_filter("json", json);
    environment.add_filter("yaml", json);
    environment.add_filter("shell", shell);
    environment.add_filter("line", line);
    environment.add_filter("ini", line);
    environment.add_filter("xml", xml);
    environment.add_function("range", range);
}

type Result<T> = std::result::Result<T, Error>;

fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn limited(value: Value) -> Result<Value> {
    match value.len() {
        _ if value.as_str().is_some() => Err(failed("this filter takes a list, not a string")),
        Some(len) if len > ITEMS_MAX => Err(failed(format!("the list has {len} elements, the limit is {ITEMS_MAX}"))),
        _ => Ok(value),
    }
}

fn text_of(value: &Value) -> Result<String> {
    plain(value).map(Into::into).ok_or_else(|| failed(format!("this filter takes a string, a number or a boolean, not {}", value.kind())))
}

fn checked(text: String) -> Result<String> {
    if text.len() > LEN_MAX { Err(failed(format!("a filter makes {} bytes, the limit is {LEN_MAX}", text.len()))) } else { Ok(text) }
}

/// `list|map(attribute="name")`: that member of each element.
fn map(value: Value, kwargs: Kwargs) -> Result<Value> {
    let attribute: String = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    let items = limited(value)?.try_iter()?.take(ITEMS_MAX).map(|item| {
        let member = item.get_attr(&attribute)?;
        if member.is_undefined() {
            Err(Error::new(ErrorKind::UndefinedError, format!("`{attribute}` of an element is undefined")))
        } else {
            Ok(member)
        }
    });
    items.collect::<Result<Vec<Value>>>().map(Value::from)
}

fn join(value: Value, separator: Option<String>) -> Result<String> {
    let separator = separator.unwrap_or_default();
    let mut joined = String::new();
    for (index, item) in limited(value)?.try_iter()?.enumerate() {
        if index > 0 {
            joined.push_str(&separator);
        }
        joined.push_str(&text_of(&item)?);
        if joined.len() > LEN_MAX {
            return checked(joined);
        }
    }
    checked(joined)
}

fn split(text: String, separator: Option<String>) -> Result<Value> {
    let parts: Vec<Value> = match separator.as_deref() {
        Some("") => return Err(failed("the separator is empty")),
        Some("\n") => text.lines().take(ITEMS_MAX + 1).map(Value::from).collect(),
        Some(separator) => text.split(separator).take(ITEMS_MAX + 1).map(Value::from).collect(),
        None => text.split_whitespace().take(ITEMS_MAX + 1).map(Value::from).collect(),
    };
    if parts.len() > ITEMS_MAX { Err(failed(format!("there are more than {ITEMS_MAX} parts"))) } else { Ok(Value::from(parts)) }
}

fn replace(text: String, from: String, to: String) -> Result<String> {
    if from.is_empty() {
        return Err(failed("the text to replace is empty"));
    }
    // The length is known before anything is made.
    let count = text.matches(from.as_str()).count();
    if text.len().saturating_add(count.saturating_mul(to.len())) > LEN_MAX {
        return Err(failed(format!("a filter makes more than {LEN_MAX} bytes")));
    }
    Ok(text.replace(from.as_str(), &to))
}

/// `range(n)`, `range(from, to)`; at most [`ITEMS_MAX`] numbers.
fn range(first: i64, second: Option<i64>) -> Result<Value> {
    let (from, to) = second.map_or((0, first), |second| (first, second));
    let len = usize::try_from(to.saturating_sub(from)).unwrap_or(0);
    if len > ITEMS_MAX {
        return Err(failed(format!("a range of {len}, the limit is {ITEMS_MAX}")));
    }
    Ok(Value::from((from..to).map(Value::from).collect::<Vec<_>>()))
}

/// A JSON text, which is also YAML: what YAML 1.1 takes for a line break or refuses inside double quotes is escaped.
fn json(value: Value) -> Result<String> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "the value is undefined"));
    }
    let mut sink = Sink(Vec::new());
    serde_json::to_writer(&mut sink, &value).map_err(|e| failed(format!("the value can't be written as JSON within {LEN_MAX} bytes: {e}")))?;
    let text = String::from_utf8(sink.0).map_err(|e| failed(e.to_string()))?;
    if !text.chars().any(is_troublesome) {
        return Ok(text);
    }
    // All of these stand inside strings: JSON has no such character elsewhere.
    checked(text.chars().fold(String::new(), |mut out, c| {
        if is_troublesome(c) {
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            out.push(c);
        }
        out
    }))
}

fn is_troublesome(c: char) -> bool {
    matches!(c, '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}')
}

struct Sink(Vec<u8>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > LEN_MAX {
            return Err(std::io::Error::from(std::io::ErrorKind::FileTooLarge));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One word for a POSIX shell, always in single quotes (XCU 2.2.2).
fn shell(value: Value) -> Result<String> {
    let text = text_of(&value)?;
    if text.contains('\0') {
        return Err(failed("a shell word can't contain a NUL"));
    }
    checked(format!("'{}'", text.replace('\'', "'\\''")))
}

/// A value for a file of `name = value` lines: as it is, but one line without control characters and without space at the ends.
fn line(value: Value) -> Result<String> {
    let text = text_of(&value)?;
    if let Some(bad) = text.chars().find(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')) {
        return Err(failed(format!("the value contains U+{:04X} and does not fit on one line", u32::from(bad))));
    }
    if text.trim() != text {
        return Err(failed("the value starts or ends with white space, which the file would lose"));
    }
    Ok(text)
}

/// Text for XML and HTML, in elements and in quoted attributes.
fn xml(value: Value) -> Result<String> {
    let text = text_of(&value)?;
    if let Some(bad) = text.chars().find(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r')) {
        return Err(failed(format!("the value contains U+{:04X}, which XML can't hold", u32::from(bad))));
    }
    checked(text.chars().fold(String::new(), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
        out
    }))
}
