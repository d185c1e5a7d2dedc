//! Confinement of a process that is about to read foreign bytes.
//!
//! ```text
//!  step            what is gone afterwards                                                    where it can't be had
//!  namespaces      the host's network, System V IPC and mounts; the root is an empty tmpfs     named in Confined::missing
//!  identity        root: user and group nobody, no groups, no capabilities                     named when the caller is not root
//!  no_new_privs    privileges by exec                                                          never
//!  Landlock        every right on every file that is not open already, TCP, signals outside    named (kernels before 5.13, or without it)
//!  limits          cores, more than a few descriptors, files beyond the disk, endless memory  never
//!  seccomp         every system call that is not in the list below: the process is killed      never
//! ```
//!
//! The order is not free: namespaces need privilege, the filter forbids the rest. The first half, to Landlock, is [`withdraw`]; it needs to be told nothing, and so
//! nothing is read with privileges, not even what is to be done. It has to be called while the process has one thread; threads made
//! later inherit all of it. What stays is: the descriptors that are open, memory, threads, time, random numbers, and the sockets among the descriptors.
//!
//! seccomp is the wall; the rest is what an attacker finds behind it should the kernel's filter or its list be wrong.
//!
//! A process that is confined as a fork server ([`ForkServer`]) reads nothing foreign itself. Its filter lets it make children by fork(2), take
//! descriptors and end children; each child gives that up ([`ForkedChild::become_reader`]) and then has the filter of every other reader.

use std::{collections::BTreeMap, io, path::Path};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{Gid, Pid, Uid, chdir, geteuid, getpid, getppid, pivot_root, setgroups, setresgid, setresuid},
};
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule};

use crate::{
    error::{Error, Result, Stage},
    host::sys,
};

/// User and group `nobody` and `nogroup` on Debian, and the kernel's overflow ids everywhere: they own nothing.
const NOBODY: u32 = 65534;
/// Descriptors: those passed, their duplicates for threads, and a few.
const DESCRIPTORS_MAX: u64 = 64;
/// A directory that every host has; in the new mount namespace an empty one is put over it.
const EMPTY_ROOT: &str = "/tmp";
/// Stands for the process id in a filter that is compiled before there is a process. No process has it: the kernel's limit is 2^22 (PID_MAX_LIMIT).
const PID_OF_CHILD: u32 = 0x5bad_c0de;
/// Who the kernel ends first when memory runs out: this process rather than a guest.
const OOM_SCORE: &str = "800";

/// What the confined work may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory that it may write to (RLIMIT_DATA), bytes; stacks of threads included.
    pub memory_bytes: u64,
    /// Length that a file may be written to, bytes; `None` for a process that has none to write but its standard error, which may be a log of any length.
    pub file_bytes: Option<u64>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Confined {
    /// Layers that this host does not give, in words; the filter is never among them.
    pub missing: Vec<String>,
}

/// A process that has no privileges, no files and no network any more, and can still be told how much it may use.
#[derive(Debug)]
pub struct Withdrawn {
    confined: Confined,
}

/// Gives up everything but system calls, for good. An error means that it was done by half: the process has to end without reading anything.
pub fn withdraw() -> Result<Withdrawn> {
    let object = "confinement";
    let threads = std::fs::read_dir("/proc/self/task").map_err(|error| Error::io(Stage::Host, object, "count threads", error))?.count();
    if threads != 1 {
        return Err(Error::internal(Stage::Host, object, format!("a process with {threads} threads can't be confined")));
    }
    let mut confined = Confined::default();
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        confined.missing.push(format!("to be ended first when memory runs out: {error}"));
    }
    if geteuid().is_root() {
        leave_namespaces(&mut confined);
        drop_root().map_err(|errno| Error::errno(Stage::Host, object, "become nobody", errno))?;
    } else {
        confined.missing.push("namespaces and another user: the daemon is not root".into());
    }
    rustix::thread::set_no_new_privs(true).map_err(|errno| Error::io(Stage::Host, object, "give up privileges", errno.into()))?;
    deny_files(&mut confined)?;
    Ok(Withdrawn { confined })
}

impl Withdrawn {
    /// Confines the process for good: the second half. An error means that it has to end without reading anything foreign. It still has one thread.
    pub fn confine(self, limits: Limits, before_filter: impl FnOnce()) -> Result<Confined> {
        self.confine_by(&filters(Role::Reader, std::process::id())?, limits, before_filter)
    }

    fn confine_by(self, filters: &[BpfProgram], limits: Limits, before_filter: impl FnOnce()) -> Result<Confined> {
        limit(limits).map_err(|errno| Error::io(Stage::Host, "confinement", "set resource limits", errno.into()))?;
        before_filter();
        install(filters)?;
        Ok(self.confined)
    }
}

/// A process that is confined and makes readers. It was counted to have one thread when this was made; who has it makes no other.
#[derive(Debug)]
pub struct ForkServer {
    confined: Confined,
    /// Compiled once for all children.
    reader: Vec<BpfProgram>,
}

impl ForkServer {
    /// Confines this process.
    pub fn confine(withdrawn: Withdrawn, limits: Limits) -> Result<ForkServer> {
        let reader = filters(Role::Reader, PID_OF_CHILD)?;
        let confined = withdrawn.confine_by(&filters(Role::ForkServer, std::process::id())?, limits, || {})?;
        Ok(ForkServer { confined, reader })
    }

    /// What was done.
    pub fn confined(&self) -> &Confined {
        &self.confined
    }

    /// Makes a child, which dies with this process: its process id here, nothing there.
    pub fn fork(&self) -> io::Result<Option<Pid>> {
        let server = getpid();
        let child = sys::fork(self)?;
        if child.is_none() {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // It may have died before the line above; then the signal would never come.
            if getppid() != server {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Ok(child)
    }

    /// Makes this process, a child, a reader as soon as that is called for: what takes time is done now. It has to have closed what it inherited and must not
    /// see.
    pub fn into_child(self) -> ForkedChild {
        let pid = std::process::id();
        let mut filters = self.reader;
        filters.iter_mut().flatten().filter(|instruction| instruction.k == PID_OF_CHILD).for_each(|instruction| instruction.k = pid);
        ForkedChild { filters }
    }
}

/// A child of a fork server that may still take descriptors.
#[derive(Debug)]
pub struct ForkedChild {
    filters: Vec<BpfProgram>,
}

impl ForkedChild {
    /// Makes it a reader. On an error it has to end.
    pub fn become_reader(self) -> Result<()> {
        install(&self.filters)
    }
}

fn install(filters: &[BpfProgram]) -> Result<()> {
    filters.iter().try_for_each(|filter| {
        seccompiler::apply_filter(filter)
            .map_err(|error| Error::internal(Stage::Host, "confinement", "install the system call filter").with_source(error))
    })
}

fn limit(limits: Limits) -> rustix::io::Result<()> {
    let always = [
        (Resource::Core, 0),
        (Resource::Nofile, DESCRIPTORS_MAX),
        (Resource::Data, limits.memory_bytes),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ];
    for (resource, value) in always.into_iter().chain(limits.file_bytes.map(|bytes| (Resource::Fsize, bytes))) {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
    }
    Ok(())
}

/// A network without interfaces, System V IPC without objects, and a root directory without entries. Each is had or named.
fn leave_namespaces(confined: &mut Confined) {
    for (flag, what) in [(CloneFlags::CLONE_NEWNET, "a network of its own"), (CloneFlags::CLONE_NEWIPC, "IPC of its own")] {
        if let Err(errno) = unshare(flag) {
            confined.missing.push(format!("{what}: {errno}"));
        }
    }
    if let Err(errno) = empty_root() {
        confined.missing.push(format!("an empty root directory: {errno}"));
    }
}

fn empty_root() -> nix::Result<()> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("none"), EMPTY_ROOT, Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=555"))?;
    chdir(Path::new(EMPTY_ROOT))?;
    // pivot_root(2), "pivot_root(".", ".")": the old root is stacked under the new one and is then unmounted with all that is mounted below it.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

/// From root to nobody for good. The kernel empties the permitted, effective and ambient sets when the last of the three user ids leaves 0
/// (capabilities(7)); the bounding set means nothing to a process that can't exec.
fn drop_root() -> nix::Result<()> {
    setgroups(&[])?;
    setresgid(Gid::from_raw(NOBODY), Gid::from_raw(NOBODY), Gid::from_raw(NOBODY))?;
    setresuid(Uid::from_raw(NOBODY), Uid::from_raw(NOBODY), Uid::from_raw(NOBODY))
}

/// A Landlock domain with no rule: nothing may be opened, bound, connected or signalled that isn't ours.
fn deny_files(confined: &mut Confined) -> Result<()> {
    let abi = ABI::V6;
    let denied = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(abi)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(abi)))
        .and_then(|ruleset| ruleset.create())
        .and_then(|ruleset| ruleset.restrict_self());
    match denied.map_err(|error| Error::internal(Stage::Host, "Landlock", "deny all files").with_source(error))?.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => confined.missing.push("a part of Landlock: the kernel is older than 6.12".into()),
        RulesetStatus::NotEnforced => confined.missing.push("Landlock: the kernel has none (5.13) or it is not enabled (lsm=)".into()),
    }
    Ok(())
}

/// What may be called with any arguments: memory, threads, waiting, time, and reading and writing what is open.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_ppoll,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    // glibc makes threads by it first; the other filter says ENOSYS, and it goes on with clone, whose flags can be seen.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
];

/// What a fork server may call beside: to pass and take descriptors, watch its children and end them.
const ALLOWED_TO_FORK_SERVER: &[libc::c_long] =
    &[libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal, libc::SYS_waitid, libc::SYS_getppid];

/// What a process may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It reads foreign bytes.
    Reader,
    /// It makes readers.
    ForkServer,
}

/// Any of these in the flags of clone(2) makes a namespace.
const CLONE_NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// One argument of a system call, by position, and what it has to be.
enum Wanted {
    /// Of 32 bits.
    Is(u8, u64),
    Null(u8),
    /// These bits are set.
    Has(u8, u64),
    /// These bits are clear.
    Lacks(u8, u64),
}

/// The filters in the order they are installed; the kernel takes the strictest answer of all.
fn filters(role: Role, pid: u32) -> Result<Vec<BpfProgram>> {
    let refuse = filter([(libc::SYS_clone3, Vec::new())].into(), SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let executable = libc::PROT_EXEC as u64;
    let empty_path = libc::AT_EMPTY_PATH as u64;
    for (call, wanted) in [
        // Data never becomes code.
        (libc::SYS_mmap, vec![Wanted::Lacks(2, executable)]),
        (libc::SYS_mprotect, vec![Wanted::Lacks(2, executable)]),
        // Threads, not processes.
        (libc::SYS_clone, vec![Wanted::Has(0, libc::CLONE_THREAD as u64), Wanted::Lacks(0, CLONE_NAMESPACES)]),
        // The status of what is open. (A path could still be given; the root directory is empty.)
        (libc::SYS_newfstatat, vec![Wanted::Has(3, empty_path)]),
        (libc::SYS_statx, vec![Wanted::Has(2, empty_path)]),
        // write(2) of a connected socket; no address.
        (libc::SYS_sendto, vec![Wanted::Null(4)]),
        // Names of threads.
        (libc::SYS_prctl, vec![Wanted::Is(0, libc::PR_SET_NAME as u64)]),
        // abort(3) of this process.
        (libc::SYS_tgkill, vec![Wanted::Is(0, u64::from(pid))]),
    ] {
        rules.insert(call, vec![rule(&wanted)?]);
    }
    // Duplicates for threads, and whether a descriptor is what it should be; never a change of flags or owners.
    let commands = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL];
    rules.insert(libc::SYS_fcntl, commands.into_iter().map(|command| rule(&[Wanted::Is(1, command as u64)])).collect::<Result<_>>()?);
    if role == Role::ForkServer {
        rules.extend(ALLOWED_TO_FORK_SERVER.iter().map(|call| (*call, Vec::new())));
        let fork = (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD) as u64;
        // A child may make threads as any reader may, so this filter can't forbid it.
        rules.entry(libc::SYS_clone).or_default().push(rule(&[Wanted::Is(0, fork)])?);
        // What a child does before it is a reader: the parent-death signal, and the filter with what seccompiler sets before it. Each has a process id of its own.
        let options = [libc::PR_SET_NAME, libc::PR_SET_PDEATHSIG, libc::PR_SET_NO_NEW_PRIVS];
        rules.insert(libc::SYS_prctl, options.into_iter().map(|option| rule(&[Wanted::Is(0, option as u64)])).collect::<Result<_>>()?);
        rules.insert(libc::SYS_socketpair, vec![rule(&[Wanted::Is(0, libc::AF_UNIX as u64)])?]);
        rules.insert(libc::SYS_seccomp, vec![rule(&[Wanted::Is(0, u64::from(libc::SECCOMP_SET_MODE_FILTER))])?]);
        rules.insert(libc::SYS_tgkill, Vec::new());
    }
    let permit = filter(rules, SeccompAction::KillProcess, SeccompAction::Allow)?;
    Ok(vec![refuse, permit])
}

fn rule(wanted: &[Wanted]) -> Result<SeccompRule> {
    let conditions = wanted.iter().map(|wanted| {
        let (argument, len, operator, value) = match *wanted {
            Wanted::Is(argument, value) => (argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value),
            Wanted::Null(argument) => (argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
            Wanted::Has(argument, bits) => (argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bits), bits),
            Wanted::Lacks(argument, bits) => (argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bits), 0),
        };
        SeccompCondition::new(argument, len, operator, value)
    });
    conditions.collect::<Result<_, _>>().and_then(SeccompRule::new).map_err(bad_filter)
}

fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>, otherwise: SeccompAction, matching: SeccompAction) -> Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().map_err(bad_filter)?;
    SeccompFilter::new(rules, otherwise, matching, arch).and_then(TryInto::try_into).map_err(bad_filter)
}

fn bad_filter(error: seccompiler::BackendError) -> Error {
    Error::internal(Stage::Host, "system call filter", "compile it").with_source(io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_for_children_names_its_process_once() {
        let program = filters(Role::Reader, PID_OF_CHILD).expect("compiles");
        assert_eq!(program.iter().flatten().filter(|instruction| instruction.k == PID_OF_CHILD).count(), 1);
        let own = filters(Role::Reader, std::process::id()).expect("compiles");
        let server = ForkServer { confined: Confined::default(), reader: program };
        assert_eq!(server.into_child().filters, own);
    }

    #[test]
    fn the_filters_compile_for_this_machine_and_no_dangerous_call_is_in_them() {
        for role in [Role::Reader, Role::ForkServer] {
            assert!(filters(role, 1).expect("compiles").iter().all(|program| !program.is_empty()), "{role:?}");
        }
        for call in [
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_ioctl,
            libc::SYS_kill,
            libc::SYS_unlinkat,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_recvmsg,
            libc::SYS_memfd_create,
        ] {
            assert!(!ALLOWED.contains(&call), "{call}");
        }
    }
}
