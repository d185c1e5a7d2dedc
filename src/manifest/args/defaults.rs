//! Filling in defaults, at every depth.

use serde_json::{Map, Value};

use super::references::follow;

/// How deep defaults are filled in; a second bound beside `references::check_expansion`, which keeps the work small.
const DEPTH_MAX: usize = 64;

/// Puts the defaults of `schema` into `instance`. A missing object is made when its defaults complete it. The schema has passed
/// `references::check_expansion`.
pub fn fill(root: &Value, schema: &Value, instance: &mut Value) {
    fill_below(root, schema, instance, 0);
}

fn fill_below(root: &Value, schema: &Value, instance: &mut Value, depth: usize) {
    let Some(schema) = follow(root, schema).filter(|_| depth < DEPTH_MAX) else { return };
    match instance {
        Value::Object(members) => {
            for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                if let Some(member) = members.get_mut(name) {
                    fill_below(root, property, member, depth + 1);
                } else if let Some(value) = default_of(root, property, depth + 1) {
                    members.insert(name.clone(), value);
                }
            }
            for part in schema.get("allOf").and_then(Value::as_array).into_iter().flatten() {
                fill_below(root, part, instance, depth + 1);
            }
        }
        Value::Array(elements) => {
            if let Some(items) = schema.get("items").filter(|items| items.is_object()) {
                elements.iter_mut().for_each(|element| fill_below(root, items, element, depth + 1));
            }
        }
        _ => {}
    }
}

fn default_of(root: &Value, property: &Value, depth: usize) -> Option<Value> {
    // A default beside a reference counts, and wins.
    if let Some(value) = property.get("default").or_else(|| follow(root, property)?.get("default")) {
        let mut value = value.clone();
        fill_below(root, property, &mut value, depth);
        return Some(value);
    }
    let schema = follow(root, property)?;
    schema.get("properties")?;
    let mut made = Value::Object(Map::new());
    fill_below(root, schema, &mut made, depth);
    let members = made.as_object()?;
    let required = schema.get("required").and_then(Value::as_array);
    let complete = required.into_iter().flatten().filter_map(Value::as_str).all(|name| members.contains_key(name));
    (complete && !members.is_empty()).then_some(made)
}
