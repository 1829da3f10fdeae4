//! `upstream`: a group, its servers, and how one of them is chosen.

use super::health::Checks;
use super::names::Names;
use super::out::{Level, Section, Table, quoted};
use super::reasons;
use super::settings;
use super::tree::Directive;
use super::value::{Use, amount, number, single, template};

/// Carries a group over.
pub fn upstream(directive: &Directive, names: &Names, checks: &Checks) -> Section {
    let mut section = Section::new("[[upstream]]", "upstream", Some(&directive.at));
    let [name] = directive.args.as_slice() else {
        section.say(directive, Level::Lost, "it takes one name");
        section.leave_out();
        return section;
    };
    let mut done = section.set("name", &quoted(name), &directive.at);
    let inner = directive.block.as_deref().unwrap_or_default();
    for inner in inner.iter().filter(|inner| inner.name != "server") {
        let done = match (&inner.fault, balance(inner, names)) {
            (Some(fault), _) => Err(fault.clone()),
            (None, Some(Ok(way))) => section.set("balance", &quoted(&way), &inner.at),
            (None, Some(Err(reason))) => Err(reason),
            (None, None) if inner.name == "resolver" => settings::resolver(inner, &mut section),
            (None, None) if inner.name == "resolver_timeout" => {
                let time = single(inner).and_then(amount);
                time.and_then(|time| section.set("resolver_timeout", &time, &inner.at))
            }
            (None, None) => {
                let (level, reason) = reasons::upstream(&inner.name);
                section.say(inner, level, reason);
                Ok(())
            }
        };
        if let Err(reason) = done {
            section.say(inner, Level::Lost, &reason);
        }
    }
    checks.write(name, &mut section);
    done = done.and_then(|()| section.begin_list("server", &directive.at));
    for inner in inner.iter().filter(|inner| inner.name == "server") {
        match &inner.fault {
            Some(fault) => section.say(inner, Level::Lost, fault),
            None => server(inner, &mut section),
        }
    }
    section.end_list();
    if let Err(reason) = done {
        section.say(directive, Level::Lost, &reason);
    }
    section
}

/// `None`: it is no way of balancing.
fn balance(directive: &Directive, names: &Names) -> Option<Result<String, String>> {
    let args: Vec<&str> = directive.args.iter().map(String::as_str).collect();
    let way = match (directive.name.as_str(), args.as_slice()) {
        ("least_conn", []) => Ok("least_conn".to_owned()),
        ("least_time", ["connect"]) => Ok("least_time".to_owned()),
        ("least_time", _) => Err("write least_time connect: the time to the first or last byte is not known to a proxy that leaves \
                                  the bytes to the kernel"
            .to_owned()),
        ("random", []) => Ok("random".to_owned()),
        ("random", ["two"] | ["two", "least_conn"]) => Ok("random two".to_owned()),
        ("random", ["two", "least_time=connect"]) => Ok("random two least_time".to_owned()),
        ("random", _) => Err("write random two least_conn or random two least_time=connect".to_owned()),
        ("hash", [key]) => hash(key, "", names),
        ("hash", [key, "consistent"]) => hash(key, " consistent", names),
        ("hash", _) => Err("it takes a key and, after it, consistent".to_owned()),
        _ => return None,
    };
    Some(way)
}

fn hash(key: &str, way: &str, names: &Names) -> Result<String, String> {
    let key = template(key, Use::Key, names, &[])?;
    match key.contains(char::is_whitespace) {
        true => Err("a key holds no spaces here".to_owned()),
        false => Ok(format!("hash {key}{way}")),
    }
}

fn server(directive: &Directive, section: &mut Section) {
    let Some((address, options)) = directive.args.split_first() else {
        section.say(directive, Level::Lost, "it names no address");
        return;
    };
    let mut table = Table::default();
    table.put("address", quoted(address));
    for option in options {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let value = match (name, value) {
            ("backup" | "down" | "resolve", "") => Ok("true".to_owned()),
            ("weight" | "max_conns" | "max_fails", value) => number(value).map(|number| number.to_string()),
            ("fail_timeout" | "slow_start", value) => amount(value),
            ("service", value) if !value.is_empty() => Ok(quoted(value)),
            _ => Err("it is not known here".to_owned()),
        };
        match value.and_then(|value| section.known(&format!("server.{name}")).map(|()| value)) {
            Ok(value) => table.put(name, value),
            Err(reason) => section.say(directive, Level::Lost, &format!("of it {option}: {reason}")),
        }
    }
    match table.len() {
        1 => section.entry(&quoted(address), &directive.at),
        _ => section.entry(&table.text(), &directive.at),
    }
}
