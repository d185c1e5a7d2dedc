//! `cloudletd manifest check`: every problem with the line it is in.

use std::fmt;

use super::{
    DEPTH_MAX, LEN_MAX, Manifest,
    args::Args,
    json::{Document, Position},
    read,
};

/// What there is to say about a manifest.
#[derive(Debug, Clone)]
pub struct Report {
    /// The manifest, when it is right.
    pub manifest: Option<Manifest>,
    /// What is wrong, in the order of the text.
    pub problems: Vec<Problem>,
    /// What is right but probably not meant.
    pub warnings: Vec<Problem>,
}

/// One complaint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where in the text; for a field that is missing, where it should be.
    pub position: Position,
    /// Dotted path; empty for the document.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// The line of the text.
    pub line: String,
}

/// Checks a manifest. Never fails: what is wrong is in the report.
pub fn check(bytes: &[u8]) -> Report {
    let document = match Document::parse(bytes, LEN_MAX, DEPTH_MAX) {
        Ok(document) => document,
        Err(error) => {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LEN_MAX)]);
            let line = text.lines().nth(error.position.line - 1).unwrap_or("").to_owned();
            let problem = Problem { position: error.position, field: error.field, message: error.message, line };
            return Report { manifest: None, problems: vec![problem], warnings: Vec::new() };
        }
    };
    let located = |field: &str, message: &str| {
        let position = document.position(field);
        Problem { position, field: field.to_owned(), message: message.to_owned(), line: document.line(position.line).to_owned() }
    };
    match read::manifest(&document.value, None) {
        Ok(manifest) => {
            let warnings = warnings(&manifest).into_iter().map(|(field, message)| located(&field, &message)).collect();
            Report { manifest: Some(manifest), problems: Vec::new(), warnings }
        }
        Err(error) => {
            let mut problems: Vec<Problem> = error.violations().iter().map(|v| located(&v.field, &v.description)).collect();
            problems.sort_by_key(|problem| problem.position);
            Report { manifest: None, problems, warnings: Vec::new() }
        }
    }
}

/// What the author may want to know although nothing is wrong.
fn warnings(manifest: &Manifest) -> Vec<(String, String)> {
    let mut found = Vec::new();
    if manifest.rootfs().is_some_and(|rootfs| rootfs.url.is_some() && rootfs.digest.is_none()) {
        found.push(("rootfs.url".to_owned(), "there is no rootfs.digest: what the URL serves can change".to_owned()));
    }
    // They were compiled a moment ago.
    let volatile = manifest.volatile_patterns().ok();
    for (name, paths) in [("templates", &manifest.templates), ("persistent", &manifest.persistent)] {
        for (index, path) in paths.iter().enumerate() {
            if volatile.as_ref().is_some_and(|volatile| volatile.matches(path).unwrap_or(false)) {
                found.push((format!("{name}[{index}]"), format!("{path} is volatile too, so it is not part of the image")));
            }
        }
    }
    let args = manifest.args().and_then(|args| Args::compile(args).ok());
    let properties = args.iter().flat_map(Args::properties);
    for (name, _) in properties.filter(|(name, property)| manifest.is_secret_arg(name) && property.get("default").is_some()) {
        found.push((format!("args.{name}.default"), "a secret with a default is known to everybody who has the manifest".to_owned()));
    }
    found
}

impl Report {
    /// Whether nothing is wrong; warnings don't count.
    pub fn is_valid(&self) -> bool {
        self.manifest.is_some()
    }

    /// The report as lines for a terminal: `file:line:column: field: message`, each followed by the line with a mark under the place; for a manifest
    /// that is right also `file: correct` and its digest.
    pub fn render<'a>(&'a self, file: &'a str) -> impl fmt::Display + 'a {
        Pretty { report: self, file }
    }
}

struct Pretty<'a> {
    report: &'a Report,
    file: &'a str,
}

impl fmt::Display for Pretty<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problems = self.report.problems.iter().map(|problem| ("", problem));
        for (label, problem) in problems.chain(self.report.warnings.iter().map(|problem| ("warning: ", problem))) {
            let Position { line, column } = problem.position;
            let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
            writeln!(f, "{}:{line}:{column}: {label}{field}{}", self.file, problem.message)?;
            excerpt(f, &problem.line, column)?;
        }
        if let Some(manifest) = &self.report.manifest {
            writeln!(f, "{}: correct ({})", self.file, manifest.digest())?;
        }
        Ok(())
    }
}

/// The line, made fit for a terminal: control characters out, long lines cut around the place.
fn excerpt(f: &mut fmt::Formatter<'_>, line: &str, column: usize) -> fmt::Result {
    const BEFORE: usize = 60;
    const LEN_MAX: usize = 120;
    let start = column.saturating_sub(1).saturating_sub(BEFORE);
    let shown: String = line.chars().skip(start).take(LEN_MAX).map(|c| if c == '\t' || c.is_control() { ' ' } else { c }).collect();
    if shown.trim().is_empty() {
        return Ok(());
    }
    writeln!(f, "    {shown}")?;
    writeln!(f, "    {}^", " ".repeat(column.saturating_sub(1) - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_point_at_their_line_in_order() {
        let text = "{\n  \"name\": \"x\",\n  \"volatile\": [\"/a\",\n    \"/b(\"],\n  \"disk\": {\n    \"layuot\": \"gpt\"},\n  \"args\": {\"a\": {\"type\": 3}}\n}\n";
        let report = check(text.as_bytes());
        let found: Vec<_> = report.problems.iter().map(|p| (p.position.line, p.position.column, p.field.as_str())).collect();
        assert_eq!(found, [(4, 5, "volatile[1]"), (6, 5, "disk.layuot"), (7, 18, "args.a.type")]);
        let pretty = report.render("m.json").to_string();
        assert!(
            pretty.contains("m.json:6:5: disk.layuot: is not a field of disk; did you mean \"layout\"?\n        \"layuot\": \"gpt\"},\n        ^\n"),
            "{pretty}"
        );
    }

    #[test]
    fn syntax_errors_have_their_place_too() {
        let report = check(b"{\n  \"name\": \"x\"\n  \"arch\": \"i386\"\n}");
        assert_eq!((report.problems[0].position, report.problems[0].field.as_str()), (Position { line: 3, column: 3 }, "name"));
        assert!(report.render("m").to_string().starts_with("m:3:3: name: a comma or the closing brace is expected"));
        assert_eq!(check(b"\xff").problems.len(), 1);
        assert_eq!(check(b"").problems.len(), 1);
    }

    #[test]
    fn right_but_dubious_manifests_get_warnings() {
        let text = r#"{"rootfs": {"url": "https://h/x.tar"}, "templates": ["/tmp/x"], "volatile": ["/tmp/.+"], "args": {"pw": {"type": "string", "format": "password", "default": "x"}}}"#;
        let report = check(text.as_bytes());
        assert!(report.problems.is_empty() && report.manifest.is_some());
        let fields: Vec<_> = report.warnings.iter().map(|p| p.field.as_str()).collect();
        assert_eq!(fields, ["rootfs.url", "templates[0]", "args.pw.default"]);
        assert!(report.render("m").to_string().contains("warning: rootfs.url"));
    }
}
