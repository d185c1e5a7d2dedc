//! An image, as far as it decides where it runs.

use std::collections::{BTreeMap, BTreeSet};

use super::Mode;
use crate::{boot::inspect::Availability, disk::Layout, error::Result, fs::FsKind, manifest::Manifest, streams::Products};

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
    /// Layout that its manifest insists on.
    pub layout: Option<Layout>,
    /// Where the kernel's drivers are.
    pub drivers: BTreeMap<String, Availability>,
}

/// Types of a product's items that boot by themselves: they have a kernel inside.
const DISKS: [&str; 9] = ["disk.img", "disk1.img", "disk-kvm.img", "uefi1.img", "uefi.img", "disk.qcow2", "disk1.vmdk", "vmlinuz", "boot-kernel"];

impl Image {
    /// A catalogued image. `kernels`: whether the golden image made from it turned out to have a kernel, and its drivers.
    pub fn of_manifest(name: &str, manifest: &Manifest, kernels: &[BTreeMap<String, Availability>]) -> Image {
        let points = manifest.entry_points();
        let given = [
            (EntryPoint::Kernel, points.kernel.is_some() || !kernels.is_empty()),
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
            layout: manifest.layout(),
            drivers: kernels.first().cloned().unwrap_or_default(),
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

impl crate::render::Engine {
    /// The image that a reference, or a product of one of the sources' trees, means. `Kind::NotFound` when neither knows it.
    pub fn image_to_match(&self, reference: &str) -> Result<Image> {
        for stream in &self.config.streams {
            for kept in self.stream_tree(stream.name.as_str())? {
                if let Some(image) = Image::of_product(&kept.products, reference) {
                    return Ok(image);
                }
            }
        }
        let found = self.find_image(reference)?;
        let image = self.image(&found.image_id)?;
        Ok(Image::of_manifest(reference, &image.manifest, &[]))
    }
}
