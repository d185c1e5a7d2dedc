//! Makes a golden disk bootable: boot loaders into the places that its partition table has for them.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    boot::{
        bls::{self, EntryPlace},
        embed,
        esp::{self, EfiProgram},
        kernels::{self, Kernel},
        loaders::{HostLoaders, Reads},
    },
    disk::{DiskPlan, fat},
    error::Result,
    fs::{Filesystem, Region},
    guest::facts::GuestFacts,
    manifest::BootSpec,
};

/// How a golden disk can be started; kept beside it as `boot.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskBoot {
    /// The kernels of the image, the one to start first.
    pub kernels: Vec<Kernel>,
    /// Whether the disk starts by BIOS: GRUB is embedded.
    pub bios: bool,
    /// Who UEFI firmware starts, if the disk can be started by it.
    pub efi: Option<EfiProgram>,
    /// Whether what UEFI firmware starts carries a signature, and what a shim starts; nothing when that was not looked at.
    #[serde(default)]
    pub efi_signed: Option<bool>,
    /// Where systemd-boot's entries are on the EFI system partition.
    #[serde(default)]
    pub entries: Vec<EntryPlace>,
    /// Whether this host's GRUB, where it is on the disk, reads ext4 with `metadata_csum_seed`.
    #[serde(default)]
    pub reads_checksum_seed: Option<bool>,
    /// Why this host's GRUB, where it is on the disk, does not read the root.
    #[serde(default)]
    pub unreadable: Option<String>,
    /// Why something is not there.
    pub notes: Vec<String>,
}

/// Puts boot loaders on `disk`, whose filesystem and partition table are finished. A disk that can't be started by this or that firmware is no error:
/// the answer says so, and [`crate::boot::check`] refuses platforms that need it. `identity`: where the ESP's volume id comes from.
pub fn prepare(
    plan: &DiskPlan,
    disk: &Region,
    filesystem: &dyn Filesystem,
    facts: &GuestFacts,
    spec: &BootSpec,
    loaders: &HostLoaders,
    identity: Uuid,
) -> Result<DiskBoot> {
    let mut boot = DiskBoot { kernels: kernels::find(facts, spec), ..DiskBoot::default() };
    if !plan.layout().is_partitioned() {
        return Ok(boot);
    }
    let has_kernel = !boot.kernels.is_empty();
    match &loaders.bios {
        Some(bios) if has_kernel => {
            let area = embed::bios_area(bios, embed::bios_partition(plan)?)?;
            embed::write_bios(plan, disk, &area)?;
            boot.bios = true;
        }
        Some(_) => boot.notes.push("BIOS: the image has no kernel in /boot".into()),
        None => boot.notes.push("BIOS: this host has no GRUB for it (Debian: grub-common, grub-pc-bin)".into()),
    }
    let root = plan.root();
    let tree = filesystem.tree(&Region { file: std::sync::Arc::clone(&disk.file), offset: disk.offset + root.offset, len: root.len })?;
    let extent = plan.esp().map_or(0, |extent| extent.len);
    let image = esp::Image { tree: &*tree, facts, kernels: &boot.kernels };
    match esp::choose(&image, loaders, extent, &mut boot.notes)? {
        Some(esp) => {
            let program = esp.program.clone();
            boot.efi_signed = esp.is_signed();
            let volume = fat::build(extent, &esp.volume(volume_id(identity)))?;
            embed::write_esp(plan, disk, &volume)?;
            if let EfiProgram::ImageBootEntries { token } = &program {
                boot.entries = bls::places(&volume, &boot.kernels, token)?;
            }
            boot.efi = Some(program);
        }
        None if has_kernel => {
            boot.notes.push("UEFI: this host has no GRUB for it (Debian: grub-common, grub-efi-amd64-bin) and the image no shim".into())
        }
        None => boot.notes.push("UEFI: the image has no kernel in /boot and no unified kernel image".into()),
    }
    if boot.bios || boot.efi == Some(EfiProgram::HostGrub) {
        boot.reads_checksum_seed = Some(loaders.reads_checksum_seed);
        match &loaders.reads {
            Reads::Yes => {}
            Reads::No(why) => boot.unreadable = Some(why.clone()),
            Reads::Unknown(why) => boot.notes.push(why.clone()),
        }
    }
    Ok(boot)
}

/// The volume id of an ESP, from the identity of its disk.
pub fn volume_id(identity: Uuid) -> u32 {
    let id = Uuid::new_v5(&identity, b"esp-volume").into_bytes();
    u32::from_be_bytes([id[0], id[1], id[2], id[3]])
}
