//! The command line: turns the arguments into one [`Action`]. Never opens a file, never prints, never exits.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The configuration file that is read when `-c` is not given.
pub const DEFAULT_CONFIG: &str = "/etc/culvert/proxy.toml";

/// What `-h` prints.
pub const HELP: &str = "\
Culvert: a layer-4 proxy whose data path is the kernel

usage: master [-c FILE] [--set KEY=VALUE]...   run in the foreground
       master -t [-q] [-c FILE]                check the configuration
       master -T [-q] [-c FILE]                check it and print what is in effect, as TOML
       master -s SIGNAL [-c FILE]              signal the running master
       master --from-nginx NGINX.CONF          print what an nginx configuration is here, as TOML
       master -V                               version and what this kernel can do

  -c FILE           configuration file (default: /etc/culvert/proxy.toml)
  -t                check the configuration, open its logs and exit; binds nothing, safe beside a running master
  -T                as -t, then print the effective configuration
  -q                with -t or -T: print errors and warnings only
  -s SIGNAL         reload: take the configuration anew
                    quit: stop gracefully; stop: stop at once
                    reopen: open the log files anew
      --set KEY=VALUE
                    override one key, e.g. --set worker_processes=2 --set stream.proxy_timeout=5s;
                    may be repeated
      --from-nginx NGINX.CONF
                    print the stream block of an nginx configuration as TOML, and on standard error each
                    line that cannot be carried over, with the reason; 0 if there is none
  -V, --version     print version, build, libbpf and the kernel's abilities
  -h, --help        print this text

A key can be overridden by the environment too: CULVERT_WORKER_PROCESSES=2,
CULVERT_STREAM__PROXY_TIMEOUT=5s. The order is: defaults, file, environment, --set.
";

/// A command line that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// What is asked for.
    pub action: Action,
    /// The configuration file, as given or [`DEFAULT_CONFIG`]; nginx's for [`Action::FromNginx`].
    pub config: PathBuf,
    /// The `--set` overrides, `key=value` each, in the order given; the key is never empty.
    pub set: Vec<String>,
}

/// What one call of the program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run in the foreground.
    Run,
    /// `-t`: check the configuration.
    Test {
        /// Print errors only.
        quiet: bool,
    },
    /// `-T`: check the configuration, then print what is in effect.
    Dump {
        /// Print errors and the configuration, but not that the check was successful.
        quiet: bool,
    },
    /// `-s`: signal the running master.
    Signal(Signal),
    /// `--take-over-check`: say whether this binary could take over what the document in this descriptor
    /// describes. Not for people: the running master asks.
    TakeOverCheck(RawFd),
    /// `--take-over`: go on with it.
    TakeOver(RawFd),
    /// `--from-nginx`: print what an nginx configuration is here.
    FromNginx,
    /// `-V`: print the version and what the kernel probe found.
    Version,
    /// `-h`: print [`HELP`].
    Help,
}

/// The signals of `-s`, by nginx's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// HUP: take the configuration anew.
    Reload,
    /// QUIT: stop gracefully.
    Quit,
    /// TERM: stop fast.
    Stop,
    /// USR1: open the log files anew.
    Reopen,
}

impl Signal {
    const ALL: [(&'static str, Signal); 4] = [
        ("reload", Signal::Reload),
        ("quit", Signal::Quit),
        ("stop", Signal::Stop),
        ("reopen", Signal::Reopen),
    ];

    /// The name that is written after `-s`.
    pub fn name(self) -> &'static str {
        match self {
            Signal::Reload => "reload",
            Signal::Quit => "quit",
            Signal::Stop => "stop",
            Signal::Reopen => "reopen",
        }
    }
}

/// Why a command line was not understood; displays as one line without a final full stop or newline.
/// The program prints it on stderr and exits with 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (master -h lists the options)", self.0)
    }
}

impl std::error::Error for UsageError {}

/// Reads the arguments, without the program's own name: `parse(std::env::args_os().skip(1))`.
///
/// Single-letter options may be joined (`-tq`) and may hold their value (`-cFILE`), as with nginx.
/// The last `-c` counts.
///
/// # Errors
///
/// Wrong usage: an unknown option, a missing value, a stray argument, options that exclude each other.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, UsageError> {
    let mut seen = Seen::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if let Some(long) = bytes.strip_prefix(b"--") {
            long_option(long, &mut args, &mut seen)?;
        } else if let Some(letters) = bytes.strip_prefix(b"-").filter(|l| !l.is_empty()) {
            short_options(letters, &mut args, &mut seen)?;
        } else {
            return Err(UsageError(format!(
                "unexpected argument {}: a configuration file is given by -c FILE",
                shown(&arg)
            )));
        }
    }
    seen.finish()
}

/// The options that were given, before it is known whether they go together.
#[derive(Default)]
struct Seen {
    config: Option<PathBuf>,
    set: Vec<String>,
    test: bool,
    dump: bool,
    quiet: bool,
    signal: Option<Signal>,
    upgrade: Option<Action>,
    from_nginx: Option<PathBuf>,
    version: bool,
    help: bool,
}

impl Seen {
    fn finish(self) -> Result<Args, UsageError> {
        if self.signal.is_some() && (self.test || self.dump) {
            let other = if self.dump { "-T" } else { "-t" };
            return Err(UsageError(format!(
                "-s and {other} exclude each other: check first, then signal"
            )));
        }
        if self.from_nginx.is_some()
            && (self.test
                || self.dump
                || self.signal.is_some()
                || self.config.is_some()
                || !self.set.is_empty())
        {
            return Err(UsageError(
                "--from-nginx stands alone: write what it prints to a file, then check that with -t"
                    .to_owned(),
            ));
        }
        if self.quiet && !(self.test || self.dump || self.help || self.version) {
            return Err(UsageError("-q goes with -t or -T only".to_owned()));
        }
        let action = match self.signal {
            _ if self.help => Action::Help,
            _ if self.version => Action::Version,
            Some(signal) => Action::Signal(signal),
            None if self.upgrade.is_some() => self.upgrade.unwrap_or(Action::Run),
            None if self.from_nginx.is_some() => Action::FromNginx,
            None if self.dump => Action::Dump { quiet: self.quiet },
            None if self.test => Action::Test { quiet: self.quiet },
            None => Action::Run,
        };
        let config = self
            .config
            .or(self.from_nginx)
            .unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG));
        Ok(Args {
            action,
            config,
            set: self.set,
        })
    }
}

fn long_option(
    option: &[u8],
    rest: &mut impl Iterator<Item = OsString>,
    seen: &mut Seen,
) -> Result<(), UsageError> {
    let (name, inline) = match option.iter().position(|&b| b == b'=') {
        Some(at) => (
            &option[..at],
            Some(OsStr::from_bytes(&option[at + 1..]).to_owned()),
        ),
        None => (option, None),
    };
    match (name, inline) {
        (b"set", inline) => {
            let value = value_of("--set", "KEY=VALUE", inline, rest)?;
            seen.set.push(key_and_value(value)?);
        }
        (b"from-nginx", inline) => {
            let value = value_of("--from-nginx", "NGINX.CONF", inline, rest)?;
            seen.from_nginx = Some(PathBuf::from(value));
        }
        (b"take-over", inline) => {
            let value = value_of("--take-over", "FD", inline, rest)?;
            seen.upgrade = Some(Action::TakeOver(descriptor(&value)?));
        }
        (b"take-over-check", inline) => {
            let value = value_of("--take-over-check", "FD", inline, rest)?;
            seen.upgrade = Some(Action::TakeOverCheck(descriptor(&value)?));
        }
        (b"version", None) => seen.version = true,
        (b"help", None) => seen.help = true,
        (b"version" | b"help", Some(_)) => {
            return Err(UsageError(format!(
                "--{} takes no value",
                String::from_utf8_lossy(name)
            )));
        }
        _ => {
            let name = [b"--", name].concat();
            return Err(UsageError(format!(
                "unknown option {}",
                shown(OsStr::from_bytes(&name))
            )));
        }
    }
    Ok(())
}

fn short_options(
    letters: &[u8],
    rest: &mut impl Iterator<Item = OsString>,
    seen: &mut Seen,
) -> Result<(), UsageError> {
    for (at, &letter) in letters.iter().enumerate() {
        let attached = &letters[at + 1..];
        let inline = (!attached.is_empty()).then(|| OsString::from_vec(attached.to_vec()));
        match letter {
            b't' => seen.test = true,
            b'T' => seen.dump = true,
            b'q' => seen.quiet = true,
            b'V' => seen.version = true,
            b'h' => seen.help = true,
            b'c' => {
                let file = value_of("-c", "FILE", inline, rest)?;
                seen.config = Some(PathBuf::from(file));
                return Ok(());
            }
            b's' => {
                let name = value_of("-s", "SIGNAL", inline, rest)?;
                seen.signal = Some(signal(&name)?);
                return Ok(());
            }
            _ => {
                // A letter outside ASCII is shown with its remaining bytes, or it would be cut apart.
                let end = if letter.is_ascii() { at + 1 } else { letters.len() };
                let option = [b"-", &letters[at..end]].concat();
                return Err(UsageError(format!(
                    "unknown option {}",
                    shown(OsStr::from_bytes(&option))
                )));
            }
        }
    }
    Ok(())
}

/// The value of an option: attached to it, or the next argument.
fn value_of(
    option: &str,
    what: &str,
    inline: Option<OsString>,
    rest: &mut impl Iterator<Item = OsString>,
) -> Result<OsString, UsageError> {
    match inline.or_else(|| rest.next()) {
        Some(value) if !value.is_empty() => Ok(value),
        _ => Err(UsageError(format!("{option} needs a value: {option} {what}"))),
    }
}

fn key_and_value(given: OsString) -> Result<String, UsageError> {
    let text = given.into_string().map_err(|bad| {
        UsageError(format!(
            "--set {} is not valid UTF-8: write --set KEY=VALUE",
            shown(&bad)
        ))
    })?;
    match text.split_once('=') {
        Some((key, _)) if !key.trim().is_empty() => Ok(text),
        _ => Err(UsageError(format!(
            "--set {} is not KEY=VALUE: write for example --set worker_processes=2",
            shown(OsStr::new(&text))
        ))),
    }
}

fn descriptor(given: &OsStr) -> Result<RawFd, UsageError> {
    let number = given.to_str().and_then(|text| text.parse().ok());
    number.ok_or_else(|| UsageError(format!("{} is not the number of a descriptor", shown(given))))
}

fn signal(name: &OsStr) -> Result<Signal, UsageError> {
    let known = Signal::ALL.iter().find(|(known, _)| OsStr::new(known) == name);
    known.map(|(_, signal)| *signal).ok_or_else(|| {
        UsageError(format!(
            "unknown signal {} for -s: allowed are reload, quit, stop, reopen",
            shown(name)
        ))
    })
}

/// An argument for an error message: quoted and with control characters escaped, so it stays one line.
fn shown(arg: &OsStr) -> String {
    format!("{:?}", arg.to_string_lossy())
}

#[cfg(test)]
mod tests;
