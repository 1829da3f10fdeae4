//! `include`: which files a pattern names, in which order. Reading them is `source`'s work.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use config::{Value, ValueKind};

use super::diagnostic::{Fault, OriginId, short};
use super::source::{Reader, entries, identity};

/// What is said to every wrong `include`.
const INCLUDE: &str = "write a file or a pattern such as \"conf.d/*.toml\"";

/// What a pattern names, in the order of its bytes (the C locale). As with nginx, a pattern may name nothing; a plain name
/// is one.
fn matching(including: &Path, pattern: &str) -> Result<Vec<PathBuf>, Fault> {
    let directory = including.parent().unwrap_or(Path::new(""));
    if !pattern.contains(['*', '?', '[']) {
        return Ok(vec![directory.join(pattern)]);
    }
    let pattern = match Path::new(pattern).is_absolute() {
        true => pattern.to_owned(),
        false => match glob::Pattern::escape(&directory.to_string_lossy()) {
            directory if directory.is_empty() => pattern.to_owned(),
            directory => format!("{directory}/{pattern}"),
        },
    };
    // As in a shell: * stays in its directory and leaves hidden files alone.
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let found = glob::glob_with(&pattern, options)
        .map_err(|error| Fault::new(format!("not a pattern: {error}"), INCLUDE))?;
    let cannot = |error: glob::GlobError| Fault::new(format!("cannot be read: {error}"), INCLUDE);
    let mut files: Vec<PathBuf> = found.collect::<Result<_, _>>().map_err(cannot)?;
    files.sort_by(|a, b| {
        a.as_os_str()
            .as_encoded_bytes()
            .cmp(b.as_os_str().as_encoded_bytes())
    });
    Ok(files)
}

/// Whether it is a file: what a pattern names and cannot be read would else be missing in silence, servers and all. A pipe
/// or a device may never end.
fn is_file(file: &Path) -> Result<(), Fault> {
    let shown = short(&file.to_string_lossy());
    let what = match std::fs::metadata(file) {
        Ok(metadata) if metadata.is_file() => return Ok(()),
        Ok(metadata) if metadata.is_dir() => format!("a directory: {shown}"),
        Ok(_) => format!("not a file: {shown}"),
        Err(error) if error.kind() == ErrorKind::NotFound => format!("no such file: {shown}"),
        Err(error) => format!("{shown} cannot be read: {error}"),
    };
    Err(Fault::new(what, INCLUDE))
}

impl Reader<'_> {
    /// Reads the files that `include` of the file `including` names.
    pub(super) fn include(&mut self, including: &Path, include: &Value) {
        for (key, item) in entries("include", include) {
            let at = self.findings.origin_of(item);
            let files = match &item.kind {
                ValueKind::Nil => continue,
                ValueKind::String(pattern) if pattern.is_empty() => Err(Fault::new("empty", INCLUDE)),
                ValueKind::String(pattern) => matching(including, pattern),
                _ => Err(Fault::new("not a file name", INCLUDE)),
            };
            match files {
                Ok(files) => files.iter().for_each(|file| self.included(at, &key, file)),
                Err(fault) => self.findings.fault(at, &key, fault),
            }
        }
    }

    fn included(&mut self, at: OriginId, key: &str, file: &Path) {
        if let Err(fault) = is_file(file) {
            return self.findings.fault(at, key, fault);
        }
        if self.read.contains(&identity(file)) {
            let what = format!("{} has been read already", short(&file.to_string_lossy()));
            return self.findings.fault(
                at,
                key,
                Fault::new(what, "include each file once, and never the main file"),
            );
        }
        self.file(file);
    }
}
