//! JSON for readers that are no JSON parsers: people at terminals, and cloud-init, which reads its documents as YAML.

use serde_json::Value;

/// A value as indented JSON with a newline at its end, without a character that another reader would take for something else.
///
/// JSON asks for escapes below U+0020 only. DEL and U+0080..=U+009F would stand there raw: a terminal that shows the file takes U+009B for the start
/// of a command, and YAML (1.1, section 5.1) refuses a document that holds one. U+0085, U+2028 and U+2029 are line breaks of YAML 1.1, folded into a
/// space inside of quotes; U+FEFF, U+FFFE and U+FFFF are no printable characters of it either.
pub fn escaped(value: &Value) -> String {
    // Outside of strings there are only newlines and spaces.
    let json = format!("{value:#}\n");
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if (c.is_control() && c != '\n') || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}') {
            text.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn characters_that_json_leaves_raw_and_others_do_not_read_are_escaped() {
        let document = json!({"a\u{85}b": ["x\u{9b}31m", "\u{7f}", "two\nlines", "\u{2028}\u{2029}", "\u{feff}\u{fffe}\u{ffff}", "ä\u{1f600}"]});
        let text = escaped(&document);
        assert!(text.chars().all(|c| c == '\n' || c == 'ä' || c == '\u{1f600}' || c == ' ' || c.is_ascii_graphic()), "{text:?}");
        assert!(text.contains("a\\u0085b") && text.contains("two\\nlines") && text.contains("\\u2028"), "{text:?}");
        assert_eq!(serde_json::from_str::<Value>(&text).expect("still JSON"), document);
    }
}
