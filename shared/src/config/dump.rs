//! The other way: a [`Config`] → TOML that [`super::load`] takes for an equal one. Decides nothing.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::template::{is_name_char, variable_name};
use super::units::{write_duration, write_size};
use super::{
    Action, Config, FlowSteering, LogTarget, OnReload, Part, Peer, Server, Stream, Target, Template,
};
use super::{balance, cpus, expand, health};

/// The configuration in effect as TOML, every value written out: `[stream]` is spread over the servers, host names
/// of upstreams are resolved, `${VAR}`, `set` and `include` are replaced by what they stand for.
pub fn dump(config: &Config) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, config);
    out
}

fn write(out: &mut String, config: &Config) -> std::fmt::Result {
    if let Some(user) = &config.user {
        writeln!(out, "user = {}", quoted(&user.name))?;
    }
    let cpus: Vec<String> = config
        .worker_cpus
        .iter()
        .map(|cpus| quoted(&cpus::write_list(cpus)))
        .collect();
    writeln!(out, "worker_processes = {}", cpus.len())?;
    writeln!(out, "worker_cpu_affinity = [{}]", cpus.join(", "))?;
    writeln!(out, "worker_connections = {}", config.worker_connections)?;
    writeln!(
        out,
        "worker_backlog_size = {}",
        quoted(&write_size(config.worker_backlog_size.unwrap_or(0) as usize))
    )?;
    let shutdown = config.worker_shutdown_timeout.unwrap_or(Duration::ZERO);
    writeln!(
        out,
        "worker_shutdown_timeout = {}",
        quoted(&write_duration(shutdown))
    )?;
    let steering = match config.flow_steering {
        FlowSteering::Off => "off",
        FlowSteering::Rfs => "rfs",
    };
    writeln!(out, "flow_steering = {}", quoted(steering))?;
    writeln!(out, "pid = {}", path(&config.pid))?;
    let target = match &config.error_log.target {
        LogTarget::Stderr => quoted("stderr"),
        LogTarget::File(file) => path(file),
    };
    let level = config.error_log.level.as_str().to_ascii_lowercase();
    writeln!(
        out,
        "error_log = {{ path = {target}, level = {} }}",
        quoted(&level)
    )?;
    writeln!(out, "\n[stream]")?;
    write_stream(out, &config.stream)?;
    for upstream in config
        .upstreams
        .iter()
        .filter(|upstream| !is_address(&upstream.name))
    {
        writeln!(out, "\n[[upstream]]\nname = {}", quoted(&upstream.name))?;
        writeln!(
            out,
            "balance = {}\nserver = [",
            quoted(&balance::write(&upstream.balance))
        )?;
        upstream.peers.iter().try_for_each(|peer| write_peer(out, peer))?;
        writeln!(out, "]")?;
        if let Some(check) = &upstream.check {
            writeln!(out, "check = {}", health::write(check, quoted))?;
        }
        if let Some(queue) = &upstream.queue {
            let timeout = quoted(&write_duration(queue.timeout));
            writeln!(out, "queue = {{ size = {}, timeout = {timeout} }}", queue.size)?;
        }
    }
    config
        .servers
        .iter()
        .try_for_each(|server| write_server(out, config, server))
}

fn write_peer(out: &mut String, peer: &Peer) -> std::fmt::Result {
    let Peer {
        weight,
        backup,
        down,
        max_conns,
        max_fails,
        ..
    } = peer;
    let address = quoted(&expand::escape(&peer.address.to_string()));
    let fail_timeout = quoted(&write_duration(peer.fail_timeout));
    write!(
        out,
        "  {{ address = {address}, weight = {weight}, backup = {backup}, down = {down}, max_conns = {max_conns}, \
         max_fails = {max_fails}, fail_timeout = {fail_timeout}"
    )?;
    // Not every way of balancing knows it.
    if !peer.slow_start.is_zero() {
        write!(out, ", slow_start = {}", quoted(&write_duration(peer.slow_start)))?;
    }
    writeln!(out, " }},")
}

fn write_server(out: &mut String, config: &Config, server: &Server) -> std::fmt::Result {
    writeln!(out, "\n[[server]]\nlisten = [")?;
    for listen in &server.listen {
        writeln!(
            out,
            "  {{ address = {}, backlog = {} }},",
            quoted(&listen.address.to_string()),
            listen.backlog
        )?;
    }
    writeln!(out, "]")?;
    match &server.action {
        Action::Status => writeln!(out, "ebpf_status_return = true")?,
        Action::Proxy(Target::Upstream(index)) => {
            let name = config
                .upstreams
                .get(*index)
                .map_or("", |upstream| upstream.name.as_str());
            writeln!(out, "proxy_pass = {}", quoted(&expand::escape(name)))?;
        }
        Action::Proxy(Target::Variable(template)) => write_template(out, template)?,
    }
    write_stream(out, &server.stream)
}

fn write_stream(out: &mut String, stream: &Stream) -> std::fmt::Result {
    writeln!(out, "ebpf_enable = {}", stream.ebpf_enable)?;
    writeln!(
        out,
        "proxy_timeout = {}",
        quoted(&write_duration(stream.proxy_timeout))
    )?;
    writeln!(
        out,
        "proxy_connect_timeout = {}",
        quoted(&write_duration(stream.proxy_connect_timeout))
    )?;
    writeln!(out, "proxy_next_upstream = {}", stream.proxy_next_upstream)?;
    writeln!(
        out,
        "proxy_next_upstream_tries = {}",
        stream.proxy_next_upstream_tries
    )?;
    writeln!(
        out,
        "proxy_next_upstream_timeout = {}",
        quoted(&write_duration(stream.proxy_next_upstream_timeout))
    )?;
    writeln!(
        out,
        "proxy_buffer_size = {}",
        quoted(&write_size(stream.proxy_buffer_size))
    )?;
    writeln!(out, "proxy_half_close = {}", stream.proxy_half_close)?;
    writeln!(out, "tcp_nodelay = {}", stream.tcp_nodelay)?;
    writeln!(
        out,
        "ebpf_timer_period = {}",
        quoted(&write_duration(stream.ebpf_timer_period))
    )?;
    writeln!(
        out,
        "ebpf_backlog_size = {}",
        quoted(&write_size(stream.ebpf_backlog_size as usize))
    )?;
    let on_reload = OnReload::ALL.iter().find(|(_, what)| *what == stream.on_reload);
    writeln!(
        out,
        "on_reload = {}",
        quoted(on_reload.map_or("", |(name, _)| name))
    )
}

/// A literal that would lengthen the name of the variable before it goes into a variable of its own.
fn write_template(out: &mut String, template: &Template) -> std::fmt::Result {
    let mut text = String::new();
    let mut set = Vec::new();
    let mut after_variable = false;
    for part in &template.0 {
        match part {
            Part::Literal(literal) if after_variable && literal.starts_with(is_name_char) => {
                set.push(format!(
                    "text_{} = {}",
                    set.len(),
                    quoted(&expand::escape(literal))
                ));
                let _ = write!(text, "$text_{}", set.len() - 1);
            }
            Part::Literal(literal) => text.push_str(&expand::escape(literal)),
            Part::Variable(variable) => {
                let _ = write!(text, "${}", variable_name(*variable));
            }
        }
        after_variable = matches!(part, Part::Variable(_));
    }
    if !set.is_empty() {
        writeln!(out, "set = {{ {} }}", set.join(", "))?;
    }
    writeln!(out, "proxy_pass = {}", quoted(&text))
}

/// The name of an unnamed upstream is its address, and an upstream's own name holds no colon.
fn is_address(name: &str) -> bool {
    name.contains(':')
}

fn path(path: &Path) -> String {
    quoted(&expand::escape(&path.to_string_lossy()))
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
