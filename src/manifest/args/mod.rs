//! `args`: what a user may configure, as a JSON Schema.
//!
//! Two spellings, as in 2010. *Bare*: a map of names to property schemas, where a member without any schema keyword is a group of further
//! properties. *Whole*: an object schema with `type` (or `$schema`, or `properties`). [`legacy`] turns the first, and what the drafts of 2010 wrote
//! differently in both, into today's JSON Schema.
//!
//! Required or not: the drafts of 2010 had every property required unless `"optional": true`, and a value with a `default` is never missing. That
//! holds for the bare form and for a whole schema of that time; a schema that says `$schema` (draft 4 or later) or lists `required` means what it
//! says. Names that the bare form doesn't declare are refused (in 2010 they were silently passed on, which hid spelling mistakes).
//!
//! A schema never leads anywhere: `$ref` only within the document, no retrieval, patterns with a backtracking limit. Properties marked
//! `"writeOnly": true` or `"format": "password"` are secret: their values appear in no message.

mod defaults;
mod legacy;
mod references;

use std::{collections::BTreeSet, sync::Arc};

use jsonschema::{Draft, PatternOptions, ValidationError, Validator, error::ValidationErrorKind};
use serde_json::{Map, Value};

use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::{hint, json},
};

/// Bytes of the resolved arguments as JSON; room for keys and certificates, and a bound for what templates can multiply.
pub const ARGS_LEN_MAX: usize = 64 * 1024;
/// Backtracking steps of one `pattern`.
const BACKTRACK_MAX: usize = 100_000;
/// Compiled size of one `pattern`, bytes.
const PATTERN_COMPILED_MAX: usize = 256 * 1024;
/// Violations reported at once.
const VIOLATIONS_MAX: usize = 32;

/// The compiled `args` of a manifest.
#[derive(Clone)]
pub struct Args {
    /// The schema in today's spelling.
    schema: Arc<Value>,
    validator: Arc<Validator>,
    secret: BTreeSet<String>,
}

impl Args {
    /// Compiles the value of a manifest's `args`. Violations are below `args`.
    pub fn compile(args: &Value) -> Result<Args> {
        let Value::Object(members) = args else {
            return Err(Error::field(Stage::Manifest, "args", format!("must be an object, not {}", hint::kind_of(args))));
        };
        references::check_targets(args, "args")?;
        let (schema, draft) = legacy::modernise(members)?;
        references::check_expansion(&schema)?;
        let validator = jsonschema::options()
            .with_draft(draft)
            .with_pattern_options(PatternOptions::fancy_regex().backtrack_limit(BACKTRACK_MAX).size_limit(PATTERN_COMPILED_MAX))
            .should_validate_formats(true)
            .offline()
            .build(&schema)
            .map_err(|e| Error::field(Stage::Manifest, written_at(args, &e), format!("is not usable in a JSON Schema: {}", short(&e.to_string()))))?;
        let secret =
            property_schemas(&schema).filter(|(_, property)| references::is_marked_secret(&schema, property)).map(|(name, _)| name.clone()).collect();
        let args = Args { schema: Arc::new(schema), validator: Arc::new(validator), secret };
        args.check_defaults()?;
        Ok(args)
    }

    /// The arguments with defaults filled in, checked. `Kind::InvalidRequest` with a violation per problem, at `args.NAME`.
    pub fn resolve(&self, given: &Map<String, Value>) -> Result<Map<String, Value>> {
        let mut resolved = Value::Object(given.clone());
        defaults::fill(&self.schema, &self.schema, &mut resolved);
        let len = serde_json::to_vec(&resolved).map_or(usize::MAX, |text| text.len());
        if len > ARGS_LEN_MAX {
            return Err(Error::field(Stage::Request, "args", format!("have {len} bytes as JSON, the limit is {ARGS_LEN_MAX}")));
        }
        let mut violations = self.violations(&resolved, |_| true);
        control_characters(&resolved, "args", &mut violations);
        match resolved {
            Value::Object(resolved) if violations.is_empty() => Ok(resolved),
            _ => Err(from_violations(Stage::Request, violations)),
        }
    }

    /// Whether the top-level argument `name` is secret, or anything in it.
    pub fn is_secret(&self, name: &str) -> bool {
        self.secret.contains(name)
    }

    /// The names of the secret arguments.
    pub fn secret_names(&self) -> impl Iterator<Item = &str> {
        self.secret.iter().map(String::as_str)
    }

    /// The declared names with their schemas, for showing a user what can be given.
    pub fn properties(&self) -> impl Iterator<Item = (&String, &Value)> {
        property_schemas(&self.schema)
    }

    /// The schema in today's spelling: what the arguments are checked against.
    pub fn schema(&self) -> &Value {
        &self.schema
    }

    /// Defaults must themselves be right: a manifest whose defaults don't pass could never be rendered without arguments.
    fn check_defaults(&self) -> Result<()> {
        let mut filled = Value::Object(Map::new());
        defaults::fill(&self.schema, &self.schema, &mut filled);
        let len = serde_json::to_vec(&filled).map_or(usize::MAX, |text| text.len());
        if len > ARGS_LEN_MAX {
            return Err(Error::field(Stage::Manifest, "args", format!("the defaults have {len} bytes as JSON, the limit is {ARGS_LEN_MAX}")));
        }
        // What is missing can be given; what is said of all arguments together may depend on that.
        let of_a_value = |error: &ValidationError<'_>| {
            !matches!(error.kind(), ValidationErrorKind::Required { .. }) && error.instance_path().iter().next().is_some()
        };
        let violations = self.violations(&filled, of_a_value);
        let violations: Vec<_> =
            violations.into_iter().map(|(field, text)| (default_field(&self.schema, &field), format!("the default {text}"))).collect();
        if violations.is_empty() { Ok(()) } else { Err(from_violations(Stage::Manifest, violations)) }
    }

    fn violations(&self, instance: &Value, wanted: impl Fn(&ValidationError<'_>) -> bool) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for error in self.validator.iter_errors(instance).filter(wanted).take(VIOLATIONS_MAX) {
            let mut field = "args".to_owned();
            let mut top = None;
            for segment in error.instance_path() {
                match segment {
                    jsonschema::paths::LocationSegment::Property(name) => {
                        top = top.or_else(|| Some(name.to_string()));
                        field = json::member(&field, &name);
                    }
                    jsonschema::paths::LocationSegment::Index(index) => field = json::element(&field, index),
                }
            }
            match error.kind() {
                ValidationErrorKind::Required { property } => {
                    found.push((json::member(&field, property.as_str().unwrap_or_default()), "is required and has no default".to_owned()));
                }
                ValidationErrorKind::AdditionalProperties { unexpected } => {
                    for name in unexpected.iter().take(VIOLATIONS_MAX) {
                        let known: Vec<&str> = property_schemas(&self.schema).map(|(name, _)| name.as_str()).collect();
                        let hint = if top.is_none() { hint::did_you_mean(name, &known) } else { String::new() };
                        found.push((json::member(&field, name), format!("is not an argument of this image{hint}")));
                    }
                }
                ValidationErrorKind::BacktrackLimitExceeded { .. } => found.push((field, "needs too many steps to match its pattern".to_owned())),
                _ => {
                    // Objects and lists may hold secrets deeper down; only plain values that are not secret are shown.
                    let instance = error.instance();
                    let hidden = top.as_deref().is_none_or(|name| self.is_secret(name)) || instance.is_object() || instance.is_array();
                    let text = if hidden { error.masked_with("the value").to_string() } else { error.to_string() };
                    found.push((field, short(&text)));
                }
            }
        }
        found
    }
}

impl std::fmt::Debug for Args {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Args({})", property_schemas(&self.schema).map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", "))
    }
}

/// Where the author wrote what an error of the compiled schema is about: the bare form has no `properties` in between.
fn written_at(args: &Value, error: &ValidationError<'_>) -> String {
    let mut field = "args".to_owned();
    let mut part = args;
    for segment in error.instance_path() {
        let (next, at) = match &segment {
            jsonschema::paths::LocationSegment::Property(name) => (part.get(name.as_ref()), json::member(&field, name)),
            jsonschema::paths::LocationSegment::Index(index) => (part.get(index), json::element(&field, *index)),
        };
        if let Some(next) = next {
            (part, field) = (next, at);
        }
    }
    field
}

fn property_schemas(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema.get("properties").and_then(Value::as_object).into_iter().flatten()
}

/// `args.a.b` of an instance is `args.a.b.default` in a bare manifest and `args.properties.a.default` in a whole one: point at the nearest.
fn default_field(schema: &Value, field: &str) -> String {
    let name = field.strip_prefix("args.").unwrap_or(field).split(['.', '[']).next().unwrap_or_default();
    let in_property = schema.pointer("/properties").and_then(|p| p.get(name)).is_some_and(|p| p.get("default").is_some());
    if in_property { format!("args.{name}.default") } else { field.to_owned() }
}

/// Arguments end up in configuration files of all kinds: C0 and C1 characters other than tab and line ends have no honest use there.
fn control_characters(value: &Value, field: &str, violations: &mut Vec<(String, String)>) {
    match value {
        Value::String(text) => {
            if let Some(bad) = text.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t')) {
                violations.push((field.to_owned(), format!("contains the control character U+{:04X}", u32::from(bad))));
            }
        }
        Value::Array(elements) => {
            elements.iter().enumerate().for_each(|(index, value)| control_characters(value, &json::element(field, index), violations))
        }
        Value::Object(members) => members.iter().for_each(|(name, value)| {
            if name.chars().any(char::is_control) {
                violations.push((json::member(field, name), "the name contains a control character".to_owned()));
            }
            control_characters(value, &json::member(field, name), violations);
        }),
        _ => {}
    }
}

fn from_violations(stage: Stage, violations: Vec<(String, String)>) -> Error {
    let mut violations = violations.into_iter();
    let (field, text) = violations.next().unwrap_or_else(|| ("args".into(), "are not right".into()));
    violations.fold(Error::new(Kind::InvalidRequest, stage, field.clone(), text.clone()).with_violation(field, text), |error, (field, text)| {
        error.with_violation(field, text)
    })
}

fn short(text: &str) -> String {
    const LEN_MAX: usize = 300;
    if text.chars().count() <= LEN_MAX { text.to_owned() } else { text.chars().take(LEN_MAX).chain(['…']).collect() }
}

/// The draft for schemas that name none.
const DRAFT: Draft = Draft::Draft7;

#[cfg(test)]
mod tests;
