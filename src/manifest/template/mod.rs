//! Templates: files of the image with `<%= expression %>` and `<% if … %>`, `<% for … %>`, `<% set … %>` in them, rendered once per instance.
//!
//! The originals were EJS, which ran a template's JavaScript on the host. Here the delimiters are theirs and the language is minijinja's (Jinja2's),
//! cut down until a hostile template can't do anything but produce text: no include, import or loader, no functions but `range`, no methods, no
//! macros, a short list of filters, fuel, output and source caps. [`scan`] checks the source before the engine sees it: it names JavaScript for what
//! it is, and refuses expressions by which a few lines could multiply a string until the host runs out of memory (the engine's fuel counts
//! instructions, not bytes). What a template prints is never expanded again, and nothing is escaped unless a filter says so.
//!
//! How values print: strings as they are; numbers as JSON writes them, whole floats without fraction; `true` and `false`; a list of plain values
//! with commas between (as the templates of 2010 had it). Null, undefined and objects are errors. White space is kept as it stands; `<%-` and `-%>`
//! remove it on that side. A trailing newline stays.

mod filters;
mod scan;

use std::{
    io,
    time::{Duration, Instant},
};

use minijinja::{AutoEscape, Environment, ErrorKind, State, UndefinedBehavior, Value, syntax::SyntaxConfig, tests as is};

use crate::error::{Error, Kind, Result, Stage};

pub use filters::NAMES as FILTERS;

/// Bytes of a template.
pub const SOURCE_LEN_MAX: usize = 256 * 1024;
/// Bytes that one template may produce.
pub const OUTPUT_LEN_MAX: usize = 1024 * 1024;
/// Instructions that one template may run, when its values are of ordinary length: some four for each value printed.
pub const FUEL_MAX: u64 = 50_000;
/// Instructions that any template may run, however long its values.
pub const FUEL_MIN: u64 = 10_000;
/// Bytes that may be moved by instructions, which between these bounds decides: an instruction that joins strings costs what their length is.
const WORK_MAX: u64 = 4_000_000_000;
/// Time that one template may take, checked where it prints; fuel is the limit for honest ones.
pub const TIME_MAX: Duration = Duration::from_secs(2);
/// Nesting of expressions and blocks while running.
const RECURSION_MAX: usize = 64;

/// Renders `source`. `name` (the path in the image) and the line are in every error: `Kind::InvalidRequest`, reason `TEMPLATE_SYNTAX` when the
/// template can't be right for any context, `TEMPLATE_UNDEFINED` when it uses what the context lacks, `TEMPLATE_LIMIT` when it costs too much,
/// `TEMPLATE_FAILED` otherwise.
pub fn render(name: &str, source: &str, context: &serde_json::Value) -> Result<String> {
    let literal_len = scan::check(name, source)?;
    let mut environment = environment();
    let fuel = fuel(literal_len, context);
    environment.set_fuel(Some(fuel));
    let deadline = Instant::now() + TIME_MAX;
    environment.set_formatter(move |out, state, value| {
        if Instant::now() > deadline {
            return Err(minijinja::Error::new(ErrorKind::OutOfFuel, "the template takes too long"));
        }
        print(out, state, value)
    });
    let template = environment.template_from_named_str(name, source).map_err(|e| explain(name, source, &e))?;
    let mut output = Capped(Vec::with_capacity(source.len()));
    match template.render_captured_to(minijinja::value::Serde(context), &mut output) {
        Ok(_) => String::from_utf8(output.0)
            .map_err(|e| Error::internal(Stage::Inject, name, "the template engine wrote something other than UTF-8").with_source(e)),
        Err(e) => Err(explain(name, source, &e)),
    }
}

/// Checks syntax and limits without a context.
pub fn check(name: &str, source: &str) -> Result<()> {
    scan::check(name, source)?;
    environment().template_from_named_str(name, source).map(|_| ()).map_err(|e| explain(name, source, &e))
}

/// Whether an expression of the template mentions `word` as a name or in a string; for finding out which values it may print.
pub fn mentions(source: &str, word: &str) -> bool {
    scan::words(source).any(|found| found.contains(word))
}

/// Whether a template uses `args` as a whole (`args|json`, `for x in args`, `args[name]`) rather than by the names of its members.
pub fn mentions_all_args(source: &str) -> bool {
    scan::uses_args_as_a_whole(source)
}

fn fuel(literal_len: usize, context: &serde_json::Value) -> u64 {
    // A quarter: an ordinary context is keys and short values for the most part, one with a long value is that value.
    let context_len = serde_json::to_vec(context).map_or(0, |text| text.len() / 4);
    let longest = (literal_len.max(context_len).max(1) * scan::WEIGHT_MAX) as u64;
    (WORK_MAX / longest).clamp(FUEL_MIN, FUEL_MAX)
}

fn environment() -> Environment<'static> {
    // Empty: without the filters, tests and functions that the engine brings.
    let mut environment = Environment::empty();
    let syntax = SyntaxConfig::builder()
        .block_delimiters("<%", "%>")
        .variable_delimiters("<%=", "%>")
        .comment_delimiters("<%#", "%>")
        .keep_trailing_newline(true)
        .build()
        .expect("the delimiters are distinct and not empty");
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL_MAX));
    environment.set_recursion_limit(RECURSION_MAX);
    filters::add(&mut environment);
    environment.add_test("defined", is::is_defined);
    environment.add_test("undefined", is::is_undefined);
    environment.add_test("none", is::is_none);
    environment.add_test("boolean", is::is_boolean);
    environment.add_test("number", is::is_number);
    environment.add_test("integer", is::is_integer);
    environment.add_test("string", is::is_string);
    environment.add_test("sequence", is::is_sequence);
    environment.add_test("mapping", is::is_mapping);
    environment.add_test("odd", is::is_odd);
    environment.add_test("even", is::is_even);
    environment.add_test("startingwith", is::is_startingwith);
    environment.add_test("endingwith", is::is_endingwith);
    environment.add_test("eq", is::is_eq);
    environment.add_test("ne", is::is_ne);
    environment.add_test("in", is::is_in);
    environment
}

/// What `<%= … %>` writes.
fn print(out: &mut minijinja::Output, state: &mut State, value: &Value) -> std::result::Result<(), minijinja::Error> {
    if value.is_undefined() {
        // Knows which undefined values are errors: the one of an `if` expression without `else` is not.
        return minijinja::escape_formatter(out, state, value);
    }
    match plain(value) {
        Some(text) => Ok(out.write_str(&text)?),
        None if value.is_none() => Err(failed("the value is null; use |default(\"…\", true) or test for it")),
        None if value.kind() == minijinja::value::ValueKind::Map => Err(failed("the value is an object; name a member of it or use |json")),
        None => {
            for (index, item) in value.try_iter()?.enumerate() {
                let text = plain(&item).ok_or_else(|| failed("the list holds more than plain values; use |json, |join or a loop"))?;
                if index > 0 {
                    out.write_str(",")?;
                }
                out.write_str(&text)?;
            }
            Ok(())
        }
    }
}

/// A string, number or boolean as text.
fn plain(value: &Value) -> Option<std::borrow::Cow<'_, str>> {
    use minijinja::value::ValueKind;
    match value.kind() {
        ValueKind::String => value.as_str().map(Into::into),
        ValueKind::Bool => Some(if value.is_true() { "true".into() } else { "false".into() }),
        ValueKind::Number if value.is_integer() => Some(value.to_string().into()),
        ValueKind::Number => {
            let number = f64::try_from(value.clone()).ok().filter(|number| number.is_finite())?;
            Some(if number.fract() == 0.0 && number.abs() < 1e15 { format!("{number:.0}").into() } else { number.to_string().into() })
        }
        _ => None,
    }
}

fn failed(message: &'static str) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// Takes at most [`OUTPUT_LEN_MAX`] bytes.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LEN_MAX {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn explain(name: &str, source: &str, error: &minijinja::Error) -> Error {
    let line = error.line().unwrap_or(1);
    let detail = error.detail().unwrap_or("").to_owned();
    let (reason, message) = match error.kind() {
        ErrorKind::OutOfFuel => (
            "TEMPLATE_LIMIT",
            format!("the template runs too many steps ({FUEL_MIN} to {FUEL_MAX}, by the length of its values) or longer than {TIME_MAX:?}"),
        ),
        ErrorKind::WriteFailure => ("TEMPLATE_LIMIT", format!("the template writes more than {OUTPUT_LEN_MAX} bytes")),
        ErrorKind::UndefinedError => ("TEMPLATE_UNDEFINED", detail),
        ErrorKind::SyntaxError => ("TEMPLATE_SYNTAX", detail),
        ErrorKind::UnknownFilter => ("TEMPLATE_SYNTAX", format!("{detail}; there are {}", FILTERS.join(", "))),
        _ => ("TEMPLATE_FAILED", if detail.is_empty() { error.kind().to_string() } else { detail }),
    };
    let column = error.range().and_then(|range| source.get(..range.start)).map(|before| before.chars().rev().take_while(|c| *c != '\n').count() + 1);
    let place = column.map_or_else(|| format!("line {line}"), |column| format!("line {line}, column {column}"));
    Error::new(Kind::InvalidRequest, Stage::Inject, name, format!("{place}: {message}")).with_reason(reason)
}

#[cfg(test)]
mod tests;
