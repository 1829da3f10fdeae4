//! The black-box tests that get along beside each other: one program, so that the harness is compiled and linked once.
//! `machine.rs` has those that do not. `README.md` says which test goes where.

mod harness;

mod accept;
mod access;
mod access_log;
mod balance;
mod care;
mod checks;
mod combinations;
mod config_errors;
mod datapath;
mod endings;
mod fallback;
mod from_nginx;
mod http;
mod keeper_room;
mod lifecycle;
mod many;
mod names;
mod offload_after;
mod on_reload;
mod orphans;
mod outlive_reading;
mod outlive_states;
mod preread;
mod programs;
mod proxy_bind;
mod proxy_protocol;
mod queue;
mod random;
mod rates;
mod reload;
mod rights;
mod routing;
mod run_time_names;
mod seed;
mod service;
mod sockets;
mod syslog;
mod timeouts;
mod upgrade;
mod workers;
