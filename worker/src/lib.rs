//! A worker process: accepts, connects, hands sessions to the kernel, watches them end.
//!
//! A session's way, file by file: `accept` → `table` (its slot) → `preread` (what its client must send first) → `route` → `balance` → `connect` →
//! `offload` (the kernel takes the pair; `pressure`: it holds a fast side back) or `relay` (user space copies) → `close` (totals, reason, log line).
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
mod busy;
mod client_hello;
mod clock;
mod close;
mod confine;
mod connect;
mod control;
mod dial;
mod drive;
mod event_loop;
#[cfg(test)]
mod fuzz;
mod http;
mod keep;
mod log_writer;
mod map;
mod metrics;
mod offload;
mod page;
mod preread;
mod pressure;
mod proxy_protocol;
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
pub use start::{Listener, WorkerStart, run};
pub use store::Store;
