//! `--from-nginx`: an nginx configuration → the TOML that serves its stream blocks here, and for each line that cannot be
//! carried over the reason.
//!
//! `token` reads words, `tree` directives and what they include. `stream`, with `settings`, `server`, `upstream`, `health`, `map` and `log`,
//! says what a directive of a stream block is here; `global` does so for what stands outside. `reasons` has the words for
//! what is nothing here, `names` what the files give names to, `out` writes it all. What comes out is checked like any
//! configuration, and what that finds is told at nginx's lines: where nothing is said to be lost, `-t` takes what was printed.
//!
//! A server that would let in whom nginx keeps out, or lead elsewhere, is printed as a comment.

mod global;
mod health;
mod log;
mod map;
mod names;
mod out;
mod reasons;
mod server;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
mod token;
mod tree;
mod upstream;
mod value;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use culvert_shared::config::{self, Place};

use crate::check;
use out::{Document, Level, Section};
use tree::Directive;

/// What is checked, as a file's name.
const PRINTED: &str = "what is printed";

/// Prints what an nginx configuration is here. Failure: part of it is lost, or it is none.
pub fn run(path: &Path) -> Result<ExitCode> {
    let directives = tree::read(path)?;
    let mut document = translate(&directives)?;
    let faults = examine(&mut document);
    let page = document.page();
    let remarks = document.remarks();
    for remark in remarks.iter().filter(|remark| remark.level != Level::Idle) {
        check::complain(&remark.line());
    }
    for fault in &faults {
        check::complain(fault);
    }
    let printed = check::print(page.text.trim_end());
    match remarks.iter().any(|remark| remark.level == Level::Lost) || !faults.is_empty() {
        true => Ok(ExitCode::FAILURE),
        false => Ok(printed),
    }
}

/// What the directives of nginx's files are here.
///
/// # Errors
/// There is no stream block.
fn translate(directives: &[Directive]) -> Result<Document> {
    let mut global = Section::new("", "", None);
    global.comment("Made from an nginx configuration by master --from-nginx. Check it with master -t, see it in effect with");
    global.comment("master -T. Comments beside a line name the line of nginx that they are about.");
    let mut block = None;
    for directive in directives {
        match (directive.name.as_str(), &directive.fault, &block) {
            (_, Some(fault), _) => global.say(directive, Level::Lost, fault),
            ("stream", None, None) => block = Some(directive),
            ("stream", None, Some(_)) => global.say(directive, Level::Lost, "nginx takes one stream block"),
            _ => global::main(directive, &mut global),
        }
    }
    let Some(block) = block else {
        bail!("there is no stream block, and nothing else of nginx can be carried over");
    };
    global::defaults(&mut global);
    let mut document = Document {
        sections: vec![global],
    };
    stream::stream(block, &mut document);
    Ok(document)
}

/// Lets the configuration's own check look at what would be printed. What it finds is put beside the lines; what no
/// line is to blame for is returned.
fn examine(document: &mut Document) -> Vec<String> {
    let page = document.page();
    let Err(mut diagnostics) = config::load_text(Path::new(PRINTED), &page.text) else {
        return Vec::new();
    };
    // From below, so that lines above keep their numbers.
    diagnostics.sort_by_key(|diagnostic| match diagnostic.place {
        Place::File { line, .. } => std::cmp::Reverse(line),
        _ => std::cmp::Reverse(0),
    });
    let mut faults = Vec::new();
    for diagnostic in diagnostics {
        let blamed = match diagnostic.place {
            Place::File { line, .. } => {
                let text = at_nginxs_lines(&diagnostic.text, document, &page);
                document.blame(&page, line, &format!("{}: {text}", diagnostic.key))
            }
            _ => false,
        };
        if !blamed {
            faults.push(diagnostic.to_string());
        }
    }
    faults
}

/// What the check says of a line that it has seen before, of the line of nginx that this one comes from. Remarks that are
/// put in move those that are printed.
fn at_nginxs_lines(text: &str, document: &Document, page: &out::Page) -> String {
    let Some((before, place)) = text.split_once(&format!("{PRINTED}:")) else {
        return text.to_owned();
    };
    let number = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (line, rest) = place.split_at(number(place));
    let rest = rest
        .strip_prefix(':')
        .map_or(rest, |column| &column[number(column)..]);
    match line.parse().ok().and_then(|line| document.place(page, line)) {
        Some(at) => format!("{before}{at}{rest}"),
        None => text.to_owned(),
    }
}
