//! `server`: its listeners, where it leads to, and its settings.

use super::health;
use super::names::Names;
use super::out::{Level, Section, Table, quoted};
use super::settings::{self, Lists};
use super::tree::{Directive, Place};
use super::value::{Bad, Piece, Use, is_name_char, pieces, single, template};

/// Carries a server over. `poisons`: what `stream` says that no server can do without.
pub fn server(directive: &Directive, names: &Names, poisons: &[String]) -> Section {
    let mut section = Section::new("[[server]]", "server", Some(&directive.at));
    let inner = directive.block.as_deref().unwrap_or_default();
    let overrides = inner
        .iter()
        .any(|inner| inner.name == "proxy_ssl" && inner.args == ["off"]);
    let inherited = |poison: &&String| !(overrides && poison.starts_with("proxy_ssl"));
    if let Some(reason) = poisons.iter().find(inherited) {
        section.say(directive, Level::Lost, &format!("it inherits {reason}"));
        section.leave_out();
    }
    let own: Vec<String> = inner
        .iter()
        .filter(|inner| inner.name == "set")
        .filter_map(|inner| Some(inner.args.first()?.strip_prefix('$')?.to_owned()))
        .collect();
    let mut server = Server {
        section,
        names,
        own,
        set: Vec::new(),
        lists: Lists::default(),
        checked: health::group(inner, names).is_some(),
        leads: false,
    };
    server.listeners(inner);
    for inner in inner.iter().filter(|inner| inner.name != "listen") {
        let done = server.directive(inner);
        server.judge(inner, done);
    }
    server.finish(directive)
}

struct Server<'a> {
    section: Section,
    names: &'a Names,
    /// The variables of `set`.
    own: Vec<String>,
    set: Vec<(String, String, Place)>,
    lists: Lists,
    /// Its group says how it is checked.
    checked: bool,
    /// It has something to do with connections.
    leads: bool,
}

impl Server<'_> {
    fn judge(&mut self, directive: &Directive, done: Result<(), Bad>) {
        match done {
            Ok(()) => {}
            Err(Bad::Line(reason)) => self.section.say(directive, Level::Lost, &reason),
            Err(Bad::Block(reason)) => {
                let reason = format!("{reason}, so its server is left out");
                self.section.say(directive, Level::Lost, &reason);
                self.section.leave_out();
            }
        }
    }

    fn directive(&mut self, directive: &Directive) -> Result<(), Bad> {
        if let Some(fault) = &directive.fault {
            return Err(Bad::Block(fault.clone()));
        }
        let at = &directive.at;
        match directive.name.as_str() {
            "proxy_pass" => {
                self.leads = true;
                let target = self
                    .target(single(directive).map_err(Bad::Block)?)
                    .map_err(Bad::Block)?;
                self.section
                    .set("proxy_pass", &quoted(&target), at)
                    .map_err(Bad::Block)
            }
            "health_check" if self.checked => {
                self.section
                    .say(directive, Level::Idle, "see check of its [[upstream]]");
                Ok(())
            }
            "set" => self.set(directive).map_err(Bad::Block),
            "ebpf_status_return" => {
                self.leads = true;
                Ok(self.section.set("ebpf_status_return", "true", at)?)
            }
            _ => settings::setting(directive, &mut self.section, &mut self.lists, self.names),
        }
    }

    fn target(&self, text: &str) -> Result<String, String> {
        if let Some(name) = self.names.upstream(text) {
            return Ok(name.to_owned());
        }
        template(text, Use::Value, self.names, &self.own)
    }

    fn set(&mut self, directive: &Directive) -> Result<(), String> {
        let [name, value] = directive.args.as_slice() else {
            return Err("it takes a variable and a value".to_owned());
        };
        let name = name
            .strip_prefix('$')
            .filter(|name| !name.is_empty() && name.chars().all(is_name_char));
        let name = name.ok_or("it sets no variable")?;
        if self.names.is_map(name) {
            return Err(format!("${name} is made by a map already"));
        }
        // nginx goes through them in order, for each session; here a variable has one value.
        let above = |name: &str| {
            self.set
                .iter()
                .any(|(known, ..)| known.eq_ignore_ascii_case(name))
        };
        if above(name) {
            return Err(format!("${name} has been set already"));
        }
        let value = match value.contains('$') {
            true => {
                let own = |name: &str| self.own.iter().any(|own| own == name);
                for piece in pieces(value)? {
                    if let Piece::Variable(used) = piece
                        && own(used)
                        && !above(used)
                    {
                        return Err(format!("it uses ${used} before that is set"));
                    }
                }
                template(value, Use::Value, self.names, &self.own)?
            }
            // Most often it names a group.
            false => self.names.upstream(value).unwrap_or(value).to_owned(),
        };
        self.set
            .push((name.to_owned(), quoted(&value), directive.at.clone()));
        Ok(())
    }

    fn listeners(&mut self, inner: &[Directive]) {
        let mut found: Vec<(String, Place)> = Vec::new();
        let mut none_wanted = true;
        for directive in inner.iter().filter(|inner| inner.name == "listen") {
            none_wanted = false;
            match self.listener(directive) {
                Ok(value) => found.push((value, directive.at.clone())),
                Err(reason) => self.section.say(directive, Level::Lost, &reason),
            }
        }
        if found.is_empty() && !none_wanted {
            self.section.leave_out();
        }
        let done = match found.as_slice() {
            [(value, at)] => self.section.set("listen", value, at),
            found => self.section.set_list("listen", found),
        };
        // `listen` is known and has not been set.
        debug_assert!(done.is_ok());
    }

    fn listener(&mut self, directive: &Directive) -> Result<String, String> {
        let (address, options) = directive.args.split_first().ok_or("it names no address")?;
        let address = match address.chars().all(|c| c.is_ascii_digit() || c == '-') {
            true => format!("0.0.0.0:{address}"),
            false => address.clone(),
        };
        let mut table = Table::default();
        table.put("address", quoted(&address));
        let mut lost = Vec::new();
        for option in options {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let value = match (name, value) {
                ("bind" | "reuseport", "") => continue,
                ("udp" | "quic", "") => return Err("it listens for UDP, Culvert carries TCP".to_owned()),
                ("ssl", "") => {
                    return Err(
                        "Culvert does not open TLS; ssl_preread and [[map]] lead it on unopened".to_owned(),
                    );
                }
                ("proxy_protocol" | "deferred", "") => "true".to_owned(),
                ("ipv6only" | "so_keepalive", "on") => "true".to_owned(),
                ("ipv6only" | "so_keepalive", "off") => "false".to_owned(),
                ("so_keepalive", value) => quoted(value),
                ("backlog" | "fastopen", value) => super::value::number(value)?.to_string(),
                ("rcvbuf" | "sndbuf", value) => super::value::amount(value)?,
                _ => {
                    lost.push(format!("{option} is not known here"));
                    continue;
                }
            };
            match self.section.known(&format!("listen.{name}")) {
                Ok(()) => table.put(name, value),
                Err(reason) => lost.push(reason),
            }
        }
        for reason in lost {
            self.section.say(directive, Level::Lost, &reason);
        }
        Ok(match table.len() {
            1 => quoted(&address),
            _ => table.text(),
        })
    }

    fn finish(mut self, directive: &Directive) -> Section {
        if let [(.., at), ..] = self.set.as_slice() {
            let pairs: Vec<String> = self
                .set
                .iter()
                .map(|(name, value, _)| format!("{name} = {value}"))
                .collect();
            let done = self
                .section
                .set("set", &format!("{{ {} }}", pairs.join(", ")), at);
            debug_assert!(done.is_ok());
        }
        if let Err(reason) = self.lists.write(&mut self.section) {
            self.section.say(directive, Level::Lost, &reason);
        }
        if !self.leads && !self.section.is_left_out() {
            self.section.say(directive, Level::Lost, "it has no proxy_pass");
            self.section.leave_out();
        }
        self.section
    }
}
