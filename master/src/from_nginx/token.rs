//! nginx's words: text → statements, with quotes, escapes and comments as `ngx_conf_read_token` takes them (nginx 1.22).
//! Knows no directive.

use std::fmt;

/// What ends a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `;`
    Semicolon,
    /// `{`: the statements of a block follow.
    Opens,
    /// `}`, without a word before it.
    Closes,
    /// The text's end, without a word before it.
    Text,
}

/// Words up to what ends them.
#[derive(Debug, PartialEq, Eq)]
pub struct Statement {
    /// The words, unquoted; what is not UTF-8 is replaced.
    pub words: Vec<String>,
    /// All words were UTF-8.
    pub readable: bool,
    /// What ended them.
    pub end: End,
    /// The line of the first word, or of the end where there is none.
    pub line: usize,
}

/// Why a text is none that nginx would take.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub line: usize,
    /// What is wrong, in nginx's words where it has some.
    pub text: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Reads statements from a text.
#[derive(Debug)]
pub struct Tokens<'a> {
    rest: &'a [u8],
    line: usize,
}

impl<'a> Tokens<'a> {
    /// From the text's beginning.
    pub fn new(text: &'a [u8]) -> Tokens<'a> {
        Tokens { rest: text, line: 1 }
    }

    /// The line that is being read.
    pub fn line(&self) -> usize {
        self.line
    }

    fn next(&mut self) -> Option<u8> {
        let (&byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        self.line += usize::from(byte == b'\n');
        Some(byte)
    }

    fn fault(&self, text: impl Into<String>) -> Fault {
        Fault {
            line: self.line,
            text: text.into(),
        }
    }

    /// The next statement.
    ///
    /// # Errors
    /// The text ends within a statement, or something stands where it must not.
    pub fn statement(&mut self) -> Result<Statement, Fault> {
        let mut statement = Statement {
            words: Vec::new(),
            readable: true,
            end: End::Text,
            line: self.line,
        };
        loop {
            let Some(&first) = self.rest.first() else {
                return match statement.words.is_empty() {
                    true => Ok(self.ended(statement, End::Text)),
                    false => Err(self.fault("unexpected end of file, expecting \";\" or \"{\"")),
                };
            };
            let none = statement.words.is_empty();
            match first {
                _ if is_space(first) => drop(self.next()),
                b'#' => while self.next().is_some_and(|byte| byte != b'\n') {},
                b';' | b'{' if none => return Err(self.fault(format!("unexpected \"{}\"", first as char))),
                b'}' if !none => return Err(self.fault("unexpected \"}\"")),
                b';' | b'{' | b'}' => {
                    let line = statement.line;
                    self.next();
                    let end = match first {
                        b';' => End::Semicolon,
                        b'{' => End::Opens,
                        _ => End::Closes,
                    };
                    let mut statement = self.ended(statement, end);
                    if !none {
                        statement.line = line;
                    }
                    return Ok(statement);
                }
                _ => {
                    if none {
                        statement.line = self.line;
                    }
                    let word = self.word(first)?;
                    statement.readable &= std::str::from_utf8(&word).is_ok();
                    statement.words.push(String::from_utf8_lossy(&word).into_owned());
                }
            }
        }
    }

    fn ended(&self, statement: Statement, end: End) -> Statement {
        Statement {
            end,
            line: self.line,
            ..statement
        }
    }

    /// A word, from its first byte on, which is no space.
    fn word(&mut self, first: u8) -> Result<Vec<u8>, Fault> {
        let quote = matches!(first, b'"' | b'\'').then_some(first);
        if quote.is_some() {
            self.next();
        }
        let mut word = Vec::new();
        // `{` belongs to the word behind `$`, as in ${name}.
        let mut dollar = false;
        loop {
            let Some(&byte) = self.rest.first() else {
                return Err(self.fault("unexpected end of file, expecting \";\" or \"}\""));
            };
            match (byte, quote) {
                (b'\\', _) => {
                    self.next();
                    self.escaped(&mut word);
                }
                (_, Some(quote)) if byte == quote => {
                    self.next();
                    break;
                }
                (b';', None) => break,
                (b'{', None) if !dollar => break,
                (_, None) if is_space(byte) => break,
                _ => {
                    self.next();
                    word.push(byte);
                }
            }
            dollar = byte == b'$' || (dollar && byte == b'{');
        }
        match self.rest.first() {
            Some(&byte) if quote.is_some() && !is_space(byte) && !matches!(byte, b';' | b'{' | b')') => {
                Err(self.fault(format!("unexpected \"{}\"", byte.escape_ascii())))
            }
            _ => Ok(word),
        }
    }

    /// What follows a backslash. Before anything that it means nothing to, it stays.
    fn escaped(&mut self, word: &mut Vec<u8>) {
        match self.next() {
            Some(byte @ (b'"' | b'\'' | b'\\')) => word.push(byte),
            Some(b't') => word.push(b'\t'),
            Some(b'r') => word.push(b'\r'),
            Some(b'n') => word.push(b'\n'),
            Some(byte) => word.extend([b'\\', byte]),
            None => word.push(b'\\'),
        }
    }

    /// Passes over a block of another language, whose `{` has been read.
    ///
    /// # Errors
    /// The text ends within it.
    pub fn skip_code(&mut self) -> Result<(), Fault> {
        let mut depth = 1usize;
        while depth > 0 {
            match self.next() {
                Some(b'{') => depth += 1,
                Some(b'}') => depth -= 1,
                Some(_) => {}
                None => return Err(self.fault("unexpected end of file, expecting \"}\"")),
            }
        }
        Ok(())
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        let statement = Tokens::new(text.as_bytes()).statement().expect(text);
        assert_ne!(statement.end, End::Text, "{text}");
        statement.words
    }

    fn fault(text: &str) -> (usize, String) {
        let mut tokens = Tokens::new(text.as_bytes());
        loop {
            match tokens.statement() {
                Ok(statement) => assert_ne!(statement.end, End::Text, "{text:?} is taken"),
                Err(fault) => return (fault.line, fault.text),
            }
        }
    }

    #[test]
    fn words_are_parted_by_space_and_may_be_quoted() {
        assert_eq!(words("listen\t80 ;"), ["listen", "80"]);
        assert_eq!(words("a 'b c' \"d;{}#\" '' ;"), ["a", "b c", "d;{}#", ""]);
        assert_eq!(words("a \"it's\" b'c\"d;"), ["a", "it's", "b'c\"d"]);
        assert_eq!(words("# one\n  # two\n a#b # three\n;"), ["a#b"]);
        assert_eq!(words("a\r\n\tb\r\n{"), ["a", "b"]);
    }

    #[test]
    fn escapes_are_nginxs() {
        assert_eq!(
            words(r#"a \"b\" "c\"d" '\'' \\ ;"#),
            ["a", "\"b\"", "c\"d", "'", "\\"]
        );
        assert_eq!(
            words(r"~^a\.b\d$ c\ d \t\n\r \default;"),
            ["~^a\\.b\\d$", "c\\ d", "\t\n\r", "\\default"]
        );
    }

    #[test]
    fn a_brace_behind_a_dollar_belongs_to_the_word() {
        assert_eq!(words("pass ${name}:80;"), ["pass", "${name}:80"]);
        assert_eq!(words("pass a$b{"), ["pass", "a$b"]);
        assert_eq!(words("pass a}b;"), ["pass", "a}b"]);
    }

    #[test]
    fn statements_know_their_line_and_their_end() {
        let mut tokens = Tokens::new(b"a;\n\n b\n c {\n}\n");
        let mut seen = Vec::new();
        loop {
            let statement = tokens.statement().unwrap();
            seen.push((statement.words.len(), statement.end, statement.line));
            if statement.end == End::Text {
                break;
            }
        }
        let expected = [
            (1, End::Semicolon, 1),
            (2, End::Opens, 3),
            (0, End::Closes, 5),
            (0, End::Text, 6),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_nginx_refuses_is_refused_with_its_line() {
        assert_eq!(
            fault("a\n\n"),
            (3, "unexpected end of file, expecting \";\" or \"{\"".into())
        );
        assert_eq!(
            fault("a 'b\n;"),
            (2, "unexpected end of file, expecting \";\" or \"}\"".into())
        );
        assert_eq!(fault(";"), (1, "unexpected \";\"".into()));
        assert_eq!(fault("{"), (1, "unexpected \"{\"".into()));
        assert_eq!(fault("a;\nb }"), (2, "unexpected \"}\"".into()));
        assert_eq!(fault("a 'b'c;"), (1, "unexpected \"c\"".into()));
        assert_eq!(
            fault("a\\"),
            (1, "unexpected end of file, expecting \";\" or \"}\"".into())
        );
    }

    #[test]
    fn what_is_not_utf8_is_said_to_be_so() {
        let statement = Tokens::new(b"a \xff;").statement().unwrap();
        assert!(!statement.readable);
        assert!(Tokens::new(b"# \xff\na b;").statement().unwrap().readable);
    }
}
