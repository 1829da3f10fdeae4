//! What the master and its workers must agree on.
//!
//! Imports none of its siblings: `master` → `worker` → `bpf` → `shared`.

pub mod busy;
pub mod client;
pub mod config;
pub mod congestion;
pub mod counters;
pub mod health;
pub mod hosts;
pub mod ids;
pub mod limits;
pub mod logging;
pub mod members;
pub mod message;
pub mod output;
pub mod peers;
pub mod queue;
pub mod sessions;
pub mod sys;
