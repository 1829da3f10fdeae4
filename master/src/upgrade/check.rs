//! Whether this binary can take over from the one that runs: asked by that one, in a process of its own,
//! before anything is changed. What it says goes into the running one's log.

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use caps::CapSet;
use culvert_bpf::Cgroup;
use culvert_shared::config;
use culvert_shared::sys::inherit;

use super::document::{self, State};
use super::take_over;
use crate::args::Args;
use crate::generation;
use crate::{check, kernel};

/// The answer of a binary that can. An exit status alone could be any program's.
pub const YES: &str = "culvert: this binary can take over";

/// `--take-over-check`: answers for the document in that descriptor.
pub fn run(args: &Args, document: RawFd) -> ExitCode {
    match examine(args, document) {
        Ok(()) => check::print(YES),
        Err(error) => {
            // As much as is read of it: a pipe that is full would hold this process up until it is given up.
            let words: String = format!("{error:#}").chars().take(super::WORDS).collect();
            check::complain(&words);
            ExitCode::FAILURE
        }
    }
}

fn examine(args: &Args, document: RawFd) -> Result<()> {
    let state = document::read(inherit::take(document)?)?;
    check_rights(&state)?;
    let config = match config::load(&args.config, &args.set) {
        Ok(config) => config,
        Err(diagnostics) => {
            let lines: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
            bail!("the configuration has errors: {}", lines.join("; "));
        }
    };
    generation::check(&config, &state.rows)?;
    // Until it has reloaded it goes on with the present one, and by then nobody could be told that it cannot.
    let present = take_over::current_config(args, &state.config)?;
    generation::check(&present, &state.rows).context("with the configuration that is in force")?;
    if state.bpf.is_some() && kernel::wanted(&config) {
        // In this process and with maps of its own: the ones in use do not notice.
        kernel::open_trusted(&Cgroup::stay())
            .map_err(|(error, _)| error)
            .context("in-kernel forwarding works for the running binary, and would not for this one")?;
    }
    Ok(())
}

/// The rights of this process are those that the running one would have after executing the same file.
fn check_rights(state: &State) -> Result<()> {
    let held: BTreeSet<String> = effective_capabilities()?.into_iter().collect();
    let lost: Vec<&str> = state
        .capabilities
        .iter()
        .filter(|name| !held.contains(*name))
        .map(String::as_str)
        .collect();
    ensure!(
        lost.is_empty(),
        "it would run without {}, which the running binary has: file capabilities are not inherited, give them to \
         the new file as well (setcap)",
        lost.join(", ")
    );
    Ok(())
}

/// The names of this process's effective capabilities.
///
/// # Errors
/// The kernel does not say.
pub fn effective_capabilities() -> Result<Vec<String>> {
    let held = caps::read(None, CapSet::Effective).context("failed to read the capabilities")?;
    let mut names: Vec<String> = held.iter().map(ToString::to_string).collect();
    names.sort();
    Ok(names)
}
