//! A new UUID or label for an unmounted XFS, version 5, by changing a few sectors.
//!
//! What `xfs_admin -U` does costs the whole log (64 MiB and more), which it overwrites so that no record has the old UUID. Here the superblocks of all
//! allocation groups get the new one and keep the old as the metadata's (`sb_meta_uuid`, incompatible feature META_UUID, Linux 4.3), and in the log
//! the UUID is replaced in each record's header, whose checksum is made again. Layouts: `fs/xfs/libxfs/xfs_format.h`, `xfs_log_format.h`; the
//! checksum of a record: `xlog_cksum` in `fs/xfs/xfs_log.c`.
//!
//! A sector of the log that starts with the header magic is a header: the first word of every sector of a record's body is its cycle number
//! (`xlog_pack_data`), for just this reason.

use std::io;

use super::overlay::Overlay;
use crate::error::{Error, Kind, Result, Stage};

const SB_MAGIC: &[u8; 4] = b"XFSB";
const SB_UUID: usize = 32;
const SB_LABEL: usize = 108;
const SB_LABEL_LEN: usize = 12;
const SB_INCOMPAT: usize = 216;
const SB_CRC: usize = 224;
const SB_META_UUID: usize = 248;
/// `XFS_SB_FEAT_INCOMPAT_META_UUID`.
const INCOMPAT_META_UUID: u32 = 1 << 2;

const LOG_MAGIC: [u8; 4] = 0xfeed_babe_u32.to_be_bytes();
const LOG_SECTOR: usize = 512;
/// `sizeof(struct xlog_rec_header)` on 64-bit machines, padding included.
const REC_HEADER: usize = 328;
const REC_CRC: usize = 32;
const REC_UUID: usize = 304;
/// `sizeof(struct xlog_rec_ext_header)`.
const EXT_HEADER: usize = 260;
/// `XLOG_HEADER_CYCLE_SIZE`: bytes of body per header sector.
const BODY_PER_HEADER: u64 = 32768;
/// Largest body, `XLOG_MAX_RECORD_BSIZE`.
const BODY_MAX: u64 = 256 << 10;
/// Bytes of log read at a time.
const CHUNK: usize = 1 << 20;

struct Geometry {
    sector: usize,
    ag_count: u64,
    ag_bytes: u64,
    log_offset: u64,
    log_len: u64,
    uuid: [u8; 16],
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, Stage::Edit, "xfs", what)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

/// CRC-32C of `bytes` with the four at `at` taken as zeros.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..at]);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[0; 4]), &bytes[at + 4..])
}

/// Changes the identity of the filesystem on `disk`, whose log must be clean (it was unmounted).
pub(super) fn set_identity(disk: &Overlay, uuid: Option<&[u8; 16]>, label: Option<&str>) -> Result<()> {
    let failed = |error: io::Error| Error::io(Stage::Edit, "xfs", "change the identity", error);
    let geometry = read_geometry(disk)?;
    for group in 0..geometry.ag_count {
        let offset = group * geometry.ag_bytes;
        let mut sector = vec![0; geometry.sector];
        disk.read_at(&mut sector, offset).map_err(failed)?;
        if &sector[..4] != SB_MAGIC || stored_crc(&sector, SB_CRC) != checksum(&sector, SB_CRC) {
            return Err(corrupt(format!("the superblock of allocation group {group} is damaged")));
        }
        if let Some(label) = label {
            sector[SB_LABEL..SB_LABEL + SB_LABEL_LEN].fill(0);
            sector[SB_LABEL..SB_LABEL + label.len()].copy_from_slice(label.as_bytes());
        }
        if let Some(uuid) = uuid {
            let incompat = u32_at(&sector, SB_INCOMPAT);
            if incompat & INCOMPAT_META_UUID == 0 {
                sector.copy_within(SB_UUID..SB_UUID + 16, SB_META_UUID);
                sector[SB_INCOMPAT..SB_INCOMPAT + 4].copy_from_slice(&(incompat | INCOMPAT_META_UUID).to_be_bytes());
            }
            sector[SB_UUID..SB_UUID + 16].copy_from_slice(uuid);
        }
        let crc = checksum(&sector, SB_CRC);
        sector[SB_CRC..SB_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        disk.write_at(&sector, offset).map_err(failed)?;
    }
    match uuid {
        Some(uuid) => relabel_log(disk, &geometry, uuid).map_err(failed),
        None => Ok(()),
    }
}

/// Checksums are little-endian on the disk, unlike everything else.
fn stored_crc(bytes: &[u8], at: usize) -> u32 {
    u32_at(bytes, at).swap_bytes()
}

fn read_geometry(disk: &Overlay) -> Result<Geometry> {
    let mut sb = [0; 512];
    disk.read_at(&mut sb, 0).map_err(|error| Error::io(Stage::Edit, "xfs", "read the superblock", error))?;
    if &sb[..4] != SB_MAGIC {
        return Err(corrupt("there is no superblock"));
    }
    let version = u16::from_be_bytes([sb[100], sb[101]]) & 0xf;
    let log_start = u64_at(&sb, 48);
    if version != 5 || log_start == 0 {
        let text = format!("format version {version} with log at {log_start}: only version 5 with an internal log can get a new identity");
        return Err(Error::new(Kind::Unsupported, Stage::Edit, "xfs", text));
    }
    let block = u64::from(u32_at(&sb, 4));
    let (ag_blocks, ag_count, log_blocks) = (u64::from(u32_at(&sb, 84)), u64::from(u32_at(&sb, 88)), u64::from(u32_at(&sb, 96)));
    let sector = usize::from(u16::from_be_bytes([sb[102], sb[103]]));
    let ag_log = u32::from(sb[124]);
    let sane = (512..=65536).contains(&block) && (512..=32768).contains(&sector) && ag_log < 32 && ag_blocks != 0 && ag_count != 0;
    // All products are of numbers below 2^33 and 2^17 or of ones that were checked.
    let log_block = (log_start >> ag_log.min(63)).checked_mul(ag_blocks).and_then(|base| base.checked_add(log_start & ((1 << ag_log.min(63)) - 1)));
    let log_offset = log_block.and_then(|number| number.checked_mul(block));
    let fits = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|end| end <= disk.len());
    let ag_bytes = ag_blocks * block;
    let last = (ag_count - u64::from(ag_count != 0)).checked_mul(ag_bytes);
    match (sane, log_offset, last) {
        (true, Some(log_offset), Some(last)) if fits(log_offset, log_blocks * block) && fits(last, sector as u64) => {
            let uuid = sb[SB_UUID..SB_UUID + 16].try_into().map_err(|_| corrupt("the superblock is short"))?;
            Ok(Geometry { sector, ag_count, ag_bytes, log_offset, log_len: log_blocks * block, uuid })
        }
        _ => Err(corrupt("the superblock's geometry does not fit the disk")),
    }
}

fn relabel_log(disk: &Overlay, geometry: &Geometry, uuid: &[u8; 16]) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < geometry.log_len {
        let len = usize::try_from(geometry.log_len - at).unwrap_or(CHUNK).min(CHUNK);
        disk.read_at(&mut chunk[..len], geometry.log_offset + at)?;
        for (index, sector) in chunk[..len].chunks_exact(LOG_SECTOR).enumerate() {
            if sector[..4] == LOG_MAGIC && sector[REC_UUID..REC_UUID + 16] == geometry.uuid {
                relabel_record(disk, geometry, at + (index * LOG_SECTOR) as u64, sector, uuid)?;
            }
        }
        at += len as u64;
    }
    Ok(())
}

/// Puts the new UUID into the record whose header is `header`, at `at` in the log.
fn relabel_record(disk: &Overlay, geometry: &Geometry, at: u64, header: &[u8], uuid: &[u8; 16]) -> io::Result<()> {
    let mut header = header.to_vec();
    let stored = stored_crc(&header, REC_CRC);
    let tail = tail_of_record(disk, geometry, at, &header)?;
    let of = |header: &[u8], tail: &[u8]| crc32c::crc32c_append(checksum(&header[..REC_HEADER], REC_CRC), tail);
    match tail {
        // mkfs makes a record without a checksum, which the kernel accepts.
        _ if stored == 0 => header[REC_UUID..REC_UUID + 16].copy_from_slice(uuid),
        Some(tail) if stored == of(&header, &tail) => {
            header[REC_UUID..REC_UUID + 16].copy_from_slice(uuid);
            let crc = of(&header, &tail);
            header[REC_CRC..REC_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        }
        // The rest of a record that a later cycle has partly overwritten: never read again.
        _ => return Ok(()),
    }
    disk.write_at(&header, geometry.log_offset + at)
}

/// What the checksum covers beside the header: extended headers and body. The log is a ring. Nothing when the lengths can't be.
fn tail_of_record(disk: &Overlay, geometry: &Geometry, at: u64, header: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let (body, buffer_size) = (u64::from(u32_at(header, 12)), u64::from(u32_at(header, 320)));
    if body > BODY_MAX || buffer_size > BODY_MAX || geometry.log_len < 2 * BODY_MAX + CHUNK as u64 / 4 {
        return Ok(None);
    }
    let sectors = buffer_size.div_ceil(BODY_PER_HEADER).max(1);
    let read = |from: u64, buffer: &mut [u8]| -> io::Result<()> {
        let start = (at + from) % geometry.log_len;
        let until_end = usize::try_from(geometry.log_len - start).unwrap_or(usize::MAX).min(buffer.len());
        let (first, second) = buffer.split_at_mut(until_end);
        disk.read_at(first, geometry.log_offset + start)?;
        disk.read_at(second, geometry.log_offset)
    };
    let mut tail = Vec::new();
    for index in 1..body.div_ceil(BODY_PER_HEADER).min(sectors) {
        let mut extended = [0; EXT_HEADER];
        read(index * LOG_SECTOR as u64, &mut extended)?;
        tail.extend_from_slice(&extended);
    }
    let mut data = vec![0; body as usize];
    read(sectors * LOG_SECTOR as u64, &mut data)?;
    tail.extend_from_slice(&data);
    Ok(Some(tail))
}
