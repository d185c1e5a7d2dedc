//! The colon-separated files of accounts as data: passwd(5), shadow(5), group(5), gshadow(5), subuid(5), subgid(5).
//!
//! Lines that are not changed stay byte for byte, in their order, with comments, NIS lines (`+`, `-`) and lines that are broken. As getpwnam(3)
//! and its siblings do, the first line with a name is the one that counts. New lines go before NIS lines, which would hide them.

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    lines: Vec<String>,
    /// Fields of a right line: at least and at most.
    width: (usize, usize),
    changed: bool,
}

impl Table {
    /// Reads a file whose lines have so many fields, at least and at most (libc takes lines of shadow(5) that end early).
    pub(super) fn parse(text: &str, width: (usize, usize)) -> Self {
        Table { lines: text.lines().map(str::to_owned).collect(), width, changed: false }
    }

    /// Whether anything was changed.
    pub(super) fn is_changed(&self) -> bool {
        self.changed
    }

    /// The file's content.
    pub(super) fn text(&self) -> String {
        self.lines.iter().fold(String::new(), |text, line| text + line + "\n")
    }

    fn fields<'t>(&self, line: &'t str) -> Option<Vec<&'t str>> {
        let fields: Vec<&str> = line.split(':').collect();
        ((self.width.0..=self.width.1).contains(&fields.len()) && !fields[0].is_empty() && !fields[0].starts_with(['+', '-', '#'])).then_some(fields)
    }

    /// All right lines as fields.
    pub(super) fn rows(&self) -> impl Iterator<Item = Vec<&str>> {
        self.lines.iter().filter_map(|line| self.fields(line))
    }

    /// The first line with this name.
    pub(super) fn row(&self, name: &str) -> Option<Vec<&str>> {
        self.rows().find(|fields| fields[0] == name)
    }

    /// A field of the first line with this name.
    pub(super) fn field(&self, name: &str, at: usize) -> Option<&str> {
        self.row(name)?.get(at).copied()
    }

    /// Sets a field of the first line with this name. `false` when there is none.
    pub(super) fn set(&mut self, name: &str, at: usize, value: &str) -> bool {
        debug_assert!(!value.contains([':', '\n']), "checked by validate");
        let Some(index) = self.lines.iter().position(|line| self.fields(line).is_some_and(|fields| fields[0] == name)) else { return false };
        let mut fields: Vec<&str> = self.lines[index].split(':').collect();
        if fields.get(at) != Some(&value) {
            fields.resize(fields.len().max(at + 1), "");
            fields[at] = value;
            self.lines[index] = fields.join(":");
            self.changed = true;
        }
        true
    }

    /// Adds a member to the comma-separated list in the last field of a line. `false` when there is no such line.
    pub(super) fn add_member(&mut self, name: &str, member: &str) -> bool {
        let last = self.width.1 - 1;
        let Some(members) = self.field(name, last) else { return false };
        if members.split(',').any(|known| known == member) {
            return true;
        }
        let members = if members.is_empty() { member.to_owned() } else { format!("{members},{member}") };
        self.set(name, last, &members)
    }

    /// Adds a line.
    pub(super) fn push(&mut self, fields: &[&str]) {
        debug_assert!(
            (self.width.0..=self.width.1).contains(&fields.len()) && !fields.iter().any(|field| field.contains([':', '\n'])),
            "checked by validate"
        );
        // A trailing NIS line takes every name that is not before it (nsswitch.conf(5), compat).
        let at = self.lines.iter().position(|line| line.starts_with('+')).unwrap_or(self.lines.len());
        self.lines.insert(at, fields.join(":"));
        self.changed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_changed_stays_byte_for_byte() {
        let text = "root:x:0:\n# note\nbroken line\nadm:x:4:syslog\n\n+:::\n";
        let mut table = Table::parse(text, (4, 4));
        assert!(table.add_member("adm", "syslog") && !table.is_changed() && table.text() == text);
        assert!(table.add_member("adm", "ada") && table.add_member("root", "ada") && !table.add_member("wheel", "ada"));
        table.push(&["ada", "x", "1000", ""]);
        assert_eq!(table.text(), "root:x:0:ada\n# note\nbroken line\nadm:x:4:syslog,ada\n\nada:x:1000:\n+:::\n");
    }

    #[test]
    fn the_first_line_of_a_name_counts_and_nis_lines_are_nobody() {
        let mut table = Table::parse("a:1\n+a:9\na:2\n-b:3\n", (2, 2));
        assert_eq!((table.field("a", 1), table.field("+a", 1), table.field("-b", 1)), (Some("1"), None, None));
        assert!(table.set("a", 1, "5") && !table.set("c", 1, "5"));
        assert_eq!(table.text(), "a:5\n+a:9\na:2\n-b:3\n");
    }
}
