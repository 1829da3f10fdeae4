//! nginx's directives: files → a tree, with what they include. Knows what a block is, not what a directive means.

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};

use super::token::{End, Tokens};

/// nginx's own stack would not take more either.
const DEEPEST: usize = 32;

/// All that is read from one file, and from all of them together: a configuration of ten thousand servers is below it.
const LARGEST_BYTES: u64 = 16 << 20;

/// Directives in all files: what files include again and again is bounded, too.
const MOST_DIRECTIVES: usize = 500_000;

/// Blocks that are none of ours: what they include need not be there, nor be understood.
const FOREIGN: [&str; 2] = ["http", "mail"];

/// Where a directive stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    file: Rc<str>,
    line: usize,
    /// Its number among all directives, in the order in which nginx reads them.
    pub order: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A directive.
#[derive(Clone, Debug)]
pub struct Directive {
    /// Where it stands.
    pub at: Place,
    /// Its name.
    pub name: String,
    /// What follows the name.
    pub args: Vec<String>,
    /// The directives in its braces, if it has some.
    pub block: Option<Vec<Directive>>,
    /// Why it is not what was meant: a file that it names cannot be read, or it is not UTF-8.
    pub fault: Option<String>,
}

impl Directive {
    /// As it is written, on one line and not too long.
    pub fn shown(&self) -> String {
        let mut text = self.name.clone();
        for arg in &self.args {
            text.push(' ');
            let plain = !arg.is_empty() && !arg.contains([' ', ';', '{', '}', '"', '\'', '#']);
            match plain {
                true => text.push_str(arg),
                false => text.push_str(&format!("\"{arg}\"")),
            }
        }
        if self.block.is_some() {
            text.push_str(" {…}");
        }
        one_line(&text, 80)
    }
}

/// Text for a comment or a message: no control characters, and at most `longest` of the others.
pub fn one_line(text: &str, longest: usize) -> String {
    let mut line: String = text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if let Some((cut, _)) = line.char_indices().nth(longest) {
        line.truncate(cut);
        line.push('…');
    }
    line
}

/// Reads a file and what it includes.
///
/// # Errors
///
/// The file cannot be read, or nginx would refuse it before it looks at any directive.
pub fn read(path: &Path) -> Result<Vec<Directive>> {
    let bytes = bytes_of(path).with_context(|| format!("failed to read {}", path.display()))?;
    read_text(path, &bytes)
}

/// Reads a text as if it stood in that file.
///
/// # Errors
///
/// As with [`read`].
pub fn read_text(path: &Path, text: &[u8]) -> Result<Vec<Directive>> {
    let mut reader = Reader {
        directory: path.parent().unwrap_or(Path::new("")).to_owned(),
        order: 0,
        bytes: text.len() as u64,
        within: Vec::new(),
    };
    let mut directives = Vec::new();
    reader.file(path, text, &[], &mut directives)?;
    Ok(directives)
}

struct Reader {
    /// Of the first file: what is included counts from there, also in included files (nginx's prefix).
    directory: PathBuf,
    order: usize,
    bytes: u64,
    /// The files that are being read, the first one first.
    within: Vec<PathBuf>,
}

impl Reader {
    fn file(&mut self, path: &Path, text: &[u8], blocks: &[&str], into: &mut Vec<Directive>) -> Result<()> {
        self.within
            .push(path.canonicalize().unwrap_or_else(|_| path.to_owned()));
        let name: Rc<str> = one_line(&path.to_string_lossy(), 4096).into();
        let mut tokens = Tokens::new(text);
        self.block(&name, &mut tokens, (blocks, true), into)?;
        self.within.pop();
        Ok(())
    }

    /// The directives up to the end of a block, or of a file (`whole`).
    fn block(
        &mut self,
        file: &Rc<str>,
        tokens: &mut Tokens,
        (blocks, whole): (&[&str], bool),
        into: &mut Vec<Directive>,
    ) -> Result<()> {
        if blocks.len() > DEEPEST {
            bail!(
                "{file}:{}: more than {DEEPEST} blocks in each other",
                tokens.line()
            );
        }
        loop {
            let statement = match tokens.statement() {
                Ok(statement) => statement,
                Err(fault) => bail!("{file}:{}: {fault}", fault.line),
            };
            match (statement.end, whole) {
                (End::Text, true) | (End::Closes, false) => return Ok(()),
                (End::Text, false) => {
                    bail!(
                        "{file}:{}: unexpected end of file, expecting \"}}\"",
                        statement.line
                    )
                }
                (End::Closes, true) => bail!("{file}:{}: unexpected \"}}\"", statement.line),
                _ => {}
            }
            self.order += 1;
            if self.order > MOST_DIRECTIVES {
                bail!(
                    "{file}:{}: more than {MOST_DIRECTIVES} directives",
                    statement.line
                );
            }
            let mut words = statement.words.into_iter();
            let mut directive = Directive {
                at: Place {
                    file: Rc::clone(file),
                    line: statement.line,
                    order: self.order,
                },
                name: words.next().unwrap_or_default(),
                args: words.collect(),
                block: None,
                fault: (!statement.readable).then(|| "it is not valid UTF-8".to_owned()),
            };
            let foreign = blocks
                .first()
                .is_some_and(|outermost| FOREIGN.contains(outermost));
            if statement.end == End::Opens {
                let mut inner = Vec::new();
                if directive.name.ends_with("_by_lua_block") {
                    let skipped = tokens.skip_code();
                    skipped.map_err(|fault| anyhow::anyhow!("{file}:{}: {fault}", fault.line))?;
                } else {
                    let blocks = [blocks, &[&*directive.name]].concat();
                    self.block(file, tokens, (&blocks, false), &mut inner)?;
                }
                // Nobody looks into foreign blocks.
                directive.block = Some(if foreign { Vec::new() } else { inner });
            } else if directive.name == "include" && !foreign && directive.fault.is_none() {
                directive.fault = self.include(&directive, blocks, into)?;
                if directive.fault.is_none() {
                    continue;
                }
            }
            into.push(directive);
        }
    }

    /// Reads what a directive includes; returns why that cannot be.
    fn include(
        &mut self,
        directive: &Directive,
        blocks: &[&str],
        into: &mut Vec<Directive>,
    ) -> Result<Option<String>> {
        let [pattern] = directive.args.as_slice() else {
            return Ok(Some("it names no file, or several".to_owned()));
        };
        let files = match matching(&self.directory, pattern) {
            Ok(files) => files,
            Err(error) => return Ok(Some(format!("{error:#}"))),
        };
        for path in files {
            let at = &directive.at;
            if self.within.len() > DEEPEST || self.within.contains(&path.canonicalize().unwrap_or_default()) {
                bail!("{at}: {} includes itself", path.display());
            }
            let bytes = match bytes_of(&path) {
                Ok(bytes) => bytes,
                Err(error) => {
                    return Ok(Some(format!("{} cannot be read: {error:#}", path.display())));
                }
            };
            self.bytes += bytes.len() as u64;
            if self.bytes > LARGEST_BYTES {
                bail!("{at}: more than {} MiB of configuration", LARGEST_BYTES >> 20);
            }
            self.file(&path, &bytes, blocks, into)?;
        }
        Ok(None)
    }
}

/// What a file holds. Devices and pipes might never end.
fn bytes_of(path: &Path) -> Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        bail!("not a file");
    }
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    let read = file.take(LARGEST_BYTES + 1).read_to_end(&mut bytes)? as u64;
    if read > LARGEST_BYTES {
        bail!("larger than {} MiB", LARGEST_BYTES >> 20);
    }
    Ok(bytes)
}

/// The files that a pattern names, in the order of glob(3) in the C locale. A pattern may match none, a plain name is one.
fn matching(directory: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    if !pattern.contains(['*', '?', '[']) {
        return Ok(vec![directory.join(pattern)]);
    }
    // To the library ** goes into directories, to glob(3) it is *.
    let mut pattern = pattern.to_owned();
    while pattern.contains("**") {
        pattern = pattern.replace("**", "*");
    }
    if !pattern.starts_with('/') && directory != Path::new("") {
        pattern = format!(
            "{}/{pattern}",
            glob::Pattern::escape(&directory.to_string_lossy())
        );
    }
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let found = glob::glob_with(&pattern, options).context("not a pattern")?;
    let mut files = found.collect::<Result<Vec<PathBuf>, _>>()?;
    files.sort_by(|a, b| {
        a.as_os_str()
            .as_encoded_bytes()
            .cmp(b.as_os_str().as_encoded_bytes())
    });
    Ok(files)
}
