//! What stands outside every block, and `events`.

use super::out::{Level, Section, quoted};
use super::reasons;
use super::tree::Directive;
use super::value::{amount, number, single};

/// nginx's levels of an error log that ours has as well, by the same names.
const LEVELS: [&str; 8] = [
    "debug", "info", "notice", "warn", "error", "crit", "alert", "emerg",
];

/// Carries a directive of the main context over. Blocks that hold servers are not its business.
pub fn main(directive: &Directive, section: &mut Section) {
    let done = match directive.name.as_str() {
        "user" => user(directive, section),
        "worker_processes" => processes(directive, section),
        "worker_cpu_affinity" => affinity(directive, section),
        "worker_shutdown_timeout" => single(directive)
            .and_then(amount)
            .and_then(|time| section.set("worker_shutdown_timeout", &time, &directive.at)),
        "pid" => pid(directive, section),
        "error_log" => error_log(directive, section),
        "daemon" if directive.args == ["on"] => {
            section.say(
                directive,
                Level::Note,
                "it runs in the foreground, under a service manager",
            );
            Ok(())
        }
        "daemon" => Ok(()),
        "events" => {
            for inner in directive.block.iter().flatten() {
                event(inner, section);
            }
            Ok(())
        }
        _ => {
            let (level, reason) = reasons::main(&directive.name);
            section.say(directive, level, reason);
            Ok(())
        }
    };
    if let Err(reason) = done {
        section.say(directive, Level::Lost, &reason);
    }
}

/// Says what counts where nginx's files say nothing, once they have been read.
pub fn defaults(section: &mut Section) {
    let mut other = Vec::new();
    let differing = [
        (
            "worker_processes",
            "worker_processes is one for each CPU (nginx: 1)",
        ),
        (
            "worker_cpu_affinity",
            "worker_cpu_affinity is auto, a CPU for each worker (nginx: none)",
        ),
        (
            "worker_connections",
            "worker_connections is 1024 sessions (nginx: 512 connections)",
        ),
        (
            "worker_shutdown_timeout",
            "worker_shutdown_timeout is 1h (nginx: no limit)",
        ),
        (
            "error_log",
            "error_log is stderr at level info (nginx: a file, error)",
        ),
    ];
    for (key, text) in differing {
        if !section.has(key) {
            other.push(text);
        }
    }
    other.push("proxy_half_close is on (nginx: off)");
    section.comment(&format!(
        "Where nginx's files say nothing, Culvert's defaults count: {}.",
        other.join(", ")
    ));
    if !section.has("user") {
        section.comment("nginx's own default: workers without root's rights.");
        section.set_unasked("user", &quoted("nobody"));
    }
}

fn user(directive: &Directive, section: &mut Section) -> Result<(), String> {
    let (name, group) = match directive.args.as_slice() {
        [name] => (name, name),
        [name, group] => (name, group),
        _ => return Err("it takes a user and a group".to_owned()),
    };
    section.set("user", &quoted(name), &directive.at)?;
    let own = nix::unistd::User::from_name(name)
        .ok()
        .flatten()
        .map(|user| user.gid);
    let wanted = nix::unistd::Group::from_name(group)
        .ok()
        .flatten()
        .map(|group| group.gid);
    match own == wanted {
        true => Ok(()),
        false => Err(format!(
            "of it the group {group}: workers run in the primary group of {name}"
        )),
    }
}

fn processes(directive: &Directive, section: &mut Section) -> Result<(), String> {
    let value = match single(directive)? {
        "auto" => quoted("auto"),
        count => number(count)?.to_string(),
    };
    section.set("worker_processes", &value, &directive.at)
}

fn affinity(directive: &Directive, section: &mut Section) -> Result<(), String> {
    let masks = match directive.args.as_slice() {
        [] => return Err("it names no CPU".to_owned()),
        [auto, masks @ ..] if auto == "auto" => {
            section.set("worker_cpu_affinity", &quoted("auto"), &directive.at)?;
            return match masks {
                [] => Ok(()),
                _ => Err(
                    "of it the mask: \"auto\" takes all CPUs that the program may use, see taskset(1)"
                        .to_owned(),
                ),
            };
        }
        masks => masks,
    };
    let masks: Vec<String> = masks
        .iter()
        // One digit alone would be the number of a CPU.
        .map(|mask| quoted(&format!("{mask:0>2}")))
        .collect();
    section.set(
        "worker_cpu_affinity",
        &format!("[{}]", masks.join(", ")),
        &directive.at,
    )
}

fn pid(directive: &Directive, section: &mut Section) -> Result<(), String> {
    let path = single(directive)?;
    section.set("pid", &quoted(path), &directive.at)?;
    let reason = match path.starts_with('/') {
        true => "nginx must not write there any more when both run side by side",
        false => "a relative path counts from where the program is started, not from nginx's prefix",
    };
    section.say(directive, Level::Note, reason);
    Ok(())
}

fn error_log(directive: &Directive, section: &mut Section) -> Result<(), String> {
    let (path, level) = match directive.args.as_slice() {
        [path] => (path, "error"),
        [path, level] => (path, level.as_str()),
        _ => return Err("it takes a path and a level".to_owned()),
    };
    if path.starts_with("memory:") {
        return Err("a log in memory is not to be had".to_owned());
    }
    if section.has("error_log") {
        return Err("there is one error log".to_owned());
    }
    if !LEVELS.contains(&level) {
        return Err(format!("there is no level {level}"));
    }
    let value = format!("{{ path = {}, level = {} }}", quoted(path), quoted(level));
    section.set("error_log", &value, &directive.at)?;
    if path != "stderr" && !path.starts_with('/') && !path.starts_with("syslog:") {
        let reason = "a relative path counts from where the program is started, not from nginx's prefix";
        section.say(directive, Level::Note, reason);
    }
    Ok(())
}

fn event(directive: &Directive, section: &mut Section) {
    let done = match directive.name.as_str() {
        "worker_connections" => single(directive).and_then(number).and_then(|count| {
            let reason = "a session counts once here, in nginx its two connections do";
            section.say(directive, Level::Idle, reason);
            section.set("worker_connections", &count.to_string(), &directive.at)
        }),
        name => {
            let (level, reason) = reasons::events(name);
            section.say(directive, level, reason);
            Ok(())
        }
    };
    if let Err(reason) = done {
        section.say(directive, Level::Lost, &reason);
    }
}
