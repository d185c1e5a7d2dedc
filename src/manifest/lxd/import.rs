//! From a tarball of LXD or Incus to a manifest: the metadata tarball of a split image, or a unified one with the root filesystem below `rootfs/`.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::TEMPLATES_MAX;
use crate::{
    error::{Error, Kind, Result, Stage},
    guest::decode::document::yaml_value,
    manifest::{Manifest, template::SOURCE_LEN_MAX},
    names::GuestPath,
    progress::Progress,
    tree::{
        Entry, EntryKind, TreeSink, archive,
        decompress::{self, Compression},
    },
};

/// Bytes of a `metadata.yaml`; published ones have some 2 KiB.
const METADATA_LEN_MAX: u64 = 256 * 1024;
/// Where a unified tarball has the root filesystem.
pub const ROOTFS: &str = "/rootfs";

/// The manifest of the image whose metadata is in the tarball at `path`, checked. Its `rootfs` says where in a unified tarball the root filesystem is; URL and
/// digest are the caller's to add.
///
/// `Kind::InvalidRequest`: no `metadata.yaml`, one that is not YAML, or templates that are not understood (`LXD_METADATA`, `TEMPLATE_SYNTAX`, …); errors of reading.
pub fn file(path: &Path) -> Result<Value> {
    let object = path.display().to_string();
    let file = File::open(path).map_err(|error| Error::io(Stage::Manifest, object.as_str(), "open the tarball", error))?;
    tarball(file, &object)
}

/// The same of an open file, from its start.
pub fn tarball(mut file: File, object: &str) -> Result<Value> {
    let mut first = Vec::with_capacity(decompress::DETECT_LEN);
    let head = file.rewind().and_then(|()| (&file).take(decompress::DETECT_LEN as u64).read_to_end(&mut first)).and_then(|_| file.rewind());
    head.map_err(|error| Error::io(Stage::Manifest, object, "read the tarball", error))?;
    let compression = Compression::detect(&first).filter(|compression| *compression != Compression::Squashfs).ok_or_else(|| {
        Error::new(Kind::InvalidRequest, Stage::Manifest, object, "is neither a tar archive nor one compressed by gzip, xz, zstd or bzip2")
            .with_reason("ROOTFS_FORMAT_UNKNOWN")
    })?;
    let progress = Progress::default();
    let mut input = decompress::open_with(Box::new(file), compression, decompress::Limits::default(), &progress)?;
    read(&mut *input, object, &progress)
}

/// The same of an uncompressed archive; `object` is its name in errors.
pub fn read(input: &mut dyn Read, object: &str, progress: &Progress) -> Result<Value> {
    let has_rootfs = Cell::new(false);
    let filter = |path: &GuestPath| {
        let mut names = path.components();
        match names.next() {
            Some(b"rootfs") => {
                has_rootfs.set(true);
                true
            }
            Some(b"metadata.yaml" | b"templates") => false,
            Some(_) => true,
            None => false,
        }
    };
    let mut files = Files::default();
    archive::read(input, &archive::Limits::default(), &filter, &mut files, progress)?;
    let wrong = |why: String| Error::new(Kind::InvalidRequest, Stage::Manifest, object, why).with_reason("LXD_METADATA");
    let text = files.metadata.ok_or_else(|| wrong("has no metadata.yaml: it is no image of LXD or Incus".into()))?;
    let metadata = yaml_value(&text).map_err(|why| wrong(format!("metadata.yaml {why}")))?;
    let empty = Map::new();
    let templates = match &metadata["templates"] {
        Value::Null => &empty,
        Value::Object(templates) => templates,
        _ => return Err(wrong("metadata.yaml: templates must be an object".into())),
    };
    // Those that nothing refers to are left out.
    let used = |name: &str| templates.values().any(|template| template["template"].as_str() == Some(name));
    let sources: BTreeMap<&String, &String> = files.templates.iter().filter(|(name, _)| used(name)).collect();
    let mut manifest = json!({});
    for (key, value) in
        [("name", &metadata["properties"]["name"]), ("description", &metadata["properties"]["description"]), ("arch", &metadata["architecture"])]
    {
        if value.as_str().is_some_and(|text| !text.is_empty()) {
            manifest[key] = value.clone();
        }
    }
    if has_rootfs.get() {
        manifest["rootfs"] = json!({"prefix": ROOTFS});
    }
    if !templates.is_empty() {
        manifest["lxd"] = json!({"templates": templates, "files": sources});
    }
    Manifest::parse(manifest.to_string().as_bytes())?;
    Ok(manifest)
}

/// Takes what is wanted of the archive.
#[derive(Default)]
struct Files {
    metadata: Option<String>,
    templates: BTreeMap<String, String>,
}

impl TreeSink for Files {
    fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<()> {
        let EntryKind::File { size, .. } = entry.kind else { return Ok(()) };
        let path = entry.path.display();
        let refuse = |why: String| Error::new(Kind::InvalidRequest, Stage::Manifest, path.clone(), why).with_reason("LXD_METADATA");
        let template = path.strip_prefix("/templates/");
        let limit = if template.is_some() { SOURCE_LEN_MAX as u64 } else { METADATA_LEN_MAX };
        if size > limit {
            return Err(refuse(format!("has {size} bytes, the limit is {limit}")));
        }
        let mut bytes = Vec::new();
        data.take(limit).read_to_end(&mut bytes).map_err(|error| crate::tree::error_of_read(error, Stage::Manifest, &path, "read"))?;
        let text = String::from_utf8(bytes).map_err(|_| refuse("is not UTF-8".into()))?;
        match template {
            // One that no file of the image is made of is none of ours, up to a bound.
            Some(name) if self.templates.len() < 4 * TEMPLATES_MAX => drop(self.templates.insert(name.to_owned(), text)),
            Some(_) => return Err(refuse(format!("is one of more than {} templates", 4 * TEMPLATES_MAX))),
            None => self.metadata = Some(text),
        }
        Ok(())
    }
}
