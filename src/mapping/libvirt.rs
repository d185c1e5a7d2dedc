//! libvirt: `<disk>` elements for the `<devices>` of a domain (<https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms>).
//!
//! Formats are always stated, along the whole backing chain, and the chain is closed by an empty `<backingStore/>`: libvirt then probes nothing.

use std::fmt::Write;

use super::{
    Backing, Bus, Device, Mapping,
    names::{expressible, guest_name, no_bus, serial},
};
use crate::error::Result;

/// All devices of the mapping, one element after another in boot order.
pub fn disks(mapping: &Mapping, bus: Bus) -> Result<String> {
    mapping.devices.iter().enumerate().map(|(index, device)| disk(device, index, bus)).collect()
}

/// One device; `index` is its place in the mapping.
pub fn disk(device: &Device, index: usize, bus: Bus) -> Result<String> {
    let format = device.image_format();
    let mut xml = String::new();
    let (kind, attribute) = if device.is_block_device() { ("block", "dev") } else { ("file", "file") };
    let bus_name = match bus {
        Bus::Xen => "xen",
        Bus::Virtio => "virtio",
        Bus::Scsi => "scsi",
        Bus::Nvme => return Err(no_bus(device, "libvirt attaches no NVMe disks of its own: use virtio or scsi")),
    };
    let mut line = |depth: usize, text: String| writeln!(xml, "{:width$}{text}", "", width = depth * 2).expect("writing to a string");
    line(0, format!("<disk type='{kind}' device='disk'>"));
    line(1, format!("<driver name='qemu' type='{format}'/>"));
    line(1, format!("<source {attribute}='{}'/>", escape(expressible(&device.volume.device)?)));
    if format != "raw" {
        backing_store(&device.backing_chain, &mut line)?;
    }
    line(1, format!("<target dev='{}' bus='{bus_name}'/>", guest_name(bus, index)));
    if device.read_only {
        line(1, "<readonly/>".into());
    }
    line(1, format!("<serial>{}</serial>", escape(&serial(device, index))));
    if device.is_bootable() {
        // libvirt counts from 1.
        line(1, format!("<boot order='{}'/>", u64::from(device.boot_order) + 1));
    }
    line(0, "</disk>".into());
    Ok(xml)
}

/// The nested elements for what is behind the image, and the empty one that ends them.
fn backing_store(chain: &[Backing], line: &mut impl FnMut(usize, String)) -> Result<()> {
    for (depth, backing) in chain.iter().enumerate() {
        line(depth + 1, "<backingStore type='file'>".into());
        line(depth + 2, format!("<format type='{}'/>", escape(&backing.format)));
        line(depth + 2, format!("<source file='{}'/>", escape(expressible(&backing.path)?)));
    }
    line(chain.len() + 1, "<backingStore/>".into());
    for depth in (0..chain.len()).rev() {
        line(depth + 1, "</backingStore>".into());
    }
    Ok(())
}

/// For element content and for attributes in either kind of quotes. The caller has refused control characters, which can't be escaped.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}
