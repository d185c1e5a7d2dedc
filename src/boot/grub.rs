//! Text for boot loaders: `grub.cfg` in words that GRUB 2 and pygrub both understand, `menu.lst` for pvgrub and old pygrub, and the repair of what an
//! image already has.
//!
//! pygrub (Xen 4.17, tools/pygrub/src/GrubConf.py) reads line by line: `set default=`, `set timeout=`, `menuentry "title" {`, `linux`, `initrd`, `}`;
//! it ignores what it does not know. So entries have one command per line, no variables, no conditions. `$root` is the partition that the file was read
//! from whoever read it (GRUB's core image, the stub on the ESP, pvgrub2): nothing is searched for, so a clone of the disk in the same machine is never
//! taken for it.

use uuid::Uuid;

use crate::boot::kernels::Kernel;

/// Seconds that a menu waits.
const TIMEOUT_S: u32 = 1;
/// First line of the files written here: `update-grub` replaces them as it replaces its own.
pub const MARK: &str = "# Written by cloudletd for this disk. update-grub replaces it.";

/// An entry of a menu.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Title; quotes and control characters are removed.
    pub title: String,
    /// Kernel, absolute path.
    pub kernel: String,
    /// Initrd, absolute path.
    pub initrd: Option<String>,
    /// Command line, `root=` included.
    pub cmdline: String,
}

impl Entry {
    /// The entry of a kernel of the image called `image` (PRETTY_NAME).
    pub fn of(kernel: &Kernel, image: &str, cmdline: String) -> Entry {
        let title = if kernel.version.is_empty() { image.to_owned() } else { format!("{image}, Linux {}", kernel.version) };
        Entry { title, kernel: kernel.kernel.clone(), initrd: kernel.initrd.clone(), cmdline }
    }
}

/// Whether a path can be written into both files as it is: one word of printable ASCII, without what GRUB gives a meaning.
pub fn is_plain_path(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|byte| (0x21..0x7f).contains(&byte) && !is_special(byte))
}

/// What GRUB's shell gives a meaning.
fn is_special(byte: u8) -> bool {
    matches!(byte, b'"' | b'\'' | b'\\' | b'$' | b'`' | b'{' | b'}' | b';' | b'<' | b'>' | b'|' | b'&' | b'#')
}

/// A command line in GRUB's quoting. Ordinary ones are as they were, which is what pygrub needs.
fn quoted(cmdline: &str) -> String {
    let mut text = String::with_capacity(cmdline.len());
    for c in cmdline.chars() {
        if u8::try_from(c).is_ok_and(is_special) {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

/// `grub.cfg` with these entries, the first one started after a second. `serial`: GRUB itself also talks on the first serial port.
pub fn grub_cfg(entries: &[Entry], serial: bool) -> String {
    let mut text = format!("{MARK}\nset default=\"0\"\nset timeout=\"{TIMEOUT_S}\"\n");
    if serial {
        // Without a serial port the command fails and the screen stays alone. pygrub ignores all four lines.
        text += "if serial --unit=0 --speed=115200; then\n  terminal_input --append serial\n  terminal_output --append serial\nfi\n";
    }
    for entry in entries {
        text += &format!("menuentry \"{}\" {{\n\tlinux {} {}\n", title(&entry.title), entry.kernel, quoted(&entry.cmdline));
        if let Some(initrd) = &entry.initrd {
            text += &format!("\tinitrd {initrd}\n");
        }
        text += "}\n";
    }
    text
}

/// `menu.lst` with these entries. `root`: where the files are in GRUB legacy's words, `(hd0)` for a bare filesystem, `(hd0,0)` for partition 1.
pub fn menu_lst(entries: &[Entry], root: &str) -> String {
    let mut text = format!("{MARK}\ndefault 0\ntimeout {TIMEOUT_S}\n");
    for entry in entries {
        text += &format!("\ntitle {}\nroot {root}\nkernel {} {}\n", title(&entry.title), entry.kernel, entry.cmdline);
        if let Some(initrd) = &entry.initrd {
            text += &format!("initrd {initrd}\n");
        }
    }
    text
}

/// `extlinux.conf` with these entries, for syslinux, U-Boot and pygrub. The initrd stands among the arguments, which is the one way that all three know: they
/// take it from there.
pub fn extlinux_conf(entries: &[Entry]) -> String {
    let mut text = format!("# Written by cloudletd for this disk.\ndefault entry0\nprompt 0\ntimeout {}\n", TIMEOUT_S * 10);
    for (number, entry) in entries.iter().enumerate() {
        let initrd = entry.initrd.as_ref().map(|initrd| format!(" initrd={initrd}")).unwrap_or_default();
        let (title, kernel, cmdline) = (title(&entry.title), &entry.kernel, &entry.cmdline);
        text += &format!("\nlabel entry{number}\n\tmenu label {title}\n\tkernel {kernel}\n\tappend {cmdline}{initrd}\n");
    }
    text
}

fn title(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !matches!(c, '"' | '\'' | '\\' | '$' | '`' | '{' | '}')).collect()
}

/// The stub that a signed GRUB reads from `EFI/VENDOR/grub.cfg` on the ESP; `below` is GRUB's directory on the root, `/boot/grub` or `/boot/grub2`.
///
/// `$root` is the ESP when GRUB reads the stub; the root is partition 1 of the same disk.
pub fn esp_stub(below: &str) -> String {
    format!(
        "# Written by cloudletd: the root filesystem is partition 1 of the disk that this system partition is on.\n\
         regexp --set=1:cloudlet_disk \"^([^,]+),\" \"$root\"\n\
         set root=\"$cloudlet_disk,gpt1\"\n\
         set prefix=\"($root){below}\"\n\
         configfile \"$prefix/grub.cfg\"\n"
    )
}

/// The paths of the kernels that a `grub.cfg` starts, in order.
pub fn kernels_of(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| linux_words(line)?.nth(1)).collect()
}

/// The words of a line that starts a kernel.
fn linux_words(line: &str) -> Option<impl Iterator<Item = &str>> {
    let mut words = line.split_ascii_whitespace();
    matches!(words.next(), Some("linux" | "linux16" | "linuxefi")).then(|| line.split_ascii_whitespace())
}

/// A `grub.cfg` (or the options of a loader entry) of an image with the root of this disk: `root=…` of each kernel's line becomes `root`, and what is
/// searched for by UUID becomes `uuid`. Everything else stays byte for byte. Nothing when nothing changes.
pub fn with_root(text: &str, root: &str, uuid: &Uuid) -> Option<String> {
    let changed: String = text.split_inclusive('\n').map(|line| line_with_root(line, root, uuid)).collect();
    (changed != text).then_some(changed)
}

fn line_with_root(line: &str, root: &str, uuid: &Uuid) -> String {
    let first = line.split_ascii_whitespace().next().unwrap_or("");
    match first {
        "linux" | "linux16" | "linuxefi" | "kernel" | "options" => {
            replace_words(line, |word| word.starts_with("root=").then(|| format!("root={root}")))
        }
        "search" | "search.fs_uuid" => replace_words(line, |word| is_filesystem_id(word).then(|| uuid.hyphenated().to_string())),
        _ => line.to_owned(),
    }
}

/// `line` with words replaced, its white space kept.
fn replace_words(line: &str, replace: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while !rest.is_empty() {
        let blank = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_whitespace()).len();
        let (white, after) = rest.split_at(blank);
        let end = after.find(|c: char| c.is_ascii_whitespace()).unwrap_or(after.len());
        let (word, after) = after.split_at(end);
        out += white;
        out += &replace(word).unwrap_or_else(|| word.to_owned());
        rest = after;
    }
    out
}

/// A UUID as ext4, XFS and btrfs have it.
fn is_filesystem_id(word: &str) -> bool {
    word.len() == 36 && Uuid::try_parse(word).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let kernel = Kernel { version: "6.1".into(), kernel: "/boot/vmlinuz-6.1".into(), initrd: Some("/boot/initrd.img-6.1".into()), kernel_len: 1 };
        let other = Kernel { version: String::new(), kernel: "/opt/k".into(), initrd: None, kernel_len: 1 };
        vec![Entry::of(&kernel, "De\"bian {12}", "root=UUID=1 ro".into()), Entry::of(&other, "x", "root=/dev/xvda1".into())]
    }

    #[test]
    fn menus_have_one_command_per_line() {
        assert_eq!(
            grub_cfg(&entries(), false),
            format!(
                "{MARK}\nset default=\"0\"\nset timeout=\"1\"\nmenuentry \"Debian 12, Linux 6.1\" {{\n\tlinux /boot/vmlinuz-6.1 root=UUID=1 ro\n\
                 \tinitrd /boot/initrd.img-6.1\n}}\nmenuentry \"x\" {{\n\tlinux /opt/k root=/dev/xvda1\n}}\n"
            )
        );
        assert!(grub_cfg(&entries(), true).contains("serial --unit=0"));
        assert_eq!(
            menu_lst(&entries(), "(hd0,0)"),
            format!(
                "{MARK}\ndefault 0\ntimeout 1\n\ntitle Debian 12, Linux 6.1\nroot (hd0,0)\nkernel /boot/vmlinuz-6.1 root=UUID=1 ro\n\
                 initrd /boot/initrd.img-6.1\n\ntitle x\nroot (hd0,0)\nkernel /opt/k root=/dev/xvda1\n"
            )
        );
    }

    #[test]
    fn extlinux_has_the_initrd_among_the_arguments() {
        assert_eq!(
            extlinux_conf(&entries()),
            "# Written by cloudletd for this disk.\ndefault entry0\nprompt 0\ntimeout 10\n\nlabel entry0\n\tmenu label Debian 12, Linux 6.1\n\tkernel \
             /boot/vmlinuz-6.1\n\tappend root=UUID=1 ro initrd=/boot/initrd.img-6.1\n\nlabel entry1\n\tmenu label x\n\tkernel /opt/k\n\tappend \
             root=/dev/xvda1\n"
        );
    }

    #[test]
    fn a_config_of_the_images_own_gets_this_disks_root_and_keeps_the_rest() {
        let uuid = uuid::uuid!("11111111-2222-3333-4444-555555555555");
        let old = "\tsearch --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  9a3cf8e6-0000-4b1e-9f0e-000000000001\n\
                   \tlinux\t/boot/vmlinuz-6.1 root=UUID=9a3cf8e6-0000-4b1e-9f0e-000000000001 ro  quiet\n\tinitrd /boot/initrd.img-6.1\n# root=keep\nset x=root=keep\n";
        let new = with_root(old, "UUID=1111", &uuid).expect("changed");
        assert_eq!(
            new,
            "\tsearch --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  11111111-2222-3333-4444-555555555555\n\
             \tlinux\t/boot/vmlinuz-6.1 root=UUID=1111 ro  quiet\n\tinitrd /boot/initrd.img-6.1\n# root=keep\nset x=root=keep\n"
        );
        assert_eq!(with_root(&new, "UUID=1111", &uuid), None);
        assert_eq!(kernels_of(old), ["/boot/vmlinuz-6.1"]);
        let entry = "title x\nlinux /vmlinuz\noptions root=/dev/sda1 ro $x";
        assert_eq!(with_root(entry, "UUID=1", &uuid).as_deref(), Some("title x\nlinux /vmlinuz\noptions root=UUID=1 ro $x"));
    }

    #[test]
    fn what_grub_gives_a_meaning_is_quoted_in_command_lines_and_refused_in_paths() {
        assert!(is_plain_path("/boot/vmlinuz-6.1.0-40-amd64+deb13,x"));
        for text in ["a", "/a b", "/a\nb", "/a;b", "/$x", "/{", "/\u{e4}", "/a\"b", "/a#b"] {
            assert!(!is_plain_path(text), "{text:?}");
        }
        let entry = Entry { title: "x".into(), kernel: "/k".into(), initrd: None, cmdline: "ro dyndbg=\"file x.c +p; y\"".into() };
        assert!(grub_cfg(&[entry], false).contains("linux /k ro dyndbg=\\\"file x.c +p\\; y\\\"\n"));
    }
}
