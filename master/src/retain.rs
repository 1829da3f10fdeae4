//! What the master keeps of its rights, and what each of them is for. The rest is given up before anything is
//! opened, so that what works at the start works at a reload as well.

use std::fmt;

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};
use culvert_shared::config::Config;
use nix::sys::prctl;

use crate::rights;

/// A right that the master keeps if it has it.
struct Right {
    capability: Capability,
    /// What it is for.
    purpose: &'static str,
    /// What is so without it.
    without: &'static str,
}

/// The rights that a kernel asks for before it loads and attaches the programs, at a reload too.
const DATA_PATH: [Right; 3] = [
    Right {
        capability: Capability::CAP_BPF,
        purpose: "makes the BPF maps and loads the programs",
        without: "sessions are copied",
    },
    Right {
        capability: Capability::CAP_NET_ADMIN,
        purpose: "loads and attaches BPF programs for sockets",
        without: "sessions are copied",
    },
    Right {
        capability: Capability::CAP_PERFMON,
        purpose: "lets the BPF programs read the kernel's socket structures",
        without: "sessions are copied",
    },
];

/// What the master does for its workers and listeners, whenever the configuration changes.
const OTHERS: [Right; 7] = [
    Right {
        capability: Capability::CAP_NET_BIND_SERVICE,
        purpose: "binds ports below 1024",
        without: "such a listener is refused",
    },
    Right {
        capability: Capability::CAP_NET_RAW,
        purpose: "connects from clients' addresses, where proxy_bind is transparent",
        without: "such a configuration is refused",
    },
    Right {
        capability: Capability::CAP_SETUID,
        purpose: "changes workers to `user`",
        without: "`user` is ignored",
    },
    Right {
        capability: Capability::CAP_SETGID,
        purpose: "changes workers to the groups of `user`",
        without: "`user` is ignored",
    },
    Right {
        capability: Capability::CAP_SETPCAP,
        purpose: "empties the workers' capability bounding set",
        without: "it stays, and no_new_privs alone keeps them from gaining rights",
    },
    Right {
        capability: Capability::CAP_KILL,
        purpose: "kills a worker that runs as `user` and does not stop",
        without: "such a worker has to be killed by root",
    },
    Right {
        capability: Capability::CAP_SYS_RESOURCE,
        purpose: "raises the descriptor limit over its hard limit",
        without: "worker_connections is bounded by that limit",
    },
];

fn all() -> impl Iterator<Item = &'static Right> {
    DATA_PATH.iter().chain(&OTHERS)
}

fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Right {
            capability,
            purpose,
            without,
        } = self;
        write!(
            f,
            "{capability} is missing, which {purpose}: without it {without}"
        )
    }
}

/// Gives up everything but the rights above, for good: what is executed later gains nothing either. It can
/// be executed all the same: no_new_privs takes nothing away that a process has, neither root's rights nor
/// ambient ones nor those of a file that it has already (cap_bprm_creds_from_file, 6.12).
///
/// # Errors
/// Something could not be given up.
pub fn drop_the_rest() -> Result<()> {
    let kept: CapsHashSet = all().map(|right| right.capability).collect();
    // First, because it needs CAP_SETPCAP. Where that is missing, no_new_privs does its work.
    if has(Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported().difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability)
                .with_context(|| format!("failed to take {capability} out of the bounding set"))?;
        }
    }
    // Ambient rights must be inheritable and permitted, effective ones permitted: so those go last.
    for set in [
        CapSet::Ambient,
        CapSet::Effective,
        CapSet::Inheritable,
        CapSet::Permitted,
    ] {
        let what = || format!("failed to drop the {set:?} capabilities that are not needed");
        let held = caps::read(None, set).with_context(what)?;
        if !held.is_subset(&kept) {
            let left = held.intersection(&kept).copied().collect();
            caps::set(None, set, &left).with_context(what)?;
        }
    }
    prctl::set_no_new_privs().context("failed to set no_new_privs")
}

/// Says once, in the log, which rights are missing that this configuration would use. Those that the start or
/// the data path cannot do without say so themselves.
pub fn report(config: &Config) {
    for right in OTHERS.iter().filter(|right| !has(right.capability)) {
        let wanted = match right.capability {
            Capability::CAP_SETPCAP => true,
            Capability::CAP_KILL => rights::changes_user(config),
            _ => false,
        };
        if wanted {
            log::info!("{right}");
        }
    }
    if let Some(missing) = culvert_worker::Confinement::probe().missing() {
        log::info!("{missing}");
    }
}

/// Why the data path is not to be had, and what helps: first the rights that are missing, then what the kernel
/// said, which at times is about a right and does not look like it (a program that may not read is "invalid").
pub fn explain<'a>(error: &anyhow::Error, remedy: &'a str) -> (String, &'a str) {
    match missing_for_data_path() {
        Some(missing) => (format!("{missing}: {error:#}"), "give it that"),
        None => (format!("{error:#}"), remedy),
    }
}

fn missing_for_data_path() -> Option<String> {
    let names: Vec<String> = DATA_PATH
        .iter()
        .filter(|right| !has(right.capability))
        .map(|right| format!("{} is missing, which {}", right.capability, right.purpose))
        .collect();
    (!names.is_empty()).then(|| names.join("; "))
}

/// The names of those of `capabilities` that are missing.
pub fn missing(capabilities: &[Capability]) -> Option<String> {
    let names: Vec<String> = capabilities
        .iter()
        .filter(|capability| !has(**capability))
        .map(Capability::to_string)
        .collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

/// For `-V`: one line for each right that this process lacks, and what would confine workers.
pub fn probe() -> Vec<String> {
    let mut lines: Vec<String> = all()
        .filter(|right| !has(right.capability))
        .map(|right| format!("rights: {right}"))
        .collect();
    if lines.is_empty() {
        lines.push("rights: all that are needed".to_owned());
    }
    let confinement = culvert_worker::Confinement::probe();
    lines.push(format!("workers are confined by {confinement}"));
    lines
}
