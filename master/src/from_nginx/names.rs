//! What nginx's files give names to: groups, variables, log formats, zones. Collected before anything is carried over, because
//! nginx lets a name be used before it is defined.

use std::collections::{BTreeMap, BTreeSet};

use culvert_shared::config;

use super::tree::Directive;
use super::value::is_name_char;

/// The names of a `stream` block.
#[derive(Debug, Default)]
pub struct Names {
    /// Of upstream groups, as they are written.
    pub upstreams: Vec<String>,
    /// Of variables that maps make.
    maps: BTreeSet<String>,
    /// Of variables that are made by what is not carried over, and what that is.
    gone: BTreeMap<String, String>,
    /// Of log formats: nginx's and ours.
    pub formats: BTreeMap<String, String>,
    /// Of zones of limit_conn: nginx's and ours.
    pub zones: BTreeMap<String, String>,
}

impl Names {
    /// Of these directives of a `stream` block.
    pub fn of(directives: &[Directive]) -> Names {
        let mut names = Names::default();
        for directive in directives {
            let args = &directive.args;
            match (directive.name.as_str(), args.as_slice()) {
                ("upstream", [name]) => names.upstreams.push(name.clone()),
                ("map", [.., variable]) => {
                    names.maps.insert(variable.trim_start_matches('$').to_owned());
                }
                ("log_format", [name, ..]) => {
                    let ours = match config::has_ready_made_format(name) {
                        true => format!("nginx_{name}"),
                        false => name.clone(),
                    };
                    names.formats.insert(name.clone(), ours);
                }
                ("limit_conn_zone", [_, zone]) => {
                    let zone = zone.trim_start_matches("zone=");
                    let name = zone.split(':').next().unwrap_or_default();
                    let ours = name.chars().map(|c| if is_name_char(c) { c } else { '_' });
                    names.zones.insert(name.to_owned(), ours.collect());
                }
                ("geo" | "split_clients" | "keyval" | "js_set" | "js_var" | "perl_set" | "geoip2", _) => {
                    for variable in args.iter().filter_map(|arg| arg.strip_prefix('$')) {
                        names.lose(variable, directive);
                    }
                }
                _ => {}
            }
        }
        names
    }

    /// A variable is not made, because this directive is not carried over.
    pub fn lose(&mut self, variable: &str, directive: &Directive) {
        self.maps.remove(variable);
        let cause = format!("{} at {}", directive.name, directive.at);
        self.gone.insert(variable.to_owned(), cause);
    }

    /// Whether a map makes this variable.
    pub fn is_map(&self, variable: &str) -> bool {
        self.maps.contains(variable)
    }

    /// Whether a variable is there, and if not, why.
    pub fn check_variable(&self, name: &str) -> Result<(), String> {
        match self.gone.get(name) {
            _ if self.maps.contains(name) || config::knows_variable(name) => Ok(()),
            Some(cause) => Err(format!("it uses ${name}, whose {cause} is not carried over")),
            None => Err(format!("it uses ${name}, which is not known here")),
        }
    }

    /// The group of that name as it is written where it is defined: nginx compares without regard to capitals.
    pub fn upstream(&self, name: &str) -> Option<&str> {
        let same = self.upstreams.iter().find(|known| *known == name);
        let alike = || {
            self.upstreams
                .iter()
                .find(|known| known.eq_ignore_ascii_case(name))
        };
        same.or_else(alike).map(String::as_str)
    }
}
