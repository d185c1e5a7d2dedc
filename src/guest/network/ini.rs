//! Reading and writing the `[Section]` / `key=value` files that systemd-networkd and NetworkManager share.

use std::fmt::{Display, Write as _};

use crate::error::{Error, Result, Stage};

/// Writes sections and values; a control character anywhere makes [`Ini::finish`] fail.
#[derive(Default)]
pub(crate) struct Ini {
    text: String,
    bad: Option<String>,
}

impl Ini {
    /// Starts with the comment that says who wrote the file.
    pub(crate) fn new() -> Self {
        Ini { text: "# Written by cloudletd.\n".into(), bad: None }
    }

    /// Starts a section.
    pub(crate) fn section(&mut self, name: &str) {
        let _ = write!(self.text, "\n[{name}]\n");
    }

    /// Adds a value to the current section.
    pub(crate) fn set(&mut self, key: &str, value: impl Display) {
        let value = value.to_string();
        if value.chars().any(char::is_control) {
            self.bad.get_or_insert_with(|| key.to_owned());
        }
        let _ = writeln!(self.text, "{key}={value}");
    }

    /// The text, or an error when a value would have broken its line.
    pub(crate) fn finish(self, path: &str) -> Result<String> {
        match self.bad {
            None => Ok(self.text),
            Some(key) => Err(Error::internal(Stage::Inject, path, format!("the value of {key} contains control characters"))),
        }
    }
}

/// Every value of `key` in every `[section]`, in order.
pub(crate) fn values<'t>(text: &'t str, section: &str, key: &str) -> Vec<&'t str> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = name == section;
        } else if inside
            && !line.starts_with(['#', ';'])
            && let Some((name, value)) = line.split_once('=')
            && name.trim() == key
        {
            found.push(value.trim());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_never_get_into_a_file() {
        for bad in ["a\nb", "a\r", "\u{85}", "a\0"] {
            let mut ini = Ini::new();
            ini.set("Name", bad);
            assert!(ini.finish("/x").is_err(), "{bad:?}");
        }
    }

    #[test]
    fn values_are_read_from_their_section_only() {
        let text = "[Match]\n Name = eth* \n#Name=x\n[Network]\nDNS=a\nDNS=b\nName=no\n";
        assert_eq!(values(text, "Match", "Name"), ["eth*"]);
        assert_eq!(values(text, "Network", "DNS"), ["a", "b"]);
    }
}
