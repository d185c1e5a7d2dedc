//! An image, as far as it decides where it runs.

use std::collections::BTreeSet;

use super::Mode;
use crate::{
    disk::Layout,
    fs::{FsKind, Profile},
    manifest::Manifest,
    streams::Products,
};

/// A way to start an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EntryPoint {
    /// It brings a kernel.
    Kernel,
    /// It brings an init and needs somebody else's kernel.
    Init,
    /// It can be entered by changing root.
    Chroot,
}

impl EntryPoint {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            EntryPoint::Kernel => "kernel",
            EntryPoint::Init => "init",
            EntryPoint::Chroot => "chroot",
        }
    }
}

/// An image, as far as it decides where it runs. What is empty is not known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Image {
    /// What it is called.
    pub name: String,
    /// Operating system of its kernel, e.g. `linux`.
    pub os: Option<String>,
    /// Architectures that there is a build for.
    pub archs: Vec<String>,
    /// How it can be started.
    pub entry_points: BTreeSet<EntryPoint>,
    /// Modes that its publisher made it for.
    pub virt: BTreeSet<Mode>,
    /// Filesystem of its root.
    pub filesystem: Option<FsKind>,
    /// Features of an ext4 root.
    pub profile: Option<Profile>,
    /// Layout that its manifest insists on.
    pub layout: Option<Layout>,
}

/// Types of a product's items that boot by themselves: they have a kernel inside.
const DISKS: [&str; 9] = ["disk.img", "disk1.img", "disk-kvm.img", "uefi1.img", "uefi.img", "disk.qcow2", "disk1.vmdk", "vmlinuz", "boot-kernel"];

impl Image {
    /// What a manifest says.
    pub fn of_manifest(name: &str, manifest: &Manifest) -> Image {
        let points = manifest.entry_points();
        let given = [
            (EntryPoint::Kernel, points.kernel.is_some() || manifest.boot().kernel.is_some()),
            (EntryPoint::Init, points.init.is_some()),
            (EntryPoint::Chroot, points.chroot.is_some()),
        ];
        let kernel = points.kernel.as_ref().or(points.init.as_ref());
        Image {
            name: name.to_owned(),
            os: kernel.and_then(|kernel| kernel.os.clone()),
            archs: manifest.arch().map(str::to_owned).into_iter().collect(),
            entry_points: given.into_iter().filter(|(_, there)| *there).map(|(entry, _)| entry).collect(),
            virt: BTreeSet::new(),
            filesystem: manifest.filesystem(),
            profile: manifest.profile(),
            layout: manifest.layout(),
        }
    }

    /// A product of a simplestreams tree, by the items of its newest version; nothing when the tree has no such product.
    pub fn of_product(tree: &Products, product: &str) -> Option<Image> {
        let version = tree.products.get(product)?.versions.keys().next_back()?;
        let mut image = Image { name: product.to_owned(), os: Some("linux".to_owned()), ..Image::default() };
        for item in tree.items_of(product, version) {
            let arch = item.text("arch").map(|arch| arch.into_owned()).unwrap_or_default();
            if !arch.is_empty() && !image.archs.contains(&arch) {
                image.archs.push(arch);
            }
            let ftype = item.text("ftype").unwrap_or_default();
            // Items without a file are ids of images that a cloud has: those boot there.
            if DISKS.contains(&&*ftype) || item.get("path").is_none() {
                image.entry_points.insert(EntryPoint::Kernel);
            } else if ftype.contains("root") || ftype == "squashfs" {
                image.entry_points.insert(EntryPoint::Init);
            }
            // `paravirtual` is EC2's word for pv.
            image.virt.extend(item.list("virt").iter().filter_map(|word| if word == "paravirtual" { Some(Mode::Pv) } else { Mode::parse(word) }));
        }
        Some(image)
    }
}
