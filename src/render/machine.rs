//! An instance as a whole machine of a configured platform.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    boot::{
        check::{BootPlan, KernelSource},
        edits,
        extract::{Extent, Study},
        kernels::Kernel,
        platform::{Firmware, Hypervisor, Platform},
        supplied::SuppliedKernel,
    },
    config::PlatformConfig,
    disk::{Layout, ROOT_NUMBER},
    error::{Error, Kind, Result, Stage},
    fs::Profile,
    guest::facts::GuestFacts,
    manifest::BootSpec,
    mapping::{
        Bus, Device, Mapping,
        machine::{
            DirectKernel, Machine, UefiFiles, libvirt,
            qemu::{self, Accelerator},
            xl,
        },
    },
    names::Digest,
    proto,
    render::{Engine, blocking, golden::LoadedGolden, resolve::Image, start::Asked},
    store::records::{GoldenBoot, GoldenSpec},
};

/// A kernel that the host's tools load for an instance.
struct Loaded {
    kernel: DirectKernel,
    kernel_digest: Digest,
    initrd_digest: Option<Digest>,
    /// What it is called, when it is the provider's.
    name: String,
}

/// Everything that is known about an instance when its machine is described.
struct Known {
    mapping: Mapping,
    image: Option<Image>,
    golden: Option<(Arc<LoadedGolden>, Arc<Study>)>,
}

impl Engine {
    /// The platform of this name. `NotFound` naming the ones there are.
    pub fn platform(&self, name: &str) -> Result<&PlatformConfig> {
        let platforms = &self.config.platforms;
        platforms.iter().find(|platform| platform.name.as_str() == name).ok_or_else(|| {
            let known: Vec<&str> = platforms.iter().map(|platform| platform.name.as_str()).collect();
            Error::new(Kind::NotFound, Stage::Resolve, name, "there is no such platform")
                .with_reason("PLATFORM_NOT_FOUND")
                .with_violation("platform", format!("{name:?} is not configured"))
                .with_hint(format!("configured platforms: {}", known.join(", ")))
        })
    }

    /// The forms that tools of the platform take. What its hypervisor does not have is empty. `Kind::Unsupported` with every reason when the instance's image
    /// does not start there.
    pub async fn machine_forms(self: &Arc<Self>, mapping: &Mapping, config: &PlatformConfig) -> Result<proto::MachineForms> {
        let platform = config.platform();
        let (engine, wanted) = (Arc::clone(self), mapping.clone());
        let (image, golden) = blocking(Stage::Report, move || Ok((engine.image_of(&wanted)?, engine.golden_of(&wanted)?))).await?;
        let golden = match golden {
            Some(golden) => {
                let extent = if platform.firmware == Firmware::Direct { Extent::Files } else { Extent::Facts };
                let study = self.study(&golden, extent).await?;
                Some((golden, study))
            }
            None => None,
        };
        let known = Known { mapping: mapping.clone(), image, golden };
        let (engine, config) = (Arc::clone(self), config.clone());
        blocking(Stage::Report, move || engine.forms(&known, &config, &platform)).await
    }

    fn forms(&self, known: &Known, config: &PlatformConfig, platform: &Platform) -> Result<proto::MachineForms> {
        let mapping = &known.mapping;
        let supplied = self.supplied_for(platform)?;
        let mut plan = known.plan(config, platform, &supplied)?;
        let loaded = match platform.firmware {
            Firmware::Direct => Some(self.kernel_of(known, platform, &plan, &supplied)?),
            Firmware::Bios | Firmware::Uefi | Firmware::Loader => None,
        };
        if loaded.as_ref().is_some_and(|loaded| loaded.name.is_empty()) && !mapping.platforms.iter().any(|name| name == config.name.as_str()) {
            plan.notes.push("kernel and initrd lie with the golden image, which may be removed: name the platform in the render to keep it".into());
        }
        let files = &self.config.uefi;
        let uefi = (platform.firmware == Firmware::Uefi).then(|| match platform.secure_boot {
            true => UefiFiles { code: files.secure_code.clone(), variables: files.secure_variables.clone() },
            false => UefiFiles { code: files.code.clone(), variables: files.variables.clone() },
        });
        let machine = Machine {
            mapping,
            platform,
            cpus: config.cpus,
            memory_bytes: config.memory.0,
            nested: config.nested_virtualization,
            bridge: &config.bridge,
            kernel: loaded.as_ref().map(|loaded| loaded.kernel.clone()),
            uefi,
        };
        let mut forms = proto::MachineForms { notes: plan.notes, ..proto::MachineForms::default() };
        match platform.hypervisor {
            Hypervisor::Xen => {
                forms.xl_config = xl::domain(&machine)?;
                forms.libvirt_domain = libvirt::domain(&machine)?;
            }
            Hypervisor::Kvm => {
                forms.qemu_command = qemu::command(&machine, Accelerator::Kvm)?;
                if platform.bus != Bus::Nvme {
                    forms.libvirt_domain = libvirt::domain(&machine)?;
                }
            }
            Hypervisor::None => {}
        }
        forms.kernel = loaded.map(|loaded| proto::LoadedKernel {
            // The forms above have refused paths that are not text.
            kernel: loaded.kernel.kernel.to_string_lossy().into_owned(),
            kernel_digest: loaded.kernel_digest.to_string(),
            initrd: loaded.kernel.initrd.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            initrd_digest: loaded.initrd_digest.map(|digest| digest.to_string()).unwrap_or_default(),
            cmdline: loaded.kernel.cmdline,
            supplied_name: loaded.name,
        });
        Ok(forms)
    }

    fn image_of(&self, mapping: &Mapping) -> Result<Option<Image>> {
        match self.image(&mapping.image_id) {
            Ok(image) => Ok(Some(image)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The golden that the instance was made from, if it is still there.
    fn golden_of(&self, mapping: &Mapping) -> Result<Option<Arc<LoadedGolden>>> {
        let key: Option<Digest> = mapping.devices.first().and_then(|root| format!("sha256:{}", root.golden_key.as_deref()?).parse().ok());
        key.map(|key| self.load_golden(key)).transpose().map(Option::flatten)
    }

    /// The kernel that the plan means, with the command line of this instance.
    fn kernel_of(&self, known: &Known, platform: &Platform, plan: &BootPlan, supplied: &[SuppliedKernel]) -> Result<Loaded> {
        let missing = || {
            let why = "the platform starts the image's kernel, which is in the golden image, and that is gone";
            Error::new(Kind::Conflict, Stage::Report, known.mapping.instance.as_str(), why)
                .with_reason("GOLDEN_NOT_FOUND")
                .with_hint("prerender the image with the options of the instance")
        };
        if let KernelSource::Supplied { name } = &plan.kernel {
            let chosen = supplied.iter().find(|kernel| kernel.name == *name);
            let (kernel, files) = chosen.and_then(|kernel| Some((kernel, kernel.files.as_ref().ok()?))).ok_or_else(missing)?;
            let initrd = files.initrd.as_ref().map(|(path, _)| path.to_string_lossy().into_owned());
            let described = Kernel { version: String::new(), kernel: String::new(), initrd, kernel_len: 0 };
            let cmdline = known.cmdline(platform, &described, &kernel.cmdline)?;
            return Ok(Loaded {
                kernel: files.direct_kernel(&cmdline),
                kernel_digest: files.kernel_digest,
                initrd_digest: files.initrd.as_ref().map(|(_, digest)| *digest),
                name: name.clone(),
            });
        }
        let (golden, study) = known.golden.as_ref().ok_or_else(missing)?;
        let first = golden.boot.kernels.first().ok_or_else(missing)?;
        let cmdline = known.cmdline(platform, first, "")?;
        let unreadable = || {
            let why = if study.notes.is_empty() { "the image's kernel could not be taken out".to_owned() } else { study.notes.join("; ") };
            Error::new(Kind::Unsupported, Stage::Report, first.kernel.escape_default().to_string(), why).with_reason("KERNEL_UNUSABLE")
        };
        let extracted = study.extracted.ok_or_else(unreadable)?;
        Ok(Loaded {
            kernel: study.direct_kernel(&self.store.golden_dir(&golden.record.key), &cmdline).ok_or_else(unreadable)?,
            kernel_digest: extracted.kernel.digest,
            initrd_digest: extracted.initrd.map(|file| file.digest),
            name: String::new(),
        })
    }
}

impl Known {
    fn root(&self) -> Option<&Device> {
        self.mapping.devices.first()
    }

    fn plan(&self, config: &PlatformConfig, platform: &Platform, supplied: &[SuppliedKernel]) -> Result<BootPlan> {
        let manifest = self.image.as_ref().map(|image| &*image.manifest);
        if let Some((golden, study)) = &self.golden {
            let asked = Asked { manifest, spec: &golden.record.spec, golden: Some((golden, study)) };
            return asked.answer(config, platform, supplied, "platform");
        }
        let spec = self.spec_of_mapping();
        let mut plan = Asked { manifest, spec: &spec, golden: None }.answer(config, platform, supplied, "platform")?;
        plan.notes.push("the golden image is gone: whether the instance starts there was checked as far as its mapping goes".into());
        Ok(plan)
    }

    fn layout(&self) -> Layout {
        if self.root().is_some_and(|root| root.partition_table.is_some()) { Layout::Gpt } else { Layout::Bare }
    }

    fn arch(&self) -> &str {
        match (&self.golden, &self.image) {
            (Some((golden, _)), _) => &golden.record.spec.arch,
            (None, Some(image)) => image.manifest.arch().unwrap_or(std::env::consts::ARCH),
            (None, None) => std::env::consts::ARCH,
        }
    }

    /// What the mapping says about a golden that is gone. The profile that every loader reads stands for one that is not known.
    fn spec_of_mapping(&self) -> GoldenSpec {
        let filesystem = self.root().and_then(|root| root.filesystem.as_ref());
        GoldenSpec {
            rootfs: Digest::of(b""),
            prefix: None,
            volatile: Vec::new(),
            templates: Vec::new(),
            filesystem: filesystem.map(|filesystem| filesystem.kind).unwrap_or(crate::fs::FsKind::Ext4),
            profile: Profile::Compat,
            label: String::new(),
            bytes_per_inode: 0,
            layout: self.layout(),
            size_bytes: 0,
            arch: self.arch().to_owned(),
            boot: GoldenBoot::default(),
        }
    }

    /// The command line of this instance on `platform`; `more` are arguments that the kernel always gets.
    fn cmdline(&self, platform: &Platform, kernel: &Kernel, more: &str) -> Result<String> {
        let object = || self.mapping.instance.to_string();
        let root = self.root().ok_or_else(|| Error::internal(Stage::Report, object(), "an instance without a root"))?;
        let parsed = |text: &str| {
            Uuid::parse_str(text).map_err(|error| Error::internal(Stage::Report, object(), "a UUID of the mapping is none").with_source(error))
        };
        let root_uuid = root.filesystem.as_ref().map(|filesystem| parsed(&filesystem.uuid)).transpose()?.unwrap_or_default();
        let partition = root.partitions.iter().find(|partition| partition.number == ROOT_NUMBER);
        let nothing = GuestFacts::default();
        let own = self.image.as_ref().map(|image| image.manifest.boot().clone()).unwrap_or_default();
        let words = [more, own.cmdline.as_deref().unwrap_or_default()].join(" ");
        let spec = BootSpec { cmdline: Some(words.trim().to_owned()), ..own };
        let inputs = edits::Inputs {
            facts: self.golden.as_ref().map_or(&nothing, |(golden, _)| &golden.facts),
            spec: &spec,
            layout: self.layout(),
            root_uuid,
            root_partition: partition.map(|partition| parsed(&partition.uuid)).transpose()?,
            arch: self.arch(),
            boot_entries: None,
            platforms: std::slice::from_ref(platform),
        };
        edits::cmdline(&inputs, kernel)
    }
}
