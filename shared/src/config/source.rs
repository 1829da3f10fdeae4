//! Files: text → values with their places. Refuses what cannot be written (syntax, unknown keys, tables in the
//! wrong place), puts environment variables in, follows `include`. Does not look at single values.
//!
//! An included file may hold whatever the main file may. `[[upstream]]` and `[[server]]` add up, in the order of
//! the files; any other key may be set in one file only.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use config::{Map, Value, ValueKind};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::diagnostic::{Fault, Findings, OriginId, Place, short};
use super::expand;
use super::file::{self, Key, Shape};
use super::world::World;

/// Reads files, each once, into one tree.
pub(super) struct Reader<'a> {
    world: &'a dyn World,
    pub findings: &'a mut Findings,
    /// The files read so far, by [`identity`].
    pub read: BTreeSet<PathBuf>,
    /// The environment variables that strings name.
    pub named: BTreeSet<String>,
    /// A file could not be read as TOML, so that not all is known that was written.
    pub unreadable: bool,
    /// What all files together say.
    pub root: Map<String, Value>,
}

/// A map of a hundred thousand names is below it. What is endless (/dev/zero) is not read to its end.
const LARGEST_BYTES: u64 = 16 << 20;

/// The text that values are cut from.
struct Text<'a> {
    text: &'a str,
    /// Its file, or the one place that all of it has.
    place: Result<&'a Path, &'a Place>,
    /// Where its lines begin: a place is asked for each value, and counting from the start would take longer with each.
    lines: Vec<usize>,
    /// The offset that was asked for last and its column: a line may be long as well.
    last: Cell<(usize, usize)>,
}

impl<'a> Text<'a> {
    fn new(text: &'a str, place: Result<&'a Path, &'a Place>) -> Text<'a> {
        let ends = text.match_indices('\n').map(|(at, _)| at + 1);
        Text {
            text,
            place,
            lines: std::iter::once(0).chain(ends).collect(),
            last: Cell::new((0, 1)),
        }
    }

    fn place(&self, offset: usize) -> Place {
        let path = match self.place {
            Ok(path) => path.to_owned(),
            Err(fixed) => return fixed.clone(),
        };
        let offset = if self.text.is_char_boundary(offset) {
            offset
        } else {
            self.text.len()
        };
        let line = self.lines.partition_point(|start| *start <= offset);
        let (from, column) = match (self.last.get(), self.lines[line - 1]) {
            ((last, column), start) if (start..=offset).contains(&last) => (last, column),
            (_, start) => (start, 1),
        };
        let column = column + self.text[from..offset].chars().count();
        self.last.set((offset, column));
        Place::File { path, line, column }
    }
}

/// What a file holds.
fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(LARGEST_BYTES + 1)
        .read_to_end(&mut bytes)?;
    match bytes.len() as u64 > LARGEST_BYTES {
        true => Err(io::Error::other(format!(
            "larger than {} MiB",
            LARGEST_BYTES >> 20
        ))),
        false => Ok(bytes),
    }
}

/// Root is at a loss otherwise: the master gives CAP_DAC_OVERRIDE up before it reads.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied if nix::unistd::geteuid().is_root() => {
            "; the program does without root's right to pass over permissions: give the file to root, or let all read it"
        }
        _ => "",
    }
}

impl<'a> Reader<'a> {
    pub(super) fn new(world: &'a dyn World, findings: &'a mut Findings) -> Reader<'a> {
        Reader {
            world,
            findings,
            read: BTreeSet::new(),
            named: BTreeSet::new(),
            unreadable: false,
            root: Map::new(),
        }
    }

    /// Reads a file and what it includes into [`Reader::root`].
    pub(super) fn file(&mut self, path: &Path) {
        self.read.insert(identity(path));
        let bytes = match bytes_of(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                return self.unreadable(
                    Place::WholeFile(path.to_owned()),
                    &format!("cannot be read: {error}{}", remedy(&error)),
                );
            }
        };
        self.bytes(path, &bytes);
    }

    /// Reads what a file of this name holds.
    pub(super) fn bytes(&mut self, path: &Path, bytes: &[u8]) {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let valid = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
                let place = Text::new(&valid, Ok(path)).place(valid.len());
                return self.unreadable(place, "not valid UTF-8, write the file in that encoding");
            }
        };
        let text = Text::new(text, Ok(path));
        let (table, errors) = DeTable::parse_recoverable(text.text);
        if !errors.is_empty() {
            // What could be recovered of a broken file would give errors that are none.
            let mut errors: Vec<_> = errors
                .iter()
                .map(|e| (e.span().unwrap_or(0..0), e.message()))
                .collect();
            errors.sort_by_key(|(span, _)| span.start);
            for (span, message) in errors {
                let written = match text.text.get(span.clone()).map(short) {
                    Some(written) if !written.is_empty() => format!(" ({written})"),
                    _ => String::new(),
                };
                let message = format!("TOML syntax: {}{written}", short(message));
                self.unreadable(text.place(span.start), &message);
            }
            return;
        }
        let (include, values) = self.root(&text, table.get_ref());
        self.add(values);
        if let Some(include) = include {
            self.include(path, &include);
        }
    }

    fn unreadable(&mut self, place: Place, text: &str) {
        let at = self.findings.origin(place, String::new(), false);
        self.findings.report(at, "", text);
        self.unreadable = true;
    }

    /// A value on its own, from outside a file.
    pub(super) fn loose(&mut self, text: &str, place: &Place, key: &str, shape: Shape) -> Value {
        let at = self
            .findings
            .origin(place.clone(), format!("\"{}\"", short(text)), true);
        let trimmed = text.trim();
        if trimmed.starts_with(['[', '{', '"', '\''])
            && let Ok(value) = DeValue::parse(trimmed)
        {
            let text = Text::new(trimmed, Err(place));
            return self.value(&text, key, &value, shape, 0);
        }
        match shape {
            Shape::Tables(_) | Shape::Table(_) | Shape::Free => {
                let fault = Fault::new(
                    "wrong type, a string",
                    "override one of its keys, or write it as TOML",
                );
                self.findings.fault(at, key, fault);
                tagged(at, ValueKind::Nil)
            }
            Shape::Value | Shape::Mixed(_) => tagged(at, text),
        }
    }

    fn root(&mut self, text: &Text, table: &DeTable) -> (Option<Value>, Vec<(Key, Value)>) {
        let mut include = None;
        let mut values = Vec::new();
        for (key, value) in in_file_order(table) {
            let Some(key) = file::find(file::ROOT, key.get_ref()) else {
                self.unknown(text, "", key, file::ROOT);
                continue;
            };
            // Lists go on where the files before left off.
            let offset = match self.root.get(key.name).map(|value| &value.kind) {
                Some(ValueKind::Array(list)) => list.len(),
                _ => 0,
            };
            let value = self.value(text, key.name, value, key.shape, offset);
            match key.name {
                "include" => include = Some(value),
                _ => values.push((key, value)),
            }
        }
        (include, values)
    }

    /// The entries of a table that have a known key, in file order. Unknown ones are reported; where it is clear which
    /// key was meant, that one holds nothing and so does not count as missing.
    fn table(&mut self, text: &Text, prefix: &str, table: &DeTable, keys: &[Key]) -> ValueKind {
        let mut values = Map::new();
        for (key, value) in in_file_order(table) {
            match file::find(keys, key.get_ref()) {
                Some(key) => {
                    let value = self.value(text, &join(prefix, key.name), value, key.shape, 0);
                    values.insert(key.name.to_owned(), value);
                }
                None => {
                    if let Some(meant) = self.unknown(text, prefix, key, keys) {
                        values
                            .entry(meant.to_owned())
                            .or_insert(Value::new(None, ValueKind::Nil));
                    }
                }
            }
        }
        ValueKind::Table(values)
    }

    fn unknown(
        &mut self,
        text: &Text,
        prefix: &str,
        key: &Spanned<DeString>,
        keys: &[Key],
    ) -> Option<&'static str> {
        let at = self
            .findings
            .origin(text.place(key.span().start), String::new(), false);
        self.findings.report(
            at,
            &join(prefix, &short(key.get_ref())),
            file::unknown_key(keys, key.get_ref()),
        );
        file::meant(keys, key.get_ref())
    }

    /// A value with its origin; it holds nothing where it was wrong and has been reported. The items of a list of
    /// tables are numbered from `offset`.
    fn value(
        &mut self,
        text: &Text,
        key: &str,
        value: &Spanned<DeValue>,
        shape: Shape,
        offset: usize,
    ) -> Value {
        let written = text.text.get(value.span()).map(short).unwrap_or_default();
        let at = self
            .findings
            .origin(text.place(value.span().start), written, false);
        let kind = match (shape, value.get_ref()) {
            (Shape::Table(keys) | Shape::Mixed(keys), DeValue::Table(table)) => {
                self.table(text, key, table, keys)
            }
            (Shape::Tables(keys), DeValue::Array(list)) => {
                let items = list.iter().enumerate().map(|(index, item)| {
                    self.value(
                        text,
                        &format!("{key}[{}]", index + offset),
                        item,
                        Shape::Table(keys),
                        0,
                    )
                });
                ValueKind::Array(items.collect())
            }
            (Shape::Mixed(_) | Shape::Value, DeValue::Array(list)) => {
                let items = list.iter().enumerate();
                let items =
                    items.map(|(index, item)| self.value(text, &format!("{key}[{index}]"), item, shape, 0));
                ValueKind::Array(items.collect())
            }
            (Shape::Free, DeValue::Table(table)) => {
                let entries = in_file_order(table).into_iter().map(|(name, value)| {
                    let value = self.value(text, &join(key, &short(name.get_ref())), value, Shape::Value, 0);
                    (name.get_ref().to_string(), value)
                });
                ValueKind::Table(entries.collect())
            }
            (Shape::Table(_) | Shape::Free, _) => {
                return self.wrong(at, key, "not a table", "write it as a table: { key = value }");
            }
            (Shape::Tables(_), DeValue::Table(_)) => {
                return self.wrong(
                    at,
                    key,
                    "a single table",
                    format!("write [[{key}]], once for each"),
                );
            }
            (Shape::Tables(_), _) => {
                return self.wrong(
                    at,
                    key,
                    "not a list of tables",
                    format!("write [[{key}]], once for each"),
                );
            }
            (Shape::Mixed(_) | Shape::Value, value) => return self.scalar(at, key, value),
        };
        tagged(at, kind)
    }

    fn scalar(&mut self, at: OriginId, key: &str, value: &DeValue) -> Value {
        match value {
            DeValue::Boolean(flag) => tagged(at, *flag),
            DeValue::Integer(digits) => match i64::from_str_radix(digits.as_str(), digits.radix()) {
                Ok(number) => tagged(at, number),
                Err(_) => self.wrong(at, key, "a number too large to count", "write a smaller one"),
            },
            // Only its type is told, so what it amounts to does not matter.
            DeValue::Float(digits) => tagged(at, digits.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::String(string) => self.string(at, key, string),
            DeValue::Datetime(_) => self.wrong(at, key, "wrong type, a date", "no key takes a date"),
            DeValue::Table(_) => self.wrong(at, key, "wrong type, a table", "write a single value"),
            DeValue::Array(_) => self.wrong(at, key, "wrong type, a list", "write a single value"),
        }
    }

    fn string(&mut self, at: OriginId, key: &str, string: &str) -> Value {
        let origin = self
            .findings
            .get(at)
            .filter(|origin| matches!(origin.place, Place::File { .. }))
            .cloned();
        let Some(origin) = origin else {
            // Text from outside a file has been through a shell, which puts variables in itself.
            return tagged(at, string);
        };
        match expand::expand(string, |name| self.world.variable(name)) {
            Ok(expanded) if expanded.variables.is_empty() => tagged(at, expanded.text),
            Ok(expanded) => {
                self.named.extend(expanded.variables);
                let written = format!("{}, which is \"{}\"", origin.written, short(&expanded.text));
                tagged(self.findings.origin(origin.place, written, true), expanded.text)
            }
            Err(fault) => {
                self.findings.fault(at, key, fault);
                tagged(at, ValueKind::Nil)
            }
        }
    }

    fn wrong(&mut self, at: OriginId, key: &str, what: &str, remedy: impl Into<String>) -> Value {
        self.findings.fault(at, key, Fault::new(what, remedy));
        tagged(at, ValueKind::Nil)
    }

    /// Adds the values of one file to those of the files before.
    fn add(&mut self, values: Vec<(Key, Value)>) {
        for (key, mut value) in values {
            let Some(before) = self.root.get_mut(key.name) else {
                self.root.insert(key.name.to_owned(), value);
                continue;
            };
            match (&mut before.kind, &mut value.kind) {
                (ValueKind::Array(before), ValueKind::Array(more))
                    if matches!(key.shape, Shape::Tables(_)) =>
                {
                    before.append(more);
                }
                (ValueKind::Table(before), ValueKind::Table(more)) => {
                    for (name, value) in more.drain() {
                        match before.get(&name) {
                            Some(first) => twice(self.findings, &join(key.name, &name), first, &value),
                            None => {
                                before.insert(name, value);
                            }
                        }
                    }
                }
                // One of them was wrong and has been reported.
                (ValueKind::Nil, _) | (_, ValueKind::Nil) => {}
                _ => twice(self.findings, key.name, before, &value),
            }
        }
    }
}

/// The entries of a table as they are written one after another; the parser sorts them by name.
fn in_file_order<'t, 'i>(
    table: &'t DeTable<'i>,
) -> Vec<(&'t Spanned<DeString<'i>>, &'t Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// The same for every name of one file.
pub(super) fn identity(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn twice(findings: &mut Findings, key: &str, first: &Value, again: &Value) {
    let place = findings
        .get(findings.origin_of(first))
        .map(|origin| origin.place.to_string())
        .unwrap_or_default();
    let fault = Fault::new(
        format!("already set at {place}"),
        "set it in one of the files only",
    );
    let at = findings.origin_of(again);
    findings.fault(at, key, fault);
}

fn tagged(at: OriginId, kind: impl Into<ValueKind>) -> Value {
    Value::new(Some(&Findings::tag(at)), kind)
}

/// A dotted key.
pub(super) fn join(prefix: &str, name: &str) -> String {
    match prefix {
        "" => name.to_owned(),
        _ => format!("{prefix}.{name}"),
    }
}

/// What stands under a key that takes one entry or a list of them, each with its own key.
pub(super) fn entries<'v>(key: &str, value: &'v Value) -> Vec<(String, &'v Value)> {
    match &value.kind {
        ValueKind::Array(items) => items
            .iter()
            .enumerate()
            .map(|(n, item)| (format!("{key}[{n}]"), item))
            .collect(),
        _ => vec![(key.to_owned(), value)],
    }
}
