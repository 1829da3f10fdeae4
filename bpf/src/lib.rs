//! The BPF side of the data path: the programs' user-space half, and the only crate that names libbpf-rs.
//!
//! `load` makes the maps of a worker slot and attaches the verdict program (master); `pair` moves two
//! sockets into them and reads their counters (worker); `abi` mirrors `c/abi.h`; `probe` tells what the
//! running kernel offers.

mod abi;
mod load;
mod pair;
mod probe;
mod skel;

pub use abi::flow_flag;
pub use load::{Bpf, Totals, trial};
pub use pair::{FlowState, Joined, Pair, PairPool, SlotMaps};
pub use probe::{libbpf_version, probe};
