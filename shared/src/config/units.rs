//! Durations and sizes with their units, both ways: nginx's spelling ↔ milliseconds and bytes.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::diagnostic::Fault;
use super::valid::Given;

/// nginx's units of time, in milliseconds, in the order in which a compound (`1h30m`) uses them.
const TIME_UNITS: &[(&str, u64)] = &[
    ("y", 365 * 86_400_000),
    ("M", 30 * 86_400_000),
    ("w", 7 * 86_400_000),
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// A duration within a range: `"500ms"`, `"10s"`, `"1h30m"`; a number without a unit means seconds, as with nginx.
pub(super) fn duration(given: Given, range: RangeInclusive<Duration>) -> Result<Duration, Fault> {
    let remedy = || {
        format!(
            "allowed: {} to {}, written as \"500ms\", \"10s\", \"2m\", \"1h\" or as whole seconds",
            write_duration(*range.start()),
            write_duration(*range.end())
        )
    };
    let read = match (given.str(), given.whole()) {
        (Some(text), _) => parse_duration(text).map_err(|what| Fault::new(what, remedy()))?,
        (None, Some(seconds)) => u64::try_from(seconds)
            .ok()
            .and_then(|s| s.checked_mul(1000))
            .map(Duration::from_millis),
        (None, None) => return Err(given.wrong_type(remedy())),
    };
    read.filter(|read| range.contains(read))
        .ok_or_else(|| Fault::new("out of range", remedy()))
}

/// `Ok(None)`: too large to count in milliseconds.
fn parse_duration(text: &str) -> Result<Option<Duration>, String> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err("empty".to_owned());
    }
    let mut total: Option<u64> = Some(0);
    let mut allowed = TIME_UNITS;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count());
        let (unit, after) = after.split_at(after.bytes().take_while(u8::is_ascii_alphabetic).count());
        if number.is_empty() || (unit.is_empty() && !after.is_empty()) {
            return Err("not a duration".to_owned());
        }
        let name = if unit.is_empty() { "s" } else { unit };
        let Some(at) = allowed.iter().position(|(known, _)| *known == name) else {
            return Err(match TIME_UNITS.iter().any(|(known, _)| *known == name) {
                true => "units from the largest to the smallest, each once".to_owned(),
                false => format!("unknown unit \"{unit}\""),
            });
        };
        let part = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(allowed[at].1));
        total = total.and_then(|total| total.checked_add(part?));
        allowed = &allowed[at + 1..];
        rest = after.trim_start();
    }
    Ok(total.map(Duration::from_millis))
}

/// Writes a duration of whole milliseconds in the largest unit up to days that holds it exactly.
pub(super) fn write_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    let units = TIME_UNITS
        .iter()
        .filter(|(name, _)| matches!(*name, "d" | "h" | "m" | "s" | "ms"));
    let exact = units
        .map(|&(name, unit)| (name, u128::from(unit)))
        .find(|(_, unit)| ms > 0 && ms.is_multiple_of(*unit));
    exact.map_or_else(|| "0".to_owned(), |(name, unit)| format!("{}{name}", ms / unit))
}

/// nginx's units of size.
const SIZE_UNITS: &[(&str, u64)] = &[("g", 1 << 30), ("m", 1 << 20), ("k", 1 << 10)];

/// A size within a range, in bytes: `"16k"`, `"1m"`; a number without a unit means bytes.
pub(super) fn size(given: Given, range: RangeInclusive<usize>) -> Result<usize, Fault> {
    let remedy = || {
        format!(
            "allowed: {} to {}, written as \"16k\", \"1m\" or as whole bytes",
            write_size(*range.start()),
            write_size(*range.end())
        )
    };
    let bytes = match (given.str(), given.whole()) {
        (Some(text), _) => parse_size(text.trim()).map_err(|what| Fault::new(what, remedy()))?,
        (None, Some(bytes)) => u64::try_from(bytes).ok(),
        (None, None) => return Err(given.wrong_type(remedy())),
    };
    let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
    bytes
        .filter(|bytes| range.contains(bytes))
        .ok_or_else(|| Fault::new("out of range", remedy()))
}

/// `Ok(None)`: too large to count.
pub(super) fn parse_size(text: &str) -> Result<Option<u64>, String> {
    let (number, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    if number.is_empty() || !unit.bytes().all(|b| b.is_ascii_alphabetic()) {
        return Err("not a size".to_owned());
    }
    let lower = unit.to_ascii_lowercase();
    let Some(factor) = (if unit.is_empty() {
        Some(1)
    } else {
        SIZE_UNITS.iter().find(|(n, _)| *n == lower).map(|u| u.1)
    }) else {
        return Err(format!("unknown unit \"{unit}\""));
    };
    Ok(number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor)))
}

/// Writes a size in the largest unit that holds it exactly.
pub(super) fn write_size(bytes: usize) -> String {
    let exact = SIZE_UNITS
        .iter()
        .find(|(_, unit)| bytes > 0 && (bytes as u64).is_multiple_of(*unit));
    exact.map_or_else(
        || bytes.to_string(),
        |(name, unit)| format!("{}{name}", bytes as u64 / unit),
    )
}

#[cfg(test)]
mod tests {
    use config::ValueKind;
    use proptest::prelude::*;

    use super::*;

    const YEAR: Duration = Duration::from_secs(365 * 86_400);

    fn time(kind: impl Into<ValueKind>) -> Result<Duration, String> {
        let kind = kind.into();
        duration(
            Given {
                kind: &kind,
                loose: false,
            },
            Duration::ZERO..=YEAR,
        )
        .map_err(|fault| fault.what)
    }

    fn bytes(kind: impl Into<ValueKind>) -> Result<usize, String> {
        let kind = kind.into();
        size(
            Given {
                kind: &kind,
                loose: false,
            },
            1..=1 << 30,
        )
        .map_err(|fault| fault.what)
    }

    #[test]
    fn durations_have_nginx_units_and_bare_numbers_are_seconds() {
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(time("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(time("1h 30"), Ok(Duration::from_secs(3630)));
        assert_eq!(time("1M"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(time("10"), Ok(Duration::from_secs(10)));
        assert_eq!(time(10i64), Ok(Duration::from_secs(10)));
        assert_eq!(time(0i64), Ok(Duration::ZERO));
    }

    #[test]
    fn wrong_durations_say_why() {
        assert_eq!(time("10min"), Err("unknown unit \"min\"".into()));
        assert_eq!(time("1.5s"), Err("not a duration".into()));
        assert_eq!(time("-1s"), Err("not a duration".into()));
        assert_eq!(time("s"), Err("not a duration".into()));
        assert_eq!(time(""), Err("empty".into()));
        assert_eq!(
            time("1s1m"),
            Err("units from the largest to the smallest, each once".into())
        );
        assert_eq!(time("16k"), Err("unknown unit \"k\"".into()));
        assert_eq!(time("99999999999999999999s"), Err("out of range".into()));
        assert_eq!(time(i64::MAX), Err("out of range".into()));
        assert_eq!(time(-1i64), Err("out of range".into()));
        assert_eq!(time(1.5), Err("wrong type, a fraction".into()));
        assert_eq!(time(true), Err("wrong type, a boolean".into()));
    }

    #[test]
    fn sizes_have_nginx_units_and_bare_numbers_are_bytes() {
        assert_eq!(bytes("16k"), Ok(16_384));
        assert_eq!(bytes("1M"), Ok(1 << 20));
        assert_eq!(bytes("1g"), Ok(1 << 30));
        assert_eq!(bytes("100"), Ok(100));
        assert_eq!(bytes(100i64), Ok(100));
    }

    #[test]
    fn wrong_sizes_say_why() {
        assert_eq!(bytes("16kb"), Err("unknown unit \"kb\"".into()));
        assert_eq!(bytes("10s"), Err("unknown unit \"s\"".into()));
        assert_eq!(bytes("1.5k"), Err("not a size".into()));
        assert_eq!(bytes(""), Err("not a size".into()));
        assert_eq!(bytes("0"), Err("out of range".into()));
        assert_eq!(bytes("99999999999g"), Err("out of range".into()));
        assert_eq!(bytes(-1i64), Err("out of range".into()));
    }

    proptest! {
        #[test]
        fn a_written_duration_reads_back(ms in 0u64..=31_536_000_000) {
            let duration = Duration::from_millis(ms);
            prop_assert_eq!(time(write_duration(duration)), Ok(duration));
        }

        #[test]
        fn a_written_size_reads_back(size in 1usize..=1 << 30) {
            prop_assert_eq!(bytes(write_size(size)), Ok(size));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,20}|[0-9]{0,25}[a-zA-Z ]{0,3}[0-9]{0,3}[a-z]{0,2}") {
            let _ = time(text.as_str());
            let _ = bytes(text.as_str());
        }
    }
}
