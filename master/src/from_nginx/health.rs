//! `health_check` and `match`, which nginx sells: it says at a server how the group that it leads to is checked, here the group
//! says it.

use std::collections::BTreeMap;

use super::names::Names;
use super::out::{Level, Section, Table, quoted};
use super::tree::Directive;
use super::value::{amount, number};

/// The checks of a stream block, by the name of the group.
#[derive(Default)]
pub struct Checks<'a> {
    checks: BTreeMap<&'a str, Vec<Health<'a>>>,
    matches: BTreeMap<&'a str, &'a Directive>,
}

struct Health<'a> {
    check: &'a Directive,
    timeout: Option<&'a str>,
}

/// The group that a server leads to, if it does so without variables.
pub fn group<'a>(server: &[Directive], names: &'a Names) -> Option<&'a str> {
    let pass = server.iter().find(|inner| inner.name == "proxy_pass")?;
    names.upstream(pass.args.first()?)
}

impl<'a> Checks<'a> {
    /// Of these directives of a stream block.
    pub fn of(stream: &'a [Directive], names: &'a Names) -> Checks<'a> {
        let mut checks = Checks::default();
        for directive in stream {
            let inner = directive.block.as_deref().unwrap_or_default();
            match (directive.name.as_str(), directive.args.first()) {
                ("match", Some(name)) => drop(checks.matches.insert(name, directive)),
                ("server", _) => {
                    let check = inner.iter().find(|inner| inner.name == "health_check");
                    let timeout = [inner, stream]
                        .iter()
                        .find_map(|block| block.iter().find(|inner| inner.name == "health_check_timeout"));
                    if let (Some(check), Some(group)) = (check, group(inner, names)) {
                        let timeout = timeout
                            .and_then(|timeout| timeout.args.first())
                            .map(String::as_str);
                        checks
                            .checks
                            .entry(group)
                            .or_default()
                            .push(Health { check, timeout });
                    }
                }
                _ => {}
            }
        }
        checks
    }

    /// Writes how a group is checked.
    pub fn write(&self, group: &str, section: &mut Section) {
        for health in self.checks.get(group).into_iter().flatten() {
            let done = self
                .table(health, section)
                .and_then(|table| section.set("check", &table, &health.check.at));
            if let Err(reason) = done {
                section.say(health.check, Level::Lost, &reason);
            }
        }
    }

    fn table(&self, health: &Health, section: &mut Section) -> Result<String, String> {
        let mut table = Table::default();
        for option in &health.check.args {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "interval" => table.put("interval", amount(value)?),
                "fails" => table.put("fall", number(value)?.to_string()),
                "passes" => table.put("rise", number(value)?.to_string()),
                "port" => table.put("port", number(value)?.to_string()),
                "match" => {
                    let found = self
                        .matches
                        .get(value)
                        .ok_or(format!("there is no match {value}"))?;
                    for line in found.block.iter().flatten() {
                        match (line.name.as_str(), line.args.as_slice()) {
                            ("send", [text]) => table.put("send", quoted(text)),
                            ("expect", [text]) => table.put("expect", quoted(text)),
                            ("expect", [how, regex]) if how == "~" || how == "~*" => {
                                table.put("expect", quoted(&format!("{how} {regex}")));
                            }
                            _ => return Err(format!("{} at {} is not known here", line.shown(), line.at)),
                        }
                    }
                }
                "udp" => return Err("it is about UDP".to_owned()),
                _ => section.say(
                    health.check,
                    Level::Lost,
                    &format!("of it {option}, which is not known here"),
                ),
            }
        }
        if let Some(timeout) = health.timeout {
            table.put("timeout", amount(timeout)?);
        }
        Ok(table.text())
    }
}
