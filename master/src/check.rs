//! What the program says about a configuration and about itself without serving: `-t`, `-T` and `-V`.

use std::io::{self, Write};
use std::process::ExitCode;

use culvert_shared::config::{self, Config};

use crate::args::Args;
use crate::kernel;
use crate::limits;
use crate::retain;

/// Loads the configuration; prints each error on a line of its own and returns `None` if there are any.
pub fn load(args: &Args) -> Option<Config> {
    match config::load(&args.config, &args.set) {
        Ok(config) => Some(config),
        Err(diagnostics) => {
            for diagnostic in diagnostics {
                complain(&diagnostic.to_string());
            }
            None
        }
    }
}

/// `-t`: checks the configuration and loads the BPF objects on trial. What only this host lacks is a
/// warning: the file may be right all the same, and the program serves without BPF.
pub fn test(args: &Args, quiet: bool) -> ExitCode {
    match examine(args, quiet) {
        Some(_) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

/// `-T`: as `-t`, then prints the effective configuration.
pub fn dump(args: &Args, quiet: bool) -> ExitCode {
    let Some(config) = examine(args, quiet) else {
        return ExitCode::FAILURE;
    };
    print(config::dump(&config).trim_end())
}

fn examine(args: &Args, quiet: bool) -> Option<Config> {
    let config = load(args)?;
    if kernel::wanted(&config)
        && let Err(error) = culvert_bpf::trial()
    {
        complain(&format!(
            "warning: in-kernel forwarding is not to be had here, sessions would be copied: {}",
            retain::explain(&error, "").0
        ));
    }
    if let Err(error) = limits::raise_descriptors(&config) {
        complain(&format!("warning: the program would not start here: {error:#}"));
    }
    if !quiet {
        complain(&format!(
            "configuration file {} test is successful",
            args.config.display()
        ));
    }
    Some(config)
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
