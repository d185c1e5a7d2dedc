//! Taking fields out of an object, collecting what is wrong.

use serde_json::{Map, Value};

use crate::{
    error::{Error, Kind, Result, Stage, Violation},
    manifest::{
        hint,
        json::{element, member},
    },
    units::{Bytes, MIB},
};

/// Problems reported at once; a document of a megabyte could hold very many.
const PROBLEMS_MAX: usize = 64;
/// Elements of any list.
const LIST_LEN_MAX: usize = 4096;
/// Bytes of the largest disk: 1 PiB, far above what any filesystem here is made for, far below overflow.
const SIZE_MAX: u64 = 1 << 50;
/// Granularity of disks: what partitions are aligned to.
pub const DISK_UNIT: u64 = MIB;

/// What is wrong so far.
#[derive(Default)]
pub struct Fields {
    violations: Vec<Violation>,
    reason: Option<&'static str>,
}

impl Fields {
    /// A problem.
    pub fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        if self.violations.len() < PROBLEMS_MAX {
            self.violations.push(Violation { field: field.into(), description: description.into() });
        }
    }

    /// The problems of a part that has its own errors.
    pub fn adopt(&mut self, error: &Error) {
        error.violations().iter().for_each(|v| self.add(v.field.clone(), v.description.clone()));
        if error.reason() != "INVALID_REQUEST" {
            self.reason = self.reason.or(Some(error.reason()));
        }
    }

    /// `value`, if nothing was wrong.
    pub fn finish<T>(self, value: T) -> Result<T> {
        let Some(first) = self.violations.first() else { return Ok(value) };
        let error = Error::new(Kind::InvalidRequest, Stage::Manifest, first.field.clone(), first.description.clone());
        let error = error.with_reason(self.reason.unwrap_or("MANIFEST_INVALID"));
        Err(self.violations.into_iter().fold(error, |error, v| error.with_violation(v.field, v.description)))
    }

    /// An object with no other members than `known` and vendor extensions (`x-…`).
    pub fn object<'v>(&mut self, value: &'v Value, field: &str, known: &[&str]) -> Option<&'v Map<String, Value>> {
        let Value::Object(members) = value else {
            self.add(field, format!("must be an object, not {}", hint::kind_of(value)));
            return None;
        };
        for name in members.keys().filter(|name| !known.contains(&name.as_str()) && !name.starts_with("x-")) {
            // What drafts of the format before 0.0.2 called differently.
            let suggestion = match name.as_str() {
                "ignore" if known.contains(&"volatile") => "; it is called \"volatile\" since 0.0.2".to_owned(),
                "config" if known.contains(&"args") => "; it is called \"args\"".to_owned(),
                _ => hint::did_you_mean(name, known),
            };
            let place = if field.is_empty() { "a manifest".to_owned() } else { field.to_owned() };
            self.add(member(field, name), format!("is not a field of {place}{suggestion}"));
        }
        Some(members)
    }

    /// A string; other values are problems.
    fn string<'v>(&mut self, members: &'v Map<String, Value>, field: &str, key: &str) -> Option<&'v str> {
        let value = members.get(key)?;
        if value.as_str().is_none() {
            self.add(member(field, key), format!("must be a string, not {}", hint::kind_of(value)));
        }
        value.as_str()
    }

    /// A string that a parser accepts.
    pub fn checked<T>(
        &mut self,
        members: &Map<String, Value>,
        field: &str,
        key: &str,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Option<T> {
        let text = self.string(members, field, key)?;
        parse(text).map_err(|message| self.add(member(field, key), message)).ok()
    }

    /// Text of several lines.
    pub fn text(&mut self, members: &Map<String, Value>, field: &str, key: &str, len_max: usize) -> Option<String> {
        self.checked(members, field, key, |text| printable(text, len_max, true))
    }

    /// Text of one line.
    pub fn line(&mut self, members: &Map<String, Value>, field: &str, key: &str, len_max: usize) -> Option<String> {
        self.checked(members, field, key, |text| printable(text, len_max, false))
    }

    /// A word of `A-Z a-z 0-9 . _ -`.
    pub fn word(&mut self, members: &Map<String, Value>, field: &str, key: &str, len_max: usize) -> Option<String> {
        self.checked(members, field, key, |text| {
            let text = printable(text, len_max, false)?;
            match text.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-".contains(*c)) {
                Some(bad) => Err(format!("{text:?} contains {bad:?}; allowed are letters, digits and \"._-\"")),
                None if text.is_empty() => Err("is empty".into()),
                None => Ok(text),
            }
        })
    }

    /// One of several words.
    pub fn choice<T: Copy>(&mut self, members: &Map<String, Value>, field: &str, key: &str, choices: &[(&str, T)]) -> Option<T> {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.checked(members, field, key, |text| {
            let found = choices.iter().find(|(name, _)| *name == text);
            found.map(|(_, choice)| *choice).ok_or_else(|| {
                let shown: String = text.chars().take(64).collect();
                format!("{shown:?} is not one of {}{}", names.join(", "), hint::did_you_mean(text, &names))
            })
        })
    }

    /// A number of bytes, or a string with a unit, of at least `min` and a multiple of `unit`.
    pub fn size(&mut self, members: &Map<String, Value>, field: &str, key: &str, min: u64, unit: u64) -> Option<Bytes> {
        let value = members.get(key)?;
        let size = match value {
            Value::String(text) => text.parse::<Bytes>(),
            Value::Number(number) => number.as_u64().map(Bytes).ok_or_else(|| format!("{number} is not a whole number of bytes")),
            other => Err(format!("must be a number of bytes or a string such as \"10 GiB\", not {}", hint::kind_of(other))),
        };
        let size = size.and_then(|size| match size.0 {
            n if n < min => Err(format!("{size} is less than {}", Bytes(min))),
            n if n > SIZE_MAX => Err(format!("{size} is more than {}", Bytes(SIZE_MAX))),
            n if n % unit != 0 => Err(format!("{n} bytes is not a multiple of {}", Bytes(unit))),
            _ => Ok(size),
        });
        size.map_err(|message| self.add(member(field, key), message)).ok()
    }

    /// A whole number in a range.
    pub fn number(&mut self, members: &Map<String, Value>, field: &str, key: &str, range: std::ops::RangeInclusive<u32>) -> Option<u32> {
        let value = members.get(key)?;
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| range.contains(number));
        if number.is_none() {
            let shown: String = value.to_string().chars().take(64).collect();
            self.add(member(field, key), format!("must be a whole number from {} to {}, not {shown}", range.start(), range.end()));
        }
        number
    }

    /// `true` or `false`; false when it is not there.
    pub fn flag(&mut self, members: &Map<String, Value>, field: &str, key: &str) -> bool {
        match members.get(key) {
            None => false,
            Some(Value::Bool(value)) => *value,
            Some(other) => {
                self.add(member(field, key), format!("must be true or false, not {}", hint::kind_of(other)));
                false
            }
        }
    }

    /// A list.
    pub fn list<'v>(&mut self, value: &'v Value, field: &str) -> &'v [Value] {
        match value {
            Value::Array(elements) if elements.len() <= LIST_LEN_MAX => return elements,
            Value::Array(elements) => self.add(field, format!("has {} elements, the limit is {LIST_LEN_MAX}", elements.len())),
            other => self.add(field, format!("must be a list, not {}", hint::kind_of(other))),
        }
        &[]
    }

    /// A list of strings.
    pub fn texts(&mut self, members: &Map<String, Value>, field: &str, key: &str, len_max: usize) -> Vec<String> {
        let Some(value) = members.get(key) else { return Vec::new() };
        let at = member(field, key);
        let mut texts = Vec::new();
        for (index, value) in self.list(value, &at).iter().enumerate() {
            match value.as_str() {
                Some(text) if text.len() <= len_max => texts.push(text.to_owned()),
                Some(text) => self.add(element(&at, index), format!("has {} bytes, the limit is {len_max}", text.len())),
                None => self.add(element(&at, index), format!("must be a string, not {}", hint::kind_of(value))),
            }
        }
        texts
    }

    /// A command: one string, or a list of words.
    pub fn command(&mut self, members: &Map<String, Value>, field: &str, key: &str) -> Vec<String> {
        const LEN_MAX: usize = 4096;
        match members.get(key) {
            Some(Value::Array(_)) => self.texts(members, field, key, LEN_MAX),
            Some(Value::String(_)) => self.text(members, field, key, LEN_MAX).into_iter().collect(),
            Some(other) => {
                self.add(member(field, key), format!("must be a string or a list of strings, not {}", hint::kind_of(other)));
                Vec::new()
            }
            None => Vec::new(),
        }
    }
}

/// Accepts text without control characters; line ends and tabs only in text of several lines.
fn printable(text: &str, len_max: usize, lines: bool) -> std::result::Result<String, String> {
    if text.len() > len_max {
        return Err(format!("has {} bytes, the limit is {len_max}", text.len()));
    }
    match text.chars().find(|c| c.is_control() && !(lines && matches!(c, '\n' | '\r' | '\t'))) {
        Some(bad) => Err(format!("contains the control character U+{:04X}", u32::from(bad))),
        None => Ok(text.to_owned()),
    }
}
