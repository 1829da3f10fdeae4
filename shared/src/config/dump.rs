//! The other way: a [`Config`] → TOML that [`super::load()`] takes for an equal one. Decides nothing.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::template::{is_name_char, name_of};
use super::units::{write_duration, write_size};
use super::{
    Action, Config, FlowSteering, LogTarget, OnReload, Part, Peer, ProxyProtocol, Server, Stream, Target,
    Template,
};
use super::{access_log, balance, cpus, expand, health, listen, log_format};

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
        LogTarget::Syslog(syslog) => quoted(&expand::escape(&syslog.text())),
    };
    let level = config.error_log.level.as_str().to_ascii_lowercase();
    writeln!(
        out,
        "error_log = {{ path = {target}, level = {} }}",
        quoted(&level)
    )?;
    for http in config
        .servers
        .iter()
        .filter(|server| server.action == Action::Http)
    {
        writeln!(out, "\n[http]")?;
        write_listen(out, http)?;
    }
    writeln!(out, "\n[stream]")?;
    write_stream(out, config, &config.stream)?;
    write_maps(out, config)?;
    write_zones(out, config)?;
    write_log_formats(out, config)?;
    for upstream in config
        .upstreams
        .iter()
        .filter(|upstream| !is_address(&upstream.name))
    {
        writeln!(out, "\n[[upstream]]\nname = {}", quoted(&upstream.name))?;
        writeln!(
            out,
            "balance = {}\nserver = [",
            quoted(&balance::write(&upstream.balance, &config.maps))
        )?;
        for peer in &upstream.peers {
            write_peer(out, &peer.address.to_string(), peer, "")?;
        }
        for named in &upstream.names {
            let (address, service) = match &named.service {
                Some(service) => (named.host.clone(), format!(", service = {}", quoted(service))),
                None => (format!("{}:{}", named.host, named.port), String::new()),
            };
            write_peer(out, &address, &named.like, &format!(", resolve = true{service}"))?;
        }
        writeln!(out, "]")?;
        if let Some(check) = &upstream.check {
            writeln!(out, "check = {}", health::write(check, quoted))?;
        }
        if let Some(queue) = &upstream.queue {
            let timeout = quoted(&write_duration(queue.timeout));
            writeln!(out, "queue = {{ size = {}, timeout = {timeout} }}", queue.size)?;
        }
        if let Some(named) = upstream.names.first() {
            writeln!(out, "{}", named.resolver.write())?;
        }
    }
    let mut servers = config
        .servers
        .iter()
        .filter(|server| server.action != Action::Http);
    servers.try_for_each(|server| write_server(out, config, server))
}

/// Those that are used.
fn write_log_formats(out: &mut String, config: &Config) -> std::fmt::Result {
    let mut written: Vec<String> = Vec::new();
    for log in config.access_logs() {
        let format = &log.format;
        if log_format::is_ready_made(&format.name) || written.contains(&format.name) {
            continue;
        }
        writeln!(
            out,
            "\n[[log_format]]\nname = {}\nescape = {}\nformat = {}",
            quoted(&expand::escape(&format.name)),
            quoted(format.escape.name()),
            quoted(&log_format::write_format(&format.parts))
        )?;
        written.push(format.name.clone());
    }
    Ok(())
}

fn write_peer(out: &mut String, address: &str, peer: &Peer, name: &str) -> std::fmt::Result {
    let Peer {
        weight,
        backup,
        down,
        max_conns,
        max_fails,
        ..
    } = peer;
    let address = quoted(&expand::escape(address));
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
    writeln!(out, "{name} }},")
}

fn write_server(out: &mut String, config: &Config, server: &Server) -> std::fmt::Result {
    writeln!(out, "\n[[server]]")?;
    write_listen(out, server)?;
    match &server.action {
        Action::Http => {}
        Action::Status => writeln!(out, "ebpf_status_return = true")?,
        Action::Proxy(Target::Upstream(index)) => {
            let name = config
                .upstreams
                .get(*index)
                .map_or("", |upstream| upstream.name.as_str());
            writeln!(out, "proxy_pass = {}", quoted(&expand::escape(name)))?;
        }
        Action::Proxy(Target::Variable(template)) => write_template(out, config, template)?,
    }
    write_stream(out, config, &server.stream)
}

fn write_listen(out: &mut String, server: &Server) -> std::fmt::Result {
    let http = server.action == Action::Http;
    writeln!(out, "listen = [")?;
    for listen in &server.listen {
        let header = match http {
            true => String::new(),
            false => format!(", proxy_protocol = {}", listen.proxy_protocol),
        };
        writeln!(
            out,
            "  {{ address = {}, backlog = {}{header}{} }},",
            quoted(&expand::escape(&listen.address.to_string())),
            listen.backlog,
            listen::write(&listen.options)
        )?;
    }
    writeln!(out, "]")?;
    Ok(())
}

fn write_stream(out: &mut String, config: &Config, stream: &Stream) -> std::fmt::Result {
    let zones = &config.limit_zones;
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
        "tcp_congestion = {}",
        quoted(&stream.tcp_congestion.to_string())
    )?;
    let keepalive = stream.proxy_socket_keepalive;
    writeln!(out, "proxy_socket_keepalive = {keepalive}")?;
    writeln!(out, "proxy_bind = {}", quoted(&stream.proxy_bind.to_string()))?;
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
    writeln!(
        out,
        "ebpf_offload_after = {}",
        quoted(&stream.ebpf_offload_after.to_string())
    )?;
    let on_reload = OnReload::ALL.iter().find(|(_, what)| *what == stream.on_reload);
    writeln!(
        out,
        "on_reload = {}",
        quoted(on_reload.map_or("", |(name, _)| name))
    )?;
    let version = match stream.proxy_protocol {
        None => "false".to_owned(),
        Some(ProxyProtocol::V1) => quoted("v1"),
        Some(ProxyProtocol::V2) => quoted("v2"),
    };
    writeln!(out, "proxy_protocol = {version}")?;
    writeln!(
        out,
        "proxy_protocol_timeout = {}",
        quoted(&write_duration(stream.proxy_protocol_timeout))
    )?;
    writeln!(out, "set_real_ip_from = {}", list(&stream.set_real_ip_from))?;
    writeln!(out, "access = {}", list(&stream.access))?;
    let limits: Vec<String> = stream.limit_conn.iter().map(|limit| limit.text(zones)).collect();
    writeln!(out, "limit_conn = {}", list(&limits))?;
    let rates: Vec<String> = stream
        .limit_conn_rate
        .iter()
        .map(|rate| rate.text(zones))
        .collect();
    writeln!(out, "limit_conn_rate = {}", list(&rates))?;
    for (name, rate) in [
        ("proxy_upload_rate", &stream.proxy_upload_rate),
        ("proxy_download_rate", &stream.proxy_download_rate),
    ] {
        let rate = rate.text(|template| plain(config, template));
        writeln!(out, "{name} = {}", quoted(&rate))?;
    }
    writeln!(out, "ssl_preread = {}", stream.ssl_preread)?;
    let (size, timeout) = (stream.preread_buffer_size, stream.preread_timeout);
    writeln!(out, "preread_buffer_size = {}", quoted(&write_size(size)))?;
    writeln!(out, "preread_timeout = {}", quoted(&write_duration(timeout)))?;
    if let Some(resolver) = &stream.resolver {
        writeln!(out, "{}", resolver.write())?;
    }
    let log = access_log::write_log(stream.access_log.as_deref(), quoted);
    writeln!(out, "access_log = {log}")
}

fn write_zones(out: &mut String, config: &Config) -> std::fmt::Result {
    for zone in &config.limit_zones {
        let (name, key) = (quoted(&zone.name), quoted(&plain(config, &zone.key)));
        writeln!(out, "\n[[limit_conn_zone]]\nname = {name}\nkey = {key}")?;
    }
    Ok(())
}

fn write_maps(out: &mut String, config: &Config) -> std::fmt::Result {
    for map in &config.maps {
        writeln!(out, "\n[[map]]\nsource = {}", quoted(&plain(config, &map.source)))?;
        writeln!(
            out,
            "variable = {}\nhostnames = {}\nvalues = [",
            quoted(&format!("${}", map.name)),
            map.hostnames
        )?;
        let line = |pattern: &str, value: &Template| match plain(config, value) {
            value if value.is_empty() => quoted(&format!("{pattern} \"\"")),
            value => quoted(&format!("{pattern} {value}")),
        };
        for entry in &map.entries {
            writeln!(out, "  {},", line(&expand::escape(&entry.text), &entry.value))?;
        }
        writeln!(out, "  {},\n]", line("default", &map.default))?;
    }
    Ok(())
}

/// A template that was written without `set`, so that no literal in it can run into a variable's name.
fn plain(config: &Config, template: &Template) -> String {
    let part = |part: &Part| match part {
        Part::Literal(literal) => expand::escape(literal),
        Part::Variable(variable) => format!("${}", name_of(&config.maps, *variable)),
    };
    template.0.iter().map(part).collect()
}

/// A list of texts.
fn list<T: ToString>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(|item| quoted(&item.to_string())).collect();
    format!("[{}]", items.join(", "))
}

/// A literal that would lengthen the name of the variable before it goes into a variable of its own.
fn write_template(out: &mut String, config: &Config, template: &Template) -> std::fmt::Result {
    let mut text = String::new();
    let mut set = Vec::new();
    // A variable of `set` hides a map's of the same name.
    let mut free = (0..)
        .map(|n| format!("text_{n}"))
        .filter(|name| config.maps.iter().all(|map| map.name != *name));
    let mut after_variable = false;
    for part in &template.0 {
        match part {
            Part::Literal(literal) if after_variable && literal.starts_with(is_name_char) => {
                let name = free.next().unwrap_or_default();
                set.push(format!("{name} = {}", quoted(&expand::escape(literal))));
                let _ = write!(text, "${name}");
            }
            Part::Literal(literal) => text.push_str(&expand::escape(literal)),
            Part::Variable(variable) => {
                let _ = write!(text, "${}", name_of(&config.maps, *variable));
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
