//! Templates of LXD and Incus images: `metadata.yaml` names files of the guest, when they are written, and a template below `templates/` for each.
//!
//! A manifest carries them under `lxd`, in the words of `metadata.yaml`, with the templates' sources beside them ([`import`] makes such a manifest from an
//! image's tarball):
//!
//! ```text
//! "lxd": {
//!   "templates": {"/etc/hostname": {"when": ["create", "copy"], "template": "hostname.tpl"}},
//!   "files": {"hostname.tpl": "{{ container.name }}\n"}
//! }
//! ```
//!
//! A render is what LXD calls the creation of an instance, and what comes before its first start: `create` is applied, then `start`. Templates for `copy` and
//! `rename` only are left alone. What injection or the request writes itself (host name, hosts, cloud-init's seed when the request has one) is not overwritten
//! by a template: the request knows the instance better than the image does; the report says so. Reconfiguring an instance leaves what they wrote as it is.

pub mod import;
pub mod pongo;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::edit::{Attrs, Edit, EditOp},
    guest::{
        config::{BackendKind, InstanceConfig},
        facts::{GuestFacts, NodeKind},
        plan::canonical,
    },
    names::GuestPath,
};

/// Templates of an image; published ones have up to ten.
pub const TEMPLATES_MAX: usize = 64;
/// Where NoCloud's seeds are: the request's own is in one of its directories, and cloud-init would merge another one into it.
const SEEDS: &str = "/var/lib/cloud/seed/";

/// When a template is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trigger {
    /// An instance is made of the image.
    Create,
    /// An instance is made of another.
    Copy,
    /// It starts.
    Start,
    /// It gets another name (Incus).
    Rename,
}

impl Trigger {
    /// All of them.
    pub const ALL: [Trigger; 4] = [Trigger::Create, Trigger::Copy, Trigger::Start, Trigger::Rename];

    /// The word of `metadata.yaml`.
    pub fn name(self) -> &'static str {
        match self {
            Trigger::Create => "create",
            Trigger::Copy => "copy",
            Trigger::Start => "start",
            Trigger::Rename => "rename",
        }
    }
}

/// One template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LxdTemplate {
    /// The file that it writes.
    pub path: GuestPath,
    /// When.
    pub when: BTreeSet<Trigger>,
    /// Whether a file that is there is left as it is.
    pub create_only: bool,
    /// Name of the template.
    pub name: String,
    /// The template.
    pub source: String,
    /// What it sees as `properties`.
    pub properties: BTreeMap<String, String>,
    /// Permission bits of a file that is not there yet (Incus).
    pub mode: Option<u16>,
    /// Its owner.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
}

/// What templates may know, but for what is their own.
pub struct Instance<'a> {
    /// What the instance is told.
    pub config: &'a InstanceConfig,
    /// Its architecture in the kernel's words.
    pub arch: &'a str,
    /// Whether one of `args` is secret.
    pub has_secrets: bool,
}

impl Instance<'_> {
    /// `args` are LXD's `user.…` keys, those with plain values.
    fn config(&self) -> BTreeMap<String, String> {
        let plain = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(is) => Some(is.to_string()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        };
        self.config.args.iter().filter_map(|(name, value)| Some((format!("user.{name}"), plain(value)?))).collect()
    }

    fn properties(&self) -> BTreeMap<String, String> {
        let of = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        // What is rendered here boots by itself: a virtual machine in LXD's words.
        BTreeMap::from([
            of("name", self.config.instance.as_str()),
            of("type", "virtual-machine"),
            of("architecture", self.arch),
            of("privileged", "false"),
            of("ephemeral", "false"),
        ])
    }

    /// Whether the request puts a seed for cloud-init into the root filesystem.
    fn has_seed(&self) -> bool {
        let network = self.config.network.as_ref();
        self.config.setup.cloud_init.is_some() || network.is_some_and(|network| network.backend == Some(BackendKind::CloudInit))
    }
}

/// What the templates write, and what there is to say about those that do not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// One edit for each file.
    pub edits: Vec<Edit>,
    /// Templates that are not applied, and why.
    pub notes: Vec<String>,
}

/// Renders the templates that apply to a new instance. `others` are the edits that go before and are not overwritten; `render` is [`pongo::render_all`], here
/// or in another process.
///
/// Errors are `Kind::InvalidRequest` with the template's name: `TEMPLATE_NOT_A_FILE`, and those of `render`.
pub fn apply(
    templates: &[LxdTemplate],
    facts: &GuestFacts,
    instance: &Instance<'_>,
    others: &[Edit],
    render: impl FnOnce(&[pongo::Request<'_>]) -> Result<Vec<String>>,
) -> Result<Applied> {
    let taken: BTreeSet<String> = others
        .iter()
        .filter(|edit| !matches!(edit.op, EditOp::MakeDir { .. } | EditOp::Remove))
        .map(|edit| canonical(facts, &edit.path.display()))
        .collect();
    let mut applied = Applied::default();
    let mut context = pongo::Context { instance: instance.properties(), config: instance.config(), ..pongo::Context::default() };
    let mut requests = Vec::new();
    for template in templates {
        let given = template.path.display().into_owned();
        let (path, there) = match facts.resolve(&given) {
            Some((path, node)) => (path, Some(node)),
            None => (canonical(facts, &given), None),
        };
        // What is made at creation is there at the first start; what is not for creation only is written again then.
        let order = if template.create_only { [Trigger::Create, Trigger::Start] } else { [Trigger::Start, Trigger::Create] };
        let trigger = order.into_iter().find(|trigger| template.when.contains(trigger));
        let Some(trigger) = trigger else {
            applied.notes.push(format!("the image's template {} is not for new instances: {given} is not written", template.name));
            continue;
        };
        if taken.contains(&path) || taken.contains(&given) {
            applied.notes.push(format!("the image's template {} gives way to what is configured here: {given}", template.name));
            continue;
        }
        if path.starts_with(SEEDS) && instance.has_seed() {
            applied.notes.push(format!("the image's template {} gives way to the request's seed for cloud-init: {given}", template.name));
            continue;
        }
        let attrs = match there.map(|node| (&node.kind, node)) {
            Some((NodeKind::File { .. }, _)) if template.create_only => {
                applied.notes.push(format!("the image's template {} is for a file that is not there yet, and {given} is", template.name));
                continue;
            }
            Some((NodeKind::File { .. }, node)) => Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() },
            Some(_) => {
                let message = format!("{given} is not a regular file in the image");
                return Err(Error::new(Kind::InvalidRequest, Stage::Inject, template.name.clone(), message).with_reason("TEMPLATE_NOT_A_FILE"));
            }
            None => {
                Attrs { mode: template.mode.unwrap_or(0o644), uid: template.uid.unwrap_or(0), gid: template.gid.unwrap_or(0), xattrs: Vec::new() }
            }
        };
        context.properties.clone_from(&template.properties);
        context.trigger = trigger.name().to_owned();
        context.path.clone_from(&given);
        requests.push(pongo::Request { name: (&template.name).into(), source: (&template.source).into(), context: context.clone() });
        let path = GuestPath::new(&path).map_err(|why| Error::new(Kind::Corrupt, Stage::Inject, path.escape_default().to_string(), why))?;
        applied.edits.push(Edit {
            path,
            op: EditOp::WriteFile { content: Vec::new(), attrs },
            why: format!("template {} of the image, when: {}", template.name, trigger.name()),
            // A template that looks into the configuration may print any of it.
            secret: instance.has_secrets && template.source.contains("config"),
        });
    }
    for (edit, text) in applied.edits.iter_mut().zip(render(&requests)?) {
        if let EditOp::WriteFile { content, .. } = &mut edit.op {
            *content = text.into_bytes();
        }
    }
    Ok(applied)
}

/// A problem: the field below `lxd`, and what is wrong with it.
pub type Problem = (String, String);

/// Reads the `templates` of a `metadata.yaml` (or of a manifest) with the sources of the templates by name. Every problem is collected.
/// Sources that somebody else has judged are not read.
pub fn read(
    templates: &Map<String, Value>,
    files: &BTreeMap<String, String>,
    is_judged: bool,
) -> std::result::Result<Vec<LxdTemplate>, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut read = Vec::new();
    if templates.len() > TEMPLATES_MAX {
        problems.push(("templates".to_owned(), format!("has {} templates, the limit is {TEMPLATES_MAX}", templates.len())));
    }
    for (path, value) in templates.iter().take(TEMPLATES_MAX) {
        match one(path, value, files, is_judged) {
            Ok(template) => read.push(template),
            Err((field, why)) => problems.push((format!("templates[{path:?}]{field}"), why)),
        }
    }
    // The order of a document's members means nothing.
    read.sort_by(|a: &LxdTemplate, b| a.path.cmp(&b.path));
    if problems.is_empty() { Ok(read) } else { Err(problems) }
}

fn one(path: &str, value: &Value, files: &BTreeMap<String, String>, is_judged: bool) -> std::result::Result<LxdTemplate, Problem> {
    let wrong = |field: &str, why: String| (field.to_owned(), why);
    // LXD takes a relative one too.
    let path = GuestPath::from_member(path).map_err(|why| wrong("", why))?;
    if path.is_root() || path.display().chars().any(char::is_control) {
        return Err(wrong("", "must be the path of a file".into()));
    }
    let Value::Object(members) = value else { return Err(wrong("", "must be an object with when and template".into())) };
    let known = ["when", "create_only", "template", "properties", "mode", "uid", "gid"];
    if let Some(other) = members.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(wrong(&format!(".{other}"), format!("is not known; known are {}", known.join(", "))));
    }
    let name = members.get("template").and_then(Value::as_str).ok_or_else(|| wrong(".template", "must name a template".into()))?;
    let source = files.get(name).ok_or_else(|| wrong(".template", format!("there is no template {name:?}")))?;
    if !is_judged {
        pongo::check(name, source).map_err(|error| wrong(".template", format!("{name}: {}", error.message())))?;
    }
    let create_only = match members.get("create_only") {
        None => false,
        Some(value) => value.as_bool().ok_or_else(|| wrong(".create_only", "must be true or false".into()))?,
    };
    let mut properties = BTreeMap::new();
    match members.get("properties") {
        None | Some(Value::Null) => {}
        Some(Value::Object(given)) => {
            for (key, value) in given {
                let text = match value {
                    Value::String(text) => text.clone(),
                    Value::Number(number) => number.to_string(),
                    Value::Bool(is) => is.to_string(),
                    Value::Null => String::new(),
                    Value::Array(_) | Value::Object(_) => return Err(wrong(&format!(".properties.{key}"), "must be a plain value".into())),
                };
                properties.insert(key.clone(), text);
            }
        }
        Some(_) => return Err(wrong(".properties", "must be an object".into())),
    }
    let number = |key: &str, radix: u32, max: u32| match members.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            // YAML's writers leave the quotes away.
            let text = value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|number| number.to_string())).unwrap_or_default();
            let number = u32::from_str_radix(&text, radix).ok().filter(|number| *number <= max);
            let kind = if radix == 8 { "octal digits" } else { "a number" };
            number.map(Some).ok_or_else(|| {
                wrong(&format!(".{key}"), format!("must be {kind}, at most {}", if radix == 8 { format!("{max:o}") } else { max.to_string() }))
            })
        }
    };
    Ok(LxdTemplate {
        when: when(members.get("when")).map_err(|why| wrong(".when", why))?,
        create_only,
        mode: number("mode", 8, 0o7777)?.map(|mode| mode as u16),
        uid: number("uid", 10, u32::MAX - 1)?,
        gid: number("gid", 10, u32::MAX - 1)?,
        path,
        name: name.to_owned(),
        source: source.clone(),
        properties,
    })
}

fn when(given: Option<&Value>) -> std::result::Result<BTreeSet<Trigger>, String> {
    let names = Trigger::ALL.map(Trigger::name).join(", ");
    let Some(Value::Array(words)) = given else { return Err(format!("must be a list of {names}")) };
    let one = |word: &Value| Trigger::ALL.into_iter().find(|trigger| Some(trigger.name()) == word.as_str());
    words.iter().map(|word| one(word).ok_or_else(|| format!("{word} is not one of {names}"))).collect()
}

#[cfg(test)]
mod tests;
