//! Boots a rendered disk under QEMU and returns what the guest itself says about its configuration.
//!
//! Two ways in, both with the kernel given directly (`-kernel`) and software emulation, since stock guests cannot use KVM everywhere:
//!
//! - [`Start::Fast`]: a small initramfs mounts the disk, switches to it and runs the guest's own network tool by hand. 5 to 10 seconds.
//! - [`Start::Full`]: the image's own initrd and systemd up to multi-user. Tens of seconds.
//!
//! and one without: [`Start::Firmware`] starts the disk's own boot loader, which finds kernel and initrd in the image. The kernel's arguments are the
//! disk's too: the image has to be made with [`firmware_cmdline`].
//!
//! Nothing is written to the guest's tree for this, and by default the disk is not changed either: QEMU writes to a temporary snapshot.
//! The guest reports on the second serial port, so that kernel messages on the first cannot cut into it.
//!
//! ```no_run
//! let report = Guest::new("bookworm-ifupdown", Disk::qcow2("/srv/volumes/web-1.qcow2"))
//!     .nic("52:54:00:00:00:01")
//!     .file("/etc/hosts")
//!     .boot();
//! assert!(report.link("eth0").has_address("192.0.2.10/24"));
//! assert_eq!(report.default_route4().unwrap().gateway, "192.0.2.1");
//! ```

mod initramfs;
mod report;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

pub use report::{GuestFile, Link, Report, Route};

use super::fixture;

/// How long a guest may take. A fast boot needs 5 to 10 s alone on a core; a busy machine several times that.
const TIMEOUT_FAST: Duration = Duration::from_secs(240);
const TIMEOUT_FULL: Duration = Duration::from_secs(300);
/// The fastest model under emulation. Without cx16: QEMU 7.2 mishandles the flags of a cmpxchg16b that is interrupted, and kernels from 6.6 on
/// use it in the allocator (seen as a double fault in kmalloc).
const CPU: &str = "Nehalem,-cx16";
/// What every boot has on its kernel command line: less work under emulation, kernel names for NICs, and a panic that ends QEMU.
const CMDLINE: &str =
    "console=ttyS0 mitigations=off tsc=reliable no_timer_check random.trust_cpu=on net.ifnames=0 quiet loglevel=3 panic=-1 audit=0 nokaslr";

/// What QEMU is given as the disk.
#[derive(Clone, Debug)]
pub enum Disk {
    /// A file or block device in a declared format; not changed by the boot.
    Image {
        /// The file or device.
        path: PathBuf,
        /// QEMU's name of the format: raw or qcow2.
        format: &'static str,
    },
    /// The QEMU arguments of a mapping, as the daemon reports them. The guest writes to this disk.
    QemuArgs(Vec<String>),
}

impl Disk {
    /// A raw file, or a block device such as an attached loop device.
    pub fn raw(path: impl AsRef<Path>) -> Self {
        Self::Image { path: path.as_ref().to_owned(), format: "raw" }
    }

    /// A qcow2 file; its header names its backing file.
    pub fn qcow2(path: impl AsRef<Path>) -> Self {
        Self::Image { path: path.as_ref().to_owned(), format: "qcow2" }
    }
}

/// How the guest is brought up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Small initramfs, the network tool by hand.
    Fast,
    /// The image's own initrd, systemd, multi-user.
    Full,
    /// Firmware, the disk's boot loader, the image's kernel and initrd, then the network tool by hand.
    Firmware(Firmware),
}

/// What a virtual PC starts from its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
    /// OVMF with Microsoft's keys enrolled, which starts signed programs only.
    SecureBoot,
}

/// `boot.cmdline` of a manifest whose disks are started by [`Start::Firmware`]. `files` are read in the guest as [`Guest::file`] has them.
pub fn firmware_cmdline(fixture: &str, files: &[&str]) -> String {
    let tool = fixture.rsplit('-').next().unwrap_or("none");
    format!("rw {CMDLINE} boot.tool={tool} boot.settle=60 boot.files={} init=/bin/sh -- {REPORT_DISK}", files.join(","))
}

/// The disk that the guest's shell reads as a script.
const REPORT_DISK: &str = "/dev/disk/by-id/virtio-bootreport";

/// What is at the other end of the guest's NICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    /// A hub with nobody else on it.
    Hub,
    /// QEMU's user network: a DHCP server at 10.0.2.2 that gives 10.0.2.15/24 and the resolver 10.0.2.3; no way out.
    Dhcp,
    /// QEMU's user network as 192.0.2.0/24 with the router 192.0.2.1: what connects to this port of the loopback gets to port 22 of 192.0.2.10. No way out.
    Visited(u16),
}

/// A guest to boot. Built by the methods, then [`Guest::boot`].
#[derive(Debug)]
pub struct Guest<'a> {
    fixture: &'a str,
    disk: Disk,
    root_device: String,
    filesystem: &'a str,
    tool: &'a str,
    nics: Vec<(String, Wire)>,
    files: Vec<&'a str>,
    start: Start,
    cmdline: &'a str,
    settle_seconds: u32,
    prelude: &'a str,
}

impl<'a> Guest<'a> {
    /// A guest made from `fixture` (whose kernel boots it, and whose name says its network tool) with this disk: a bare ext4, no NIC.
    pub fn new(fixture: &'a str, disk: Disk) -> Self {
        let tool = fixture.rsplit('-').next().unwrap_or("none");
        Self {
            fixture,
            disk,
            root_device: "/dev/vda".to_owned(),
            filesystem: "ext4",
            tool,
            nics: Vec::new(),
            files: Vec::new(),
            start: Start::Fast,
            cmdline: "",
            settle_seconds: 60,
            prelude: "",
        }
    }

    /// The root is this partition of a GPT disk, counted from 1.
    pub fn root_partition(mut self, number: u32) -> Self {
        self.root_device = format!("/dev/vda{number}");
        self
    }

    /// Filesystem of the root: ext4, xfs or btrfs.
    pub fn filesystem(mut self, filesystem: &'a str) -> Self {
        self.filesystem = filesystem;
        self
    }

    /// Adds a NIC on a wire with nobody on it.
    pub fn nic(mut self, mac: &str) -> Self {
        self.nics.push((mac.to_owned(), Wire::Hub));
        self
    }

    /// Adds a NIC on a wire with a DHCP server.
    pub fn dhcp_nic(mut self, mac: &str) -> Self {
        self.nics.push((mac.to_owned(), Wire::Dhcp));
        self
    }

    /// Adds a NIC on a wire from which a visitor ([`Guest::boot_visited`]) can reach the SSH port of the guest's address 192.0.2.10.
    pub fn visited_nic(mut self, mac: &str) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("find a free port");
        self.nics.push((mac.to_owned(), Wire::Visited(free.port())));
        self
    }

    /// Asks for a file's mode, owner and content. At most a kernel command line (2 KiB) of paths.
    pub fn file(mut self, path: &'a str) -> Self {
        self.files.push(path);
        self
    }

    /// Chooses the way in; [`Start::Fast`] otherwise.
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Adds to the kernel command line, e.g. what a mapping reports for direct boot. For a full boot it should say `root=`.
    pub fn cmdline(mut self, cmdline: &'a str) -> Self {
        self.cmdline = cmdline;
        self
    }

    /// How long the guest's network tool may take before the report is made without it. Default 30.
    pub fn settle_seconds(mut self, seconds: u32) -> Self {
        self.settle_seconds = seconds;
        self
    }

    /// Shell commands that the guest runs before it reports, as PID 1. For [`Start::Firmware`].
    pub fn prelude(mut self, script: &'a str) -> Self {
        self.prelude = script;
        self
    }

    /// Boots it and waits for its report.
    ///
    /// # Panics
    /// When QEMU or a fixture is missing, or the guest does not report in time; the message ends with the guest's console.
    #[track_caller]
    pub fn boot(&self) -> Report {
        self.run(None)
    }

    /// The same, and calls `visit` with the port that leads to the guest's SSH server, when the guest has reported. The guest ends when a visitor has made
    /// /run/boot/visited in it.
    #[track_caller]
    pub fn boot_visited(&self, visit: &dyn Fn(u16)) -> Report {
        self.run(Some(visit))
    }

    #[track_caller]
    fn run(&self, visit: Option<&dyn Fn(u16)>) -> Report {
        let began = Instant::now();
        let fixture = fixture::get(self.fixture);
        let scratch = tempfile::Builder::new().prefix("cloudletd-boot-").tempdir().expect("make a temporary directory");
        let console = scratch.path().join("console.log");
        let answers = scratch.path().join("report.txt");
        File::create(&answers).expect("make the report file");
        let mut qemu = Command::new("qemu-system-x86_64");
        let machine = if self.start == Start::Firmware(Firmware::SecureBoot) { "q35,usb=off,smm=on" } else { "pc,usb=off" };
        qemu.args(["-accel", "tcg", "-machine", machine, "-cpu", CPU, "-smp", "1", "-m", "768"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"])
            .args(["-chardev", &format!("file,id=console,path={}", console.display()), "-serial", "chardev:console"])
            .args(["-chardev", &format!("file,id=report,path={}", answers.display()), "-serial", "chardev:report"]);
        match self.start {
            Start::Fast | Start::Full => {
                qemu.arg("-kernel").arg(&fixture.kernel).arg("-initrd").arg(self.initrd(&fixture, scratch.path()));
                qemu.args(["-append", &self.kernel_cmdline()]);
            }
            Start::Firmware(firmware) => add_firmware(&mut qemu, firmware, scratch.path()),
        }
        self.add_disks(&mut qemu, scratch.path());
        self.add_nics(&mut qemu);
        let errors = scratch.path().join("qemu.log");
        let child = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors).expect("make the error log"))
            .spawn()
            .unwrap_or_else(|error| panic!("run qemu-system-x86_64: {error} (install qemu-system-x86)"));
        let mut child = Running(child);
        let deadline = began + if self.start == Start::Fast { TIMEOUT_FAST } else { TIMEOUT_FULL };
        let visited = self.nics.iter().find_map(|(_, wire)| match wire {
            Wire::Visited(port) => Some(*port),
            Wire::Hub | Wire::Dhcp => None,
        });
        let mut outcome = Ok(());
        if let (Some(visit), Some(port)) = (visit, visited) {
            outcome = wait(&mut child, deadline, &|| text(&answers).lines().any(|line| line.starts_with("end ")));
            if outcome.is_ok() {
                visit(port);
            }
        }
        let outcome = outcome.and_then(|()| wait(&mut child, deadline, &|| false));
        let log = format!("{}{}", text(&errors), text(&console));
        let raw = text(&answers);
        match outcome {
            Ok(()) => Report::parse(&raw, log, began.elapsed()),
            Err(what) => panic!("guest {self:?}: {what}\n--- report so far ---\n{raw}\n--- console ---\n{}", tail(&log)),
        }
    }

    fn initrd(&self, fixture: &fixture::Fixture, scratch: &Path) -> PathBuf {
        match self.start {
            Start::Full | Start::Firmware(_) => fixture.initrd.clone(),
            Start::Fast => {
                let path = scratch.join("initramfs.cpio");
                fs::write(&path, initramfs::build(fixture, self.filesystem)).expect("write the initramfs");
                path
            }
        }
    }

    fn kernel_cmdline(&self) -> String {
        let files = self.files.join(",");
        let mut words = format!("{CMDLINE} {} boot.tool={} boot.settle={}", self.cmdline, self.tool, self.settle_seconds);
        match self.start {
            Start::Fast => words += &format!(" boot.root={} boot.fs={}", self.root_device, self.filesystem),
            Start::Full | Start::Firmware(_) => {
                if !self.cmdline.contains("root=") {
                    words += &format!(" root={} rw", self.root_device);
                }
            }
        }
        if self.nics.iter().any(|(_, wire)| matches!(wire, Wire::Visited(_))) {
            words += &format!(" boot.visit={}", TIMEOUT_FULL.as_secs());
        }
        if !files.is_empty() {
            words += &format!(" boot.files={files}");
        }
        if self.start == Start::Full {
            // What follows the two dashes are arguments of init: the second disk is a shell script.
            words += &format!(" init=/bin/sh -- {REPORT_DISK}");
        }
        assert!(words.len() < 2047, "the kernel takes 2047 bytes of command line");
        words
    }

    fn add_disks(&self, qemu: &mut Command, scratch: &Path) {
        match &self.disk {
            Disk::Image { path, format } => {
                qemu.args(["-drive", &format!("if=none,id=boot0,file={},format={format},snapshot=on,cache=unsafe", escaped(path))]);
                qemu.args(["-device", "virtio-blk-pci,drive=boot0"]);
            }
            Disk::QemuArgs(args) => {
                qemu.args(args);
            }
        }
        if self.start != Start::Fast {
            let script = scratch.join("report.sh");
            let mut text = if self.start == Start::Full { full_boot_script() } else { firmware_boot_script(self.prelude) };
            // A block device has whole sectors; newlines are harmless to the shell that reads them.
            text.push_str(&"\n".repeat(text.len().next_multiple_of(4096) - text.len()));
            fs::write(&script, text).expect("write the report script");
            qemu.args(["-drive", &format!("if=none,id=boot1,file={},format=raw,readonly=on", escaped(&script))]);
            qemu.args(["-device", "virtio-blk-pci,drive=boot1,serial=bootreport"]);
        }
    }

    fn add_nics(&self, qemu: &mut Command) {
        for (index, (mac, wire)) in self.nics.iter().enumerate() {
            let backend = match wire {
                Wire::Hub => format!("hubport,id=net{index},hubid={index}"),
                Wire::Dhcp => format!("user,id=net{index},restrict=on"),
                Wire::Visited(port) => format!(
                    "user,id=net{index},restrict=on,ipv6=off,net=192.0.2.0/24,host=192.0.2.1,dns=192.0.2.53,dhcpstart=192.0.2.100,\
                     hostfwd=tcp:127.0.0.1:{port}-192.0.2.10:22"
                ),
            };
            qemu.args(["-netdev", &backend]);
            // No option ROM: nobody boots from the network here, and it may not be installed.
            qemu.args(["-device", &format!("virtio-net-pci,netdev=net{index},mac={mac},romfile=")]);
        }
    }
}

/// The pflash chips of OVMF; SeaBIOS is there by itself. Variables are a copy: the firmware writes them.
fn add_firmware(qemu: &mut Command, firmware: Firmware, scratch: &Path) {
    let (code, variables) = match firmware {
        Firmware::Bios => return,
        Firmware::Uefi => ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
        Firmware::SecureBoot => ("OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.ms.fd"),
    };
    let from = Path::new("/usr/share/OVMF");
    let own = scratch.join("vars.fd");
    fs::copy(from.join(variables), &own).unwrap_or_else(|error| panic!("copy {variables}: {error} (install ovmf)"));
    qemu.args(["-drive", &format!("if=pflash,unit=0,format=raw,readonly=on,file={}", from.join(code).display())]);
    qemu.args(["-drive", &format!("if=pflash,unit=1,format=raw,file={}", own.display())]);
    if firmware == Firmware::SecureBoot {
        qemu.args(["-global", "driver=cfi.pflash01,property=secure,value=on"]);
    }
}

/// Prepares what the report needs and becomes it, as PID 1; powers off by the kernel, since there is no busybox.
fn firmware_boot_script(prelude: &str) -> String {
    let report = initramfs::report_script();
    format!(
        r#"mount -o remount,exec /run
mkdir -p /run/boot
printf '#!/bin/sh\necho o >/proc/sysrq-trigger\nsleep 60\n' >/run/boot/busybox
chmod 0755 /run/boot/busybox
cat >/run/boot/report.sh <<'END-OF-REPORT-SCRIPT'
{report}
END-OF-REPORT-SCRIPT
{prelude}
exec /bin/sh /run/boot/report.sh
"#
    )
}

/// Becomes init for a moment: adds a unit below /run, which systemd keeps, and hands over to the real init.
fn full_boot_script() -> String {
    let report = initramfs::report_script();
    format!(
        r#"mkdir -p /run/boot /run/systemd/system/multi-user.target.wants
cat >/run/boot/report.sh <<'END-OF-REPORT-SCRIPT'
{report}
END-OF-REPORT-SCRIPT
cat >/run/systemd/system/bootreport.service <<'END-OF-UNIT'
[Unit]
Description=Boot report
# Without default dependencies, or the target would wait for a unit that waits for the target.
DefaultDependencies=no
Wants=network-online.target
After=multi-user.target network-online.target
[Service]
Type=oneshot
ExecStart=/bin/sh /run/boot/report.sh
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
END-OF-UNIT
ln -s ../bootreport.service /run/systemd/system/multi-user.target.wants/bootreport.service
exec /sbin/init
"#
    )
}

/// A guest; stopped when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It fails for one that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the guest has ended, or until `early` says that it has come far enough.
fn wait(child: &mut Running, deadline: Instant, early: &dyn Fn() -> bool) -> Result<(), String> {
    loop {
        match child.0.try_wait().expect("wait for qemu") {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(format!("qemu ended with {status}")),
            None if Instant::now() > deadline => return Err("no report in time".to_owned()),
            None if early() => return Ok(()),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// QEMU's option parser takes a doubled comma for a comma.
fn escaped(path: &Path) -> String {
    path.to_str().expect("test paths are UTF-8").replace(',', ",,")
}

fn text(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The last 100 lines.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(100)..].join("\n")
}
