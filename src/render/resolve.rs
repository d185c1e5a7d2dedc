//! Resolve: names and documents become the things they mean. Everything that can be refused without touching the host is refused here.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::{
    boot::{
        loaders::HostLoaders,
        platform::{Platform, preferences},
    },
    config::PlatformConfig,
    disk::{DiskPlan, ESP_SIZE, Layout},
    error::{Error, Kind, Result, Stage},
    fs::FsKind,
    manifest::{ImageId, Manifest},
    mapping::Role,
    names::{Digest, PoolName, VolumeName},
    render::{
        Engine, blocking,
        devices::{self, ResolvedDevice},
        golden, now_secs,
        vouch::VouchedManifest,
    },
    spec::{GoldenOptions, JobSpec, RenderSpec},
    store::records::{GoldenBoot, GoldenSpec, ImageRecord, VolumeRecord},
    target::{Place, Pool, VolumeFormat},
    tree::decompress::Compression,
    units::{Bytes, PATCH_BLOCK},
};

/// A catalogued image with its parsed manifest.
#[derive(Debug, Clone)]
pub struct Image {
    /// The row.
    pub record: ImageRecord,
    /// The manifest.
    pub manifest: Arc<Manifest>,
}

impl Image {
    /// How the tarball is declared to be compressed; `None` when nobody says and the bytes decide.
    pub fn compression(&self) -> Result<Option<Compression>> {
        self.record.media_type.as_deref().map(compression_of).transpose()
    }
}

/// A job whose names all mean something.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The image.
    pub image: Image,
    /// The golden it needs, but for the tarball's digest.
    pub golden: PartialGoldenSpec,
    /// The volume to make; none for a prerender.
    pub render: Option<ResolvedRender>,
    /// The platforms that it is for.
    pub platforms: Vec<PlatformConfig>,
    /// The request as it is compared under an idempotency key.
    pub canonical: Value,
}

/// The part of a job that makes a volume.
#[derive(Debug, Clone)]
pub struct ResolvedRender {
    /// What was asked for.
    pub spec: RenderSpec,
    /// The pool.
    pub pool: Pool,
    /// How the volume is stored.
    pub format: VolumeFormat,
    /// The manifest's args with defaults filled in.
    pub args: Map<String, Value>,
    /// The further devices.
    pub devices: Vec<ResolvedDevice>,
    /// The root of the same instance whose place the new one takes; found under the reservation of its name.
    pub replaces: Option<Box<VolumeRecord>>,
    /// What is attached to that root.
    pub attached: Vec<VolumeRecord>,
}

/// A golden spec that may still lack the digest of a tarball that was never fetched.
#[derive(Debug, Clone)]
pub struct PartialGoldenSpec {
    digest: Option<Digest>,
    template: GoldenSpec,
}

impl PartialGoldenSpec {
    /// The spec, when the digest is known.
    pub fn complete(&self) -> Option<GoldenSpec> {
        self.digest.map(|digest| self.with_digest(digest))
    }

    /// The spec for a tarball with this digest.
    pub fn with_digest(&self, digest: Digest) -> GoldenSpec {
        GoldenSpec { rootfs: digest, ..self.template.clone() }
    }

    /// The spec but for the tarball's digest, which may not be known.
    pub(crate) fn template(&self) -> &GoldenSpec {
        &self.template
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.template.size_bytes
    }
}

impl Engine {
    /// The image with this id.
    pub fn image(&self, id: &str) -> Result<Image> {
        let record = self.store.catalog.image(id)?.ok_or_else(|| {
            Error::new(Kind::NotFound, Stage::Resolve, id, "there is no such image")
                .with_reason("IMAGE_NOT_FOUND")
                .with_violation("spec.image_id", "is not catalogued")
        })?;
        let manifest = self.manifest_of(&record)?;
        Ok(Image { record, manifest })
    }

    /// Catalogues a manifest; gives the row and whether it is new.
    pub fn create_image(&self, manifest: VouchedManifest<'_>, rootfs_digest: &str, rootfs_url: &str) -> Result<(ImageRecord, bool)> {
        let manifest_json = manifest.as_str();
        let manifest = self.read_manifest(manifest_json).map_err(|error| error.under_field("manifest_json"))?;
        let given: Option<Digest> = match rootfs_digest {
            "" => None,
            text => Some(text.parse().map_err(|why: String| Error::field(Stage::Request, "rootfs_digest", why))?),
        };
        let rootfs = manifest.rootfs();
        let declared = rootfs.and_then(|rootfs| rootfs.digest);
        if let (Some(declared), Some(given)) = (declared, given)
            && declared != given
        {
            return Err(
                Error::field(Stage::Request, "rootfs_digest", format!("is {given}, the manifest says {declared}")).with_reason("DIGEST_MISMATCH")
            );
        }
        let digest = declared.or(given);
        let url = match (rootfs.and_then(|rootfs| rootfs.url.clone()), rootfs_url) {
            (Some(url), "") => Some(url),
            (Some(_), _) => return Err(Error::field(Stage::Request, "rootfs_url", "the manifest names a URL already")),
            (None, "") => None,
            (None, _) if given.is_some() => return Err(Error::field(Stage::Request, "rootfs_url", "is exclusive with rootfs_digest")),
            (None, url) => Some(url.to_owned()),
        };
        if let Some(url) = &url {
            self.fetcher.check_url(url).map_err(|error| error.with_violation("rootfs_url", "is not allowed"))?;
        } else {
            let digest = digest.ok_or_else(|| {
                Error::field(Stage::Request, "rootfs_url", "the manifest names no root filesystem: give rootfs_url or rootfs_digest")
                    .with_reason("NO_ROOTFS")
            })?;
            if !self.store.has_blob(&digest)? {
                return Err(Error::new(Kind::NotFound, Stage::Resolve, digest.to_string(), "no uploaded root filesystem has this digest")
                    .with_reason("ROOTFS_NOT_FOUND")
                    .with_violation("rootfs_digest", "was not uploaded")
                    .with_hint("upload it with ImageService.UploadRootfs first"));
            }
        }
        // Which bytes an image means is part of its id; a manifest that only names a URL means whatever is there at the first fetch.
        let identity = match (&digest, &url) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(url)) => url.clone(),
            (None, None) => String::new(),
        };
        let size = match (rootfs.and_then(|rootfs| rootfs.size), &digest) {
            (None, Some(digest)) => self.store.catalog.blob_size(*digest)?,
            (size, _) => size,
        };
        let record = ImageRecord {
            id: ImageId::derive(&manifest, &identity).to_string(),
            manifest: manifest_json.to_owned(),
            rootfs_url: url,
            rootfs_digest: digest,
            rootfs_size: size,
            media_type: rootfs.and_then(|rootfs| rootfs.media_type.clone()),
            created: now_secs(),
        };
        if let Some(media_type) = &record.media_type {
            compression_of(media_type).map_err(|error| error.under_field("manifest_json"))?;
        }
        let created = self.store.catalog.insert_image(record.clone(), &manifest.to_judged())?;
        let record = self.store.catalog.image(&record.id)?.ok_or_else(|| Error::internal(Stage::Store, record.id, "was added and is not there"))?;
        Ok((record, created))
    }

    /// The golden that an image means under these options.
    pub fn golden_spec(&self, image: &Image, options: &GoldenOptions) -> Result<PartialGoldenSpec> {
        let platforms = self.platforms(&options.platforms)?;
        let partial = self.golden_for(image, options, &platforms.iter().map(PlatformConfig::platform).collect::<Vec<Platform>>())?;
        self.check_beforehand(&image.manifest, &partial.template, &platforms)?;
        Ok(partial)
    }

    /// The golden that an image means under these options where `platforms` (in the place of those that the options name) decide what nobody else does.
    /// Whether it starts there is not asked.
    pub(crate) fn golden_for(&self, image: &Image, options: &GoldenOptions, platforms: &[Platform]) -> Result<PartialGoldenSpec> {
        let (manifest, defaults) = (&image.manifest, &self.config.golden);
        let wanted = preferences(platforms);
        let layout = options.layout.or(manifest.layout()).or(wanted.layout).unwrap_or(defaults.layout);
        let filesystem = options.filesystem.or(manifest.filesystem()).or(wanted.filesystem).unwrap_or(defaults.filesystem);
        let arch = manifest.arch().unwrap_or(std::env::consts::ARCH).to_owned();
        let loaders = match layout {
            Layout::Bare => Arc::default(),
            Layout::Gpt | Layout::Hybrid => HostLoaders::of_host(&arch, &self.store.tmp())?,
        };
        let profile = options.profile.or(manifest.profile()).or(wanted.profile).unwrap_or_else(|| golden::default_profile(layout, &loaders));
        let size = options.size_bytes.or(manifest.disk_size()).unwrap_or(defaults.size.0);
        let wrong = |why: String| Err(Error::field(Stage::Resolve, "spec.golden.size_bytes", why).with_reason("BAD_SIZE"));
        if !size.is_multiple_of(PATCH_BLOCK) {
            return wrong(format!("{size} is not a multiple of {PATCH_BLOCK}"));
        }
        if size > defaults.max_size.0 {
            return wrong(format!("{} is more than golden.max_size, {}", Bytes(size), defaults.max_size));
        }
        // What everybody has is not said: those goldens keep their key.
        let esp_bytes = manifest.esp_size().filter(|size| layout.is_partitioned() && *size != ESP_SIZE);
        let overhead = DiskPlan::overhead(layout, esp_bytes.unwrap_or(ESP_SIZE));
        let least = golden::filesystem(filesystem).size_min() + overhead;
        if size < least {
            return wrong(format!("{} is less than {} needs, {}", Bytes(size), filesystem.name(), Bytes(least)));
        }
        if filesystem != FsKind::Ext4 && layout == Layout::Bare && options.profile.is_some() {
            return Err(Error::field(Stage::Resolve, "spec.golden.profile", format!("is for ext4, the filesystem is {}", filesystem.name())));
        }
        let template = GoldenSpec {
            rootfs: Digest::of(b""),
            prefix: manifest.rootfs().and_then(|rootfs| rootfs.prefix.as_ref()).map(ToString::to_string),
            volatile: manifest.volatile().to_vec(),
            templates: manifest
                .templates()
                .iter()
                .chain(manifest.lxd_templates().iter().map(|template| &template.path))
                .map(ToString::to_string)
                .collect(),
            filesystem,
            profile,
            label: manifest.label().unwrap_or_default().to_owned(),
            bytes_per_inode: manifest.bytes_per_inode().unwrap_or(16384),
            layout,
            size_bytes: size,
            arch,
            boot: GoldenBoot {
                loaders: loaders.digests(),
                kernel: manifest.boot().kernel.as_ref().map(ToString::to_string),
                initrd: manifest.boot().initrd.as_ref().map(ToString::to_string),
                esp_bytes,
            },
        };
        Ok(PartialGoldenSpec { digest: image.record.rootfs_digest, template })
    }

    /// Resolves a job.
    pub async fn resolve(self: &Arc<Self>, job: JobSpec) -> Result<Resolved> {
        let engine = Arc::clone(self);
        blocking(Stage::Resolve, move || engine.resolve_now(job)).await
    }

    fn resolve_now(&self, job: JobSpec) -> Result<Resolved> {
        match job {
            JobSpec::Prerender { image_id, golden } => {
                let image = self.image(&image_id)?;
                let platforms = self.platforms(&golden.platforms)?;
                let golden = self.golden_spec(&image, &golden)?;
                Ok(Resolved { image, golden, render: None, platforms, canonical: Value::Null })
            }
            JobSpec::Render { spec, .. } => {
                let spec = *spec;
                let image = self.image(&spec.image_id)?;
                let platforms = self.platforms(&spec.golden.platforms)?;
                let golden = self.golden_spec(&image, &spec.golden)?;
                let pool = self.pool(&spec.pool)?.clone();
                let format = format_for(&pool, spec.format, "spec.format")?;
                spec.options.check(format).map_err(|error| error.under_field("spec"))?;
                self.check_size(&spec, &golden)?;
                let args = self.launcher.resolve_args(&image.manifest, &spec.instance.args).map_err(|error| error.under_field("spec.instance"))?;
                let devices = devices::resolve(self, &image.manifest, &spec)?;
                let canonical = spec.canonical.clone();
                let render = ResolvedRender { spec, pool, format, args, devices, replaces: None, attached: Vec::new() };
                Ok(Resolved { image, golden, render: Some(render), platforms, canonical })
            }
        }
    }

    /// Finds what is there already under the names of a render: the root that it may replace, and devices that it keeps or replaces. Anything else that has
    /// one of the names is `Kind::AlreadyExists`. The names are to be reserved before.
    pub(super) fn find_existing(&self, render: &mut ResolvedRender) -> Result<()> {
        let catalog = &self.store.catalog;
        let instance = &render.spec.instance.instance;
        let (pool, name) = (&render.spec.pool, &render.spec.volume);
        let taken = |pool: &PoolName, name: &VolumeName, field: &str, why: String| {
            Error::new(Kind::AlreadyExists, Stage::Resolve, format!("{pool}/{name}"), why)
                .with_reason("VOLUME_EXISTS")
                .with_violation(field, "is taken")
                .with_hint("delete it first, or choose another name")
        };
        if let Some(record) = catalog.volume(pool.as_str(), name.as_str())? {
            if !render.spec.replace {
                return Err(taken(pool, name, "spec.volume.name", "there is a volume of this name".into()));
            }
            if record.role != Role::Root || record.mapping.instance != *instance {
                let why = format!(
                    "it is the {} volume of instance {}, and only a root of {instance} is replaced",
                    record.role.name(),
                    record.mapping.instance
                );
                return Err(taken(pool, name, "spec.replace", why));
            }
            if record.volume.format != render.format {
                let why = format!("the volume is {}, and takes the place of one of the same format only", record.volume.format.name());
                return Err(Error::field(Stage::Resolve, "spec.format", why).with_reason("REPLACE_OTHER_FORMAT"));
            }
            render.attached = catalog.volumes_of_root(pool.as_str(), name.as_str())?;
            render.replaces = Some(Box::new(record));
        }
        let root = render.replaces.as_ref().map(|record| record.key());
        for device in &mut render.devices {
            let Some(record) = catalog.volume(device.pool.name.as_str(), device.volume.as_str())? else {
                if device.size_bytes.is_none() && device.format != VolumeFormat::Block {
                    return Err(Error::field(Stage::Resolve, format!("{}.size_bytes", device.field), "is required for a new device"));
                }
                continue;
            };
            let ours = record.role == device.role && record.mapping.instance == *instance && (record.root.is_none() || record.root == root);
            if !ours || (record.role != Role::Data && record.root.is_none()) {
                let why = format!("there is a volume of this name: {} of instance {}", record.role.name(), record.mapping.instance);
                return Err(taken(&device.pool.name, &device.volume, &format!("{}.volume.name", device.field), why));
            }
            if record.volume.format != device.format {
                let why = format!("the volume is there and is {}", record.volume.format.name());
                return Err(Error::field(Stage::Resolve, format!("{}.format", device.field), why).with_reason("REPLACE_OTHER_FORMAT"));
            }
            let has = record.volume.virtual_size_bytes;
            if record.role == Role::Data && device.size_bytes.is_some_and(|size| size > has) {
                let why = format!("the data volume is kept and has {}; a render does not grow it", Bytes(has));
                return Err(Error::field(Stage::Resolve, format!("{}.size_bytes", device.field), why).with_reason("BAD_SIZE"));
            }
            device.existing = Some(Box::new(record));
        }
        Ok(())
    }

    fn check_size(&self, spec: &RenderSpec, golden: &PartialGoldenSpec) -> Result<()> {
        let Some(size) = spec.size_bytes else { return Ok(()) };
        let wrong = |why: String| Err(Error::field(Stage::Resolve, "spec.size_bytes", why).with_reason("BAD_SIZE"));
        if size < golden.size_bytes() {
            return wrong(format!("{} is less than the golden image's {}", Bytes(size), Bytes(golden.size_bytes())));
        }
        if size > self.config.limits.volume_max_size.0 {
            return wrong(format!("{} is more than limits.volume_max_size, {}", Bytes(size), self.config.limits.volume_max_size));
        }
        Ok(())
    }
}

fn compression_of(media_type: &str) -> Result<Compression> {
    Compression::from_media_type(media_type).ok_or_else(|| {
        Error::field(Stage::Manifest, "rootfs.media_type", format!("{media_type:?} is not the media type of a tar archive or a squashfs image"))
            .with_reason("MEDIA_TYPE_UNKNOWN")
    })
}

/// The format of a volume in `pool`; `field` is where it stands in the request.
pub(super) fn format_for(pool: &Pool, wanted: Option<VolumeFormat>, field: &str) -> Result<VolumeFormat> {
    let format = wanted.unwrap_or(match pool.place {
        Place::Directory { .. } => VolumeFormat::Raw,
        Place::Devices { .. } => VolumeFormat::Block,
    });
    let fits = matches!(pool.place, Place::Devices { .. }) == (format == VolumeFormat::Block);
    if !fits {
        let kind = if format == VolumeFormat::Block { "a directory" } else { "devices" };
        return Err(Error::field(Stage::Resolve, field, format!("{} can't be made in pool {}, which has {kind}", format.name(), pool.name))
            .with_reason("FORMAT_NOT_IN_POOL"));
    }
    Ok(format)
}
