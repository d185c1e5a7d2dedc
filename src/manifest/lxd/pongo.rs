//! The part of pongo2 (a Go library with Django's template language) that templates of LXD and Incus images use. What is not in it is refused by name.
//!
//! ```text
//! {{ expression }}   {% if expression %} … {% elif … %} … {% else %} … {% endif %}   {# comment #}   with - inside of a delimiter to trim white space
//! expression   or, and, not, ==, !=, in, ( ), "text", 7, true, false, name.member, name["member"], config_get("key", default), value|default:"x"
//! ```
//!
//! As in pongo2, and unlike the templates of manifests: a member that is not there is nothing, which prints as nothing and is false; `true` prints as `True`.
//! There are no loops, so what a template costs is bounded by its length; its output is capped.

use std::{borrow::Cow, collections::BTreeMap};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Kind, Result, Stage},
    manifest::{
        json::position_in,
        template::{OUTPUT_LEN_MAX, SOURCE_LEN_MAX},
    },
};

/// Nested blocks and parentheses.
const DEPTH_MAX: usize = 32;
/// Bytes that all templates of an image may write together.
const OUTPUT_TOTAL_MAX: usize = 8 * OUTPUT_LEN_MAX;
/// Tags in a template.
const TAGS_MAX: usize = 5_000;

/// What a template sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// `container` and `instance`.
    pub instance: BTreeMap<String, String>,
    /// `config`, and what `config_get` looks into.
    pub config: BTreeMap<String, String>,
    /// `properties` of this template.
    pub properties: BTreeMap<String, String>,
    /// Why it is rendered: `create` or `start`.
    pub trigger: String,
    /// Where it is written.
    pub path: String,
}

/// Renders `source`. Errors are `Kind::InvalidRequest` with `name` as object and the line in the message, reason `TEMPLATE_SYNTAX` or `TEMPLATE_LIMIT`.
pub fn render(name: &str, source: &str, context: &Context) -> Result<String> {
    let nodes = Parser::parse(name, source)?;
    let mut out = String::with_capacity(source.len());
    write(&nodes, context, &mut out).map_err(|()| {
        Error::new(Kind::InvalidRequest, Stage::Inject, name, format!("the template writes more than {OUTPUT_LEN_MAX} bytes"))
            .with_reason("TEMPLATE_LIMIT")
    })?;
    Ok(out)
}

/// A template to render.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request<'a> {
    /// Its name.
    pub name: Cow<'a, str>,
    /// The template.
    pub source: Cow<'a, str>,
    /// What it sees.
    pub context: Context,
}

/// Renders templates in the order given. Errors as those of [`render`], and `TEMPLATE_LIMIT` for all together.
pub fn render_all(requests: &[Request<'_>]) -> Result<Vec<String>> {
    let mut total = 0;
    requests
        .iter()
        .map(|Request { name, source, context }| {
            let text = render(name, source, context)?;
            total += text.len();
            if total > OUTPUT_TOTAL_MAX {
                let message = format!("the templates up to here write {total} bytes, the limit is {OUTPUT_TOTAL_MAX}");
                return Err(Error::new(Kind::InvalidRequest, Stage::Inject, name.as_ref(), message).with_reason("TEMPLATE_LIMIT"));
            }
            Ok(text)
        })
        .collect()
}

/// Checks a template without a context.
pub fn check(name: &str, source: &str) -> Result<()> {
    Parser::parse(name, source).map(drop)
}

#[derive(Debug)]
enum Node {
    Text(String),
    Print(Expr),
    /// Conditions with what they guard; `else` has none.
    If(Vec<(Option<Expr>, Vec<Node>)>),
}

#[derive(Debug)]
enum Expr {
    Value(Value<'static>),
    /// A root of the context and the members below it.
    Name(Root, Vec<String>),
    ConfigGet(Box<Expr>, Box<Expr>),
    Not(Box<Expr>),
    Both(Operator, Box<Expr>, Box<Expr>),
    Default(Box<Expr>, Box<Expr>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    Instance,
    Config,
    Properties,
    Trigger,
    Path,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Or,
    And,
    Equal,
    NotEqual,
    In,
}

#[derive(Debug, Clone, PartialEq)]
enum Value<'c> {
    Nothing,
    Text(Cow<'c, str>),
    Number(i64),
    Bool(bool),
    Map(&'c BTreeMap<String, String>),
}

impl Value<'_> {
    fn is_true(&self) -> bool {
        match self {
            Value::Nothing => false,
            Value::Text(text) => !text.is_empty(),
            Value::Number(number) => *number != 0,
            Value::Bool(is) => *is,
            Value::Map(map) => !map.is_empty(),
        }
    }
}

fn write(nodes: &[Node], context: &Context, out: &mut String) -> std::result::Result<(), ()> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Print(expr) => match expr.value(context) {
                Value::Text(text) => out.push_str(&text),
                Value::Number(number) => out.push_str(&number.to_string()),
                Value::Bool(is) => out.push_str(if is { "True" } else { "False" }),
                // A map as a whole is refused when the template is read.
                Value::Nothing | Value::Map(_) => {}
            },
            Node::If(branches) => {
                let taken = branches.iter().find(|(condition, _)| condition.as_ref().is_none_or(|condition| condition.value(context).is_true()));
                if let Some((_, nodes)) = taken {
                    write(nodes, context, out)?;
                }
            }
        }
        if out.len() > OUTPUT_LEN_MAX {
            return Err(());
        }
    }
    Ok(())
}

impl Expr {
    fn value<'c>(&'c self, context: &'c Context) -> Value<'c> {
        let text = |text: &'c str| Value::Text(text.into());
        match self {
            Expr::Value(value) => value.clone(),
            Expr::Name(root, members) => {
                let map = match root {
                    Root::Instance => &context.instance,
                    Root::Config => &context.config,
                    Root::Properties => &context.properties,
                    Root::Trigger => return if members.is_empty() { text(&context.trigger) } else { Value::Nothing },
                    Root::Path => return if members.is_empty() { text(&context.path) } else { Value::Nothing },
                };
                match &members[..] {
                    [] => Value::Map(map),
                    [member] => map.get(member).map_or(Value::Nothing, |found| text(found)),
                    _ => Value::Nothing,
                }
            }
            Expr::ConfigGet(key, default) => match key.value(context) {
                Value::Text(key) => match context.config.get(&*key) {
                    // As LXD has it.
                    Some(found) => text(found.trim_end_matches(['\r', '\n'])),
                    None => default.value(context),
                },
                _ => default.value(context),
            },
            Expr::Not(inner) => Value::Bool(!inner.value(context).is_true()),
            Expr::Default(value, default) => match value.value(context) {
                value if value.is_true() => value,
                _ => default.value(context),
            },
            Expr::Both(operator, left, right) => {
                let (left, right) = (left.value(context), right.value(context));
                Value::Bool(match operator {
                    Operator::Or => left.is_true() || right.is_true(),
                    Operator::And => left.is_true() && right.is_true(),
                    Operator::Equal => left == right,
                    Operator::NotEqual => left != right,
                    Operator::In => match (&left, &right) {
                        (Value::Text(part), Value::Text(whole)) => whole.contains(&**part),
                        (Value::Text(key), Value::Map(map)) => map.contains_key(&**key),
                        _ => false,
                    },
                })
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Number(i64),
    Sign(&'static str),
}

/// Signs of the expression language, longest first.
const SIGNS: [&str; 13] = ["==", "!=", "&&", "||", "(", ")", ",", ".", "[", "]", "|", ":", "!"];

/// Where a refusal is, and why.
type Refused = (usize, String);

/// What stands between the tags, and the tags.
enum Piece {
    Text(String),
    Print { at: usize, tokens: Vec<Token> },
    Block { at: usize, tokens: Vec<Token> },
}

struct Parser {
    pieces: std::iter::Peekable<std::vec::IntoIter<Piece>>,
    depth: usize,
}

impl Parser {
    fn parse(name: &str, source: &str) -> Result<Vec<Node>> {
        let limit = |message: String| Error::new(Kind::InvalidRequest, Stage::Inject, name, message).with_reason("TEMPLATE_LIMIT");
        if source.len() > SOURCE_LEN_MAX {
            return Err(limit(format!("the template has {} bytes, the limit is {SOURCE_LEN_MAX}", source.len())));
        }
        let refuse = |(at, message): Refused| {
            let place = position_in(source, at);
            let message = format!("line {}, column {}: {message}", place.line, place.column);
            Error::new(Kind::InvalidRequest, Stage::Inject, name, message).with_reason("TEMPLATE_SYNTAX")
        };
        let pieces = pieces(source).map_err(refuse)?;
        if pieces.len() > 2 * TAGS_MAX {
            return Err(limit(format!("the template has more than {TAGS_MAX} tags")));
        }
        let mut parser = Parser { pieces: pieces.into_iter().peekable(), depth: 0 };
        let nodes = parser.nodes().map_err(refuse)?;
        match parser.pieces.next() {
            Some(Piece::Block { at, tokens }) => Err(refuse((at, format!("{} without an if before it", statement(&tokens))))),
            _ => Ok(nodes),
        }
    }

    /// Nodes up to the end, or to a statement that belongs to the block around them.
    fn nodes(&mut self) -> std::result::Result<Vec<Node>, Refused> {
        let mut nodes = Vec::new();
        while let Some(piece) = self.pieces.next_if(|piece| match piece {
            Piece::Block { tokens, .. } => !matches!(statement(tokens), "elif" | "else" | "endif"),
            _ => true,
        }) {
            match piece {
                Piece::Text(text) => nodes.push(Node::Text(text)),
                Piece::Print { at, tokens } => {
                    let expr = Expression::whole(&tokens, at)?;
                    if let Expr::Name(Root::Instance | Root::Config | Root::Properties, members) = &expr
                        && members.is_empty()
                    {
                        return Err((at, "prints a whole map; name a member of it".into()));
                    }
                    nodes.push(Node::Print(expr));
                }
                Piece::Block { at, tokens } => nodes.push(self.block(at, &tokens)?),
            }
        }
        Ok(nodes)
    }

    fn block(&mut self, at: usize, tokens: &[Token]) -> std::result::Result<Node, Refused> {
        if statement(tokens) != "if" {
            return Err((at, format!("the statement {:?} is not supported; there are if, elif, else and endif", statement(tokens))));
        }
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err((at, format!("blocks are nested deeper than {DEPTH_MAX}")));
        }
        let mut branches = Vec::new();
        let mut condition = Some(Expression::whole(&tokens[1..], at)?);
        loop {
            let body = self.nodes()?;
            let has_else = condition.is_none();
            branches.push((condition.take(), body));
            let Some(Piece::Block { at: next, tokens }) = self.pieces.next() else { return Err((at, "this if has no endif".into())) };
            match statement(&tokens) {
                "elif" if !has_else => condition = Some(Expression::whole(&tokens[1..], next)?),
                "else" if !has_else && tokens.len() == 1 => {}
                "endif" if tokens.len() == 1 => break,
                other => return Err((next, format!("{other} does not belong here"))),
            }
        }
        self.depth -= 1;
        Ok(Node::If(branches))
    }
}

fn statement(tokens: &[Token]) -> &str {
    match tokens.first() {
        Some(Token::Word(word)) => word,
        _ => "",
    }
}

fn pieces(source: &str) -> std::result::Result<Vec<Piece>, Refused> {
    let mut pieces = Vec::new();
    let mut at = 0;
    let mut trim = false;
    loop {
        let next = ["{{", "{%", "{#"].into_iter().filter_map(|open| source[at..].find(open).map(|found| (at + found, open))).min();
        let end = next.map_or(source.len(), |(found, _)| found);
        let mut text = &source[at..end];
        if std::mem::take(&mut trim) {
            text = text.trim_start_matches([' ', '\n', '\r', '\t']);
        }
        let Some((start, open)) = next else {
            pieces.push(Piece::Text(text.to_owned()));
            return Ok(pieces);
        };
        at = start + 2;
        if open == "{#" {
            pieces.push(Piece::Text(text.to_owned()));
            at = source[at..].find("#}").map(|found| at + found + 2).ok_or_else(|| (start, "this comment is not closed with #}".to_owned()))?;
            continue;
        }
        if source[at..].starts_with('-') {
            text = text.trim_end_matches([' ', '\n', '\r', '\t']);
            at += 1;
        }
        pieces.push(Piece::Text(text.to_owned()));
        let close = if open == "{{" { "}}" } else { "%}" };
        let mut tokens = Vec::new();
        loop {
            let rest = &source[at..];
            if let Some(after) = rest.strip_prefix('-').and_then(|rest| rest.strip_prefix(close)) {
                (at, trim) = (source.len() - after.len(), true);
                break;
            }
            if let Some(after) = rest.strip_prefix(close) {
                at = source.len() - after.len();
                break;
            }
            let Some(first) = rest.chars().next() else { return Err((start, format!("this tag is not closed with {close}"))) };
            if first.is_ascii_whitespace() {
                at += 1;
                continue;
            }
            let (token, len) = token(rest, first).map_err(|message| (at, message))?;
            tokens.push(token);
            at += len;
        }
        pieces.push(if open == "{{" { Piece::Print { at: start, tokens } } else { Piece::Block { at: start, tokens } });
    }
}

/// One token and its length.
fn token(rest: &str, first: char) -> std::result::Result<(Token, usize), String> {
    if first == '"' || first == '\'' {
        let mut text = String::new();
        let mut chars = rest.char_indices().skip(1);
        while let Some((index, c)) = chars.next() {
            match c {
                _ if c == first => return Ok((Token::Text(text), index + 1)),
                '\\' => match chars.next() {
                    Some((_, c @ ('\\' | '"' | '\''))) => text.push(c),
                    _ => return Err("a backslash in a string stands before a quote or a backslash only".into()),
                },
                _ => text.push(c),
            }
        }
        return Err("this string is not closed".into());
    }
    if first.is_ascii_digit() {
        let len = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let number = rest[..len].parse().map_err(|_| format!("{:?} is not a whole number", &rest[..len]))?;
        return Ok((Token::Number(number), len));
    }
    if first.is_ascii_alphabetic() || first == '_' {
        let len = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        return Ok((Token::Word(rest[..len].to_owned()), len));
    }
    match SIGNS.into_iter().find(|sign| rest.starts_with(sign)) {
        Some(sign) => Ok((Token::Sign(sign), sign.len())),
        None => Err(format!("{first:?} is not supported in an expression")),
    }
}

/// A parser of one tag's expression.
struct Expression<'t> {
    tokens: &'t [Token],
    at: usize,
    depth: usize,
}

impl<'t> Expression<'t> {
    fn whole(tokens: &'t [Token], at: usize) -> std::result::Result<Expr, Refused> {
        let mut parser = Expression { tokens, at, depth: 0 };
        let expr = parser.or()?;
        match parser.tokens.first() {
            None => Ok(expr),
            Some(token) => Err(parser.refuse(format!("{} is not expected here", shown(token)))),
        }
    }

    fn refuse(&self, message: impl Into<String>) -> Refused {
        (self.at, message.into())
    }

    fn take(&mut self, wanted: &[Token]) -> bool {
        let found = self.tokens.first().is_some_and(|token| wanted.contains(token));
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn want(&mut self, sign: &'static str) -> std::result::Result<(), Refused> {
        if self.take(&[Token::Sign(sign)]) { Ok(()) } else { Err(self.refuse(format!("{sign:?} is expected here"))) }
    }

    fn or(&mut self) -> std::result::Result<Expr, Refused> {
        let mut left = self.and()?;
        while self.take(&[Token::Word("or".into()), Token::Sign("||")]) {
            left = Expr::Both(Operator::Or, Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> std::result::Result<Expr, Refused> {
        let mut left = self.not()?;
        while self.take(&[Token::Word("and".into()), Token::Sign("&&")]) {
            left = Expr::Both(Operator::And, Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> std::result::Result<Expr, Refused> {
        if !self.take(&[Token::Word("not".into()), Token::Sign("!")]) {
            return self.comparison();
        }
        self.deeper()?;
        let inner = self.not()?;
        self.depth -= 1;
        Ok(Expr::Not(Box::new(inner)))
    }

    fn comparison(&mut self) -> std::result::Result<Expr, Refused> {
        let left = self.filtered()?;
        let operators = [(Token::Sign("=="), Operator::Equal), (Token::Sign("!="), Operator::NotEqual), (Token::Word("in".into()), Operator::In)];
        for (token, operator) in operators {
            if self.take(&[token]) {
                return Ok(Expr::Both(operator, Box::new(left), Box::new(self.filtered()?)));
            }
        }
        Ok(left)
    }

    fn filtered(&mut self) -> std::result::Result<Expr, Refused> {
        let mut value = self.primary()?;
        while self.take(&[Token::Sign("|")]) {
            match self.word()?.as_str() {
                "default" => {
                    self.want(":")?;
                    value = Expr::Default(Box::new(value), Box::new(self.primary()?));
                }
                other => return Err(self.refuse(format!("the filter {other:?} is not supported; there is default:value"))),
            }
        }
        Ok(value)
    }

    fn word(&mut self) -> std::result::Result<String, Refused> {
        match self.tokens.split_first() {
            Some((Token::Word(word), rest)) => {
                self.tokens = rest;
                Ok(word.clone())
            }
            _ => Err(self.refuse("a name is expected here")),
        }
    }

    fn deeper(&mut self) -> std::result::Result<(), Refused> {
        self.depth += 1;
        if self.depth > DEPTH_MAX { Err(self.refuse(format!("an expression is nested deeper than {DEPTH_MAX}"))) } else { Ok(()) }
    }

    fn primary(&mut self) -> std::result::Result<Expr, Refused> {
        let Some((token, rest)) = self.tokens.split_first() else { return Err(self.refuse("the tag ends where a value is expected")) };
        self.tokens = rest;
        match token {
            Token::Text(text) => Ok(Expr::Value(Value::Text(text.clone().into()))),
            Token::Number(number) => Ok(Expr::Value(Value::Number(*number))),
            Token::Sign("(") => {
                self.deeper()?;
                let inner = self.or()?;
                self.want(")")?;
                self.depth -= 1;
                Ok(inner)
            }
            Token::Word(word) => match word.as_str() {
                "true" | "false" => Ok(Expr::Value(Value::Bool(word == "true"))),
                "config_get" => self.config_get(),
                "container" | "instance" => self.members(Root::Instance),
                "config" => self.members(Root::Config),
                "properties" => self.members(Root::Properties),
                "trigger" => self.members(Root::Trigger),
                "path" => self.members(Root::Path),
                other => {
                    let offered = "container, instance, config, properties, trigger, path and config_get()";
                    Err(self.refuse(format!("{other:?} is not offered to templates; there are {offered}")))
                }
            },
            token => Err(self.refuse(format!("{} is not expected here", shown(token)))),
        }
    }

    fn config_get(&mut self) -> std::result::Result<Expr, Refused> {
        self.want("(")?;
        self.deeper()?;
        let key = self.or()?;
        self.want(",")?;
        let default = self.or()?;
        self.want(")")?;
        self.depth -= 1;
        Ok(Expr::ConfigGet(Box::new(key), Box::new(default)))
    }

    fn members(&mut self, root: Root) -> std::result::Result<Expr, Refused> {
        let mut members = Vec::new();
        loop {
            if self.take(&[Token::Sign(".")]) {
                members.push(self.word()?);
            } else if self.take(&[Token::Sign("[")]) {
                let Some((Token::Text(member), rest)) = self.tokens.split_first() else { return Err(self.refuse("a string is expected in [ ]")) };
                members.push(member.clone());
                self.tokens = rest;
                self.want("]")?;
            } else if self.tokens.first() == Some(&Token::Sign("(")) {
                return Err(self.refuse("only config_get() can be called"));
            } else {
                return Ok(Expr::Name(root, members));
            }
        }
    }
}

fn shown(token: &Token) -> String {
    match token {
        Token::Word(word) => format!("{word:?}"),
        Token::Text(text) => format!("the string {text:?}"),
        Token::Number(number) => number.to_string(),
        Token::Sign(sign) => format!("{sign:?}"),
    }
}

#[cfg(test)]
#[path = "pongo_tests.rs"]
mod tests;
