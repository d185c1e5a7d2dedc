//! Reading a template before the engine does.
//!
//! The same tokens as the engine's lexer, enough of them to see what a tag says. Three things are decided here. Whether it is JavaScript: then the
//! message says so instead of complaining about a brace. Whether it uses what is not offered: other statements, methods, functions, repetition.
//! And how much an expression can multiply: every name weighs what it was bound to, a string literal weighs one, an expression weighs the sum of
//! its operands and may weigh at most [`WEIGHT_MAX`]. As `~` and `+` add lengths and lists hold what they were given, no value gets larger than that
//! many times the largest input. A binding made in a loop does not outlive the iteration (Jinja's scoping), so reading front to back sees them all.

use std::collections::HashMap;

use super::SOURCE_LEN_MAX;
use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::{
        hint,
        json::{Position, position_in},
    },
};

/// Operands that an expression may have, those of the variables it uses included.
pub const WEIGHT_MAX: usize = 32;
/// Tags in a template.
const TAGS_MAX: usize = 5_000;
/// Statements that are offered.
const STATEMENTS: [&str; 9] = ["if", "elif", "else", "endif", "for", "endfor", "set", "break", "continue"];
/// Words of the expression language that are not names of values.
const OPERATORS: [&str; 15] = ["in", "is", "not", "and", "or", "if", "else", "true", "false", "none", "True", "False", "None", "range", "loop"];

/// Refuses what is not offered, with the line. See the module's description. Gives the length of the longest string literal, bytes.
pub fn check(name: &str, source: &str) -> Result<usize> {
    if source.len() > SOURCE_LEN_MAX {
        let message = format!("the template has {} bytes, the limit is {SOURCE_LEN_MAX}", source.len());
        return Err(Error::new(Kind::InvalidRequest, Stage::Inject, name, message).with_reason("TEMPLATE_LIMIT"));
    }
    let tags = tags(source).map_err(|refusal| refusal.into_error(name, source))?;
    if tags.len() > TAGS_MAX {
        let message = format!("the template has {} tags, the limit is {TAGS_MAX}", tags.len());
        return Err(Error::new(Kind::InvalidRequest, Stage::Inject, name, message).with_reason("TEMPLATE_LIMIT"));
    }
    let mut weights = HashMap::new();
    for tag in &tags {
        check_tag(tag, &mut weights).map_err(|refusal| refusal.into_error(name, source))?;
    }
    let literals = tags.iter().flat_map(|tag| &tag.tokens).filter_map(|token| match token.kind {
        TokenKind::Text(text) => Some(text.len()),
        _ => None,
    });
    Ok(literals.max().unwrap_or(0))
}

/// The names and strings in the tags of a template.
pub fn words(source: &str) -> impl Iterator<Item = String> {
    let tags = tags(source).unwrap_or_default();
    tags.into_iter()
        .flat_map(|tag| tag.tokens)
        .filter_map(|token| match token.kind {
            TokenKind::Word(word) | TokenKind::Text(word) => Some(word.to_owned()),
            _ => None,
        })
        .collect::<Vec<_>>()
        .into_iter()
}

/// Whether `args` stands anywhere without `.name` after it.
pub fn uses_args_as_a_whole(source: &str) -> bool {
    tags(source).unwrap_or_default().iter().any(|tag| {
        let is = |index: usize, kind: TokenKind<'_>| tag.tokens.get(index).is_some_and(|token| token.kind == kind);
        (0..tag.tokens.len()).any(|at| {
            let named = at > 0 && is(at - 1, TokenKind::Sign("."));
            let literal = is(at + 1, TokenKind::Sign("[")) && tag.tokens.get(at + 2).is_some_and(|t| matches!(t.kind, TokenKind::Text(_)));
            is(at, TokenKind::Word("args")) && !named && !is(at + 1, TokenKind::Sign(".")) && !literal
        })
    })
}

struct Refusal {
    at: usize,
    message: String,
    reason: &'static str,
}

impl Refusal {
    fn into_error(self, name: &str, source: &str) -> Error {
        let Position { line, column } = position_in(source, self.at);
        let error =
            Error::new(Kind::InvalidRequest, Stage::Inject, name, format!("line {line}, column {column}: {}", self.message)).with_reason(self.reason);
        if self.reason == "TEMPLATE_JAVASCRIPT" {
            error.with_hint("templates are Jinja: <% for x in list %>…<% endfor %>, <% if a and not b %>…<% endif %>, <%= value | filter %>")
        } else {
            error
        }
    }
}

struct Tag<'a> {
    at: usize,
    /// `<%=`, as opposed to a statement.
    prints: bool,
    tokens: Vec<Token<'a>>,
}

struct Token<'a> {
    at: usize,
    kind: TokenKind<'a>,
}

#[derive(Clone, Copy, PartialEq)]
enum TokenKind<'a> {
    Word(&'a str),
    Text(&'a str),
    Number,
    Sign(&'a str),
}

/// Signs of more than one character, longest first; those of JavaScript are known so that they can be named.
const SIGNS: [&str; 18] = ["===", "!==", "=>", "&&", "||", "++", "--", "+=", "-=", "**", "//", "==", "!=", "<=", ">=", "${", "/*", "*/"];

fn tags(source: &str) -> std::result::Result<Vec<Tag<'_>>, Refusal> {
    let mut tags = Vec::new();
    let mut at = 0;
    while let Some(start) = source[at..].find("<%").map(|i| at + i) {
        let syntax = |message: &str| Refusal { at: start, message: message.to_owned(), reason: "TEMPLATE_SYNTAX" };
        let body = start + 2;
        if source[body..].starts_with('#') {
            at = source[body..].find("%>").map(|i| body + i + 2).ok_or_else(|| syntax("this comment is not closed with %>"))?;
            continue;
        }
        if source[body..].starts_with('%') {
            return Err(syntax("<%% is not supported; to write <% use <%= \"<%\" %>"));
        }
        let prints = source[body..].starts_with('=');
        let mut tag = Tag { at: start, prints, tokens: Vec::new() };
        at = body + usize::from(prints);
        if source[at..].starts_with(['-', '+']) {
            at += 1;
        }
        loop {
            let rest = &source[at..];
            let Some(first) = rest.chars().next() else { return Err(syntax("this tag is not closed with %>")) };
            if rest.starts_with("%>") {
                at += 2;
                break;
            }
            if rest.starts_with("-%>") || rest.starts_with("+%>") {
                at += 3;
                break;
            }
            if rest.starts_with("<%") {
                return Err(syntax("this tag is not closed with %> before the next begins"));
            }
            let (kind, len) = token(first, rest).map_err(|message| Refusal { at, message, reason: "TEMPLATE_SYNTAX" })?;
            if let Some(kind) = kind {
                tag.tokens.push(Token { at, kind });
            }
            at += len;
        }
        tags.push(tag);
    }
    Ok(tags)
}

/// One token and its length; none for white space.
fn token(first: char, rest: &str) -> std::result::Result<(Option<TokenKind<'_>>, usize), String> {
    if first.is_whitespace() {
        return Ok((None, first.len_utf8()));
    }
    if first == '"' || first == '\'' {
        let mut escaped = false;
        for (index, c) in rest.char_indices().skip(1) {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == first => return Ok((Some(TokenKind::Text(&rest[1..index])), index + 1)),
                _ => {}
            }
        }
        return Err("this string is not closed".into());
    }
    if first.is_ascii_digit() {
        // A method of a number does not exist: dots and letters belong to the number.
        let len = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '_').unwrap_or(rest.len());
        return Ok((Some(TokenKind::Number), len));
    }
    if first.is_alphabetic() || first == '_' {
        let len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        return Ok((Some(TokenKind::Word(&rest[..len])), len));
    }
    let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign)).copied();
    Ok(match sign {
        Some(sign) => (Some(TokenKind::Sign(sign)), sign.len()),
        None => (Some(TokenKind::Sign(&rest[..first.len_utf8()])), first.len_utf8()),
    })
}

fn check_tag<'a>(tag: &Tag<'a>, weights: &mut HashMap<&'a str, usize>) -> std::result::Result<(), Refusal> {
    check_javascript(tag)?;
    check_offered(tag)?;
    let tokens = &tag.tokens[..];
    let statement = match tokens.first() {
        _ if tag.prints => "",
        Some(Token { kind: TokenKind::Word(word), .. }) => word,
        _ => {
            return Err(Refusal {
                at: tag.at,
                message: "a statement is expected here; to print a value write <%= … %>".into(),
                reason: "TEMPLATE_SYNTAX",
            });
        }
    };
    let binder = match statement {
        "set" => Some(TokenKind::Sign("=")),
        "for" => Some(TokenKind::Word("in")),
        _ => None,
    };
    let Some(binder) = binder else {
        return weigh(tag, if tag.prints { tokens } else { &tokens[1..] }, weights).map(|_| ());
    };
    let split = tokens.iter().position(|token| token.kind == binder).ok_or_else(|| {
        let message = if statement == "set" { "write <% set name = value %>; a block can't be captured" } else { "write <% for name in list %>" };
        Refusal { at: tag.at, message: message.into(), reason: "TEMPLATE_SYNTAX" }
    })?;
    let weight = weigh(tag, &tokens[split + 1..], weights)?;
    for token in &tokens[1..split] {
        match token.kind {
            // It may be bound inside a condition that is false: the heavier of both counts.
            TokenKind::Word(name) => weights.entry(name).and_modify(|w| *w = weight.max(*w)).or_insert(weight),
            TokenKind::Sign("," | "(" | ")") => continue,
            _ => return Err(Refusal { at: token.at, message: "only plain names can be assigned".into(), reason: "TEMPLATE_SYNTAX" }),
        };
    }
    if statement == "for" {
        // loop.previtem and loop.nextitem hold elements.
        weights.entry("loop").and_modify(|w| *w = weight.max(*w)).or_insert(weight);
    }
    Ok(())
}

/// The weight of an expression; see the module's description.
fn weigh(tag: &Tag<'_>, tokens: &[Token<'_>], weights: &HashMap<&str, usize>) -> std::result::Result<usize, Refusal> {
    let mut weight: usize = 0;
    for (index, token) in tokens.iter().enumerate() {
        let before = index.checked_sub(1).and_then(|i| tokens.get(i)).map(|token| token.kind);
        weight = weight.saturating_add(match token.kind {
            TokenKind::Word(_) if matches!(before, Some(TokenKind::Sign("." | "|"))) || before == Some(TokenKind::Word("is")) => 0,
            TokenKind::Word(word) => weights.get(word).copied().unwrap_or(usize::from(!OPERATORS.contains(&word))),
            TokenKind::Text(_) => 1,
            _ => 0,
        });
    }
    if weight > WEIGHT_MAX {
        let message = format!("this expression puts together more than {WEIGHT_MAX} values; print them one after another instead");
        return Err(Refusal { at: tag.at, message, reason: "TEMPLATE_LIMIT" });
    }
    Ok(weight.max(1))
}

/// Names JavaScript for what it is.
fn check_javascript(tag: &Tag<'_>) -> std::result::Result<(), Refusal> {
    let refuse = |at: usize, what: &str| {
        Err(Refusal { at, message: format!("{what} is JavaScript, which is not supported in templates"), reason: "TEMPLATE_JAVASCRIPT" })
    };
    let tokens = &tag.tokens;
    for (index, token) in tokens.iter().enumerate() {
        let next = tokens.get(index + 1).map(|token| token.kind);
        let first = index == 0;
        match token.kind {
            TokenKind::Sign(sign @ (";" | "&&" | "||" | "===" | "!==" | "++" | "--" | "=>" | "+=" | "-=" | "?" | "!" | "`" | "${" | "/*" | "*/")) => {
                return refuse(token.at, &format!("{sign:?}"));
            }
            TokenKind::Sign("{" | "}") if !tag.prints && (first || index + 1 == tokens.len()) => return refuse(token.at, "a block in braces"),
            TokenKind::Word(word @ ("var" | "let" | "const" | "function" | "new" | "typeof" | "return" | "switch" | "while" | "try" | "throw"))
                if first && !tag.prints || matches!(word, "function" | "typeof") =>
            {
                return refuse(token.at, &format!("{word:?}"));
            }
            TokenKind::Word("for")
                if first
                    && !tag.prints
                    && next == Some(TokenKind::Sign("("))
                    && tokens.get(index + 2).is_some_and(|t| matches!(t.kind, TokenKind::Word("var" | "let" | "const"))) =>
            {
                return refuse(token.at, "\"for (var …\"");
            }
            TokenKind::Sign(".") => {
                if let (Some(TokenKind::Word(method)), Some(TokenKind::Sign("("))) = (next, tokens.get(index + 2).map(|t| t.kind)) {
                    return refuse(token.at, &format!("the method call .{method}(…)"));
                }
                if next == Some(TokenKind::Word("length")) && !tokens.get(index.wrapping_sub(1)).is_some_and(|t| t.kind == TokenKind::Word("loop")) {
                    return refuse(token.at, ".length (write |length)");
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Refuses what the engine knows but is not offered.
fn check_offered(tag: &Tag<'_>) -> std::result::Result<(), Refusal> {
    let refuse = |at: usize, message: String| Err(Refusal { at, message, reason: "TEMPLATE_SYNTAX" });
    if let (false, Some(Token { kind: TokenKind::Word(word), at })) = (tag.prints, tag.tokens.first())
        && !STATEMENTS.contains(word)
    {
        let suggestion = hint::did_you_mean(word, &STATEMENTS);
        let message = format!("{word:?} is not a statement; there are {}; to print a value write <%= … %>{suggestion}", STATEMENTS.join(", "));
        return refuse(*at, message);
    }
    let mut depth = 0_i32;
    for (index, token) in tag.tokens.iter().enumerate() {
        let before = index.checked_sub(1).and_then(|i| tag.tokens.get(i)).map(|token| token.kind);
        match token.kind {
            TokenKind::Sign("*" | "**") => return refuse(token.at, "multiplication and repetition are not offered in templates".into()),
            TokenKind::Sign("(") => {
                depth += 1;
                if let Some(TokenKind::Word(name)) = before
                    && !["range", "in", "not", "and", "or", "if", "elif", "else", "for", "set"].contains(&name)
                {
                    let earlier = index.checked_sub(2).and_then(|i| tag.tokens.get(i)).map(|token| token.kind);
                    if earlier != Some(TokenKind::Sign("|")) && earlier != Some(TokenKind::Word("is")) && earlier != Some(TokenKind::Word("not")) {
                        return refuse(token.at, format!("{name}(…) can't be called; the only function is range"));
                    }
                }
                if matches!(before, Some(TokenKind::Sign(")" | "]" | "}") | TokenKind::Text(_))) {
                    return refuse(token.at, "a value can't be called".into());
                }
            }
            TokenKind::Sign("[" | "{") => depth += 1,
            TokenKind::Sign(")" | "]" | "}") => depth -= 1,
            TokenKind::Word("recursive") => return refuse(token.at, "recursive loops are not offered in templates".into()),
            _ => {}
        }
        if depth < 0 {
            break;
        }
    }
    // Inside brackets the engine does not see the end of a tag: both must agree on where it is.
    if depth != 0 { refuse(tag.at, "the brackets in this tag don't match".into()) } else { Ok(()) }
}
