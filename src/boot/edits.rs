//! What an instance changes so that its disk boots: pure, from the facts of the image.
//!
//! | path | when |
//! |---|---|
//! | `/boot/grub/grub.cfg` | the image has none, or one that starts kernels it does not have: written; otherwise its root is replaced |
//! | `/boot/grub2/grub.cfg` | the image has one: its root is replaced |
//! | `/boot/loader/entries/*.conf` | the root in `options` is replaced |
//! | `/boot/grub/menu.lst` | the platform is Xen's paravirtual one: for pvgrub, and for pygrub before it knew GRUB 2 |
//! | `/boot/extlinux/extlinux.conf` | a platform asks for it (`extlinux`): U-Boot, syslinux's extlinux, pygrub |
//! | `/etc/kernel/{cmdline,entry-token}` | systemd-boot's entries are on the disk: what `kernel-install` writes into new ones |
//! | `/etc/default/grub.d/90-cloudletd.cfg` | the image has the directory: the consoles survive the guest's own `update-grub` |
//!
//! What a template of the manifest or the request itself writes is left to them.

use uuid::Uuid;

use crate::{
    boot::{
        bls::{self, EntryPlace, EntryText},
        grub::{self, Entry},
        kernels::{self, Kernel},
        platform::{self, Bus, Console, Mode, Platform},
    },
    disk::Layout,
    error::{Error, Result, Stage},
    fs::edit::{Attrs, Edit, EditOp},
    guest::{
        facts::{GuestFacts, NodeKind},
        tree,
    },
    manifest::BootSpec,
    names::GuestPath,
};

/// Bytes of a command line: COMMAND_LINE_SIZE of x86.
const CMDLINE_LEN_MAX: usize = 2047;

/// Everything the edits depend on.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The image.
    pub facts: &'a GuestFacts,
    /// `boot` of the manifest.
    pub spec: &'a BootSpec,
    /// How the disk is laid out.
    pub layout: Layout,
    /// UUID of this instance's root filesystem.
    pub root_uuid: Uuid,
    /// GUID of its root partition; none for a bare filesystem.
    pub root_partition: Option<Uuid>,
    /// Architecture of the guest.
    pub arch: &'a str,
    /// systemd-boot's entries on the disk: their token and places; nothing when something else starts it.
    pub boot_entries: Option<(&'a str, &'a [EntryPlace])>,
    /// Where it will run, when that is known: the disk is the same on all of them.
    pub platforms: &'a [Platform],
}

/// How the instance's first kernel is started.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BootReport {
    /// The kernel's path in the image.
    pub kernel: String,
    /// Its initrd's.
    pub initrd: Option<String>,
    /// Its command line; for direct boot it goes with the extracted files.
    pub cmdline: String,
    /// What to know.
    pub notes: Vec<String>,
}

/// The edits, and how the kernel is started; nothing to report when the image brings no kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootEdits {
    /// In order.
    pub edits: Vec<Edit>,
    /// How the first kernel is started.
    pub report: Option<BootReport>,
    /// Texts of systemd-boot's entries on the disk.
    pub boot_entries: Vec<EntryText>,
}

/// Computes the edits. `claimed` says who writes a path besides. `Kind::InvalidRequest` when the command line gets too long.
pub fn edits(inputs: &Inputs<'_>, claimed: &dyn Fn(&str) -> bool) -> Result<BootEdits> {
    let mut notes = Vec::new();
    let kernels: Vec<Kernel> = kernels::find(inputs.facts, inputs.spec).into_iter().filter(|kernel| usable(kernel, &mut notes)).collect();
    let Some(first) = kernels.first() else { return Ok(BootEdits::default()) };
    let image = inputs.facts.text("/etc/os-release").or_else(|| inputs.facts.text("/usr/lib/os-release"));
    let image = image.and_then(|text| tree::shell_variable(text, "PRETTY_NAME")).unwrap_or("Linux");
    let entries: Vec<Entry> = kernels.iter().map(|kernel| Ok(Entry::of(kernel, image, cmdline(inputs, kernel)?))).collect::<Result<_>>()?;
    let mut written = Writer { edits: Vec::new(), claimed, notes };
    menu(inputs, &entries, &mut written)?;
    for path in repairable(inputs.facts) {
        repair(inputs, &path, &mut written)?;
    }
    if inputs.platforms.iter().any(|platform| platform.mode == Mode::Pv) {
        let root = if inputs.layout == Layout::Bare { "(hd0)" } else { "(hd0,0)" };
        written.write("/boot/grub/menu.lst", grub::menu_lst(&entries, root), "kernels for pygrub and pvgrub")?;
    }
    if inputs.platforms.iter().any(|platform| platform.extlinux) {
        written.write("/boot/extlinux/extlinux.conf", grub::extlinux_conf(&entries), "kernels for U-Boot and extlinux")?;
    }
    if matches!(inputs.facts.resolve("/etc/default/grub.d"), Some((_, node)) if node.kind == NodeKind::Directory) {
        written.write("/etc/default/grub.d/90-cloudletd.cfg", grub_defaults(inputs), "consoles, for the guest's own update-grub")?;
    }
    let mut boot_entries = Vec::new();
    if let Some((token, places)) = inputs.boot_entries {
        boot_entries = bls::texts(token, &kernels, &entries, places);
        let cmdline = entries.first().map(|entry| entry.cmdline.as_str()).unwrap_or_default();
        written.write("/etc/kernel/cmdline", format!("{cmdline}\n"), "arguments of kernels that are installed later")?;
        written.write("/etc/kernel/entry-token", format!("{token}\n"), "where kernels that are installed later go")?;
    }
    let report = BootReport {
        kernel: first.kernel.clone(),
        initrd: first.initrd.clone(),
        cmdline: entries.first().map(|entry| entry.cmdline.clone()).unwrap_or_default(),
        notes: written.notes,
    };
    Ok(BootEdits { edits: written.edits, report: Some(report), boot_entries })
}

/// The command line of a kernel: root, what the manifest says or `ro`, consoles unless it names some.
pub fn cmdline(inputs: &Inputs<'_>, kernel: &Kernel) -> Result<String> {
    let given = inputs.spec.cmdline.as_deref().unwrap_or("").trim();
    let names = |word: &str| given.split_ascii_whitespace().any(|argument| argument.starts_with(word));
    let mut words = Vec::new();
    if !names("root=") {
        words.push(format!("root={}", root_of(inputs, kernel)));
    }
    if !given.split_ascii_whitespace().any(|argument| matches!(argument, "ro" | "rw")) {
        words.push("ro".into());
    }
    if !names("console=") {
        words.push(console_arguments(inputs));
    }
    // What follows "--" are arguments of init: the manifest's words come last.
    if !given.is_empty() {
        words.push(given.into());
    }
    let text = words.join(" ");
    if text.len() > CMDLINE_LEN_MAX {
        return Err(Error::field(
            Stage::Inject,
            "boot.cmdline",
            format!("the kernel's command line has {} bytes, the limit is {CMDLINE_LEN_MAX}", text.len()),
        ));
    }
    Ok(text)
}

/// How the kernel finds its root. A UUID of a filesystem is something that only an initrd can look for; without one the kernel knows partitions by
/// GUID and devices by name (init/do_mounts.c).
fn root_of(inputs: &Inputs<'_>, kernel: &Kernel) -> String {
    match (&kernel.initrd, inputs.root_partition) {
        (Some(_), _) => format!("UUID={}", inputs.root_uuid),
        (None, Some(partition)) => format!("PARTUUID={partition}"),
        // Names differ between platforms; a disk for several of them needs an initrd.
        (None, None) => {
            let bus = inputs.platforms.first().map_or(Bus::Virtio, |platform| platform.bus);
            format!("/dev/{}", crate::mapping::names::guest_name(bus, 0))
        }
    }
}

fn console_arguments(inputs: &Inputs<'_>) -> String {
    let arguments: Vec<&str> = platform::consoles(inputs.platforms).into_iter().map(|console| console.argument(inputs.arch)).collect();
    arguments.join(" ")
}

/// What the guest's own `grub-mkconfig` reads. Its menu would be drawn in graphics, which nobody sees on a serial line, and on a machine without a screen GRUB
/// may wait for SeaBIOS for ever (seen with 2.06 and QEMU's `-nodefaults`).
fn grub_defaults(inputs: &Inputs<'_>) -> String {
    let mut text = "# Written by cloudletd: the consoles of this machine.\n".to_owned();
    if platform::consoles(inputs.platforms).contains(&Console::Serial) {
        text += "GRUB_TERMINAL=\"console serial\"\nGRUB_SERIAL_COMMAND=\"serial --unit=0 --speed=115200\"\n";
    }
    text + &format!("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {}\"\n", console_arguments(inputs))
}

fn usable(kernel: &Kernel, notes: &mut Vec<String>) -> bool {
    let plain = grub::is_plain_path(&kernel.kernel) && kernel.initrd.as_deref().is_none_or(grub::is_plain_path);
    if !plain {
        notes.push(format!("{} is left out of the menu: its path, or its initrd's, can't be written there", kernel.kernel.escape_default()));
    }
    plain
}

/// GRUB's menu: written when there is none that could work.
fn menu(inputs: &Inputs<'_>, entries: &[Entry], written: &mut Writer<'_>) -> Result<()> {
    const PATH: &str = "/boot/grub/grub.cfg";
    let why = match inputs.facts.resolve(PATH) {
        None => "kernels of this image; it has no menu",
        Some(_) => match inputs.facts.text(PATH) {
            None => "kernels of this image; its own menu is too large or not text",
            Some(text) if text.starts_with(grub::MARK) => "kernels of this image",
            Some(text) => {
                let kernels = grub::kernels_of(text);
                if !kernels.is_empty() && kernels.iter().all(|path| inputs.facts.exists(path)) {
                    return Ok(());
                }
                "kernels of this image; its own menu starts others"
            }
        },
    };
    let serial = platform::consoles(inputs.platforms).contains(&Console::Serial);
    written.write(PATH, grub::grub_cfg(entries, serial), why)
}

/// Files of the image's own that name the root of the machine it was made on.
fn repairable(facts: &GuestFacts) -> Vec<String> {
    let mut paths = vec!["/boot/grub/grub.cfg".to_owned(), "/boot/grub2/grub.cfg".to_owned()];
    paths.extend(
        facts.children("/boot/loader/entries").filter(|(name, _)| name.ends_with(".conf")).map(|(name, _)| format!("/boot/loader/entries/{name}")),
    );
    paths
}

fn repair(inputs: &Inputs<'_>, path: &str, written: &mut Writer<'_>) -> Result<()> {
    let Some((path, _)) = inputs.facts.resolve(path) else { return Ok(()) };
    if written.edits.iter().any(|edit| edit.path.display() == path) {
        return Ok(());
    }
    let Some(text) = inputs.facts.text(&path) else {
        written.notes.push(format!("{} is left as it is: it is too large or not text", path.escape_default()));
        return Ok(());
    };
    match grub::with_root(text, &format!("UUID={}", inputs.root_uuid), &inputs.root_uuid) {
        Some(new) => {
            let attrs = attrs_of(inputs.facts, &path);
            written.write_as(&path, new, attrs, "root filesystem of this disk")
        }
        None => Ok(()),
    }
}

fn attrs_of(facts: &GuestFacts, path: &str) -> Attrs {
    facts.node(path).map_or_else(|| Attrs::root(0o644), |node| Attrs { mode: node.mode, uid: node.uid, gid: node.gid, xattrs: Vec::new() })
}

struct Writer<'a> {
    edits: Vec<Edit>,
    claimed: &'a dyn Fn(&str) -> bool,
    notes: Vec<String>,
}

impl Writer<'_> {
    fn write(&mut self, path: &str, content: String, why: &str) -> Result<()> {
        self.write_as(path, content, Attrs::root(0o644), why)
    }

    fn write_as(&mut self, path: &str, content: String, attrs: Attrs, why: &str) -> Result<()> {
        if (self.claimed)(path) {
            self.notes.push(format!("{path} is left to a template or to the request's files"));
            return Ok(());
        }
        let path = GuestPath::new(path).map_err(|why| Error::internal(Stage::Inject, path.escape_default().to_string(), why))?;
        self.edits.push(Edit { path, op: EditOp::WriteFile { content: content.into_bytes(), attrs }, why: why.to_owned(), secret: false });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{
        kernels::tests::facts,
        platform::{Firmware, Hypervisor, tests::platform},
    };

    const UUID: Uuid = uuid::uuid!("11111111-2222-3333-4444-555555555555");
    const DEBIAN: &[(&str, &str)] = &[
        ("/boot/vmlinuz-6.1.0-40-amd64", "k"),
        ("/boot/initrd.img-6.1.0-40-amd64", "i"),
        ("/boot/vmlinuz-6.1.0-9-amd64", "k"),
        ("/etc/os-release", "ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"),
    ];

    fn with<'a>(facts: &'a GuestFacts, spec: &'a BootSpec) -> Inputs<'a> {
        Inputs {
            facts,
            spec,
            layout: Layout::Gpt,
            root_uuid: UUID,
            root_partition: Some(Uuid::from_u128(7)),
            arch: "x86_64",
            boot_entries: None,
            platforms: &[],
        }
    }

    fn texts(edits: &BootEdits) -> Vec<(String, String)> {
        let text = |op: &EditOp| match op {
            EditOp::WriteFile { content, .. } => String::from_utf8(content.clone()).expect("text"),
            _ => panic!("only files are written"),
        };
        edits.edits.iter().map(|edit| (edit.path.to_string(), text(&edit.op))).collect()
    }

    fn run(inputs: &Inputs<'_>) -> BootEdits {
        edits(inputs, &|_| false).expect("edits")
    }

    #[test]
    fn an_image_without_a_menu_gets_one_with_all_its_kernels() {
        let (facts, spec) = (facts(DEBIAN, &[]), BootSpec::default());
        let result = run(&with(&facts, &spec));
        let texts = texts(&result);
        assert_eq!(texts.len(), 1);
        assert_eq!(texts[0].0, "/boot/grub/grub.cfg");
        let lines: Vec<&str> = texts[0].1.lines().filter(|line| line.starts_with("menuentry") || line.starts_with('\t')).collect();
        assert_eq!(
            lines,
            [
                "menuentry \"Debian GNU/Linux 12 (bookworm), Linux 6.1.0-40-amd64\" {",
                "\tlinux /boot/vmlinuz-6.1.0-40-amd64 root=UUID=11111111-2222-3333-4444-555555555555 ro console=tty0 console=ttyS0,115200",
                "\tinitrd /boot/initrd.img-6.1.0-40-amd64",
                "menuentry \"Debian GNU/Linux 12 (bookworm), Linux 6.1.0-9-amd64\" {",
                "\tlinux /boot/vmlinuz-6.1.0-9-amd64 root=PARTUUID=00000000-0000-0000-0000-000000000007 ro console=tty0 console=ttyS0,115200",
            ]
        );
        assert_eq!(result.report.expect("a report").kernel, "/boot/vmlinuz-6.1.0-40-amd64");
    }

    #[test]
    fn a_menu_that_works_is_repaired_and_one_that_does_not_is_replaced() {
        let own = "set x=1\n\tlinux /boot/vmlinuz-6.1.0-9-amd64 root=/dev/sda1 ro\n";
        let files: Vec<_> = DEBIAN.iter().copied().chain([("/boot/grub/grub.cfg", own)]).collect();
        let (facts_own, spec) = (facts(&files, &[]), BootSpec::default());
        let text = &texts(&run(&with(&facts_own, &spec)))[0].1;
        assert_eq!(*text, format!("set x=1\n\tlinux /boot/vmlinuz-6.1.0-9-amd64 root=UUID={UUID} ro\n"));
        let other = "\tlinux /vmlinuz-6.1.0-9-amd64 root=/dev/sda1 ro\n";
        let files: Vec<_> = DEBIAN.iter().copied().chain([("/boot/grub/grub.cfg", other)]).collect();
        let facts_other = facts(&files, &[]);
        let texts = texts(&run(&with(&facts_other, &spec)));
        assert!(texts.len() == 1 && texts[0].1.starts_with(grub::MARK), "{texts:?}");
    }

    #[test]
    fn loader_entries_and_grub2_are_repaired_and_consoles_kept_for_update_grub() {
        let files: Vec<_> = DEBIAN
            .iter()
            .copied()
            .chain([
                ("/boot/loader/entries/a.conf", "title A\noptions root=UUID=x ro\n"),
                ("/boot/loader/entries/b.txt", "options root=UUID=x ro\n"),
                ("/boot/grub2/grub.cfg", "search --fs-uuid 9a3cf8e6-0000-4b1e-9f0e-000000000001\n"),
                ("/etc/default/grub.d/cloud.cfg", ""),
            ])
            .collect();
        let (facts, spec) = (facts(&files, &[]), BootSpec::default());
        let texts = texts(&run(&with(&facts, &spec)));
        let paths: Vec<&str> = texts.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths, ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/boot/loader/entries/a.conf", "/etc/default/grub.d/90-cloudletd.cfg"]);
        assert_eq!(texts[2].1, format!("title A\noptions root=UUID={UUID} ro\n"));
        assert!(texts[3].1.contains("\nGRUB_TERMINAL=\"console serial\"\n"), "{}", texts[3].1);
        assert!(texts[3].1.ends_with("GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX console=tty0 console=ttyS0,115200\"\n"));
    }

    #[test]
    fn the_platform_decides_consoles_root_device_and_menu_lst() {
        let files: Vec<_> = DEBIAN.iter().copied().filter(|(path, _)| !path.contains("initrd")).collect();
        let (facts, spec) = (facts(&files, &[]), BootSpec::default());
        let xen = platform(Hypervisor::Xen, Mode::Pv, Firmware::Loader, Bus::Xen);
        let inputs = Inputs { layout: Layout::Bare, root_partition: None, platforms: std::slice::from_ref(&xen), ..with(&facts, &spec) };
        let result = run(&inputs);
        let texts = texts(&result);
        assert_eq!(texts[1].0, "/boot/grub/menu.lst");
        assert!(texts[1].1.contains("root (hd0)\nkernel /boot/vmlinuz-6.1.0-40-amd64 root=/dev/xvda ro console=hvc0\n"), "{}", texts[1].1);
        assert!(!texts[0].1.contains("serial"));
    }

    #[test]
    fn the_manifests_words_come_last_and_replace_defaults() {
        let facts = facts(DEBIAN, &[]);
        let line = |given: &str| {
            let spec = BootSpec { cmdline: Some(given.into()), ..BootSpec::default() };
            run(&with(&facts, &spec)).report.expect("a report").cmdline
        };
        assert_eq!(line("quiet rw"), format!("root=UUID={UUID} console=tty0 console=ttyS0,115200 quiet rw"));
        assert_eq!(line("root=LABEL=x ro console=hvc0 -- a"), "root=LABEL=x ro console=hvc0 -- a");
        let spec = BootSpec { cmdline: Some("x".repeat(2040)), ..BootSpec::default() };
        let error = edits(&with(&facts, &spec), &|_| false).expect_err("too long");
        assert_eq!(error.violations()[0].field, "boot.cmdline");
    }

    #[test]
    fn what_others_write_and_what_cannot_be_written_is_noted() {
        let files: Vec<_> = DEBIAN.iter().copied().chain([("/boot/vmlinuz-9 evil{", "k")]).collect();
        let (facts, spec) = (facts(&files, &[]), BootSpec::default());
        let result = edits(&with(&facts, &spec), &|path| path == "/boot/grub/grub.cfg").expect("edits");
        assert!(result.edits.is_empty());
        assert_eq!(result.report.expect("a report").notes.len(), 2);
        let none = GuestFacts::default();
        assert_eq!(run(&with(&none, &spec)), BootEdits::default());
    }
}
