//! From the schemas of 2010 to today's.
//!
//! JSON Schema drafts 1 to 3 were current: `optional` (required by default), `required` as a boolean, type `any`, unions that hold schemas,
//! `divisibleBy`, `disallow`, `extends`, `requires`, `minimumCanEqual`. The bare form is unfolded here too.

use jsonschema::Draft;
use serde_json::{Map, Value, json};

use super::DRAFT;
use crate::{
    error::{Error, Result, Stage},
    manifest::json::member,
};

/// Today's spelling of the value of `args`, and the draft it is to be read as.
pub fn modernise(args: &Map<String, Value>) -> Result<(Value, Draft)> {
    if let Some(draft) = args.get("$schema").and_then(Value::as_str) {
        // Drafts up to 3 are the ones that this module translates.
        if !draft.contains("draft-01") && !draft.contains("draft-02") && !draft.contains("draft-03") {
            let draft = known_draft(draft)?;
            return Ok((Value::Object(args.clone()), draft));
        }
    }
    if is_whole(args) {
        let mut whole = args.clone();
        whole.remove("$schema");
        if let Some(kind) = whole.get("type").filter(|kind| kind.as_str().is_some_and(|kind| kind != "object" && kind != "any")) {
            return Err(Error::field(Stage::Manifest, "args.type", format!("must be \"object\", not {kind}: arguments have names")));
        }
        whole.insert("type".into(), json!("object"));
        return Ok((Value::Object(schema(&whole, "args")?), DRAFT));
    }
    group(args, "args").map(|schema| (Value::Object(schema), DRAFT))
}

fn known_draft(uri: &str) -> Result<Draft> {
    let drafts = [
        ("draft-04", Draft::Draft4),
        ("draft-06", Draft::Draft6),
        ("draft-07", Draft::Draft7),
        ("2019-09", Draft::Draft201909),
        ("2020-12", Draft::Draft202012),
    ];
    match drafts.into_iter().find(|(name, _)| uri.contains("json-schema.org/") && uri.contains(name)) {
        Some((_, draft)) => Ok(draft),
        None => Err(Error::field(
            Stage::Manifest,
            "args.$schema",
            format!("{:?} is not a known JSON Schema draft (1 to 4, 6, 7, 2019-09, 2020-12)", uri.chars().take(80).collect::<String>()),
        )),
    }
}

/// Whether this is one schema for all arguments rather than a map of them. In 2010: whether it has `type`. An argument may be called `type`, then
/// the value is an object.
fn is_whole(args: &Map<String, Value>) -> bool {
    let keyword = |name: &str| args.get(name).is_some_and(|value| !value.is_object());
    let properties = args.get("properties").and_then(Value::as_object);
    keyword("type") || keyword("$schema") || keyword("$ref") || properties.is_some_and(|p| !p.is_empty() && p.values().all(Value::is_object))
}

/// A map of properties, as the bare form and its groups have it: nothing but these.
fn group(members: &Map<String, Value>, field: &str) -> Result<Map<String, Value>> {
    let (properties, required) = properties(members, field)?;
    let mut schema = Map::new();
    schema.insert("type".into(), json!("object"));
    schema.insert("properties".into(), Value::Object(properties));
    schema.insert("required".into(), json!(required));
    schema.insert("additionalProperties".into(), json!(false));
    Ok(schema)
}

fn properties(members: &Map<String, Value>, field: &str) -> Result<(Map<String, Value>, Vec<String>)> {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for (name, given) in members {
        let at = member(field, name);
        let Value::Object(given) = given else {
            return Err(Error::field(Stage::Manifest, at, "must be an object that describes the argument, such as {\"type\": \"string\"}"));
        };
        let property = if is_property_schema(given) { schema(given, &at)? } else { group(given, &at)? };
        // A group that nothing in it makes required is not required either.
        let optional = match (given.get("optional"), given.get("required")) {
            (Some(Value::Bool(optional)), _) => *optional,
            (_, Some(Value::Bool(required))) => !required,
            _ => property.get("default").is_some() || (!is_property_schema(given) && property.get("required") == Some(&json!([]))),
        };
        if !optional {
            required.push(name.clone());
        }
        properties.insert(name.clone(), Value::Object(property));
    }
    Ok((properties, required))
}

/// Tells a property's schema from a group of properties: the schema has a keyword whose value is what that keyword takes.
fn is_property_schema(given: &Map<String, Value>) -> bool {
    given.is_empty()
        || given.iter().any(|(key, value)| match key.as_str() {
            "type" => !value.is_object(),
            "default" | "const" => true,
            "description" | "title" | "format" | "pattern" | "$ref" | "$comment" | "contentEncoding" | "contentMediaType" => value.is_string(),
            "optional" | "required" | "readOnly" | "writeOnly" | "uniqueItems" | "deprecated" => value.is_boolean() || value.is_array(),
            "enum" | "examples" | "allOf" | "anyOf" | "oneOf" => value.is_array(),
            "minimum" | "maximum" | "minLength" | "maxLength" | "minItems" | "maxItems" | "multipleOf" | "divisibleBy" | "exclusiveMinimum"
            | "exclusiveMaximum" => value.is_number(),
            _ => false,
        })
}

/// One schema in today's spelling, everything below it included.
fn schema(given: &Map<String, Value>, field: &str) -> Result<Map<String, Value>> {
    let mut out = given.clone();
    out.remove("optional");
    if given.get("required").is_some_and(Value::is_boolean) {
        out.remove("required");
    }
    kinds(&mut out, field)?;
    if let Some(Value::Object(members)) = given.get("properties") {
        let (properties, required) = properties(members, &member(field, "properties"))?;
        out.insert("properties".into(), Value::Object(properties));
        if !given.get("required").is_some_and(Value::is_array) {
            out.insert("required".into(), json!(required));
        }
    }
    for key in ["items", "additionalProperties", "additionalItems", "not", "contains", "propertyNames"] {
        if let Some(Value::Object(inner)) = given.get(key) {
            out.insert(key.into(), Value::Object(schema(inner, &member(field, key))?));
        }
    }
    rename(&mut out);
    Ok(out)
}

/// `type`: the union types and names of the old drafts.
fn kinds(out: &mut Map<String, Value>, field: &str) -> Result<()> {
    let known = |name: &str| matches!(name, "string" | "number" | "integer" | "boolean" | "object" | "array" | "null");
    let names: Vec<Value> = match out.get("type") {
        Some(Value::String(name)) => vec![json!(name)],
        Some(Value::Array(names)) => names.clone(),
        None => return Ok(()),
        Some(_) => return Err(Error::field(Stage::Manifest, member(field, "type"), "must be the name of a type or a list of them")),
    };
    if names.iter().any(|name| name == "any") {
        out.remove("type");
        return Ok(());
    }
    if let Some(bad) = names.iter().find(|name| !name.is_object() && !name.as_str().is_some_and(known)) {
        let message = format!("{bad} is not a type: there are string, number, integer, boolean, object, array and null");
        return Err(Error::field(Stage::Manifest, member(field, "type"), message));
    }
    if names.iter().any(Value::is_object) {
        out.remove("type");
        let alternatives = names.into_iter().map(|name| match name {
            Value::Object(inner) => schema(&inner, field).map(Value::Object),
            name => Ok(json!({ "type": name })),
        });
        out.insert("anyOf".into(), Value::Array(alternatives.collect::<Result<_>>()?));
    }
    Ok(())
}

/// Keywords that were renamed or changed their form.
fn rename(out: &mut Map<String, Value>) {
    if let Some(factor) = out.remove("divisibleBy") {
        out.entry("multipleOf").or_insert(factor);
    }
    for (limit, exclusive, can_equal) in [("minimum", "exclusiveMinimum", "minimumCanEqual"), ("maximum", "exclusiveMaximum", "maximumCanEqual")] {
        let is_exclusive = out.get(exclusive) == Some(&json!(true)) || out.get(can_equal) == Some(&json!(false));
        out.remove(can_equal);
        if out.get(exclusive).is_some_and(Value::is_boolean) {
            out.remove(exclusive);
        }
        if is_exclusive && let Some(value) = out.remove(limit) {
            out.insert(exclusive.into(), value);
        }
    }
    if let Some(parent) = out.remove("extends") {
        out.insert("allOf".into(), if parent.is_array() { parent } else { json!([parent]) });
    }
    if let Some(kinds) = out.remove("disallow") {
        out.insert("not".into(), if kinds.is_object() { kinds } else { json!({ "type": kinds }) });
    }
    if let Some(Value::String(format)) = out.get_mut("format") {
        match format.as_str() {
            "ip-address" => *format = "ipv4".into(),
            "host-name" => *format = "hostname".into(),
            _ => {}
        }
    }
}
