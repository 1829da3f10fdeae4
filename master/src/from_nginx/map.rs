//! `map`: a variable that is made from others. Ours uses only maps that stand before it, nginx's any.

use super::names::Names;
use super::out::{Level, Section, quoted};
use super::tree::{Directive, Place};
use super::value::{Piece, Use, is_name_char, pieces, template};

/// Carries maps over, each behind those that it uses. What cannot be carried over is taken out of `names`.
pub fn maps(directives: &[&Directive], names: &mut Names) -> Vec<Section> {
    let mut sections = Vec::new();
    let mut waiting: Vec<&Directive> = directives.to_vec();
    while !waiting.is_empty() {
        let (ready, later): (Vec<&Directive>, Vec<&Directive>) = waiting.iter().partition(|directive| {
            let others = waiting.iter().filter_map(|other| variable(other));
            !others.into_iter().any(|other| uses(directive, other))
        });
        let in_a_circle = ready.is_empty();
        let (now, later) = if in_a_circle {
            (later, Vec::new())
        } else {
            (ready, later)
        };
        for directive in now {
            let mut section = Section::new("[[map]]", "map", Some(&directive.at));
            let done = match in_a_circle {
                true => Err("it uses itself, or maps that use it".to_owned()),
                false => map(directive, &mut section, names),
            };
            if let Err(reason) = done {
                section.say(directive, Level::Lost, &reason);
                section.leave_out();
                if let Some(variable) = variable(directive) {
                    names.lose(variable, directive);
                }
            }
            sections.push(section);
        }
        waiting = later;
    }
    sections
}

/// The name of what a map makes.
fn variable(directive: &Directive) -> Option<&str> {
    directive.args.last().and_then(|name| name.strip_prefix('$'))
}

fn uses(directive: &Directive, variable: &str) -> bool {
    let values = directive
        .block
        .iter()
        .flatten()
        .filter_map(|line| line.args.first());
    let mut texts = directive.args.iter().take(1).chain(values);
    texts.any(|text| pieces(text).is_ok_and(|pieces| pieces.contains(&Piece::Variable(variable))))
}

/// How a line of a map is looked at, first things first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// The text itself, and masks.
    Plain,
    /// Texts that only a regular expression can say here, and that nginx looks at before those.
    Spelled,
    Regex,
    Default,
}

fn map(directive: &Directive, section: &mut Section, names: &mut Names) -> Result<(), String> {
    let [source, name] = directive.args.as_slice() else {
        return Err("it takes a source and a variable".to_owned());
    };
    if let Some(fault) = &directive.fault {
        return Err(fault.clone());
    }
    let source = template(source, Use::Value, names, &[])?;
    if source.is_empty() {
        return Err("its source is empty".to_owned());
    }
    section.set("source", &quoted(&source), &directive.at)?;
    section.set("variable", &quoted(name), &directive.at)?;
    let mut lines: Vec<(Rank, String, Place)> = Vec::new();
    let mut hostnames = false;
    let mut inner = directive.block.iter().flatten();
    let ever = inner.any(|line| line.name == "hostnames" && line.args.is_empty());
    for line in directive.block.iter().flatten() {
        if let Some(fault) = &line.fault {
            return Err(format!("{} at {}: {fault}", line.shown(), line.at));
        }
        match (line.name.as_str(), line.args.as_slice()) {
            ("hostnames", []) => {
                hostnames = true;
                section.set("hostnames", "true", &line.at)?;
            }
            ("volatile", []) => section.say(line, Level::Idle, "a value is made anew whenever it is needed"),
            (pattern, [value]) => match entry(pattern, value, ever.then_some(hostnames), names) {
                Ok((rank, text)) => lines.push((rank, quoted(&text), line.at.clone())),
                // Another line, or the default, would take what was meant for this one.
                Err(reason) => return Err(format!("{} at {}: {reason}", line.shown(), line.at)),
            },
            _ => {
                return Err(format!(
                    "{} at {}: it takes a pattern and a value",
                    line.shown(),
                    line.at
                ));
            }
        }
    }
    lines.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    section.begin_list("values", &directive.at)?;
    for (_, text, at) in lines {
        section.entry(&text, &at);
    }
    section.end_list();
    Ok(())
}

/// A line of the map. `masks`: whether it may hold one; not where `hostnames` follows it. `None`: there is no `hostnames`.
fn entry(pattern: &str, value: &str, masks: Option<bool>, names: &Names) -> Result<(Rank, String), String> {
    let value = match value.contains('$') {
        true => with_captures(value, pattern, names)?,
        false => names.upstream(value).unwrap_or(value).to_owned(),
    };
    if value.trim() != value || value == "\"\"" {
        return Err("a value neither begins nor ends with a space here".to_owned());
    }
    let value = if value.is_empty() { "\"\"" } else { &value };
    let (rank, pattern) = match pattern {
        "default" => (Rank::Default, "default".to_owned()),
        "" => (Rank::Plain, "\"\"".to_owned()),
        regex if regex.starts_with('~') => (Rank::Regex, unspaced(regex)),
        text if text == "\"\""
            || text.contains(char::is_whitespace)
            || (masks == Some(false) && is_mask(text)) =>
        {
            let text = text
                .strip_prefix('\\')
                .filter(|rest| !rest.is_empty())
                .unwrap_or(text);
            (Rank::Spelled, unspaced(&format!("~*^{}$", escaped(text))))
        }
        // To nginx it is a mask all the same.
        text => match text.strip_prefix('\\') {
            Some(rest) if masks == Some(true) && is_mask(rest) => (Rank::Plain, rest.to_owned()),
            _ => (Rank::Plain, text.to_owned()),
        },
    };
    Ok((rank, format!("{pattern} {value}")))
}

fn is_mask(text: &str) -> bool {
    text.contains('*') || text.starts_with('.')
}

/// A value with variables. Those that a regular expression gives are called as in nginx.
fn with_captures(value: &str, pattern: &str, names: &Names) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = value;
    let is_group = |behind: &str| behind.starts_with(|c: char| ('1'..='9').contains(&c));
    while let Some((at, _)) = rest.match_indices('$').find(|(at, _)| is_group(&rest[at + 1..])) {
        // Outside a regular expression it is what the last one has found, whichever that was: nobody means that.
        if !pattern.starts_with('~') {
            return Err(
                "$1 and so on stand for something in the value of a regular expression only".to_owned(),
            );
        }
        out.push_str(&template(&rest[..at], Use::Value, names, &named(pattern))?);
        // The number has one digit, here as there.
        out.push_str(&rest[at..at + 2]);
        rest = &rest[at + 2..];
    }
    out.push_str(&template(rest, Use::Value, names, &named(pattern))?);
    Ok(out)
}

/// The names of the groups of a regular expression.
fn named(pattern: &str) -> Vec<String> {
    let Some(regex) = pattern.strip_prefix('~') else {
        return Vec::new();
    };
    let groups = regex.match_indices("(?").filter_map(|(at, _)| {
        let behind = &regex[at + 2..];
        let behind = behind.strip_prefix('P').unwrap_or(behind).strip_prefix('<')?;
        let (name, _) = behind.split_once('>')?;
        (!name.is_empty() && name.chars().all(is_name_char)).then(|| name.to_owned())
    });
    groups.collect()
}

/// A regular expression for this text.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii_punctuation() {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A regular expression without white space.
fn unspaced(regex: &str) -> String {
    regex
        .chars()
        .map(|c| match c.is_whitespace() {
            true => format!("\\x{{{:x}}}", u32::from(c)),
            false => c.to_string(),
        })
        .collect()
}
