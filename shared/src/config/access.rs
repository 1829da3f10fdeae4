//! Access rules: who may connect. The first rule that fits the client's address decides (nginx: allow, deny).

use std::net::SocketAddr;

use super::Network;
use super::diagnostic::Fault;

/// What a rule looks like.
const REMEDY: &str =
    "write \"allow\" or \"deny\" and an address, a network or \"all\", for example \"deny 10.0.0.0/8\"";

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Whether it lets in.
    pub allow: bool,
    /// Whom it is about; `None`: everybody.
    pub whom: Option<Network>,
}

impl Rule {
    pub(super) fn read(text: &str) -> Result<Rule, Fault> {
        let mut words = text.split_whitespace();
        let allow = match words.next() {
            Some("allow") => true,
            Some("deny") => false,
            _ => return Err(Fault::new("neither \"allow\" nor \"deny\"", REMEDY)),
        };
        let whom = match (words.next(), words.next()) {
            (Some("all"), None) => None,
            (Some(network), None) => Some(Network::read(network)?),
            (None, _) => return Err(Fault::new("nobody is named", REMEDY)),
            (_, Some(_)) => return Err(Fault::new("more than one address in a rule", REMEDY)),
        };
        Ok(Rule { allow, whom })
    }
}

/// Whether the rules let a client in: as the first says that fits, and if none does, yes.
pub fn allows(rules: &[Rule], client: SocketAddr) -> bool {
    rules
        .iter()
        .find(|rule| rule.whom.is_none_or(|network| network.holds(client)))
        .is_none_or(|rule| rule.allow)
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.allow { "allow" } else { "deny" };
        match self.whom {
            None => write!(f, "{what} all"),
            Some(network) => write!(f, "{what} {network}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules =
            |texts: &[&str]| -> Vec<Rule> { texts.iter().map(|text| Rule::read(text).unwrap()).collect() };
        let check =
            |texts: &[&str], ip: &str| allows(&rules(texts), (ip.parse::<IpAddr>().unwrap(), 9).into());
        let office = [
            "deny 10.0.0.1",
            "allow 10.0.0.0/8",
            "allow 2001:db8::/32",
            "deny all",
        ];
        assert!(!check(&office, "10.0.0.1"));
        assert!(check(&office, "10.0.0.2"));
        assert!(
            check(&office, "::ffff:10.0.0.2"),
            "a mapped address is the IPv4 address"
        );
        assert!(check(&office, "2001:db8::7"));
        assert!(!check(&office, "192.0.2.1"));
        assert!(!check(&office, "::1"));
        assert!(check(&[], "192.0.2.1"), "without rules everybody may");
        assert!(check(&["deny 10.0.0.0/8"], "192.0.2.1"), "and who fits none");
        assert!(check(&["allow all", "deny all"], "192.0.2.1"));
    }

    #[test]
    fn a_rule_is_written_as_it_is_read() {
        for text in ["allow all", "deny all", "allow 10.0.0.0/8", "deny ::1/128"] {
            assert_eq!(Rule::read(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in [
            "",
            "allow",
            "10.0.0.0/8",
            "allow 10.0.0.1 10.0.0.2",
            "Deny all",
            "deny nobody",
        ] {
            assert!(Rule::read(text).is_err(), "{text}");
        }
    }
}
