//! `[[map]]`: a variable whose value depends on another's, as nginx's map. What is written → patterns in the order in which
//! they are written; looking one up is the worker's.

use std::collections::HashSet;
use std::mem::{Discriminant, discriminant};

use config::{Map, Value};
use regex::{Regex, RegexBuilder};

use super::Template;
use super::check::Check;
use super::diagnostic::{Fault, OriginId};
use super::source::join;
use super::template::{self, is_name_char};
use super::valid::{self, Given};

const ENTRY: &str = "write a pattern and a value, for example \"www.example.org backend\", or \"\\\"\\\"\" for an empty value";
const RESOLVABLE: &str =
    "a map uses a session's variables, such as $ssl_preread_server_name, and maps above it";
const NAME: &str = "write it as \"$name\", with letters, digits and _";

/// A variable that is made from others.
#[derive(Clone, Debug, PartialEq)]
pub struct VariableMap {
    /// Its name, without `$`.
    pub name: String,
    /// What is looked up.
    pub source: Template,
    /// Patterns may be masks of host names.
    pub hostnames: bool,
    /// The patterns and their values, in file order.
    pub entries: Vec<MapEntry>,
    /// The value where no pattern fits.
    pub default: Template,
}

/// One line of a map.
#[derive(Clone, Debug, PartialEq)]
pub struct MapEntry {
    /// The pattern as it is written.
    pub text: String,
    /// The pattern.
    pub pattern: Pattern,
    /// The value.
    pub value: Template,
}

/// What a value may be like. Text is in small letters.
#[derive(Clone, Debug)]
pub enum Pattern {
    /// This text, in capitals or not.
    Exact(String),
    /// A name below this one: `*.example.org`.
    Below(String),
    /// This name, or one below it: `.example.org`.
    Domain(String),
    /// This and one more label or several: `www.example.*`.
    Beginning(String),
    /// What fits a regular expression: `~^www`, `~*^www` in capitals or not.
    Regex(Regex),
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.identity() == other.identity()
    }
}

impl MapEntry {
    /// What makes it another one. A regular expression does not tell whether it minds capitals, its text does.
    fn identity(&self) -> (Discriminant<Pattern>, &str) {
        match &self.pattern {
            Pattern::Regex(_) => (discriminant(&self.pattern), &self.text),
            other => other.identity(),
        }
    }
}

impl Pattern {
    /// Its kind and its text.
    fn identity(&self) -> (Discriminant<Pattern>, &str) {
        let text = match self {
            Pattern::Exact(text)
            | Pattern::Below(text)
            | Pattern::Domain(text)
            | Pattern::Beginning(text) => text,
            Pattern::Regex(regex) => regex.as_str(),
        };
        (discriminant(self), text)
    }

    fn read(text: &str, hostnames: bool) -> Result<Pattern, Fault> {
        if let Some(regex) = text.strip_prefix('~') {
            let (regex, any_case) = match regex.strip_prefix('*') {
                Some(regex) => (regex, true),
                None => (regex, false),
            };
            let built = RegexBuilder::new(regex).case_insensitive(any_case).build();
            if let Ok(regex) = &built
                && let Some(name) = regex
                    .capture_names()
                    .flatten()
                    .find(|name| template::session_variable(name).is_some())
            {
                let what = format!("${name} is a variable already");
                return Err(Fault::new(what, "call the group otherwise"));
            }
            return built.map(Pattern::Regex).map_err(|error| {
                let why = error.to_string();
                let why = why.lines().last().unwrap_or_default().trim().to_owned();
                Fault::new(
                    format!("not a regular expression: {why}"),
                    "see https://docs.rs/regex",
                )
            });
        }
        if text == "\"\"" {
            return Ok(Pattern::Exact(String::new()));
        }
        let text = text.to_ascii_lowercase();
        let masked = |rest: &str| rest.contains('*') || rest.is_empty();
        let pattern = match hostnames {
            false => Pattern::Exact(text.strip_prefix('\\').unwrap_or(&text).to_owned()),
            true => match (
                text.strip_prefix("*."),
                text.strip_prefix('.'),
                text.strip_suffix(".*"),
            ) {
                (Some(rest), ..) if !masked(rest) => Pattern::Below(rest.to_owned()),
                (_, Some(rest), _) if !masked(rest) => Pattern::Domain(rest.to_owned()),
                (.., Some(rest)) if !masked(rest) => Pattern::Beginning(rest.to_owned()),
                _ if text.contains('*') => {
                    let remedy = "a mask is \"*.example.org\", \".example.org\" or \"www.example.*\"";
                    return Err(Fault::new("not a mask of host names", remedy));
                }
                _ => Pattern::Exact(text.strip_prefix('\\').unwrap_or(&text).to_owned()),
            },
        };
        Ok(pattern)
    }
}

impl Check<'_> {
    /// The maps of a file. One may use those that are written before it.
    pub(super) fn maps(&mut self, root: &Map<String, Value>) -> Vec<VariableMap> {
        let mut maps: Vec<VariableMap> = Vec::new();
        for (key, at, table) in self.tables(root, "map") {
            let map = self.map(&key, at, table, &maps);
            maps.push(map);
        }
        maps
    }

    fn map(
        &mut self,
        key: &str,
        at: OriginId,
        table: &Map<String, Value>,
        before: &[VariableMap],
    ) -> VariableMap {
        for name in ["source", "variable", "values"] {
            if !table.contains_key(name) {
                let text = "missing, a [[map]] needs source, variable and values";
                self.findings.report(at, &join(key, name), text);
            }
        }
        let resolve = |text: &str| {
            template::resolve_value(text, before, None).map_err(|fault| Fault::new(fault.what, RESOLVABLE))
        };
        let source = self.at(table, key, "source", |given| {
            resolve(valid::text(given, "\"$ssl_preread_server_name\"")?)
        });
        let name = self.at(table, key, "variable", |given| {
            let name = valid::text(given, "\"$backend\"")?
                .strip_prefix('$')
                .unwrap_or_default();
            if name.is_empty() || !name.chars().all(is_name_char) {
                return Err(Fault::new("not a variable's name", NAME));
            }
            match template::session_variable(name).is_some() || before.iter().any(|map| map.name == name) {
                true => Err(Fault::new(
                    format!("${name} is a variable already"),
                    "choose another name",
                )),
                false => Ok(name.to_owned()),
            }
        });
        let hostnames = self.at(table, key, "hostnames", valid::boolean).unwrap_or(false);
        let lines = self.list(table, key, "values", |given: Given| {
            let line = given.str().ok_or_else(|| given.wrong_type(ENTRY))?.trim();
            let (pattern, value) = line
                .split_once(char::is_whitespace)
                .ok_or_else(|| Fault::new("not a pattern and a value", ENTRY))?;
            let read = match pattern {
                "default" => None,
                _ => Some(Pattern::read(pattern, hostnames)?),
            };
            let regex = match &read {
                Some(Pattern::Regex(regex)) => Some(regex),
                _ => None,
            };
            let value = value.trim();
            let value = if value == "\"\"" { "" } else { value };
            let value = template::resolve_value(value, before, regex).map_err(|fault| match regex {
                Some(_) if !fault.what.ends_with("is not defined") => fault,
                _ => Fault::new(fault.what, RESOLVABLE),
            })?;
            Ok((pattern.to_owned(), read, value))
        });
        let mut entries: Vec<MapEntry> = Vec::new();
        let mut defaults = Vec::new();
        for (text, pattern, value) in lines.unwrap_or_default() {
            match pattern {
                None => defaults.push(value),
                Some(pattern) => entries.push(MapEntry { text, pattern, value }),
            }
        }
        let mut seen = HashSet::new();
        let twice = entries.iter().filter(|entry| !seen.insert(entry.identity()));
        let twice = twice.map(|entry| entry.text.as_str());
        for text in twice.chain(defaults.iter().skip(1).map(|_| "default")) {
            let fault = Fault::new(format!("the pattern {text} stands twice"), "write it once");
            let at = self.findings.origin_of(&table["values"]);
            self.findings.fault(at, &join(key, "values"), fault);
        }
        VariableMap {
            name: name.unwrap_or_default(),
            source: source.unwrap_or(Template(Vec::new())),
            hostnames,
            entries,
            default: defaults.pop().unwrap_or(Template(Vec::new())),
        }
    }
}
