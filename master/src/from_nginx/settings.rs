//! What may stand in `stream` and in its servers alike.

use super::log;
use super::names::Names;
use super::out::{Level, Section, Table, quoted};
use super::reasons;
use super::tree::{Directive, Place};
use super::value::{Bad, Use, amount, flag, number, single, template};

/// What a single value is.
enum Kind {
    Flag,
    Number,
    /// A time or a size.
    Amount,
}

use Kind::{Amount, Flag, Number};

/// Directives with one value, and their key here.
const SINGLE: &[(&str, &str, Kind)] = &[
    ("proxy_timeout", "proxy_timeout", Amount),
    ("proxy_connect_timeout", "proxy_connect_timeout", Amount),
    ("proxy_buffer_size", "proxy_buffer_size", Amount),
    ("proxy_half_close", "proxy_half_close", Flag),
    ("proxy_next_upstream", "proxy_next_upstream", Flag),
    ("proxy_next_upstream_tries", "proxy_next_upstream_tries", Number),
    (
        "proxy_next_upstream_timeout",
        "proxy_next_upstream_timeout",
        Amount,
    ),
    ("proxy_socket_keepalive", "proxy_socket_keepalive", Flag),
    ("proxy_protocol", "proxy_protocol", Flag),
    ("proxy_protocol_timeout", "proxy_protocol_timeout", Amount),
    ("tcp_nodelay", "tcp_nodelay", Flag),
    ("ssl_preread", "ssl_preread", Flag),
    ("preread_buffer_size", "preread_buffer_size", Amount),
    ("preread_timeout", "preread_timeout", Amount),
    ("resolver_timeout", "resolver_timeout", Amount),
    // Those of the module that this program takes its names from.
    ("ebpf_enable", "ebpf_enable", Flag),
    ("ebpf_proxy_timeout", "proxy_timeout", Amount),
    ("ebpf_proxy_buffer_size", "proxy_buffer_size", Amount),
    ("ebpf_timer_period", "ebpf_timer_period", Amount),
    ("ebpf_backlog_size", "ebpf_backlog_size", Amount),
];

/// What stands in several directives there and in one list here.
#[derive(Default)]
pub struct Lists {
    access: Vec<(String, Place)>,
    set_real_ip_from: Vec<(String, Place)>,
    limit_conn: Vec<(String, Place)>,
}

impl Lists {
    /// Writes the lists.
    pub fn write(self, section: &mut Section) -> Result<(), String> {
        section.set_list("access", &self.access)?;
        section.set_list("set_real_ip_from", &self.set_real_ip_from)?;
        section.set_list("limit_conn", &self.limit_conn)
    }
}

/// Carries a directive over, or says why not.
///
/// # Errors
/// Its block cannot do without it.
pub fn setting(
    directive: &Directive,
    section: &mut Section,
    lists: &mut Lists,
    names: &Names,
) -> Result<(), Bad> {
    let at = &directive.at;
    if let Some((_, key, kind)) = SINGLE.iter().find(|(name, ..)| *name == directive.name) {
        let text = single(directive)?;
        if text.contains('$') {
            return Err(Bad::Line(
                "its value is the same for all sessions here, and holds no variables".into(),
            ));
        }
        let value = match kind {
            Flag => flag(text)?.to_string(),
            Number => number(text)?.to_string(),
            Amount => amount(text)?,
        };
        return Ok(section.set(key, &value, at)?);
    }
    match directive.name.as_str() {
        "allow" | "deny" => {
            let whom = single(directive).map_err(Bad::Block)?;
            lists
                .access
                .push((quoted(&format!("{} {whom}", directive.name)), at.clone()));
        }
        "set_real_ip_from" => lists
            .set_real_ip_from
            .push((quoted(single(directive)?), at.clone())),
        "limit_conn" => {
            let [zone, count] = directive.args.as_slice() else {
                return Err(Bad::Block("it takes a zone and a number".into()));
            };
            let Some(zone) = names.zones.get(zone) else {
                return Err(Bad::Block(format!("there is no zone {zone}")));
            };
            let count = number(count).map_err(Bad::Block)?;
            lists
                .limit_conn
                .push((quoted(&format!("{zone} {count}")), at.clone()));
        }
        "access_log" => log::access_log(directive, section, names)?,
        "proxy_upload_rate" | "proxy_download_rate" => {
            let rate = template(single(directive)?, Use::Value, names, &[])?;
            section.set(&directive.name, &quoted(&rate), at)?;
        }
        "proxy_bind" => section.set("proxy_bind", &quoted(&directive.args.join(" ")), at)?,
        "resolver" => resolver(directive, section)?,
        "proxy_ssl" => {
            if flag(single(directive)?)? {
                return Err(Bad::Block(
                    "Culvert does not speak TLS to upstreams; without it they would get plain text".into(),
                ));
            }
        }
        name => {
            let (level, reason) = reasons::stream(name);
            match reasons::needed(name) {
                Some(reason) => return Err(Bad::Block(reason.to_owned())),
                None => section.say(directive, level, reason),
            }
        }
    }
    Ok(())
}

/// Name servers, and how they are asked.
pub fn resolver(directive: &Directive, section: &mut Section) -> Result<(), String> {
    let (options, servers): (Vec<&String>, Vec<&String>) =
        directive.args.iter().partition(|arg| arg.contains('='));
    let servers: Vec<String> = servers.iter().map(|server| quoted(server)).collect();
    let servers = format!("[{}]", servers.join(", "));
    let mut table = Table::default();
    table.put("addresses", servers.clone());
    for option in options {
        match option.split_once('=') {
            Some(("valid", time)) => table.put("valid", amount(time)?),
            Some((family @ ("ipv4" | "ipv6"), wanted)) => table.put(family, flag(wanted)?.to_string()),
            Some(("status_zone", _)) => {}
            _ => section.say(
                directive,
                Level::Lost,
                &format!("of it {option}, which is not known here"),
            ),
        }
    }
    let value = match table.len() {
        1 => servers,
        _ => table.text(),
    };
    section.set("resolver", &value, &directive.at)
}
