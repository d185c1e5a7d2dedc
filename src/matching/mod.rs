//! What runs where: images on platforms, and guests inside them.
//!
//! ```text
//! image     manifest and golden, or a product's description    ─┬─ boot::check                  every reason why not
//! platform  hypervisor, mode, firmware, bus, nested, kernels    ─┤
//! container lxc, kvm, xen                                       ─┴─ hosts(image, platform, kind) every reason why not
//! ```
//!
//! Whether an image boots is asked where renders ask ([`crate::boot::check`]), with what a render would make of the image for this platform: the two can't give
//! different answers. Whether a machine can host Xen, KVM or LXC guests follows from the platform rather than from the image: LXC needs a Linux kernel of the image's own
//! or the provider's, and that is nearly anywhere; KVM needs hardware virtualisation that the machine shows its guest; Xen needs to be there first. What is
//! not known about an image is no reason against it.

mod image;
mod platform;
#[cfg(test)]
mod tests;

pub use image::{EntryPoint, Image};
pub use platform::{Cloud, Container, Hypervisor, Mode, Platform};

use std::sync::Arc;

use crate::{
    boot::{
        check::{self, Question, Refusals},
        extract::{Extent, Study},
        inspect::Inspection,
        platform::{self as boot, Firmware, preferences},
        supplied::{Modules, SuppliedFiles, SuppliedKernel},
    },
    error::{Error, Kind, Result, Stage},
    manifest::{ChrootSpec, EntryPoints, KernelSpec},
    names::Digest,
    render::{Engine, golden::LoadedGolden, resolve, start::Asked},
    spec::GoldenOptions,
    store::records::GoldenSpec,
};

/// Why something does not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Stable, UPPER_SNAKE; programs may branch on it.
    pub code: &'static str,
    /// For people.
    pub message: String,
}

impl Reason {
    fn new(code: &'static str, message: impl Into<String>) -> Reason {
        Reason { code, message: message.into() }
    }
}

/// Why the image does not boot on the platform; empty when it does, as far as its description says.
pub fn boots(image: &Image, platform: &Platform) -> Vec<Reason> {
    let (machine, supplied) = machine_of(image, platform);
    let wanted = preferences(std::slice::from_ref(&machine));
    let entry_points = EntryPoints {
        kernel: image.entry_points.contains(&EntryPoint::Kernel).then(KernelSpec::default),
        init: image.entry_points.contains(&EntryPoint::Init).then(KernelSpec::default),
        chroot: image.entry_points.contains(&EntryPoint::Chroot).then(ChrootSpec::default),
    };
    let fitting = image.archs.iter().find(|arch| boot::runs_on(boot::machine(arch), machine.machine(), machine.firmware));
    let answer = check::check(&Question {
        built: None,
        entry_points: &entry_points,
        names_kernel: false,
        arch: fitting.or(image.archs.first()).map_or(machine.arch.as_str(), String::as_str),
        layout: image.layout.or(wanted.layout).unwrap_or_default(),
        filesystem: image.filesystem.or(wanted.filesystem).unwrap_or_default(),
        profile: image.profile.or(wanted.profile).unwrap_or_default(),
        platform: &machine,
        xen_version: None,
        supplied: &supplied,
    });
    [refused(answer), not_made_for(image, platform)].concat()
}

/// The platform as booting sees it for this image, and the kernels that its provider has there. Who supplies a kernel starts it: what such an image's disk
/// has for a loader does not matter.
fn machine_of(image: &Image, platform: &Platform) -> (boot::Platform, Vec<SuppliedKernel>) {
    let mut machine = platform.machine_for(&image.archs);
    let needs_kernel = !image.entry_points.contains(&EntryPoint::Kernel) && image.entry_points.contains(&EntryPoint::Init);
    if !platform.supplies_kernel || !needs_kernel {
        return (machine, Vec::new());
    }
    machine.firmware = Firmware::Direct;
    (machine, vec![theirs()])
}

/// A provider's kernel of which nothing is known: it is the one that is needed.
fn theirs() -> SuppliedKernel {
    let files = SuppliedFiles { kernel: "/".into(), kernel_digest: Digest::of(b""), initrd: None, inspection: Inspection::default() };
    SuppliedKernel { name: "the provider's".into(), offers: KernelSpec::default(), modules: Modules::None, cmdline: String::new(), files: Ok(files) }
}

fn refused<T>(answer: std::result::Result<T, Refusals>) -> Vec<Reason> {
    let refusals = answer.err().map(|refusals| refusals.0).unwrap_or_default();
    refusals.into_iter().map(|refusal| Reason::new(refusal.reason, refusal.message)).collect()
}

/// What the image's publisher says about it; a catalogued one has no such word.
fn not_made_for(image: &Image, platform: &Platform) -> Vec<Reason> {
    if image.virt.is_empty() || image.virt.contains(&platform.mode) || platform.mode == Mode::Dom0 {
        return Vec::new();
    }
    let made_for: Vec<&str> = image.virt.iter().map(|mode| mode.name()).collect();
    let why = format!("its publisher made it for {}, the platform is {}", made_for.join(", "), platform.mode.name());
    vec![Reason::new("VIRTUALIZATION_MISMATCH", why)]
}

/// Why guests of a kind can't be created inside the image on the platform, where `boot` are the reasons why it does not boot there; those come first. Empty when
/// they can.
pub fn hosts(image: &Image, platform: &Platform, kind: Container, boot: &[Reason]) -> Vec<Reason> {
    let mut reasons = boot.to_vec();
    if kind == Container::Lxc && image.os.as_deref().is_some_and(|os| !os.eq_ignore_ascii_case("linux")) {
        reasons.push(Reason::new("NOT_LINUX", "Linux containers need a Linux kernel"));
    }
    reasons.extend(platform.why_not(kind));
    reasons
}

/// An answer for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The platform.
    pub platform: Platform,
    /// Why the image does not boot there; empty when it does.
    pub boot: Vec<Reason>,
    /// For each kind that was asked for: why it can't be created inside.
    pub containers: Vec<(Container, Vec<Reason>)>,
}

impl Answer {
    /// Whether the image boots, and every kind that was asked for can be created.
    pub fn is_match(&self) -> bool {
        self.boot.is_empty() && self.containers.iter().all(|(_, reasons)| reasons.is_empty())
    }
}

/// The answers for an image on each platform, in the platforms' order, as far as its description says.
pub fn answers(image: &Image, platforms: &[Platform], kinds: &[Container]) -> Vec<Answer> {
    platforms.iter().map(|platform| answer(image, platform, kinds, boots(image, platform))).collect()
}

fn answer(image: &Image, platform: &Platform, kinds: &[Container], boot: Vec<Reason>) -> Answer {
    let containers = kinds.iter().map(|kind| (*kind, hosts(image, platform, *kind, &boot))).collect();
    Answer { platform: platform.clone(), boot, containers }
}

/// What a reference of Match means.
#[derive(Debug)]
pub enum Subject {
    /// A catalogued image: what a render would be told is asked.
    Catalogued(Box<resolve::Image>),
    /// A product of a source's tree: only its description is known.
    Offered(Image),
}

impl Engine {
    /// The image that a reference, or a product of one of the sources' trees, means. `Kind::NotFound` when neither knows it. Blocking.
    pub fn image_to_match(&self, reference: &str) -> Result<Subject> {
        for stream in &self.config.streams {
            for kept in self.stream_tree(stream.name.as_str())? {
                if let Some(image) = Image::of_product(&kept.products, reference) {
                    return Ok(Subject::Offered(image));
                }
            }
        }
        let found = self.find_image(reference)?;
        Ok(Subject::Catalogued(Box::new(self.image(&found.image_id)?)))
    }

    /// The answers for an image on each platform, in the platforms' order. Of a catalogued one they are what a render is told that names this platform alone and
    /// leaves the rest open; a golden image that is there is looked into. Blocking.
    pub fn answers(self: &Arc<Self>, subject: &Subject, platforms: &[Platform], kinds: &[Container]) -> Result<Vec<Answer>> {
        let catalogued = match subject {
            Subject::Offered(image) => return Ok(answers(image, platforms, kinds)),
            Subject::Catalogued(catalogued) => catalogued,
        };
        let image = Image::of_manifest(catalogued.manifest.name(), &catalogued.manifest);
        let of = |platform: &Platform| Ok(answer(&image, platform, kinds, self.starts(catalogued, &image, platform)?));
        platforms.iter().map(of).collect()
    }

    fn starts(self: &Arc<Self>, catalogued: &resolve::Image, image: &Image, platform: &Platform) -> Result<Vec<Reason>> {
        let (machine, theirs) = machine_of(image, platform);
        let partial = match self.golden_for(catalogued, &GoldenOptions::default(), std::slice::from_ref(&machine)) {
            Ok(partial) => partial,
            // Its disk can't be made for this platform; a render is told the same.
            Err(error) if matches!(error.kind(), Kind::InvalidRequest | Kind::Unsupported) => {
                return Ok(vec![Reason::new(error.reason(), error.message())]);
            }
            Err(error) => return Err(error),
        };
        let supplied = if platform.configured { self.supplied_for(&machine)? } else { Arc::new(theirs) };
        // In a render's order: what is refused before a golden is looked at is all that it is told.
        let asked = Asked { manifest: Some(&catalogued.manifest), spec: partial.template(), golden: None };
        let beforehand = refused(asked.check(&machine, &supplied));
        let Some(spec) = partial.complete().filter(|_| beforehand.is_empty()) else { return Ok(beforehand) };
        let Some((golden, study)) = self.known(&catalogued.record.id, &spec)? else { return Ok(Vec::new()) };
        let asked = Asked { spec: &spec, golden: Some((&golden, &study)), ..asked };
        Ok(refused(asked.check(&machine, &supplied)))
    }

    /// The golden that `spec` means with what its kernel can do, or another one of the image's that answers the same: from the same tarball, with the same
    /// filesystem and boot loaders.
    fn known(self: &Arc<Self>, image_id: &str, spec: &GoldenSpec) -> Result<Option<(Arc<LoadedGolden>, Arc<Study>)>> {
        let same = |other: &GoldenSpec| {
            let way = |spec: &GoldenSpec| (spec.rootfs, spec.prefix.clone(), spec.filesystem, spec.layout.is_partitioned(), spec.boot.clone());
            way(other) == way(spec) && other.volatile == spec.volatile
        };
        let mut keys = vec![spec.key()];
        let others = self.store.catalog.goldens(Some(image_id))?;
        keys.extend(others.into_iter().filter(|(record, _)| same(&record.spec)).map(|(record, _)| record.key));
        for key in keys {
            if let Some(golden) = self.load_golden(key)? {
                // Blocking threads belong to the runtime that this waits for.
                let study = tokio::runtime::Handle::current().block_on(self.study(&golden, Extent::Facts))?;
                return Ok(Some((golden, study)));
            }
        }
        Ok(None)
    }

    /// The host's own platforms, and those of `publish.platforms`. Blocking.
    pub fn instance_types(&self) -> Result<Vec<Platform>> {
        let mut platforms: Vec<Platform> = self.config.platforms.iter().map(Platform::of_config).collect();
        if let Some(path) = &self.config.publish.platforms {
            let object = path.display().to_string();
            let bytes = std::fs::read(path).map_err(|error| Error::io(Stage::Config, object.clone(), "read the platforms", error))?;
            let read = crate::streams::platforms::parse(&bytes)
                .map_err(|error| Error::new(error.kind(), Stage::Config, object, error.message().to_owned()).with_reason("BAD_PLATFORMS"))?;
            platforms.extend(read.into_iter().filter(|platform| !self.config.platforms.iter().any(|own| own.name.as_str() == platform.name)));
        }
        Ok(platforms)
    }
}
