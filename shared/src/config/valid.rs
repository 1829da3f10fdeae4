//! Single values: what is written → what is used. Each function looks at one value and knows no other.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use config::ValueKind;

use super::diagnostic::Fault;
use super::{OnReload, ProxyProtocol};

/// One value as given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given<'a> {
    pub kind: &'a ValueKind,
    /// Bare text from outside a file, where `2` and `true` cannot be told from strings.
    pub loose: bool,
}

impl<'a> Given<'a> {
    /// The value's type, in words.
    pub(super) fn type_name(self) -> &'static str {
        match self.kind {
            ValueKind::Nil => "nothing",
            ValueKind::Boolean(_) => "a boolean",
            ValueKind::I64(_) | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_) => "a number",
            ValueKind::Float(_) => "a fraction",
            ValueKind::String(_) => "a string",
            ValueKind::Table(_) => "a table",
            ValueKind::Array(_) => "a list",
        }
    }

    /// The fault of a value that has another type than it should.
    pub(super) fn wrong_type(self, remedy: impl Into<String>) -> Fault {
        Fault::new(format!("wrong type, {}", self.type_name()), remedy)
    }

    pub(super) fn str(self) -> Option<&'a str> {
        match self.kind {
            ValueKind::String(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number, `None` when it is of another type.
    pub(super) fn whole(self) -> Option<i128> {
        match self.kind {
            ValueKind::I64(number) => Some(i128::from(*number)),
            ValueKind::I128(number) => Some(*number),
            ValueKind::String(text) if self.loose && digits(text.trim()) => text.trim().parse().ok(),
            _ => None,
        }
    }
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// `true` or `false`; as bare text also nginx's `on` and `off`.
pub(super) fn boolean(given: Given) -> Result<bool, Fault> {
    const REMEDY: &str = "allowed: true, false";
    match (given.kind, given.loose.then(|| given.str()).flatten()) {
        (ValueKind::Boolean(flag), _) => Ok(*flag),
        (_, Some("true" | "on")) => Ok(true),
        (_, Some("false" | "off")) => Ok(false),
        (_, Some(_)) => Err(Fault::new("neither true nor false", REMEDY)),
        (_, None) => Err(given.wrong_type(REMEDY)),
    }
}

/// A whole number within a range.
pub(super) fn number(given: Given, range: RangeInclusive<u32>) -> Result<u32, Fault> {
    let remedy = format!(
        "allowed: a whole number from {} to {}",
        range.start(),
        range.end()
    );
    match given.whole() {
        Some(number) => in_range(number, &range, remedy),
        None if given.loose => Err(Fault::new("not a whole number", remedy)),
        None => Err(given.wrong_type(remedy)),
    }
}

fn in_range(number: i128, range: &RangeInclusive<u32>, remedy: String) -> Result<u32, Fault> {
    match u32::try_from(number) {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(Fault::new("out of range", remedy)),
    }
}

/// `"auto"` (`None`) or a whole number within a range.
pub(super) fn auto_or_number(given: Given, range: RangeInclusive<u32>) -> Result<Option<u32>, Fault> {
    let remedy = format!(
        "allowed: \"auto\", or a whole number from {} to {}",
        range.start(),
        range.end()
    );
    match (given.str().map(str::trim), given.whole()) {
        (Some("auto"), _) => Ok(None),
        (_, Some(number)) => in_range(number, &range, remedy).map(Some),
        (Some(_), None) => Err(Fault::new("neither \"auto\" nor a number", remedy)),
        (None, None) => Err(given.wrong_type(remedy)),
    }
}

/// What becomes of sessions that a reload leaves without their listener or peer.
pub(super) fn on_reload(given: Given) -> Result<OnReload, Fault> {
    const REMEDY: &str = "allowed: \"keep\", \"close\"";
    let word = text(given, "\"keep\"")?;
    let found = OnReload::ALL.iter().find(|(name, _)| *name == word);
    found
        .map(|(_, what)| *what)
        .ok_or_else(|| Fault::new("neither \"keep\" nor \"close\"", REMEDY))
}

/// The version of the PROXY header that is sent, if one is.
pub(super) fn proxy_protocol(given: Given) -> Result<Option<ProxyProtocol>, Fault> {
    const REMEDY: &str = "allowed: false, \"v1\" (or true), \"v2\"";
    match given.str() {
        Some("v1") => Ok(Some(ProxyProtocol::V1)),
        Some("v2") => Ok(Some(ProxyProtocol::V2)),
        Some(_) if !given.loose => Err(Fault::new("unknown version of the PROXY protocol", REMEDY)),
        _ => boolean(given)
            .map(|on| on.then_some(ProxyProtocol::V1))
            .map_err(|fault| Fault::new(fault.what, REMEDY)),
    }
}

/// Text that is not empty.
pub(super) fn text<'a>(given: Given<'a>, example: &str) -> Result<&'a str, Fault> {
    let remedy = || format!("write it as text, for example {example}");
    match given.str() {
        Some(text) if text.trim().is_empty() => Err(Fault::new("empty", remedy())),
        Some(text) => Ok(text),
        None => Err(given.wrong_type(remedy())),
    }
}

/// A path, as written: a relative one counts from where the program is started.
pub(super) fn path(given: Given, example: &str) -> Result<PathBuf, Fault> {
    let text = text(given, example)?;
    if text.contains('\0') {
        return Err(Fault::new(
            "a path cannot hold the character NUL",
            format!("write for example {example}"),
        ));
    }
    Ok(PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_text_stands_for_numbers_and_booleans_but_a_string_in_a_file_does_not() {
        let two = ValueKind::from("2");
        assert_eq!(
            number(
                Given {
                    kind: &two,
                    loose: true
                },
                1..=9
            ),
            Ok(2)
        );
        let fault = number(
            Given {
                kind: &two,
                loose: false,
            },
            1..=9,
        )
        .expect_err("a string");
        assert_eq!(
            fault,
            Fault::new("wrong type, a string", "allowed: a whole number from 1 to 9")
        );
        let on = ValueKind::from("on");
        assert_eq!(
            boolean(Given {
                kind: &on,
                loose: true
            }),
            Ok(true)
        );
        assert!(
            boolean(Given {
                kind: &on,
                loose: false
            })
            .is_err()
        );
    }

    #[test]
    fn auto_or_a_number() {
        let auto = ValueKind::from("auto");
        assert_eq!(
            auto_or_number(
                Given {
                    kind: &auto,
                    loose: false
                },
                1..=9
            ),
            Ok(None)
        );
        let zero = ValueKind::from(0i64);
        let fault = auto_or_number(
            Given {
                kind: &zero,
                loose: false,
            },
            1..=9,
        )
        .expect_err("zero");
        assert_eq!(
            fault,
            Fault::new("out of range", "allowed: \"auto\", or a whole number from 1 to 9")
        );
    }
}
