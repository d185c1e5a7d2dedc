//! What libvirt's schema, QEMU and Xen's own parser make of the dialects. Needs libvirt-clients (virt-xml-validate) with libvirt0 (the schemas),
//! qemu-system-x86, qemu-utils, and xen-utils with python3 (libxlutil by ctypes); no privilege, no hypervisor.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cloudletd::{
    boot::platform::{Firmware, Hypervisor, Mode, Platform},
    mapping::{
        Bus, Dialect, Mapping,
        machine::{self, DirectKernel, Machine, UefiFiles, qemu::Accelerator},
        qemu,
    },
};
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
    xl_read(XLU, setting)
}

/// What a script that loads Xen's parser makes of a text.
fn xl_read(script: &str, setting: &str) -> Result<Value, String> {
    let mut child = Command::new("python3")
        .args(["-c", script])
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

/// The machines of every platform that makes sense, with what they need.
fn machines<'a>(mapping: &'a Mapping, platforms: &'a [Platform]) -> Vec<Machine<'a>> {
    let kernel = || DirectKernel { kernel: "/srv/k'1 & <2>".into(), initrd: Some("/srv/i".into()), cmdline: "root=UUID=1 ro 'a' \\b".into() };
    let machine = |platform: &'a Platform| Machine {
        mapping,
        platform,
        cpus: 2,
        memory_bytes: 512 << 20,
        nested: platform.hypervisor == Hypervisor::Kvm,
        bridge: "br0",
        kernel: (platform.firmware == Firmware::Direct).then(kernel),
        uefi: Some(UefiFiles { code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(), variables: "/usr/share/OVMF/OVMF_VARS_4M.fd".into() }),
    };
    platforms.iter().map(machine).collect()
}

fn platform(hypervisor: Hypervisor, mode: Mode, firmware: Firmware, bus: Bus) -> Platform {
    Platform { hypervisor, mode, firmware, bus, arch: "x86_64".into(), consoles: Vec::new(), secure_boot: false, extlinux: false }
}

fn xen_platforms() -> Vec<Platform> {
    vec![
        platform(Hypervisor::Xen, Mode::Pv, Firmware::Loader, Bus::Xen),
        platform(Hypervisor::Xen, Mode::Pv, Firmware::Direct, Bus::Xen),
        platform(Hypervisor::Xen, Mode::Pvh, Firmware::Direct, Bus::Xen),
        platform(Hypervisor::Xen, Mode::Hvm, Firmware::Bios, Bus::Xen),
        platform(Hypervisor::Xen, Mode::Hvm, Firmware::Uefi, Bus::Scsi),
    ]
}

/// Raw devices with ugly names and one card.
fn raw_instance() -> Mapping {
    let ugly = PathBuf::from(format!("/srv/{UGLY}"));
    let mut mapping = mapping(vec![
        device("root", 0, "raw", &ugly, false, None),
        device("data", 1, "block", Path::new("/dev/vg0/web-1"), false, None),
        device("seed", 2, "raw", Path::new("/srv/seed.raw"), true, None),
    ]);
    mapping.nics = serde_json::from_value(json!([{"name": "eth0", "mac": "52:54:00:aa:bb:cc"}])).expect("a card");
    mapping.identity.instance_uuid = "0b6a7d0e-6e3c-4b5e-9d8c-7a6b5c4d3e2f".into();
    mapping
}

#[test]
fn libvirts_schema_accepts_whole_domains() {
    let directory = tempfile::tempdir().expect("directory");
    let (mapping, mut platforms) = (raw_instance(), xen_platforms());
    platforms.push(platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Bios, Bus::Virtio));
    platforms.push(platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Direct, Bus::Scsi));
    platforms.push(Platform { secure_boot: true, ..platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Uefi, Bus::Virtio) });
    platforms.push(Platform { arch: "arm64".into(), ..platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Uefi, Bus::Virtio) });
    for machine in machines(&mapping, &platforms) {
        let xml = machine::libvirt::domain(&machine).expect("a domain");
        let path = directory.path().join("domain.xml");
        fs::write(&path, &xml).expect("written");
        let output = Command::new("virt-xml-validate").arg(&path).arg("domain").output();
        let output = output.expect("virt-xml-validate is needed by this test (Debian package libvirt-clients)");
        assert!(output.status.success(), "{:?}: {}\n{xml}", machine.platform, String::from_utf8_lossy(&output.stderr));
    }
}

/// Reads the settings of a configuration with Xen's own parser.
const XLU_SETTINGS: &str = r#"
import ctypes, glob, json, sys
util = ctypes.CDLL(sorted(glob.glob("/usr/lib/*/libxlutil.so.4*"))[0])
libc = ctypes.CDLL(None)
P, S = ctypes.c_void_p, ctypes.c_char_p
libc.fdopen.restype = P
util.xlu_cfg_init.restype = P
util.xlu_cfg_init.argtypes = [P, S]
util.xlu_cfg_readdata.argtypes = [P, S, ctypes.c_int]
util.xlu_cfg_get_string.argtypes = [P, S, P, ctypes.c_int]
util.xlu_cfg_get_long.argtypes = [P, S, P, ctypes.c_int]
util.xlu_cfg_get_list.argtypes = [P, S, P, P, ctypes.c_int]
util.xlu_cfg_get_listitem.restype = S
util.xlu_cfg_get_listitem.argtypes = [P, ctypes.c_int]
cfg = util.xlu_cfg_init(libc.fdopen(2, b"w"), b"test")
data = sys.stdin.buffer.read()
if util.xlu_cfg_readdata(cfg, data, len(data)):
    sys.exit("the configuration does not parse")
read = {}
for name in ["name", "uuid", "type", "kernel", "ramdisk", "cmdline", "bootloader", "firmware", "on_reboot"]:
    value = S()
    if not util.xlu_cfg_get_string(cfg, name.encode(), ctypes.byref(value), 1):
        read[name] = value.value.decode()
for name in ["memory", "vcpus"]:
    value = ctypes.c_long()
    if not util.xlu_cfg_get_long(cfg, name.encode(), ctypes.byref(value), 1):
        read[name] = value.value
for name in ["vif", "disk"]:
    found, count = P(), ctypes.c_int()
    if not util.xlu_cfg_get_list(cfg, name.encode(), ctypes.byref(found), ctypes.byref(count), 1):
        read[name] = [util.xlu_cfg_get_listitem(found, index).decode() for index in range(count.value)]
print(json.dumps(read))
"#;

#[test]
fn xens_parser_reads_whole_configurations_back() {
    let (mapping, platforms) = (raw_instance(), xen_platforms());
    let read: Vec<Value> = machines(&mapping, &platforms)
        .iter()
        .map(|machine| {
            let text = machine::xl::domain(machine).expect("a configuration");
            xl_read(XLU_SETTINGS, &text).unwrap_or_else(|error| panic!("libxlutil (Debian package xen-utils-4.17): {error}\n{text}"))
        })
        .collect();
    for one in &read {
        assert_eq!((&one["name"], &one["memory"], &one["vcpus"]), (&json!("web-1"), &json!(512), &json!(2)));
        assert_eq!(one["vif"], json!(["mac=52:54:00:aa:bb:cc,bridge=br0"]));
        assert_eq!(one["disk"].as_array().map(Vec::len), Some(3));
    }
    let types: Vec<&str> = read.iter().map(|one| one["type"].as_str().expect("a type")).collect();
    assert_eq!(types, ["pv", "pv", "pvh", "hvm", "hvm"]);
    assert_eq!((&read[0]["bootloader"], &read[0]["kernel"]), (&json!("pygrub"), &Value::Null));
    assert_eq!(read[2]["kernel"], "/srv/k'1 & <2>");
    assert_eq!(read[2]["cmdline"], "root=UUID=1 ro 'a' \\b", "quotes and backslashes come back");
    assert_eq!((&read[3]["firmware"], &read[4]["firmware"]), (&json!("seabios"), &json!("ovmf")));
}

#[test]
fn qemu_accepts_the_whole_command() {
    let directory = tempfile::tempdir().expect("directory");
    let mut mapping = images(directory.path());
    // A bridge of the host is not there to be joined.
    mapping.nics.clear();
    mapping.identity.instance_uuid = "0b6a7d0e-6e3c-4b5e-9d8c-7a6b5c4d3e2f".into();
    for (bus, consoles) in [(Bus::Virtio, vec![]), (Bus::Scsi, vec![cloudletd::boot::platform::Console::Vga]), (Bus::Nvme, vec![])] {
        let platforms = [Platform { consoles, ..platform(Hypervisor::Kvm, Mode::Kvm, Firmware::Bios, bus) }];
        let machine = machines(&mapping, &platforms).remove(0);
        let command = machine::qemu::command(&machine, Accelerator::Tcg).expect("arguments");
        let monitor = directory.path().join("monitor");
        let mut child = Command::new(&command[0]);
        child
            .args(&command[1..])
            .args(["-S", "-chardev"])
            .arg(format!("pipe,id=ask,path={}", monitor.display()))
            .args(["-mon", "chardev=ask"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // The command's own console has standard input and output; the monitor gets a pair of pipes.
        for side in ["in", "out"] {
            let path = format!("{}.{side}", monitor.display());
            let _ = fs::remove_file(&path);
            nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        }
        let asks = std::thread::spawn({
            let monitor = monitor.clone();
            move || {
                let mut file = File::options().write(true).open(format!("{}.in", monitor.display())).expect("opened by QEMU");
                file.write_all(b"info block\ninfo uuid\nquit\n").expect("commands");
            }
        });
        let answers = std::thread::spawn({
            let monitor = monitor.clone();
            move || fs::read_to_string(format!("{}.out", monitor.display())).unwrap_or_default()
        });
        let output = child.spawn().expect("qemu-system-x86_64 is needed by this test").wait_with_output().expect("finished");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        asks.join().expect("asked");
        let text = answers.join().expect("answered");
        assert!(text.contains("disk0:") && text.contains("disk2:") && text.contains(&mapping.identity.instance_uuid), "{text}");
    }
}
