//! What a worker may ask of the kernel once it serves: a fixed list of system calls (seccomp), and no file
//! at all (landlock). Applied before the worker's second thread starts, which inherits both, and before the
//! first byte from the network.
//!
//! A call that is not on the list ends the process. An error number instead would be taken for an ordinary
//! failure somewhere and go unseen; a killed worker is reported by the kernel and the master, counted and
//! replaced, its connections end in a reset, and whoever made it do that gets no second try. Only what
//! libraries try by themselves and can do without (looking at files, clone3) is answered with an error.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use serde_json::{Value, json};

/// What the kernel lists in `actions_avail` if it can end a process for a call (4.14).
const KILL_PROCESS: &str = "kill_process";
const ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";

/// Landlock's versions, newest first, up to the one whose rights are all denied here. Later ones are left
/// out on purpose: a right to resolve unix sockets would cut workers off from their `unix:` peers.
const VERSIONS: [ABI; 6] = [ABI::V6, ABI::V5, ABI::V4, ABI::V3, ABI::V2, ABI::V1];

// enum bpf_cmd (linux/bpf.h): what needs no right, on maps that the master made.
const BPF_MAP_LOOKUP_ELEM: u64 = 1;
const BPF_MAP_UPDATE_ELEM: u64 = 2;
const BPF_MAP_DELETE_ELEM: u64 = 3;
// The program that joins pairs; whoever can run it can do no more than with the three above.
const BPF_PROG_TEST_RUN: u64 = 10;

static APPLIED: OnceLock<Confinement> = OnceLock::new();

/// What confines a worker on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// System calls are filtered.
    pub seccomp: bool,
    /// Files are out of reach: the version of landlock, of those known here.
    pub landlock: Option<i32>,
}

impl Confinement {
    /// What this kernel offers.
    pub fn probe() -> Confinement {
        let landlock = VERSIONS.into_iter().find(|version| {
            let strict = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
            let scoped = |ruleset: Ruleset| match Scope::from_all(*version) {
                none if none.is_empty() => Ok(ruleset),
                scopes => ruleset.scope(scopes),
            };
            strict
                .handle_access(AccessFs::from_all(*version))
                .and_then(scoped)
                .is_ok()
        });
        Confinement {
            seccomp: std::fs::read_to_string(ACTIONS)
                .is_ok_and(|actions| actions.split_whitespace().any(|action| action == KILL_PROCESS)),
            landlock: landlock.map(|version| version as i32),
        }
    }

    /// What is missing, in words; `None`: nothing.
    pub fn missing(&self) -> Option<String> {
        let seccomp = "seccomp (CONFIG_SECCOMP_FILTER), so any system call is open to them";
        let landlock = "landlock (CONFIG_SECURITY_LANDLOCK, and in the lsm= list), so they see what files their \
                        user may";
        let missing: Vec<&str> = [(self.seccomp, seccomp), (self.landlock.is_some(), landlock)]
            .into_iter()
            .filter_map(|(there, words)| (!there).then_some(words))
            .collect();
        (!missing.is_empty()).then(|| format!("workers run without {}", missing.join("; and without ")))
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seccomp = if self.seccomp { "seccomp" } else { "no seccomp" };
        match self.landlock {
            Some(version) => write!(f, "{seccomp}, landlock {version}"),
            None => write!(f, "{seccomp}, no landlock"),
        }
    }
}

/// Confines this process, as far as the kernel offers it.
///
/// # Errors
/// The kernel offers it and refuses it all the same; the worker must not serve then.
pub fn apply() -> Result<()> {
    let offered = Confinement::probe();
    if offered.landlock.is_some() {
        close_file_system().context(
            "failed to close the file system to the worker: who filters the calls of this program has to let \
             both landlock_create_ruleset and landlock_restrict_self through",
        )?;
    }
    if offered.seccomp {
        restrict_calls().context(
            "failed to restrict the worker's system calls: who filters those of this program (a container, \
             SystemCallFilter= of a unit) has to let seccomp through",
        )?;
    }
    let _ = APPLIED.set(offered);
    Ok(())
}

/// For the status document.
pub(crate) fn status() -> Value {
    APPLIED.get().map_or(
        Value::Null,
        |applied| json!({ "seccomp": applied.seccomp, "landlock": applied.landlock }),
    )
}

/// Denies every right to files that the kernel can deny; what is open stays open. Newer kernels keep signals
/// and abstract unix sockets within the worker as well (it uses neither).
fn close_file_system() -> Result<()> {
    let newest = VERSIONS[0];
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))?
        .scope(Scope::from_all(newest))?
        .create()?
        .restrict_self()?;
    ensure!(
        status.ruleset != RulesetStatus::NotEnforced,
        "the kernel offers it and did not enforce it"
    );
    Ok(())
}

fn restrict_calls() -> Result<()> {
    // The last one first closes the door through which filters come.
    for (calls, error) in [(REFUSED, libc::EACCES), (&[libc::SYS_clone3][..], libc::ENOSYS)] {
        let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
        install(rules, SeccompAction::Allow, SeccompAction::Errno(error as u32))?;
    }
    install(allowed()?, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn install(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<()> {
    let filter = SeccompFilter::new(rules, otherwise, on_match, std::env::consts::ARCH.try_into()?)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

/// Answered with EACCES: libraries look at files by themselves (a panic's backtrace, malloc counting CPUs),
/// and go on without.
const REFUSED: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Open to a worker whatever the arguments. None of them, but for those of unix sockets, names a path, makes a process or reaches another.
const OPEN: &[i64] = &[
    // Connections; setsockopt is below.
    libc::SYS_accept4,
    libc::SYS_connect,
    // For proxy_bind. A unix socket cannot be bound to a path, because landlock denies making one.
    libc::SYS_bind,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    // Descriptors, the log's among them; fcntl is below.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fstat,
    libc::SYS_lseek,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    // Time, where the vdso has to ask the kernel.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    // Memory; mmap and mprotect are below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    // A thread's start and end, signals to oneself, the end of the process.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // What a library asks of the host.
    libc::SYS_uname,
    libc::SYS_sysinfo,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

fn allowed() -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = OPEN
        .iter()
        // The strictest answer of all filters wins, so these stay refused as above.
        .chain(REFUSED)
        .chain(&[libc::SYS_clone3])
        .map(|call| (*call, Vec::new()))
        .collect();
    let equal = |argument: u8, value: u64| SeccompCondition::new(argument, Len::Dword, Op::Eq, value);
    let bits = |argument: u8, mask: u64, value: u64| {
        SeccompCondition::new(argument, Len::Dword, Op::MaskedEq(mask), value)
    };
    let mut allow = |call: i64, conditions: Vec<SeccompCondition>| -> Result<()> {
        rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    for command in [
        BPF_MAP_LOOKUP_ELEM,
        BPF_MAP_UPDATE_ELEM,
        BPF_MAP_DELETE_ELEM,
        BPF_PROG_TEST_RUN,
    ] {
        allow(libc::SYS_bpf, vec![equal(0, command)?])?;
    }
    // Streams, of the families that a peer's address can have. The bits above are SOCK_CLOEXEC and so on.
    for family in [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX] {
        let conditions = vec![equal(0, family as u64)?, bits(1, 0xf, libc::SOCK_STREAM as u64)?];
        allow(libc::SYS_socket, conditions)?;
    }
    for request in [libc::TIOCOUTQ, libc::FIONREAD, libc::FIONBIO] {
        allow(libc::SYS_ioctl, vec![equal(1, request)?])?;
    }
    // Not F_SETOWN and F_SETSIG, by which the kernel sends any signal to any process of the same user, nor F_SETFL, by which
    // a log that is appended to could be written over.
    for command in [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL] {
        allow(libc::SYS_fcntl, vec![equal(1, command as u64)?])?;
    }
    // No program is attached to a socket: one at a listener chooses among those of all workers, and outlives this one.
    let at_socket = libc::SOL_SOCKET as u64;
    let elsewhere = SeccompCondition::new(1, Len::Dword, Op::Ne, at_socket)?;
    allow(libc::SYS_setsockopt, vec![elsewhere])?;
    for option in [
        libc::SO_LINGER,
        libc::SO_RCVLOWAT,
        libc::SO_OOBINLINE,
        libc::SO_RCVBUF,
        libc::SO_SNDBUF,
        libc::SO_KEEPALIVE,
        libc::SO_REUSEADDR,
    ] {
        allow(
            libc::SYS_setsockopt,
            vec![equal(1, at_socket)?, equal(2, option as u64)?],
        )?;
    }
    // No memory becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        allow(call, vec![bits(2, libc::PROT_EXEC as u64, 0)?])?;
    }
    // A thread, never a process; clone3 has its flags in memory, where a filter cannot look.
    let thread = libc::CLONE_THREAD as u64;
    allow(libc::SYS_clone, vec![bits(0, thread, thread)?])?;
    allow(libc::SYS_prctl, vec![equal(0, libc::PR_SET_NAME as u64)?])?;
    // Limits may be read. The address of the new one is null, both halves of it.
    let none = SeccompCondition::new(2, Len::Qword, Op::Eq, 0)?;
    allow(libc::SYS_prlimit64, vec![none])?;
    // abort(3).
    allow(libc::SYS_tgkill, vec![equal(0, u64::from(std::process::id()))?])?;
    Ok(rules)
}

#[cfg(test)]
#[path = "confine_tests.rs"]
mod tests;
