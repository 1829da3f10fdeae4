//! Networks of the test's own: namespaces that are gone when it ends.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use super::PATIENCE;
use super::program::{need, shell};

/// Some networks, by number; each has its loopback.
#[derive(Debug)]
pub struct Networks<const N: usize> {
    /// How `ip netns` names them.
    pub names: [String; N],
}

impl<const N: usize> Networks<N> {
    /// Makes one for each letter, then runs the commands that connect them, given their names.
    pub fn new(letters: [&str; N], commands: impl FnOnce([&str; N]) -> Vec<String>) -> Networks<N> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        need("ip", "iproute2");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let names = letters.map(|letter| format!("cv{letter}{}-{number}", std::process::id()));
        let networks = Networks { names };
        for name in &networks.names {
            shell(
                &format!("ip netns add {name}; ip -n {name} link set lo up"),
                PATIENCE,
            );
        }
        for command in commands(networks.names.each_ref().map(String::as_str)) {
            shell(&command, PATIENCE);
        }
        networks
    }

    /// Does something in one of them; sockets and processes that are made there stay there.
    pub fn within<T: Send>(&self, network: usize, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter(network).expect("entering a network (as root?)");
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Has the calling thread be in one of them from now on, and whatever it starts.
    pub fn enter(&self, network: usize) -> std::io::Result<()> {
        let file = File::open(format!("/run/netns/{}", self.names[network]))?;
        Ok(setns(&file, CloneFlags::CLONE_NEWNET)?)
    }
}

impl<const N: usize> Drop for Networks<N> {
    fn drop(&mut self) {
        for name in &self.names {
            let mut command = Command::new("ip");
            command.args(["netns", "del", name]);
            let _ = command.status();
        }
    }
}
