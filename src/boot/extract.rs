//! A golden's first kernel and its initrd: what they can do, and as files of the host for what starts a kernel without a firmware (direct boot, PVH).
//!
//! ```text
//! goldens/KEY/start.json   what was found out, with the digests of the two; written last: without it nothing else counts
//! goldens/KEY/kernel       as the image has it
//! goldens/KEY/initrd       the same
//! ```
//!
//! Made when a platform first asks and not with the golden, which most platforms start by itself. The files never change: every instance of the golden is
//! started from the same two, and what tells instances apart is on the command line. A file gets its name when it is whole and flushed, so a crash leaves
//! nothing that is believed, and the next one who asks makes it again.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{
    boot::{
        inspect::{self, Inspection, KernelFiles},
        prepare::DiskBoot,
    },
    error::{Error, Kind, Result, Stage},
    fs::{Filesystem, Region},
    mapping::machine::DirectKernel,
    names::Digest,
    store::sync_dir,
};

/// Names in a golden's directory.
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const STUDY: &str = "start.json";
/// Changes whenever the same kernel would be answered differently; another one in the file means that it is made again.
const STUDY_VERSION: u32 = 2;

/// A file beside a golden's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractedFile {
    /// Digest of its content.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
}

/// The files beside a golden's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extracted {
    /// The file `kernel`.
    pub kernel: ExtractedFile,
    /// The file `initrd`, if the kernel has one.
    pub initrd: Option<ExtractedFile>,
}

/// Whether files are wanted beside the answer: they take as much room as they have bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// What the kernel can do.
    Facts,
    /// The files too.
    Files,
}

/// What is known about the first kernel of a golden.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Study {
    version: u32,
    /// What kernel and initrd can do; nothing when the image has no kernel or it could not be read.
    pub inspection: Option<Inspection>,
    /// The two as files; nothing when nobody asked for them, or when the image's can't be read.
    pub extracted: Option<Extracted>,
    /// Whether the files were asked for.
    complete: bool,
    /// Why something is not there.
    pub notes: Vec<String>,
}

impl Study {
    /// Whether it answers what `extent` is about.
    pub fn covers(&self, extent: Extent) -> bool {
        self.version == STUDY_VERSION && (self.complete || extent == Extent::Facts)
    }

    /// The files in `dir`, a golden's directory, as a machine takes them; nothing when there are none.
    pub fn direct_kernel(&self, dir: &Path, cmdline: &str) -> Option<DirectKernel> {
        let extracted = self.extracted.as_ref()?;
        Some(DirectKernel { kernel: dir.join(KERNEL), initrd: extracted.initrd.map(|_| dir.join(INITRD)), cmdline: cmdline.to_owned() })
    }
}

/// What was found out earlier about the golden in `dir`, if that is enough and its files are there.
pub fn find(dir: &Path, extent: Extent) -> Result<Option<Study>> {
    let path = dir.join(STUDY);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(Stage::Golden, path.display().to_string(), "read what is known about the kernel", error)),
    };
    // One of another version, or one that something has damaged, is made again.
    let Some(study) = serde_json::from_slice::<Study>(&bytes).ok().filter(|study| study.covers(extent)) else { return Ok(None) };
    let whole = |name: &str, file: &ExtractedFile| fs::metadata(dir.join(name)).is_ok_and(|metadata| metadata.len() == file.size_bytes);
    let there = study.extracted.is_none_or(|extracted| whole(KERNEL, &extracted.kernel) && extracted.initrd.is_none_or(|file| whole(INITRD, &file)));
    Ok(there.then_some(study))
}

/// Inspects the first kernel of the filesystem in `root` and, for [`Extent::Files`], puts it with its initrd into `dir`; durable when this returns. Nothing
/// to do for an image without a kernel. What the image has is never an error, what the host can't write is.
pub fn study(dir: &Path, root: &Region, filesystem: &dyn Filesystem, boot: &DiskBoot, extent: Extent) -> Result<Study> {
    let mut study = Study { version: STUDY_VERSION, complete: extent == Extent::Files, ..Study::default() };
    match boot.kernels.first() {
        None => {}
        Some(first) => {
            let (inspection, files) = inspect::of_tree(&*filesystem.tree(root)?, first);
            study.inspection = Some(inspection);
            match files {
                Some(files) if extent == Extent::Files => study.extracted = Some(extract(dir, &files)?),
                Some(_) => {}
                None => study.notes.push("kernel or initrd of the image can't be read".into()),
            }
        }
    }
    let text = serde_json::to_vec(&study)
        .map_err(|error| Error::internal(Stage::Golden, dir.display().to_string(), "encode what is known about the kernel").with_source(error))?;
    // The two files have their names in the directory before the one that vouches for them.
    sync_dir(dir)?;
    write_whole(dir, STUDY, &text, 0o400)?;
    sync_dir(dir)?;
    Ok(study)
}

fn extract(dir: &Path, files: &KernelFiles) -> Result<Extracted> {
    let put = |name: &str, bytes: &[u8]| -> Result<ExtractedFile> {
        // Read by QEMU, which runs as another user.
        write_whole(dir, name, bytes, 0o444)?;
        Ok(ExtractedFile { digest: Digest::of(bytes), size_bytes: bytes.len() as u64 })
    };
    Ok(Extracted { kernel: put(KERNEL, &files.kernel)?, initrd: files.initrd.as_deref().map(|bytes| put(INITRD, bytes)).transpose()? })
}

/// Writes a file that nobody changes any more, in place of what an interrupted attempt left.
fn write_whole(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> Result<()> {
    let unfinished = dir.join(format!("{name}.new"));
    let object = || dir.join(name).display().to_string();
    let failed = |error: std::io::Error| {
        let gone = error.kind() == std::io::ErrorKind::NotFound;
        let error = Error::io(Stage::Golden, object(), "write", error);
        // The directory is the golden's: somebody removed it meanwhile.
        if gone {
            Error::new(Kind::Conflict, Stage::Golden, object(), "the golden image is gone").with_reason("GOLDEN_NOT_FOUND").with_source(error)
        } else {
            error
        }
    };
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file = File::create_new(&unfinished).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    fs::rename(&unfinished, dir.join(name)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::Ext4;

    fn files() -> KernelFiles {
        KernelFiles { kernel: vec![1; 9000], initrd: Some(vec![2; 10]) }
    }

    fn vouched(dir: &Path) -> Study {
        let extracted = Some(extract(dir, &files()).expect("written"));
        let study = Study { version: STUDY_VERSION, complete: true, extracted, ..Study::default() };
        write_whole(dir, STUDY, &serde_json::to_vec(&study).expect("JSON"), 0o400).expect("written");
        study
    }

    #[test]
    fn files_lie_beside_the_disk_and_are_not_writable() {
        let dir = tempfile::tempdir().expect("directory");
        let study = vouched(dir.path());
        let extracted = study.extracted.expect("files");
        assert_eq!((extracted.kernel.digest, extracted.initrd.map(|file| file.digest)), (Digest::of(&[1; 9000]), Some(Digest::of(&[2; 10]))));
        let kernel = study.direct_kernel(dir.path(), "ro").expect("a kernel");
        assert_eq!((fs::read(&kernel.kernel).expect("read"), kernel.cmdline.as_str()), (files().kernel, "ro"));
        assert_eq!(fs::read(kernel.initrd.expect("an initrd")).ok(), files().initrd);
        assert_eq!(fs::metadata(&kernel.kernel).expect("there").permissions().mode() & 0o777, 0o444);
        assert_eq!(find(dir.path(), Extent::Files).expect("found"), Some(study));
        assert_eq!(Study::default().direct_kernel(dir.path(), ""), None);
    }

    #[test]
    fn what_a_crash_left_is_not_believed_and_made_again() {
        let dir = tempfile::tempdir().expect("directory");
        // Killed before the document was written, then in the middle of a file.
        extract(dir.path(), &files()).expect("written");
        fs::write(dir.path().join("kernel.new"), b"half").expect("write");
        assert_eq!(find(dir.path(), Extent::Files).expect("nothing"), None);
        let study = vouched(dir.path());
        assert_eq!(find(dir.path(), Extent::Files).expect("found"), Some(study));
        // A file that is not what the document says, or is gone.
        fs::remove_file(dir.path().join(INITRD)).expect("remove");
        fs::write(dir.path().join(INITRD), b"cut").expect("write");
        assert_eq!(find(dir.path(), Extent::Files).expect("nothing"), None);
        fs::remove_file(dir.path().join(INITRD)).expect("remove");
        assert_eq!(find(dir.path(), Extent::Files).expect("nothing"), None);
        fs::remove_file(dir.path().join(STUDY)).expect("remove");
        fs::write(dir.path().join(STUDY), b"{\"version\": 2").expect("write");
        assert_eq!(find(dir.path(), Extent::Facts).expect("nothing"), None);
    }

    #[test]
    fn facts_without_files_are_enough_for_those_who_want_no_files() {
        let dir = tempfile::tempdir().expect("directory");
        let region = Region { file: std::sync::Arc::new(tempfile::tempfile().expect("file")), offset: 0, len: 0 };
        let facts = study(dir.path(), &region, &Ext4, &DiskBoot::default(), Extent::Facts).expect("an image without a kernel");
        assert_eq!(find(dir.path(), Extent::Facts).expect("found"), Some(facts));
        assert_eq!(find(dir.path(), Extent::Files).expect("not enough"), None);
        study(dir.path(), &region, &Ext4, &DiskBoot::default(), Extent::Files).expect("again");
        assert!(find(dir.path(), Extent::Files).expect("found").is_some_and(|study| study.extracted.is_none()));
    }

    #[test]
    fn a_golden_that_is_removed_meanwhile_is_named() {
        let dir = tempfile::tempdir().expect("directory");
        let error = extract(&dir.path().join("gone"), &files()).expect_err("no directory");
        assert_eq!(error.reason(), "GOLDEN_NOT_FOUND");
    }
}
