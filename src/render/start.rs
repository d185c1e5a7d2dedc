//! Start: whether instances of an image start on the platforms they are for, and with which kernel.
//!
//! Asked three times: before anything is built, as far as manifest and platform decide it; when the golden is there and before a volume is made; and when the
//! mapping of an instance is asked for on a platform. What a golden's kernel can do is found out the first time somebody asks, once per golden however many
//! ask at once, and kept beside its disk ([`extract`]).

use std::sync::Arc;

use crate::{
    boot::{
        check::{self, BootPlan, Built, Question, Refusals},
        extract::{self, Extent, Study},
        platform::{Firmware, Platform},
        supplied::SuppliedKernel,
    },
    config::PlatformConfig,
    error::{Error, Result, Stage},
    guest::facts::NodeKind,
    manifest::Manifest,
    render::{
        Engine, blocking,
        golden::{LoadedGolden, filesystem},
        resolve::Resolved,
        volume::root_region,
    },
    store::records::GoldenSpec,
};

/// What an image is, as far as it decides where it starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    /// The manifest; nothing when the image is no longer catalogued.
    pub(crate) manifest: Option<&'a Manifest>,
    /// How its disk is made.
    pub(crate) spec: &'a GoldenSpec,
    /// The golden with what is known of its kernel; nothing before it is built.
    pub(crate) golden: Option<(&'a LoadedGolden, &'a Study)>,
}

impl Asked<'_> {
    /// How it starts on `platform`; `Kind::Unsupported` with every reason when it does not. `field` is where the platform stands in the request.
    pub(super) fn answer(&self, config: &PlatformConfig, platform: &Platform, supplied: &[SuppliedKernel], field: &str) -> Result<BootPlan> {
        self.check(platform, supplied).map_err(|refusals| refusals.into_error(config.name.as_str(), field))
    }

    /// How it starts on `platform`, or every reason why it does not.
    pub(crate) fn check(&self, platform: &Platform, supplied: &[SuppliedKernel]) -> std::result::Result<BootPlan, Refusals> {
        let none = Default::default();
        let question = Question {
            built: self.golden.map(|(golden, study)| Built { boot: &golden.boot, facts: &golden.facts, inspection: study.inspection.as_ref() }),
            entry_points: self.manifest.map_or(&none, Manifest::entry_points),
            names_kernel: self.manifest.is_some_and(|manifest| manifest.boot().kernel.is_some()),
            arch: &self.spec.arch,
            layout: self.spec.layout,
            filesystem: self.spec.filesystem,
            profile: self.spec.profile,
            platform,
            xen_version: xen_version(),
            supplied,
        };
        check::check(&question)
    }
}

impl Engine {
    /// The platforms with these names, each once.
    pub(super) fn platforms(&self, names: &[String]) -> Result<Vec<PlatformConfig>> {
        let mut platforms: Vec<PlatformConfig> = Vec::new();
        for name in names {
            let platform = self.platform(name)?;
            if !platforms.iter().any(|other| other.name == platform.name) {
                platforms.push(platform.clone());
            }
        }
        Ok(platforms)
    }

    /// The kernels that `platform` could be given. May read files.
    pub(crate) fn supplied_for(&self, platform: &Platform) -> Result<Arc<Vec<SuppliedKernel>>> {
        if platform.firmware == Firmware::Direct { self.kernels.get() } else { Ok(Arc::default()) }
    }

    /// Refuses platforms on which no golden of `spec` can start, before one is built. May read files of supplied kernels.
    pub(super) fn check_beforehand(&self, manifest: &Manifest, spec: &GoldenSpec, platforms: &[PlatformConfig]) -> Result<()> {
        let asked = Asked { manifest: Some(manifest), spec, golden: None };
        for config in platforms {
            let platform = config.platform();
            asked.answer(config, &platform, &self.supplied_for(&platform)?, "spec.platforms")?;
        }
        Ok(())
    }

    /// Refuses platforms of the job on which the golden does not start.
    pub(super) async fn check_platforms(self: &Arc<Self>, resolved: &Resolved, golden: &Arc<LoadedGolden>) -> Result<()> {
        if resolved.platforms.is_empty() {
            return Ok(());
        }
        let platforms: Vec<(PlatformConfig, Platform)> = resolved.platforms.iter().map(|config| (config.clone(), config.platform())).collect();
        let study = self.study(golden, extent_for(platforms.iter().map(|(_, platform)| platform))).await?;
        let (engine, golden, manifest) = (Arc::clone(self), Arc::clone(golden), Arc::clone(&resolved.image.manifest));
        blocking(Stage::Resolve, move || {
            let asked = Asked { manifest: Some(&manifest), spec: &golden.record.spec, golden: Some((&golden, &study)) };
            for (config, platform) in &platforms {
                let plan = asked.answer(config, platform, &engine.supplied_for(platform)?, "spec.platforms")?;
                tracing::debug!(platform = %config.name, kernel = ?plan.kernel, notes = ?plan.notes, "the image starts there");
            }
            Ok(())
        })
        .await
    }

    /// What the golden's first kernel can do and, for [`Extent::Files`], the two files beside its disk: from memory, from the store, or found out now.
    pub(crate) async fn study(self: &Arc<Self>, golden: &Arc<LoadedGolden>, extent: Extent) -> Result<Arc<Study>> {
        if let Some(study) = golden.study(extent) {
            return Ok(study);
        }
        // Whoever has the flight keeps the golden: it is not removed while somebody works on its key.
        let flight = self.builds.enter(&golden.record.key).await;
        let permit = self.build_permits.acquire().await;
        let _permit = permit.map_err(|error| Error::internal(Stage::Golden, "", "the build permits are closed").with_source(error))?;
        let (engine, golden) = (Arc::clone(self), Arc::clone(golden));
        blocking(Stage::Golden, move || {
            let _flight = flight;
            match golden.study(extent) {
                Some(study) => Ok(study),
                None => {
                    let study = Arc::new(engine.study_now(&golden, extent)?);
                    golden.keep_study(&study);
                    Ok(study)
                }
            }
        })
        .await
    }

    fn study_now(&self, golden: &LoadedGolden, extent: Extent) -> Result<Study> {
        let key = golden.record.key;
        let dir = self.store.golden_dir(&key);
        if let Some(study) = extract::find(&dir, extent)? {
            return Ok(study);
        }
        self.admission.check_memory()?;
        let need = if extent == Extent::Files { kernel_size(golden) } else { 0 };
        let _promised = self.admission.promise_store(&self.store.tmp(), need, "the kernel of the golden image")?;
        let begun = std::time::Instant::now();
        let study = extract::study(&dir, &root_region(golden)?, &*filesystem(golden.record.spec.filesystem), &golden.boot, extent)?;
        let (files, ms) = (study.extracted.is_some(), begun.elapsed().as_millis() as u64);
        tracing::info!(golden = %key.hex(), files, ms, "the golden's kernel was inspected");
        Ok(study)
    }
}

/// What has to be known for all of `platforms`.
fn extent_for<'a>(mut platforms: impl Iterator<Item = &'a Platform>) -> Extent {
    if platforms.any(|platform| platform.firmware == Firmware::Direct) { Extent::Files } else { Extent::Facts }
}

/// Bytes of the first kernel with its initrd.
fn kernel_size(golden: &LoadedGolden) -> u64 {
    let Some(first) = golden.boot.kernels.first() else { return 0 };
    let initrd = first.initrd.as_deref().and_then(|path| golden.facts.resolve(path)).map_or(0, |(_, node)| match node.kind {
        NodeKind::File { size, .. } => size,
        _ => 0,
    });
    first.kernel_len.saturating_add(initrd)
}

/// Version of the Xen that this daemon runs on (`/sys/hypervisor/version`); nothing elsewhere, and then it is not known.
fn xen_version() -> Option<(u16, u16)> {
    let read = |name: &str| std::fs::read_to_string(format!("/sys/hypervisor/{name}")).ok();
    let number = |name: &str| read(&format!("version/{name}"))?.trim().parse().ok();
    (read("type")?.trim() == "xen").then_some(())?;
    Some((number("major")?, number("minor")?))
}
