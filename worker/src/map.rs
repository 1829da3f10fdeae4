//! Looking a value up in a `[[map]]`. Pure.
//!
//! In nginx's order: the text itself, the longest mask that begins with an asterisk, the longest that ends with one, the
//! first regular expression that fits, the default.

use std::collections::HashMap;

use culvert_shared::config::{Part, Pattern, Template, Variable, VariableMap};
use regex::{Captures, Regex};

/// A map made ready for looking things up.
pub struct Lookup {
    /// What is looked up.
    pub source: Template,
    values: Vec<Template>,
    default: Template,
    hostnames: bool,
    exact: HashMap<String, usize>,
    below: HashMap<String, usize>,
    beginnings: HashMap<String, usize>,
    regexes: Vec<(Regex, usize)>,
}

impl Lookup {
    /// From the configuration.
    pub fn new(map: &VariableMap) -> Lookup {
        let mut lookup = Lookup {
            source: map.source.clone(),
            values: map.entries.iter().map(|entry| entry.value.clone()).collect(),
            default: map.default.clone(),
            hostnames: map.hostnames,
            exact: HashMap::new(),
            below: HashMap::new(),
            beginnings: HashMap::new(),
            regexes: Vec::new(),
        };
        for (value, entry) in map.entries.iter().enumerate() {
            match &entry.pattern {
                Pattern::Exact(text) => _ = lookup.exact.insert(text.clone(), value),
                Pattern::Below(name) => _ = lookup.below.insert(name.clone(), value),
                Pattern::Domain(name) => {
                    // The name by itself, where it stands too, is the closer match.
                    lookup.exact.entry(name.clone()).or_insert(value);
                    lookup.below.entry(name.clone()).or_insert(value);
                }
                Pattern::Beginning(name) => _ = lookup.beginnings.insert(name.clone(), value),
                Pattern::Regex(regex) => lookup.regexes.push((regex.clone(), value)),
            }
        }
        lookup
    }

    /// The value for a text, and what the groups of its regular expression have found if it asks for that.
    pub fn find<'t>(&self, text: &'t str) -> (&Template, Option<Captures<'t>>) {
        let small = text.to_ascii_lowercase();
        let name = match self.hostnames {
            true => small.strip_suffix('.').unwrap_or(&small),
            false => &small,
        };
        let dots = || name.match_indices('.').map(|(at, _)| at);
        let found = self
            .exact
            .get(name)
            .or_else(|| {
                dots()
                    .filter(|at| *at > 0)
                    .find_map(|at| self.below.get(&name[at + 1..]))
            })
            .or_else(|| dots().rev().find_map(|at| self.beginnings.get(&name[..at])))
            .copied();
        if let Some(value) = found {
            return (&self.values[value], None);
        }
        // As in nginx, an empty text is no matter for expressions, whatever they would say.
        let mut fitting = self.regexes.iter().filter(|_| !text.is_empty());
        let Some((regex, value)) = fitting.find(|(regex, _)| regex.is_match(text)) else {
            return (&self.default, None);
        };
        let value = &self.values[*value];
        let asks = |part: &Part| matches!(part, Part::Variable(Variable::Capture(_)));
        // Finding groups takes longer than to see that it fits.
        let captures = (value.0.iter().any(asks)).then(|| regex.captures(text)).flatten();
        (value, captures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_shared::config::MapEntry;

    fn template(text: &str) -> Template {
        Template(vec![Part::Literal(text.into())])
    }

    fn lookup(patterns: Vec<Pattern>) -> Lookup {
        let entry = |(number, pattern): (usize, Pattern)| MapEntry {
            text: String::new(),
            pattern,
            value: template(&number.to_string()),
        };
        Lookup::new(&VariableMap {
            name: "v".into(),
            source: Template(Vec::new()),
            hostnames: true,
            entries: patterns.into_iter().enumerate().map(entry).collect(),
            default: template("default"),
        })
    }

    #[test]
    fn the_closest_pattern_counts_in_nginxs_order() {
        let regex = |text: &str| Pattern::Regex(Regex::new(text).unwrap());
        let lookup = lookup(vec![
            regex("^a"),
            Pattern::Below("example.org".into()),
            Pattern::Below("b.example.org".into()),
            Pattern::Beginning("www.example".into()),
            Pattern::Beginning("www.example.co".into()),
            Pattern::Exact("www.example.org".into()),
            Pattern::Domain("example.net".into()),
            regex("^a.*z$"),
            Pattern::Exact("".into()),
        ]);
        for (text, expected) in [
            ("www.example.org", "5"),
            ("WWW.Example.Org.", "5"),
            ("a.example.org", "1"),
            ("a.b.example.org", "2"),
            ("b.example.org", "1"),
            ("example.org", "default"),
            (".example.org", "default"),
            ("www.example.com", "3"),
            ("www.example.co.uk", "4"),
            ("example.net", "6"),
            ("x.y.example.net", "6"),
            ("abcz", "0"),
            ("Abcz", "default"),
            ("", "8"),
            ("...", "default"),
        ] {
            assert_eq!(lookup.find(text).0, &template(expected), "{text:?}");
        }
    }

    #[test]
    fn what_groups_have_found_comes_with_a_value_that_asks_for_it() {
        let entry = |pattern: &str, value: Part| MapEntry {
            text: String::new(),
            pattern: Pattern::Regex(Regex::new(pattern).unwrap()),
            value: Template(vec![value]),
        };
        let lookup = Lookup::new(&VariableMap {
            name: "v".into(),
            source: Template(Vec::new()),
            hostnames: false,
            entries: vec![
                entry("^(a)(.)", Part::Variable(Variable::Capture(2))),
                entry("^(b)", Part::Literal("b".into())),
            ],
            default: template("default"),
        });
        let found = lookup.find("ax").1.expect("it asks");
        assert_eq!(found.get(2).map(|group| group.as_str()), Some("x"));
        assert!(lookup.find("bx").1.is_none());
        assert!(lookup.find("c").1.is_none());
    }

    #[test]
    fn no_expression_fits_an_empty_text() {
        let all = || Pattern::Regex(Regex::new("^.*$").unwrap());
        assert_eq!(lookup(vec![all()]).find("").0, &template("default"));
        assert_eq!(lookup(vec![all()]).find("a").0, &template("0"));
        assert_eq!(
            lookup(vec![all(), Pattern::Exact("".into())]).find("").0,
            &template("1")
        );
    }
}
