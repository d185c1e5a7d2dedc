use std::path::Path;

use super::*;
use crate::error::Kind;

fn device(role: Role, boot_order: u32, format: VolumeFormat, path: &str) -> Device {
    Device {
        role,
        boot_order,
        volume: Volume {
            pool: "fast".parse().expect("pool"),
            name: "web-1".parse().expect("volume"),
            format,
            path: path.into(),
            device: path.into(),
            virtual_size_bytes: (10 << 30) + 4096,
            allocated_size_bytes: 4096,
            backing: None,
            pinned: None,
            options: Default::default(),
        },
        read_only: false,
        backing_chain: Vec::new(),
        golden_digest: None,
        golden_key: None,
        partition_table: None,
        disk_uuid: None,
        partitions: Vec::new(),
        filesystem: None,
        name: role.name().into(),
        mount: None,
    }
}

/// An overlay root, a block device for data, a read-only seed and a scratch file with an ugly name.
pub(super) fn mapping() -> Mapping {
    let mut root = device(Role::Root, 0, VolumeFormat::Qcow2Overlay, "/srv/a b/web-1.qcow2");
    root.backing_chain = vec![Backing { path: "/store/golden,1.raw".into(), format: "raw".into() }];
    root.golden_digest = Some(Digest::of(b"golden"));
    let mut seed = device(Role::Seed, 2, VolumeFormat::Raw, "/srv/seed.raw");
    seed.read_only = true;
    Mapping {
        version: MAPPING_VERSION,
        instance: "web-1".parse().expect("name"),
        render_id: "r1".into(),
        image_id: "img-1".into(),
        devices: vec![
            root,
            device(Role::Data, 1, VolumeFormat::Block, "/dev/vg0/web-1"),
            seed,
            device(Role::Scratch, 3, VolumeFormat::Qcow2, "/srv/\"it's\" <a> & b\\c.qcow2"),
        ],
        platforms: Vec::new(),
        nics: vec![Nic { name: "eth0".into(), mac: MacAddr([0x52, 0x54, 0, 1, 2, 3]) }],
        identity: GuestIdentity {
            instance_uuid: "u".into(),
            machine_id: "m".into(),
            hostname: None,
            ssh_fingerprints: Vec::new(),
            known_hosts: Vec::new(),
            sshfp: Vec::new(),
        },
        injected: serde_json::Value::Null,
        created_secs: 1_700_000_000,
    }
}

#[test]
fn libvirt_states_every_format_and_escapes_paths() {
    let xml = Dialect::Libvirt.render(&mapping(), Bus::Virtio).expect("rendered");
    let expected = "\
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/srv/a b/web-1.qcow2'/>
  <backingStore type='file'>
    <format type='raw'/>
    <source file='/store/golden,1.raw'/>
    <backingStore/>
  </backingStore>
  <target dev='vda' bus='virtio'/>
  <serial>root</serial>
  <boot order='1'/>
</disk>
<disk type='block' device='disk'>
  <driver name='qemu' type='raw'/>
  <source dev='/dev/vg0/web-1'/>
  <target dev='vdb' bus='virtio'/>
  <serial>data-1</serial>
  <boot order='2'/>
</disk>
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/>
  <source file='/srv/seed.raw'/>
  <target dev='vdc' bus='virtio'/>
  <readonly/>
  <serial>seed-2</serial>
</disk>
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/srv/&quot;it&apos;s&quot; &lt;a&gt; &amp; b\\c.qcow2'/>
  <backingStore/>
  <target dev='vdd' bus='virtio'/>
  <serial>scratch-3</serial>
</disk>
";
    assert_eq!(xml, expected);
}

#[test]
fn xl_puts_the_target_last_and_quotes_it() {
    let text = Dialect::Xl.render(&mapping(), Bus::Xen).expect("rendered");
    let expected = r#"disk = [
  'format=qcow2, vdev=xvda, access=rw, target=/srv/a b/web-1.qcow2',
  'format=raw, vdev=xvdb, access=rw, target=/dev/vg0/web-1',
  'format=raw, vdev=xvdc, access=ro, target=/srv/seed.raw',
  'format=qcow2, vdev=xvdd, access=rw, target=/srv/"it\'s" <a> & b\\c.qcow2',
]
"#;
    assert_eq!(text, expected);
    assert_eq!(Dialect::Xl.render(&mapping(), Bus::Virtio).expect_err("no such bus").reason(), "BUS_NOT_EXPRESSIBLE");
}

#[test]
fn qemu_gets_one_node_per_file_and_closed_chains() {
    let arguments = qemu::arguments(&mapping(), Bus::Virtio).expect("rendered");
    let nodes: Vec<serde_json::Value> =
        arguments.chunks(2).filter(|pair| pair[0] == "-blockdev").map(|pair| serde_json::from_str(&pair[1]).expect("JSON")).collect();
    let expected = serde_json::json!([
        {"driver": "file", "node-name": "disk0-back0-file", "filename": "/store/golden,1.raw", "read-only": true},
        {"driver": "raw", "node-name": "disk0-back0", "file": "disk0-back0-file", "read-only": true},
        {"driver": "file", "node-name": "disk0-file", "filename": "/srv/a b/web-1.qcow2", "read-only": false, "discard": "unmap"},
        {"driver": "qcow2", "node-name": "disk0", "file": "disk0-file", "read-only": false, "backing": "disk0-back0", "discard": "unmap"},
        {"driver": "host_device", "node-name": "disk1-file", "filename": "/dev/vg0/web-1", "read-only": false, "discard": "unmap"},
        {"driver": "raw", "node-name": "disk1", "file": "disk1-file", "read-only": false, "discard": "unmap"},
        {"driver": "file", "node-name": "disk2-file", "filename": "/srv/seed.raw", "read-only": true, "discard": "unmap"},
        {"driver": "raw", "node-name": "disk2", "file": "disk2-file", "read-only": true},
        {"driver": "file", "node-name": "disk3-file", "filename": "/srv/\"it's\" <a> & b\\c.qcow2", "read-only": false, "discard": "unmap"},
        {"driver": "qcow2", "node-name": "disk3", "file": "disk3-file", "read-only": false, "backing": null, "discard": "unmap"},
    ]);
    assert_eq!(serde_json::Value::from(nodes), expected);
    let frontends = |bus| -> Vec<String> {
        let arguments = qemu::arguments(&mapping(), bus).expect("rendered");
        arguments.chunks(2).filter(|pair| pair[0] == "-device").map(|pair| pair[1].clone()).collect()
    };
    assert_eq!(
        frontends(Bus::Virtio)[..2],
        ["virtio-blk-pci,drive=disk0,id=dev-disk0,serial=root,bootindex=1", "virtio-blk-pci,drive=disk1,id=dev-disk1,serial=data-1,bootindex=2"]
    );
    assert_eq!(
        frontends(Bus::Scsi)[..2],
        ["virtio-scsi-pci,id=scsi0", "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0,drive=disk0,id=dev-disk0,serial=root,bootindex=1"]
    );
    assert_eq!(frontends(Bus::Xen)[0], "xen-disk,drive=disk0,id=dev-disk0,vdev=xvda");
}

#[test]
fn ec2_has_the_shape_of_describe_images() {
    let document = ec2::document(&mapping(), Bus::Xen).expect("rendered");
    assert_eq!(document["RootDeviceName"], "/dev/xvda");
    assert_eq!(document["ImageId"], "img-1");
    let devices = document["BlockDeviceMappings"].as_array().expect("devices");
    let snapshot = format!("snap-{}", &Digest::of(b"golden").hex()[..17]);
    assert_eq!(devices[0]["Ebs"], serde_json::json!({"VolumeSize": 11, "DeleteOnTermination": true, "Encrypted": false, "SnapshotId": snapshot}));
    assert_eq!(devices[1]["Ebs"]["DeleteOnTermination"], false, "data outlives the root");
    assert_eq!((&devices[3]["DeviceName"], &devices[3]["VirtualName"]), (&"/dev/xvdd".into(), &"ephemeral0".into()));
    assert!(devices[3].get("Ebs").is_none());
    assert_eq!(devices[0][ec2::VENDOR_KEY]["BackingChain"][0]["Path"], "/store/golden,1.raw");
}

#[test]
fn every_dialect_refuses_a_path_it_cannot_write() {
    for path in ["/srv/a\nb", "relative/disk.raw"] {
        let mut mapping = mapping();
        mapping.devices[0].volume.device = Path::new(path).into();
        for dialect in [Dialect::Libvirt, Dialect::Xl, Dialect::Qemu, Dialect::Ec2] {
            let error = dialect.render(&mapping, Bus::Xen).expect_err("refused");
            assert_eq!((error.kind(), error.reason()), (Kind::Unsupported, "PATH_NOT_EXPRESSIBLE"), "{dialect:?} {path:?}");
        }
    }
    let mut mapping = mapping();
    mapping.devices[0].backing_chain[0].path = Path::new("/golden\t").into();
    assert!(Dialect::Libvirt.render(&mapping, Bus::Xen).is_err());
    assert!(Dialect::Qemu.render(&mapping, Bus::Xen).is_err());
}

#[test]
fn a_mapping_survives_its_serialised_form() {
    let mapping = mapping();
    let text = serde_json::to_string(&mapping).expect("serialised");
    assert_eq!(serde_json::from_str::<Mapping>(&text).expect("read back"), mapping);
}
