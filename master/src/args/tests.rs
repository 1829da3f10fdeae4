//! What each command line means.

use super::*;

fn parsed(args: &[&str]) -> Result<Args, String> {
    parse(args.iter().map(OsString::from)).map_err(|e| e.to_string())
}

fn action(args: &[&str]) -> Action {
    parsed(args).expect("a valid command line").action
}

fn error(args: &[&str]) -> String {
    let error = parsed(args).expect_err("wrong usage");
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

#[test]
fn no_arguments_run_on_the_default_file() {
    let args = parsed(&[]).expect("valid");
    assert_eq!(
        args,
        Args {
            action: Action::Run,
            config: PathBuf::from("/etc/culvert/proxy.toml"),
            set: vec![]
        }
    );
}

#[test]
fn the_file_may_be_attached_or_apart_and_the_last_one_counts() {
    assert_eq!(
        parsed(&["-c", "a.toml"]).expect("valid").config,
        PathBuf::from("a.toml")
    );
    assert_eq!(
        parsed(&["-ca.toml"]).expect("valid").config,
        PathBuf::from("a.toml")
    );
    assert_eq!(
        parsed(&["-tc", "a", "-cb"]).expect("valid").config,
        PathBuf::from("b")
    );
}

#[test]
fn a_file_name_need_not_be_utf8() {
    let name = OsString::from_vec(vec![b'x', 0xff]);
    let args = parse([OsString::from("-c"), name.clone()]).expect("valid");
    assert_eq!(args.config, PathBuf::from(name));
}

#[test]
fn letters_may_be_joined() {
    assert_eq!(action(&["-t"]), Action::Test { quiet: false });
    assert_eq!(action(&["-tq"]), Action::Test { quiet: true });
    assert_eq!(action(&["-q", "-T"]), Action::Dump { quiet: true });
    assert_eq!(action(&["-tT"]), Action::Dump { quiet: false });
}

#[test]
fn every_signal_has_its_name() {
    for (name, signal) in Signal::ALL {
        assert_eq!(action(&["-s", name]), Action::Signal(signal));
        assert_eq!(signal.name(), name);
    }
}

#[test]
fn a_running_master_names_a_descriptor() {
    assert_eq!(action(&["-c", "a", "--take-over", "7"]), Action::TakeOver(7));
    assert_eq!(action(&["--take-over-check=7"]), Action::TakeOverCheck(7));
    assert!(error(&["--take-over", "x"]).starts_with(r#""x" is not the number of a descriptor"#));
}

#[test]
fn help_and_version_win_over_the_rest() {
    assert_eq!(action(&["-h", "-t"]), Action::Help);
    assert_eq!(action(&["--help"]), Action::Help);
    assert_eq!(action(&["-V", "-s", "stop"]), Action::Version);
    assert_eq!(action(&["--version"]), Action::Version);
}

#[test]
fn overrides_keep_their_order_and_their_equals_signs() {
    let args = parsed(&["--set", "a=1", "--set=b.c=x=y", "--set", "d="]).expect("valid");
    assert_eq!(args.set, ["a=1", "b.c=x=y", "d="]);
}

#[test]
fn wrong_usage_says_what_is_wrong_on_one_line() {
    assert_eq!(
        error(&["-x"]),
        r#"unknown option "-x" (master -h lists the options)"#
    );
    assert_eq!(
        error(&["-tx"]),
        r#"unknown option "-x" (master -h lists the options)"#
    );
    assert_eq!(
        error(&["-té"]),
        r#"unknown option "-é" (master -h lists the options)"#
    );
    assert_eq!(
        error(&["--sets=1"]),
        r#"unknown option "--sets" (master -h lists the options)"#
    );
    assert_eq!(
        error(&["-c"]),
        "-c needs a value: -c FILE (master -h lists the options)"
    );
    assert_eq!(
        error(&["-c", ""]),
        "-c needs a value: -c FILE (master -h lists the options)"
    );
    assert!(error(&["a\nb"]).starts_with(r#"unexpected argument "a\nb": "#));
    assert!(error(&["-"]).starts_with(r#"unexpected argument "-": "#));
    assert!(error(&["-s", "hup"]).starts_with(r#"unknown signal "hup" for -s: allowed are reload, "#));
    assert!(error(&["--set", "x"]).starts_with(r#"--set "x" is not KEY=VALUE"#));
    assert!(error(&["--set", "=x"]).starts_with(r#"--set "=x" is not KEY=VALUE"#));
    assert!(error(&["-s", "stop", "-t"]).starts_with("-s and -t exclude each other"));
    for other in [["-t", "-t"], ["-s", "stop"], ["-c", "a"], ["--set", "a=1"]] {
        let args = ["--from-nginx", "a", other[0], other[1]];
        assert!(error(&args).starts_with("--from-nginx stands alone"), "{args:?}");
    }
    assert!(error(&["-q"]).starts_with("-q goes with -t or -T only"));
    assert!(error(&["--help=1"]).starts_with("--help takes no value"));
}

#[test]
fn the_manual_page_has_every_option() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/man/culvert.8");
    let page = std::fs::read_to_string(&path).expect("the manual page");
    let words = HELP.split(|c: char| c.is_whitespace() || matches!(c, '[' | ']' | ',' | '.' | ':'));
    let options: std::collections::BTreeSet<&str> = words
        .filter(|word| word.starts_with('-') && word.len() > 1)
        .collect();
    assert!(options.len() >= 11, "{options:?}");
    for option in options {
        let flag = match option.strip_prefix("--") {
            Some(long) => format!("Fl Fl {long}"),
            None => format!("Fl {}", &option[1..]),
        };
        let items = page.lines().filter(|line| line.starts_with(".It "));
        assert!(
            items
                .into_iter()
                .any(|line| format!("{line} ").contains(&format!("{flag} "))),
            "{option} has no entry in {}",
            path.display()
        );
    }
    for (name, _) in Signal::ALL {
        assert!(page.contains(&format!("Fl s Cm {name}")), "{name}");
    }
}
