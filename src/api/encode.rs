//! Rows and values of the daemon as protocol messages.

use std::path::Path;

use crate::{
    config::PlatformConfig,
    disk::Layout,
    error::{Error, Result, Stage},
    mapping::{self, Role},
    names::{PoolName, VolumeName},
    proto,
    render::{devices::ResolvedDevice, jobs::Snapshot},
    store::{
        catalog::owners::callers_key,
        records::{FailureRecord, GoldenRecord, RenderState, VolumeRecord},
    },
    target::{self, VolumeFormat},
};

/// Seconds since 1970 as a timestamp.
pub fn timestamp(secs: i64) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: secs, nanos: 0 }
}

/// Milliseconds since 1970 as a timestamp.
pub fn timestamp_ms(ms: i64) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: ms.div_euclid(1000), nanos: (ms.rem_euclid(1000) * 1_000_000) as i32 }
}

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A volume format.
pub fn format(format: VolumeFormat) -> proto::VolumeFormat {
    match format {
        VolumeFormat::Raw => proto::VolumeFormat::Raw,
        VolumeFormat::Qcow2Overlay => proto::VolumeFormat::Qcow2Overlay,
        VolumeFormat::Qcow2 => proto::VolumeFormat::Qcow2,
        VolumeFormat::Block => proto::VolumeFormat::Block,
        VolumeFormat::Loop => proto::VolumeFormat::Loop,
    }
}

/// A layout.
pub fn layout(layout: Layout) -> proto::DiskLayout {
    match layout {
        Layout::Bare => proto::DiskLayout::Bare,
        Layout::Gpt => proto::DiskLayout::Gpt,
        Layout::Hybrid => proto::DiskLayout::Hybrid,
    }
}

/// A render.
pub fn render(snapshot: Snapshot) -> proto::Render {
    let Snapshot { record, reading } = snapshot;
    let running = record.state == RenderState::Running;
    let reading = reading.filter(|_| running);
    let stage = reading.and_then(|reading| reading.stage).map_or(record.stage, |stage| stage.name().to_owned());
    proto::Render {
        id: record.id,
        idempotency_key: callers_key(&record.key).to_owned(),
        image_id: record.image_id,
        instance: record.instance.unwrap_or_default(),
        volume: record.volume.map(|(pool, name)| proto::VolumeRef { pool, name }),
        state: match record.state {
            RenderState::Queued => proto::RenderState::Queued,
            RenderState::Running => proto::RenderState::Running,
            RenderState::Succeeded => proto::RenderState::Succeeded,
            RenderState::Failed => proto::RenderState::Failed,
            RenderState::Cancelled => proto::RenderState::Cancelled,
        } as i32,
        stage,
        bytes_done: reading.map_or(0, |reading| reading.bytes_done),
        bytes_total: reading.map_or(0, |reading| reading.bytes_total),
        eta: reading
            .and_then(|reading| reading.eta())
            .map(|eta| prost_types::Duration { seconds: eta.as_secs() as i64, nanos: eta.subsec_nanos() as i32 }),
        error: record.failure.map(failure),
        created_at: Some(timestamp_ms(record.created_ms)),
        started_at: record.started_ms.map(timestamp_ms),
        finished_at: record.finished_ms.map(timestamp_ms),
        golden_key: record.golden_key.map(|key| key.hex()).unwrap_or_default(),
    }
}

fn failure(failure: FailureRecord) -> proto::RenderError {
    let FailureRecord { code, reason, message, hint, stage, retryable } = failure;
    proto::RenderError { code, reason, message, hint, stage, retryable }
}

/// A golden image.
pub fn golden(golden: GoldenRecord, backed_volumes: u32, dir: &Path) -> proto::Golden {
    proto::Golden {
        key: golden.key.hex(),
        digest: golden.digest.to_string(),
        image_id: golden.image_id,
        filesystem: golden.spec.filesystem.name().to_owned(),
        layout: layout(golden.spec.layout) as i32,
        size_bytes: golden.spec.size_bytes,
        allocated_size_bytes: golden.allocated,
        backed_volumes,
        created_at: Some(timestamp(golden.created)),
        last_used_at: Some(timestamp(golden.last_used)),
        path: path_text(&dir.join("disk.raw")),
    }
}

/// A volume.
pub fn volume(record: &VolumeRecord) -> proto::Volume {
    let root = record.root.as_ref().map(|(pool, name)| volume_ref(pool, name));
    volume_of(&record.volume, &record.mapping, record.role, root)
}

fn volume_ref(pool: &PoolName, name: &VolumeName) -> proto::VolumeRef {
    proto::VolumeRef { pool: pool.to_string(), name: name.to_string() }
}

fn volume_of(volume: &target::Volume, mapping: &mapping::Mapping, role: Role, root: Option<proto::VolumeRef>) -> proto::Volume {
    proto::Volume {
        r#ref: Some(volume_ref(&volume.pool, &volume.name)),
        format: format(volume.format) as i32,
        path: path_text(&volume.path),
        device: path_text(&volume.device),
        virtual_size_bytes: volume.virtual_size_bytes,
        allocated_size_bytes: volume.allocated_size_bytes,
        instance: mapping.instance.to_string(),
        image_id: mapping.image_id.clone(),
        render_id: mapping.render_id.clone(),
        created_at: Some(timestamp(mapping.created_secs)),
        role: device_role(role) as i32,
        root,
    }
}

/// What a device is for.
pub fn device_role(role: Role) -> proto::DeviceRole {
    match role {
        Role::Root => proto::DeviceRole::Root,
        Role::Data => proto::DeviceRole::Data,
        Role::Swap => proto::DeviceRole::Swap,
        Role::Scratch => proto::DeviceRole::Scratch,
        Role::Seed => proto::DeviceRole::Seed,
    }
}

/// A device of a plan.
pub fn planned_device(device: &ResolvedDevice) -> proto::PlannedDevice {
    proto::PlannedDevice {
        name: device.name.to_string(),
        role: device_role(device.role) as i32,
        volume: Some(volume_ref(&device.pool.name, &device.volume)),
        kept: device.kept().is_some(),
    }
}

/// A mapping.
pub fn mapping(mapping: &mapping::Mapping) -> proto::Mapping {
    let identity = &mapping.identity;
    proto::Mapping {
        platforms: mapping.platforms.clone(),
        instance: mapping.instance.to_string(),
        render_id: mapping.render_id.clone(),
        image_id: mapping.image_id.clone(),
        devices: mapping.devices.iter().enumerate().map(|(index, device)| device_of(index, device, mapping)).collect(),
        identity: Some(proto::GuestIdentity {
            instance_uuid: identity.instance_uuid.clone(),
            machine_id: identity.machine_id.clone(),
            hostname: identity.hostname.clone().unwrap_or_default(),
            ssh_fingerprints: identity.ssh_fingerprints.clone(),
            known_hosts: identity.known_hosts.clone(),
            sshfp: identity.sshfp.clone(),
        }),
        nics: mapping.nics.iter().map(|nic| proto::Nic { name: nic.name.clone(), mac: nic.mac.to_string() }).collect(),
        injected_json: mapping.injected.to_string(),
        created_at: Some(timestamp(mapping.created_secs)),
    }
}

fn device_of(index: usize, device: &mapping::Device, whole: &mapping::Mapping) -> proto::Device {
    let guest_name = |bus| mapping::names::guest_name(bus, index);
    let root = whole.devices.first().filter(|first| first.role == Role::Root && device.role != Role::Root);
    let root = root.map(|root| volume_ref(&root.volume.pool, &root.volume.name));
    proto::Device {
        name: device.name.clone(),
        mount: device.mount.clone().unwrap_or_default(),
        role: device_role(device.role) as i32,
        boot_order: device.boot_order,
        volume: Some(volume_of(&device.volume, whole, device.role, root)),
        read_only: device.read_only,
        xen_name: guest_name(mapping::Bus::Xen),
        virtio_name: guest_name(mapping::Bus::Virtio),
        scsi_name: guest_name(mapping::Bus::Scsi),
        format: match device.volume.format {
            VolumeFormat::Qcow2 | VolumeFormat::Qcow2Overlay => "qcow2",
            VolumeFormat::Raw | VolumeFormat::Block | VolumeFormat::Loop => "raw",
        }
        .to_owned(),
        backing_chain: device
            .backing_chain
            .iter()
            .map(|backing| proto::Backing { path: path_text(&backing.path), format: backing.format.clone() })
            .collect(),
        golden_digest: device.golden_digest.map(|digest| digest.to_string()).unwrap_or_default(),
        golden_key: device.golden_key.clone().unwrap_or_default(),
        partition_table: device.partition_table.clone().unwrap_or_default(),
        disk_uuid: device.disk_uuid.clone().unwrap_or_default(),
        partitions: device
            .partitions
            .iter()
            .map(|partition| proto::Partition {
                number: partition.number,
                offset_bytes: partition.offset_bytes,
                size_bytes: partition.size_bytes,
                type_uuid: partition.type_uuid.clone(),
                uuid: partition.uuid.clone(),
                name: partition.name.clone(),
            })
            .collect(),
        filesystem: device.filesystem.as_ref().map(|filesystem| proto::Filesystem {
            r#type: filesystem.kind.name().to_owned(),
            uuid: filesystem.uuid.clone(),
            label: filesystem.label.clone(),
            offset_bytes: filesystem.offset_bytes,
            size_bytes: filesystem.size_bytes,
        }),
    }
}

/// A configured platform.
pub fn platform(config: &PlatformConfig) -> proto::Platform {
    let platform = config.platform();
    proto::Platform {
        name: config.name.to_string(),
        hypervisor: platform.hypervisor.name().to_owned(),
        mode: platform.mode.name().to_owned(),
        firmware: platform.firmware.name().to_owned(),
        arch: platform.arch.clone(),
        bus: platform.bus.name().to_owned(),
        consoles: platform.consoles().into_iter().map(|console| console.name().to_owned()).collect(),
        secure_boot: platform.secure_boot,
        cpus: config.cpus,
        memory_bytes: config.memory.0,
        nested_virtualization: config.nested_virtualization,
        bridge: config.bridge.clone(),
        region: config.region.clone(),
        endpoint: config.endpoint.clone(),
    }
}

/// A mapping as JSON text.
pub fn mapping_json(mapping: &mapping::Mapping) -> Result<String> {
    serde_json::to_string_pretty(mapping).map_err(|error| Error::internal(Stage::Report, "mapping", "encode as JSON").with_source(error))
}

/// Who signed.
pub fn signer(signer: crate::trust::Signer) -> proto::Signer {
    let method = match signer.method {
        crate::trust::Method::Openpgp => "openpgp",
        crate::trust::Method::Minisign => "minisign",
    };
    proto::Signer { method: method.to_owned(), key: signer.key, made_at: signer.made.map(timestamp) }
}
