//! QEMU: `-blockdev` and `-device` arguments (qemu(1), QAPI BlockdevOptions), as a list for execve(2): nothing in it is for a shell.
//!
//! One node per file and one per format, backing files included, referring to each other by name. With every driver stated and every chain closed
//! (`"backing": null`), QEMU probes no format and opens nothing that is not written here.

use serde_json::{Value, json};

use super::{
    Bus, Device, Mapping,
    names::{expressible, guest_name, serial},
};
use crate::error::{Error, Kind, Result, Stage};

/// Arguments for all devices of the mapping. Nodes are called `disk0`, `disk0-file`, `disk0-back0`, …, devices `dev-disk0`.
pub fn arguments(mapping: &Mapping, bus: Bus) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    if bus == Bus::Scsi && !mapping.devices.is_empty() {
        arguments.extend(["-device".to_owned(), "virtio-scsi-pci,id=scsi0".to_owned()]);
    }
    for (index, device) in mapping.devices.iter().enumerate() {
        for node in nodes(device, index)? {
            arguments.extend(["-blockdev".to_owned(), node.to_string()]);
        }
        arguments.extend(["-device".to_owned(), frontend(device, index, bus)]);
    }
    Ok(arguments)
}

/// The block nodes of a device, each after those it refers to; also what QMP's `blockdev-add` takes.
pub fn nodes(device: &Device, index: usize) -> Result<Vec<Value>> {
    let mut nodes = Vec::new();
    let mut backing = Value::Null;
    for (depth, file) in device.backing_chain.iter().enumerate().rev() {
        let name = format!("disk{index}-back{depth}");
        nodes.push(json!({
            "driver": "file", "node-name": format!("{name}-file"), "filename": expressible(&file.path)?, "read-only": true,
        }));
        nodes.push(format_node(&file.format, &name, true, backing)?);
        backing = name.into();
    }
    let name = format!("disk{index}");
    let driver = if device.is_block_device() { "host_device" } else { "file" };
    nodes.push(json!({
        "driver": driver, "node-name": format!("{name}-file"), "filename": expressible(&device.volume.device)?, "read-only": device.read_only,
        "discard": "unmap",
    }));
    nodes.push(format_node(device.image_format(), &name, device.read_only, backing)?);
    Ok(nodes)
}

fn format_node(format: &str, name: &str, read_only: bool, backing: Value) -> Result<Value> {
    let mut node = json!({ "driver": format, "node-name": name, "file": format!("{name}-file"), "read-only": read_only });
    match format {
        "raw" if backing.is_null() => {}
        "qcow2" => node["backing"] = backing,
        _ => {
            let text = format!("format {format} with these files behind it has no QEMU form here");
            return Err(Error::new(Kind::Unsupported, Stage::Report, name, text));
        }
    }
    if !read_only {
        node["discard"] = "unmap".into();
    }
    Ok(node)
}

/// The `-device` value. Its parts are made here and hold no comma, which `-device` would want doubled.
fn frontend(device: &Device, index: usize, bus: Bus) -> String {
    let serial = serial(device, index);
    let mut text = match bus {
        Bus::Virtio => format!("virtio-blk-pci,drive=disk{index},id=dev-disk{index},serial={serial}"),
        // One target per disk: virtio-scsi has 256 of them.
        Bus::Scsi => {
            format!("scsi-hd,bus=scsi0.0,channel=0,scsi-id={},lun={},drive=disk{index},id=dev-disk{index},serial={serial}", index % 256, index / 256)
        }
        Bus::Nvme => format!("nvme,drive=disk{index},id=dev-disk{index},serial={serial}"),
        // Xen's own device has neither serial number nor boot index: the guest knows it by its vdev.
        Bus::Xen => return format!("xen-disk,drive=disk{index},id=dev-disk{index},vdev={}", guest_name(bus, index)),
    };
    if device.is_bootable() {
        // QEMU refuses two devices with one index, and devices of a mapping have different orders.
        text.push_str(&format!(",bootindex={}", u64::from(device.boot_order) + 1));
    }
    text
}
