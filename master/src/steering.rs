//! Receive flow steering (`flow_steering = "rfs"`): the host's settings that make the kernel handle a flow on
//! the CPU of the worker that marked it. Never makes a value smaller, and puts back what it found.
//!
//! Two settings do it: the table of flows, and a flow count for each receive queue. `rps_cpus` is left alone: it
//! spreads flows that nobody marked, and `get_rps_cpu` (Linux 6.12) looks a marked flow up without it.
//!
//! What was found is in a journal beside the pid file before anything is changed, so that whatever ends this
//! process, the next one puts it back or takes over from it. Only a value that is still the one that was set is
//! put back: another one is somebody else's wish by now.

mod plan;

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use culvert_shared::config::{Address, Config, FlowSteering};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use plan::{Change, Device, Knob, carriers, read_journal, wanted, write_journal};

/// What this process has changed on the host; put back when it is dropped.
#[derive(Debug)]
pub struct Steering {
    root: PathBuf,
    journal: PathBuf,
    changes: Vec<Change>,
    owner: u32,
}

impl Steering {
    /// Does what the configuration says, and what a predecessor left undone. A failure is logged: serving goes
    /// on without steering.
    pub fn begin(config: &Config) -> Steering {
        Steering::begin_at(Path::new("/"), config)
    }

    fn begin_at(root: &Path, config: &Config) -> Steering {
        let mut steering = Steering {
            root: root.to_owned(),
            journal: journal_path(&config.pid),
            changes: Vec::new(),
            owner: std::process::id(),
        };
        steering.take_over();
        steering.apply(config);
        steering
    }

    /// Does what a new configuration says: what only the former one needed is put back.
    pub fn apply(&mut self, config: &Config) {
        let journal = journal_path(&config.pid);
        if journal != self.journal {
            let former = std::mem::replace(&mut self.journal, journal);
            if let Err(error) = self.save() {
                log::warn!(
                    "the journal of flow steering stays at {}: {error:#}",
                    former.display()
                );
                self.journal = former;
            } else {
                let _ = fs::remove_file(former);
            }
        }
        let result = match config.flow_steering {
            FlowSteering::Off => Ok(Vec::new()),
            FlowSteering::Rfs => self.look(config),
        };
        if let Err(error) = result.and_then(|wanted| self.change(&wanted)) {
            self.restore();
            log::warn!("flow_steering = \"rfs\" cannot be set up, serving goes on without it: {error:#}");
        }
    }

    /// Reads what a process that could not put it back has left.
    fn take_over(&mut self) {
        let text = match fs::read_to_string(&self.journal) {
            Err(error) if error.kind() == ErrorKind::NotFound => return,
            other => other.unwrap_or_default(),
        };
        match read_journal(&text) {
            Some((host, changes)) if host == self.host() => self.changes = changes,
            // After a boot nothing is left to put back; another namespace's settings are out of reach.
            Some(_) => log::info!(
                "{} is of another boot or network namespace",
                self.journal.display()
            ),
            None => log::warn!(
                "{} is not a journal of flow steering, it is replaced",
                self.journal.display()
            ),
        }
    }

    /// The values that the configuration needs on this host.
    fn look(&self, config: &Config) -> Result<Vec<(Knob, u64)>> {
        // There /sys may well show the host's devices, and those are none of ours.
        ensure!(
            self.root.join(Knob::FlowTable.path()).exists(),
            "net.core.rps_sock_flow_entries is not there, as in a network namespace of its own: set it on the host, \
             and rps_flow_cnt of the devices here, if flows are to be steered; workers mark them in any case"
        );
        let all = devices()?;
        let names = carriers(&local_addresses(config), &all);
        ensure!(!names.is_empty(), "no device has the address of a listener");
        let mut queues = Vec::new();
        for name in self.with_lower_devices(names) {
            let found = self.queues(&name)?;
            queues.push((name, found));
        }
        let sessions = config.worker_cpus.len() as u64 * u64::from(config.worker_connections);
        Ok(wanted(2 * sessions, &queues))
    }

    /// Packets of a bond or a VLAN are steered where they come in: at the devices below it.
    fn with_lower_devices(&self, mut names: BTreeSet<String>) -> BTreeSet<String> {
        let mut left: Vec<String> = names.iter().cloned().collect();
        while let Some(name) = left.pop() {
            let folder = self.root.join("sys/class/net").join(name);
            // A bridge hands its packets in anew (br_pass_frame_up), and its ports may be many.
            if folder.join("bridge").exists() {
                continue;
            }
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let entry = entry.file_name();
                if let Some(lower) = entry.to_str().and_then(|name| name.strip_prefix("lower_"))
                    && names.insert(lower.to_owned())
                {
                    left.push(lower.to_owned());
                }
            }
        }
        names
    }

    fn queues(&self, device: &str) -> Result<Vec<String>> {
        let folder = self.root.join("sys/class/net").join(device).join("queues");
        let what = || {
            format!(
                "failed to look for the receive queues of {device} in {}",
                folder.display()
            )
        };
        let mut queues: Vec<String> = fs::read_dir(&folder)
            .with_context(what)?
            .flatten()
            .filter(|entry| entry.path().join("rps_flow_cnt").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        queues.sort();
        Ok(queues)
    }

    /// Makes the host's values at least the wanted ones, and puts back what is not wanted any more.
    fn change(&mut self, wanted: &[(Knob, u64)]) -> Result<()> {
        self.put_back(|change| wanted.iter().all(|(knob, _)| *knob != change.knob));
        let before = self.changes.len();
        for (knob, size) in wanted {
            let found = self.read(knob)?;
            if found < *size {
                self.changes.push(Change {
                    knob: knob.clone(),
                    found,
                    set: *size,
                });
            }
        }
        self.save()?;
        for Change { knob, set, .. } in &self.changes[before..] {
            self.write(knob, *set)?;
        }
        let words: Vec<String> = self.changes[before..].iter().map(Change::to_string).collect();
        if !words.is_empty() {
            log::info!(
                "flow steering is set up, until the program ends: {}",
                words.join(", ")
            );
        }
        Ok(())
    }

    /// Puts everything back.
    fn restore(&mut self) {
        self.put_back(|_| true);
        if let Err(error) = self.save() {
            log::error!("{error:#}");
        }
    }

    /// Puts back, the latest first, and keeps what could not be.
    fn put_back(&mut self, which: impl Fn(&Change) -> bool) {
        let (back, mut kept): (Vec<Change>, Vec<Change>) = self.changes.drain(..).partition(which);
        for change in back.into_iter().rev() {
            match self.read(&change.knob) {
                Ok(now) if now == change.set => match self.write(&change.knob, change.found) {
                    Ok(()) => log::info!("flow steering: {} is {} again", change.knob, change.found),
                    Err(error) => {
                        log::error!("{} was {} before: {error:#}", change.knob, change.found);
                        kept.push(change);
                    }
                },
                Ok(now) if now != change.found => {
                    log::info!(
                        "flow steering: {} is {now}, which was set by another",
                        change.knob
                    );
                }
                // It was never made, or its device is gone.
                Ok(_) | Err(_) => {}
            }
        }
        self.changes = kept;
    }

    /// Writes the journal beside its place and renames it, so that no reader sees half of it.
    fn save(&self) -> Result<()> {
        let what = || format!("failed to write {}", self.journal.display());
        if self.changes.is_empty() {
            return match fs::remove_file(&self.journal) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("failed to remove {}", self.journal.display()))
                }
                _ => Ok(()),
            };
        }
        let mut new = self.journal.as_os_str().to_owned();
        new.push(".new");
        let _ = fs::remove_file(&new);
        let place = || {
            let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
            file.write_all(write_journal(&self.host(), &self.changes).as_bytes())?;
            fs::rename(&new, &self.journal)
        };
        // The disk may be full.
        place()
            .inspect_err(|_| drop(fs::remove_file(&new)))
            .with_context(what)
    }

    fn read(&self, knob: &Knob) -> Result<u64> {
        let path = self.root.join(knob.path());
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        match text.trim().parse() {
            Ok(value) => Ok(value),
            Err(_) => bail!("{} holds no number but {:?}", path.display(), text.trim()),
        }
    }

    fn write(&self, knob: &Knob, value: u64) -> Result<()> {
        let path = self.root.join(knob.path());
        let write = || {
            let mut file = OpenOptions::new().write(true).truncate(true).open(&path)?;
            file.write_all(value.to_string().as_bytes())
        };
        write().with_context(|| {
            format!(
                "failed to write {value} to {} (needs root with CAP_NET_ADMIN, and /proc/sys and /sys writable)",
                path.display()
            )
        })
    }

    /// Which host the values belong to: this boot, this network namespace.
    fn host(&self) -> String {
        let boot = fs::read_to_string(self.root.join("proc/sys/kernel/random/boot_id")).unwrap_or_default();
        let net = fs::read_link(self.root.join("proc/self/ns/net")).unwrap_or_default();
        format!("{} {}", boot.trim(), net.display())
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        // A forked child has a copy of this value.
        if self.owner == std::process::id() && !self.changes.is_empty() {
            self.restore();
        }
    }
}

fn journal_path(pid: &Path) -> PathBuf {
    let mut path = pid.as_os_str().to_owned();
    path.push(".steering");
    path.into()
}

/// The local addresses of both sides of the sessions: the listeners', and those from which the peers are reached.
fn local_addresses(config: &Config) -> Vec<IpAddr> {
    let listeners = config.servers.iter().flat_map(|server| &server.listen);
    let mut local: Vec<IpAddr> = listeners
        .filter_map(|listen| Some(listen.address.tcp()?.ip()))
        .collect();
    for peer in config.upstreams.iter().flat_map(|upstream| &upstream.peers) {
        if let Address::Tcp(peer) = &peer.address {
            local.extend(address_towards(*peer));
        }
    }
    local.sort();
    local.dedup();
    local
}

/// The local address from which a peer is reached now, if it is; that of the loopback device for a peer on
/// this host. Connecting a datagram socket sends nothing.
fn address_towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let loopback: IpAddr = match peer {
        SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(peer).ok()?;
    let local = socket.local_addr().ok()?.ip();
    Some(if local == peer.ip() { loopback } else { local })
}

fn devices() -> Result<Vec<Device>> {
    let mut found: Vec<Device> = Vec::new();
    for entry in getifaddrs().context("failed to list the network devices")? {
        // A label such as eth0:1 is an address of eth0.
        let name = entry.interface_name.split(':').next().unwrap_or_default();
        let at = match found.iter().position(|device| device.name == name) {
            Some(at) => at,
            None => {
                found.push(Device {
                    name: name.to_owned(),
                    is_up: entry.flags.contains(InterfaceFlags::IFF_UP),
                    is_loopback: entry.flags.contains(InterfaceFlags::IFF_LOOPBACK),
                    addresses: Vec::new(),
                });
                found.len() - 1
            }
        };
        let address = entry.address.and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        });
        found[at].addresses.extend(address);
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
