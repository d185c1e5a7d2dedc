//! systemd-boot with entries of the Boot Loader Specification, for images that bring it and no GRUB.
//!
//! ```text
//! EFI/BOOT/BOOTX64.EFI, EFI/systemd/systemd-bootx64.efi   the image's systemd-boot
//! loader/loader.conf                                      how long the menu waits
//! loader/entries.srel                                     "type1": kernel-install writes entries, not UKIs
//! loader/entries/TOKEN-VERSION.conf                       one per kernel; its text is the instance's
//! TOKEN/VERSION/linux, TOKEN/VERSION/INITRD               copies from the image: systemd-boot reads nothing but FAT
//! ```
//!
//! Names are those of the image's own `kernel-install` (90-loaderentry.install), so what it adds and removes later is what is there. The partition is the
//! golden's but for the entries: each is one block long, filled up with empty lines, and an instance overwrites that block. TOKEN is what the image has
//! in `/etc/kernel/entry-token`, else what names the system; never the machine-id, which is the instance's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    boot::{
        esp::{EfiProgram, Esp, first},
        grub::Entry,
        inspect::{INITRD_LEN_MAX, KERNEL_LEN_MAX},
        kernels::Kernel,
    },
    disk::fat,
    error::{Error, Kind, Result, Stage},
    fs::{Region, TreeReader, patch::BlockPatch},
    guest::{facts::GuestFacts, tree::shell_variable},
    units::{Bytes, MIB, PATCH_BLOCK},
};

/// Where packages have systemd-boot; what is signed first.
pub const PROGRAMS: [&str; 2] = ["/usr/lib/systemd/boot/efi/systemd-bootx64.efi.signed", "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"];
/// Bytes of an entry: a command line of 2047, titles and paths have room.
const ENTRY_LEN: usize = PATCH_BLOCK as usize;
/// Seconds that the menu waits, as GRUB's does.
const LOADER_CONF: &str = "# Written by cloudletd.\ntimeout 1\nconsole-mode keep\n";
/// Of the partition, what FAT's tables, directories and loaders may take beside the kernels.
const RESERVE: u64 = 4 * MIB;

/// An entry's place on the partition, kept with what is known of the golden.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryPlace {
    /// Version of the kernel that it starts.
    pub version: String,
    /// Bytes from the partition's start; whole sectors.
    pub offset: u64,
}

/// What an instance writes into an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryText {
    /// Version of the kernel that it starts.
    pub version: String,
    /// The entry, of at most the length that there is.
    pub text: String,
}

/// The files of a system partition of `esp_bytes` with systemd-boot; nothing for an image that does not bring it, that has GRUB, or whose first kernel does
/// not fit: `notes` says so.
pub fn choose(tree: &dyn TreeReader, facts: &GuestFacts, kernels: &[Kernel], esp_bytes: u64, notes: &mut Vec<String>) -> Result<Option<Esp>> {
    let Some(program) = first(tree, &PROGRAMS)? else { return Ok(None) };
    // systemd's package brings the program in some distributions whose loader is GRUB: then its modules are there, or a menu.
    let has_grub = !tree.list("/usr/lib/grub")?.is_empty() || ["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg"].iter().any(|path| facts.exists(path));
    if has_grub {
        return Ok(None);
    }
    let token = token(tree, facts)?;
    let mut files = BTreeMap::from([
        ("EFI/systemd/systemd-bootx64.efi".to_owned(), program.clone()),
        ("loader/loader.conf".to_owned(), LOADER_CONF.into()),
        ("loader/entries.srel".to_owned(), b"type1\n".to_vec()),
    ]);
    let mut room = esp_bytes.saturating_sub(RESERVE + 2 * program.len() as u64);
    files.insert("EFI/BOOT/BOOTX64.EFI".to_owned(), program);
    let mut placed = 0;
    for kernel in kernels.iter().filter(|kernel| is_name(&kernel.version)) {
        match kernel_files(tree, kernel, &token, room) {
            Ok(Some(of_kernel)) => {
                room -= of_kernel.values().map(|bytes| bytes.len() as u64).sum::<u64>();
                files.extend(of_kernel);
                files.insert(entry_path(&token, &kernel.version), placeholder(&token, &kernel.version));
                placed += 1;
            }
            Ok(None) => notes.push(format!("systemd-boot: {} or its initrd can't be read", kernel.kernel.escape_default())),
            Err(error) if error.kind() == Kind::NoSpace => notes.push(format!(
                "systemd-boot: {} and its initrd have no room left on a system partition of {} (disk.esp_size)",
                kernel.kernel.escape_default(),
                Bytes(esp_bytes)
            )),
            Err(error) => return Err(error),
        }
        // Older ones are left out rather than started in the place of the first.
        if placed == 0 {
            return Ok(None);
        }
    }
    Ok((placed > 0).then_some(Esp { program: EfiProgram::ImageBootEntries { token }, files }))
}

/// Copies of a kernel and its initrd by their paths on the partition; `Kind::NoSpace` when they have more than `room` bytes.
fn kernel_files(tree: &dyn TreeReader, kernel: &Kernel, token: &str, room: u64) -> Result<Option<BTreeMap<String, Vec<u8>>>> {
    let directory = format!("{token}/{}", kernel.version);
    let Some(bytes) = tree.read(&kernel.kernel, room.min(KERNEL_LEN_MAX))? else { return Ok(None) };
    let room = room - bytes.len() as u64;
    let mut files = BTreeMap::from([(format!("{directory}/linux"), bytes)]);
    if let Some(initrd) = &kernel.initrd {
        let Some(name) = initrd_name(initrd) else { return Ok(None) };
        let Some(bytes) = tree.read(initrd, room.min(INITRD_LEN_MAX))? else { return Ok(None) };
        files.insert(format!("{directory}/{name}"), bytes);
    }
    Ok(Some(files))
}

fn initrd_name(path: &str) -> Option<&str> {
    path.rsplit('/').next().filter(|name| is_name(name) && *name != "linux")
}

fn entry_path(token: &str, version: &str) -> String {
    format!("loader/entries/{token}-{version}.conf")
}

/// What the golden has in an entry's place: what finds it, and nothing that starts.
fn placeholder(token: &str, version: &str) -> Vec<u8> {
    padded(&format!("# Place of {}.\n", entry_path(token, version)))
}

fn padded(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(ENTRY_LEN, b'\n');
    bytes
}

/// Where the entries of `token` are in a finished partition.
pub fn places(volume: &BlockPatch, kernels: &[Kernel], token: &str) -> Result<Vec<EntryPlace>> {
    let place = |kernel: &Kernel| {
        let offset = fat::find(volume, &placeholder(token, &kernel.version))?;
        Some(EntryPlace { version: kernel.version.clone(), offset })
    };
    let places: Vec<EntryPlace> = kernels.iter().filter(|kernel| is_name(&kernel.version)).filter_map(place).collect();
    if places.is_empty() {
        // FAT is filled in order, so a file is in one piece, unless a kernel of the image looks like an entry.
        return Err(
            Error::new(Kind::Unsupported, Stage::Golden, "esp", "the place of a boot entry is not found on it").with_reason("BOOT_ENTRY_LOST")
        );
    }
    Ok(places)
}

/// What the image calls itself where kernels are installed (kernel-install(8)).
fn token(tree: &dyn TreeReader, facts: &GuestFacts) -> Result<String> {
    let own = match tree.read("/etc/kernel/entry-token", PATCH_BLOCK) {
        Ok(bytes) => bytes.and_then(|bytes| String::from_utf8(bytes).ok()).map(|text| text.trim().to_owned()),
        Err(error) if error.kind() == Kind::NoSpace => None,
        Err(error) => return Err(error),
    };
    let release = facts.text("/etc/os-release").or_else(|| facts.text("/usr/lib/os-release")).unwrap_or_default();
    let named = ["IMAGE_ID", "ID"].into_iter().filter_map(|key| shell_variable(release, key)).map(str::to_owned);
    Ok(own.into_iter().chain(named).find(|name| is_name(name)).unwrap_or_else(|| "linux".to_owned()))
}

/// What FAT and an entry's lines take as one name.
fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+' | b'~');
    (1..=64).contains(&name.len()) && name.bytes().all(fits) && !name.starts_with('.') && !name.ends_with('.')
}

/// The texts of an instance: `entries` belong to `kernels`, of which those are left out that have no place.
pub fn texts(token: &str, kernels: &[Kernel], entries: &[Entry], places: &[EntryPlace]) -> Vec<EntryText> {
    let text = |kernel: &Kernel, entry: &Entry| {
        let Kernel { version, .. } = kernel;
        let initrd = kernel.initrd.as_deref().and_then(initrd_name).map(|name| format!("initrd     /{token}/{version}/{name}\n")).unwrap_or_default();
        let title: String = entry.title.chars().filter(|c| !c.is_control()).take(200).collect();
        // 90-loaderentry.install writes the same keys.
        format!(
            "# Written by cloudletd for this disk.\ntitle      {title}\nversion    {version}\nsort-key   {token}\noptions    {}\nlinux      \
             /{token}/{version}/linux\n{initrd}",
            entry.cmdline
        )
    };
    let placed = |kernel: &Kernel| places.iter().any(|place| place.version == kernel.version);
    let both = kernels.iter().zip(entries).filter(|(kernel, _)| placed(kernel));
    both.map(|(kernel, entry)| EntryText { version: kernel.version.clone(), text: text(kernel, entry) }).collect()
}

/// The blocks of the partition in `esp`, a part of a golden disk, that the entries of an instance change; block 0 is the partition's first. Places without a
/// text keep the golden's, which starts nothing.
pub fn patch(esp: &Region, places: &[EntryPlace], texts: &[EntryText]) -> Result<BlockPatch> {
    let mut patch = BlockPatch::new(esp.len);
    for place in places {
        let Some(entry) = texts.iter().find(|entry| entry.version == place.version) else { continue };
        if entry.text.len() > ENTRY_LEN {
            let text = format!("the boot entry has {} bytes, the limit is {ENTRY_LEN}", entry.text.len());
            return Err(Error::field(Stage::Inject, "boot.cmdline", text));
        }
        fat::overwrite(&mut patch, esp, place.offset, &padded(&entry.text))?;
    }
    Ok(patch)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, sync::Arc};

    use super::*;
    use crate::boot::kernels::tests::facts;

    struct Tree(BTreeMap<&'static str, Vec<u8>>);

    impl TreeReader for Tree {
        fn read(&self, path: &str, len_max: u64) -> Result<Option<Vec<u8>>> {
            match self.0.get(path) {
                Some(bytes) if bytes.len() as u64 > len_max => Err(Error::new(Kind::NoSpace, Stage::Golden, path, "too large")),
                other => Ok(other.cloned()),
            }
        }
        fn list(&self, path: &str) -> Result<Vec<String>> {
            let prefix = format!("{path}/");
            Ok(self.0.keys().filter_map(|name| name.strip_prefix(&prefix)?.split('/').next().map(str::to_owned)).collect())
        }
    }

    fn kernel(version: &str, initrd: bool) -> Kernel {
        let initrd = initrd.then(|| format!("/boot/initrd.img-{version}"));
        Kernel { version: version.into(), kernel: format!("/boot/vmlinuz-{version}"), initrd, kernel_len: 1 }
    }

    fn tree() -> Tree {
        Tree(BTreeMap::from([
            (PROGRAMS[1], b"MZsd".to_vec()),
            ("/boot/vmlinuz-6.2", vec![1; 3_000_000]),
            ("/boot/initrd.img-6.2", vec![2; 5_000_000]),
            ("/boot/vmlinuz-6.1", vec![3; 3_000_000]),
        ]))
    }

    fn release() -> GuestFacts {
        facts(&[("/etc/os-release", "ID=debian\nPRETTY_NAME=\"Debian 12\"\n")], &[])
    }

    fn entry(kernel: &Kernel) -> Entry {
        Entry::of(kernel, "Debian 12", format!("root=UUID={} ro", kernel.version))
    }

    #[test]
    fn an_instance_overwrites_the_entries_of_its_golden_and_nothing_else() {
        let (kernels, mut notes) = ([kernel("6.2", true), kernel("6.1", false)], Vec::new());
        let esp = choose(&tree(), &release(), &kernels, 64 * MIB, &mut notes).expect("chosen").expect("an ESP");
        assert_eq!((&esp.program, &notes[..]), (&EfiProgram::ImageBootEntries { token: "debian".into() }, &[][..]));
        let paths: Vec<&str> = esp.files.keys().map(String::as_str).collect();
        assert_eq!(paths[..2], ["EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"]);
        assert_eq!(paths[2..5], ["debian/6.1/linux", "debian/6.2/initrd.img-6.2", "debian/6.2/linux"]);
        assert_eq!(paths[5..], ["loader/entries.srel", "loader/entries/debian-6.1.conf", "loader/entries/debian-6.2.conf", "loader/loader.conf"]);
        let mut wanted = esp.clone();
        let volume = fat::build(64 * MIB, &esp.volume(1)).expect("built");
        let places = places(&volume, &kernels, "debian").expect("found");
        assert_eq!(places.iter().map(|place| place.version.as_str()).collect::<Vec<_>>(), ["6.2", "6.1"]);
        // The partition lies somewhere on a disk.
        let disk = Arc::new(tempfile::tempfile().expect("file"));
        disk.set_len(66 * MIB).expect("sparse");
        for (number, block) in volume.iter() {
            disk.write_all_at(block, MIB + number * PATCH_BLOCK).expect("written");
        }
        let region = Region { file: disk, offset: MIB, len: 64 * MIB };
        let entries: Vec<Entry> = kernels.iter().map(entry).collect();
        let texts = texts("debian", &kernels, &entries, &places);
        let patch = patch(&region, &places, &texts).expect("patched");
        // The same partition, made with the instance's entries in the first place.
        for entry in &texts {
            wanted.files.insert(entry_path("debian", &entry.version), padded(&entry.text));
        }
        let wanted = fat::build(64 * MIB, &wanted.volume(1)).expect("built");
        for (number, block) in wanted.iter() {
            let ours = patch.get(number).or(volume.get(number));
            assert!(ours == Some(block), "block {number}");
        }
        assert!(patch.len() <= 4, "{patch:?}");
        assert_eq!(
            texts[0].text,
            "# Written by cloudletd for this disk.\ntitle      Debian 12, Linux 6.2\nversion    6.2\nsort-key   debian\noptions    root=UUID=6.2 ro\n\
             linux      /debian/6.2/linux\ninitrd     /debian/6.2/initrd.img-6.2\n"
        );
    }

    #[test]
    fn kernels_without_room_are_left_out_and_without_the_first_there_is_nothing() {
        let kernels = [kernel("6.2", true), kernel("6.1", false)];
        let mut notes = Vec::new();
        let esp = choose(&tree(), &release(), &kernels, 13 * MIB, &mut notes).expect("chosen").expect("an ESP");
        assert!(!esp.files.contains_key("debian/6.1/linux") && notes[0].contains("disk.esp_size"), "{notes:?}");
        let mut notes = Vec::new();
        assert_eq!(choose(&tree(), &release(), &kernels, 11 * MIB, &mut notes).expect("chosen"), None);
        assert_eq!(notes.len(), 1, "{notes:?}");
    }

    #[test]
    fn an_image_with_grub_or_without_the_program_has_no_entries() {
        let kernels = [kernel("6.2", true)];
        let chosen = |tree: &Tree, facts: &GuestFacts| choose(tree, facts, &kernels, 64 * MIB, &mut Vec::new()).expect("chosen");
        let mut grub = tree();
        grub.0.insert("/usr/lib/grub/x86_64-efi/linux.mod", Vec::new());
        assert_eq!(chosen(&grub, &release()), None);
        assert_eq!(chosen(&tree(), &facts(&[("/boot/grub/grub.cfg", "")], &[])), None);
        let mut none = tree();
        none.0.remove(PROGRAMS[1]);
        assert_eq!(chosen(&none, &release()), None);
    }

    #[test]
    fn the_token_is_the_images_own_where_it_is_a_name() {
        let token_of = |own: &[u8], release: &str| {
            let tree = Tree(BTreeMap::from([("/etc/kernel/entry-token", own.to_vec())]));
            token(&tree, &facts(&[("/etc/os-release", release)], &[])).expect("a token")
        };
        assert_eq!(token_of(b"fleet-7\n", "ID=debian\n"), "fleet-7");
        assert_eq!(token_of(b"../etc\n", "ID=debian\nIMAGE_ID=web\n"), "web");
        assert_eq!(token_of(b"\xff", "ID='a b'\n"), "linux");
    }
}
