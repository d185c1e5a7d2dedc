//! Help in messages: what was probably meant, and what a value is.

use serde_json::Value;

/// `; did you mean "x"?` when one of `known` is close to `given`, otherwise nothing.
pub fn did_you_mean(given: &str, known: &[&str]) -> String {
    let given = given.to_ascii_lowercase().replace('-', "_");
    let close = known.iter().map(|name| (distance(&given, name), name)).min();
    match close {
        Some((steps, name)) if steps <= (name.len() / 3).clamp(1, 3) => format!("; did you mean {name:?}?"),
        _ => String::new(),
    }
}

/// Optimal string alignment distance: insertions, deletions, replacements and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// What a JSON value is, with its article.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_names_are_suggested_and_others_are_not() {
        let known = ["templates", "persistent", "volatile", "entry_points", "disk", "args"];
        for (given, want) in [
            ("template", "templates"),
            ("entry-points", "entry_points"),
            ("persistant", "persistent"),
            ("volatlie", "volatile"),
            ("Args", "args"),
            ("disc", "disk"),
        ] {
            assert_eq!(did_you_mean(given, &known), format!("; did you mean {want:?}?"), "{given}");
        }
        for given in ["ignore", "xyzzy", ""] {
            assert_eq!(did_you_mean(given, &known), "", "{given}");
        }
    }
}
