//! A worker process: accepts, connects, hands sessions to the kernel, watches them end.
//!
//! A session's way, file by file: `accept` → `table` (its slot) → `preread` (what its client must send first) → `route` → `balance` → `connect` →
//! `offload` (the kernel takes the pair; `pressure`: it holds a fast side back, `drain`: until when, `deaf`: and what may not be, `gather`: small pieces are copied for a while) or `relay` (user space copies, no faster than `pace` lets it) → `close` (totals, reason, log line).
//! `naming` lets sessions wait for the addresses of a host that they lead to by name, `hosts` knows those that were asked for.
//! `queue` lets sessions wait for a place at a peer, `check` asks the peers whether they live, beside all sessions.
//! `keep` lets a session outlive this process, `adopt` takes over what another one left.
//! `access_log` gathers the lines that `access_line` writes of ended sessions, `log_writer` waits for the disk.
//! `http` serves `status`, `page` and `metrics`; `busy` tells every worker of the busiest sessions of all.
//! `drive` decides what is done next, `session` holds the states, `event_loop` the only poll.

#![forbid(unsafe_code)]

mod accept;
mod access_line;
mod access_log;
mod adopt;
mod balance;
mod brevity;
mod busy;
mod check;
mod client_hello;
mod clock;
mod close;
mod confine;
mod connect;
mod control;
mod deaf;
mod dial;
mod drain;
mod drive;
mod event_loop;
#[cfg(test)]
mod fuzz;
mod gather;
mod hosts;
mod http;
mod keep;
mod log_writer;
mod map;
mod metrics;
mod naming;
mod offload;
mod pace;
mod page;
mod preread;
mod pressure;
mod proxy_protocol;
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
mod tally;
mod timer;

pub use confine::Confinement;
pub use start::{Listener, Served, WorkerStart, run};
pub use store::Store;
