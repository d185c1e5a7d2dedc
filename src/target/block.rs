//! Raw block devices: logical volumes, partitions, whole disks.
//!
//! There is no rename on a device, so order stands in for it:
//!
//! ```text
//!  stage    claim exclusively, refuse what lives there ─► zero the first MiB, mark it, flush ─► zero every gap ─► write data and patch ─► flush
//!  publish  same device still? ─► write the first MiB but for 4 KiB ─► flush ─► write those ─► flush ─► same size still?
//!  drop     zero the first and last MiB, flush
//! ```
//!
//! The mark, in the first sector, names the render: after a crash it proves whose half-written device it is. It goes with the write that makes the device a
//! volume, one block that devices write whole.
//!
//! So a device that is half written has no boot sector, partition table or superblock. Nothing is assumed about old content. Each byte of the device is
//! either written from golden and patch, or zeroed, to the device's very end: the previous tenant's data and backup partition table can't be read by the
//! next, unless `ZeroPolicy::Keep` was asked for. How it is zeroed is the zero policy: BLKZEROOUT is a promise of the device, else zeros are written.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    host::block::{self, Access, Claim},
    names::{Digest, VolumeName},
    progress::Progress,
    target::{
        Place, Pool, Proof, Staged, Target, Volume, VolumeFormat, VolumeOptions, VolumePlan, Wanted, ZeroPolicy,
        bulk::{self, AlignedBuffer, PIECE_BYTES_MAX, Source},
        extents,
        pace::Pace,
        publish, verify,
    },
    units::MIB,
};

/// What is written last and wiped first.
const HEAD_BYTES: u64 = MIB;
/// What of it is written last of all: it holds the mark before.
const FIRST_BYTES: usize = 4096;
/// How the mark begins; the render's id and zeros follow, to the end of the sector.
const MARK: &[u8] = b"cloudletd stage of ";
/// Bytes of the mark: a sector.
const MARK_BYTES: usize = 512;
/// Bytes per zeroing call: a cancel is noticed between two.
const ZERO_BYTES_MAX: u64 = 256 * MIB;

/// The block-device target.
pub struct Block;

impl Target for Block {
    fn format(&self) -> VolumeFormat {
        VolumeFormat::Block
    }

    fn check(&self, wanted: &Wanted<'_>) -> Result<()> {
        wanted.options.check(self.format())?;
        let claim = claim(wanted.pool, wanted.name, Access::Inspect)?;
        refuse_too_small(&claim, wanted.size_bytes)?;
        refuse_zero_policy(&claim, zero_policy(wanted.options))?;
        check_content(&claim, wanted.overwrite, wanted.replace)
    }

    fn stage(&self, plan: &VolumePlan<'_>, progress: &Progress) -> Result<Box<dyn Staged>> {
        publish::validate(plan, self.format())?;
        let pace = plan.pace(progress);
        let _priority = pace.lower_priority();
        let golden = extents::open_golden(plan.golden)?;
        let claim = claim(plan.pool, plan.name, Access::Write)?;
        refuse_too_small(&claim, plan.patch.size_bytes())?;
        refuse_zero_policy(&claim, zero_policy(plan.options))?;
        check_content(&claim, plan.overwrite, plan.replace)?;
        let object = claim.path().display().to_string();
        let source = Source { golden: &golden, golden_bytes: plan.golden.size_bytes, patch: plan.patch };
        let mut head = vec![0; HEAD_BYTES.min(plan.patch.size_bytes()) as usize];
        source.read(&mut head, 0).map_err(|error| Error::io(Stage::Target, object.as_str(), "read the head of the golden image", error))?;
        let mut staged = StagedDevice { claim, head, published: false, volume: volume(plan) };
        let policy = zero_policy(plan.options);
        let end = if policy == ZeroPolicy::Keep { plan.patch.size_bytes() } else { staged.claim.size_bytes() };
        staged.volume.virtual_size_bytes = staged.claim.size_bytes();
        staged.volume.allocated_size_bytes = staged.claim.size_bytes();
        staged.volume.pinned = Some(staged.claim.id());
        staged.mark_head(plan.render)?;
        reach("head-marked");

        let data = extents::data_ranges(&golden, plan.golden.size_bytes, &plan.golden.path)?;
        let written = extents::union(&data, &extents::patch_ranges(plan.patch));
        // The head is dealt with apart: as zeros above, with its content when published.
        let gaps = extents::complement(&extents::union(&written, std::slice::from_ref(&(0..HEAD_BYTES))), end);
        let mut pieces = Vec::new();
        for range in &written {
            bulk::cut(range.start.max(HEAD_BYTES)..range.end.max(HEAD_BYTES), range.start.max(HEAD_BYTES), &mut pieces);
        }
        progress.enter(Stage::Target, extents::total(&written));
        let direct = staged.claim.open_direct()?;
        match policy {
            ZeroPolicy::Auto | ZeroPolicy::ZeroOut | ZeroPolicy::Keep => staged.zero(&gaps, pace)?,
            ZeroPolicy::Discard => staged.discard(&gaps, &direct, pace)?,
            // What lies in no piece of golden and patch is read from there as zeros.
            ZeroPolicy::Write => gaps.iter().for_each(|gap| bulk::cut(gap.clone(), gap.start, &mut pieces)),
        }
        bulk::write(source, &pieces, &direct, &object, pace)?;
        staged.flush("flush the data")?;
        if plan.options.verify {
            verify::device(source, HEAD_BYTES.min(end)..end, &direct, staged.claim.path(), pace)?;
        }
        Ok(Box::new(staged))
    }

    fn adopt(&self, pool: &Pool, volume: &Volume) -> Result<Volume> {
        let (directory, allow) = devices_of(pool)?;
        let named = block::device_path(directory, allow, volume.name.as_str())?;
        // A running guest holds the device: it is looked at, not claimed.
        let id = block::identify(&named)?;
        if let Some(pinned) = &volume.pinned {
            id.id.require_same(pinned, &named)?;
        }
        if id.size_bytes < volume.virtual_size_bytes {
            let message = format!("has {} bytes, the volume was written with {}", id.size_bytes, volume.virtual_size_bytes);
            return Err(Error::new(Kind::Conflict, Stage::Target, named.display().to_string(), message).with_reason("DEVICE_CHANGED"));
        }
        Ok(Volume { path: named.clone(), device: named, pinned: Some(id.id), ..volume.clone() })
    }

    fn delete(&self, pool: &Pool, volume: &Volume) -> Result<()> {
        let claim = match claim(pool, &volume.name, Access::Write) {
            // The logical volume itself is gone.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            other => other?,
        };
        if let Some(pinned) = &volume.pinned {
            claim.id().require_same(pinned, claim.path())?;
        }
        clear_ends(&claim)
    }

    fn is_published(&self, pool: &Pool, name: &VolumeName, _render: &str, proof: &Proof) -> Result<bool> {
        let Proof::Head { digest, bytes } = proof else { return Ok(false) };
        let Some(head) = peek(pool, name, *bytes)? else { return Ok(false) };
        Ok(Digest::of(&head) == *digest)
    }

    fn abandon(&self, pool: &Pool, name: &VolumeName, render: &str) -> Result<bool> {
        let is_ours = |head: Option<Vec<u8>>| Ok::<_, Error>(head.is_some_and(|head| head == mark_of(render)));
        if !is_ours(peek(pool, name, MARK_BYTES as u64)?)? {
            return Ok(false);
        }
        let claim = claim(pool, name, Access::Write)?;
        // Nobody can change it any more: is it still so?
        if !is_ours(peek(pool, name, MARK_BYTES as u64)?)? {
            return Ok(false);
        }
        clear_ends(&claim)?;
        Ok(true)
    }

    fn sweep(&self, _pool: &Pool, _dry_run: bool) -> Result<Vec<PathBuf>> {
        // A half-written device has an empty head and no name of its own: there is nothing to find.
        Ok(Vec::new())
    }
}

/// Size in bytes of the device that volume `name` of `pool` would be, so that a patch can be made for it. Opens it for reading only.
pub fn size_bytes(pool: &Pool, name: &VolumeName) -> Result<u64> {
    let (directory, allow) = devices_of(pool)?;
    Ok(block::identify(&block::device_path(directory, allow, name.as_str())?)?.size_bytes)
}

/// A device that is written but for its head.
struct StagedDevice {
    claim: Claim,
    head: Vec<u8>,
    published: bool,
    volume: Volume,
}

impl StagedDevice {
    fn mark_head(&self, render: &str) -> Result<()> {
        let len = HEAD_BYTES.min(self.claim.size_bytes());
        block::zero_range(self.claim.file(), 0, len).map_err(|error| self.error("clear the first MiB", error))?;
        self.claim.file().write_all_at(&mark_of(render), 0).map_err(|error| self.error("mark the first sector", error))?;
        self.flush("flush the marked first MiB")
    }

    fn zero(&self, gaps: &[std::ops::Range<u64>], pace: Pace<'_>) -> Result<()> {
        for gap in gaps {
            let mut at = gap.start;
            while at < gap.end {
                let len = (gap.end - at).min(pace.request_bytes(ZERO_BYTES_MAX));
                pace.take(len)?;
                block::zero_range(self.claim.file(), at, len).map_err(|error| self.error(&format!("zero {len} bytes at {at}"), error))?;
                at += len;
            }
        }
        Ok(())
    }

    /// Discards what is to read as zeros, and zeroes what does not afterwards: a discard promises nothing about what is read.
    fn discard(&self, gaps: &[std::ops::Range<u64>], direct: &File, pace: Pace<'_>) -> Result<()> {
        let mut memory = AlignedBuffer::new();
        for gap in gaps {
            pace.progress.check()?;
            match block::discard_range(self.claim.file(), gap.start, gap.end - gap.start) {
                // It can't discard: all of it is read and zeroed where it has to be.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                other => other.map_err(|error| self.error(&format!("discard {} bytes at {}", gap.end - gap.start, gap.start), error))?,
            }
            let mut at = gap.start;
            while at < gap.end {
                let len = (gap.end - at).min(PIECE_BYTES_MAX);
                pace.take(len)?;
                let buffer = memory.slice(len as usize);
                direct.read_exact_at(buffer, at).map_err(|error| self.error(&format!("read what was discarded at {at}"), error))?;
                if buffer.iter().any(|byte| *byte != 0) {
                    block::zero_range(self.claim.file(), at, len).map_err(|error| self.error(&format!("zero {len} bytes at {at}"), error))?;
                }
                at += len;
            }
        }
        Ok(())
    }

    fn flush(&self, doing: &str) -> Result<()> {
        self.claim.file().sync_all().map_err(|error| self.error(doing, error))
    }

    fn error(&self, doing: &str, error: std::io::Error) -> Error {
        Error::io(Stage::Target, self.claim.path().display().to_string(), doing, error)
    }

    fn write_head(&mut self) -> Result<()> {
        self.claim.verify()?;
        reach("head-next");
        let (first, rest) = self.head.split_at(FIRST_BYTES.min(self.head.len()));
        self.claim.file().write_all_at(rest, first.len() as u64).map_err(|error| self.error("write the first MiB", error))?;
        self.flush("flush the first MiB")?;
        reach("head-half");
        self.claim.file().write_all_at(first, 0).map_err(|error| self.error("write the first 4 KiB", error))?;
        self.flush("flush the first 4 KiB")?;
        reach("head-written");
        if self.volume.options.verify {
            let mut memory = AlignedBuffer::new();
            let stored = memory.slice(self.head.len());
            self.claim.open_direct()?.read_exact_at(stored, 0).map_err(|error| self.error("read back the first MiB", error))?;
            if let Some(at) = stored.iter().zip(&self.head).position(|(left, right)| left != right) {
                return Err(verify::differs(self.claim.path(), at as u64));
            }
        }
        self.claim.verify()
    }
}

impl Staged for StagedDevice {
    fn allocated_size_bytes(&self) -> Result<u64> {
        Ok(self.claim.size_bytes())
    }

    fn path(&self) -> &Path {
        self.claim.path()
    }

    fn foreseen(&self) -> &Volume {
        &self.volume
    }

    fn proof(&self) -> Result<Proof> {
        Ok(Proof::Head { digest: Digest::of(&self.head), bytes: self.head.len() as u64 })
    }

    fn publish(mut self: Box<Self>) -> Result<Volume> {
        self.write_head()?;
        self.published = true;
        Ok(self.volume.clone())
    }
}

impl Drop for StagedDevice {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = clear_ends(&self.claim)
        {
            tracing::warn!(device = %self.claim.path().display(), error = %error.chain(), "an abandoned device may keep a part of its first or last MiB");
        }
    }
}

fn volume(plan: &VolumePlan<'_>) -> Volume {
    let path = match &plan.pool.place {
        Place::Devices { directory, .. } | Place::Directory { path: directory } => directory.join(plan.name.as_str()),
    };
    Volume {
        pool: plan.pool.name.clone(),
        name: plan.name.clone(),
        format: VolumeFormat::Block,
        device: path.clone(),
        path,
        virtual_size_bytes: 0,
        allocated_size_bytes: 0,
        backing: None,
        pinned: None,
        options: plan.options.clone(),
    }
}

/// What the first sector holds while `render` writes the device.
fn mark_of(render: &str) -> Vec<u8> {
    let mut mark = [MARK, render.as_bytes()].concat();
    mark.resize(MARK_BYTES, 0);
    mark
}

/// Clears the first MiB, where boot sectors and superblocks are, and the last, where copies of partition tables are.
fn clear_ends(claim: &Claim) -> Result<()> {
    let size = claim.size_bytes();
    let failed = |error| Error::io(Stage::Target, claim.path().display().to_string(), "clear the first and last MiB", error);
    let head = HEAD_BYTES.min(size);
    let tail = size.saturating_sub(HEAD_BYTES).max(head);
    block::zero_range(claim.file(), 0, head).map_err(failed)?;
    if tail < size {
        block::zero_range(claim.file(), tail, size - tail).map_err(failed)?;
    }
    claim.file().sync_all().map_err(failed)
}

/// The first `bytes` of a device of the pool, read without claiming it; none when it is smaller. `NotFound` (`DEVICE_MISSING`) when there is no such device:
/// what is on it is known when it is back.
fn peek(pool: &Pool, name: &VolumeName, bytes: u64) -> Result<Option<Vec<u8>>> {
    let (directory, allow) = devices_of(pool)?;
    let path = block::device_path(directory, allow, name.as_str())?;
    match block::identify(&path) {
        Err(error) if error.kind() == Kind::NotFound => return Err(error.with_reason("DEVICE_MISSING")),
        Ok(identity) if identity.size_bytes < bytes || bytes > HEAD_BYTES => return Ok(None),
        other => other?,
    };
    let failed = |error| Error::io(Stage::Target, path.display().to_string(), "read its head", error);
    let file = block::look(&path)?;
    let mut head = vec![0; bytes as usize];
    file.read_exact_at(&mut head, 0).map_err(failed)?;
    Ok(Some(head))
}

fn claim(pool: &Pool, name: &VolumeName, access: Access) -> Result<Claim> {
    let (directory, allow) = devices_of(pool)?;
    Claim::take(directory, allow, name.as_str(), access)
}

fn devices_of(pool: &Pool) -> Result<(&Path, &[String])> {
    match &pool.place {
        Place::Devices { directory, allow } => Ok((directory, allow)),
        Place::Directory { .. } => {
            Err(Error::new(Kind::InvalidRequest, Stage::Target, pool.name.as_str(), "the pool is a directory; block needs a pool of block devices")
                .with_reason("POOL_KIND_DIFFERS"))
        }
    }
}

/// What is on the device may be overwritten: it is the volume that is replaced, on the device that it was written to, or there is nothing.
fn check_content(claim: &Claim, overwrite: bool, replace: Option<&Volume>) -> Result<()> {
    match replace {
        Some(Volume { pinned: Some(pinned), virtual_size_bytes, .. }) => {
            // Numbers mean nothing after a reboot; a device that shrank is another one in any case.
            refuse_too_small(claim, *virtual_size_bytes)?;
            claim.id().require_same(pinned, claim.path())
        }
        _ if overwrite => Ok(()),
        _ => claim.refuse_signatures(),
    }
}

fn zero_policy(options: &VolumeOptions) -> ZeroPolicy {
    options.zero_policy.unwrap_or_default()
}

fn refuse_zero_policy(claim: &Claim, policy: ZeroPolicy) -> Result<()> {
    if policy != ZeroPolicy::ZeroOut || claim.zeroes_by_itself() {
        return Ok(());
    }
    let message = "can't zero by itself (write_zeroes_max_bytes is 0), which options.zero_policy insists on";
    Err(Error::new(Kind::Unsupported, Stage::Target, claim.path().display().to_string(), message).with_reason("ZERO_OUT_UNSUPPORTED"))
}

fn refuse_too_small(claim: &Claim, size_bytes: u64) -> Result<()> {
    if claim.size_bytes() >= size_bytes {
        return Ok(());
    }
    let message = format!("has {} bytes, the volume needs {size_bytes}", claim.size_bytes());
    Err(Error::new(Kind::NoSpace, Stage::Target, claim.path().display().to_string(), message).with_reason("DEVICE_TOO_SMALL"))
}
