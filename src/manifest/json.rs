//! A strict JSON reader that remembers where things stand.
//!
//! A manifest comes from a stranger and its errors are read by people, so this reader does what a general one does not: it refuses duplicate keys
//! (two readers that keep different ones of them would see two different manifests), caps depth and size, and keeps line and column of every key
//! and value, so that a complaint about `disk.size` can point at the line. Numbers and escapes are left to `serde_json`: the grammar is RFC 8259's.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// A place in a text; both start at 1, columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Character in the line.
    pub column: usize,
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// A document with the place of each of its fields.
#[derive(Debug, Clone)]
pub struct Document {
    /// The document.
    pub value: Value,
    places: BTreeMap<String, usize>,
    text: String,
}

/// Why a text is not an acceptable document, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonError {
    /// Dotted path of the field being read; empty at the top.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// Where.
    pub position: Position,
}

/// Bytes of a path; what lies deeper shares the path of its ancestor. Without this a document of one megabyte could make gigabytes of paths.
const PATH_LEN_MAX: usize = 512;
/// Bytes of paths whose place is remembered; further fields are located by their nearest ancestor.
const PLACES_LEN_MAX: usize = 4 * 1024 * 1024;

/// Puts the path of a member after the path of its object: `a.b`, or `a["b c"]` when the name is not a plain word.
pub fn member(path: &str, name: &str) -> String {
    if path.len() > PATH_LEN_MAX {
        return path.to_owned();
    }
    let plain = !name.is_empty() && name.len() <= 128 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-$".contains(&b));
    match (plain, path.is_empty()) {
        (true, true) => name.to_owned(),
        (true, false) => format!("{path}.{name}"),
        (false, _) => format!("{path}[{}]", Value::from(name.chars().take(128).collect::<String>())),
    }
}

/// Puts the index of an element after the path of its array: `a[3]`.
pub fn element(path: &str, index: usize) -> String {
    if path.len() > PATH_LEN_MAX { path.to_owned() } else { format!("{path}[{index}]") }
}

impl Document {
    /// Reads one document of at most `len_max` bytes nested at most `depth_max` deep.
    pub fn parse(bytes: &[u8], len_max: usize, depth_max: usize) -> Result<Document, JsonError> {
        let at_start = Position { line: 1, column: 1 };
        if bytes.len() > len_max {
            let message = format!("the document has {} bytes, the limit is {len_max}", bytes.len());
            return Err(JsonError { field: String::new(), message, position: at_start });
        }
        let text = std::str::from_utf8(bytes).map_err(|e| {
            let valid = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
            JsonError { field: String::new(), message: "the document is not UTF-8".into(), position: position_in(&valid, valid.len()) }
        })?;
        let mut reader = Reader { text, at: 0, depth_max, places: BTreeMap::new(), places_len: 0 };
        let value = reader.document()?;
        Ok(Document { value, places: reader.places, text: text.to_owned() })
    }

    /// Where `field` stands: the key of a member, the start of an element. For a field that is absent, its nearest ancestor that is there.
    pub fn position(&self, field: &str) -> Position {
        let mut path = field;
        loop {
            if let Some(at) = self.places.get(path) {
                return position_in(&self.text, *at);
            }
            match path.rfind(['.', '[']) {
                Some(cut) => path = &path[..cut],
                None => return position_in(&self.text, self.places.get("").copied().unwrap_or(0)),
            }
        }
    }

    /// Whether `field` is in the document.
    pub fn has(&self, field: &str) -> bool {
        self.places.contains_key(field)
    }

    /// Line `number` (from 1) of the text, for showing it.
    pub fn line(&self, number: usize) -> &str {
        self.text.lines().nth(number.saturating_sub(1)).unwrap_or("")
    }
}

/// Line and column of byte `at` of `text`.
pub fn position_in(text: &str, at: usize) -> Position {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    Position { line: before.bytes().filter(|b| *b == b'\n').count() + 1, column: before[line_start..].chars().count() + 1 }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth_max: usize,
    places: BTreeMap<String, usize>,
    places_len: usize,
}

impl Reader<'_> {
    fn remember(&mut self, field: &str, at: usize) {
        self.places_len += field.len() + size_of::<usize>();
        if self.places_len <= PLACES_LEN_MAX && !self.places.contains_key(field) {
            self.places.insert(field.to_owned(), at);
        }
    }

    fn document(&mut self) -> Result<Value, JsonError> {
        if self.text.starts_with('\u{feff}') {
            return Err(self.error("", "the document starts with a byte order mark (RFC 8259, 8.1)"));
        }
        self.skip_space();
        self.remember("", self.at);
        let value = self.value("", 0)?;
        self.skip_space();
        if self.at < self.text.len() {
            return Err(self.error("", "there is something after the end of the document"));
        }
        Ok(value)
    }

    fn value(&mut self, path: &str, depth: usize) -> Result<Value, JsonError> {
        if depth > self.depth_max {
            return Err(self.error(path, format!("nested more than {} deep", self.depth_max)));
        }
        match self.peek() {
            Some(b'{') => self.object(path, depth),
            Some(b'[') => self.array(path, depth),
            Some(b'"') => self.string(path).map(Value::String),
            Some(b'-' | b'0'..=b'9') => self.number(path),
            Some(b'a'..=b'z' | b'A'..=b'Z') => self.word(path),
            Some(b'\'') => Err(self.error(path, "strings are written with double quotes")),
            Some(b'/' | b'#') => Err(self.error(path, "JSON has no comments")),
            Some(b',' | b']' | b'}') => Err(self.error(path, "a value is missing here (or the comma before it is one too many)")),
            Some(_) => Err(self.error(path, "a value can't start with this character")),
            None => Err(self.error(path, "the document ends where a value should be")),
        }
    }

    fn object(&mut self, path: &str, depth: usize) -> Result<Value, JsonError> {
        let mut members = Map::new();
        self.at += 1;
        self.skip_space();
        if self.take(b'}') {
            return Ok(Value::Object(members));
        }
        loop {
            self.skip_space();
            let at = self.at;
            if self.peek() != Some(b'"') {
                let message =
                    if self.peek() == Some(b'}') { "there is a comma too many before this" } else { "a key in double quotes is expected here" };
                return Err(self.error(path, message));
            }
            let name = self.string(path)?;
            let field = member(path, &name);
            if members.contains_key(&name) {
                self.at = at;
                return Err(self.error(&field, format!("the key {:?} is there twice", name.chars().take(64).collect::<String>())));
            }
            self.remember(&field, at);
            self.skip_space();
            if !self.take(b':') {
                return Err(self.error(&field, "a colon is expected after the key"));
            }
            self.skip_space();
            let value = self.value(&field, depth + 1)?;
            members.insert(name, value);
            self.skip_space();
            if self.take(b'}') {
                return Ok(Value::Object(members));
            }
            if !self.take(b',') {
                return Err(self.error(&field, "a comma or the closing brace is expected after this value"));
            }
        }
    }

    fn array(&mut self, path: &str, depth: usize) -> Result<Value, JsonError> {
        let mut elements = Vec::new();
        self.at += 1;
        self.skip_space();
        if self.take(b']') {
            return Ok(Value::Array(elements));
        }
        loop {
            self.skip_space();
            let field = element(path, elements.len());
            self.remember(&field, self.at);
            elements.push(self.value(&field, depth + 1)?);
            self.skip_space();
            if self.take(b']') {
                return Ok(Value::Array(elements));
            }
            if !self.take(b',') {
                return Err(self.error(&field, "a comma or the closing bracket is expected after this value"));
            }
        }
    }

    fn string(&mut self, path: &str) -> Result<String, JsonError> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        let mut end = start + 1;
        loop {
            match bytes.get(end) {
                Some(b'"') => break,
                Some(b'\\') => end += 2,
                Some(b'\n') | None => return Err(self.error(path, "this string is not closed")),
                Some(_) => end += 1,
            }
        }
        let literal = self.text.get(start..=end).unwrap_or("");
        let string = serde_json::from_str(literal).map_err(|e| {
            // The column of a one-line text is the byte in it.
            self.at = (start + e.column().saturating_sub(1)).min(end);
            self.error(path, format!("this string is not right: {}", without_position(&e)))
        })?;
        self.at = end + 1;
        Ok(string)
    }

    fn number(&mut self, path: &str) -> Result<Value, JsonError> {
        let rest = &self.text[self.at..];
        let len = rest.find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E')).unwrap_or(rest.len());
        let number = serde_json::from_str(&rest[..len]).map_err(|e| self.error(path, format!("this is not a number: {}", without_position(&e))))?;
        self.at += len;
        Ok(Value::Number(number))
    }

    fn word(&mut self, path: &str) -> Result<Value, JsonError> {
        let rest = &self.text[self.at..];
        let len = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        let value = match &rest[..len] {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            "null" => Value::Null,
            word => return Err(self.error(path, format!("{:?} is not a JSON value", word.chars().take(32).collect::<String>()))),
        };
        self.at += len;
        Ok(value)
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn error(&self, path: &str, message: impl Into<String>) -> JsonError {
        JsonError { field: path.to_owned(), message: message.into(), position: position_in(self.text, self.at) }
    }
}

/// `serde_json` appends its own position, which is one inside the fragment it was given.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Document, JsonError> {
        Document::parse(text.as_bytes(), 1 << 20, 64)
    }

    #[test]
    fn what_it_accepts_is_what_serde_json_accepts() {
        for text in
            ["{}", "[]", " [1, -2.5e3, \"a\\u00e9\\n\", true, false, null, {\"a\": [[]]}] ", "\"x\"", "0", "[18446744073709551615]", "{\"\": 1}"]
        {
            assert_eq!(parse(text).map(|d| d.value), Ok(serde_json::from_str(text).expect("JSON")), "{text}");
        }
        for text in [
            "",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "01",
            "1.",
            "nul",
            "\"\\x\"",
            "\"\\ud800\"",
            "\"a\nb\"",
            "[1 2]",
            "{a:1}",
            "'a'",
            "{} {}",
            "\u{feff}{}",
            "// x",
            "\"\\",
            "\"\\\"",
            "+1",
            "NaN",
        ] {
            assert!(parse(text).is_err() && serde_json::from_str::<Value>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn errors_and_fields_have_line_and_column() {
        let error = parse("{\n  \"a\": 1,\n  \"é\": x\n}").expect_err("bad word");
        assert_eq!((error.position, error.field.as_str()), (Position { line: 3, column: 8 }, "[\"é\"]"));
        let twice = parse("{\"a\": {\"b\": 1,\n \"b\": 2}}").expect_err("twice");
        assert_eq!((twice.position, twice.field.as_str()), (Position { line: 2, column: 2 }, "a.b"));
        let document = parse("{\"a\": [1,\n  {\"b c\": 2}],\n \"d\": {}}").expect("right");
        assert_eq!(document.position("a[1]"), Position { line: 2, column: 3 });
        assert_eq!(document.position("a[1][\"b c\"]"), Position { line: 2, column: 4 });
        assert_eq!(document.position("d.size.x"), Position { line: 3, column: 2 });
        assert_eq!(document.position("nowhere"), Position { line: 1, column: 1 });
    }

    #[test]
    fn size_depth_and_encoding_are_limited() {
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(&deep(65)).is_ok());
        assert!(parse(&deep(66)).is_err());
        assert!(parse(&"[".repeat(1 << 19)).is_err());
        assert!(Document::parse(b"[1]", 2, 64).is_err());
        assert_eq!(Document::parse(b"[\n\"\xff\"]", 100, 64).expect_err("encoding").position, Position { line: 2, column: 2 });
    }

    #[test]
    fn paths_do_not_outgrow_the_document() {
        let key = "k".repeat(120);
        let text = format!("{}[{}0]{}", format!("{{\"{key}\":").repeat(60), "0,".repeat(400_000), "}".repeat(60));
        let document = parse(&text).expect("right");
        assert!(document.places.keys().map(String::len).sum::<usize>() <= PLACES_LEN_MAX);
        assert!(document.places.keys().all(|path| path.len() < 2 * PATH_LEN_MAX));
    }

    proptest::proptest! {
        #[test]
        fn it_agrees_with_serde_json_on_anything(text in "[\\[\\]{}:,\" a1.e\\\\u\\-0tfn]{0,24}") {
            match (parse(&text), serde_json::from_str::<Value>(&text)) {
                (Ok(ours), Ok(theirs)) => proptest::prop_assert_eq!(ours.value, theirs),
                (Err(error), Ok(_)) => proptest::prop_assert!(error.message.contains("twice"), "{:?}: {:?}", text, error),
                (Ok(_), Err(error)) => proptest::prop_assert!(false, "{:?}: {}", text, error),
                (Err(_), Err(_)) => {}
            }
        }
    }
}
