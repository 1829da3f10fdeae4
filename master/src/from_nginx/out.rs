//! What is printed: TOML in sections, each line with the place in nginx's files that it comes from, and remarks beside the
//! lines. Decides nothing about either language.

use std::collections::BTreeSet;

use culvert_shared::config;

use super::tree::{Directive, Place, one_line};

/// What becomes of a directive that is not simply carried over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Part of what the file says is missing from what is printed.
    Lost,
    /// It is carried over, and yet something to know about.
    Note,
    /// It has no counterpart and needs none: said beside the place only.
    Idle,
}

/// Something to say about a directive.
#[derive(Clone, Debug)]
pub struct Remark {
    /// Where the directive stands.
    pub at: Place,
    /// How much it matters.
    pub level: Level,
    /// The directive and the reason.
    text: String,
}

impl Remark {
    /// About a directive.
    pub fn new(directive: &Directive, level: Level, reason: &str) -> Remark {
        let verdict = match level {
            Level::Lost => "not carried over: ",
            Level::Note | Level::Idle => "",
        };
        Remark {
            at: directive.at.clone(),
            level,
            text: format!("{}: {verdict}{}", directive.shown(), one_line(reason, 600)),
        }
    }

    /// The whole line: place, directive, reason.
    pub fn line(&self) -> String {
        format!("{}: {}", self.at, self.text)
    }
}

#[derive(Clone, Debug)]
enum Item {
    /// A line of TOML, and where it comes from.
    Line(String, Option<Place>),
    Comment(String),
    Remark(Remark),
}

/// A table of the file, or what stands before the first.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// As in `[stream]`; empty for what stands before the first table.
    header: String,
    /// The path of its keys for [`config::knows_key`], as in `upstream`.
    path: &'static str,
    items: Vec<Item>,
    keys: BTreeSet<String>,
    at: Option<Place>,
    left_out: bool,
}

impl Section {
    /// A section with this header, for keys below `path`.
    pub fn new(header: &str, path: &'static str, at: Option<&Place>) -> Section {
        Section {
            header: header.to_owned(),
            path,
            at: at.cloned(),
            ..Section::default()
        }
    }

    /// Says something about a directive here.
    pub fn say(&mut self, directive: &Directive, level: Level, reason: &str) {
        self.items
            .push(Item::Remark(Remark::new(directive, level, reason)));
    }

    /// A comment that no directive is to blame for.
    pub fn comment(&mut self, text: &str) {
        self.items.push(Item::Comment(one_line(text, 4096)));
    }

    /// Keeps all of it from being in effect: it is printed as a comment.
    pub fn leave_out(&mut self) {
        self.left_out = true;
    }

    /// Whether it is kept from being in effect.
    pub fn is_left_out(&self) -> bool {
        self.left_out
    }

    /// Sets a key to a value that is TOML already.
    ///
    /// # Errors
    /// It has been set before, or this version does not have it.
    pub fn set(&mut self, key: &str, value: &str, at: &Place) -> Result<(), String> {
        self.claim(key)?;
        self.items
            .push(Item::Line(format!("{key} = {value}"), Some(at.clone())));
        Ok(())
    }

    /// Whether a key has been set.
    pub fn has(&self, key: &str) -> bool {
        self.keys.contains(key)
    }

    /// Sets a key that no directive asks for.
    pub fn set_unasked(&mut self, key: &str, value: &str) {
        self.items.push(Item::Line(format!("{key} = {value}"), None));
    }

    /// Begins a list with an entry on each line; the entries follow, then [`Section::end_list`].
    ///
    /// # Errors
    /// As with [`Section::set`].
    pub fn begin_list(&mut self, key: &str, at: &Place) -> Result<(), String> {
        self.claim(key)?;
        self.items
            .push(Item::Line(format!("{key} = ["), Some(at.clone())));
        Ok(())
    }

    /// An entry of a list.
    pub fn entry(&mut self, value: &str, at: &Place) {
        self.items
            .push(Item::Line(format!("  {value},"), Some(at.clone())));
    }

    /// Ends a list.
    pub fn end_list(&mut self) {
        self.items.push(Item::Line("]".to_owned(), None));
    }

    /// A list on one line if it has one entry, else on several; nothing if it has none.
    ///
    /// # Errors
    /// As with [`Section::set`].
    pub fn set_list(&mut self, key: &str, entries: &[(String, Place)]) -> Result<(), String> {
        match entries {
            [] => Ok(()),
            [(entry, at)] => self.set(key, &format!("[{entry}]"), at),
            [(_, at), ..] => {
                self.begin_list(key, at)?;
                entries.iter().for_each(|(entry, at)| self.entry(entry, at));
                self.end_list();
                Ok(())
            }
        }
    }

    fn claim(&mut self, key: &str) -> Result<(), String> {
        self.known(key)?;
        match self.keys.insert(key.to_owned()) {
            true => Ok(()),
            false => Err(format!("{key} has been set already")),
        }
    }

    /// Whether this version has a key here, such as `listen.rcvbuf`.
    ///
    /// # Errors
    /// It has not.
    pub fn known(&self, key: &str) -> Result<(), String> {
        let path = match self.path {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        };
        match config::knows_key(&path) {
            true => Ok(()),
            false => Err(format!("this version has no key {path}")),
        }
    }
}

/// A text, and where each of its lines comes from.
#[derive(Debug)]
pub struct Page {
    /// TOML.
    pub text: String,
    /// The section and the item of each line; none for a section's header.
    lines: Vec<Option<(usize, Option<usize>)>>,
}

/// Everything that is printed.
#[derive(Debug, Default)]
pub struct Document {
    /// In the order in which they are printed; what stands before the first table is the first.
    pub sections: Vec<Section>,
}

impl Document {
    /// Writes it out.
    pub fn page(&self) -> Page {
        let mut page = Page {
            text: String::new(),
            lines: Vec::new(),
        };
        for (number, section) in self.sections.iter().enumerate() {
            if number > 0 {
                page.push("", None);
            }
            let off = if section.left_out { "# " } else { "" };
            if section.left_out {
                page.push("# Left out, for the reason below:", None);
            }
            if !section.header.is_empty() {
                page.push(&format!("{off}{}", section.header), Some((number, None)));
            }
            for (item, what) in section.items.iter().enumerate() {
                let place = Some((number, Some(item)));
                match what {
                    Item::Line(text, _) => page.push(&format!("{off}{text}"), place),
                    Item::Comment(text) => page.push(&format!("# {text}"), place),
                    Item::Remark(remark) => page.push(&format!("# {}", remark.line()), place),
                }
            }
        }
        page
    }

    /// Puts a remark above a line of a page, which is the last that was written. False: no directive is known to have
    /// made this line.
    pub fn blame(&mut self, page: &Page, line: usize, reason: &str) -> bool {
        let Some((section, item, text, at)) = self.find(page, line) else {
            return false;
        };
        let at = at.clone();
        let text = format!(
            "not carried over as it should be: {} ({})",
            one_line(reason, 600),
            one_line(text.trim().trim_end_matches(','), 80)
        );
        let remark = Remark {
            at,
            level: Level::Lost,
            text,
        };
        self.sections[section].items.insert(item, Item::Remark(remark));
        true
    }

    /// Where a line of a page comes from, as long as no remark has been put above it.
    pub fn place(&self, page: &Page, line: usize) -> Option<&Place> {
        self.find(page, line).map(|(.., at)| at)
    }

    /// The section and the item of a line of a page, its text and where it comes from.
    fn find(&self, page: &Page, line: usize) -> Option<(usize, usize, &str, &Place)> {
        let (number, item) = (*page.lines.get(line.checked_sub(1)?)?)?;
        let section = &self.sections[number];
        let (text, at) = match item.map(|item| &section.items[item]) {
            Some(Item::Line(text, at)) => (text, at.as_ref()),
            Some(_) => return None,
            None => (&section.header, None),
        };
        Some((number, item.unwrap_or(0), text, at.or(section.at.as_ref())?))
    }

    /// Every remark, in the order of nginx's files.
    pub fn remarks(&self) -> Vec<&Remark> {
        let items = self.sections.iter().flat_map(|section| &section.items);
        let mut remarks: Vec<&Remark> = items
            .filter_map(|item| match item {
                Item::Remark(remark) => Some(remark),
                _ => None,
            })
            .collect();
        remarks.sort_by_key(|remark| remark.at.order);
        remarks
    }
}

impl Page {
    fn push(&mut self, line: &str, place: Option<(usize, Option<usize>)>) {
        self.text.push_str(line);
        self.text.push('\n');
        self.lines.push(place);
    }
}

/// An inline table in the making. As in nginx, the last one of what is given twice counts.
#[derive(Debug, Default)]
pub struct Table(Vec<(String, String)>);

impl Table {
    /// A key and its value, in TOML.
    pub fn put(&mut self, name: &str, value: String) {
        self.0.retain(|(known, _)| known != name);
        self.0.push((name.to_owned(), value));
    }

    /// How many keys it has.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The table in TOML.
    pub fn text(&self) -> String {
        if self.0.is_empty() {
            return "{}".to_owned();
        }
        let pairs: Vec<String> = self
            .0
            .iter()
            .map(|(name, value)| format!("{name} = {value}"))
            .collect();
        format!("{{ {} }}", pairs.join(", "))
    }
}

/// A string of TOML that a configuration takes as it is: nothing in it names an environment variable.
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.replace("${", "$${").chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
