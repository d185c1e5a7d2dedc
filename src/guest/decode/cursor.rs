//! A JSON value together with its path, so that every error says where.

use std::{fmt::Display, str::FromStr};

use serde_json::{Map, Value};

use super::Args;
use crate::error::{Error, Result, Stage};

/// Where we are in a document.
#[derive(Clone)]
pub(super) struct Cursor<'v> {
    value: &'v Value,
    path: String,
}

impl<'v> Cursor<'v> {
    /// The document itself.
    pub(super) fn root(value: &'v Value) -> Self {
        Cursor { value, path: String::new() }
    }

    /// An error at this place.
    pub(super) fn error(&self, description: impl Into<String>) -> Error {
        Error::field(Stage::Request, self.path.clone(), description)
    }

    fn wrong_type(&self, wanted: &str) -> Error {
        let found = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        };
        self.error(format!("must be {wanted}, not {found}"))
    }

    /// Text.
    pub(super) fn text(&self) -> Result<&'v str> {
        self.value.as_str().ok_or_else(|| self.wrong_type("a string"))
    }

    /// Text that a type parses.
    pub(super) fn parse<T: FromStr<Err: Display>>(self) -> Result<T> {
        self.text()?.parse().map_err(|error: T::Err| self.error(error.to_string()))
    }

    /// `true` or `false`.
    pub(super) fn boolean(self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong_type("true or false"))
    }

    /// A whole number that fits the type.
    pub(super) fn number<T: TryFrom<u64>>(self) -> Result<T> {
        let number = self.value.as_u64().ok_or_else(|| self.wrong_type("a whole number, not negative"))?;
        T::try_from(number).map_err(|_| self.error(format!("{number} is too large")))
    }

    /// `true` or `false`, also as the number or word that YAML 1.1 writes by habit.
    pub(super) fn loose_boolean(self) -> Result<bool> {
        match (self.value.as_u64(), self.value.as_str().map(str::to_ascii_lowercase).as_deref()) {
            (Some(0), _) | (_, Some("false" | "no" | "off" | "n")) => Ok(false),
            (Some(1), _) | (_, Some("true" | "yes" | "on" | "y")) => Ok(true),
            _ => self.boolean(),
        }
    }

    /// A whole number, also written as text.
    pub(super) fn loose_number<T: TryFrom<u64>>(self) -> Result<T> {
        match self.value.as_str().map(str::parse::<u64>) {
            Some(Ok(number)) => T::try_from(number).map_err(|_| self.error(format!("{number} is too large"))),
            _ => self.number(),
        }
    }

    /// A word: text, or what YAML took for a number or boolean (a mode `1`, a state `off`).
    pub(super) fn word(&self) -> Result<String> {
        match self.value {
            Value::Number(number) => Ok(number.to_string()),
            Value::Bool(value) => Ok(value.to_string()),
            _ => Ok(self.text()?.to_owned()),
        }
    }

    /// The value itself.
    pub(super) fn value(&self) -> &'v Value {
        self.value
    }

    /// Where it is.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Whether this is an object.
    pub(super) fn is_object(&self) -> bool {
        self.value.is_object()
    }

    /// Whether this is an object with that member.
    pub(super) fn has(&self, name: &str) -> bool {
        self.value.get(name).is_some_and(|value| !value.is_null())
    }

    /// An object taken as it is.
    pub(super) fn map(self) -> Result<Args> {
        self.value.as_object().cloned().ok_or_else(|| self.wrong_type("an object"))
    }

    /// Whether this is a list.
    pub(super) fn is_list(&self) -> bool {
        self.value.is_array()
    }

    /// Whether this is a string.
    pub(super) fn is_text(&self) -> bool {
        self.value.is_string()
    }

    /// A list, each item decoded.
    pub(super) fn list<T>(self, decode: impl Fn(Cursor<'v>) -> Result<T>) -> Result<Vec<T>> {
        let items = self.value.as_array().ok_or_else(|| self.wrong_type("a list"))?;
        items.iter().enumerate().map(|(index, value)| decode(Cursor { value, path: format!("{}[{index}]", self.path) })).collect()
    }

    /// An object, field by field.
    pub(super) fn fields(&self) -> Result<Fields<'v>> {
        let fields = self.value.as_object().ok_or_else(|| self.wrong_type("an object"))?;
        Ok(Fields { fields, path: self.path.clone(), seen: Vec::new() })
    }
}

/// An object being read; it remembers which fields were asked for.
pub(super) struct Fields<'v> {
    fields: &'v Map<String, Value>,
    path: String,
    seen: Vec<&'static str>,
}

impl<'v> Fields<'v> {
    fn at(&self, name: &str) -> String {
        // Names come from the document: a control character must not get into logs.
        let name = name.chars().take(64).collect::<String>().escape_default().to_string();
        if self.path.is_empty() { name } else { format!("{}.{name}", self.path) }
    }

    /// A field that may be missing or null.
    pub(super) fn optional<T>(&mut self, name: &'static str, decode: impl FnOnce(Cursor<'v>) -> Result<T>) -> Result<Option<T>> {
        self.seen.push(name);
        match self.fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => decode(Cursor { value, path: self.at(name) }).map(Some),
        }
    }

    /// A field that must be there.
    pub(super) fn required<T>(&mut self, name: &'static str, decode: impl FnOnce(Cursor<'v>) -> Result<T>) -> Result<T> {
        let field = self.at(name);
        self.optional(name, decode)?.ok_or_else(|| Error::field(Stage::Request, field, "is missing"))
    }

    /// All fields, whatever their names.
    pub(super) fn each<T>(self, decode: impl Fn(&'v str, Cursor<'v>) -> Result<T>) -> Result<Vec<T>> {
        self.fields.iter().map(|(name, value)| decode(name, Cursor { value, path: self.at(name) })).collect()
    }

    /// The paths of fields that nobody asked for.
    pub(super) fn unknown(&self) -> Vec<String> {
        self.fields.keys().filter(|name| !self.seen.contains(&name.as_str())).map(|name| self.at(name)).collect()
    }

    /// Refuses a field that is known and can't be expressed, unless it has the value that means nothing.
    pub(super) fn refuse(&mut self, name: &'static str, nothing: &[Value], why: &str) -> Result<()> {
        self.seen.push(name);
        match self.fields.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if nothing.contains(value) => Ok(()),
            Some(_) => Err(Error::field(Stage::Request, self.at(name), format!("can't be expressed: {why}"))),
        }
    }

    /// Refuses fields that nobody asked for.
    pub(super) fn finish(self) -> Result<()> {
        let mut unknown = self.unknown().into_iter();
        let Some(first) = unknown.next() else { return Ok(()) };
        let why = format!("is not a known field; known are {}", self.seen.join(", "));
        Err(unknown.fold(Error::field(Stage::Request, first, why.clone()), |error, more| error.with_violation(more, why.clone())))
    }
}
