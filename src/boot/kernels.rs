//! Which kernels an image brings, from its facts: pure, no content is read.
//!
//! | who | kernel | initrd |
//! |---|---|---|
//! | Debian, Ubuntu | `/boot/vmlinuz-VERSION` | `/boot/initrd.img-VERSION` |
//! | Red Hat, Fedora | `/boot/vmlinuz-VERSION`, entries in `/boot/loader/entries` | `/boot/initramfs-VERSION.img` |
//! | SUSE | `/boot/vmlinuz-VERSION`, `/boot/Image-VERSION` | `/boot/initrd-VERSION` |
//! | Arch | `/boot/vmlinuz-linux…` | `/boot/initramfs-linux….img` |
//! | Alpine | `/boot/vmlinuz-FLAVOR` | `/boot/initramfs-FLAVOR` |
//! | kernel-install, ostree | `/usr/lib/modules/VERSION/vmlinuz` | `/usr/lib/modules/VERSION/{initrd,initramfs.img}` |
//!
//! Newest first. Rescue kernels, and fallback initrds, come last or not at all. Symlinks in `/boot` are names of files that are there anyway.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::{
    guest::facts::{GuestFacts, NodeKind},
    manifest::BootSpec,
};

/// Kernels that are listed in a menu.
pub const KERNELS_MAX: usize = 16;

/// A kernel of the image with what belongs to it. Absolute paths in the image's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Version, or what the file's name has in its place (`linux`, `virt`); empty for one that the manifest names.
    pub version: String,
    /// The kernel.
    pub kernel: String,
    /// Its initial RAM filesystem, if there is one.
    pub initrd: Option<String>,
    /// Bytes of the kernel.
    pub kernel_len: u64,
}

/// The kernels of an image, the one to start first. What the manifest names comes first, even before newer ones.
pub fn find(facts: &GuestFacts, spec: &BootSpec) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = facts.children("/boot").filter_map(|(name, node)| in_boot(facts, name, &node.kind)).collect();
    if kernels.is_empty() {
        kernels =
            facts.children("/usr/lib/modules").chain(facts.children("/lib/modules")).filter_map(|(version, _)| in_modules(facts, version)).collect();
    }
    kernels.sort_by(|a, b| is_rescue(&a.version).cmp(&is_rescue(&b.version)).then_with(|| compare(&b.version, &a.version)));
    kernels.dedup_by(|a, b| a.version == b.version);
    if let Some(named) = named(facts, spec, &kernels) {
        kernels.retain(|kernel| kernel.kernel != named.kernel);
        kernels.insert(0, named);
    }
    kernels.truncate(KERNELS_MAX);
    kernels
}

/// The kernel that the manifest names. One that the facts do not list may be there all the same: the manifest is believed.
fn named(facts: &GuestFacts, spec: &BootSpec, found: &[Kernel]) -> Option<Kernel> {
    let kernel = spec.kernel.as_ref()?.display().into_owned();
    let resolved = facts.resolve(&kernel);
    let (path, kernel_len) = match resolved {
        Some((path, node)) => (path, file_len(&node.kind).unwrap_or(0)),
        None => (kernel, 0),
    };
    let same = found.iter().find(|other| other.kernel == path);
    let initrd = match &spec.initrd {
        Some(initrd) => Some(facts.resolve(&initrd.display()).map_or_else(|| initrd.display().into_owned(), |(path, _)| path)),
        None => same.and_then(|same| same.initrd.clone()),
    };
    Some(Kernel { version: same.map(|same| same.version.clone()).unwrap_or_default(), kernel: path, initrd, kernel_len })
}

fn in_boot(facts: &GuestFacts, name: &str, kind: &NodeKind) -> Option<Kernel> {
    let version = ["vmlinuz-", "vmlinux-", "Image-", "kernel-", "bzImage-"].iter().find_map(|prefix| name.strip_prefix(prefix))?;
    // What packages of Debian and SUSE put beside a kernel.
    if version.is_empty() || [".hmac", ".old", ".sig", ".gz", ".xz", ".config"].iter().any(|suffix| version.ends_with(suffix)) {
        return None;
    }
    let kernel_len = file_len(kind)?;
    let initrds = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initrd-{version}.img"),
        format!("initramfs-{version}"),
    ];
    let initrd = initrds.into_iter().map(|name| format!("/boot/{name}")).find_map(|path| file_at(facts, &path));
    Some(Kernel { version: version.to_owned(), kernel: format!("/boot/{name}"), initrd, kernel_len })
}

fn in_modules(facts: &GuestFacts, version: &str) -> Option<Kernel> {
    let directory = ["/usr/lib/modules", "/lib/modules"].into_iter().map(|lib| format!("{lib}/{version}")).find(|path| facts.exists(path))?;
    let (kernel, node) = facts.resolve(&format!("{directory}/vmlinuz"))?;
    let kernel_len = file_len(&node.kind)?;
    let initrd = ["initrd", "initramfs.img"].iter().find_map(|name| file_at(facts, &format!("{directory}/{name}")));
    Some(Kernel { version: version.to_owned(), kernel, initrd, kernel_len })
}

/// The final path of a file that is there.
fn file_at(facts: &GuestFacts, path: &str) -> Option<String> {
    let (path, node) = facts.resolve(path)?;
    file_len(&node.kind).map(|_| path)
}

fn file_len(kind: &NodeKind) -> Option<u64> {
    match kind {
        NodeKind::File { size, .. } => Some(*size),
        _ => None,
    }
}

fn is_rescue(version: &str) -> bool {
    version.contains("rescue")
}

/// Orders versions as people do: digits as numbers, pre-releases (`-rc1`) before the release, the rest byte by byte.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        match (a.first(), b.first()) {
            (None, None) => return Ordering::Equal,
            // What is longer is newer, unless it goes on with a pre-release.
            (None, Some(_)) => return if pre_release(b) { Ordering::Greater } else { Ordering::Less },
            (Some(_), None) => return if pre_release(a) { Ordering::Less } else { Ordering::Greater },
            (Some(x), Some(y)) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let (number_a, rest_a) = number(a);
                let (number_b, rest_b) = number(b);
                let order = number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b));
                if order != Ordering::Equal {
                    return order;
                }
                (a, b) = (rest_a, rest_b);
            }
            (Some(x), Some(y)) => {
                let both = match (pre_release(a), pre_release(b)) {
                    (true, false) => return Ordering::Less,
                    (false, true) => return Ordering::Greater,
                    (both, _) => both,
                };
                // How a pre-release is set off does not matter.
                let set_off = both && [x, y].iter().all(|byte| matches!(byte, b'-' | b'~'));
                if x != y && !set_off {
                    // A digit ends a word: 6.1 is newer than 6.x.
                    return x.is_ascii_digit().cmp(&y.is_ascii_digit()).then_with(|| x.cmp(y));
                }
                (a, b) = (&a[1..], &b[1..]);
            }
        }
    }
}

fn pre_release(text: &[u8]) -> bool {
    let text = match text.first() {
        Some(b'~') => return true,
        Some(b'-' | b'.' | b'_') => &text[1..],
        _ => return false,
    };
    [&b"rc"[..], b"pre", b"alpha", b"beta"].iter().any(|word| text.starts_with(word))
}

/// The number that a text starts with, leading zeros removed, and what follows.
fn number(text: &[u8]) -> (&[u8], &[u8]) {
    let len = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let zeros = text[..len].iter().take_while(|byte| **byte == b'0').count();
    (&text[zeros.min(len)..len], &text[len..])
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{guest::facts::Node, names::GuestPath};

    /// Facts of a tree with these files (path, content) and links (path, target), parents included.
    pub(crate) fn facts(files: &[(&str, &str)], links: &[(&str, &str)]) -> GuestFacts {
        let mut facts = GuestFacts::default();
        let node = |kind| Node { kind, mode: 0o644, uid: 0, gid: 0 };
        for (path, kind) in files
            .iter()
            .map(|(path, content)| (path, NodeKind::File { size: content.len() as u64, content: Some(content.as_bytes().to_vec()) }))
            .chain(links.iter().map(|(path, target)| (path, NodeKind::Symlink { target: (*target).to_owned() })))
        {
            let mut parent = GuestPath::new(path).expect("path").parent();
            while let Some(directory) = parent {
                facts.nodes.entry(directory.display().into_owned()).or_insert_with(|| node(NodeKind::Directory));
                parent = directory.parent();
            }
            facts.nodes.insert((*path).to_owned(), node(kind));
        }
        facts
    }

    fn found(paths: &[&str]) -> Vec<(String, Option<String>)> {
        let files: Vec<(&str, &str)> = paths.iter().map(|path| (*path, "x")).collect();
        find(&facts(&files, &[]), &BootSpec::default()).into_iter().map(|kernel| (kernel.kernel, kernel.initrd)).collect()
    }

    #[track_caller]
    fn check(paths: &[&str], wanted: &[(&str, Option<&str>)]) {
        let wanted: Vec<_> = wanted.iter().map(|(kernel, initrd)| ((*kernel).to_owned(), initrd.map(str::to_owned))).collect();
        assert_eq!(found(paths), wanted);
    }

    #[test]
    fn every_distributions_names_are_known_and_the_newest_is_first() {
        check(
            &["/boot/vmlinuz-6.1.0-9-amd64", "/boot/initrd.img-6.1.0-9-amd64", "/boot/vmlinuz-6.1.0-40-amd64", "/boot/config-6.1.0-40-amd64"],
            &[("/boot/vmlinuz-6.1.0-40-amd64", None), ("/boot/vmlinuz-6.1.0-9-amd64", Some("/boot/initrd.img-6.1.0-9-amd64"))],
        );
        check(
            &["/boot/vmlinuz-0-rescue-abc", "/boot/vmlinuz-5.14.0-1.el9.x86_64", "/boot/initramfs-5.14.0-1.el9.x86_64.img", "/boot/.vmlinuz-x.hmac"],
            &[("/boot/vmlinuz-5.14.0-1.el9.x86_64", Some("/boot/initramfs-5.14.0-1.el9.x86_64.img")), ("/boot/vmlinuz-0-rescue-abc", None)],
        );
        check(&["/boot/vmlinuz-6.4.0-default", "/boot/initrd-6.4.0-default"], &[("/boot/vmlinuz-6.4.0-default", Some("/boot/initrd-6.4.0-default"))]);
        check(
            &["/boot/vmlinuz-linux", "/boot/initramfs-linux.img", "/boot/initramfs-linux-fallback.img"],
            &[("/boot/vmlinuz-linux", Some("/boot/initramfs-linux.img"))],
        );
        check(&["/boot/vmlinuz-virt", "/boot/initramfs-virt", "/boot/config-virt"], &[("/boot/vmlinuz-virt", Some("/boot/initramfs-virt"))]);
        check(
            &["/usr/lib/modules/6.9.1/vmlinuz", "/usr/lib/modules/6.9.1/initramfs.img", "/usr/lib/modules/6.10.1/vmlinuz"],
            &[("/usr/lib/modules/6.10.1/vmlinuz", None), ("/usr/lib/modules/6.9.1/vmlinuz", Some("/usr/lib/modules/6.9.1/initramfs.img"))],
        );
        check(&["/boot/grub/grub.cfg", "/etc/passwd"], &[]);
    }

    #[test]
    fn the_manifest_decides_before_all() {
        let facts =
            facts(&[("/boot/vmlinuz-6.1", "x"), ("/boot/initrd.img-6.1", "x"), ("/boot/vmlinuz-5.1", "x")], &[("/vmlinuz", "boot/vmlinuz-5.1")]);
        let named = |kernel: &str, initrd: Option<&str>| {
            let path = |text: &str| GuestPath::new(text).expect("path");
            let spec = BootSpec { kernel: Some(path(kernel)), initrd: initrd.map(path), cmdline: None };
            find(&facts, &spec).into_iter().map(|kernel| (kernel.kernel, kernel.initrd)).collect::<Vec<_>>()
        };
        let text = |text: &str| text.to_owned();
        assert_eq!(named("/vmlinuz", None)[0], (text("/boot/vmlinuz-5.1"), None));
        assert_eq!(named("/vmlinuz", None).len(), 2);
        assert_eq!(named("/boot/vmlinuz-6.1", None)[0], (text("/boot/vmlinuz-6.1"), Some(text("/boot/initrd.img-6.1"))));
        assert_eq!(named("/opt/kernel", Some("/opt/initrd"))[0], (text("/opt/kernel"), Some(text("/opt/initrd"))));
    }

    #[test]
    fn versions_are_ordered_as_numbers_with_pre_releases_first() {
        let ordered = ["4.19.0-9", "5.9", "5.10~rc1", "5.10-rc2", "5.10", "5.10-1", "5.10.1", "6.1.0-9-amd64", "6.1.0-40-amd64", "6.1.0-040-z"];
        for (index, a) in ordered.iter().enumerate() {
            for (other, b) in ordered.iter().enumerate() {
                assert_eq!(compare(a, b), index.cmp(&other), "{a} {b}");
            }
        }
    }
}
