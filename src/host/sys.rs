//! The only unsafe code of the daemon: ioctls and system calls that no crate wraps safely, and the parent-death signal of a child.
//!
//! Everything else the kernel offers is called through `rustix`, `nix` and `loopdev`. Each function here is safe to call with any open file: the
//! kernel checks that the file is what the ioctl needs and answers with an errno otherwise. The block ioctls are those of `linux/fs.h` (type 0x12),
//! the loop ioctls those of `linux/loop.h` (type 'L', plain numbers).
#![allow(unsafe_code)]

use std::{
    io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command,
};

/// `LO_FLAGS_READ_ONLY` of `linux/loop.h`.
pub const LOOP_READ_ONLY: u32 = 1;
/// `LO_FLAGS_AUTOCLEAR`: the kernel detaches when the last opener closes.
pub const LOOP_AUTOCLEAR: u32 = 4;
/// `LO_FLAGS_PARTSCAN`: the kernel reads the partition table.
pub const LOOP_PARTSCAN: u32 = 8;
/// `LO_FLAGS_DIRECT_IO`: the kernel bypasses the page cache of the backing file.
pub const LOOP_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of `linux/loop.h`, 232 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LoopInfo {
    /// Device of the backing file's filesystem, encoded as `st_dev`.
    pub device: u64,
    /// Inode of the backing file.
    pub inode: u64,
    /// Device number of a backing device; 0 for a file.
    pub rdevice: u64,
    /// Where the device starts in the backing file, bytes.
    pub offset: u64,
    /// Size of the device in bytes, 0 for all of the file.
    pub size_limit: u64,
    /// N of `/dev/loopN`; filled by the kernel.
    pub number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    /// `LOOP_*` flags.
    pub flags: u32,
    /// First 63 bytes of a name, for `losetup` to show.
    pub file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Default for LoopInfo {
    fn default() -> Self {
        LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

impl LoopInfo {
    /// What a new binding asks for; `name` is cut to 63 bytes.
    pub fn new(name: &[u8], offset: u64, size_limit: u64, flags: u32) -> Self {
        let mut info = LoopInfo { offset, size_limit, flags, ..LoopInfo::default() };
        let shown = name.len().min(info.file_name.len() - 1);
        info.file_name[..shown].copy_from_slice(&name[..shown]);
        info
    }
}

/// `struct loop_config` of `linux/loop.h`, 304 bytes.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

mod request {
    use super::{LoopConfig, LoopInfo};

    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, LoopInfo);
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    nix::ioctl_none_bad!(blkflsbuf, nix::request_code_none!(0x12, 97));
}

/// Binds `backing` to the loop device open as `device` and configures it in one step (`LOOP_CONFIGURE`, Linux 5.8). `block_size` 0 lets the kernel
/// choose. EBUSY: somebody else bound it first.
pub fn loop_configure(device: &impl AsRawFd, backing: &impl AsRawFd, block_size: u32, info: &LoopInfo) -> io::Result<()> {
    let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    let config = LoopConfig { fd, block_size, info: *info, reserved: [0; 8] };
    // SAFETY: the request reads exactly size_of::<LoopConfig>() bytes (asserted above) of a live, initialised value and keeps no pointer to it; both
    // descriptors are borrowed for the call. No crate offers this ioctl.
    unsafe { request::loop_configure(device.as_raw_fd(), &config) }?;
    Ok(())
}

/// What a loop device is bound to (`LOOP_GET_STATUS64`). ENXIO: not bound.
pub fn loop_status(device: &impl AsRawFd) -> io::Result<LoopInfo> {
    let mut info = LoopInfo::default();
    // SAFETY: the request writes at most size_of::<LoopInfo>() bytes (asserted above) into a live value of integers, for which every bit pattern is
    // valid. The loopdev crate has no query.
    unsafe { request::loop_get_status64(device.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// Size of a block device in bytes (`BLKGETSIZE64`).
pub fn device_size(device: &impl AsRawFd) -> io::Result<u64> {
    let mut size = 0;
    // SAFETY: the request writes one u64 (declared size_t; this crate builds for 64-bit hosts) into a live u64. rustix and nix have no wrapper.
    unsafe { request::blkgetsize64(device.as_raw_fd(), &mut size) }?;
    Ok(size)
}

/// Sequence number of a block device, unique in the running kernel (`BLKGETDISKSEQ`, Linux 5.15). ENOTTY on older kernels.
pub fn disk_sequence(device: &impl AsRawFd) -> io::Result<u64> {
    let mut sequence = 0;
    // SAFETY: the request writes one u64 into a live u64. No crate offers this ioctl.
    unsafe { request::blkgetdiskseq(device.as_raw_fd(), &mut sequence) }?;
    Ok(sequence)
}

/// Makes a range of a block device read as zeros, by the device where it can (`BLKZEROOUT`). Offset and length are multiples of the logical block size.
pub fn zero_out(device: &impl AsRawFd, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the request reads two u64 of a live array and keeps no pointer to it; the kernel checks range and alignment. No crate offers this ioctl.
    unsafe { request::blkzeroout(device.as_raw_fd(), &[offset, len]) }?;
    Ok(())
}

/// Tells a block device that a range is not needed (`BLKDISCARD`); what it reads as afterwards is undefined.
pub fn discard(device: &impl AsRawFd, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: as for zero_out: two u64 are read from a live array.
    unsafe { request::blkdiscard(device.as_raw_fd(), &[offset, len]) }?;
    Ok(())
}

/// Writes back and drops the kernel's buffers of a block device (`BLKFLSBUF`).
pub fn drop_buffers(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the request takes no argument and touches no memory of ours.
    unsafe { request::blkflsbuf(device.as_raw_fd()) }?;
    Ok(())
}

/// Starts writing the dirty pages of a range to storage and does not wait for it (`sync_file_range(2)`). Promises nothing: the file still has to be flushed.
pub fn start_writeback(file: &impl AsRawFd, offset: u64, len: u64) -> io::Result<()> {
    let [offset, len] = [offset, len].map(i64::try_from);
    let (Ok(offset), Ok(len)) = (offset, len) else { return Err(io::Error::from_raw_os_error(libc::EINVAL)) };
    // SAFETY: the call takes numbers only and touches no memory of ours. rustix and nix have no wrapper.
    nix::errno::Errno::result(unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) })?;
    Ok(())
}

/// `IOPRIO_CLASS_BE` of `linux/ioprio.h`.
pub const IOPRIO_CLASS_BEST_EFFORT: u16 = 2;
/// `IOPRIO_CLASS_IDLE`.
pub const IOPRIO_CLASS_IDLE: u16 = 3;
/// `IOPRIO_CLASS_SHIFT`: the class is in the upper 3 of 16 bits.
pub const IOPRIO_CLASS_SHIFT: u16 = 13;
/// `IOPRIO_WHO_PROCESS`, which means one thread.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// I/O priority of thread `tid`, 0 for the calling one (`ioprio_get(2)`). A thread that never set one has class 0.
pub fn io_priority(tid: u32) -> io::Result<u16> {
    let tid = libc::c_int::try_from(tid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: the call takes two numbers and touches no memory of ours. libc, nix and rustix have no wrapper.
    let value = nix::errno::Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) })?;
    u16::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Sets the I/O priority of the calling thread (`ioprio_set(2)`).
pub fn set_io_priority(value: u16) -> io::Result<()> {
    // SAFETY: the call takes three numbers and touches no memory of ours. libc, nix and rustix have no wrapper.
    nix::errno::Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, libc::c_int::from(value)) })?;
    Ok(())
}

/// Makes the kernel kill the child that `command` will start when the thread that starts it dies.
pub fn kill_with_parent(command: &mut Command) {
    let parent = nix::unistd::getpid();
    let prepare = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        // The parent may have died before the line above; then the signal would never come.
        if nix::unistd::getppid() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed: it makes two plain system calls (prctl,
    // getppid), allocates nothing and takes no lock. std has no safe way to set a parent-death signal.
    unsafe { command.pre_exec(prepare) };
}

/// Lets the child that `command` will start have its standard descriptors only, whatever was left open in this process without close-on-exec.
pub fn inherit_nothing(command: &mut Command) {
    let prepare = || {
        // SAFETY: close_range(2) takes numbers and touches no memory; the descriptors stay open until exec. Before Linux 5.11 it refuses the flag (EINVAL, or
        // ENOSYS before 5.9), and the child has what its parent was given: no reason not to start. Neither nix nor rustix has it.
        let _older = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes one plain system call. std has no safe way to close what it did not open.
    unsafe { command.pre_exec(prepare) };
}

/// A copy of this process (`fork(2)`): its id in the parent, nothing in the child.
pub fn fork(_one_thread: &super::confine::ForkServer) -> io::Result<Option<nix::unistd::Pid>> {
    // SAFETY: after fork the child of a process with several threads may make async-signal-safe calls only, because locks of the others stay locked. A fork
    // server was counted to have one thread when it was confined, and makes none: it waits, takes descriptors and forks. No crate offers a safe fork.
    Ok(match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Some(child),
        nix::unistd::ForkResult::Child => None,
    })
}

/// Whether a descriptor of this number is open, for workers of tests.
#[cfg(debug_assertions)]
pub fn is_open(number: i32) -> bool {
    // SAFETY: F_GETFD (fcntl(2)) takes a number and touches no memory; a number that is no descriptor is EBADF. Safe wrappers want a descriptor that is open.
    (unsafe { libc::fcntl(number, libc::F_GETFD) }) >= 0
}

/// Makes a system call with all arguments 0, for workers of tests that are to be killed for it. Nothing that is asked for does anything with them.
#[cfg(debug_assertions)]
pub fn forbidden_call(number: libc::c_long) -> io::Result<()> {
    // SAFETY: every call named by the worker's tests (openat, socket, execve, ptrace, mount, kill, clone, io_uring_setup, setuid, recvmsg,
    // sendmsg, socketpair, pidfd_open) refuses or ignores null
    // pointers and zeros; clone with no flags and no stack is fork. No crate makes calls by number.
    nix::errno::Errno::result(unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) })?;
    Ok(())
}
