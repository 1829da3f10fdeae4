//! A cgroup for one proxy, in which its sockets may take only so much memory: the kernel refuses what is beyond it, as
//! it does on a machine that is short of memory.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::within;

/// What a group may take without a limit: a number, because the first version of cgroups counts a group's sockets only
/// once they have one.
const PLENTY: u64 = 1 << 40;
const SOCKETS_LIMIT: &str = "memory.kmem.tcp.limit_in_bytes";

/// The group; it goes with this value, after its proxy.
#[derive(Debug)]
pub struct Cramped {
    path: PathBuf,
    files: Files,
    refusals_before: Cell<u64>,
}

/// How the group's limits are written and read.
#[derive(Debug, Clone, Copy)]
enum Files {
    /// cgroup v1: the memory of TCP sockets has a limit of its own.
    Sockets,
    /// cgroup v2: one limit for all memory, and a lower one above which the group is only slowed down.
    All,
}

impl Cramped {
    /// A new group, without a limit yet.
    #[track_caller]
    pub fn new() -> Cramped {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (root, files) = hierarchy();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("culvert-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("failed to create {}: {e}", path.display()));
        let group = Cramped {
            path,
            files,
            refusals_before: Cell::default(),
        };
        group.lift();
        group
    }

    /// What starts a program in the group: for [`super::Plan::launched_by`].
    pub fn launcher(&self) -> [String; 4] {
        let script = r#"echo $$ >"$0/cgroup.procs" && exec "$@""#;
        ["sh", "-c", script, &self.path.display().to_string()].map(str::to_owned)
    }

    /// Lets the group's sockets take this much, or not a byte more than they have. Where sockets have no limit of their
    /// own the group is slowed down above it.
    #[track_caller]
    pub fn allow(&self, bytes: u64) {
        self.limit(bytes, "memory.high");
    }

    /// The same; where sockets have no limit of their own, the kernel kills processes that need more.
    #[track_caller]
    pub fn allow_at_most(&self, bytes: u64) {
        self.limit(bytes, "memory.max");
    }

    #[track_caller]
    fn limit(&self, bytes: u64, file: &str) {
        let allowed = within(Duration::from_secs(2), || {
            let (file, limit) = match self.files {
                // Less than what is taken is refused.
                Files::Sockets => (
                    SOCKETS_LIMIT,
                    bytes.max(self.number("memory.kmem.tcp.usage_in_bytes")),
                ),
                Files::All => (file, bytes + self.number("memory.current")),
            };
            fs::write(self.path.join(file), limit.to_string()).is_ok()
        });
        match self.files {
            Files::Sockets => self.write("memory.kmem.tcp.max_usage_in_bytes", 0),
            Files::All => self.refusals_before.set(self.refusals()),
        }
        assert!(allowed, "failed to limit the memory of {}", self.path.display());
    }

    /// Lets the group take as much as it likes.
    pub fn lift(&self) {
        let files: &[&str] = match self.files {
            Files::Sockets => &[SOCKETS_LIMIT],
            Files::All => &["memory.max", "memory.high"],
        };
        files.iter().for_each(|file| self.write(file, PLENTY));
    }

    /// Whether the group has wanted more memory than it was last told that it may take.
    pub fn was_short(&self) -> bool {
        match self.files {
            // What TCP cannot do without it is given all the same, beyond the limit.
            Files::Sockets => self.number("memory.kmem.tcp.max_usage_in_bytes") > self.number(SOCKETS_LIMIT),
            Files::All => self.refusals() > self.refusals_before.get(),
        }
    }

    fn refusals(&self) -> u64 {
        let events = self.read("memory.events");
        let count = |line: &str| {
            let count = line.strip_prefix("max ").or_else(|| line.strip_prefix("high "))?;
            count.parse::<u64>().ok()
        };
        events.lines().filter_map(count).sum()
    }

    fn read(&self, file: &str) -> String {
        let path = self.path.join(file);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("failed to read {}: {e}", path.display()))
    }

    fn number(&self, file: &str) -> u64 {
        let text = self.read(file);
        text.trim()
            .parse()
            .unwrap_or_else(|e| panic!("{file} says {text}: {e}"))
    }

    fn write(&self, file: &str, bytes: u64) {
        let path = self.path.join(file);
        fs::write(&path, bytes.to_string())
            .unwrap_or_else(|e| panic!("failed to write {bytes} to {}: {e}", path.display()));
    }
}

impl Drop for Cramped {
    fn drop(&mut self) {
        // Its processes may have ended a moment ago.
        within(Duration::from_secs(2), || fs::remove_dir(&self.path).is_ok());
    }
}

/// Where groups with a limit on memory can be made.
#[track_caller]
fn hierarchy() -> (PathBuf, Files) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("reading the mounts");
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let Some(dash) = words.iter().position(|word| *word == "-") else {
            continue;
        };
        let root = Path::new(words[4]);
        let options = words.last().copied().unwrap_or_default();
        match words[dash + 1] {
            "cgroup" if options.split(',').any(|option| option == "memory") => {
                return (root.to_owned(), Files::Sockets);
            }
            "cgroup2" => {
                let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
                let enabled = fs::read_to_string(root.join("cgroup.subtree_control")).unwrap_or_default();
                if enabled
                    .split_whitespace()
                    .any(|controller| controller == "memory")
                {
                    return (root.to_owned(), Files::All);
                }
            }
            _ => (),
        }
    }
    panic!("no cgroup with a limit on memory can be made here: mount the memory controller");
}
