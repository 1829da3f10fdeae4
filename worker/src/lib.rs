//! A worker process: accepts, connects, hands sessions to the kernel, watches them end.
//!
//! A session's way, file by file: `accept` → `table` (its slot) → `route` → `balance` → `connect` →
//! `offload` (the kernel takes the pair; `pressure`: it holds a fast side back) or `relay` (user space copies) → `close` (totals, reason, log line).
//! `queue` lets sessions wait for a place at a peer, `check` asks the peers whether they live, beside all sessions.
//! `keep` lets a session outlive this process, `adopt` takes over what another one left.
//! `drive` decides what is done next, `session` holds the states, `event_loop` the only poll.

#![forbid(unsafe_code)]

mod accept;
mod adopt;
mod balance;
mod check;
mod clock;
mod close;
mod confine;
mod connect;
mod control;
mod drive;
mod event_loop;
mod keep;
mod offload;
mod pressure;
mod queue;
mod relay;
mod route;
mod session;
mod sockets;
mod start;
mod status;
mod steer;
mod store;
mod table;
mod timer;

pub use confine::Confinement;
pub use start::{Listener, WorkerStart, run};
pub use store::Store;
