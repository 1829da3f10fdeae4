//! What one binary writes down for the next, which the same process executes: everything that the master
//! knows, with the numbers of the descriptors that stay open. The head can be read by any binary that knows
//! upgrades; the rest only by one that lays the shared memory out in the same way.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use culvert_bpf::{ENTRY_DESCRIPTORS, OWN_DESCRIPTORS};
use culvert_shared::{counters, limits, message, sessions};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::rows::Rows;

/// The version of [`State`]: change it with it.
const FORMAT: u32 = 5;

#[derive(Serialize, Deserialize)]
struct Head {
    /// The version of the binary that wrote it, for people.
    written_by: String,
    format: u32,
    /// How the memory is laid out that both use.
    layouts: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Writing<'a> {
    #[serde(flatten)]
    head: Head,
    state: &'a State,
}

#[derive(Deserialize)]
struct Reading {
    state: State,
}

/// The master's state. Durations count from the moment of writing; a descriptor is its number.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The process.
    pub pid: u32,
    /// Where the binary stands that is executed.
    pub binary: PathBuf,
    /// The effective capabilities.
    pub capabilities: Vec<String>,
    /// The configuration of the current generation, as `-T` prints it.
    pub config: String,
    /// The current generation.
    pub generation: u64,
    /// Every name that has had a row on the board.
    pub rows: Rows,
    /// It was told to pause.
    pub paused: bool,
    /// The newest owner mark.
    pub last_owner: u32,
    /// Address, worker slot, descriptor. A unix socket is that of all slots.
    pub listeners: Vec<(String, usize, RawFd)>,
    /// The cgroup that it is in, and the one that this is below if it was made by the program.
    pub cgroup: Option<(PathBuf, Option<PathBuf>)>,
    /// The index in `entries` of the entry program for new stores, where BPF is in use.
    pub bpf: Option<usize>,
    /// Why it is not.
    pub no_bpf: Option<String>,
    /// Entry programs that stores belong to, and the one for new stores.
    pub entries: Vec<[RawFd; ENTRY_DESCRIPTORS]>,
    /// Every store that sessions or workers are in.
    pub stores: Vec<StoreState>,
    /// The number of the newest store.
    pub last_store: u32,
    /// The stores of each slot: its own, and those that it cares for besides.
    pub slots: Vec<(u32, Vec<u32>)>,
    /// Why the slots' stores have no maps.
    pub no_maps: Option<String>,
    /// When the slot's dead worker is to be replaced.
    pub replace_in_ms: Vec<Option<u64>>,
    /// Every worker process.
    pub workers: Vec<WorkerState>,
    /// Kept sessions, the owner that cares for each, its sockets.
    pub sessions: Vec<(Id, Option<u32>, [RawFd; 2])>,
    /// Those that nobody cares for.
    pub unheld: Vec<Id>,
    /// The board's memory.
    pub board: RawFd,
    /// What limits count.
    pub limits: LimitsState,
    /// The log.
    pub log: RawFd,
    /// The access logs of the current generation, in order: the name of each, and its descriptor. Several may write to one.
    pub access_logs: Vec<(String, RawFd)>,
    /// The pid file, and the descriptor that holds its lock.
    pub pid_file: (PathBuf, RawFd),
}

/// A session: store, place, generation of its record.
pub type Id = [u32; 3];

/// See [`culvert_shared::limits::Limits`].
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct LimitsState {
    /// The memory of keys and of what sessions hold.
    pub memory: [RawFd; 2],
    /// What keys are hashed with.
    pub secret: [u64; 2],
}

/// See [`culvert_worker::Store`].
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct StoreState {
    /// Its number.
    pub id: u32,
    /// Sessions that fit.
    pub capacity: u32,
    /// The memory of its table.
    pub records: RawFd,
    /// Its maps.
    pub maps: Option<MapsState>,
}

/// See [`culvert_bpf::SlotMaps`].
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct MapsState {
    /// The maps and what goes with them.
    pub own: [RawFd; OWN_DESCRIPTORS],
    /// What their entry program knows them by.
    pub number: u32,
    /// The index of that in [`State::entries`].
    pub entry: usize,
}

/// See [`crate::worker::Worker`].
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerState {
    pub pid: i32,
    pub slot: usize,
    pub row: usize,
    pub owner: u32,
    pub generation: u64,
    pub stage: Stage,
    pub leaving: bool,
    pub stores: Vec<u32>,
    pub control: Option<RawFd>,
    pub to_adopt: Vec<Id>,
}

/// See [`crate::worker::State`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Stage {
    Starting,
    Serving,
    Draining { stop_in_ms: Option<u64> },
    Stopping { kill_in_ms: u64 },
    Killed,
}

/// Descriptors that are handed over with a document.
#[derive(Default)]
pub struct Descriptors<'a> {
    all: Vec<BorrowedFd<'a>>,
}

impl<'a> Descriptors<'a> {
    /// Hands it over; its number goes into the document.
    pub fn add(&mut self, descriptor: BorrowedFd<'a>) -> RawFd {
        self.all.push(descriptor);
        descriptor.as_raw_fd()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = BorrowedFd<'a>> {
        self.all.iter().copied()
    }
}

fn layouts() -> BTreeMap<String, String> {
    let texts = [
        ("counters", counters::layout()),
        ("sessions", sessions::layout()),
        ("limits", limits::layout()),
        ("messages", message::LAYOUT.to_owned()),
        ("maps", culvert_bpf::layout()),
    ];
    texts
        .into_iter()
        .map(|(what, layout)| (what.to_owned(), layout))
        .collect()
}

impl Head {
    fn ours() -> Head {
        Head {
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            format: FORMAT,
            layouts: layouts(),
        }
    }

    fn check(&self) -> Result<()> {
        let ours = Head::ours();
        ensure!(
            self.format == FORMAT,
            "the running binary (version {}) hands over in format {}, this one (version {}) takes format {FORMAT}",
            self.written_by,
            self.format,
            ours.written_by
        );
        for (what, layout) in &ours.layouts {
            let theirs = self.layouts.get(what).map_or("none", String::as_str);
            ensure!(
                layout == theirs,
                "the {what} of the running binary (version {}) are laid out as \"{theirs}\", this one (version {}) \
                 has \"{layout}\"",
                self.written_by,
                ours.written_by
            );
        }
        Ok(())
    }
}

/// Writes a document into a memory file that nobody can change any more.
///
/// # Errors
/// A name in it is not UTF-8, or there is no memory for it.
pub fn write(state: &State) -> Result<OwnedFd> {
    let what = "failed to write down what is handed over";
    let head = Head::ours();
    let text = serde_json::to_vec(&Writing { head, state }).context(what)?;
    let memory = memfd_create(
        c"culvert-upgrade",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .context(what)?;
    let mut file = File::from(memory);
    file.write_all(&text).context(what)?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).context(what)?;
    Ok(file.into())
}

/// Reads a document.
///
/// # Errors
/// This binary cannot go on with what it describes; the error says why.
pub fn read(memory: OwnedFd) -> Result<State> {
    let what = "failed to read what is handed over";
    let mut file = File::from(memory);
    let mut text = Vec::new();
    file.rewind().context(what)?;
    file.read_to_end(&mut text).context(what)?;
    parse(&text)
}

fn parse(text: &[u8]) -> Result<State> {
    let what = "what is handed over cannot be understood";
    let head: Head = serde_json::from_slice(text).context(what)?;
    head.check()?;
    let Reading { state } = serde_json::from_slice(text).context(what)?;
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            pid: 7,
            binary: "/usr/sbin/culvert".into(),
            capabilities: vec!["CAP_BPF".into()],
            config: "worker_processes = 1".into(),
            generation: 3,
            rows: Rows::default(),
            paused: false,
            last_owner: 9,
            listeners: vec![("[::1]:80".into(), 0, 4)],
            cgroup: Some(("/sys/fs/cgroup/culvert-7".into(), Some("/sys/fs/cgroup".into()))),
            bpf: Some(0),
            no_bpf: None,
            entries: vec![[10, 11, 12, 27, 28]],
            stores: vec![StoreState {
                id: 2,
                capacity: 64,
                records: 13,
                maps: Some(MapsState {
                    own: [14, 15, 16, 17, 18, 19, 20, 21, 22],
                    number: 1,
                    entry: 0,
                }),
            }],
            last_store: 2,
            slots: vec![(2, vec![1])],
            no_maps: None,
            replace_in_ms: vec![Some(5)],
            workers: vec![WorkerState {
                pid: 8,
                slot: 0,
                row: 1,
                owner: 9,
                generation: 3,
                stage: Stage::Draining { stop_in_ms: Some(10) },
                leaving: true,
                stores: vec![2],
                control: Some(23),
                to_adopt: vec![[2, 3, 4]],
            }],
            sessions: vec![([2, 0, 1], None, [24, 25])],
            unheld: vec![[2, 0, 1]],
            board: 6,
            limits: LimitsState {
                memory: [29, 30],
                secret: [u64::MAX, 1],
            },
            log: 3,
            access_logs: vec![("/var/log/culvert/access.log".into(), 31)],
            pid_file: ("/run/culvert.pid".into(), 26),
        }
    }

    fn changed(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
        let state = state();
        let head = Head::ours();
        let mut value = serde_json::to_value(Writing { head, state: &state }).unwrap();
        change(&mut value);
        serde_json::to_vec(&value).unwrap()
    }

    #[test]
    fn what_was_written_is_what_is_read() {
        let memory = write(&state()).unwrap();
        assert_eq!(read(memory).unwrap(), state());
    }

    #[test]
    fn a_document_cannot_be_changed_once_it_is_written() {
        let memory = write(&state()).unwrap();
        let error = File::from(memory).write(b"x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn another_layout_is_refused_by_its_name() {
        for what in ["counters", "sessions", "limits", "messages", "maps"] {
            let other = changed(|value| value["layouts"][what] = "another".into());
            let error = format!("{:#}", parse(&other).unwrap_err());
            assert!(
                error.contains(&format!("the {what} of the running binary")),
                "{error}"
            );
            let none = changed(|value| drop(value["layouts"].as_object_mut().unwrap().remove(what)));
            assert!(parse(&none).is_err());
        }
    }

    #[test]
    fn another_format_is_refused_before_its_content_is_looked_at() {
        let later = changed(|value| {
            value["format"] = (FORMAT + 1).into();
            value["state"] = "of another kind".into();
        });
        let error = format!("{:#}", parse(&later).unwrap_err());
        let hands_over = format!("hands over in format {}", FORMAT + 1);
        assert!(error.contains(&hands_over), "{error}");
        let broken = changed(|value| value["state"] = "of another kind".into());
        assert!(format!("{:#}", parse(&broken).unwrap_err()).contains("cannot be understood"));
    }
}
