//! `volatile`: patterns of paths that are not part of the image.
//!
//! In 2010 a pattern was compiled by Python's `re` and applied with `re.match` (anchored at the start, not at the end) to every path of the tree,
//! written with a leading slash and as bytes. So it is here, by `fancy-regex` in its ASCII byte mode, after a translation of what the two dialects
//! write differently. A pattern whose first character is a letter, a digit or `_` could never match such a path; it is taken to mean the path
//! without its leading slash, as authors used to archive member names write it.
//!
//! The patterns are a stranger's: their number, length, compiled size and backtracking are capped, and running into the cap is an error that names
//! the pattern, never a path silently kept or dropped. Most patterns begin with literal text, which is compared first: a tree of thousands of paths
//! costs a few milliseconds.

use fancy_regex::{BytesMode, Regex, RegexBuilder};

use crate::{
    error::{Error, Kind, Result, Stage},
    names::GuestPath,
};

/// Patterns in a manifest; the images of 2010 had about twenty.
pub const PATTERNS_MAX: usize = 256;
/// Bytes in a pattern.
pub const PATTERN_LEN_MAX: usize = 1024;
/// Backtracking steps for one path and pattern; an honest pattern takes tens.
const BACKTRACK_MAX: usize = 10_000;
/// Bytes of a compiled pattern; `x{1000}{1000}` is what this stops.
const COMPILED_LEN_MAX: usize = 256 * 1024;

/// The compiled patterns of a manifest.
#[derive(Clone, Default)]
pub struct Volatile {
    sources: Vec<String>,
    patterns: Vec<Pattern>,
}

#[derive(Clone)]
struct Pattern {
    /// What every match begins with, without the leading slash when `relative`.
    prefix: Vec<u8>,
    relative: bool,
    regex: Regex,
}

impl Volatile {
    /// Compiles the patterns. The error names the first bad one as `volatile[index]`.
    pub fn compile<S: AsRef<str>>(sources: &[S]) -> Result<Volatile> {
        if sources.len() > PATTERNS_MAX {
            return Err(Error::field(Stage::Manifest, "volatile", format!("has {} patterns, the limit is {PATTERNS_MAX}", sources.len())));
        }
        let patterns = sources
            .iter()
            .enumerate()
            .map(|(index, source)| compile(source.as_ref()).map_err(|message| Error::field(Stage::Manifest, format!("volatile[{index}]"), message)));
        Ok(Volatile { patterns: patterns.collect::<Result<_>>()?, sources: sources.iter().map(|source| source.as_ref().to_owned()).collect() })
    }

    /// Whether `path` is volatile. `Kind::Unsupported` when a pattern needs too much backtracking for it.
    pub fn matches(&self, path: &GuestPath) -> Result<bool> {
        let absolute = path.as_bytes();
        for (index, pattern) in self.patterns.iter().enumerate() {
            let subject = if pattern.relative { &absolute[1..] } else { absolute };
            if !subject.starts_with(&pattern.prefix) {
                continue;
            }
            let matched = pattern.regex.is_match(subject).map_err(|e| {
                let message = format!("pattern {:?} gives up on {path}: it needs more than {BACKTRACK_MAX} steps", self.sources[index]);
                Error::new(Kind::Unsupported, Stage::Manifest, format!("volatile[{index}]"), message)
                    .with_source(e)
                    .with_reason("VOLATILE_PATTERN_TOO_COSTLY")
                    .with_hint("write the pattern without nested repetition, e.g. [^/]+ instead of (.+)+")
            })?;
            if matched {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How many patterns there are.
    pub fn len(&self) -> usize {
        self.patterns.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// The patterns as they were written.
    pub fn sources(&self) -> &[String] {
        &self.sources
    }
}

impl std::fmt::Debug for Volatile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.sources).finish()
    }
}

fn compile(source: &str) -> std::result::Result<Pattern, String> {
    if source.is_empty() {
        return Err("an empty pattern matches every path".into());
    }
    if source.len() > PATTERN_LEN_MAX {
        return Err(format!("the pattern has {} bytes, the limit is {PATTERN_LEN_MAX}", source.len()));
    }
    let relative = source.trim_start_matches('^').starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let translated = translate(source)?;
    // Flags are moved to the front; with them literal text need not be literal.
    let prefix = if translated.starts_with("(?i") || translated.starts_with("(?m") || translated.starts_with("(?s") {
        Vec::new()
    } else {
        literal_prefix(source)
    };
    let regex = RegexBuilder::new(&format!("\\A(?:{translated})"))
        .bytes_mode(BytesMode::Ascii)
        .backtrack_limit(BACKTRACK_MAX)
        .delegate_size_limit(COMPILED_LEN_MAX)
        .delegate_dfa_size_limit(COMPILED_LEN_MAX)
        .build()
        .map_err(|e| format!("{source:?} is not a usable regular expression: {e}"))?;
    // Some errors show up only when it runs.
    regex.is_match(&b"/"[..]).map_err(|e| format!("{source:?} is not a usable regular expression: {e}"))?;
    Ok(Pattern { prefix, relative, regex })
}

/// The text that every match of a pattern begins with; empty when that is not plain to see.
fn literal_prefix(source: &str) -> Vec<u8> {
    let body = source.strip_prefix('^').unwrap_or(source);
    // An alternative at the top level need not share the beginning; telling levels apart is not worth it.
    if body.contains('|') {
        return Vec::new();
    }
    let mut prefix: Vec<char> = Vec::new();
    let mut rest = body.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\\' if rest.peek().is_some_and(|next| !next.is_ascii_alphanumeric()) => prefix.extend(rest.next()),
            '*' | '?' | '{' | '+' => {
                prefix.pop();
                break;
            }
            '\\' | '.' | '[' | '(' | ')' | '^' | '$' => break,
            _ => prefix.push(c),
        }
    }
    prefix.into_iter().collect::<String>().into_bytes()
}

/// Rewrites what Python's `re` (2.6 on byte strings) and `fancy-regex` read differently; refuses by name what has no equivalent.
fn translate(source: &str) -> std::result::Result<String, String> {
    let mut out = String::with_capacity(source.len() + 16);
    let chars: Vec<char> = source.chars().collect();
    let mut at = 0;
    let mut class = None;
    let mut open_groups = 0_u32;
    while let Some(c) = chars.get(at).copied() {
        let next = chars.get(at + 1).copied();
        if c.is_ascii_control() && c != '\t' {
            return Err(format!("{source:?} contains the control character {c:?}"));
        }
        at += match (c, next) {
            ('\\', None) => return Err(format!("{source:?} ends with a lone backslash")),
            ('\\', Some(escaped)) => escape(source, escaped, class.is_some(), &chars[at + 2..], &mut out)?,
            // A bracket first in a class is a member of it; later, an opening one is too (here it would open a nested class).
            (']', _) if class.is_some_and(|start| at > start) => {
                class = None;
                push(&mut out, "]", 1)
            }
            ('[' | ']' | '&' | '~' | '-', _) if class.is_some() && (c != '-' || next == Some('-')) => {
                out.push('\\');
                out.push(c);
                1
            }
            ('[', _) if class.is_none() => {
                let negated = next == Some('^');
                class = Some(at + 1 + usize::from(negated));
                if negated { push(&mut out, "[^", 2) } else { push(&mut out, "[", 1) }
            }
            ('(', Some('?')) if class.is_none() => group(source, &chars[at + 2..], &mut out, &mut open_groups)?,
            ('(', _) if class.is_none() => {
                open_groups += 1;
                push(&mut out, "(", 1)
            }
            (')', _) if class.is_none() => {
                // Counted here because the pattern gets a group around it, which would make this parenthesis look balanced.
                open_groups = open_groups.checked_sub(1).ok_or_else(|| format!("{source:?}: a closing parenthesis without an opening one"))?;
                push(&mut out, ")", 1)
            }
            ('{', _) if class.is_none() => braces(&chars[at..], &mut out),
            _ => {
                if c.is_ascii() {
                    out.push(c);
                } else {
                    // Paths are bytes: a character outside ASCII stands for its UTF-8 bytes, which a class can't hold.
                    non_ascii(source, c, class.is_some(), &mut out)?;
                }
                1
            }
        };
    }
    if class.is_some() || open_groups > 0 {
        return Err(format!("{source:?}: a {} is not closed", if class.is_some() { "character class" } else { "parenthesis" }));
    }
    Ok(out)
}

fn push(out: &mut String, text: &str, consumed: usize) -> usize {
    out.push_str(text);
    consumed
}

fn non_ascii(source: &str, c: char, in_class: bool, out: &mut String) -> std::result::Result<(), String> {
    if in_class {
        return Err(format!("{source:?}: {c:?} in a character class is not supported: paths are bytes; use (?:{c}|…)"));
    }
    let mut buffer = [0; 4];
    let bytes: Vec<String> = c.encode_utf8(&mut buffer).bytes().map(|b| format!("\\x{b:02x}")).collect();
    out.push_str(&format!("(?:{})", bytes.concat()));
    Ok(())
}

/// One escape; gives how many characters it took, the backslash included.
fn escape(source: &str, escaped: char, in_class: bool, rest: &[char], out: &mut String) -> std::result::Result<usize, String> {
    match escaped {
        'Z' if !in_class => out.push_str("\\z"),
        'b' if in_class => out.push_str("\\x08"),
        '0' => {
            // Octal, up to two more digits.
            let digits: String = rest.iter().take(2).take_while(|c| ('0'..='7').contains(*c)).collect();
            let value = u8::from_str_radix(&format!("0{digits}"), 8).map_err(|e| format!("{source:?}: \\0{digits}: {e}"))?;
            if value == 0 {
                return Err(format!("{source:?} contains a NUL; no path does"));
            }
            out.push_str(&format!("\\x{value:02x}"));
            return Ok(2 + digits.len());
        }
        'x' => {
            let digits: String = rest.iter().take(2).filter(|c| c.is_ascii_hexdigit()).collect();
            if digits.len() != 2 {
                return Err(format!("{source:?}: \\x needs two hexadecimal digits"));
            }
            out.push_str(&format!("\\x{digits}"));
            return Ok(4);
        }
        'u' | 'U' | 'N' | 'p' | 'P' => return Err(format!("{source:?}: \\{escaped} is not supported: paths are matched as bytes")),
        'A' | 'B' | 'b' | 'd' | 'D' | 's' | 'S' | 'w' | 'W' | 'a' | 'f' | 'n' | 'r' | 't' | 'v' | '1'..='9' => {
            out.push('\\');
            out.push(escaped);
        }
        // Any other letter stood for itself in Python 2; here some of them mean something else.
        letter if letter.is_ascii_alphanumeric() => out.push(letter),
        other if other.is_ascii() => {
            out.push('\\');
            out.push(other);
        }
        other => non_ascii(source, other, in_class, out)?,
    }
    Ok(2)
}

/// What follows `(?`; gives how many characters were taken, `(?` included.
fn group(source: &str, rest: &[char], out: &mut String, open_groups: &mut u32) -> std::result::Result<usize, String> {
    let text: String = rest.iter().take(80).collect();
    if let Some(name) = text.strip_prefix("P=") {
        let name: String = name.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        if name.is_empty() || !text[2 + name.len()..].starts_with(')') {
            return Err(format!("{source:?}: (?P= needs a group name and a closing parenthesis"));
        }
        out.push_str(&format!("\\k<{name}>"));
        return Ok(2 + 2 + name.len() + 1);
    }
    if text.starts_with("P>") || text.starts_with('&') || text.starts_with('R') || text.starts_with('|') {
        return Err(format!("{source:?}: recursion and branch reset are not in Python's regular expressions"));
    }
    let flags: String = text.chars().take_while(|c| c.is_ascii_alphabetic()).collect();
    if !flags.is_empty() && text[flags.len()..].starts_with(')') {
        if let Some(flag) = flags.chars().find(|c| !"iLmsu".contains(*c)) {
            return Err(format!("{source:?}: the flag (?{flag}) is not supported; supported are i, m and s (L and u change nothing)"));
        }
        let kept: String = flags.chars().filter(|c| "ims".contains(*c)).collect();
        if !kept.is_empty() {
            // Python applies them to the whole pattern wherever they stand.
            out.insert_str(0, &format!("(?{kept})"));
        }
        return Ok(2 + flags.len() + 1);
    }
    if let Some(comment) = text.strip_prefix('#') {
        let len = rest.iter().position(|c| *c == ')').ok_or_else(|| format!("{source:?}: the comment (?#{comment} is not closed"))?;
        return Ok(2 + len + 1);
    }
    *open_groups += 1;
    out.push_str("(?");
    Ok(2)
}

/// `{` is a repetition only in the forms Python knows, otherwise itself; `{,n}` is `{0,n}`.
fn braces(rest: &[char], out: &mut String) -> usize {
    let body: String = rest.iter().skip(1).take(12).take_while(|c| **c != '}').collect();
    let closed = rest.get(1 + body.chars().count()) == Some(&'}');
    let (low, high) = body.split_once(',').map_or((body.as_str(), None), |(low, high)| (low, Some(high)));
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !closed || !number(low) || !high.is_none_or(number) || (low.is_empty() && high.is_none_or(str::is_empty)) {
        out.push_str("\\{");
        return 1;
    }
    match high {
        Some(high) => out.push_str(&format!("{{{},{high}}}", if low.is_empty() { "0" } else { low })),
        None => out.push_str(&format!("{{{low}}}")),
    }
    body.len() + 2
}

#[cfg(test)]
#[path = "volatile_tests.rs"]
mod tests;
