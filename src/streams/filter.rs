//! Filters over flattened items, in the words of `sstream-query`: `arch=amd64`, `release~(noble|jammy)`, `ftype!=disk1.img`, `label!~beta`.

use fancy_regex::{Regex, RegexBuilder};

use super::document::ItemRef;
use crate::error::{Error, Result, Stage};

/// Bytes of one expression.
const LEN_MAX: usize = 1024;
/// Expressions of one list.
const COUNT_MAX: usize = 64;
/// Steps of backtracking for one value: values are short, more is an expression that never ends.
const BACKTRACK_MAX: usize = 100_000;

#[derive(Debug, Clone)]
enum Test {
    Equals(String),
    Matches(Regex),
}

/// One expression.
#[derive(Debug, Clone)]
pub struct Filter {
    key: String,
    test: Test,
    negated: bool,
    source: String,
}

/// Expressions that all have to hold.
#[derive(Debug, Clone, Default)]
pub struct Filters(Vec<Filter>);

impl Filter {
    /// Reads `KEY=VALUE`, `KEY!=VALUE`, `KEY~REGEX` or `KEY!~REGEX`; spaces around the operator don't matter.
    pub fn parse(text: &str) -> Result<Filter, String> {
        let bad = |why: &str| Err(format!("{:?} is not a filter: {why}", text.chars().take(100).collect::<String>()));
        if text.len() > LEN_MAX {
            return bad("it is too long");
        }
        let text = text.trim();
        let cut = text.find(|c: char| !(c.is_alphanumeric() || "_|-".contains(c))).unwrap_or(text.len());
        let (key, rest) = text.split_at(cut);
        if key.is_empty() {
            return bad("it starts with the name of a field");
        }
        let rest = rest.trim_start();
        let (negated, rest) = rest.strip_prefix('!').map_or((false, rest), |rest| (true, rest));
        let value = rest.get(1..).unwrap_or_default().trim();
        let test = match rest.as_bytes().first() {
            Some(b'=') => Test::Equals(value.to_owned()),
            Some(b'~') => match RegexBuilder::new(value).backtrack_limit(BACKTRACK_MAX).delegate_size_limit(1 << 20).build() {
                Ok(regex) => Test::Matches(regex),
                Err(error) => return bad(&error.to_string()),
            },
            _ => return bad("after the name comes =, !=, ~ or !~"),
        };
        Ok(Filter { key: key.to_owned(), test, negated, source: text.to_owned() })
    }

    /// The expression as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it holds for a field's value; one that is not there is empty.
    fn holds(&self, value: &str) -> Result<bool> {
        let found = match &self.test {
            Test::Equals(wanted) => wanted == value,
            Test::Matches(regex) => regex.is_match(value).map_err(|error| {
                Error::field(Stage::Resolve, "filters", format!("{:?} takes too long on {value:?}", self.source)).with_source(error)
            })?,
        };
        Ok(found != self.negated)
    }
}

impl Filters {
    /// Reads a list of expressions.
    pub fn parse<T: AsRef<str>>(texts: &[T]) -> Result<Filters, String> {
        if texts.len() > COUNT_MAX {
            return Err(format!("{} filters are more than {COUNT_MAX}", texts.len()));
        }
        texts.iter().map(|text| Filter::parse(text.as_ref())).collect::<Result<Vec<_>, _>>().map(Filters)
    }

    /// The expressions as they were written.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(Filter::source)
    }

    /// Whether all hold for an item. `Kind::InvalidRequest` when an expression takes too long.
    pub fn accept(&self, item: &ItemRef<'_>) -> Result<bool> {
        self.accept_with(|key| item.text(key).map(std::borrow::Cow::into_owned))
    }

    /// Whether all hold for fields that `value` looks up.
    pub fn accept_with(&self, value: impl Fn(&str) -> Option<String>) -> Result<bool> {
        for filter in &self.0 {
            if !filter.holds(&value(&filter.key).unwrap_or_default())? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_mean_what_they_mean_to_sstream_query() {
        let fields = [("arch", "amd64"), ("release", "noble"), ("supported", "True"), ("supported_platforms", "xen,kvm")];
        let look_up = |key: &str| fields.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned());
        for (texts, want) in [
            (&["arch=amd64", "release~(noble|jammy)"][..], true),
            (&["arch = amd64"], true),
            (&["arch=arm64"], false),
            (&["arch!=arm64"], true),
            (&["release!~^n"], false),
            (&["release~ob"], true),
            (&["supported=True"], true),
            (&["absent="], true),
            (&["absent!~.+", "arch~^amd"], true),
            (&["supported_platforms~(^|,)kvm(,|$)"], true),
            (&[], true),
        ] {
            assert_eq!(Filters::parse(texts).expect("filters").accept_with(look_up).expect("ends"), want, "{texts:?}");
        }
        for bad in ["", "arch", "=x", "a<b", "release~(", &format!("a={}", "x".repeat(2000))] {
            assert!(Filter::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_expression_that_never_ends_is_stopped() {
        let filters = Filters::parse(&["a~^(a|aa)+(?=b)$"]).expect("a filter");
        let outcome = filters.accept_with(|_| Some("a".repeat(200)));
        assert!(outcome.is_err() || outcome.is_ok_and(|accepted| !accepted));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,40}") {
            if let Ok(filter) = Filter::parse(&text) {
                let _ = filter.holds("amd64");
            }
        }
    }
}
