//! What a configuration is checked against outside its text: environment, CPUs, users, names.
//! The only part of this folder that asks the machine, so that tests can put another one in its place.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};

use super::User;
use super::cpus;

/// The machine as far as a configuration is concerned.
pub(super) trait World {
    /// An environment variable.
    fn variable(&self, name: &str) -> Option<OsString>;
    /// All environment variables.
    fn variables(&self) -> Vec<(OsString, OsString)>;
    /// The CPUs that are online, ascending.
    fn online_cpus(&self) -> Vec<usize>;
    /// The CPUs that this process may use, ascending, never empty.
    fn allowed_cpus(&self) -> Vec<usize>;
    /// A user by name.
    fn user(&self, name: &str) -> io::Result<Option<User>>;
    /// The addresses of a host.
    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

/// This machine.
pub(super) struct Machine;

impl World for Machine {
    fn variable(&self, name: &str) -> Option<OsString> {
        std::env::var_os(name)
    }

    fn variables(&self) -> Vec<(OsString, OsString)> {
        std::env::vars_os().collect()
    }

    fn online_cpus(&self) -> Vec<usize> {
        let listed = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
        let listed = listed.and_then(|text| cpus::parse_list(text.trim()));
        // Without /sys (a bare container) the number of CPUs is the next best thing to know.
        listed.unwrap_or_else(|| (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect())
    }

    fn allowed_cpus(&self) -> Vec<usize> {
        // The status file, not sched_getaffinity with its fixed set of 1024 CPUs. Its list may hold CPUs that are
        // possible but absent, hence the intersection.
        let online = self.online_cpus();
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let listed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let mut allowed = listed
            .and_then(|text| cpus::parse_list(text.trim()))
            .unwrap_or_default();
        allowed.retain(|cpu| online.contains(cpu));
        if allowed.is_empty() { online } else { allowed }
    }

    fn user(&self, name: &str) -> io::Result<Option<User>> {
        let user = nix::unistd::User::from_name(name).map_err(io::Error::from)?;
        Ok(user.map(|user| User {
            name: name.to_owned(),
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        }))
    }

    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok((host, port).to_socket_addrs()?.collect())
    }
}

/// A machine without its environment, for what has been through it already.
pub(super) struct Bare<'w>(pub &'w dyn World);

impl World for Bare<'_> {
    fn variable(&self, _: &str) -> Option<OsString> {
        None
    }

    fn variables(&self) -> Vec<(OsString, OsString)> {
        Vec::new()
    }

    fn online_cpus(&self) -> Vec<usize> {
        self.0.online_cpus()
    }

    fn allowed_cpus(&self) -> Vec<usize> {
        self.0.allowed_cpus()
    }

    fn user(&self, name: &str) -> io::Result<Option<User>> {
        self.0.user(name)
    }

    fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        self.0.resolve(host, port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_cpu_that_may_be_used() {
        let online = Machine.online_cpus();
        let allowed = Machine.allowed_cpus();
        assert!(!allowed.is_empty());
        assert!(
            allowed.iter().all(|cpu| online.contains(cpu)),
            "{allowed:?} within {online:?}"
        );
    }

    #[test]
    fn root_is_found_and_nonsense_is_not() {
        assert_eq!(
            Machine.user("root").expect("looked up").map(|user| user.uid),
            Some(0)
        );
        assert_eq!(Machine.user("no such user").expect("looked up"), None);
    }
}
