//! The BPF side of the data path: the programs' user-space half, and the only crate that names libbpf-rs.
//!
//! `load` makes the maps of a worker slot and attaches the programs, `cgroup` is where (master); `pair` moves
//! two sockets into the maps and reads their counters, `events` hears what the programs tell (worker);
//! `accept` lets a program choose the worker of a new connection; `abi` mirrors `c/abi.h`; `selftest` tries
//! whether a kernel can be trusted with it, `probe` tells what the running kernel offers; `take_over` goes on
//! with what an earlier binary made.

mod abi;
mod accept;
mod cgroup;
mod events;
mod load;
mod pair;
mod probe;
pub mod selftest;
mod skel;
mod take_over;

pub use abi::{SMALL_SEGMENT, flow_flag};
pub use accept::{Group, Put, SlotLoad, Steering};
pub use cgroup::Cgroup;
pub use events::{Event, EventKind, Events};
pub use load::{Bpf, ENTRY_DESCRIPTORS, Entry, SlotState, Totals, trial};
pub use pair::{
    FlowState, Hold, Joined, LaneNumber, OWN_DESCRIPTORS, Outstanding, SlotMaps, Terms, largest_send_buffer,
    largest_window,
};
pub use probe::{libbpf_version, probe};
pub use take_over::layout;
