//! `proxy_upload_rate` and `proxy_download_rate`: how fast one direction of a session may be.

use std::collections::BTreeMap;

use super::diagnostic::Fault;
use super::template;
use super::units;
use super::valid::Given;
use super::{Template, VariableMap};

/// A terabyte each second is no limit.
const MAX_BYTES: usize = 1 << 40;

/// Bytes per second of one direction.
#[derive(Clone, Debug, PartialEq)]
pub enum Rate {
    /// So many; 0: without limit.
    Fixed(u64),
    /// Whatever this gives for a session, read by [`Rate::parse`].
    Variable(Template),
}

impl Rate {
    /// No limit.
    pub const OFF: Rate = Rate::Fixed(0);

    /// What the value of a variable means; `None`: it is no rate. An empty one is no limit.
    pub fn parse(text: &str) -> Option<u64> {
        match text.trim() {
            "" => Some(0),
            text => units::parse_size(text)
                .ok()
                .flatten()
                .filter(|bytes| *bytes <= MAX_BYTES as u64),
        }
    }

    /// The rate as a file has it.
    pub(super) fn read(given: Given, maps: &[VariableMap]) -> Result<Rate, Fault> {
        let Some(text) = given.str().filter(|text| text.contains('$')) else {
            return units::size(given, 0..=MAX_BYTES).map(|bytes| Rate::Fixed(bytes as u64));
        };
        let template = template::resolve(text, &BTreeMap::new(), maps).map_err(|unresolved| {
            let remedy =
                "a rate is a size such as \"1m\", or made of a session's variables and those of [[map]]";
            Fault::new(unresolved.fault.what, remedy)
        })?;
        Ok(Rate::Variable(template))
    }

    /// The other way; `write` writes a template.
    pub(super) fn text(&self, write: impl FnOnce(&Template) -> String) -> String {
        match self {
            Rate::Fixed(bytes) => units::write_size(*bytes as usize),
            Rate::Variable(template) => write(template),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_a_variable_is_a_size_or_nothing() {
        assert_eq!(Rate::parse("1m"), Some(1 << 20));
        assert_eq!(Rate::parse(" 300 "), Some(300));
        assert_eq!(Rate::parse(""), Some(0));
        for wrong in ["fast", "-1", "1.5m", "2000g", "99999999999999999999", "1 m"] {
            assert_eq!(Rate::parse(wrong), None, "{wrong}");
        }
    }
}
