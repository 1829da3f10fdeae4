//! `${VAR}` and `${VAR:-default}` in the strings of a file. Takes the variables from its caller.

use std::ffi::OsString;

use super::diagnostic::Fault;

/// What became of a string.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Expanded {
    pub text: String,
    /// The variables that it named, set or not; empty when nothing was replaced.
    pub variables: Vec<String>,
}

/// Replaces the variables of a string. As in a shell, `:-` takes the default for an empty variable as well,
/// and what comes from a variable is not looked at again. `$${` stands for `${`.
pub(super) fn expand(text: &str, variable: impl Fn(&str) -> Option<OsString>) -> Result<Expanded, Fault> {
    let mut out = String::with_capacity(text.len());
    let mut variables = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$${") {
            out.push_str("${");
            rest = after;
        } else if let Some(after) = rest.strip_prefix("${") {
            let Some((inner, after)) = after.split_once('}') else {
                return Err(Fault::new(
                    "${ without }",
                    "write ${VAR} or ${VAR:-default}, and $${ for the characters ${",
                ));
            };
            let (name, default) = match inner.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (inner, None),
            };
            out.push_str(&value_of(name, default, &variable)?);
            variables.push(name.to_owned());
            rest = after;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    Ok(Expanded { text: out, variables })
}

fn value_of(
    name: &str,
    default: Option<&str>,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<String, Fault> {
    let head = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !head || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(Fault::new(
            format!("${{{name}}} names no environment variable"),
            "a name has letters, digits and _, and is followed by } or :-",
        ));
    }
    if default.is_some_and(|default| default.contains("${")) {
        return Err(Fault::new(
            format!("the default of ${{{name}}} holds another variable"),
            "write a plain default",
        ));
    }
    match (variable(name), default) {
        (None, None) => Err(Fault::new(
            format!("environment variable {name} is not set"),
            format!("set it, or give a default: ${{{name}:-default}}"),
        )),
        (None, Some(default)) => Ok(default.to_owned()),
        (Some(value), Some(default)) if value.is_empty() => Ok(default.to_owned()),
        (Some(value), _) => value.into_string().map_err(|_| {
            Fault::new(
                format!("environment variable {name} is not valid UTF-8"),
                "set it to text",
            )
        }),
    }
}

/// Writes text so that [`expand`] gives it back.
pub(super) fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expanded(text: &str) -> Result<String, String> {
        let variable = |name: &str| match name {
            "HOST" => Some("db".into()),
            "EMPTY" => Some("".into()),
            "DOLLAR" => Some("${HOST}".into()),
            _ => None,
        };
        expand(text, variable)
            .map(|done| done.text)
            .map_err(|fault| fault.what)
    }

    #[test]
    fn variables_and_defaults_are_put_in() {
        assert_eq!(expanded("${HOST}:80"), Ok("db:80".into()));
        assert_eq!(expanded("a${HOST}b${HOST}"), Ok("adbbdb".into()));
        assert_eq!(expanded("${NONE:-x:-y}"), Ok("x:-y".into()));
        assert_eq!(expanded("${EMPTY:-x}${EMPTY}"), Ok("x".into()));
        assert_eq!(expanded("${NONE:-}"), Ok("".into()));
    }

    #[test]
    fn session_variables_and_escapes_are_left_alone() {
        assert_eq!(expanded("$remote_addr"), Ok("$remote_addr".into()));
        assert_eq!(expanded("$${HOST}"), Ok("${HOST}".into()));
        assert_eq!(expanded("${DOLLAR}"), Ok("${HOST}".into()));
        assert_eq!(expanded("cost$"), Ok("cost$".into()));
    }

    #[test]
    fn what_cannot_be_put_in_is_an_error() {
        assert_eq!(
            expanded("${NONE}"),
            Err("environment variable NONE is not set".into())
        );
        assert_eq!(expanded("${HOST"), Err("${ without }".into()));
        assert_eq!(expanded("${}"), Err("${} names no environment variable".into()));
        assert_eq!(
            expanded("${1A}"),
            Err("${1A} names no environment variable".into())
        );
        assert_eq!(
            expanded("${A-b}"),
            Err("${A-b} names no environment variable".into())
        );
        assert_eq!(
            expanded("${A:-${B}}"),
            Err("the default of ${A} holds another variable".into())
        );
    }

    proptest! {
        #[test]
        fn escaped_text_comes_back_unchanged(text in "[a${}:-]{0,12}|\\PC{0,20}") {
            prop_assert_eq!(expand(&escape(&text), |_| None).map(|done| done.text), Ok(text));
        }
    }
}
