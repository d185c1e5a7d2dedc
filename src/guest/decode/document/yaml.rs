//! YAML to a JSON value, under limits: depth, number of nodes, and those that aliases repeat count every time. Duplicate keys, tags other than the
//! core schema's, several documents and keys that are no scalars are refused.
//!
//! Plain scalars are resolved as far as all readers of these documents agree: booleans (YAML 1.1's words too, which PyYAML and netplan both
//! take), whole decimal numbers, null. Everything else is text: `1:20` is no number here, and a MAC address of digits is none either.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Value};

/// Nesting; network documents have six levels.
const DEPTH_MAX: usize = 24;
/// Scalars, lists and objects in all, after aliases.
const NODES_MAX: usize = 50_000;

/// A value under construction.
enum Open {
    List { items: Vec<Value>, anchor: usize, size: usize },
    Object { members: Map<String, Value>, key: Option<String>, anchor: usize, size: usize },
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    done: Option<Value>,
    /// What anchors stand for, with the number of nodes in it.
    anchors: BTreeMap<usize, (Value, usize)>,
    nodes: usize,
}

/// Parses one document. The error names line and column.
pub(crate) fn value(text: &str) -> Result<Value, String> {
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(text);
    let mut documents = 0;
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| {
            format!(
                "is not YAML at line {}, column {}: {}",
                error.marker().line(),
                error.marker().col() + 1,
                crate::guest::plan::printable(error.info())
            )
        })?;
        if let Event::DocumentStart(_) = event {
            documents += 1;
            if documents > 1 {
                return Err("has more than one YAML document".into());
            }
        }
        let at = |why: String| format!("line {}, column {}: {why}", span.start.line(), span.start.col() + 1);
        if matches!(event, Event::StreamEnd) {
            break;
        }
        builder.take(event).map_err(at)?;
    }
    builder.done.ok_or_else(|| "is empty".into())
}

impl Builder {
    fn take(&mut self, event: Event<'_>) -> Result<(), String> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(&text, style, tag.as_deref())?;
                self.node(1)?;
                self.finish(value, anchor, 1)
            }
            Event::SequenceStart(anchor, tag) => {
                only(tag.as_deref(), "seq")?;
                self.begin(Open::List { items: Vec::new(), anchor, size: 1 })
            }
            Event::MappingStart(anchor, tag) => {
                only(tag.as_deref(), "map")?;
                self.begin(Open::Object { members: Map::new(), key: None, anchor, size: 1 })
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List { items, anchor, size }) => self.finish(Value::Array(items), anchor, size),
                Some(Open::Object { members, key: None, anchor, size }) => self.finish(Value::Object(members), anchor, size),
                Some(Open::Object { key: Some(_), .. }) | None => Err("has a key without a value".into()),
            },
            Event::Alias(anchor) => {
                // An anchor inside of itself is not there yet.
                let (value, size) = self.anchors.get(&anchor).cloned().ok_or("an alias of something that contains it")?;
                self.node(size)?;
                self.finish(value, 0, size)
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => Ok(()),
        }
    }

    fn node(&mut self, count: usize) -> Result<(), String> {
        self.nodes = self.nodes.saturating_add(count);
        if self.nodes > NODES_MAX { Err(format!("has more than {NODES_MAX} nodes, aliases counted as often as they are used")) } else { Ok(()) }
    }

    fn begin(&mut self, open: Open) -> Result<(), String> {
        if self.open.len() >= DEPTH_MAX {
            return Err(format!("is nested deeper than {DEPTH_MAX} levels"));
        }
        self.node(1)?;
        self.open.push(open);
        Ok(())
    }

    fn finish(&mut self, value: Value, anchor: usize, size: usize) -> Result<(), String> {
        if anchor > 0 {
            // What anchors keep is bounded by what was built: every node was counted.
            self.node(size)?;
            self.anchors.insert(anchor, (value.clone(), size));
        }
        match self.open.last_mut() {
            None => self.done = Some(value),
            Some(Open::List { items, size: whole, .. }) => {
                items.push(value);
                *whole = whole.saturating_add(size);
            }
            Some(Open::Object { members, key, size: whole, .. }) => {
                *whole = whole.saturating_add(size);
                match key.take() {
                    None => *key = Some(key_of(value)?),
                    Some(name) if members.contains_key(&name) => {
                        return Err(format!("the key {:?} is given twice", name.chars().take(64).collect::<String>()));
                    }
                    Some(name) => drop(members.insert(name, value)),
                }
            }
        }
        Ok(())
    }
}

fn key_of(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => Err("a key must be a word".into()),
    }
}

fn only(tag: Option<&Tag>, suffix: &str) -> Result<(), String> {
    match tag {
        Some(tag) if tag.suffix != suffix || !is_core(tag) => Err("has a tag that is not understood".into()),
        _ => Ok(()),
    }
}

fn is_core(tag: &Tag) -> bool {
    tag.handle == "tag:yaml.org,2002:" || tag.handle == "!!"
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Result<Value, String> {
    match tag {
        Some(tag) if is_core(tag) && tag.suffix == "str" => return Ok(Value::String(text.to_owned())),
        Some(tag) if !is_core(tag) || !matches!(&tag.suffix[..], "int" | "bool" | "null") => return Err("has a tag that is not understood".into()),
        _ => {}
    }
    if style != ScalarStyle::Plain {
        return Ok(Value::String(text.to_owned()));
    }
    Ok(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Value::Bool(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Value::Bool(false),
        // A leading zero is octal to some readers and decimal to others: it stays text, and is refused where a number is wanted.
        _ if is_number(text) => text.parse::<u64>().map_or_else(|_| Value::String(text.to_owned()), Value::from),
        _ => Value::String(text.to_owned()),
    })
}

fn is_number(text: &str) -> bool {
    text == "0" || (!text.starts_with('0') && text.len() <= 19 && text.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_are_what_every_reader_takes_them_for() {
        let got = value("a: [yes, 12, 012, 1:20, 52:54:00:12:34:56, '1', null, ~, 1e3, -1]\nb: &x {c: on}\nd: *x\n7: !!str 8\n").expect("YAML");
        let list = json!([true, 12, "012", "1:20", "52:54:00:12:34:56", "1", null, null, "1e3", "-1"]);
        assert_eq!(got, json!({"a": list, "b": {"c": true}, "d": {"c": true}, "7": "8"}));
        assert_eq!(value("{\"a\": [1, true, null]}").expect("JSON is YAML"), json!({"a": [1, true, null]}));
    }

    #[test]
    fn bombs_and_oddities_are_refused() {
        let laughs: String = (1..12).map(|n| format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 9].join(","))).collect();
        for (text, why) in [
            (format!("a0: &a0 [x,x,x]\n{laughs}"), "nodes"),
            ("[".repeat(200), "nested"),
            ("- ".repeat(5000), "nested"),
            // The scanner has a limit of its own, which it reaches before it has handed anything over.
            ("{a: ".repeat(5000), "recursion"),
            ("&a [*a]".into(), "contains it"),
            ("a: 1\na: 2\n".into(), "twice"),
            ("a: 1\n---\nb: 1\n".into(), "more than one"),
            ("? [a]\n: 1\n".into(), "a word"),
            ("a: !!python/object:os.system x\n".into(), "tag"),
            ("a: !secret x\n".into(), "tag"),
            ("a: *nobody\n".into(), "line"),
            (String::new(), "empty"),
        ] {
            let error = value(&text).expect_err(&text[..text.len().min(40)]);
            assert!(error.contains(why), "{error}");
        }
    }
}
