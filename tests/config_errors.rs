//! The configuration seen from outside: what `-t`, `-T` and wrong usage print and how they exit.
//!
//! `data/config/invalid/NAME.toml` is a broken configuration and `NAME.expected` every line that `master -t` must
//! say about it. None of them may depend on the machine: no host names, and no CPU that anybody has.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What one call of the program came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    code: Option<i32>,
    out: String,
    err: String,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn invalid() -> PathBuf {
    repository().join("tests/data/config/invalid")
}

/// Calls the program in a directory, with nothing in the environment that could change a configuration.
fn master(directory: &Path, args: &[&str], environment: &[(&str, &str)]) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_master"))
        .args(args)
        .current_dir(directory)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("starting the program");
    Outcome {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).expect("text on standard output"),
        err: String::from_utf8(output.stderr).expect("text on standard error"),
    }
}

/// The names of the `.toml` files of a directory, in order.
fn toml_files(directory: &Path) -> Vec<String> {
    let entries =
        std::fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let names = entries.map(|entry| {
        entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("a name in UTF-8")
    });
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".toml")).collect();
    names.sort();
    names
}

/// The warnings left out that `-t` gives where the host lacks something: they are not about the file.
fn without_warnings(err: &str) -> String {
    err.lines()
        .filter(|line| !line.starts_with("warning: "))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn each_broken_configuration_gives_exactly_its_errors() {
    let names = toml_files(&invalid());
    assert!(
        names.len() >= 20,
        "only {} broken configurations were found",
        names.len()
    );
    let mut wrong = Vec::new();
    for name in &names {
        let expected = invalid().join(name).with_extension("expected");
        let expected =
            std::fs::read_to_string(&expected).unwrap_or_else(|e| panic!("{}: {e}", expected.display()));
        assert!(!expected.is_empty(), "{name} expects no error");
        let expected = Outcome {
            code: Some(1),
            out: String::new(),
            err: expected,
        };
        let outcome = master(&invalid(), &["-t", "-c", name], &[]);
        if outcome != expected {
            wrong.push(format!(
                "{name}: exit code {:?}\n{}{}\nexpected\n{}",
                outcome.code, outcome.out, outcome.err, expected.err
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} differ:\n\n{}",
        wrong.len(),
        names.len(),
        wrong.join("\n")
    );
}

#[test]
fn no_expectation_stands_without_its_configuration() {
    let names = toml_files(&invalid());
    for entry in std::fs::read_dir(invalid()).expect("the broken configurations") {
        let name = entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("a name in UTF-8");
        if let Some(stem) = name.strip_suffix(".expected") {
            assert!(
                names.contains(&format!("{stem}.toml")),
                "{name} belongs to no configuration"
            );
        }
    }
}

#[test]
fn every_shipped_configuration_is_right() {
    let conf = repository().join("conf");
    let names = toml_files(&conf);
    assert!(
        !names.is_empty(),
        "no configuration was found in {}",
        conf.display()
    );
    for name in names {
        let outcome = master(&conf, &["-t", "-c", &name], &[]);
        let said = without_warnings(&outcome.err);
        assert_eq!(said, format!("configuration file {name} test is successful\n"));
        assert_eq!((outcome.code, outcome.out), (Some(0), String::new()), "{name}");
    }
}

#[test]
fn what_capital_t_prints_is_taken_for_the_same_configuration() {
    let conf = repository().join("conf");
    let scratch = std::env::temp_dir().join(format!("culvert-round-trip-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a directory for the test");
    for name in toml_files(&conf) {
        let first = master(&conf, &["-T", "-q", "-c", &name], &[]);
        assert_eq!(first.code, Some(0), "{name}: {first:?}");
        assert!(first.out.contains("[[server]]"), "{name}: {first:?}");
        std::fs::write(scratch.join(&name), &first.out).expect("writing what was printed");
        let second = master(&scratch, &["-T", "-q", "-c", &name], &[]);
        assert_eq!((second.code, second.out), (Some(0), first.out), "{name}");
    }
    std::fs::remove_dir_all(&scratch).expect("removing the directory");
}

#[test]
fn q_leaves_only_errors() {
    let quiet = master(
        &repository().join("conf"),
        &["-t", "-q", "-c", "minimal.toml"],
        &[],
    );
    assert_eq!(
        (quiet.code, without_warnings(&quiet.err), quiet.out),
        (Some(0), String::new(), String::new())
    );
    let wrong = master(&invalid(), &["-tqc", "weight_zero.toml"], &[]);
    assert_eq!(wrong, master(&invalid(), &["-t", "-c", "weight_zero.toml"], &[]));
}

#[test]
fn overrides_are_in_effect_and_the_command_line_has_the_last_word() {
    let environment = [
        ("CULVERT_WORKER_PROCESSES", "2"),
        ("CULVERT_STREAM__PROXY_TIMEOUT", "5s"),
    ];
    let args = [
        "-T",
        "-q",
        "-c",
        "minimal.toml",
        "--set",
        "worker_processes=3",
        "--set=worker_cpu_affinity=0",
    ];
    let outcome = master(&repository().join("conf"), &args, &environment);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    for line in [
        "worker_processes = 3",
        "worker_cpu_affinity = [\"0-0\", \"0-0\", \"0-0\"]",
        "proxy_timeout = \"5s\"",
    ] {
        assert!(
            outcome.out.lines().any(|printed| printed == line),
            "{line}\nis missing in\n{}",
            outcome.out
        );
    }
}

#[test]
fn a_wrong_override_is_named_as_what_it_is() {
    let environment = [
        ("CULVERT_WORKER_CONECTIONS", "2"),
        ("CULVERT_PORT", "tcp://10.0.0.1:80"),
    ];
    let args = ["-t", "-c", "minimal.toml", "--set", "stream.proxy_timeout=0"];
    let outcome = master(&repository().join("conf"), &args, &environment);
    let expected = "CULVERT_WORKER_CONECTIONS: worker_conections: unknown key, did you mean \"worker_connections\"?\n\
         --set: stream.proxy_timeout: out of range (\"0\"), allowed: 1ms to 365d, written as \"500ms\", \"10s\", \"2m\", \
         \"1h\" or as whole seconds\n";
    assert_eq!(
        outcome,
        Outcome {
            code: Some(1),
            out: String::new(),
            err: expected.to_owned()
        }
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let outcome = master(&invalid(), &["-t", "-c", "absent.toml"], &[]);
    let err = "absent.toml: cannot be read: No such file or directory (os error 2)\n".to_owned();
    assert_eq!(
        outcome,
        Outcome {
            code: Some(1),
            out: String::new(),
            err
        }
    );
}

#[test]
fn what_the_host_lacks_and_the_start_needs_fails_the_check() {
    let minimal = repository().join("conf/minimal.toml");
    let minimal = minimal.to_str().expect("a path in UTF-8");
    let lacking = [
        ("stream.tcp_congestion=vegas2", "tcp_congestion = \"vegas2\""),
        ("error_log.path=/nonexistent/error.log", "/nonexistent/error.log"),
        (
            "stream.access_log=/nonexistent/access.log",
            "/nonexistent/access.log",
        ),
    ];
    for (setting, named) in lacking {
        let outcome = master(&invalid(), &["-t", "-c", minimal, "--set", setting], &[]);
        let err = without_warnings(&outcome.err);
        assert_eq!(outcome.code, Some(1), "{setting}: {err}");
        assert!(
            err.contains("would not start here") && err.contains(named),
            "{setting}: {err}"
        );
        assert!(!err.contains("successful"), "{setting}: {err}");
    }
}

#[test]
fn a_file_that_the_master_may_not_read_fails_the_check_although_root_might_read_it() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let scratch = crate::harness::Scratch::new();
    let file = scratch.file("proxy.toml");
    std::fs::copy(repository().join("conf/minimal.toml"), &file).expect("a copy");
    let nobody = Some(nix::unistd::Uid::from_raw(65534));
    nix::unistd::chown(&file, nobody, None).expect("another owner");
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
    let outcome = master(scratch.path(), &["-t", "-c", "proxy.toml"], &[]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(
        outcome
            .err
            .contains("Permission denied (os error 13); the program does without root's right"),
        "{outcome:?}"
    );
}

#[test]
fn the_exit_code_is_the_same_where_nothing_can_be_printed() {
    let minimal = repository().join("conf/minimal.toml");
    let minimal = minimal.to_str().expect("a path in UTF-8");
    let calls: [(&[&str], i32); 5] = [
        (&["-x"], 2),
        (&["-t", "-c", "absent.toml"], 1),
        (&["-s", "stop", "-c", minimal, "--set", "pid=/nonexistent/pid"], 1),
        (&["--from-nginx", "absent.conf"], 1),
        (&["-h"], 1),
    ];
    for (args, code) in calls {
        let full = || std::fs::File::create("/dev/full").expect("a device that is full");
        let status = Command::new(env!("CARGO_BIN_EXE_master"))
            .args(args)
            .current_dir(invalid())
            .env_clear()
            .stdout(full())
            .stderr(full())
            .status()
            .expect("starting the program");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

#[test]
fn wrong_usage_is_one_line_and_exit_code_2() {
    let calls: [&[&str]; 7] = [
        &["-x"],
        &["-c"],
        &["proxy.toml"],
        &["-s", "hup"],
        &["-t", "-s", "stop"],
        &["--set", "x"],
        &["-q"],
    ];
    for args in calls {
        let outcome = master(&invalid(), args, &[]);
        assert_eq!(
            (outcome.code, outcome.out.as_str()),
            (Some(2), ""),
            "{args:?}: {outcome:?}"
        );
        assert_eq!(outcome.err.matches('\n').count(), 1, "{args:?}: {outcome:?}");
        assert!(outcome.err.ends_with('\n'), "{args:?}: {outcome:?}");
    }
}
