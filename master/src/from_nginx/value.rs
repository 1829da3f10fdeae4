//! Single values: nginx's words → TOML. What a value may be in the end is the configuration's own check to say.

use super::names::Names;
use super::out::quoted;
use super::tree::Directive;

/// Why a directive is not carried over.
#[derive(Debug)]
pub enum Bad {
    /// The rest of its block does without it.
    Line(String),
    /// Without it the block would do something else than in nginx, or let in whom nginx keeps out.
    Block(String),
}

impl From<String> for Bad {
    fn from(reason: String) -> Bad {
        Bad::Line(reason)
    }
}

impl From<&str> for Bad {
    fn from(reason: &str) -> Bad {
        Bad::Line(reason.to_owned())
    }
}

/// The only argument.
pub fn single(directive: &Directive) -> Result<&str, String> {
    match directive.args.as_slice() {
        [arg] => Ok(arg),
        _ => Err("it takes one value".to_owned()),
    }
}

/// `on` and `off`.
pub fn flag(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it takes on or off".to_owned()),
    }
}

/// A whole number.
pub fn number(text: &str) -> Result<u64, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(number) if digits && number <= i64::MAX as u64 => Ok(number),
        _ => Err(format!("\"{text}\" is not a number")),
    }
}

/// A time or a size: both languages write them alike.
pub fn amount(text: &str) -> Result<String, String> {
    match text.bytes().next() {
        Some(byte) if byte.is_ascii_digit() => Ok(quoted(text)),
        _ => Err(format!("\"{text}\" is neither a time nor a size")),
    }
}

/// A piece of text with variables.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Text as it is.
    Text(&'a str),
    /// The name of a variable.
    Variable(&'a str),
}

/// The pieces of a text, as nginx compiles it.
pub fn pieces(text: &str) -> Result<Vec<Piece<'_>>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        if at > 0 {
            pieces.push(Piece::Text(&rest[..at]));
        }
        let behind = &rest[at + 1..];
        let (name, after) = match behind.strip_prefix('{') {
            Some(braced) => braced
                .split_once('}')
                .ok_or("a variable's name lacks its closing brace")?,
            None => behind.split_at(behind.find(|c| !is_name_char(c)).unwrap_or(behind.len())),
        };
        if name.is_empty() || !name.chars().all(is_name_char) {
            return Err("$ stands without a variable's name".to_owned());
        }
        pieces.push(Piece::Variable(name));
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest));
    }
    Ok(pieces)
}

pub fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What a text is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Its value is looked at.
    Value,
    /// Equal values count as one, whatever they look like.
    Key,
}

/// A text with variables in our words. `own` are variables that only its server has.
pub fn template(text: &str, usage: Use, names: &Names, own: &[String]) -> Result<String, String> {
    let mut out = String::new();
    let mut open = false;
    for piece in pieces(text)? {
        match piece {
            Piece::Text(text) => {
                if open && text.starts_with(is_name_char) {
                    return Err(format!(
                        "\"{text}\" follows a variable whose name would go on in it; here a name ends at what is no letter, digit or _"
                    ));
                }
                out.push_str(text);
                open = false;
            }
            // All that is carried over is TCP.
            Piece::Variable("protocol") => {
                if open {
                    return Err("$protocol stands right behind another variable".to_owned());
                }
                out.push_str("TCP");
                open = false;
            }
            Piece::Variable(name) => {
                let name = match (name, usage) {
                    // The same address in four bytes.
                    ("binary_remote_addr", Use::Key) => "remote_addr",
                    _ => name,
                };
                if !own.iter().any(|own| own == name) {
                    names.check_variable(name)?;
                }
                out.push('$');
                out.push_str(name);
                open = true;
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_found_with_and_without_braces() {
        use Piece::{Text, Variable};
        assert_eq!(
            pieces("a$b-${c}d").unwrap(),
            [Text("a"), Variable("b"), Text("-"), Variable("c"), Text("d")]
        );
        assert_eq!(pieces("").unwrap(), []);
        for wrong in ["$", "a$-", "${a", "${}", "${a-b}"] {
            assert!(pieces(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_text_keeps_its_meaning_or_is_refused() {
        let names = Names::default();
        let own = ["mine".to_owned()];
        let value = |text| template(text, Use::Value, &names, &own);
        assert_eq!(
            value("to-$remote_addr:${server_port}").unwrap(),
            "to-$remote_addr:$server_port"
        );
        assert_eq!(value("$mine").unwrap(), "$mine");
        assert_eq!(value("$protocol-a").unwrap(), "TCP-a");
        assert!(value("${mine}x").unwrap_err().contains("follows a variable"));
        assert!(
            value("$binary_remote_addr")
                .unwrap_err()
                .contains("$binary_remote_addr")
        );
        assert_eq!(
            template("$binary_remote_addr", Use::Key, &names, &own).unwrap(),
            "$remote_addr"
        );
    }
}
