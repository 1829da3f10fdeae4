//! The layers: defaults, files, environment, command line. The `config` crate lays them over each other;
//! this decides what may be overridden and how a key is spelt there.

use std::collections::BTreeSet;

use config::builder::DefaultState;
use config::{Config, ConfigBuilder, ConfigError, Map, Source, Value, ValueKind};

use super::defaults;
use super::diagnostic::{Findings, Place, short};
use super::file::{self, Key, Shape};
use super::source::Reader;
use super::template::is_name_char;
use super::world::World;

/// What the environment variables that override a key begin with.
const PREFIX: &str = "CULVERT_";

/// Kubernetes puts such variables into every container beside a service whose name is "culvert" or begins with "culvert-":
/// they mean no key.
const NOT_OURS: &[&str] = &["_SERVICE_HOST", "_SERVICE_PORT", "_PORT_"];

/// As [`NOT_OURS`], an end. What such a variable holds is a URL.
const NOT_OURS_END: &str = "_PORT";

/// One layer. Its keys are paths such as `stream.proxy_timeout` or `server[0].listen`.
#[derive(Clone, Debug)]
struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

/// One override, before it is known whether its key exists.
struct Override {
    place: Place,
    key: String,
    text: String,
}

/// Lays the environment and `overrides` (`key=value`) over the files, and all over the defaults.
pub(super) fn merge(
    world: &dyn World,
    findings: &mut Findings,
    files: Map<String, Value>,
    named: &BTreeSet<String>,
    overrides: &[String],
) -> Map<String, Value> {
    let defaults = defaults::KEYS
        .iter()
        .map(|&(key, default)| (key.to_owned(), default.into()));
    let mut builder = Config::builder()
        .add_source(Layer(defaults.collect()))
        .add_source(Layer(files));
    let mut all = environment(world, findings, named);
    all.extend(command_line(findings, overrides));
    for over in all {
        let reached = target(&collect(&builder), &over.key);
        match reached {
            Ok(shape) => {
                let value = Reader::new(world, findings).loose(&over.text, &over.place, &over.key, shape);
                builder = builder.add_source(Layer(Map::from_iter([(over.key, value)])));
            }
            Err(text) => {
                let at = findings.origin(over.place, String::new(), true);
                findings.report(at, &short(&over.key), text);
            }
        }
    }
    collect(&builder)
}

/// Everything so far as one tree. Sources that hold their values in memory cannot fail.
fn collect(builder: &ConfigBuilder<DefaultState>) -> Map<String, Value> {
    builder
        .build_cloned()
        .and_then(|config| config.collect())
        .unwrap_or_default()
}

/// `CULVERT_STREAM__PROXY_TIMEOUT=5s` → `stream.proxy_timeout`.
fn environment(world: &dyn World, findings: &mut Findings, named: &BTreeSet<String>) -> Vec<Override> {
    let mut found = Vec::new();
    let mut variables = world.variables();
    variables.sort();
    for (name, value) in variables {
        let Some(name) = name.to_str() else { continue };
        let Some(key) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let is_url = || value.to_string_lossy().contains("://");
        let foreign =
            NOT_OURS.iter().any(|part| name.contains(part)) || (name.ends_with(NOT_OURS_END) && is_url());
        // A variable that the file names by ${…} serves that purpose.
        if foreign || named.contains(name) {
            continue;
        }
        let place = Place::Variable(name.to_owned());
        let key = key.to_ascii_lowercase().replace("__", ".");
        match value.into_string() {
            Ok(text) => found.push(Override { place, key, text }),
            Err(_) => {
                let at = findings.origin(place, String::new(), true);
                findings.report(at, &key, "not valid UTF-8, set it to text");
            }
        }
    }
    found
}

fn command_line(findings: &mut Findings, overrides: &[String]) -> Vec<Override> {
    let mut found = Vec::new();
    for text in overrides {
        match text.split_once('=') {
            Some((key, value)) => {
                let key = key.trim().to_owned();
                found.push(Override {
                    place: Place::Set,
                    key,
                    text: value.to_owned(),
                });
            }
            None => {
                let at = findings.origin(Place::Set, String::new(), true);
                findings.report(at, &short(text), "no value, write --set KEY=VALUE");
            }
        }
    }
    found
}

/// What the key of an override leads to, or why it leads nowhere. `root` is what is in effect without it.
fn target(root: &Map<String, Value>, path: &str) -> Result<Shape, String> {
    if path == "include" || path.starts_with("include[") {
        return Err("cannot be overridden, it belongs to a file".to_owned());
    }
    let mut keys: &[Key] = file::ROOT;
    let mut shape = Shape::Table(keys);
    let mut table = Some(root);
    let mut walked = String::new();
    let segments: Vec<&str> = path.split('.').collect();
    for segment in segments {
        let (name, indexes) = segment.split_at(segment.find('[').unwrap_or(segment.len()));
        match shape {
            Shape::Table(_) | Shape::Mixed(_) => {
                shape = file::find(keys, name)
                    .ok_or_else(|| file::unknown_key(keys, name))?
                    .shape;
            }
            Shape::Free if !name.is_empty() && name.chars().all(is_name_char) => shape = Shape::Value,
            Shape::Free => return Err("unknown key, a variable's name has letters, digits and _".to_owned()),
            Shape::Tables(_) => return Err(format!("unknown key, say which one: {walked}[0].{name}")),
            Shape::Value => return Err(format!("unknown key, {walked} has no keys")),
        }
        let mut value = table.and_then(|table| table.get(name));
        for index in indexes.split_inclusive(']') {
            let index = index.strip_prefix('[').and_then(|index| index.strip_suffix(']'));
            let Some(index) =
                index.and_then(|index| index.parse::<usize>().ok().filter(|n| n.to_string() == index))
            else {
                return Err("unknown key, write for example server[0].listen".to_owned());
            };
            let list = match value.map(|value| &value.kind) {
                Some(ValueKind::Array(list)) => list.as_slice(),
                _ => &[],
            };
            value = match list.get(index) {
                Some(value) => Some(value),
                None => return Err(format!("there are {} entries, counted from 0", list.len())),
            };
            shape = match shape {
                Shape::Tables(keys) => Shape::Table(keys),
                shape => shape,
            };
        }
        if let Shape::Table(inner) | Shape::Mixed(inner) = shape {
            keys = inner;
        }
        table = match value.map(|value| &value.kind) {
            Some(ValueKind::Table(table)) => Some(table),
            _ => None,
        };
        walked = super::source::join(&walked, segment);
    }
    match shape {
        Shape::Table(_) | Shape::Free => Err("a table, override one of its keys".to_owned()),
        shape => Ok(shape),
    }
}
