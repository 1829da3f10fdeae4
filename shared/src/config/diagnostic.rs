//! What is told about a wrong configuration: one line for each error, with its place, key and remedy.
//! Holds no rule of its own.

use std::fmt;
use std::path::PathBuf;

use config::Value;

/// One error in a configuration. It displays as one line:
/// `FILE:LINE:COLUMN: KEY: what is wrong (value as written), what is allowed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Where the value was written.
    pub place: Place,
    /// The dotted key, such as `server[1].listen[0]`; empty where there is none (syntax).
    pub key: String,
    /// What is wrong, and the remedy.
    pub text: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", one_line(&self.key))?;
        }
        // It quotes what was written.
        f.write_str(&one_line(&self.text))
    }
}

impl std::error::Error for Diagnostic {}

/// Where something was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file. Lines and columns count from 1, columns in characters.
    File {
        /// The file, as it was named on the command line or by `include`.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// The column in that line.
        column: usize,
    },
    /// A file as such, for example one that cannot be read.
    WholeFile(PathBuf),
    /// An environment variable.
    Variable(String),
    /// An override on the command line.
    Set,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line, column } => {
                write!(f, "{}:{line}:{column}", one_line(&path.to_string_lossy()))
            }
            Place::WholeFile(path) => f.write_str(&one_line(&path.to_string_lossy())),
            Place::Variable(name) => f.write_str(&one_line(name)),
            Place::Set => f.write_str("--set"),
        }
    }
}

/// What is wrong with one value, before it is known where the value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// What is wrong.
    pub what: String,
    /// What is allowed, or what to do.
    pub remedy: String,
}

impl Fault {
    pub(super) fn new(what: impl Into<String>, remedy: impl Into<String>) -> Fault {
        Fault {
            what: what.into(),
            remedy: remedy.into(),
        }
    }
}

/// The index of an [`Origin`]. It grows in the order in which things were read: sorting by it gives file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OriginId(usize);

/// Where a value comes from.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub place: Place,
    /// The value as it was written, short and on one line.
    pub written: String,
    /// It came as bare text (environment, command line), which stands for a number or a boolean as well.
    pub loose: bool,
}

/// Every origin of one `load`, and the errors found so far.
///
/// A [`Value`] of the `config` crate carries its origin through the layers as a string; here that string
/// is the number of an [`Origin`].
#[derive(Debug, Default)]
pub(super) struct Findings {
    origins: Vec<Origin>,
    errors: Vec<(OriginId, Diagnostic)>,
}

impl Findings {
    pub(super) fn origin(&mut self, place: Place, written: String, loose: bool) -> OriginId {
        self.origins.push(Origin {
            place,
            written,
            loose,
        });
        OriginId(self.origins.len() - 1)
    }

    /// The start of the first file, for what stands nowhere.
    pub(super) fn start(&self) -> OriginId {
        OriginId(0)
    }

    /// The tag by which a value remembers where it comes from.
    pub(super) fn tag(id: OriginId) -> String {
        id.0.to_string()
    }

    /// Where a value comes from. Values that merging made (the root, `[stream]`) and defaults have no origin of
    /// their own: they count as the start of the first file.
    pub(super) fn origin_of(&self, value: &Value) -> OriginId {
        OriginId(
            value
                .origin()
                .and_then(|tag| tag.parse().ok())
                .filter(|&id| id < self.origins.len())
                .unwrap_or(0),
        )
    }

    pub(super) fn get(&self, id: OriginId) -> Option<&Origin> {
        self.origins.get(id.0)
    }

    /// Reports an error about a key as such: no value is shown.
    pub(super) fn report(&mut self, at: OriginId, key: &str, text: impl Into<String>) {
        let place = self.get(at).map_or(Place::Set, |origin| origin.place.clone());
        self.errors.push((
            at,
            Diagnostic {
                place,
                key: key.to_owned(),
                text: text.into(),
            },
        ));
    }

    /// Reports an error about a value and shows the value.
    pub(super) fn fault(&mut self, at: OriginId, key: &str, fault: Fault) {
        let written = self.get(at).map_or("", |origin| origin.written.as_str());
        let text = format!("{} ({written}), {}", fault.what, fault.remedy);
        self.report(at, key, text);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// The errors in file order, then those of the environment, then those of the command line.
    pub(super) fn into_diagnostics(mut self) -> Vec<Diagnostic> {
        self.errors.sort_by_key(|(at, _)| *at);
        self.errors
            .into_iter()
            .map(|(_, diagnostic)| diagnostic)
            .collect()
    }
}

/// Text that stays on one line and sends nothing strange to a terminal.
pub(super) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// Text for showing: one line, and cut when it is long.
pub(super) fn short(text: &str) -> String {
    /// Longer than any sensible address or path; a line with it still fits a wide terminal.
    const LONGEST: usize = 80;
    let line = one_line(text.trim());
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagnostic_is_one_line_with_place_key_and_text() {
        let place = Place::File {
            path: "a.toml".into(),
            line: 3,
            column: 7,
        };
        let diagnostic = Diagnostic {
            place,
            key: "user".into(),
            text: "unknown".into(),
        };
        assert_eq!(diagnostic.to_string(), "a.toml:3:7: user: unknown");
    }

    #[test]
    fn shown_text_never_leaves_its_line() {
        assert_eq!(one_line("a\nb\u{1b}é"), "a\\nb\\u{1b}é");
        assert_eq!(short(&"x".repeat(100)).chars().count(), 81);
    }

    #[test]
    fn errors_come_out_in_the_order_of_their_origins() {
        let mut findings = Findings::default();
        let first = findings.origin(Place::Set, "1".into(), true);
        let second = findings.origin(Place::Set, "2".into(), true);
        findings.fault(second, "b", Fault::new("wrong", "allowed: x"));
        findings.report(first, "a", "unknown key");
        let lines: Vec<String> = findings
            .into_diagnostics()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            lines,
            ["--set: a: unknown key", "--set: b: wrong (2), allowed: x"]
        );
    }
}
