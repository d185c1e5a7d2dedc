//! References inside a schema: they stay in the document, they end, and they don't multiply.
//!
//! A schema that refers to itself sends a validator into endless recursion, one that refers twice to something that refers twice to something …
//! costs 2^n. Arguments need neither, so both are refused before anything walks the schema.

use serde_json::Value;

use crate::{
    error::{Error, Result, Stage},
    manifest::json,
};

/// Parts of a schema with every reference replaced by what it refers to.
const EXPANDED_MAX: usize = 20_000;
/// Regular expressions in it; each may take a quarter of a megabyte.
const PATTERNS_MAX: usize = 128;
/// References inside references.
const REFERENCES_MAX: usize = 32;

/// Refuses references that lead out of the document, those found only at run time, and identifiers that would redirect the others.
pub fn check_targets(schema: &Value, field: &str) -> Result<()> {
    match schema {
        Value::Object(members) => {
            for (key, value) in members {
                let at = json::member(field, key);
                match (key.as_str(), value.as_str()) {
                    ("$ref", Some(target)) if !target.starts_with("#/") => {
                        let message = format!("{target:?} leads out of the schema or to all of it; a reference starts with \"#/\"");
                        return Err(Error::field(Stage::Manifest, at, message).with_reason("REMOTE_SCHEMA_REFERENCE"));
                    }
                    ("$dynamicRef" | "$recursiveRef", Some(_)) => {
                        return Err(Error::field(Stage::Manifest, at, "references that are resolved at run time are not supported; use $ref"));
                    }
                    ("$id" | "id", Some(_)) if field != "args" => {
                        return Err(Error::field(Stage::Manifest, at, "an identifier inside the schema would redirect its references; leave it out"));
                    }
                    ("default" | "enum" | "const" | "examples", _) => {}
                    _ => check_targets(value, &at)?,
                }
            }
            Ok(())
        }
        Value::Array(elements) => elements.iter().enumerate().try_for_each(|(index, value)| check_targets(value, &json::element(field, index))),
        _ => Ok(()),
    }
}

/// Refuses references that lead nowhere, to themselves, or make the schema too large.
pub fn check_expansion(schema: &Value) -> Result<()> {
    expand(schema, schema, &mut Vec::new(), &mut Seen::default())
}

#[derive(Default)]
struct Seen {
    parts: usize,
    patterns: usize,
}

fn expand<'a>(root: &'a Value, part: &'a Value, open: &mut Vec<&'a str>, seen: &mut Seen) -> Result<()> {
    let refuse = |message: String| Err(Error::field(Stage::Manifest, "args", message));
    seen.parts += 1;
    seen.patterns += usize::from(part.get("pattern").is_some_and(Value::is_string));
    seen.patterns += part.get("patternProperties").and_then(Value::as_object).map_or(0, serde_json::Map::len);
    if seen.parts > EXPANDED_MAX || seen.patterns > PATTERNS_MAX {
        return refuse(format!("the schema has more than {EXPANDED_MAX} parts or {PATTERNS_MAX} patterns when its references are followed"));
    }
    if let Some(target) = part.get("$ref").and_then(Value::as_str) {
        if open.contains(&target) || open.len() >= REFERENCES_MAX {
            return refuse(format!("the reference {target:?} leads to itself or through more than {REFERENCES_MAX} others"));
        }
        let Some(referred) = target.strip_prefix('#').and_then(|pointer| root.pointer(pointer)) else {
            return refuse(format!("the reference {target:?} leads nowhere"));
        };
        open.push(target);
        expand(root, referred, open, seen)?;
        open.pop();
    }
    match part {
        Value::Object(members) => {
            let schemas = members.iter().filter(|(key, _)| !matches!(key.as_str(), "default" | "enum" | "const" | "examples"));
            schemas.map(|(_, value)| value).try_for_each(|value| expand(root, value, open, seen))
        }
        Value::Array(elements) => elements.iter().try_for_each(|value| expand(root, value, open, seen)),
        _ => Ok(()),
    }
}

/// What a part of a schema refers to in the end: itself without `$ref`.
pub fn follow<'a>(root: &'a Value, mut part: &'a Value) -> Option<&'a Value> {
    for _ in 0..=REFERENCES_MAX {
        match part.get("$ref").and_then(Value::as_str) {
            Some(target) => part = root.pointer(target.strip_prefix('#')?)?,
            None => return Some(part),
        }
    }
    None
}

/// Whether a property or anything in it is marked `"writeOnly": true` or `"format": "password"`.
pub fn is_marked_secret(root: &Value, part: &Value) -> bool {
    match part {
        Value::Object(members) => {
            members.get("writeOnly") == Some(&Value::Bool(true))
                || members.get("format").and_then(Value::as_str) == Some("password")
                || members.get("$ref").is_some() && follow(root, part).is_some_and(|referred| is_marked_secret(root, referred))
                || members
                    .iter()
                    .any(|(key, value)| !matches!(key.as_str(), "default" | "enum" | "const" | "examples") && is_marked_secret(root, value))
        }
        Value::Array(elements) => elements.iter().any(|value| is_marked_secret(root, value)),
        _ => false,
    }
}
