//! What the program says about a configuration and about itself without serving: `-t`, `-T` and `-V`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use culvert_shared::config::{self, Address, Config, Diagnostic};

use crate::access_log::AccessLogs;
use crate::args::Args;
use crate::error_log::ErrorLog;
use crate::kernel;
use crate::limits;
use crate::retain;
use crate::tune;

/// Loads the configuration; prints each error on a line of its own and returns `None` if there are any.
pub fn load(args: &Args) -> Option<Config> {
    told(config::load(&args.config, &args.set))
}

/// The same with no more rights than the master will have: what root may read is not always its to read.
///
/// # Errors
/// Something could not be given up.
pub fn load_as_master(args: &Args) -> Result<Option<Config>> {
    retain::drop_the_rest()?;
    Ok(load(args))
}

/// Only where the master's process id is: whoever stops the program needs no more of its configuration.
pub fn load_pid(args: &Args) -> Option<PathBuf> {
    told(config::load_pid(&args.config, &args.set))
}

fn told<T>(loaded: Result<T, Vec<Diagnostic>>) -> Option<T> {
    match loaded {
        Ok(loaded) => Some(loaded),
        Err(diagnostics) => {
            for diagnostic in diagnostics {
                complain(&diagnostic.to_string());
            }
            None
        }
    }
}

/// `-t`: checks the configuration, opens its logs and loads the BPF objects on trial. That this host has no BPF is a warning: the
/// program serves without.
///
/// # Errors
/// Rights that the master does not have could not be given up.
pub fn test(args: &Args, quiet: bool) -> Result<ExitCode> {
    Ok(match examine(args, quiet)? {
        Some(_) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    })
}

/// `-T`: as `-t`, then prints the effective configuration.
///
/// # Errors
/// As with [`test`].
pub fn dump(args: &Args, quiet: bool) -> Result<ExitCode> {
    let Some(config) = examine(args, quiet)? else {
        return Ok(ExitCode::FAILURE);
    };
    Ok(print(config::dump(&config).trim_end()))
}

fn examine(args: &Args, quiet: bool) -> Result<Option<Config>> {
    let Some(config) = load_as_master(args)? else {
        return Ok(None);
    };
    if kernel::wanted(&config)
        && let Err(error) = culvert_bpf::trial()
    {
        complain(&format!(
            "warning: in-kernel forwarding is not to be had here, sessions would be copied: {}",
            retain::explain(&error, "").0
        ));
    }
    // The limits of whoever tries it need not be those of the service.
    if let Err(error) = limits::raise_descriptors(&config) {
        complain(&format!("warning: the program would not start here: {error:#}"));
    }
    let missing = missing(&config);
    if !missing.is_empty() {
        for error in missing {
            complain(&format!(
                "{}: the program would not start here: {error:#}",
                args.config.display()
            ));
        }
        return Ok(None);
    }
    if !quiet {
        complain(&format!(
            "configuration file {} test is successful",
            args.config.display()
        ));
    }
    Ok(Some(config))
}

/// What the configuration names and this host does not have. Logs are opened as at a start (as nginx does).
fn missing(config: &Config) -> Vec<anyhow::Error> {
    let mut missing: Vec<_> = ErrorLog::open(&config.error_log).err().into_iter().collect();
    missing.extend(AccessLogs::open(config).err());
    for server in &config.servers {
        for listen in &server.listen {
            match &listen.address {
                Address::Tcp(_) => missing.extend(tune::try_congestion(server, listen).err()),
                Address::Unix(path) => {
                    if let Some(folder) = path.parent().filter(|folder| !folder.is_dir()) {
                        missing.push(anyhow!(
                            "listener {}: there is no folder {}",
                            listen.address,
                            folder.display()
                        ));
                    }
                }
            }
        }
    }
    missing
}

/// `-V`: version, build, and what this kernel offers.
pub fn version() -> ExitCode {
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let mut lines = vec![
        format!("culvert {}", env!("CARGO_PKG_VERSION")),
        format!(
            "build {profile}, {}, {}",
            std::env::consts::ARCH,
            std::env::consts::OS
        ),
        format!("libbpf {}", culvert_bpf::libbpf_version()),
    ];
    lines.extend(culvert_bpf::probe());
    lines.extend(retain::probe());
    print(&lines.join("\n"))
}

/// Prints to standard output; a reader that went away (`| head`) is no error.
pub fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!("failed to write to standard output: {error}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Prints a line to standard error.
pub fn complain(line: &str) {
    // There is nowhere to report that standard error cannot be written.
    let _ = writeln!(io::stderr(), "{line}");
}
