//! The configurations that are shipped: `conf/proxy.toml` names every key, with the default that it really has.

use std::path::Path;

use super::super::defaults;
use super::super::file::{Key, ROOT, Shape};

fn proxy_toml() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/proxy.toml");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn proxy_toml_names_every_key() {
    fn missing(keys: &[Key], text: &str, lacking: &mut Vec<&'static str>) {
        for key in keys {
            let is_there = text.lines().filter(|line| !line.starts_with('#')).any(|line| {
                let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
                words.into_iter().any(|word| word == key.name)
            });
            if !is_there {
                lacking.push(key.name);
            }
            if let Shape::Table(inner) | Shape::Tables(inner) | Shape::Mixed(inner) = key.shape {
                missing(inner, text, lacking);
            }
        }
    }
    let mut lacking = Vec::new();
    missing(ROOT, &proxy_toml(), &mut lacking);
    assert!(lacking.is_empty(), "conf/proxy.toml does not name {lacking:?}");
}

#[test]
fn proxy_toml_gives_the_true_defaults() {
    let text: toml::Table = proxy_toml().parse().expect("conf/proxy.toml is TOML");
    for (path, default) in defaults::KEYS {
        let mut value = None;
        let mut table = Some(&text);
        for name in path.split('.') {
            value = table.and_then(|table| table.get(name));
            table = value.and_then(toml::Value::as_table);
        }
        let value = value.unwrap_or_else(|| panic!("conf/proxy.toml does not set {path}"));
        let expected = match *default {
            defaults::Default::Text(text) => toml::Value::from(text),
            defaults::Default::Number(number) => toml::Value::from(number),
            defaults::Default::Flag(flag) => toml::Value::from(flag),
        };
        assert_eq!(*value, expected, "{path}");
    }
    let text = proxy_toml();
    assert!(text.contains(&format!("backlog = {}", defaults::BACKLOG)));
    assert!(text.contains(&format!("weight = {}", defaults::WEIGHT)));
}
