//! `log_format` and `access_log`.

use culvert_shared::config;

use super::names::Names;
use super::out::{Level, Section, Table, quoted};
use super::tree::Directive;
use super::value::{Bad, Piece, amount, is_name_char, pieces};

/// Carries a format over.
pub fn log_format(directive: &Directive, names: &Names) -> Section {
    let mut section = Section::new("[[log_format]]", "log_format", Some(&directive.at));
    if let Err(reason) = format(directive, &mut section, names) {
        section.say(directive, Level::Lost, &reason);
        section.leave_out();
    }
    section
}

fn format(directive: &Directive, section: &mut Section, names: &Names) -> Result<(), String> {
    if let Some(fault) = &directive.fault {
        return Err(fault.clone());
    }
    let Some((name, texts)) = directive.args.split_first() else {
        return Err("it takes a name and a format".to_owned());
    };
    let ours = names.formats.get(name).unwrap_or(name);
    if ours != name {
        section.say(
            directive,
            Level::Note,
            &format!("it is called {ours} here: there is a ready-made format {name}"),
        );
    }
    section.set("name", &quoted(ours), &directive.at)?;
    let texts = match texts.split_first() {
        Some((escape, texts)) if escape.starts_with("escape=") => {
            section.set(
                "escape",
                &quoted(escape.trim_start_matches("escape=")),
                &directive.at,
            )?;
            texts
        }
        _ => texts,
    };
    let text = texts.concat();
    let mut out = String::new();
    let mut unknown: Vec<&str> = Vec::new();
    let mut pieces = pieces(&text)?.into_iter().peekable();
    while let Some(piece) = pieces.next() {
        match piece {
            Piece::Text(text) => out.push_str(text),
            Piece::Variable(name) if !config::knows_log_variable(name) => {
                unknown.push(name);
                out.push('-');
            }
            Piece::Variable(name) => match pieces.peek() {
                Some(Piece::Text(text)) if text.starts_with(is_name_char) => {
                    out.push_str(&format!("${{{name}}}"))
                }
                _ => out.push_str(&format!("${name}")),
            },
        }
    }
    if !unknown.is_empty() {
        let reason = format!(
            "of it ${}, which no log can tell here: it is \"-\"",
            unknown.join(", $")
        );
        section.say(directive, Level::Lost, &reason);
    }
    section.set("format", &quoted(&out), &directive.at)
}

/// Carries an access log over.
pub fn access_log(directive: &Directive, section: &mut Section, names: &Names) -> Result<(), Bad> {
    let at = &directive.at;
    let (path, options) = directive.args.split_first().ok_or("it names no file")?;
    if path == "off" {
        return Ok(section.set("access_log", &quoted("off"), at)?);
    }
    if section.has("access_log") {
        return Err("there is one access log for a session".into());
    }
    if path.contains('$') {
        return Err("a log's path holds no variables here".into());
    }
    let mut table = Table::default();
    table.put("path", quoted(path));
    for (number, option) in options.iter().enumerate() {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        match (number, name) {
            (_, "buffer" | "flush") => table.put(name, amount(value)?),
            (_, "gzip") => {
                section.say(
                    directive,
                    Level::Lost,
                    "of it gzip: lines are written as they are",
                );
            }
            (_, "if") => {
                section.say(
                    directive,
                    Level::Lost,
                    "of it the condition: every session is logged",
                );
            }
            (0, format) => match names.formats.get(format) {
                Some(ours) => table.put("format", quoted(ours)),
                None => return Err(Bad::Line(format!("there is no log_format {format}"))),
            },
            _ => return Err(Bad::Line(format!("{option} is not known here"))),
        }
    }
    section.set("access_log", &table.text(), at)?;
    if !path.starts_with('/') && !path.starts_with("syslog:") {
        let reason = "a relative path counts from where the program is started, not from nginx's prefix";
        section.say(directive, Level::Note, reason);
    }
    Ok(())
}
