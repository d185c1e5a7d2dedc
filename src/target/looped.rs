//! Raw files attached to loop devices, for hypervisor tools that want a block device (Xen's blkback, containers).
//!
//! The file is staged and published as a raw file; then it is attached. The attachment outlives the daemon, so it is not cleared automatically: after a
//! restart `adopt` finds it by the file's device and inode, and after a reboot it attaches the file again.

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Kind, Result, Stage},
    failpoint::reach,
    host::{
        in_use,
        loops::{self, Lifetime, LoopDevice, Options},
        mounts,
    },
    progress::Progress,
    target::{
        DirectIo, Pool, Proof, Staged, Target, Volume, VolumeFormat, VolumeOptions, VolumePlan, Wanted,
        publish::{self, StagedFile},
        raw,
    },
};

/// The loop target.
pub struct Looped;

impl Target for Looped {
    fn format(&self) -> VolumeFormat {
        VolumeFormat::Loop
    }

    fn check(&self, wanted: &Wanted<'_>) -> Result<()> {
        if !Path::new("/dev/loop-control").exists() {
            let error = Error::new(Kind::Unsupported, Stage::Target, "/dev/loop-control", "this host has no loop driver");
            return Err(error.with_hint("load the loop module (modprobe loop)"));
        }
        publish::check(wanted, self.format())
    }

    fn stage(&self, plan: &VolumePlan<'_>, progress: &Progress) -> Result<Box<dyn Staged>> {
        let file = raw::stage(plan, self.format(), progress)?;
        if plan.options.direct_io == Some(DirectIo::On) {
            // Before anything is published, above all before an old volume is replaced.
            let options = Options { lifetime: Lifetime::Guard, partitions: false, ..attach_options(plan.options) };
            attach_as(file.path(), &options, plan.options)?.close()?;
        }
        Ok(Box::new(StagedLoop { file, options: plan.options.clone(), replaced: plan.replace.cloned() }))
    }

    fn adopt(&self, pool: &Pool, volume: &Volume) -> Result<Volume> {
        let volume = publish::adopt(pool, volume)?;
        let device = attached(&volume.path, &volume.options, &volume.device)?;
        Ok(Volume { device, ..volume })
    }

    fn delete(&self, pool: &Pool, volume: &Volume) -> Result<()> {
        let path = publish::directory_of(pool, self.format())?.join(publish::file_name(&volume.name, self.format()));
        for device in loops::find_by_backing(&path)? {
            if let Some(number) = mounts::block_number(&device) {
                in_use::refuse_device_in_use(&device, number)?;
            }
            loops::detach(&device)?;
        }
        publish::delete(pool, self.format(), &volume.name)
    }

    fn sweep(&self, pool: &Pool, dry_run: bool) -> Result<Vec<PathBuf>> {
        publish::sweep(pool, dry_run)
    }
}

struct StagedLoop {
    file: StagedFile,
    options: VolumeOptions,
    /// The volume whose place it takes.
    replaced: Option<Volume>,
}

impl Staged for StagedLoop {
    fn allocated_size_bytes(&self) -> Result<u64> {
        self.file.allocated_size_bytes()
    }

    fn path(&self) -> &Path {
        self.file.path()
    }

    fn foreseen(&self) -> &Volume {
        self.file.foreseen()
    }

    fn proof(&self) -> Result<Proof> {
        self.file.proof()
    }

    fn publish(self: Box<Self>) -> Result<Volume> {
        let StagedLoop { file, options, replaced } = *self;
        // Before it has its name: a binding follows the file, and what can fail has failed before an old volume gives way.
        let device = attach_as(file.path(), &attach_options(&options), &options)?;
        reach("loop-attached");
        if let Some(old) = &replaced {
            publish::refuse_replaced_in_use(&old.path, VolumeFormat::Loop)?;
            // Devices of the old file would go on showing it after its name is gone.
            for bound in loops::find_by_backing(&old.path)? {
                loops::detach(&bound)?;
            }
        }
        match file.publish() {
            Ok(volume) => {
                let known = device.path().to_owned();
                // A keeper that died a moment ago may have left it, and may be back.
                match device.keep().or_else(|_| attached(&volume.path, &options, &known)) {
                    Ok(device) => Ok(Volume { device, ..volume }),
                    // The old one is gone; the next daemon attaches the new one.
                    Err(error) if replaced.is_some() => Err(error),
                    Err(error) => Err(match std::fs::remove_file(&volume.path) {
                        Ok(()) => error,
                        Err(failure) => error.with_cleanup_failure(Error::io(Stage::Target, volume.path.display().to_string(), "remove", failure)),
                    }),
                }
            }
            Err(error) => Err(match replaced.map(|old| attach(&old.path, &old.options)).transpose() {
                // The old volume goes on; its device may have another number until it is adopted.
                Ok(_) => error,
                Err(cleanup) => error.with_cleanup_failure(cleanup),
            }),
        }
    }
}

/// The device of a volume's file: the one that is `known`, else any (two daemons never attach one file, an operator may have), else a new one.
fn attached(path: &Path, chosen: &VolumeOptions, known: &Path) -> Result<PathBuf> {
    let attached = loops::find_by_backing(path)?;
    match attached.iter().find(|device| *device == known).or(attached.first()) {
        Some(device) => Ok(device.clone()),
        None => attach(path, chosen),
    }
}

/// Attaches a volume's file as was chosen for it.
fn attach(path: &Path, chosen: &VolumeOptions) -> Result<PathBuf> {
    attach_as(path, &attach_options(chosen), chosen)?.keep()
}

fn attach_options(chosen: &VolumeOptions) -> Options {
    Options {
        read_only: chosen.read_only.unwrap_or(false),
        partitions: chosen.partition_scan.unwrap_or(true),
        direct_io: chosen.direct_io != Some(DirectIo::Off),
        ..Options::persistent()
    }
}

/// `Unsupported` (reason `DIRECT_IO_UNSUPPORTED`): it was insisted on and the kernel does without; the device is detached again.
fn attach_as(path: &Path, options: &Options, chosen: &VolumeOptions) -> Result<LoopDevice> {
    let file = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .open(path)
        .map_err(|error| Error::io(Stage::Target, path.display().to_string(), "open to attach it to a loop device", error))?;
    let device = LoopDevice::attach(&file, path, options)?;
    if chosen.direct_io == Some(DirectIo::On) && !device.is_direct()? {
        let message = "the file's filesystem can't do direct I/O for a loop device";
        let error = Error::new(Kind::Unsupported, Stage::Target, path.display().to_string(), message).with_reason("DIRECT_IO_UNSUPPORTED");
        return Err(match device.close() {
            Ok(()) => error,
            Err(cleanup) => error.with_cleanup_failure(cleanup),
        });
    }
    Ok(device)
}
