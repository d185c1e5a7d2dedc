//! From a JSON document to a [`Manifest`]. Every problem is collected: an author sees all of them at once.

mod fields;
mod machine;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use self::fields::Fields;
use super::{
    ChrootSpec, EntryPoints, KernelSpec, Manifest, Rootfs,
    args::Args,
    canonical_digest, hint,
    json::{JsonError, element},
    lxd::{self, LxdTemplate},
    volatile::Volatile,
};
use crate::{
    error::{Error, Kind, Result, Stage},
    guest::config::BackendKind,
    names::{Digest, GuestPath},
};

/// The fields of a manifest: first those of 2010.
pub const FIELDS: [&str; 16] = [
    "name",
    "description",
    "author",
    "arch",
    "args",
    "templates",
    "persistent",
    "volatile",
    "entry_points",
    "rootfs",
    "filesystem",
    "disk",
    "boot",
    "devices",
    "network",
    "lxd",
];
/// Templates and persistent paths in a manifest.
const PATHS_MAX: usize = 1024;
/// Characters of the longer texts.
const TEXT_LEN_MAX: usize = 4096;

/// The error for a text that is not JSON.
pub fn syntax_error(error: JsonError) -> Error {
    let text = format!("{}: {}", error.position, error.message);
    Error::new(Kind::InvalidRequest, Stage::Manifest, error.field.clone(), text.clone())
        .with_violation(error.field, text)
        .with_reason("MANIFEST_SYNTAX")
}

/// Reads and checks the document. What is compiled is compiled too, to see that it can be, unless the secret arguments come from somebody who has done so.
pub fn manifest(document: &Value, judged: Option<BTreeSet<String>>) -> Result<Manifest> {
    let mut problems = Fields::default();
    let empty = Map::new();
    let top = problems.object(document, "", &FIELDS).unwrap_or(&empty);
    let is_judged = judged.is_some();
    let secret_args = judged.or_else(|| {
        let args = compiled(&mut problems, Args::compile(top.get("args").unwrap_or(&Value::Object(Map::new()))));
        args.map(|args| args.secret_names().map(str::to_owned).collect())
    });
    let volatile = problems.texts(top, "", "volatile", TEXT_LEN_MAX);
    if !is_judged {
        compiled(&mut problems, Volatile::compile(&volatile));
    }
    let filesystem = machine::filesystem(&mut problems, top.get("filesystem"), "filesystem");
    let disk = machine::disk(&mut problems, top.get("disk"));
    let manifest = Manifest {
        name: problems.line(top, "", "name", 255),
        description: problems.text(top, "", "description", TEXT_LEN_MAX),
        author: problems.line(top, "", "author", 1024),
        arch: problems.word(top, "", "arch", 32),
        templates: paths(&mut problems, top, "templates"),
        persistent: paths(&mut problems, top, "persistent"),
        entry_points: entry_points(&mut problems, top.get("entry_points")),
        rootfs: rootfs(&mut problems, top.get("rootfs")),
        boot: machine::boot(&mut problems, top.get("boot")),
        devices: machine::devices(&mut problems, top.get("devices"), &filesystem, &disk),
        filesystem,
        disk,
        network_backend: network(&mut problems, top.get("network")),
        lxd: lxd_templates(&mut problems, top.get("lxd"), is_judged),
        document: document.clone(),
        digest: canonical_digest(document),
        // Without them there are problems.
        secret_args: secret_args.unwrap_or_default(),
        volatile,
    };
    problems.finish(manifest)
}

/// Takes over the violations of a part that compiles by itself.
fn compiled<T>(problems: &mut Fields, part: Result<T>) -> Option<T> {
    part.map_err(|error| problems.adopt(&error)).ok()
}

fn paths(problems: &mut Fields, top: &Map<String, Value>, key: &str) -> Vec<GuestPath> {
    let texts = problems.texts(top, "", key, crate::names::PATH_LEN_MAX);
    if texts.len() > PATHS_MAX {
        problems.add(key, format!("has {} paths, the limit is {PATHS_MAX}", texts.len()));
        return Vec::new();
    }
    let mut paths = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        match GuestPath::new(text) {
            Ok(path) if path.is_root() => problems.add(element(key, index), "must be a path below the root"),
            Ok(path) if paths.contains(&path) => {}
            Ok(path) => paths.push(path),
            Err(message) => problems.add(element(key, index), message),
        }
    }
    paths
}

fn entry_points(problems: &mut Fields, given: Option<&Value>) -> EntryPoints {
    let field = "entry_points";
    let Some(given) = given.and_then(|given| problems.object(given, field, &["kernel", "init", "chroot"])) else { return EntryPoints::default() };
    let init = given.get("init").map(|init| {
        let kernel = problems.object(init, "entry_points.init", &["kernel"]).and_then(|init| init.get("kernel"));
        kernel.map(|kernel| self::kernel(problems, kernel, "entry_points.init.kernel")).unwrap_or_default()
    });
    EntryPoints {
        kernel: given.get("kernel").map(|given| kernel(problems, given, "entry_points.kernel")),
        init,
        chroot: given.get("chroot").map(|given| {
            let field = "entry_points.chroot";
            let empty = Map::new();
            let given = problems.object(given, field, &["command", "enter", "exit"]).unwrap_or(&empty);
            ChrootSpec {
                command: problems.command(given, field, "command"),
                enter: problems.command(given, field, "enter"),
                exit: problems.command(given, field, "exit"),
            }
        }),
    }
}

fn kernel(problems: &mut Fields, given: &Value, field: &str) -> KernelSpec {
    let Some(given) = problems.object(given, field, &["os", "version", "flavor"]) else { return KernelSpec::default() };
    KernelSpec {
        os: problems.line(given, field, "os", 64),
        version: problems.line(given, field, "version", 64),
        flavor: problems.line(given, field, "flavor", 64),
    }
}

fn rootfs(problems: &mut Fields, given: Option<&Value>) -> Option<Rootfs> {
    let field = "rootfs";
    let known = ["url", "digest", "size", "media_type", "prefix"];
    let given = problems.object(given?, field, &known)?;
    Some(Rootfs {
        url: problems.checked(given, field, "url", |text| url(text).map(|()| text.to_owned())),
        digest: problems.checked(given, field, "digest", str::parse::<Digest>),
        size: problems.size(given, field, "size", 1, 1).map(|size| size.0),
        media_type: problems.checked(given, field, "media_type", |text| media_type(text).map(|()| text.to_owned())),
        prefix: problems.checked(given, field, "prefix", |text| match GuestPath::new(text) {
            Ok(path) if path.display().chars().any(char::is_control) => Err("contains control characters".into()),
            Ok(path) if path.is_root() => Err("must be a directory below the tarball's own root; leave it out for that".into()),
            other => other,
        }),
    })
}

/// The shape only: whether a scheme, host or path may be fetched is the policy of the sources.
fn url(text: &str) -> std::result::Result<(), String> {
    const LEN_MAX: usize = 2048;
    let shown: String = text.chars().take(80).collect();
    if text.len() > LEN_MAX {
        return Err(format!("has {} bytes, the limit is {LEN_MAX}", text.len()));
    }
    if let Some(bad) = text
        .chars()
        .find(|c| c.is_whitespace() || c.is_control() || !c.is_ascii() || matches!(c, '<' | '>' | '"' | '\\' | '^' | '`' | '{' | '|' | '}'))
    {
        return Err(format!("{shown:?} contains {bad:?}, which must be percent-encoded in a URL (RFC 3986)"));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(format!("{shown:?} is not an absolute URL such as https://host/path"));
    };
    if !scheme.starts_with(|c: char| c.is_ascii_lowercase())
        || !scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+.-".contains(&b))
    {
        return Err(format!("{shown:?}: the scheme must be lower-case letters"));
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or("");
    if authority.contains('@') {
        return Err("must not contain a user name or password: manifests are public; credentials belong to the host's configuration".into());
    }
    if authority.is_empty() && scheme != "file" {
        return Err(format!("{shown:?} names no host"));
    }
    if rest.contains('#') {
        return Err(format!("{shown:?} has a fragment, which names no other bytes"));
    }
    Ok(())
}

fn media_type(text: &str) -> std::result::Result<(), String> {
    let part = |part: &str| (1..=127).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&b));
    match text.split_once('/') {
        Some((kind, subtype)) if part(kind) && part(subtype) => Ok(()),
        _ => Err(format!("{:?} is not a media type such as application/gzip (RFC 6838)", text.chars().take(80).collect::<String>())),
    }
}

fn network(problems: &mut Fields, given: Option<&Value>) -> Option<BackendKind> {
    let given = problems.object(given?, "network", &["backend"])?;
    problems.choice(given, "network", "backend", &BackendKind::ALL.map(|kind| (kind.name(), kind)))
}

fn lxd_templates(problems: &mut Fields, given: Option<&Value>, is_judged: bool) -> Vec<LxdTemplate> {
    let field = "lxd";
    let empty = Map::new();
    let Some(given) = given.and_then(|given| problems.object(given, field, &["templates", "files"])) else { return Vec::new() };
    let mut object = |key: &str| match given.get(key) {
        None => &empty,
        Some(Value::Object(members)) => members,
        Some(other) => {
            problems.add(format!("{field}.{key}"), format!("must be an object, not {}", hint::kind_of(other)));
            &empty
        }
    };
    let (templates, sources) = (object("templates"), object("files"));
    let mut files = std::collections::BTreeMap::new();
    for (name, source) in sources {
        match source.as_str() {
            Some(source) => drop(files.insert(name.clone(), source.to_owned())),
            None => problems.add(format!("{field}.files[{name:?}]"), format!("must be a string, not {}", hint::kind_of(source))),
        }
    }
    lxd::read(templates, &files, is_judged).unwrap_or_else(|wrong| {
        wrong.into_iter().for_each(|(at, why)| problems.add(format!("{field}.{at}"), why));
        Vec::new()
    })
}
