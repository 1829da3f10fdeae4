//! Other processes as `/proc` shows them. Reads only.

use std::path::PathBuf;
use std::time::Duration;

/// A line of `/proc/<pid>/status`, without its key.
#[track_caller]
pub fn field(pid: i32, key: &str) -> String {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("failed to read {path}: {e}"));
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("{path} has no {key}"))
        .trim()
        .to_owned()
}

/// How often the threads of the process have gone to sleep by themselves.
pub fn voluntary_switches(pid: i32) -> u64 {
    let path = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("failed to read {path}: {e}"));
    let threads = tasks
        .flatten()
        .filter_map(|task| task.file_name().to_str()?.parse().ok());
    threads
        .map(|thread: i32| {
            field(thread, "voluntary_ctxt_switches")
                .parse::<u64>()
                .expect("a number")
        })
        .sum()
}

/// What the process has had of the processors so far, which does not depend on what else they have to do.
#[track_caller]
pub fn processor_time(pid: i32) -> Duration {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("failed to read {path}: {e}"));
    // What follows the command in parentheses, from the third field on: utime and stime are the 14th and 15th.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("a number of ticks");
    // USER_HZ is 100 everywhere but on Alpha.
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// How long the first thread of the process, in all, could have run and had no processor; nothing where the kernel does
/// not count that.
pub fn waited_for_a_processor(pid: i32) -> Duration {
    // Nanoseconds on a processor, nanoseconds in wait for one, turns.
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
    let waited = text.split_whitespace().nth(1).and_then(|ns| ns.parse().ok());
    Duration::from_nanos(waited.unwrap_or(0))
}

/// Open descriptors, what each refers to.
#[track_caller]
pub fn descriptors(pid: i32) -> Vec<PathBuf> {
    let path = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("failed to read {path}: {e}"));
    let mut list: Vec<_> = entries
        .flatten()
        .filter_map(|e| std::fs::read_link(e.path()).ok())
        .collect();
    list.sort();
    list
}

/// TCP connections, of whatever state, that the process has a descriptor of.
#[track_caller]
pub fn connections(pid: i32) -> Vec<String> {
    let own = descriptors(pid);
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Local address, remote address, state (0A: listening), and further on the inode.
            if let (Some(state), Some(inode)) = (words.get(3), words.get(9))
                && *state != "0A"
                && own.contains(&PathBuf::from(format!("socket:[{inode}]")))
            {
                found.push(words[1..4].join(" "));
            }
        }
    }
    found
}

/// The file that the process runs; `(deleted)` stands after it when it has been replaced.
#[track_caller]
pub fn executable(pid: i32) -> PathBuf {
    let path = format!("/proc/{pid}/exe");
    std::fs::read_link(&path).unwrap_or_else(|e| panic!("failed to read {path}: {e}"))
}

/// The children of every thread of the process.
pub fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| {
            text.split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// Whether a worker has begun to serve: the thread that writes its log is the last thing that it starts, when it has
/// given up what it does not need.
pub fn is_past_its_start(pid: i32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() >= 2)
}

/// Whether the process exists and is more than a zombie.
pub fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the command in parentheses, which may contain anything.
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.starts_with(['Z', 'X']))
}
