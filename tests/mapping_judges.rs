//! What libvirt's schema, QEMU and Xen's own parser make of the dialects. Needs libvirt-clients (virt-xml-validate) with libvirt0 (the schemas),
//! qemu-system-x86, qemu-utils, and xen-utils with python3 (libxlutil by ctypes); no privilege, no hypervisor.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cloudletd::mapping::{Bus, Dialect, Mapping, qemu};
use serde_json::{Value, json};

const UGLY: &str = "it's, \"a\" <b> & c:d=e \\ ü";

fn device(role: &str, order: u32, format: &str, path: &Path, read_only: bool, backing: Option<&Path>) -> Value {
    json!({
        "role": role, "boot_order": order, "read_only": read_only,
        "volume": {
            "pool": "fast", "name": "web-1", "format": format, "path": path, "device": path, "virtual_size_bytes": 8 << 20,
            "allocated_size_bytes": 0, "backing": backing, "pinned": null,
        },
        "backing_chain": backing.map(|path| json!([{"path": path, "format": "raw"}])).unwrap_or(json!([])),
        "golden_digest": null, "golden_key": null, "partition_table": null, "disk_uuid": null, "partitions": [], "filesystem": null,
    })
}

fn mapping(devices: Vec<Value>) -> Mapping {
    serde_json::from_value(json!({
        "version": 1, "instance": "web-1", "render_id": "r1", "image_id": "i1", "devices": devices, "injected": null, "created_secs": 1,
        "identity": {"instance_uuid": "u", "machine_id": "m", "hostname": null, "ssh_fingerprints": [], "known_hosts": []},
    }))
    .expect("a valid mapping")
}

/// Three real images in a directory with an ugly name: an overlay on a raw file, a standalone qcow2, a raw file.
fn images(directory: &Path) -> Mapping {
    let directory = directory.join(UGLY);
    fs::create_dir(&directory).expect("directory");
    let (golden, overlay, qcow2, raw) =
        (directory.join("golden.raw"), directory.join("root.qcow2"), directory.join("data.qcow2"), directory.join("seed.raw"));
    for path in [&golden, &raw] {
        File::create(path).and_then(|file| file.set_len(8 << 20)).expect("raw image");
    }
    // The overlay's header names a file that is not there: only the mapping's own chain leads to the golden.
    let create = |arguments: &[&str], path: &Path| {
        let status = Command::new("qemu-img").args(arguments).arg(path).arg("8M").stdout(Stdio::null()).status();
        assert!(status.expect("qemu-img is needed by this test (Debian package qemu-utils)").success());
    };
    create(&["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/nonexistent/golden.raw"], &overlay);
    create(&["create", "-q", "-f", "qcow2"], &qcow2);
    mapping(vec![
        device("root", 0, "qcow2-overlay", &overlay, false, Some(&golden)),
        device("data", 1, "qcow2", &qcow2, false, None),
        device("seed", 2, "raw", &raw, true, None),
    ])
}

#[test]
fn libvirts_schema_accepts_the_disks() {
    let directory = tempfile::tempdir().expect("directory");
    for (bus, kind) in [(Bus::Virtio, "kvm"), (Bus::Scsi, "qemu"), (Bus::Xen, "xen")] {
        let mut mapping = images(&tempfile::tempdir_in(directory.path()).expect("directory").keep());
        let block: Mapping = self::mapping(vec![device("scratch", 7, "loop", Path::new("/dev/loop7"), false, None)]);
        mapping.devices.extend(block.devices);
        let disks = Dialect::Libvirt.render(&mapping, bus).expect("rendered");
        let path = directory.path().join("domain.xml");
        let validate = |disks: &str| {
            let domain = format!(
                "<domain type='{kind}'><name>web-1</name><memory unit='MiB'>512</memory><os><type>hvm</type></os><devices>{disks}</devices></domain>"
            );
            fs::write(&path, domain).expect("written");
            let output = Command::new("virt-xml-validate").arg(&path).arg("domain").output();
            output.expect("virt-xml-validate is needed by this test (Debian package libvirt-clients)")
        };
        let verdict = validate(&disks);
        assert!(verdict.status.success(), "{}\n{disks}", String::from_utf8_lossy(&verdict.stderr));
        // The judge reads what it is given.
        assert!(!validate(&disks.replace("<target dev=", "<target device=")).status.success());
    }
}

/// What `info block` of the real QEMU shows, stopped before the guest's first instruction.
fn info_block(arguments: &[String]) -> String {
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-system-x86_64 is needed by this test (Debian package qemu-system-x86)");
    child.stdin.take().expect("piped").write_all(b"info block\ninfo qtree\nquit\n").expect("commands");
    let output = child.wait_with_output().expect("finished");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}{text}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn qemu_opens_the_whole_chain_and_nothing_else() {
    let directory = tempfile::tempdir().expect("directory");
    let mapping = images(directory.path());
    let file = |name: &str| directory.path().join(UGLY).join(name).to_str().expect("text").to_owned();
    for bus in [Bus::Virtio, Bus::Scsi] {
        let text = info_block(&qemu::arguments(&mapping, bus).expect("rendered"));
        // The monitor shows paths as they are, or as JSON where a plain name would be ambiguous.
        let shown = text.replace("\\u00FC", "ü").replace("\\\"", "\"").replace("\\\\", "\\");
        for name in ["root.qcow2", "golden.raw", "data.qcow2", "seed.raw"] {
            assert!(shown.contains(&file(name)), "{name} of {bus:?} is not open:\n{text}");
        }
        assert!(!text.contains("/nonexistent"), "{text}");
        for part in ["disk0:", "disk1:", "disk2:", "serial = \"root\"", "serial = \"data-1\""] {
            assert!(text.contains(part), "{part} missing for {bus:?}:\n{text}");
        }
        let seed = text.split("disk2:").nth(1).and_then(|rest| rest.lines().next()).unwrap_or_default();
        assert!(seed.contains("(raw, read-only)"), "{seed}");
    }
}

const XLU: &str = r#"
import ctypes, glob, json, sys
util = ctypes.CDLL(sorted(glob.glob("/usr/lib/*/libxlutil.so.4*"))[0])
libc = ctypes.CDLL(None)
P, S = ctypes.c_void_p, ctypes.c_char_p
class Disk(ctypes.Structure):  # libxl_types.idl, libxl_device_disk: the leading members have not changed since 4.2
    _fields_ = [("backend_domid", ctypes.c_uint32), ("backend_domname", S), ("pdev_path", S), ("vdev", S), ("backend", ctypes.c_int),
                ("format", ctypes.c_int), ("script", S), ("removable", ctypes.c_int), ("readwrite", ctypes.c_int), ("is_cdrom", ctypes.c_int),
                ("rest", ctypes.c_char * 1024)]
libc.fdopen.restype = P
util.xlu_cfg_init.restype = P
util.xlu_cfg_init.argtypes = [P, S]
util.xlu_cfg_readdata.argtypes = [P, S, ctypes.c_int]
util.xlu_cfg_get_list.argtypes = [P, S, P, P, ctypes.c_int]
util.xlu_cfg_get_listitem.restype = S
util.xlu_cfg_get_listitem.argtypes = [P, ctypes.c_int]
util.xlu_disk_parse.argtypes = [P, ctypes.c_int, P, P]
cfg = util.xlu_cfg_init(libc.fdopen(2, b"w"), b"test")
data = sys.stdin.buffer.read()
if util.xlu_cfg_readdata(cfg, data, len(data)):
    sys.exit("the setting does not parse")
found, count = P(), ctypes.c_int()
if util.xlu_cfg_get_list(cfg, b"disk", ctypes.byref(found), ctypes.byref(count), 0):
    sys.exit("no list of disks")
disks = []
for index in range(count.value):
    spec = util.xlu_cfg_get_listitem(found, index)
    disk = Disk()
    if util.xlu_disk_parse(cfg, 1, (S * 1)(spec), ctypes.byref(disk)):
        sys.exit("disk %d does not parse" % index)
    disks.append({"path": disk.pdev_path.decode(), "vdev": disk.vdev.decode(), "format": disk.format, "writable": disk.readwrite,
                  "backend": disk.backend, "script": disk.script and disk.script.decode(), "cdrom": disk.is_cdrom, "removable": disk.removable})
print(json.dumps(disks))
"#;

fn xl_parse(setting: &str) -> Result<Value, String> {
    let mut child = Command::new("python3")
        .args(["-c", XLU])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python3 is needed by this test");
    child.stdin.take().expect("piped").write_all(setting.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("finished");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[test]
fn xens_parser_reads_the_disks_back() {
    let ugly = PathBuf::from(format!("/srv/{UGLY}, raw, xvdz/trailing "));
    let mut devices = vec![
        device("root", 0, "qcow2-overlay", &ugly, false, Some(Path::new("/golden"))),
        device("data", 1, "block", Path::new("/dev/vg0/web-1"), false, None),
        device("seed", 2, "raw", Path::new("/srv/phy:target=x,cdrom"), true, None),
    ];
    devices.extend((3..28).map(|order| device("scratch", order, "raw", Path::new("/srv/x.raw"), false, None)));
    let setting = Dialect::Xl.render(&mapping(devices), Bus::Xen).expect("rendered");
    let disks = xl_parse(&setting).unwrap_or_else(|error| panic!("libxlutil (Debian package xen-utils-4.17): {error}\n{setting}"));
    // libxl_disk_format: 2 qcow2, 4 raw. Backend 0 and no script: libxl decides.
    let wanted = |path: &str, vdev: &str, format: u8, writable: u8| json!({"path": path, "vdev": vdev, "format": format, "writable": writable, "backend": 0, "script": null, "cdrom": 0, "removable": 0});
    assert_eq!(disks[0], wanted(ugly.to_str().expect("text"), "xvda", 2, 1));
    assert_eq!(disks[1], wanted("/dev/vg0/web-1", "xvdb", 4, 1));
    assert_eq!(disks[2], wanted("/srv/phy:target=x,cdrom", "xvdc", 4, 0));
    assert_eq!(disks[27]["vdev"], "xvdab");
    assert!(xl_parse(&setting.replace("vdev=", "vdevice=")).is_err(), "the judge refuses what xl does not know");
}
