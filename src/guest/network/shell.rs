//! Writing `NAME=value` files that a shell or a parser of its subset reads: ifcfg files and /etc/conf.d/net.

use std::fmt::{Display, Write as _};

use crate::error::{Error, Result, Stage};

/// Writes assignments; a control character anywhere makes [`ShellFile::finish`] fail.
pub(crate) struct ShellFile {
    text: String,
    bad: Option<String>,
}

impl ShellFile {
    /// Starts with the comment that says who wrote the file.
    pub(crate) fn new() -> Self {
        ShellFile { text: "# Written by cloudletd.\n".into(), bad: None }
    }

    fn check(&mut self, name: &str, value: &str) {
        if value.chars().any(char::is_control) {
            self.bad.get_or_insert_with(|| name.to_owned());
        }
    }

    /// Adds an assignment; the value is quoted where it has to be.
    pub(crate) fn set(&mut self, name: &str, value: impl Display) {
        let value = value.to_string();
        self.check(name, &value);
        let _ = writeln!(self.text, "{name}={}", quote(&value));
    }

    /// Adds an assignment of several lines.
    pub(crate) fn set_lines(&mut self, name: &str, lines: &[String]) {
        match lines {
            [] => {}
            [line] => self.set(name, line),
            _ => {
                lines.iter().for_each(|line| self.check(name, line));
                let quoted: Vec<String> = lines.iter().map(|line| line.replace('\'', r"'\''")).collect();
                let _ = writeln!(self.text, "{name}='\n{}\n'", quoted.join("\n"));
            }
        }
    }

    /// Adds a line as it is: one of a program, made of checked values only.
    pub(crate) fn raw(&mut self, line: &str) {
        self.check(line.split('(').next().unwrap_or_default(), line);
        let _ = writeln!(self.text, "{line}");
    }

    /// The text, or an error when a value would have broken its line.
    pub(crate) fn finish(self, path: &str) -> Result<String> {
        match self.bad {
            None => Ok(self.text),
            Some(name) => Err(Error::internal(Stage::Inject, path, format!("the value of {name} contains control characters"))),
        }
    }
}

/// A word as it is when no shell could take it for anything else, else in single quotes, where only the quote itself is special.
pub(crate) fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./:@%+,-".contains(c);
    if !value.is_empty() && value.chars().all(plain) { value.to_owned() } else { format!("'{}'", value.replace('\'', r"'\''")) }
}

/// Lines of a file that has one thing per line (routes); control characters are refused.
pub(crate) fn lines(path: &str, lines: &[String]) -> Result<String> {
    if lines.iter().any(|line| line.chars().any(char::is_control)) {
        return Err(Error::internal(Stage::Inject, path, "a line contains control characters"));
    }
    Ok(format!("# Written by cloudletd.\n{}\n", lines.join("\n")))
}

/// `text` with `NAME="value"` in place of the last assignment of each variable, or after everything else when there is none.
pub(crate) fn with_variables(text: &str, variables: &[(&str, String)]) -> String {
    let mut all: Vec<String> = text.lines().map(str::to_owned).collect();
    for (name, value) in variables {
        let line = format!("{name}=\"{value}\"");
        match all.iter().rposition(|old| old.trim_start().strip_prefix(name).is_some_and(|rest| rest.starts_with('='))) {
            Some(at) => all[at] = line,
            None => all.push(line),
        }
    }
    all.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_never_leave_their_quotes_and_control_characters_never_get_in() {
        assert_eq!(quote("192.0.2.1/24"), "192.0.2.1/24");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("$(reboot)'`x`"), r"'$(reboot)'\''`x`'");
        assert_eq!(quote(""), "''");
        for bad in ["a\nb", "\u{85}", "a\0"] {
            let mut file = ShellFile::new();
            file.set("X", bad);
            assert!(file.finish("/x").is_err());
            let mut file = ShellFile::new();
            file.set_lines("X", &["a".into(), bad.into()]);
            assert!(file.finish("/x").is_err());
            assert!(lines("/x", &[bad.into()]).is_err());
        }
    }

    #[test]
    fn a_variable_is_replaced_where_it_is_set() {
        assert_eq!(with_variables("# c\nA=\"\"\nB=1\n", &[("A", "x y".into()), ("C", "z".into())]), "# c\nA=\"x y\"\nB=1\nC=\"z\"\n");
    }
}
