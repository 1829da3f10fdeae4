//! The master: configuration → listeners → BPF → workers → supervision.
//!
//! `boot` is the start order, `supervise` the loop that follows it, `reload` the change from one
//! `generation` to the next. A generation is made of `listen` (`tune`, `unix_socket`), `accepting`, `kernel` and `rows`; `spawn` makes a
//! `worker` of it, which `rights` disarms first; `retain` disarms the master. `keeper` holds what sessions need to
//! outlive their workers. `notify` tells a service manager, `steering` is what is changed on the host.
//! `upgrade` turns the running master into another binary, `from_nginx` an nginx configuration into one for it.

#![forbid(unsafe_code)]

mod accepting;
mod access_log;
mod args;
mod backoff;
mod boot;
mod buffers;
mod building;
mod care;
mod check;
mod error_log;
mod from_nginx;
mod generation;
mod keeper;
mod kernel;
mod limits;
mod listen;
mod names;
mod notify;
mod pidfile;
mod reload;
mod retain;
mod rights;
mod rows;
mod signal;
mod spawn;
mod steering;
mod supervise;
#[cfg(test)]
mod testing;
mod tune;
mod unix_socket;
mod upgrade;
mod worker;

use std::process::ExitCode;

use anyhow::Result;

use args::{Action, Args, Signal};

/// Wrong usage, as distinct from a configuration or a start that fails.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            check::complain(&format!("master: {error}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match act(args) {
        Ok(code) => code,
        Err(error) => {
            check::complain(&format!("master: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn act(args: Args) -> Result<ExitCode> {
    match args.action {
        Action::Run => boot::run(args),
        Action::Test { quiet } => check::test(&args, quiet),
        Action::Dump { quiet } => check::dump(&args, quiet),
        Action::Signal(signal) => {
            let pid_file = match signal {
                Signal::Reload => check::load_as_master(&args)?.map(|config| config.pid),
                Signal::Quit | Signal::Stop | Signal::Reopen => check::load_pid(&args),
            };
            match pid_file {
                Some(pid_file) => signal::send(signal, &pid_file).map(|()| ExitCode::SUCCESS),
                None => Ok(ExitCode::FAILURE),
            }
        }
        Action::TakeOverCheck(document) => Ok(upgrade::check::run(&args, document)),
        Action::TakeOver(document) => upgrade::take_over::run(args, document),
        Action::FromNginx => from_nginx::run(&args.config),
        Action::Version => Ok(check::version()),
        Action::Help => Ok(check::print(args::HELP.trim_end())),
    }
}
