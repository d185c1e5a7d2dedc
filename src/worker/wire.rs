//! What the daemon and a worker say to each other; frames as the mount worker's (`fs::mounted::wire`). Both ends are the same program: no versions.
//!
//! The daemon trusts nothing of an answer but its shape: documents have the types and caps of their own, a stage or kind or reason that is not known
//! becomes the plainest one.

use serde::{Deserialize, Serialize};

use super::{
    archive::TreeJob,
    guest::{EditJob, StudyJob},
    small::{Answer, SmallJob},
};
use crate::{
    boot::loaders::{BiosLoader, EfiLoader, HostLoaders},
    error::{Error, Kind, Result, Stage},
    fs::mounted::wire::WireEntry,
    guest::facts::GuestFacts,
    render::fill::{Filled, Inputs},
    store::records::GoldenSpec,
    tree::decompress::Compression,
    trust::age::FileKey,
};

/// Bytes of all boot loaders together.
pub(super) const LOADERS_BYTES_MAX: usize = 64 << 20;
/// Violations of one error that are kept: as many as a manifest may have.
const VIOLATIONS_MAX: usize = 64;
/// Bytes of one text of an error that are kept.
const TEXT_BYTES_MAX: usize = 4096;

/// From the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Fill the disk; the loaders are the frame's data.
    Fill(Box<Job>),
    /// Answer one question; what it is about is the frame's data, or the file that was passed.
    Small(Box<SmallJob>),
    /// Become a fork server, whose children answer small jobs with so much memory each.
    Readers { memory_bytes: u64 },
    /// Read an archive for somebody else to write; the key of an encrypted one is the frame's data.
    Tree(Box<TreeJob>),
    /// Read a guest's filesystem.
    Study(Box<StudyJob>),
    /// Change it; contents are the frame's data.
    Edit(Box<EditJob>),
    /// The bytes that were asked for are the frame's data.
    Bytes,
    /// They can't be read; the errno.
    Unreadable { errno: i32 },
    /// The bytes asked for may be written.
    Go,
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// It reads foreign bytes from now on.
    Confined { missing: Vec<String> },
    /// It wants to write this much more.
    Take { bytes: u64 },
    /// Done.
    Done(Box<Filled>),
    /// The answer to a small job; bytes are in the frame's data.
    Answer(Box<Answer>),
    /// A member of the archive; frames with its data follow.
    Entry(Box<WireEntry>),
    /// That was all of the archive.
    Walked(Box<GuestFacts>),
    /// It wants to read so much of the guest's disk.
    Read { offset: u64, len: u32 },
    /// What the guest's tree contains.
    Studied(Box<GuestFacts>),
    /// Blocks of the root filesystem that change; their contents are the frame's data.
    Patched { blocks: Vec<u64> },
    /// The process that was asked has ended without an answer; the fork server says so.
    Ended { signal: Option<i32>, code: Option<i32> },
    /// Not done.
    Failed(WireError),
}

/// A golden's build.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub spec: GoldenSpec,
    pub declared: Option<Compression>,
    pub blob_name: String,
    pub disk_name: String,
    pub memory_bytes: u64,
    pub is_paced: bool,
    /// Whether the frame's data begins with the key of an encrypted tarball.
    pub is_encrypted: bool,
    /// Lengths of the frame's further parts: boot image, core image, UEFI program.
    pub loaders: [usize; 3],
    pub reads_checksum_seed: bool,
    pub misdeed: Option<String>,
}

impl Job {
    pub fn new(inputs: &Inputs<'_>, memory_bytes: u64, is_paced: bool, misdeed: Option<String>) -> Job {
        // Of ext4, which alone is made here, nothing else is asked.
        let HostLoaders { bios, efi, reads_checksum_seed, reads: _ } = inputs.loaders;
        let (boot, core) = bios.as_ref().map_or((0, 0), |bios| (bios.boot_image.len(), bios.core_image.len()));
        Job {
            spec: inputs.spec.clone(),
            declared: inputs.declared,
            blob_name: inputs.blob_name.to_owned(),
            disk_name: inputs.disk_name.to_owned(),
            memory_bytes,
            is_paced,
            is_encrypted: inputs.file_key.is_some(),
            loaders: [boot, core, efi.as_ref().map_or(0, |efi| efi.image.len())],
            reads_checksum_seed: *reads_checksum_seed,
            misdeed,
        }
    }

    /// The key and the loaders out of the frame's data.
    pub fn parts(&self, data: &[u8]) -> Result<(Option<FileKey>, HostLoaders)> {
        let wrong = || Error::internal(Stage::Host, super::SUBCOMMAND, "the loaders are not as long as the job says");
        let (key, data) = match (self.is_encrypted, data.split_first_chunk()) {
            (false, _) => (None, data),
            (true, Some((key, rest))) => (Some(FileKey::new(*key)), rest),
            (true, None) => return Err(wrong()),
        };
        let [boot, core, efi] = self.loaders;
        let (boot_image, rest) = data.split_at_checked(boot).ok_or_else(wrong)?;
        let (core_image, rest) = rest.split_at_checked(core).ok_or_else(wrong)?;
        if rest.len() != efi {
            return Err(wrong());
        }
        let bios = (core > 0).then(|| BiosLoader { boot_image: boot_image.to_vec(), core_image: core_image.to_vec() });
        // The only machine whose loaders the host makes.
        let efi = (efi > 0).then(|| EfiLoader { machine: "X64", image: rest.to_vec() });
        Ok((key, HostLoaders { bios, efi, reads_checksum_seed: self.reads_checksum_seed, ..HostLoaders::default() }))
    }
}

/// The frame's data.
pub(super) fn data_out(inputs: &Inputs<'_>) -> Vec<u8> {
    let loaders = inputs.loaders;
    let key = inputs.file_key.iter().map(|key| &key.expose()[..]);
    let bios = loaders.bios.iter().flat_map(|bios| [&bios.boot_image[..], &bios.core_image[..]]);
    key.chain(bios).chain(loaders.efi.iter().map(|efi| &efi.image[..])).flatten().copied().collect()
}

/// An error on its way to the daemon. Sources become text: their errnos were classified where they happened.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WireError {
    kind: String,
    stage: String,
    object: String,
    message: String,
    sources: String,
    reason: String,
    hint: Option<String>,
    violations: Vec<(String, String)>,
}

/// What was the source of an error in another process.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Told(String);

const STAGES: [Stage; 8] = [Stage::Request, Stage::Manifest, Stage::Resolve, Stage::Fetch, Stage::Golden, Stage::Inject, Stage::Edit, Stage::Host];

/// Reasons that come out of a build, beside those that follow from the kind. A test compares it with the sources.
const REASONS: &[&str] = &[
    "AGE_CORRUPT",
    "AGE_KEY_UNKNOWN",
    "AGE_UNSUPPORTED",
    "ARCHIVE_AMBIGUOUS",
    "ARCHIVE_CORRUPT",
    "ARCHIVE_LIMIT",
    "ARCHIVE_TRUNCATED",
    "ARCHIVE_UNSUPPORTED",
    "BOOT_ENTRY_LOST",
    "BOOT_LOADER_TOO_LARGE",
    "BOOT_LOADER_UNKNOWN",
    "DECOMPRESS_CORRUPT",
    "DECOMPRESS_LIMIT",
    "DECOMPRESS_TRUNCATED",
    "ENCRYPTED_SQUASHFS",
    "EXT4_DIR_FULL",
    "EXT4_FEATURE_UNSUPPORTED",
    "EXT4_GROW_LIMIT",
    "EXT4_NOT_CLEAN",
    "EXT4_NO_BLOCKS",
    "EXT4_NO_INODES",
    "EXT4_XATTR_NO_ROOM",
    "FAT_FULL",
    "FORMAT_MISMATCH",
    "FORMAT_UNKNOWN",
    "GUEST_FILE_UNREADABLE",
    "GUEST_LINK_REFUSED",
    "GUEST_TREE_TOO_LARGE",
    "HARD_LINK_LEFT_OUT",
    "INITRD_UNREADABLE",
    "INODES_EXHAUSTED",
    "JOURNAL_DIRTY",
    "KERNEL_FORMAT_UNKNOWN",
    "LXD_METADATA",
    "MANIFEST_INVALID",
    "MANIFEST_SYNTAX",
    "PARTITION_TABLE_CORRUPT",
    "REMOTE_SCHEMA_REFERENCE",
    "ROOTFS_FORMAT_UNKNOWN",
    "ROOTFS_PREFIX",
    "ROOTFS_TOO_LARGE",
    "ROOT_CHANGED",
    "SIGNATURE_EXPIRED",
    "SIGNATURE_INVALID",
    "SIGNATURE_KEY_EXPIRED",
    "SIGNATURE_KEY_REVOKED",
    "SIGNATURE_KEY_UNKNOWN",
    "SIGNATURE_MALFORMED",
    "SIGNATURE_WEAK",
    "SIGNED_GRUB_UNKNOWN",
    "STREAM_INVALID",
    "STREAM_TOO_LARGE",
    "TEMPLATE_FAILED",
    "TEMPLATE_JAVASCRIPT",
    "TEMPLATE_LIMIT",
    "TEMPLATE_NOT_A_FILE",
    "TEMPLATE_NOT_IN_IMAGE",
    "TEMPLATE_SYNTAX",
    "TEMPLATE_TOO_LARGE",
    "TEMPLATE_UNDEFINED",
    "TOO_MANY_LINKS",
    "VOLATILE_PATTERN_TOO_COSTLY",
    "XATTR_TOO_BIG",
];

fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        // This level is the chain's beginning.
        let sources = error.chain().strip_prefix(&error.to_string()).map(|rest| rest.trim_start_matches(": ").to_owned()).unwrap_or_default();
        WireError {
            kind: format!("{:?}", error.kind()),
            stage: error.stage().name().to_owned(),
            object: cut(error.object()),
            message: cut(error.message()),
            sources: cut(&sources),
            reason: error.reason().to_owned(),
            hint: error.hint().map(cut),
            violations: error.violations().iter().map(|violation| (cut(&violation.field), cut(&violation.description))).collect(),
        }
    }
}

impl WireError {
    pub fn into_error(self) -> Error {
        let stage = STAGES.into_iter().find(|stage| stage.name() == self.stage).unwrap_or(Stage::Golden);
        let mut error = Error::new(Kind::told(&self.kind), stage, cut(&self.object), cut(&self.message)).with_told_reason(REASONS, &self.reason);
        if !self.sources.is_empty() {
            error = error.with_source(Told(cut(&self.sources)));
        }
        if let Some(hint) = self.hint {
            error = error.with_hint(cut(&hint));
        }
        for (field, description) in self.violations.into_iter().take(VIOLATIONS_MAX) {
            error = error.with_violation(cut(&field), cut(&description));
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_on_the_other_side() {
        let error = Error::io(Stage::Golden, "a/b", "write", std::io::Error::from_raw_os_error(libc::ENOSPC))
            .with_reason("ROOTFS_TOO_LARGE")
            .with_hint("make room")
            .with_violation("x", "y");
        let text = serde_json::to_string(&WireError::from(&error)).expect("encodes");
        let told = serde_json::from_str::<WireError>(&text).expect("decodes").into_error();
        assert_eq!(told.chain(), error.chain());
        assert_eq!((told.kind(), told.stage(), told.reason(), told.hint()), (error.kind(), error.stage(), error.reason(), error.hint()));
        assert_eq!(told.violations(), error.violations());
    }

    #[test]
    fn what_a_worker_makes_up_becomes_a_plain_error() {
        let made_up = WireError {
            kind: "Nonsense".into(),
            stage: "elsewhere".into(),
            object: "x".repeat(100_000),
            message: "é".repeat(100_000),
            sources: String::new(),
            reason: "MADE_UP".into(),
            hint: None,
            violations: vec![(String::new(), String::new()); 1000],
        };
        let error = made_up.into_error();
        assert_eq!((error.kind(), error.stage(), error.reason()), (Kind::Internal, Stage::Golden, "INTERNAL"));
        assert!(error.object().len() <= TEXT_BYTES_MAX && error.message().len() <= TEXT_BYTES_MAX && error.violations().len() <= VIOLATIONS_MAX + 1);
    }

    #[test]
    fn every_reason_of_the_code_that_runs_in_a_worker_is_known() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = [
            "streams/document.rs",
            "streams/date.rs",
            "streams/path.rs",
            "render/fill.rs",
            "render/study.rs",
            "guest/from_image.rs",
            "guest/watch.rs",
        ]
        .map(|file| root.join(file))
        .to_vec();
        let mut folders = vec![
            root.join("manifest"),
            root.join("tree"),
            root.join("ext4/format"),
            root.join("ext4/read"),
            root.join("ext4/edit"),
            root.join("boot"),
            root.join("disk"),
        ];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).expect("a folder of the crate").flatten() {
                let path = entry.path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        for file in files {
            let text = std::fs::read_to_string(&file).expect("source");
            let named = text.split("with_reason(\"").skip(1).filter_map(|rest| rest.split('"').next());
            // Kept in variables before they are reasons.
            let kept = text.split('"').filter(|word| word.starts_with("ARCHIVE_") || word.starts_with("DECOMPRESS_"));
            for reason in named.chain(kept) {
                // Refusals of platforms are the daemon's, after the build.
                let is_daemons = ["boot/platform.rs", "boot/loaders.rs", "boot/supplied.rs", "boot/extract.rs"].iter().any(|of| file.ends_with(of))
                    || file.starts_with(root.join("boot/check"));
                assert!(is_daemons || REASONS.contains(&reason), "{reason} of {} is not in REASONS", file.display());
            }
        }
    }
}
