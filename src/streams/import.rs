//! A version of a product becomes an image: which of its items is the root filesystem, and the manifest that says so.

use serde_json::{Value, json};

use super::document::{Download, ItemRef};
use crate::{
    boot::platform::machine,
    error::{Error, Result, Stage},
    images::{self, name_from},
    names::Digest,
};

/// Items that are a root filesystem, best first: `ftype`, and the media type of what it is. Tarballs come first, which are read in one pass; unified ones of Incus and LXD last:
/// they have metadata and the root filesystem in one.
const ROOTFS: [(&str, &str); 15] = [
    ("root.tar.zst", "application/zstd"),
    ("rootfs.tar.zst", "application/zstd"),
    ("root.tar.xz", "application/x-xz"),
    ("rootfs.tar.xz", "application/x-xz"),
    ("root.tar.gz", "application/gzip"),
    ("rootfs.tar.gz", "application/gzip"),
    ("root.tar.bz2", "application/x-bzip2"),
    ("root.tar", "application/x-tar"),
    ("squashfs", "application/vnd.squashfs"),
    ("incus_combined.tar.xz", "application/x-xz"),
    ("incus_combined.tar.gz", "application/gzip"),
    ("incus_combined.tar.zst", "application/zstd"),
    ("lxd_combined.tar.xz", "application/x-xz"),
    ("lxd_combined.tar.gz", "application/gzip"),
    ("lxd_combined.tar.zst", "application/zstd"),
];
/// Items that are the metadata of an image whose root filesystem is another item.
const METADATA: [&str; 2] = ["incus.tar.xz", "lxd.tar.xz"];
/// Characters of what a publisher says that go into a description.
const TEXT_LEN_MAX: usize = 200;
/// Bytes of a metadata tarball; published ones have a few KiB.
pub const METADATA_LEN_MAX: u64 = 4 << 20;

/// An image that a tree offers.
#[derive(Debug, Clone)]
pub struct Offer<'a> {
    /// The item with the root filesystem.
    pub item: ItemRef<'a>,
    /// Where its bytes are; digest and size are there.
    pub download: Download,
    /// Media type of its bytes.
    pub media_type: &'static str,
    /// What Incus and LXD call the image: SHA-256 over the bytes of its metadata and of this root filesystem, or of the unified tarball; 64 hexadecimal digits.
    pub fingerprint: Option<String>,
    /// The metadata tarball beside it, of a split image.
    pub metadata: Option<Metadata>,
}

/// The metadata tarball of a split image.
#[derive(Debug, Clone)]
pub struct Metadata {
    /// Where its bytes are.
    pub download: Download,
    /// Their digest.
    pub digest: Digest,
}

/// What the metadata tarball says, as far as a manifest has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// Of these bytes.
    pub digest: Digest,
    /// The key `lxd`, when there are templates.
    pub lxd: Option<Value>,
    /// Why its templates are left out.
    pub left_out: Option<String>,
}

impl Described {
    /// What an image that was imported before says of its metadata.
    pub fn of_manifest(manifest: &str) -> Option<Described> {
        let manifest: Value = serde_json::from_str(manifest).ok()?;
        let digest = manifest["x-simplestreams"]["metadata"].as_str()?.parse().ok()?;
        let left_out = manifest["x-simplestreams"]["templates_left_out"].as_str().map(str::to_owned);
        Some(Described { digest, lxd: manifest.get("lxd").cloned(), left_out })
    }
}

/// The key of a metadata item that has the fingerprint of it with a root filesystem of that `ftype`.
fn combined_key(ftype: &str) -> Option<&'static str> {
    match ftype {
        "squashfs" => Some("combined_squashfs-sha256"),
        "root.tar.xz" | "rootfs.tar.xz" => Some("combined_rootxz-sha256"),
        _ => None,
    }
}

fn is_unified(ftype: &str) -> bool {
    ftype.contains("_combined.")
}

/// Picks the root filesystem among the items of one version. The error says why there is none that can be used.
pub fn choose<'a>(items: impl Iterator<Item = ItemRef<'a>>) -> Result<Offer<'a>, String> {
    let (mut best, mut seen): (Option<(usize, ItemRef<'a>)>, Vec<String>) = (None, Vec::new());
    let mut metadata: Option<(usize, ItemRef<'a>)> = None;
    for item in items {
        let ftype = item.text("ftype").unwrap_or_default().into_owned();
        if let Some(rank) = ROOTFS.iter().position(|(name, _)| *name == ftype)
            && best.as_ref().is_none_or(|(other, _)| rank < *other)
        {
            best = Some((rank, item));
        }
        if let Some(rank) = METADATA.iter().position(|name| *name == ftype)
            && metadata.as_ref().is_none_or(|(other, _)| rank < *other)
        {
            metadata = Some((rank, item));
        }
        seen.push(ftype);
    }
    let Some((rank, item)) = best else {
        seen.retain(|ftype| !ftype.is_empty());
        seen.truncate(12);
        return Err(format!(
            "none of its items is a root tarball or squashfs: {}",
            if seen.is_empty() { "it has no items".to_owned() } else { seen.join(", ") }
        ));
    };
    let download = item.download().map_err(|error| error.message().to_owned())?.ok_or_else(|| format!("{} has no path", item.item))?;
    if download.digest.is_none() {
        return Err(format!("{} has no sha256", item.item));
    }
    if download.size.is_none() {
        return Err(format!("{} has no size", item.item));
    }
    let (ftype, media_type) = ROOTFS[rank];
    let fingerprint = match (is_unified(ftype), metadata, combined_key(ftype)) {
        (true, _, _) => download.digest.map(|digest| digest.hex()),
        (false, Some((_, metadata)), Some(key)) => metadata.text(key).map(|text| text.into_owned()),
        _ => None,
    };
    let is_digest = |text: &String| format!("sha256:{text}").parse::<crate::names::Digest>().is_ok();
    let metadata = metadata.filter(|_| !is_unified(ftype)).and_then(|(_, item)| {
        let download = item.download().ok().flatten()?;
        let digest = download.digest.filter(|_| download.size.is_some_and(|size| size <= METADATA_LEN_MAX))?;
        Some(Metadata { download, digest })
    });
    Ok(Offer { item, download, media_type, fingerprint: fingerprint.filter(is_digest), metadata })
}

/// What an image is called here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Called {
    /// The name, e.g. `ubuntu/24.04`.
    pub name: String,
    /// The version, e.g. `20241004`.
    pub version: String,
    /// Further names, e.g. `ubuntu/noble`.
    pub aliases: Vec<String>,
    /// A name that is never that of another product.
    pub own_name: Option<String>,
}

impl Offer<'_> {
    fn text(&self, key: &str) -> String {
        let text = self.item.text(key).unwrap_or_default();
        text.chars().filter(|c| !c.is_control()).take(TEXT_LEN_MAX).collect()
    }

    /// Names of the image: `OS/RELEASE[/VARIANT]`, with the architecture after it where it is not the host's. Nothing when the publisher says too little.
    pub fn called(&self) -> Option<Called> {
        let (os, variant, arch) = (self.text("os"), self.text("variant"), self.text("arch"));
        let release = ["version", "release"].map(|key| self.text(key)).into_iter().find(|text| !text.is_empty()).unwrap_or_default();
        let variant = if variant == "default" || variant == "cloud-server" { String::new() } else { variant };
        let foreign = !arch.is_empty() && machine(&arch) != std::env::consts::ARCH;
        let arch_part = if foreign { arch.as_str() } else { "" };
        let own_name = name_from(&self.item.product.split(':').collect::<Vec<_>>());
        let given = Some(self.text("image_name")).filter(|name| images::check_name(name).is_ok() && !foreign);
        let name = if given.is_some() {
            given
        } else if os.is_empty() || release.is_empty() {
            None
        } else {
            name_from(&[&os, &release, &variant, arch_part])
        };
        let name = name.or_else(|| own_name.clone())?;
        let version = self.item.version.to_owned();
        images::check_version(&version).ok()?;
        let mut aliases: Vec<String> = Vec::new();
        for alias in self.item.list("aliases") {
            // Ubuntu's are short (`noble`), linuxcontainers.org's have the system before them (`debian/bookworm`).
            let parts: Vec<&str> = if alias.contains('/') { alias.split('/').collect() } else { vec![os.as_str(), alias.as_str()] };
            let alias = name_from(&parts)
                .map(|alias| if foreign { format!("{alias}/{arch}") } else { alias })
                .filter(|alias| images::check_name(alias).is_ok() && *alias != name && !aliases.contains(alias));
            aliases.extend(alias);
        }
        Some(Called { name, version, aliases, own_name })
    }

    /// The manifest of the image: everything that decides its bytes, and where it came from. The same offer of the same stream gives the same manifest.
    pub fn manifest(&self, stream: &str, root: &reqwest::Url, described: Option<&Described>) -> Result<String> {
        let called = self.called();
        let name = called.map_or_else(|| self.item.product.chars().filter(|c| !c.is_control()).take(TEXT_LEN_MAX).collect(), |called| called.name);
        let title =
            ["pubname", "release_title", "version_title"].map(|key| self.text(key)).into_iter().find(|text| !text.is_empty()).unwrap_or_default();
        let digest = self.download.digest.ok_or_else(|| Error::internal(Stage::Resolve, self.item.pedigree(), "is an offer without digest"))?;
        let mut manifest = json!({
            "name": name,
            "description": format!("{} {}", if title.is_empty() { self.item.product } else { title.as_str() }, self.item.version).trim(),
            "entry_points": {"init": {}},
            "rootfs": {
                "url": self.download.path.below(root)?.as_str(), "digest": digest.to_string(), "size": self.download.size, "media_type": self.media_type,
            },
            "x-simplestreams": {
                "stream": stream, "content_id": self.item.tree.content_id, "product": self.item.product, "version": self.item.version,
                "item": self.item.item, "label": self.text("label"),
            },
        });
        if is_unified(&self.text("ftype")) {
            manifest["rootfs"]["prefix"] = crate::manifest::lxd::import::ROOTFS.into();
        }
        if let Some(fingerprint) = &self.fingerprint {
            manifest["x-simplestreams"]["fingerprint"] = fingerprint.as_str().into();
        }
        if let Some(Described { digest, lxd, left_out }) = described {
            manifest["x-simplestreams"]["metadata"] = digest.to_string().into();
            if let Some(lxd) = lxd {
                manifest["lxd"] = lxd.clone();
            }
            if let Some(why) = left_out {
                manifest["x-simplestreams"]["templates_left_out"] = why.as_str().into();
            }
        }
        let arch = self.text("arch");
        if !arch.is_empty() {
            manifest["arch"] = arch.into();
        }
        Ok(manifest.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        manifest::Manifest,
        streams::{Limits, Products},
    };

    fn tree(product: &str, fields: Value, items: Value) -> Products {
        let mut fields = fields;
        fields["versions"] = json!({"20241101_05:24": {"items": items}});
        let value = json!({"format": "products:1.0", "content_id": "images", "products": {product: fields}});
        Products::parse(value.to_string().as_bytes(), &Limits::default()).expect("a document")
    }

    fn item(ftype: &str) -> Value {
        json!({"ftype": ftype, "path": format!("images/x/{ftype}"), "sha256": Digest::of(b"abc").hex(), "size": 3})
    }

    #[test]
    fn images_of_linuxcontainers_are_named_as_people_call_them() {
        let arch = if std::env::consts::ARCH == "x86_64" { "amd64" } else { std::env::consts::ARCH };
        let fields = json!({
            "aliases": "debian/bookworm/default,debian/bookworm,debian/12", "arch": arch, "os": "Debian", "release": "bookworm", "release_title": "bookworm",
            "variant": "default", "requirements": {}
        });
        let items = json!({"incus.tar.xz": item("incus.tar.xz"), "root.tar.xz": item("root.tar.xz"), "rootfs.squashfs": item("squashfs"), "disk.qcow2": item("disk-kvm.img")});
        let tree = tree("debian:bookworm:amd64:default", fields, items);
        let offer = choose(tree.items()).expect("a tarball");
        assert_eq!((offer.item.item, offer.media_type), ("root.tar.xz", "application/x-xz"));
        let called = offer.called().expect("names");
        assert_eq!((called.name.as_str(), called.version.as_str()), ("debian/bookworm", "20241101_05:24"));
        assert_eq!(called.aliases, ["debian/bookworm/default", "debian/12"]);
        assert_eq!(called.own_name.as_deref(), Some("debian/bookworm/amd64/default"));
        let root = reqwest::Url::parse("https://images.example/").expect("a URL");
        let manifest = Manifest::parse(offer.manifest("lxc", &root, None).expect("JSON").as_bytes()).expect("a manifest");
        let rootfs = manifest.rootfs().expect("a root filesystem");
        assert_eq!(rootfs.url.as_deref(), Some("https://images.example/images/x/root.tar.xz"));
        assert_eq!((rootfs.digest, rootfs.size), (Some(Digest::of(b"abc")), Some(3)));
        assert_eq!(manifest.entry_point_names(), ["init"]);
    }

    /// As images.linuxcontainers.org publishes them: metadata by itself, root filesystems beside it, and what both together are called.
    #[test]
    fn split_and_unified_images_have_the_name_that_incus_gives_them() {
        let root = reqwest::Url::parse("https://images.example/").expect("a URL");
        let (of_squashfs, of_tarball) = (Digest::of(b"m+s").hex(), Digest::of(b"m+t").hex());
        let mut metadata = item("incus.tar.xz");
        metadata["combined_squashfs-sha256"] = of_squashfs.as_str().into();
        metadata["combined_rootxz-sha256"] = of_tarball.as_str().into();
        let mut older = item("lxd.tar.xz");
        older["combined_squashfs-sha256"] = "not a digest".into();
        let split = json!({"incus.tar.xz": metadata, "lxd.tar.xz": older, "root.squashfs": item("squashfs"), "disk.qcow2": item("disk-kvm.img")});
        let written = |items: Value| -> Value {
            let tree = tree("alpine:3.20:amd64:default", json!({"os": "Alpine", "release": "3.20", "arch": "x86_64"}), items);
            let text = choose(tree.items()).expect("a root filesystem").manifest("lxc", &root, None).expect("JSON");
            Manifest::parse(text.as_bytes()).expect("a manifest");
            serde_json::from_str(&text).expect("JSON")
        };
        let manifest = written(split.clone());
        assert_eq!(manifest["rootfs"]["media_type"], "application/vnd.squashfs");
        assert_eq!(manifest["rootfs"]["url"], "https://images.example/images/x/squashfs");
        assert_eq!(manifest["x-simplestreams"]["fingerprint"], of_squashfs);
        assert!(manifest["rootfs"].get("prefix").is_none());
        let mut with_tarball = split.clone();
        with_tarball["root.tar.xz"] = item("root.tar.xz");
        assert_eq!(written(with_tarball)["x-simplestreams"]["fingerprint"], of_tarball);
        let mut old = split;
        old.as_object_mut().expect("an object").remove("incus.tar.xz");
        assert!(written(old)["x-simplestreams"].get("fingerprint").is_none());
        let unified = written(json!({"incus_combined.tar.gz": item("incus_combined.tar.gz")}));
        assert_eq!((unified["rootfs"]["prefix"].as_str(), unified["rootfs"]["media_type"].as_str()), (Some("/rootfs"), Some("application/gzip")));
        assert_eq!(unified["x-simplestreams"]["fingerprint"], Digest::of(b"abc").hex());
    }

    #[test]
    fn images_of_ubuntu_and_of_other_architectures() {
        let fields = json!({"aliases": "24.04,n,noble,default", "arch": "s390x", "os": "ubuntu", "release": "noble", "version": "24.04"});
        let tree = tree("com.ubuntu.cloud:server:24.04:s390x", fields, json!({"root.tar.gz": item("root.tar.gz")}));
        let called = choose(tree.items()).expect("a tarball").called().expect("names");
        assert_eq!(called.name, "ubuntu/24.04/s390x");
        assert_eq!(called.aliases, ["ubuntu/n/s390x", "ubuntu/noble/s390x", "ubuntu/default/s390x"]);
    }

    #[test]
    fn what_can_not_be_used_says_why() {
        let none = tree("p", json!({}), json!({"a": item("disk1.img"), "b": item("incus.tar.xz")}));
        assert!(choose(none.items()).expect_err("no tarball").contains("disk1.img"));
        let mut bare = item("root.tar.xz");
        bare.as_object_mut().expect("an object").remove("sha256");
        assert!(choose(tree("p", json!({}), json!({"a": bare})).items()).expect_err("no digest").contains("sha256"));
        let mut escaping = item("root.tar.xz");
        escaping["path"] = "../x".into();
        assert!(choose(tree("p", json!({}), json!({"a": escaping})).items()).expect_err("escapes").contains("path"));
    }
}
