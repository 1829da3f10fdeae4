//! `conf/man/proxy.toml.5` is `conf/proxy.toml` as a manual page: its comments are the only text about keys that there is. After a
//! change there, write the page anew: `UPDATE_MANUAL=1 cargo test -p culvert-shared manual`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::file::{Key, ROOT, Shape};

const BEGINNING: &str = r#".\" Made from conf/proxy.toml, see shared/src/config/tests/manual.rs. Change it there.
.Dd November 22, 2026
.Dt PROXY.TOML 5
.Os
.Sh NAME
.Nm proxy.toml
.Nd configuration of culvert
.Sh DESCRIPTION
The configuration of
.Xr culvert 8
is a file in TOML.
Each key stands below with its default or an example, in the order of the file
.Pa conf/proxy.toml ,
from which this page is made.
.Pp
"#;

const END: &str = r#".Sh FILES
.Bl -tag -width Ds
.It Pa /etc/culvert/proxy.toml
What is read when
.Fl c
names no other file.
.El
.Sh EXAMPLES
The least configuration that runs:
"#;

const LAST: &str = r#".Sh SEE ALSO
.Xr culvert 8
"#;

fn conf(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(conf(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Comments, and the lines that they are about.
#[derive(Default)]
struct Piece<'a> {
    comment: Vec<&'a str>,
    lines: Vec<&'a str>,
}

/// The pieces of a file: a blank line ends one, and so does a table's header.
fn pieces(text: &str) -> Vec<Piece<'_>> {
    let mut pieces = vec![Piece::default()];
    for line in text.lines() {
        let last = pieces.last_mut().unwrap();
        match line.strip_prefix('#') {
            _ if line.is_empty() => pieces.push(Piece::default()),
            Some(comment) if last.lines.is_empty() => {
                last.comment.push(comment.strip_prefix(' ').unwrap_or(comment))
            }
            Some(comment) => {
                pieces.push(Piece::default());
                pieces.last_mut().unwrap().comment.push(comment.trim_start());
            }
            None => {
                last.lines.push(line);
                if line.starts_with('[') {
                    pieces.push(Piece::default());
                }
            }
        }
    }
    pieces.retain(|piece| !piece.comment.is_empty() || !piece.lines.is_empty());
    pieces
}

fn page(text: &str, minimal: &str) -> String {
    let mut out = String::from(BEGINNING);
    let mut table = "";
    let mut in_list = false;
    for (number, piece) in pieces(text).iter().enumerate() {
        let header = piece.lines.first().filter(|line| line.starts_with('['));
        match header {
            Some(header) => {
                close(&mut out, &mut in_list);
                if *header != table || !piece.comment.is_empty() {
                    table = header;
                    let _ = writeln!(out, ".Ss {}\\&", escaped(header));
                    prose(&mut out, &piece.comment);
                }
            }
            None if number == 0 => {
                prose(&mut out, &piece.comment);
                out.push_str(".Sh KEYS\n.Ss Top level\n");
            }
            // It goes on with what was said before.
            None if piece.lines.is_empty() => prose(&mut out, &piece.comment),
            None => {
                if !in_list {
                    out.push_str(".Bl -tag -width Ds\n");
                    in_list = true;
                }
                let names = piece
                    .lines
                    .iter()
                    .filter(|line| !line.starts_with([' ', ']']))
                    .filter_map(|line| line.split_once(" ="));
                let names: Vec<String> = names.map(|(name, _)| format!("Cm {}", escaped(name))).collect();
                let _ = writeln!(out, ".It {}", names.join(" , "));
                literal(&mut out, &piece.lines);
                prose(&mut out, &piece.comment);
            }
        }
    }
    close(&mut out, &mut in_list);
    out.push_str(END);
    literal(
        &mut out,
        &minimal
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .collect::<Vec<_>>(),
    );
    out.push_str(LAST);
    out
}

fn close(out: &mut String, in_list: &mut bool) {
    if std::mem::take(in_list) {
        out.push_str(".El\n");
    }
}

fn literal(out: &mut String, lines: &[&str]) {
    out.push_str(".Bd -literal -compact\n");
    for line in lines {
        let _ = writeln!(out, "{}", escaped(line));
    }
    out.push_str(".Ed\n");
}

/// Sentences, each on lines of its own; what is set in is an example, or a word and what it means.
fn prose(out: &mut String, comment: &[&str]) {
    let mut text = String::new();
    let mut lines = comment.iter().peekable();
    while let Some(line) = lines.next() {
        if line.trim().is_empty() {
            sentences(out, &mut text);
            if lines.peek().is_some() {
                out.push_str(".Pp\n");
            }
            continue;
        }
        if !line.starts_with(' ') {
            text.push_str(line);
            text.push(' ');
            continue;
        }
        sentences(out, &mut text);
        let depth = |line: &str| line.len() - line.trim_start().len();
        let goes_on = lines.peek().is_some_and(|next| depth(next) > depth(line) + 4);
        let meaning =
            |text: &str| text.trim_start().starts_with(char::is_lowercase) && !text.trim().contains("  ");
        let parted = line.trim().split_once("  ").filter(|(_, text)| meaning(text));
        match parted.or(goes_on.then_some((line.trim(), ""))) {
            Some((word, meaning)) => {
                let _ = writeln!(out, ".Bl -tag -width Ds -compact\n.It Li {}", escaped(word));
                text.push_str(meaning.trim());
                // Whatever is set in further goes on with the meaning.
                while let Some(more) = lines.next_if(|more| depth(more) > depth(line) + 4) {
                    text.push(' ');
                    text.push_str(more.trim());
                }
                sentences(out, &mut text);
                out.push_str(".El\n");
            }
            None => literal(out, &[line.trim()]),
        }
    }
    sentences(out, &mut text);
}

fn sentences(out: &mut String, text: &mut String) {
    let mut line = String::new();
    let words: Vec<&str> = text.split_whitespace().collect();
    for (at, word) in words.iter().enumerate() {
        let word = escaped(word);
        if line.len() + word.len() > 78 {
            let _ = writeln!(out, "{}", line.trim_end());
            line.clear();
        }
        line.push_str(&word);
        line.push(' ');
        let ends = words[at]
            .trim_end_matches([')', '"'])
            .ends_with(['.', '?', '!', ':']);
        let begins = words.get(at + 1).is_none_or(|next| {
            next.trim_start_matches(['(', '"'])
                .starts_with(char::is_uppercase)
        });
        if ends && begins {
            let _ = writeln!(out, "{}", line.trim_end());
            line.clear();
        }
    }
    if !line.is_empty() {
        let _ = writeln!(out, "{}", line.trim_end());
    }
    text.clear();
}

/// Text that means nothing to roff, neither at the beginning of a line nor as the argument of a macro.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    if text.starts_with(['.', '\'']) {
        out.push_str("\\&");
    }
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\e"),
            '-' => out.push_str("\\-"),
            '~' => out.push_str("\\(ti"),
            '^' => out.push_str("\\(ha"),
            '`' | '\'' => out.push_str("\\(aq"),
            '"' => out.push_str("\\(dq"),
            c if c.is_ascii() => out.push(c),
            c => {
                let _ = write!(out, "\\[u{:04X}]", u32::from(c));
            }
        }
    }
    out
}

#[test]
fn the_manual_page_of_the_configuration_says_what_proxy_toml_says() {
    let made = page(&read("proxy.toml"), &read("minimal.toml"));
    if std::env::var_os("UPDATE_MANUAL").is_some() {
        std::fs::write(conf("man/proxy.toml.5"), &made).expect("writing the page");
    }
    assert!(
        made == read("man/proxy.toml.5"),
        "conf/man/proxy.toml.5 is not what conf/proxy.toml makes: UPDATE_MANUAL=1 cargo test -p culvert-shared manual"
    );
}

#[test]
fn the_manual_page_names_every_key() {
    fn missing(keys: &[Key], page: &str, lacking: &mut Vec<&'static str>) {
        for key in keys {
            let mut words = page.split(|c: char| !c.is_alphanumeric() && c != '_');
            if !words.any(|word| word == key.name) {
                lacking.push(key.name);
            }
            if let Shape::Table(inner) | Shape::Tables(inner) | Shape::Mixed(inner) = key.shape {
                missing(inner, page, lacking);
            }
        }
    }
    let mut lacking = Vec::new();
    missing(ROOT, &read("man/proxy.toml.5"), &mut lacking);
    assert!(
        lacking.is_empty(),
        "conf/man/proxy.toml.5 does not name {lacking:?}"
    );
}

#[test]
fn manual_pages_are_without_fault() {
    let pages = std::fs::read_dir(conf("man")).expect("the manual pages");
    let pages: Vec<PathBuf> = pages.map(|entry| entry.expect("an entry").path()).collect();
    assert!(pages.len() >= 2, "only {pages:?}");
    for page in pages {
        let lint = Command::new("mandoc")
            .args(["-T", "lint"])
            .arg(&page)
            .output()
            .expect("mandoc is needed: apt-get install mandoc");
        let said =
            String::from_utf8_lossy(&lint.stdout).into_owned() + &String::from_utf8_lossy(&lint.stderr);
        // Which other pages there are is the host's business.
        let faults: Vec<&str> = said
            .lines()
            .filter(|line| !line.contains("referenced manual not found") && !line.contains("mandoc.db"))
            .collect();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }
}

#[test]
fn text_becomes_sentences_and_means_nothing_to_roff() {
    let mut out = String::new();
    prose(
        &mut out,
        &[
            "One. Two",
            "three: \\x `y`.",
            "  word   its meaning",
            "          goes on.",
            "  example",
            ".Four",
        ],
    );
    let expected = "One.\nTwo three: \\ex \\(aqy\\(aq.\n.Bl -tag -width Ds -compact\n.It Li word\nits meaning goes on.\n.El\n\
                    .Bd -literal -compact\nexample\n.Ed\n\\&.Four\n";
    assert_eq!(out, expected);
}
