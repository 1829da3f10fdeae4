//! From a file to a [`Config`]: reads, lays the layers over one another, checks, and tells what is wrong.

use std::path::{Path, PathBuf};

use config::{Map, Value};

use super::diagnostic::Findings;
use super::source::Reader;
use super::world::{Bare, Machine, World};
use super::{Config, Diagnostic, Place, check, layer};

/// Reads, merges and checks a configuration: the file with what it includes, over it the environment
/// (`CULVERT_STREAM__PROXY_TIMEOUT=5s`), over that `overrides` (`stream.proxy_timeout=5s`, the last one counts).
///
/// # Errors
///
/// All errors that were found, in file order, then those of the environment and of `overrides`.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config, Vec<Diagnostic>> {
    load_in(&Machine, path, overrides)
}

/// Only where the master of a configuration writes its process id, whatever else is wrong in it: who wants to stop a program must not
/// have to mend its file first, nor wait for name servers.
///
/// # Errors
///
/// `pid` itself is wrong, or a file cannot be read as TOML.
pub fn load_pid(path: &Path, overrides: &[String]) -> Result<PathBuf, Vec<Diagnostic>> {
    let (mut findings, root) = merge(&Machine, |reader| reader.file(path), path, overrides)?;
    match check::pid(&Machine, &mut findings, &root) {
        Some(pid) => Ok(pid),
        None => Err(findings.into_diagnostics()),
    }
}

/// Checks a text as [`load`] checks the file at `path`, which need not exist.
///
/// # Errors
///
/// As with [`load`].
pub fn load_text(path: &Path, text: &str) -> Result<Config, Vec<Diagnostic>> {
    read_in(&Machine, |reader| reader.bytes(path, text.as_bytes()), path, &[])
}

/// Takes what [`super::dump()`] has written for the same again. The environment is in it: an override would count twice, and a
/// variable that the file named (`${CULVERT_PEER}`) would be one.
///
/// # Errors
///
/// As with [`load`].
pub fn load_dumped(text: &str) -> Result<Config, Vec<Diagnostic>> {
    load_dumped_in(&Machine, text)
}

pub(super) fn load_dumped_in(world: &dyn World, text: &str) -> Result<Config, Vec<Diagnostic>> {
    let path = Path::new("the configuration in force");
    let read = |reader: &mut Reader| reader.bytes(path, text.as_bytes());
    read_in(&Bare(world), read, path, &[])
}

pub(super) fn load_in(
    world: &dyn World,
    path: &Path,
    overrides: &[String],
) -> Result<Config, Vec<Diagnostic>> {
    read_in(world, |reader| reader.file(path), path, overrides)
}

pub(super) fn read_in(
    world: &dyn World,
    read: impl FnOnce(&mut Reader),
    path: &Path,
    overrides: &[String],
) -> Result<Config, Vec<Diagnostic>> {
    let (mut findings, root) = merge(world, read, path, overrides)?;
    let config = check::check(world, &mut findings, &root);
    if findings.is_empty() {
        Ok(config)
    } else {
        Err(findings.into_diagnostics())
    }
}

/// All layers in one, with what is wrong about them.
fn merge(
    world: &dyn World,
    read: impl FnOnce(&mut Reader),
    path: &Path,
    overrides: &[String],
) -> Result<(Findings, Map<String, Value>), Vec<Diagnostic>> {
    let mut findings = Findings::default();
    // What is missing altogether is reported here.
    findings.origin(
        Place::File {
            path: path.to_owned(),
            line: 1,
            column: 1,
        },
        String::new(),
        false,
    );
    let mut reader = Reader::new(world, &mut findings);
    read(&mut reader);
    let (files, named, unreadable) = (reader.root, reader.named, reader.unreadable);
    if unreadable {
        // Half a configuration would give errors that are none.
        return Err(findings.into_diagnostics());
    }
    let root = layer::merge(world, &mut findings, files, &named, overrides);
    Ok((findings, root))
}
