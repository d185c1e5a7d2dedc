//! FAT volumes: the EFI system partition, and small volumes that a guest reads its configuration from (`cidata`, `config-2`).
//!
//! Made in user space by `hadris-fat`, built without std: the same files, label and volume id give the same bytes, because nothing asks a clock (all
//! times are 1980-01-01, the first that FAT can write) and directories are filled in the order of their names. The kernel's vfat is not needed.
//! FAT12, FAT16 or FAT32 follows from the size, as Microsoft's specification ties it to the number of clusters; a volume of 64 MiB and more is FAT32,
//! which the UEFI specification (13.3) wants for a system partition on a fixed disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    os::unix::fs::FileExt,
};

use embedded_io::{ErrorType, SeekFrom};
use hadris_fat::{
    FatDir, FatVolume, FatVolumeWriteExt,
    format::{FatFormatOptions, FatTypeSelection, FatVolumeFormatter},
};

use crate::{
    error::{Error, Kind, Result, Stage},
    fs::{Region, patch::BlockPatch},
    units::{Bytes, MIB, PATCH_BLOCK},
};

/// Least size of a volume, bytes.
pub const SIZE_MIN: u64 = MIB;
/// Most that a volume can have, bytes. Nothing here needs more; FAT32 with 512-byte sectors could have 2 TiB.
pub const SIZE_MAX: u64 = 2048 * MIB;
/// Volumes of this size and more are FAT32: 64 MiB are 128992 clusters of one sector, FAT32 needs 65525.
pub const FAT32_SIZE_MIN: u64 = 64 * MIB;
/// Characters of a label.
pub const LABEL_LEN_MAX: usize = 11;
/// Bytes of a sector of these volumes.
const SECTOR: usize = 512;
/// Characters of one name.
const NAME_LEN_MAX: usize = 128;
/// Directories below each other.
const DEPTH_MAX: usize = 16;

/// What is on a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FatVolumeSpec {
    /// Label, 1..=11 characters of `A-Z a-z 0-9 - _`; written in upper case, as all tools do, which readers of labels (cloud-init, udev) know.
    pub label: String,
    /// Volume id; blkid shows it as two times four hexadecimal digits with a hyphen, as `UUID`.
    pub id: u32,
    /// Files by path: names separated by `/`, no leading one; directories are made as needed.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Makes a volume of `size_bytes`, a multiple of 4096. The patch holds the blocks that are not zero, from the volume's first, and its size is the
/// volume's. `Kind::InvalidRequest` for a size, label or name that can't be, `Kind::NoSpace` (reason `FAT_FULL`) when the files do not fit.
pub fn build(size_bytes: u64, spec: &FatVolumeSpec) -> Result<BlockPatch> {
    check(size_bytes, spec)?;
    let mut store = Sparse { len: size_bytes, position: 0, blocks: BTreeMap::new() };
    let kind = if size_bytes >= FAT32_SIZE_MIN { FatTypeSelection::Fat32 } else { FatTypeSelection::Auto };
    let options = FatFormatOptions::new(size_bytes).volume_label(&spec.label).volume_id(spec.id).fat_type(kind);
    let volume = FatVolumeFormatter::format(&mut store, options).map_err(|error| failed(size_bytes, "format it", error))?;
    for (path, content) in &spec.files {
        write(&volume, path, content).map_err(|error| failed(size_bytes, &format!("write {path:?}"), error))?;
    }
    volume.sync().map_err(|error| failed(size_bytes, "finish it", error))?;
    drop(volume);
    let mut patch = BlockPatch::new(size_bytes);
    for (number, block) in store.blocks {
        if block.iter().any(|byte| *byte != 0) {
            patch.insert(number, block);
        }
    }
    Ok(patch)
}

/// The whole volume as bytes, zeros included; see [`build`].
pub fn build_bytes(size_bytes: u64, spec: &FatVolumeSpec) -> Result<Vec<u8>> {
    let patch = build(size_bytes, spec)?;
    let mut bytes = vec![0; usize::try_from(size_bytes).map_err(|_| refuse("size_bytes", "does not fit in memory".into()))?];
    for (number, block) in patch.iter() {
        let start = (number * PATCH_BLOCK) as usize;
        bytes[start..start + block.len()].copy_from_slice(block);
    }
    Ok(bytes)
}

/// Where a file with this content lies in a volume, bytes from its start; nothing when it is not in one piece, or when that is not the only place that looks so.
/// A file starts at a sector.
pub fn find(volume: &BlockPatch, content: &[u8]) -> Option<u64> {
    let starts = volume.iter().flat_map(|(number, block)| {
        let at = move |index: usize| number * PATCH_BLOCK + (index * SECTOR) as u64;
        let same = |sector: &[u8]| content.get(..sector.len()).unwrap_or(content) == &sector[..sector.len().min(content.len())];
        block.chunks(SECTOR).enumerate().filter(move |(_, sector)| same(sector)).map(move |(index, _)| at(index))
    });
    let mut whole = starts.filter(|start| is_at(volume, *start, content));
    let first = whole.next()?;
    whole.next().is_none().then_some(first)
}

fn is_at(volume: &BlockPatch, start: u64, content: &[u8]) -> bool {
    let pieces = content.chunks(SECTOR).enumerate();
    pieces.into_iter().all(|(index, piece)| {
        let at = start + (index * SECTOR) as u64;
        let within = (at % PATCH_BLOCK) as usize;
        volume.get(at / PATCH_BLOCK).is_some_and(|block| block[within..].starts_with(piece))
    })
}

/// Adds to `patch` what makes `content` stand at `offset` of the volume in `region`; what is beside it in the same blocks stays. Only reads.
pub fn overwrite(patch: &mut BlockPatch, region: &Region, offset: u64, content: &[u8]) -> Result<()> {
    let end = offset.checked_add(content.len() as u64).filter(|end| *end <= region.len);
    let end = end.ok_or_else(|| Error::internal(Stage::Edit, "fat", format!("{} bytes at {offset} are beyond its end", content.len())))?;
    for number in offset / PATCH_BLOCK..end.div_ceil(PATCH_BLOCK) {
        let start = number * PATCH_BLOCK;
        let mut block: Box<[u8]> = match patch.get(number) {
            Some(block) => block.into(),
            None => {
                let mut block = vec![0; PATCH_BLOCK as usize];
                let read = region.file.read_exact_at(&mut block, region.offset + start);
                read.map_err(|error| Error::io(Stage::Edit, "disk", "read the EFI system partition", error))?;
                block.into()
            }
        };
        let (from, to) = (offset.max(start), end.min(start + PATCH_BLOCK));
        let source = &content[(from - offset) as usize..(to - offset) as usize];
        block[(from - start) as usize..(to - start) as usize].copy_from_slice(source);
        patch.insert(number, block);
    }
    Ok(())
}

/// A size that holds files of these lengths (bytes), a multiple of 1 MiB, for volumes that are made to fit. The root directory of FAT12 and FAT16 has
/// 512 slots, of which a name takes one and a 13th of its length: beyond some 150 names the files belong into directories.
pub fn size_for(files: impl IntoIterator<Item = u64>) -> u64 {
    // A cluster of at most 4 KiB each for the file's end and for a directory of its own, an eighth for tables, and the fixed parts.
    let content: u64 = files.into_iter().map(|len| len.saturating_add(3 * PATCH_BLOCK)).fold(0, u64::saturating_add);
    crate::units::round_up(content.saturating_add(content / 8).saturating_add(64 << 10), MIB).max(SIZE_MIN)
}

fn check(size_bytes: u64, spec: &FatVolumeSpec) -> Result<()> {
    if !size_bytes.is_multiple_of(PATCH_BLOCK) || !(SIZE_MIN..=SIZE_MAX).contains(&size_bytes) {
        return Err(refuse("size_bytes", format!("{size_bytes} is not a multiple of {PATCH_BLOCK} from {} to {}", Bytes(SIZE_MIN), Bytes(SIZE_MAX))));
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if spec.label.is_empty() || spec.label.len() > LABEL_LEN_MAX || !spec.label.chars().all(fits) {
        return Err(refuse("label", format!("{:?} is not a label: 1 to {LABEL_LEN_MAX} characters of A-Z a-z 0-9 - _", spec.label)));
    }
    // Names that differ in case are one name here.
    let mut seen = BTreeSet::new();
    for path in spec.files.keys() {
        let names: Vec<&str> = path.split('/').collect();
        if names.len() > DEPTH_MAX {
            return Err(refuse("files", format!("{path:?} has {} levels, the limit is {DEPTH_MAX}", names.len())));
        }
        if let Some(name) = names.iter().find(|name| !is_name(name)) {
            return Err(refuse("files", format!("{path:?}: {name:?} can't be a name")));
        }
        if !seen.insert(path.to_ascii_lowercase()) {
            return Err(refuse("files", format!("{path:?} is there twice, but for upper and lower case")));
        }
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | ' ' | '~' | '@');
    !name.is_empty() && name.len() <= NAME_LEN_MAX && name.chars().all(fits) && !name.starts_with([' ', '.']) && !name.ends_with([' ', '.'])
}

type Volume<'s> = FatVolume<&'s mut Sparse>;

fn write(volume: &Volume<'_>, path: &str, content: &[u8]) -> hadris_fat::Result<()> {
    let mut dir = volume.root_dir();
    let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
    for parent in parents.split('/').filter(|parent| !parent.is_empty()) {
        dir = enter(volume, &dir, parent)?;
    }
    let entry = volume.create_file(&dir, name)?;
    let mut writer = volume.write_file(&entry)?;
    let mut rest = content;
    while !rest.is_empty() {
        let written = writer.write(rest)?;
        rest = &rest[written..];
    }
    writer.finish()
}

/// The directory of that name in `dir`, made when it is not there.
fn enter<'v, 's>(volume: &'v Volume<'s>, dir: &FatDir<'v, &'s mut Sparse>, name: &str) -> hadris_fat::Result<FatDir<'v, &'s mut Sparse>> {
    match dir.find(name)? {
        Some(_) => dir.open_dir(name),
        None => volume.create_dir(dir, name),
    }
}

fn refuse(field: &str, why: String) -> Error {
    Error::field(Stage::Golden, format!("fat.{field}"), why)
}

fn failed(size_bytes: u64, doing: &str, error: hadris_fat::Error) -> Error {
    let object = format!("FAT volume of {}", Bytes(size_bytes));
    match error {
        hadris_fat::Error::NoFreeSpace | hadris_fat::Error::DirectoryFull => {
            Error::new(Kind::NoSpace, Stage::Golden, object, format!("{doing}: there is no room")).with_reason("FAT_FULL")
        }
        other => Error::new(Kind::Internal, Stage::Golden, object, format!("{doing}: {other}")),
    }
}

/// A volume of which only the blocks that were written exist; the rest reads as zeros.
struct Sparse {
    len: u64,
    position: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
}

impl Sparse {
    /// The part of one block that a transfer of `wanted` bytes at the current position covers: block number, offset in it, length.
    fn piece(&self, wanted: usize) -> (u64, usize, usize) {
        let within = (self.position % PATCH_BLOCK) as usize;
        let left = usize::try_from(self.len.saturating_sub(self.position)).unwrap_or(usize::MAX);
        (self.position / PATCH_BLOCK, within, wanted.min(PATCH_BLOCK as usize - within).min(left))
    }
}

impl ErrorType for Sparse {
    type Error = Infallible;
}

impl embedded_io::Read for Sparse {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let (number, within, len) = self.piece(buffer.len());
        match self.blocks.get(&number) {
            Some(block) => buffer[..len].copy_from_slice(&block[within..within + len]),
            None => buffer[..len].fill(0),
        }
        self.position += len as u64;
        Ok(len)
    }
}

impl embedded_io::Write for Sparse {
    fn write(&mut self, buffer: &[u8]) -> Result<usize, Infallible> {
        let (number, within, len) = self.piece(buffer.len());
        if len > 0 {
            let block = self.blocks.entry(number).or_insert_with(|| vec![0; PATCH_BLOCK as usize].into());
            block[within..within + len].copy_from_slice(&buffer[..len]);
        }
        self.position += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl embedded_io::Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> Result<u64, Infallible> {
        self.position = match to {
            SeekFrom::Start(offset) => offset,
            SeekFrom::End(delta) => self.len.saturating_add_signed(delta),
            SeekFrom::Current(delta) => self.position.saturating_add_signed(delta),
        };
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(files: &[(&str, &[u8])]) -> FatVolumeSpec {
        let files = files.iter().map(|(path, content)| ((*path).to_owned(), content.to_vec())).collect();
        FatVolumeSpec { label: "cidata".into(), id: 0x1234_5678, files }
    }

    #[test]
    fn the_same_files_give_the_same_bytes_and_everything_that_differs_shows() {
        let files = spec(&[("user-data", b"#cloud-config\n"), ("meta-data", b"{}")]);
        let bytes = build_bytes(SIZE_MIN, &files).expect("built");
        assert_eq!(bytes, build_bytes(SIZE_MIN, &files).expect("built"));
        assert_eq!(&bytes[510..512], [0x55, 0xaa]);
        for other in [
            FatVolumeSpec { label: "config-2".into(), ..files.clone() },
            FatVolumeSpec { id: 1, ..files.clone() },
            spec(&[("user-data", b"#cloud-config\n"), ("meta-data", b"[]")]),
        ] {
            assert_ne!(bytes, build_bytes(SIZE_MIN, &other).expect("built"));
        }
    }

    #[test]
    fn large_volumes_are_fat32_and_mostly_holes() {
        let patch = build(64 * MIB, &spec(&[("EFI/BOOT/BOOTX64.EFI", &[7; 600_000])])).expect("built");
        assert!(patch.len() < 200, "{patch:?}");
        assert_eq!(&patch.get(0).expect("the boot sector")[82..90], b"FAT32   ");
    }

    #[test]
    fn names_labels_and_sizes_that_cannot_be_are_refused() {
        let reason = |result: Result<BlockPatch>| result.map(|_| ()).expect_err("refused").kind();
        for path in ["", "/a", "a/", "a//b", "..", "a/../b", "a:b", "a\nb", " a", "a.", "nul\0", "\u{e4}"] {
            assert_eq!(reason(build(SIZE_MIN, &spec(&[(path, b"")]))), Kind::InvalidRequest, "{path:?}");
        }
        assert_eq!(reason(build(SIZE_MIN, &spec(&[("A", b""), ("a", b"")]))), Kind::InvalidRequest);
        for label in ["", "twelve-chars", "a b", "a/b"] {
            assert_eq!(
                reason(build(SIZE_MIN, &FatVolumeSpec { label: label.into(), ..FatVolumeSpec::default() })),
                Kind::InvalidRequest,
                "{label:?}"
            );
        }
        for size in [0, SIZE_MIN - 4096, SIZE_MIN + 1, SIZE_MAX + 4096] {
            assert_eq!(reason(build(size, &spec(&[]))), Kind::InvalidRequest, "{size}");
        }
    }

    #[test]
    fn what_does_not_fit_is_no_space_and_what_was_measured_fits() {
        let big = vec![1; 3 << 20];
        let error = build(SIZE_MIN, &spec(&[("big", &big)])).expect_err("too small");
        assert_eq!((error.kind(), error.reason()), (Kind::NoSpace, "FAT_FULL"));
        for lens in [vec![0; 150], vec![1 << 20; 5], vec![100], vec![40 << 20, 30 << 20]] {
            let content: Vec<Vec<u8>> = lens.iter().map(|len| vec![1; *len]).collect();
            let files =
                content.iter().enumerate().map(|(index, bytes)| (format!("directory-{index}/a long name of a file"), bytes.clone())).collect();
            let size = size_for(lens.iter().map(|len| *len as u64));
            build(size, &FatVolumeSpec { label: "x".into(), id: 1, files }).unwrap_or_else(|error| panic!("{lens:?} in {size}: {error}"));
        }
    }
}
