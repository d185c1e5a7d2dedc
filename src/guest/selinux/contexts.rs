//! file_contexts(5): which label a path has by the image's own policy, found as libselinux finds it (label_file.c).
//!
//! The files are read in the order base, `.homedirs`, `.local` and make one list. Lines without any meta character are exact and beat all others;
//! among those of one kind the last one that matches counts (a policy is stored with the most specific line last). Before that, prefixes are
//! replaced: first `.subs`, then `.subs_dist`.
//!
//! The expressions are the image's, so they are foreign: they are compiled only when their literal beginning fits, and run with a limit on steps.
//! Those that end in `(/.*)?`, most of them, need no engine at all.

use std::collections::HashMap;

use fancy_regex::{Regex, RegexBuilder};

/// Lines of a policy; Fedora's have some 7,000.
const SPECS_MAX: usize = 65_536;
/// Bytes of one expression.
const PATTERN_LEN_MAX: usize = 4096;
/// Steps of the engine for one match.
const STEPS_MAX: usize = 100_000;
/// Bytes that one compiled expression may take.
const COMPILED_LEN_MAX: usize = 1 << 20;
/// Characters that make a line an expression (label_file.h, `string_is_meta`).
const META: &str = ".^$?*+|[({";

/// What kind of file a line is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// `--`
    File,
    /// `-d`
    Directory,
    /// `-l`
    Symlink,
    /// Others: `-b`, `-c`, `-p`, `-s`; nothing that is written here.
    Special,
}

/// What a policy says about a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label {
    /// This context.
    Context(String),
    /// `<<none>>`: it is not labelled by the policy.
    None,
    /// No line matches.
    Unknown,
}

#[derive(Debug)]
enum Shape {
    Exact,
    /// The literal, and everything below it.
    Subtree,
    Expression,
}

#[derive(Debug)]
struct Spec {
    pattern: String,
    /// What every path that matches begins with; all of it when the shape is exact.
    literal: String,
    shape: Shape,
    kind: Option<FileKind>,
    context: Option<String>,
}

/// A policy's file contexts.
#[derive(Debug, Default)]
pub struct FileContexts {
    specs: Vec<Spec>,
    exact: HashMap<String, Vec<usize>>,
    substitutions: [Vec<(String, String)>; 2],
    compiled: HashMap<usize, Option<Regex>>,
    /// Lines that were left out: malformed, or beyond a limit.
    pub skipped: usize,
}

impl FileContexts {
    /// Reads the parts in the order of precedence: base, homedirs, local. `subs` and `subs_dist` are lines of two paths.
    pub fn parse(parts: &[&str], subs: &str, subs_dist: &str) -> Self {
        let mut contexts = FileContexts { substitutions: [substitutions(subs), substitutions(subs_dist)], ..Default::default() };
        for line in parts.iter().flat_map(|text| text.lines()).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match spec(line) {
                Some(spec) if contexts.specs.len() < SPECS_MAX => {
                    if matches!(spec.shape, Shape::Exact) {
                        contexts.exact.entry(spec.literal.clone()).or_default().push(contexts.specs.len());
                    }
                    contexts.specs.push(spec);
                }
                _ => contexts.skipped += 1,
            }
        }
        contexts
    }

    /// The label of an absolute path without trailing slash.
    pub fn lookup(&mut self, path: &str, kind: FileKind) -> Label {
        let path = self.substitute(path);
        let fits = |spec: &Spec| spec.kind.is_none_or(|wanted| wanted == kind);
        let exact = self.exact.get(&path).and_then(|list| list.iter().rev().copied().find(|index| fits(&self.specs[*index])));
        let found = exact.or_else(|| (0..self.specs.len()).rev().find(|index| fits(&self.specs[*index]) && self.matches(*index, &path)));
        match found.map(|index| &self.specs[index].context) {
            None => Label::Unknown,
            Some(None) => Label::None,
            Some(Some(context)) => Label::Context(context.clone()),
        }
    }

    fn matches(&mut self, index: usize, path: &str) -> bool {
        let spec = &self.specs[index];
        let Some(rest) = path.strip_prefix(&spec.literal) else { return false };
        match spec.shape {
            // Looked up before.
            Shape::Exact => false,
            Shape::Subtree => rest.is_empty() || rest.starts_with('/'),
            Shape::Expression => {
                let regex = self.compiled.entry(index).or_insert_with(|| compile(&self.specs[index].pattern));
                regex.as_ref().is_some_and(|regex| regex.is_match(path).unwrap_or(false))
            }
        }
    }

    /// The path with the first fitting prefix of `.subs` replaced, then that of `.subs_dist`.
    fn substitute(&self, path: &str) -> String {
        self.substitutions.iter().fold(path.to_owned(), |path, list| {
            let replaced = list.iter().find_map(|(from, to)| {
                let rest = path.strip_prefix(from.as_str())?;
                (rest.is_empty() || rest.starts_with('/'))
                    .then(|| if to == "/" && !rest.is_empty() { rest.to_owned() } else { format!("{to}{rest}") })
            });
            replaced.unwrap_or(path)
        })
    }
}

fn substitutions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(|line| line.split_once(char::is_whitespace)).map(|(from, to)| (from.to_owned(), to.trim().to_owned())).collect()
}

fn compile(pattern: &str) -> Option<Regex> {
    // As libselinux anchors it: without a group.
    RegexBuilder::new(&format!("(?s)^{pattern}$")).backtrack_limit(STEPS_MAX).delegate_size_limit(COMPILED_LEN_MAX).build().ok()
}

fn spec(line: &str) -> Option<Spec> {
    let mut words = line.split_whitespace();
    let (pattern, second, third) = (words.next()?, words.next()?, words.next());
    let (kind, context) = match third {
        None => (None, second),
        Some(context) => (Some(kind(second)?), context),
    };
    if words.next().is_some() || pattern.len() > PATTERN_LEN_MAX || context.len() > PATTERN_LEN_MAX || context.chars().any(char::is_control) {
        return None;
    }
    let (literal, rest) = literal_prefix(pattern);
    let shape = match rest {
        "" => Shape::Exact,
        "(/.*)?" => Shape::Subtree,
        _ => Shape::Expression,
    };
    Some(Spec { pattern: pattern.to_owned(), literal, shape, kind, context: (context != "<<none>>").then(|| context.to_owned()) })
}

fn kind(word: &str) -> Option<FileKind> {
    match word {
        "--" => Some(FileKind::File),
        "-d" => Some(FileKind::Directory),
        "-l" => Some(FileKind::Symlink),
        "-b" | "-c" | "-p" | "-s" => Some(FileKind::Special),
        _ => None,
    }
}

/// The text that every match begins with, and the rest of the expression.
fn literal_prefix(pattern: &str) -> (String, &str) {
    let mut literal = String::new();
    let mut last = (0, 0);
    let mut chars = pattern.char_indices();
    let mut depth = 0_usize;
    // A bar outside of parentheses makes alternatives with different beginnings.
    let mut escaped = false;
    for c in pattern.chars() {
        match c {
            _ if std::mem::take(&mut escaped) => {}
            '\\' => escaped = true,
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '|' if depth == 0 => return (String::new(), pattern),
            _ => {}
        }
    }
    while let Some((at, c)) = chars.next() {
        if META.contains(c) {
            // The quantifier may take away the character before it.
            return if "?*{".contains(c) { (literal[..last.0].to_owned(), &pattern[last.1..]) } else { (literal, &pattern[at..]) };
        }
        let literally = match c {
            '\\' => match chars.next() {
                Some((_, next)) if !next.is_ascii_alphanumeric() => next,
                _ => return (literal, &pattern[at..]),
            },
            c => c,
        };
        last = (literal.len(), at);
        literal.push(literally);
    }
    (literal, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(contexts: &mut FileContexts, path: &str) -> String {
        match contexts.lookup(path, FileKind::File) {
            Label::Context(context) => context,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn exact_lines_win_and_then_the_last_one() {
        let base = "/.*\tdefault\n/etc(/.*)?\tetc\n/etc/passwd\t--\tpasswd\n/etc/x\\.y\texact\n/etc/.*\\.conf\tconf\n/etc/shadow.*\t-d\tdir\n/proc(/.*)? <<none>>\n";
        let mut contexts = FileContexts::parse(&[base, "/home/[^/]+/\\.ssh(/.*)?\tssh\n", "/etc/local(/.*)?\tlocal\nbroken\n"], "", "");
        for (path, want) in [
            ("/etc/passwd", "passwd"),
            ("/etc", "etc"),
            ("/etcx", "default"),
            ("/etc/x.y", "exact"),
            ("/etc/a/b.conf", "conf"),
            ("/etc/shadow", "etc"),
            ("/etc/local/a.conf", "local"),
            ("/home/u/.ssh/authorized_keys", "ssh"),
            ("/proc/1", "None"),
        ] {
            assert_eq!(label(&mut contexts, path), want, "{path}");
        }
        assert_eq!(contexts.skipped, 1);
        assert_eq!(FileContexts::parse(&["/etc(/.*)? etc\n"], "", "").lookup("/usr", FileKind::File), Label::Unknown);
    }

    #[test]
    fn prefixes_are_replaced_by_whole_names() {
        let mut contexts = FileContexts::parse(
            &["/.* other\n/usr/lib(/.*)? lib\n/run(/.*)? run\n"],
            "/srv/run /run\n",
            "# x\n/usr/lib64 /usr/lib\n/var/run\t/run\n",
        );
        for (path, want) in [("/usr/lib64/x", "lib"), ("/usr/lib640", "other"), ("/srv/run", "run"), ("/var/run/x", "run")] {
            assert_eq!(label(&mut contexts, path), want, "{path}");
        }
    }

    #[test]
    fn a_literal_beginning_never_excludes_what_the_expression_matches() {
        for (pattern, literal, rest) in [
            ("/a/b", "/a/b", ""),
            ("/a\\.b", "/a.b", ""),
            ("/ab?c", "/a", "b?c"),
            ("/a\\.*", "/a", "\\.*"),
            ("/a+b", "/a", "+b"),
            ("/a(/.*)?", "/a", "(/.*)?"),
            ("/a|/b", "", "/a|/b"),
            ("/a\\dx", "/a", "\\dx"),
            ("/é?x", "/", "é?x"),
        ] {
            assert_eq!(literal_prefix(pattern), (literal.to_owned(), rest), "{pattern}");
        }
    }

    #[test]
    fn hostile_expressions_end() {
        let mut contexts = FileContexts::parse(&["/(a+)+\\1x t\n/[ t\n/(((((a{99}){99}){99}){99}){99}) t\n/.* d\n"], "", "");
        let started = std::time::Instant::now();
        assert_eq!(label(&mut contexts, &format!("/{}", "a".repeat(200))), "d");
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }
}
