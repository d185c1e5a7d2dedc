//! Manifests, the arguments of instances, and templates: read, checked and expanded by a process for each.

use std::{collections::BTreeSet, fs::File};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{
    Launcher, died,
    small::{Answer, Task},
};
use crate::{
    config::worker::Confine,
    error::{Error, Result, Stage},
    manifest::{
        self, Judged, Manifest,
        apply::{self, Expanded},
        args::{ARGS_LEN_MAX, Args},
        lxd::pongo,
    },
};

/// Names that are in a manifest, as JSON, in which every character may be escaped.
const SECRETS_LEN_MAX: usize = 8 * manifest::LEN_MAX;
/// JSON of arguments: characters may be escaped.
const RESOLVED_LEN_MAX: usize = 8 * ARGS_LEN_MAX;
/// JSON of what templates write: the same.
const EXPANDED_LEN_MAX: usize = 6 * apply::OUTPUT_TOTAL_MAX + (1 << 20);

/// Arguments to check: `args` of a manifest, and what a user gave.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ArgsQuestion {
    schema: Value,
    given: Map<String, Value>,
}

/// Templates to expand.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Templates {
    sources: Vec<apply::Source>,
    context: Value,
    secret_args: BTreeSet<String>,
}

impl Launcher {
    /// Reads a manifest as [`Manifest::parse`] does, in a worker unless configured otherwise.
    pub fn manifest(&self, text: &str) -> Result<Manifest> {
        // What is too long is refused before it is looked at.
        if self.settings.confine == Confine::Off || text.len() > manifest::LEN_MAX {
            return Manifest::parse(text.as_bytes());
        }
        let secret_args: BTreeSet<String> = self.described(Task::Manifest, text.as_bytes(), None, SECRETS_LEN_MAX)?;
        // What it says is wanted; what the text says is there to be read.
        let document = serde_json::from_str(text).map_err(|error| died("what it took for a manifest is no JSON").with_source(error))?;
        Manifest::judged(Judged { document, secret_args })
    }

    /// Checks arguments as [`Manifest::resolve_args`] does, in a worker unless configured otherwise. An image that takes none needs nobody to say so.
    pub fn resolve_args(&self, manifest: &Manifest, given: &Map<String, Value>) -> Result<Map<String, Value>> {
        let Some(schema) = manifest.args().filter(|_| self.settings.confine == Confine::Required) else { return manifest.resolve_args(given) };
        let len = serde_json::to_vec(given).map_or(usize::MAX, |text| text.len());
        if len > ARGS_LEN_MAX {
            return Err(Error::field(Stage::Request, "args", format!("have {len} bytes as JSON, the limit is {ARGS_LEN_MAX}")));
        }
        self.described(Task::Args, &json(&ArgsQuestion { schema: schema.clone(), given: given.clone() })?, None, RESOLVED_LEN_MAX)
    }

    /// Expands templates as [`apply::expand`] does, in a worker unless configured otherwise.
    pub fn expand(&self, sources: Vec<apply::Source>, context: Value, secret_args: &BTreeSet<String>) -> Result<Vec<Expanded>> {
        if self.settings.confine == Confine::Off {
            return apply::expand(&sources, &context, secret_args);
        }
        if sources.is_empty() {
            return Ok(Vec::new());
        }
        let count = sources.len();
        let question = Templates { sources, context, secret_args: secret_args.clone() };
        let expanded: Vec<Expanded> = self.described(Task::Templates, &json(&question)?, None, EXPANDED_LEN_MAX)?;
        counted(expanded, count)
    }

    /// Expands templates of LXD as [`pongo::render_all`] does, in a worker unless configured otherwise.
    pub fn expand_lxd(&self, requests: &[pongo::Request<'_>]) -> Result<Vec<String>> {
        if self.settings.confine == Confine::Off {
            return pongo::render_all(requests);
        }
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        counted(self.described(Task::LxdTemplates, &json(&requests)?, None, EXPANDED_LEN_MAX)?, requests.len())
    }

    /// The answer to a question whose answer is JSON.
    pub(super) fn described<T: DeserializeOwned>(&self, task: Task, data: &[u8], file: Option<&File>, answer_max: usize) -> Result<T> {
        match self.ask(task, data, file, answer_max)? {
            (Answer::Described, json) => serde_json::from_slice(&json).map_err(|error| died("its answer can't be read").with_source(error)),
            _ => Err(died("its answer is to another question")),
        }
    }
}

fn counted<T>(answers: Vec<T>, count: usize) -> Result<Vec<T>> {
    if answers.len() == count { Ok(answers) } else { Err(died(format!("it gave {} answers to {count} questions", answers.len()))) }
}

/// The reader's side of [`Launcher::manifest`].
pub(super) fn judge(text: &[u8]) -> Result<Vec<u8>> {
    json(Manifest::parse(text)?.secret_args())
}

/// The reader's side of [`Launcher::resolve_args`].
pub(super) fn resolve(data: &[u8]) -> Result<Vec<u8>> {
    let ArgsQuestion { schema, given } = question(data)?;
    json(&Args::compile(&schema)?.resolve(&given)?)
}

/// The reader's side of [`Launcher::expand`].
pub(super) fn expand(data: &[u8]) -> Result<Vec<u8>> {
    let Templates { sources, context, secret_args } = question(data)?;
    json(&apply::expand(&sources, &context, &secret_args)?)
}

/// The reader's side of [`Launcher::expand_lxd`].
pub(super) fn expand_lxd(data: &[u8]) -> Result<Vec<u8>> {
    let requests: Vec<pongo::Request<'static>> = question(data)?;
    json(&pongo::render_all(&requests)?)
}

fn question<T: DeserializeOwned>(data: &[u8]) -> Result<T> {
    serde_json::from_slice(data).map_err(|error| Error::internal(Stage::Host, super::SUBCOMMAND, "the question can't be read").with_source(error))
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::internal(Stage::Host, super::SUBCOMMAND, "encode").with_source(error))
}

/// What validators and templates look up once; for the process that readers are copies of.
pub(super) fn prepare() -> Result<()> {
    for draft in ["draft-04", "draft-06", "draft-07", "2019-09", "2020-12"] {
        let host = if draft.starts_with("draft") { "http://json-schema.org" } else { "https://json-schema.org/draft" };
        let schema = serde_json::json!({"$schema": format!("{host}/{draft}/schema"), "type": "object", "properties": {"a": {"pattern": "a+"}}});
        Args::compile(&schema)?;
    }
    warm_up();
    Ok(())
}

/// Reads documents of our own.
pub(super) fn warm_up() {
    let manifest = br#"{"args": {"a": {"type": "string", "default": "b"}}, "volatile": ["/a.*"], "templates": ["/a"]}"#;
    let _read = Manifest::parse(manifest).and_then(|manifest| manifest.resolve_args(&Map::new()));
    let _expanded = manifest::template::render("/", "<%= a %>", &serde_json::json!({"a": 1}));
}
