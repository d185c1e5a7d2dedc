//! xl: disk specifications (xl-disk-configuration(5)) and the `disk = [ … ]` setting of a domain configuration (xl.cfg(5)).
//!
//! Every line has the explicit form `format=…, vdev=…, access=…, target=PATH`: named parameters, and `target` last, where it takes the rest of the
//! line with its commas, colons and spaces. `backendtype` and `script` are left to libxl, which picks `phy` for block devices and raw files and
//! `qdisk` (QEMU) for qcow2. So a qcow2 volume needs QEMU in dom0 also for PV and PVH guests, and pygrub can't look inside it. Lines carry no
//! backing file: QEMU takes it, with its format, from the image's header, which the target wrote.

use super::{
    Bus, Device, Mapping,
    names::{expressible, guest_name, no_bus},
};
use crate::error::Result;

/// The specification of one device, without quotes; `index` is its place in the mapping.
pub fn disk_line(device: &Device, index: usize, bus: Bus) -> Result<String> {
    match bus {
        Bus::Xen | Bus::Scsi => {}
        Bus::Virtio | Bus::Nvme => {
            return Err(no_bus(device, "an xl disk on this bus needs a backend outside of Xen's tools; use the xen bus, or scsi for emulated disks"));
        }
    }
    let target = expressible(&device.volume.device)?;
    let access = if device.read_only { "ro" } else { "rw" };
    Ok(format!("format={}, vdev={}, access={access}, target={target}", device.image_format(), guest_name(bus, index)))
}

/// The whole setting, one device per line.
pub fn disk_setting(mapping: &Mapping, bus: Bus) -> Result<String> {
    let mut text = String::from("disk = [\n");
    for (index, device) in mapping.devices.iter().enumerate() {
        text.push_str("  ");
        text.push_str(&quote(&disk_line(device, index, bus)?));
        text.push_str(",\n");
    }
    text.push_str("]\n");
    Ok(text)
}

/// A string of a domain configuration. Inside quotes of either kind a backslash escapes (libxlu_cfg.c, `xlu__cfgl_dequote`).
pub(super) fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('\'');
    for character in text.chars() {
        if matches!(character, '\'' | '\\') {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    quoted.push('\'');
    quoted
}
