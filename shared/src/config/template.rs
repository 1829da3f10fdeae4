//! `$variables`: the values of `set`, and `proxy_pass` where it holds some. Substitutes what is known from
//! the file; what only a session knows stays a [`Template`].

use std::collections::BTreeMap;

use regex::Regex;

use super::VariableMap;
use super::diagnostic::{Fault, short};
use super::file::nearest;

/// More than any upstream's name or address: stops values that double each other.
const LONGEST_BYTES: usize = 4096;

/// A value with `$variables`: parts in order. A server's `set` values are already substituted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(pub Vec<Part>);

/// One part of a [`Template`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text as it is.
    Literal(String),
    /// A variable of the session.
    Variable(Variable),
}

/// Variables that a session has before its peer is chosen (nginx stream's names).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variable {
    /// The client's address without port.
    RemoteAddr,
    /// The client's port.
    RemotePort,
    /// The address that the client connected to, without port.
    ServerAddr,
    /// The port that the client connected to.
    ServerPort,
    /// The host's name.
    Hostname,
    /// The client's address in the PROXY header, without port.
    ProxyProtocolAddr,
    /// The client's port in the PROXY header.
    ProxyProtocolPort,
    /// The address that the client connected to, as the PROXY header says it, without port.
    ProxyProtocolServerAddr,
    /// The port that the client connected to, as the PROXY header says it.
    ProxyProtocolServerPort,
    /// The address that connected here, whatever a PROXY header says, without port.
    RealipRemoteAddr,
    /// The port that connected here.
    RealipRemotePort,
    /// The server that the TLS hello asks for.
    SslPrereadServerName,
    /// The protocols that the TLS hello offers, separated by commas.
    SslPrereadAlpnProtocols,
    /// The highest version of TLS that the hello offers.
    SslPrereadProtocol,
    /// What the map at this index of [`super::Config::maps`] gives.
    Map(usize),
    /// What the group of this number of a map's regular expression has found, 1 to 9; in that expression's value only.
    Capture(u8),
}

/// The variables of a session, by nginx's names.
pub(super) const SESSION_VARIABLES: &[(&str, Variable)] = &[
    ("remote_addr", Variable::RemoteAddr),
    ("remote_port", Variable::RemotePort),
    ("server_addr", Variable::ServerAddr),
    ("server_port", Variable::ServerPort),
    ("hostname", Variable::Hostname),
    ("proxy_protocol_addr", Variable::ProxyProtocolAddr),
    ("proxy_protocol_port", Variable::ProxyProtocolPort),
    ("proxy_protocol_server_addr", Variable::ProxyProtocolServerAddr),
    ("proxy_protocol_server_port", Variable::ProxyProtocolServerPort),
    ("realip_remote_addr", Variable::RealipRemoteAddr),
    ("realip_remote_port", Variable::RealipRemotePort),
    ("ssl_preread_server_name", Variable::SslPrereadServerName),
    ("ssl_preread_alpn_protocols", Variable::SslPrereadAlpnProtocols),
    ("ssl_preread_protocol", Variable::SslPrereadProtocol),
];

/// The session variable of that name.
pub(super) fn session_variable(name: &str) -> Option<Variable> {
    SESSION_VARIABLES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, variable)| *variable)
}

/// The name of a session variable.
pub(super) fn variable_name(variable: Variable) -> &'static str {
    SESSION_VARIABLES
        .iter()
        .find(|(_, known)| *known == variable)
        .map_or("", |(name, _)| name)
}

/// The name of a variable, be it a map's.
pub(super) fn name_of(maps: &[VariableMap], variable: Variable) -> &str {
    match variable {
        Variable::Map(map) => maps.get(map).map_or("", |map| map.name.as_str()),
        Variable::Capture(group) => CAPTURES.get(usize::from(group)).copied().unwrap_or_default(),
        other => variable_name(other),
    }
}

/// Groups of a regular expression by what their variables are called; nginx's are single digits too.
const CAPTURES: [&str; 10] = ["", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

/// The group that a variable of a regular expression's value stands for, by its number or name.
fn capture(name: &str, regex: &Regex) -> Option<Result<Variable, Fault>> {
    let group = match name.parse() {
        Ok(group) => group,
        Err(_) => regex.capture_names().position(|group| group == Some(name))?,
    };
    Some(match u8::try_from(group) {
        Ok(group @ 1..=9) if usize::from(group) < regex.captures_len() => Ok(Variable::Capture(group)),
        _ => Err(Fault::new(
            format!(
                "${name} is none of the first nine groups of {}",
                short(regex.as_str())
            ),
            "put what is meant in parentheses: $1 is the first group, (?<name>…) is $name",
        )),
    })
}

/// Whether a character may stand in a variable's name.
pub(super) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Why a text could not be resolved.
#[derive(Debug)]
pub(super) struct Unresolved {
    /// The variable of `set` whose value is to blame; `None`: the text itself.
    pub within: Option<String>,
    pub fault: Fault,
}

/// Substitutes the values of `set` in `text`, and theirs in turn.
pub(super) fn resolve(
    text: &str,
    set: &BTreeMap<&str, &str>,
    maps: &[VariableMap],
) -> Result<Template, Unresolved> {
    let mut parts = Vec::new();
    let mut within = Vec::new();
    match append(text, (set, maps, None), &mut within, &mut 0, &mut parts) {
        Ok(()) => Ok(Template(parts)),
        Err(fault) => Err(Unresolved {
            within: within.last().map(|&name| name.to_owned()),
            fault,
        }),
    }
}

/// As [`resolve`], for the value of a map's line, whose pattern may be a regular expression.
pub(super) fn resolve_value(
    text: &str,
    maps: &[VariableMap],
    regex: Option<&Regex>,
) -> Result<Template, Fault> {
    let mut parts = Vec::new();
    let set = BTreeMap::new();
    append(text, (&set, maps, regex), &mut Vec::new(), &mut 0, &mut parts)?;
    Ok(Template(parts))
}

fn append<'a>(
    text: &'a str,
    (set, maps, regex): (&BTreeMap<&'a str, &'a str>, &[VariableMap], Option<&Regex>),
    within: &mut Vec<&'a str>,
    length: &mut usize,
    parts: &mut Vec<Part>,
) -> Result<(), Fault> {
    let mut rest = text;
    while !rest.is_empty() {
        let (literal, after) = rest.split_at(rest.find('$').unwrap_or(rest.len()));
        // A variable counts as much as a letter: a chain of them is bounded as well.
        *length += literal.len() + 1;
        if *length > LONGEST_BYTES {
            return Err(Fault::new(
                format!("longer than {LONGEST_BYTES} bytes with its variables"),
                "it must give an upstream's name or an address",
            ));
        }
        match parts.last_mut() {
            _ if literal.is_empty() => {}
            Some(Part::Literal(before)) => before.push_str(literal),
            _ => parts.push(Part::Literal(literal.to_owned())),
        }
        let Some(after) = after.strip_prefix('$') else {
            break;
        };
        let end = match after.starts_with(|c: char| c.is_ascii_digit()) {
            // As in nginx, where a group's number has one digit.
            true if regex.is_some() => 1,
            _ => after.find(|c| !is_name_char(c)).unwrap_or(after.len()),
        };
        let (name, after) = after.split_at(end);
        if name.is_empty() {
            return Err(Fault::new(
                "$ without a variable's name",
                "write $name, with letters, digits and _",
            ));
        }
        if let Some(variable) = session_variable(name) {
            parts.push(Part::Variable(variable));
        } else if let Some(capture) = regex.and_then(|regex| capture(name, regex)) {
            parts.push(Part::Variable(capture?));
        } else if let Some(value) = set.get(name) {
            if let Some(start) = within.iter().position(|before| *before == name) {
                let chain = within[start..].iter().chain([&name]);
                let chain: Vec<String> = chain.map(|name| format!("${name}")).collect();
                let what = format!("variables in a circle: {}", chain.join(" → "));
                return Err(Fault::new(what, "break the circle"));
            }
            within.push(name);
            append(value, (set, maps, regex), within, length, parts)?;
            within.pop();
        } else if let Some(map) = maps.iter().position(|map| map.name == name) {
            parts.push(Part::Variable(Variable::Map(map)));
        } else {
            return Err(undefined(name, set, maps));
        }
        rest = after;
    }
    Ok(())
}

fn undefined(name: &str, set: &BTreeMap<&str, &str>, maps: &[VariableMap]) -> Fault {
    let builtin = SESSION_VARIABLES.iter().map(|(name, _)| *name);
    let remedy = match nearest(
        name,
        set.keys()
            .copied()
            .chain(maps.iter().map(|map| map.name.as_str()))
            .chain(builtin.clone()),
    ) {
        Some(near) => format!("did you mean ${near}?"),
        None => {
            let known: Vec<String> = builtin.map(|name| format!("${name}")).collect();
            format!(
                "define it by a [[map]] or, for a server, in its set = {{ {name} = \"…\" }}, or use {}",
                known.join(", ")
            )
        }
    };
    Fault::new(format!("variable ${name} is not defined"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(text: &str, set: &[(&str, &str)]) -> Result<Template, String> {
        resolve(text, &set.iter().copied().collect(), &[]).map_err(|unresolved| unresolved.fault.what)
    }

    fn literal(text: &str) -> Part {
        Part::Literal(text.to_owned())
    }

    #[test]
    fn set_values_are_substituted_and_join_their_surroundings() {
        assert_eq!(resolved("$a", &[("a", "x")]), Ok(Template(vec![literal("x")])));
        assert_eq!(
            resolved("p-$a:80", &[("a", "$b$b"), ("b", "x")]),
            Ok(Template(vec![literal("p-xx:80")]))
        );
        assert_eq!(resolved("", &[]), Ok(Template(vec![])));
    }

    #[test]
    fn session_variables_stay() {
        let parts = vec![literal("p"), Part::Variable(Variable::ServerPort), literal("-x")];
        assert_eq!(resolved("p$server_port-x", &[]), Ok(Template(parts)));
    }

    #[test]
    fn what_cannot_be_substituted_is_an_error() {
        assert_eq!(resolved("$a", &[]), Err("variable $a is not defined".into()));
        assert_eq!(resolved("a$", &[]), Err("$ without a variable's name".into()));
        assert_eq!(
            resolved("$a", &[("a", "$b"), ("b", "$a")]),
            Err("variables in a circle: $a → $b → $a".into())
        );
        let doubling: Vec<(String, String)> = (0..64)
            .map(|n| (format!("v{n}"), format!("$v{0}$v{0}", n + 1)))
            .collect();
        let mut set: BTreeMap<&str, &str> = doubling.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        set.insert("v64", "x");
        assert!(
            resolve("$v0", &set, &[])
                .expect_err("too long")
                .fault
                .what
                .starts_with("longer than")
        );
    }

    #[test]
    fn every_session_variable_has_one_name() {
        for &(name, variable) in SESSION_VARIABLES {
            assert_eq!(session_variable(name), Some(variable));
            assert_eq!(variable_name(variable), name);
        }
    }
}
