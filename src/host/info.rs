//! What this host is and can do; gathered once at start and on request, never cached across calls.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;

use crate::{
    error::{Error, Result, Stage},
    host::command,
};

/// A version option answers at once; a tool that does not is left out.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// Tools the daemon may use, and how each is asked for its version.
const TOOLS: [(&str, &str); 14] = [
    ("mkfs.ext4", "-V"),
    ("e2fsck", "-V"),
    ("mkfs.xfs", "-V"),
    ("xfs_admin", "-V"),
    ("mkfs.btrfs", "-V"),
    ("btrfstune", "--version"),
    ("qemu-img", "--version"),
    ("qemu-system-x86_64", "--version"),
    ("losetup", "-V"),
    ("lvcreate", "--version"),
    ("xl", ""),
    ("virsh", "--version"),
    ("gpg", "--version"),
    ("grub-bios-setup", "-V"),
];

/// The hypervisor under whose control this kernel starts guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hypervisor {
    /// Xen, with this as the control domain.
    Xen,
    /// KVM of this kernel.
    Kvm,
    /// Neither.
    None,
}

/// A tool found on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// Where it was found.
    pub path: PathBuf,
    /// The first line it says about its version, empty when it says none.
    pub version: String,
}

/// What this host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostInfo {
    /// The hypervisor found.
    pub hypervisor: Hypervisor,
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Machine, as `uname -m`.
    pub arch: String,
    /// Tools found.
    pub tools: Vec<Tool>,
    /// Filesystems the kernel has now; modules not yet loaded are not among them.
    pub filesystems: Vec<String>,
}

/// Room on a filesystem, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Space {
    /// Its size.
    pub total_bytes: u64,
    /// What this process may still allocate.
    pub available_bytes: u64,
}

impl HostInfo {
    /// Looks around. Starts each tool that is there once, to ask for its version.
    pub fn gather() -> Result<Self> {
        let uname = nix::sys::utsname::uname().map_err(|errno| Error::errno(Stage::Host, "uname", "ask the kernel who it is", errno))?;
        Ok(HostInfo {
            hypervisor: hypervisor(Path::new("/")),
            kernel: uname.release().to_string_lossy().into_owned(),
            arch: uname.machine().to_string_lossy().into_owned(),
            tools: TOOLS.iter().filter_map(|(name, option)| tool(name, option)).collect(),
            filesystems: filesystems(&std::fs::read_to_string("/proc/filesystems").unwrap_or_default()),
        })
    }

    /// The tool called `name`, if the host has it.
    pub fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }
}

/// Room on the filesystem that holds `path`.
pub fn space(path: &Path) -> Result<Space> {
    let stat = rustix::fs::statvfs(path).map_err(|errno| Error::io(Stage::Host, path.display().to_string(), "statvfs", errno.into()))?;
    Ok(Space { total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize), available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize) })
}

/// A control domain says `control_d` in /proc/xen/capabilities; a Xen guest (which can't start guests) does not. /dev/kvm is KVM's door.
fn hypervisor(root: &Path) -> Hypervisor {
    let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let is_xen = text("sys/hypervisor/type").trim() == "xen" || root.join("proc/xen/capabilities").exists();
    if is_xen && text("proc/xen/capabilities").contains("control_d") {
        Hypervisor::Xen
    } else if root.join("dev/kvm").exists() {
        Hypervisor::Kvm
    } else {
        Hypervisor::None
    }
}

fn tool(name: &str, option: &str) -> Option<Tool> {
    let path = command::find(name)?;
    let mut version = String::new();
    if !option.is_empty()
        && let Ok((_, output)) = command::run_any_status(name, [option], VERSION_TIMEOUT)
    {
        // The e2fsprogs say it on standard error.
        let said = [output.stdout, output.stderr].concat();
        version = String::from_utf8_lossy(&said).lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().chars().take(200).collect();
    }
    Some(Tool { name: name.to_owned(), path, version })
}

fn filesystems(text: &str) -> Vec<String> {
    text.lines().filter(|line| !line.starts_with("nodev")).map(|line| line.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypervisors_are_told_apart_and_a_xen_guest_is_no_host() {
        let root = tempfile::tempdir().expect("temporary directory");
        assert_eq!(hypervisor(root.path()), Hypervisor::None);
        for directory in ["dev", "proc/xen", "sys/hypervisor"] {
            std::fs::create_dir_all(root.path().join(directory)).expect("directory");
        }
        std::fs::write(root.path().join("sys/hypervisor/type"), "xen\n").expect("write");
        assert_eq!(hypervisor(root.path()), Hypervisor::None);
        std::fs::write(root.path().join("dev/kvm"), "").expect("write");
        assert_eq!(hypervisor(root.path()), Hypervisor::Kvm);
        std::fs::write(root.path().join("proc/xen/capabilities"), "control_d\n").expect("write");
        assert_eq!(hypervisor(root.path()), Hypervisor::Xen);
    }

    #[test]
    fn this_host_can_be_described() {
        let info = HostInfo::gather().expect("gathers");
        assert!(!info.kernel.is_empty() && !info.arch.is_empty());
        assert!(space(Path::new("/")).expect("statvfs").total_bytes > 0);
        assert!(space(Path::new("/no/such/path")).is_err());
    }

    #[test]
    fn filesystems_without_a_device_are_left_out() {
        assert_eq!(filesystems("nodev\tsysfs\n\text4\n\txfs\n\n"), ["ext4", "xfs"]);
    }
}
