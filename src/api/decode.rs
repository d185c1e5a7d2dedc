//! Requests as values of the daemon: every field is parsed here and an error names it; cross-field rules are `guest::validate`'s.

mod network;
mod setup;

use std::str::FromStr;

use serde_json::{Map, Value, json};

use crate::{
    disk::Layout,
    error::{Error, Result, Stage},
    fs::{FsKind, Profile},
    guest::{
        self,
        cloud_seed::{SeedFormat, SeedSpec, USER_DATA_LEN_MAX},
        config::{AuthorizedKeys, HostKeys, InjectedFile, InstanceConfig, Secret},
    },
    mapping::Role,
    names::{Digest, GuestPath, InstanceName, PoolName},
    proto,
    spec::{DeviceSpec, GoldenOptions, RenderSpec},
    target::{BackingPath, Compression, DirectIo, Preallocation, VolumeFormat, VolumeOptions, ZeroPolicy},
    units::{Bytes, PATCH_BLOCK, round_up},
};

/// Platforms that one disk may be asked to start on: more than any provider has kinds of them.
const PLATFORMS_MAX: usize = 64;

fn parsed<T: FromStr<Err = String>>(field: &str, text: &str) -> Result<T> {
    if text.is_empty() {
        return Err(Error::field(Stage::Request, field, "is required"));
    }
    text.parse().map_err(|why: String| Error::field(Stage::Request, field, why))
}

fn optional<T: FromStr<Err = String>>(field: &str, text: &str) -> Result<Option<T>> {
    if text.is_empty() { Ok(None) } else { parsed(field, text).map(Some) }
}

fn list<T, U>(field: &str, items: &[T], decode: impl Fn(&str, &T) -> Result<U>) -> Result<Vec<U>> {
    items.iter().enumerate().map(|(index, item)| decode(&format!("{field}[{index}]"), item)).collect()
}

/// A render spec; fields are named as in the request, from `spec.`.
pub fn render_spec(spec: Option<proto::RenderSpec>) -> Result<RenderSpec> {
    let spec = spec.ok_or_else(|| Error::field(Stage::Request, "spec", "is required"))?;
    let volume = spec.volume.clone().ok_or_else(|| Error::field(Stage::Request, "spec.volume", "is required"))?;
    if spec.image_id.is_empty() {
        return Err(Error::field(Stage::Request, "spec.image_id", "is required"));
    }
    let message = spec.instance.clone().ok_or_else(|| Error::field(Stage::Request, "spec.instance", "is required"))?;
    let instance = instance("spec.instance", &message)?;
    guest::validate::validate(&instance).map_err(|error| error.under_field("spec.instance"))?;
    Ok(RenderSpec {
        pool: parsed("spec.volume.pool", &volume.pool)?,
        volume: parsed("spec.volume.name", &volume.name)?,
        golden: GoldenOptions { platforms: platforms(&spec.platforms, "spec.platforms")?, ..golden_options(spec.golden.clone(), "spec.golden")? },
        size_bytes: (spec.size_bytes > 0).then(|| round_up(spec.size_bytes, PATCH_BLOCK)),
        overwrite: spec.overwrite,
        format: format("spec.format", spec.format)?,
        options: volume_options("spec.options", spec.options)?,
        replace: spec.replace,
        devices: list("spec.devices", &spec.devices, device)?,
        canonical: canonical(&spec, &message, &instance),
        image_id: spec.image_id,
        instance,
    })
}

fn format(field: &str, format: i32) -> Result<Option<VolumeFormat>> {
    Ok(match proto::VolumeFormat::try_from(format) {
        Ok(proto::VolumeFormat::Unspecified) => None,
        Ok(proto::VolumeFormat::Raw) => Some(VolumeFormat::Raw),
        Ok(proto::VolumeFormat::Qcow2Overlay) => Some(VolumeFormat::Qcow2Overlay),
        Ok(proto::VolumeFormat::Qcow2) => Some(VolumeFormat::Qcow2),
        Ok(proto::VolumeFormat::Block) => Some(VolumeFormat::Block),
        Ok(proto::VolumeFormat::Loop) => Some(VolumeFormat::Loop),
        Err(_) => return Err(Error::field(Stage::Request, field, format!("{format} is not a format"))),
    })
}

fn volume_options(field: &str, message: Option<proto::VolumeOptions>) -> Result<VolumeOptions> {
    let Some(message) = message else { return Ok(VolumeOptions::default()) };
    let unknown =
        |name: &str, number: i32| Err(Error::field(Stage::Request, format!("{field}.{name}"), format!("{number} is not one of its values")));
    Ok(VolumeOptions {
        cluster_size: (message.cluster_size_bytes > 0).then(|| Bytes(message.cluster_size_bytes.into())),
        extended_l2: message.extended_l2,
        lazy_refcounts: message.lazy_refcounts,
        backing_path: match proto::BackingPath::try_from(message.backing_path) {
            Ok(proto::BackingPath::Unspecified) => None,
            Ok(proto::BackingPath::Absolute) => Some(BackingPath::Absolute),
            Ok(proto::BackingPath::Relative) => Some(BackingPath::Relative),
            Err(_) => return unknown("backing_path", message.backing_path),
        },
        compression: match proto::Compression::try_from(message.compression) {
            Ok(proto::Compression::Unspecified) => None,
            Ok(proto::Compression::None) => Some(Compression::None),
            Ok(proto::Compression::Zlib) => Some(Compression::Zlib),
            Ok(proto::Compression::Zstd) => Some(Compression::Zstd),
            Err(_) => return unknown("compression", message.compression),
        },
        preallocation: match proto::Preallocation::try_from(message.preallocation) {
            Ok(proto::Preallocation::Unspecified) => None,
            Ok(proto::Preallocation::Sparse) => Some(Preallocation::Sparse),
            Ok(proto::Preallocation::Falloc) => Some(Preallocation::Falloc),
            Ok(proto::Preallocation::Full) => Some(Preallocation::Full),
            Err(_) => return unknown("preallocation", message.preallocation),
        },
        zero_policy: match proto::ZeroPolicy::try_from(message.zero_policy) {
            Ok(proto::ZeroPolicy::Unspecified) => None,
            Ok(proto::ZeroPolicy::Auto) => Some(ZeroPolicy::Auto),
            Ok(proto::ZeroPolicy::ZeroOut) => Some(ZeroPolicy::ZeroOut),
            Ok(proto::ZeroPolicy::Discard) => Some(ZeroPolicy::Discard),
            Ok(proto::ZeroPolicy::Write) => Some(ZeroPolicy::Write),
            Ok(proto::ZeroPolicy::Keep) => Some(ZeroPolicy::Keep),
            Err(_) => return unknown("zero_policy", message.zero_policy),
        },
        read_only: message.loop_read_only,
        partition_scan: message.loop_partition_scan,
        direct_io: message.loop_direct_io.map(|on| if on { DirectIo::On } else { DirectIo::Off }),
        verify: message.verify,
    })
}

fn seed(field: &str, message: &proto::SeedSpec) -> Result<SeedSpec> {
    for (name, bytes) in [("user_data", &message.user_data), ("vendor_data", &message.vendor_data)] {
        if bytes.len() > USER_DATA_LEN_MAX {
            let why = format!("has {} bytes, the limit is {USER_DATA_LEN_MAX}", bytes.len());
            return Err(Error::field(Stage::Request, format!("{field}.{name}"), why));
        }
    }
    Ok(SeedSpec {
        format: match proto::SeedFormat::try_from(message.format) {
            Ok(proto::SeedFormat::Unspecified | proto::SeedFormat::Nocloud) => SeedFormat::NoCloud,
            Ok(proto::SeedFormat::ConfigDrive) => SeedFormat::ConfigDrive,
            Err(_) => return Err(Error::field(Stage::Request, format!("{field}.format"), format!("{} is not a format of seeds", message.format))),
        },
        user_data: Secret::new(message.user_data.clone()),
        vendor_data: Secret::new(message.vendor_data.clone()),
    })
}

/// A device for comparing requests: what may be secret in it is there as a digest.
fn canonical_device(device: &proto::DeviceSpec) -> String {
    let mut device = device.clone();
    if let Some(seed) = &mut device.seed {
        seed.user_data = Digest::of(&seed.user_data).as_bytes().to_vec();
        seed.vendor_data = Digest::of(&seed.vendor_data).as_bytes().to_vec();
    }
    format!("{device:?}")
}

fn device(field: &str, message: &proto::DeviceSpec) -> Result<DeviceSpec> {
    let at = |rest: &str| format!("{field}.{rest}");
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let volume = message.volume.clone().unwrap_or_default();
    Ok(DeviceSpec {
        name: optional(&at("name"), &message.name)?,
        role: match proto::DeviceRole::try_from(message.role) {
            Ok(proto::DeviceRole::Unspecified) => None,
            Ok(proto::DeviceRole::Root) => Some(Role::Root),
            Ok(proto::DeviceRole::Data) => Some(Role::Data),
            Ok(proto::DeviceRole::Swap) => Some(Role::Swap),
            Ok(proto::DeviceRole::Scratch) => Some(Role::Scratch),
            Ok(proto::DeviceRole::Seed) => Some(Role::Seed),
            Err(_) => return Err(Error::field(Stage::Request, at("role"), format!("{} is not a role", message.role))),
        },
        pool: optional(&at("volume.pool"), &volume.pool)?,
        volume: optional(&at("volume.name"), &volume.name)?,
        format: format(&at("format"), message.format)?,
        size_bytes: (message.size_bytes > 0).then(|| round_up(message.size_bytes, PATCH_BLOCK)),
        filesystem: filesystem(&at("filesystem"), &message.filesystem)?,
        label: text(&message.label),
        mount: optional(&at("mount"), &message.mount)?,
        mount_options: text(&message.mount_options),
        persistent: message.persistent,
        overwrite: message.overwrite,
        options: volume_options(&at("options"), message.options)?,
        seed: message.seed.as_ref().map(|message| seed(&at("seed"), message)).transpose()?,
    })
}

fn filesystem(field: &str, text: &str) -> Result<Option<FsKind>> {
    let kind = (!text.is_empty()).then(|| serde_json::from_value(json!(text))).transpose();
    kind.map_err(|_| Error::field(Stage::Request, field, format!("{text:?} is not ext4, xfs or btrfs")))
}

/// Options of a golden image; `field` is where they stand in the request.
pub fn golden_options(options: Option<proto::GoldenOptions>, field: &str) -> Result<GoldenOptions> {
    let options = options.unwrap_or_default();
    let word = |text: &str| (!text.is_empty()).then(|| json!(text));
    let profile = word(&options.profile).map(serde_json::from_value::<Profile>).transpose();
    Ok(GoldenOptions {
        filesystem: filesystem(&format!("{field}.filesystem"), &options.filesystem)?,
        profile: profile.map_err(|_| {
            Error::field(Stage::Request, format!("{field}.profile"), format!("{:?} is not modern, grub206 or compat", options.profile))
        })?,
        layout: match proto::DiskLayout::try_from(options.layout) {
            Ok(proto::DiskLayout::Unspecified) => None,
            Ok(proto::DiskLayout::Bare) => Some(Layout::Bare),
            Ok(proto::DiskLayout::Gpt) => Some(Layout::Gpt),
            Ok(proto::DiskLayout::Hybrid) => Some(Layout::Hybrid),
            Err(_) => return Err(Error::field(Stage::Request, format!("{field}.layout"), format!("{} is not a layout", options.layout))),
        },
        size_bytes: (options.size_bytes > 0).then_some(options.size_bytes),
        platforms: Vec::new(),
    })
}

/// Names of platforms; whether they are configured is seen later.
pub fn platforms(names: &[String], field: &str) -> Result<Vec<String>> {
    if names.len() > PLATFORMS_MAX {
        return Err(Error::field(Stage::Request, field, format!("names {} platforms, the limit is {PLATFORMS_MAX}", names.len())));
    }
    list(field, names, |field, name| parsed::<PoolName>(field, name).map(|name| name.to_string()))
}

/// The configuration in a request about an instance that is there; its policy about host keys is the caller's to set.
pub fn instance_config(field: &str, message: Option<&proto::InstanceConfig>) -> Result<InstanceConfig> {
    let message = message.ok_or_else(|| Error::field(Stage::Request, field, "is required"))?;
    let instance = instance(field, message)?;
    guest::validate::validate(&instance).map_err(|error| error.under_field(field))?;
    Ok(instance)
}

fn instance(field: &str, message: &proto::InstanceConfig) -> Result<InstanceConfig> {
    let name: InstanceName = parsed(&format!("{field}.name"), &message.name)?;
    if !message.config_json.is_empty() {
        let alone = proto::InstanceConfig { name: message.name.clone(), config_json: message.config_json.clone(), ..Default::default() };
        if *message != alone {
            return Err(Error::field(Stage::Request, format!("{field}.config_json"), "is exclusive with all other fields but name"));
        }
        let decoded = guest::decode::from_json(message.config_json.as_bytes(), Some(&name))
            .map_err(|error| error.under_field(&format!("{field}.config_json")))?;
        return Ok(decoded.config);
    }
    let at = |rest: &str| format!("{field}.{rest}");
    let secret = |text: &str| (!text.is_empty()).then(|| Secret::new(text));
    Ok(InstanceConfig {
        hostname: optional(&at("hostname"), &message.hostname)?,
        args: message.args.as_ref().map(struct_of).unwrap_or_default(),
        network: message.network.as_ref().map(|message| network::network(&at("network"), message)).transpose()?,
        authorized_keys: list(&at("authorized_keys"), &message.authorized_keys, |_, keys| {
            let user = if keys.user.is_empty() { "root".to_owned() } else { keys.user.clone() };
            Ok(AuthorizedKeys { user, keys: keys.keys.clone() })
        })?,
        root_password_hash: secret(&message.root_password_hash),
        machine_id: (!message.machine_id.is_empty()).then(|| message.machine_id.clone()),
        ssh_host_keys: match message.ssh_host_keys() {
            proto::HostKeyPolicy::Unspecified | proto::HostKeyPolicy::Fresh => HostKeys::Fresh,
            proto::HostKeyPolicy::Remove => HostKeys::Remove,
            proto::HostKeyPolicy::Keep => HostKeys::Keep,
        },
        files: list(&at("files"), &message.files, file)?,
        setup: setup::setup(field, message)?,
        instance: name,
    })
}

fn file(field: &str, message: &proto::InjectedFile) -> Result<InjectedFile> {
    let path = GuestPath::new(&message.path).map_err(|why| Error::field(Stage::Request, format!("{field}.path"), why))?;
    let mode = match message.mode {
        0 => 0o644,
        mode if mode <= 0o7777 => mode as u16,
        mode => return Err(Error::field(Stage::Request, format!("{field}.mode"), format!("{mode:o} (octal) is more than 7777"))),
    };
    Ok(InjectedFile {
        path,
        content: Secret::new(message.content.clone()),
        mode,
        uid: message.uid,
        gid: message.gid,
        user: (!message.user.is_empty()).then(|| message.user.clone()),
        group: (!message.group.is_empty()).then(|| message.group.clone()),
        xattrs: setup::xattrs(&message.xattrs),
    })
}

/// A protobuf Struct as JSON. Its numbers are doubles: those that are whole become integers again, as the manifest's schema means them.
fn struct_of(message: &prost_types::Struct) -> Map<String, Value> {
    message.fields.iter().map(|(name, value)| (name.clone(), value_of(value))).collect()
}

fn value_of(value: &prost_types::Value) -> Value {
    use prost_types::value::Kind;
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(*value),
        // 2^53: beyond it a double no longer holds every integer.
        Some(Kind::NumberValue(number)) if number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0 => json!(*number as i64),
        Some(Kind::NumberValue(number)) => json!(number),
        Some(Kind::StringValue(text)) => Value::String(text.clone()),
        Some(Kind::StructValue(value)) => Value::Object(struct_of(value)),
        Some(Kind::ListValue(list)) => Value::Array(list.values.iter().map(value_of).collect()),
    }
}

/// The request for comparing: all that matters, secrets as digests, documents as digests of their text.
fn canonical(spec: &proto::RenderSpec, message: &proto::InstanceConfig, instance: &InstanceConfig) -> Value {
    let hidden = |bytes: &[u8]| if bytes.is_empty() { Value::Null } else { json!(Digest::of(bytes)) };
    let files: Vec<Value> = instance
        .files
        .iter()
        .map(|file| {
            json!({"path": file.path.to_string(), "content": hidden(file.content.expose()), "mode": file.mode, "uid": file.uid, "gid": file.gid,
            "user": file.user, "group": file.group, "xattrs": hidden(format!("{:?}", file.xattrs).as_bytes())})
        })
        .collect();
    let keys: Vec<Value> = message.authorized_keys.iter().map(|keys| json!({"user": keys.user, "keys": keys.keys})).collect();
    json!({"spec": {
        "image_id": spec.image_id,
        "volume": spec.volume.as_ref().map(|volume| json!({"pool": volume.pool, "name": volume.name})),
        "format": spec.format,
        "size_bytes": spec.size_bytes,
        "overwrite": spec.overwrite,
        "options": spec.options.as_ref().map(|options| format!("{options:?}")),
        "replace": spec.replace,
        // Absent when there are none, as in requests of versions that did not know them.
        "platforms": (!spec.platforms.is_empty()).then_some(&spec.platforms),
        "devices": spec.devices.iter().map(canonical_device).collect::<Vec<_>>(),
        "golden": spec.golden.as_ref().map(|golden| json!({
            "filesystem": golden.filesystem, "layout": golden.layout, "size_bytes": golden.size_bytes, "profile": golden.profile,
        })),
        "instance": {
            "name": message.name,
            "hostname": message.hostname,
            // Args may be secret by the manifest, which is not known here: they are compared without being kept.
            "args": message.args.as_ref().map(|args| struct_of(args).into_iter().map(|(name, value)| (name, hidden(value.to_string().as_bytes()))).collect::<Map<_, _>>()),
            "network": message.network.as_ref().map(|network| json!({
                "interfaces": network.interfaces.iter().map(|interface| format!("{interface:?}")).collect::<Vec<_>>(),
                "nameservers": network.nameservers,
                "search": network.search,
                "backend": network.backend,
                "document": hidden(network.document.as_bytes()),
            })),
            "authorized_keys": keys,
            "root_password_hash": hidden(message.root_password_hash.as_bytes()),
            "machine_id": message.machine_id,
            "ssh_host_keys": message.ssh_host_keys,
            "files": files,
            "config_json": hidden(message.config_json.as_bytes()),
            "setup": setup::canonical(message, &hidden),
        },
    }})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn spec() -> proto::RenderSpec {
        proto::RenderSpec {
            image_id: "img-0".into(),
            volume: Some(proto::VolumeRef { pool: "default".into(), name: "web1".into() }),
            instance: Some(proto::InstanceConfig {
                name: "web1".into(),
                root_password_hash: "$6$abcdefgh$".to_owned() + &"x".repeat(86),
                network: Some(proto::Network {
                    interfaces: vec![proto::Interface { name: "eth0".into(), addresses: vec!["192.0.2.10/24".into()], ..Default::default() }],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn wrong_fields_are_named_by_their_path() {
        type Break = fn(&mut proto::RenderSpec);
        let cases: [(&str, Break); 8] = [
            ("spec.image_id", |spec| spec.image_id.clear()),
            ("spec.volume", |spec| spec.volume = None),
            ("spec.volume.name", |spec| spec.volume.as_mut().expect("set").name = "../etc".into()),
            ("spec.instance.name", |spec| spec.instance.as_mut().expect("set").name = "a/b".into()),
            ("spec.instance.hostname", |spec| spec.instance.as_mut().expect("set").hostname = "a\nb".into()),
            ("spec.format", |spec| spec.format = 99),
            ("spec.golden.filesystem", |spec| spec.golden = Some(proto::GoldenOptions { filesystem: "zfs".into(), ..Default::default() })),
            ("spec.instance.network.interfaces[0].addresses[0]", |spec| {
                let network = spec.instance.as_mut().expect("set").network.as_mut().expect("set");
                network.interfaces[0].addresses[0] = "192.0.2.10/33".into();
            }),
        ];
        for (field, break_it) in cases {
            let mut wrong = spec();
            break_it(&mut wrong);
            let error = render_spec(Some(wrong)).expect_err(field);
            assert_eq!(error.kind(), Kind::InvalidRequest);
            assert_eq!(error.violations()[0].field, field);
        }
        assert!(render_spec(Some(spec())).is_ok());
    }

    #[test]
    fn the_kept_form_holds_no_secret_and_sees_every_change() {
        let one = render_spec(Some(spec())).expect("valid");
        assert!(!one.canonical.to_string().contains("$6$"), "{}", one.canonical);
        let mut other = spec();
        other.instance.as_mut().expect("set").root_password_hash.replace_range(12..13, "y");
        let other = render_spec(Some(other)).expect("valid");
        assert_eq!(crate::spec::first_difference(&one.canonical, &other.canonical).as_deref(), Some("spec.instance.root_password_hash"));
    }

    #[test]
    fn whole_numbers_stay_integers() {
        let number = |number| prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(number)) };
        assert_eq!(value_of(&number(8080.0)), json!(8080));
        assert_eq!(value_of(&number(0.5)), json!(0.5));
    }
}
