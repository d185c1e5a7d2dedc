//! EC2: a document shaped as one image of DescribeImages, for tools and guests that know block-device mappings from there.
//!
//! Devices that outlive a stop are `Ebs`, swap and scratch are instance storage (`VirtualName: ephemeralN`), as in an EC2 image. `VolumeSize` is in
//! GiB, rounded up, as EC2 counts. `SnapshotId` has EC2's form and is made from the golden's digest: equal goldens, equal ids. What EC2 has no
//! field for is under [`VENDOR_KEY`], per document and per device, and EC2's clients ignore it.

use serde_json::{Map, Value, json};

use super::{
    Bus, Device, Mapping, Role,
    names::{expressible, guest_name, serial},
};
use crate::{error::Result, units::GIB};

/// Where our own fields are.
pub const VENDOR_KEY: &str = "Cloudletd";

/// The document.
pub fn document(mapping: &Mapping, bus: Bus) -> Result<Value> {
    let mut ephemeral = 0;
    let mut devices = Vec::with_capacity(mapping.devices.len());
    for (index, device) in mapping.devices.iter().enumerate() {
        let mut entry = Map::new();
        entry.insert("DeviceName".into(), device_name(bus, index).into());
        if matches!(device.role, Role::Swap | Role::Scratch) {
            entry.insert("VirtualName".into(), format!("ephemeral{ephemeral}").into());
            ephemeral += 1;
        } else {
            entry.insert("Ebs".into(), ebs(device));
        }
        entry.insert(VENDOR_KEY.into(), vendor(device, index)?);
        devices.push(Value::Object(entry));
    }
    let root = mapping.devices.iter().position(|device| device.role == Role::Root);
    Ok(json!({
        "ImageId": mapping.image_id,
        "RootDeviceType": "ebs",
        "RootDeviceName": root.map(|index| device_name(bus, index)),
        "BlockDeviceMappings": devices,
        VENDOR_KEY: {
            "Version": mapping.version,
            "Instance": mapping.instance.as_str(),
            "RenderId": mapping.render_id,
            "CreatedSecs": mapping.created_secs,
        },
    }))
}

fn device_name(bus: Bus, index: usize) -> String {
    format!("/dev/{}", guest_name(bus, index))
}

fn ebs(device: &Device) -> Value {
    let mut ebs = json!({
        "VolumeSize": device.volume.virtual_size_bytes.div_ceil(GIB),
        "DeleteOnTermination": device.role != Role::Data,
        "Encrypted": false,
    });
    if let Some(digest) = &device.golden_digest {
        // EC2's ids end in 17 hexadecimal digits.
        ebs["SnapshotId"] = format!("snap-{}", &digest.hex()[..17]).into();
    }
    ebs
}

fn vendor(device: &Device, index: usize) -> Result<Value> {
    let backing: Result<Vec<Value>> =
        device.backing_chain.iter().map(|file| Ok(json!({ "Path": expressible(&file.path)?, "Format": file.format }))).collect();
    Ok(json!({
        "Role": device.role.name(),
        "Pool": device.volume.pool.as_str(),
        "Volume": device.volume.name.as_str(),
        "Path": expressible(&device.volume.device)?,
        "Format": device.image_format(),
        "SizeBytes": device.volume.virtual_size_bytes,
        "ReadOnly": device.read_only,
        "BootOrder": device.boot_order,
        "Serial": serial(device, index),
        "BackingChain": backing?,
        "GoldenDigest": device.golden_digest.map(|digest| digest.to_string()),
        "DiskUuid": device.disk_uuid,
        "PartitionTable": device.partition_table,
        "Partitions": device.partitions,
        "Filesystem": device.filesystem,
    }))
}
