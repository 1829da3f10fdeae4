//! `stream`: what its servers inherit, and the blocks in it, each in the order that our file has.

use super::names::Names;
use super::out::{Document, Level, Section, quoted};
use super::settings::{self, Lists};
use super::tree::Directive;
use super::value::{Bad, Use, template};
use super::{health, log, map, server, upstream};

/// Carries a stream block over.
pub fn stream(block: &Directive, document: &mut Document) {
    let inner = block.block.as_deref().unwrap_or_default();
    let mut names = Names::of(inner);
    let named = |name: &str| -> Vec<&Directive> {
        inner
            .iter()
            .filter(|inner| inner.name == name && inner.fault.is_none())
            .collect()
    };
    let maps = map::maps(&named("map"), &mut names);
    let formats: Vec<Section> = named("log_format")
        .into_iter()
        .map(|format| log::log_format(format, &names))
        .collect();
    let zones: Vec<Section> = named("limit_conn_zone")
        .into_iter()
        .map(|zone| limit_conn_zone(zone, &mut names))
        .collect();

    let mut common = Section::new("[stream]", "stream", Some(&block.at));
    let mut lists = Lists::default();
    let mut poisons: Vec<String> = Vec::new();
    for inner in inner {
        let done = match (&inner.fault, inner.name.as_str()) {
            (Some(fault), _) => Err(Bad::Block(fault.clone())),
            (None, "map" | "match" | "log_format" | "limit_conn_zone" | "upstream" | "server") => Ok(()),
            (None, _) => settings::setting(inner, &mut common, &mut lists, &names),
        };
        match done {
            Ok(()) => {}
            Err(Bad::Line(reason)) => common.say(inner, Level::Lost, &reason),
            Err(Bad::Block(reason)) => {
                common.say(
                    inner,
                    Level::Lost,
                    &format!("{reason}, so all servers are left out"),
                );
                poisons.push(format!("{} of {}", inner.name, inner.at));
            }
        }
    }
    if let Err(reason) = lists.write(&mut common) {
        common.say(block, Level::Lost, &reason);
    }
    let checks = health::Checks::of(inner, &names);
    document.sections.push(common);
    document.sections.extend(formats);
    document.sections.extend(maps);
    document.sections.extend(zones);
    document.sections.extend(
        named("upstream")
            .into_iter()
            .map(|group| upstream::upstream(group, &names, &checks)),
    );
    let servers = named("server").into_iter();
    document
        .sections
        .extend(servers.map(|one| server::server(one, &names, &poisons)));
}

fn limit_conn_zone(directive: &Directive, names: &mut Names) -> Section {
    let mut section = Section::new("[[limit_conn_zone]]", "limit_conn_zone", Some(&directive.at));
    let done = match directive.args.as_slice() {
        [key, zone] if zone.starts_with("zone=") => {
            let name = zone["zone=".len()..]
                .split(':')
                .next()
                .unwrap_or_default()
                .to_owned();
            let ours = names.zones.get(&name).cloned().unwrap_or_default();
            let key = template(key, Use::Key, names, &[]);
            let done = key.and_then(|key| {
                section.set("name", &quoted(&ours), &directive.at)?;
                section.set("key", &quoted(&key), &directive.at)
            });
            if done.is_err() {
                names.zones.remove(&name);
            }
            done
        }
        _ => Err("it takes a key and zone=NAME:SIZE".to_owned()),
    };
    if let Err(reason) = done {
        section.say(directive, Level::Lost, &reason);
        section.leave_out();
    }
    section
}
