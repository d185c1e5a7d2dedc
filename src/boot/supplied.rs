//! Kernels of the provider's, for images that have only an `init` and need somebody else's kernel (Xen PV, PVH, microVMs).
//!
//! The host's tools load them, so they are for platforms whose firmware is `direct`. They are read when a platform first asks, and again when a file has
//! changed; a digest that is configured has to be that of the file each time.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use serde::Deserialize;

use crate::{
    boot::inspect::{self, INITRD_LEN_MAX, Inspection, KERNEL_LEN_MAX},
    error::{Error, Kind, Result, Stage},
    manifest::KernelSpec,
    mapping::machine::DirectKernel,
    names::Digest,
    units::{Bytes, MIB},
};

/// Bytes of a kernel's configuration; Debian's has 260 KB.
const CONFIG_LEN_MAX: u64 = 2 * MIB;

/// Where a guest of this kernel has its modules from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modules {
    /// It needs none, or its initrd brings all it needs.
    None,
    /// From the image, which has to have `/lib/modules/VERSION` of exactly this kernel.
    Image,
}

/// What is configured about a kernel; the section `[[kernel]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What it is called.
    pub name: String,
    /// The kernel; absolute.
    pub kernel: PathBuf,
    /// Digest that the kernel has to have.
    pub digest: Option<Digest>,
    /// Its initrd; absolute.
    pub initrd: Option<PathBuf>,
    /// Digest that the initrd has to have.
    pub initrd_digest: Option<Digest>,
    /// The kernel's configuration, which says what drivers are built in; absolute.
    pub config: Option<PathBuf>,
    /// Where the guest's modules come from.
    pub modules: Modules,
    /// Arguments that this kernel always gets, before those of the manifest.
    pub cmdline: String,
    /// What it is; the version, when it is not given, is what the kernel says of itself.
    pub offers: KernelSpec,
}

/// A kernel of the provider's as it is on the host now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuppliedKernel {
    /// What it is called.
    pub name: String,
    /// What it is; compared with what a manifest asks for in `entry_points.init`.
    pub offers: KernelSpec,
    /// Where the guest's modules come from.
    pub modules: Modules,
    /// Arguments that it always gets.
    pub cmdline: String,
    /// Its files; why it can't be used when they are not what is configured.
    pub files: std::result::Result<SuppliedFiles, String>,
}

/// The files of a supplied kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuppliedFiles {
    /// The kernel's path.
    pub kernel: PathBuf,
    /// Its digest.
    pub kernel_digest: Digest,
    /// The initrd's path and digest.
    pub initrd: Option<(PathBuf, Digest)>,
    /// What the two can do.
    pub inspection: Inspection,
}

impl SuppliedFiles {
    /// As a machine takes them.
    pub fn direct_kernel(&self, cmdline: &str) -> DirectKernel {
        DirectKernel { kernel: self.kernel.clone(), initrd: self.initrd.as_ref().map(|(path, _)| path.clone()), cmdline: cmdline.to_owned() }
    }

    /// The kernel's release (`uname -r`), which names its directory of modules.
    pub fn release(&self) -> Option<&str> {
        self.inspection.kernel.as_ref()?.release.as_deref()?.split_ascii_whitespace().next()
    }
}

/// What changes when a file does: device, inode, size, time of its last change. Nothing for one that is not there.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// The kernels as they were when their files had these stamps.
type Read = (Vec<Stamp>, Arc<Vec<SuppliedKernel>>);

/// The configured kernels, read once. Every method may block.
#[derive(Debug, Default)]
pub struct SuppliedKernels {
    sources: Vec<Source>,
    read: Mutex<Option<Read>>,
}

impl SuppliedKernels {
    /// Nothing is read yet.
    pub fn new(sources: Vec<Source>) -> Self {
        SuppliedKernels { sources, read: Mutex::new(None) }
    }

    /// The kernels in the configuration's order. Reads and inspects them the first time and when a file has changed, about a second each.
    pub fn get(&self) -> Result<Arc<Vec<SuppliedKernel>>> {
        let stamps: Vec<Stamp> = self.sources.iter().flat_map(paths).map(stamp).collect();
        let mut read = self.read.lock().map_err(|_| Error::internal(Stage::Host, "kernel", "reading the supplied kernels panicked"))?;
        if let Some((since, kernels)) = &*read
            && *since == stamps
        {
            return Ok(Arc::clone(kernels));
        }
        let kernels = Arc::new(self.sources.iter().map(load).collect::<Vec<_>>());
        *read = Some((stamps, Arc::clone(&kernels)));
        Ok(kernels)
    }
}

fn paths(source: &Source) -> impl Iterator<Item = &Path> {
    [Some(&source.kernel), source.initrd.as_ref(), source.config.as_ref()].into_iter().flatten().map(PathBuf::as_path)
}

fn stamp(path: &Path) -> Stamp {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
}

fn load(source: &Source) -> SuppliedKernel {
    let files = files_of(source);
    let mut offers = source.offers.clone();
    if let (None, Ok(files)) = (&offers.version, &files) {
        offers.version = files.release().map(str::to_owned);
    }
    if let Err(error) = &files {
        tracing::error!(kernel = source.name, error = %error.chain(), "a configured kernel can't be used");
    }
    SuppliedKernel {
        name: source.name.clone(),
        offers,
        modules: source.modules,
        cmdline: source.cmdline.clone(),
        files: files.map_err(|error| error.chain()),
    }
}

fn files_of(source: &Source) -> Result<SuppliedFiles> {
    let kernel = read(&source.kernel, KERNEL_LEN_MAX)?;
    let kernel_digest = checked(&source.kernel, &kernel, source.digest)?;
    let initrd = source.initrd.as_deref().map(|path| read(path, INITRD_LEN_MAX)).transpose()?;
    let named = match (&source.initrd, &initrd) {
        (Some(path), Some(bytes)) => Some((path.clone(), checked(path, bytes, source.initrd_digest)?)),
        _ => None,
    };
    let config = source.config.as_deref().map(|path| read(path, CONFIG_LEN_MAX)).transpose()?;
    let config = config.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let inspection = inspect::inspect(&inspect::Files { kernel: &kernel, initrd: initrd.as_deref(), config: config.as_deref(), builtin: None });
    if inspection.kernel.is_none() {
        return Err(Error::new(Kind::Corrupt, Stage::Host, source.kernel.display().to_string(), inspection.notes.join("; "))
            .with_reason("KERNEL_FORMAT_UNKNOWN"));
    }
    Ok(SuppliedFiles { kernel: source.kernel.clone(), kernel_digest, initrd: named, inspection })
}

fn read(path: &Path, len_max: u64) -> Result<Vec<u8>> {
    let object = || path.display().to_string();
    let failed = |error| Error::io(Stage::Host, object(), "read a file of a configured kernel", error);
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() || metadata.len() > len_max {
        let why = format!("is not a file of at most {}", Bytes(len_max));
        return Err(Error::new(Kind::InvalidRequest, Stage::Host, object(), why));
    }
    fs::read(path).map_err(failed)
}

fn checked(path: &Path, bytes: &[u8], wanted: Option<Digest>) -> Result<Digest> {
    let digest = Digest::of(bytes);
    match wanted {
        Some(wanted) if wanted != digest => {
            let why = format!("has the digest {digest}, configured is {wanted}");
            Err(Error::new(Kind::Corrupt, Stage::Host, path.display().to_string(), why).with_reason("KERNEL_DIGEST"))
        }
        _ => Ok(digest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::inspect::kernel::tests::{bz_image, pvh_elf};

    fn source(dir: &Path) -> Source {
        Source {
            name: "provider".into(),
            kernel: dir.join("vmlinuz"),
            digest: None,
            initrd: None,
            initrd_digest: None,
            config: None,
            modules: Modules::None,
            cmdline: String::new(),
            offers: KernelSpec { os: Some("linux".into()), ..KernelSpec::default() },
        }
    }

    #[test]
    fn a_digest_that_differs_makes_a_kernel_unusable_until_the_file_is_right() {
        let dir = tempfile::tempdir().expect("directory");
        let bytes = bz_image(&pvh_elf());
        let kernels = SuppliedKernels::new(vec![Source { digest: Some(Digest::of(&bytes)), ..source(dir.path()) }]);
        let missing = kernels.get().expect("kernels")[0].files.clone().expect_err("no file");
        assert!(missing.contains("vmlinuz"), "{missing}");
        fs::write(dir.path().join("vmlinuz"), &bytes[1..]).expect("write");
        let differs = kernels.get().expect("kernels")[0].files.clone().expect_err("another file");
        assert!(differs.contains("configured is sha256:"), "{differs}");
        fs::write(dir.path().join("vmlinuz"), &bytes).expect("write");
        let good = kernels.get().expect("kernels");
        let files = good[0].files.as_ref().expect("the file");
        assert_eq!(files.kernel_digest, Digest::of(&bytes));
        assert_eq!(files.direct_kernel("ro").kernel, dir.path().join("vmlinuz"));
        // Nothing changed: the same answer, not read again.
        assert!(Arc::ptr_eq(&good, &kernels.get().expect("kernels")));
    }

    #[test]
    fn what_is_no_kernel_is_not_offered() {
        let dir = tempfile::tempdir().expect("directory");
        fs::write(dir.path().join("vmlinuz"), b"#!/bin/sh\n").expect("write");
        let kernels = SuppliedKernels::new(vec![source(dir.path())]);
        assert!(kernels.get().expect("kernels")[0].files.is_err());
    }
}
