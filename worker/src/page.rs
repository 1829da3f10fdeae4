//! The status document as a page for people: one file, no script, refreshes itself. Pure: document in, HTML out.

use std::fmt::Write;

use serde_json::Value;

/// Seconds between two looks.
const REFRESH: u32 = 2;

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1c2330;--soft:#667085;--line:#e4e7ec;--kernel:#0f8a5f;\
--copy:#b45309;--bad:#c0362c}\
@media(prefers-color-scheme:dark){:root{--bg:#12161d;--card:#1a202a;--ink:#e6e9ef;--soft:#98a2b3;--line:#2b3340;\
--kernel:#34d399;--copy:#fbbf24;--bad:#f87171}}\
*{box-sizing:border-box}body{margin:0 auto;max-width:1180px;padding:24px;background:var(--bg);color:var(--ink);\
font:15px/1.45 system-ui,sans-serif}\
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:4px 14px;margin-bottom:18px}h1{font-size:22px;margin:0}\
h2{font-size:15px;margin:26px 0 8px}.soft{color:var(--soft)}\
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}\
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}\
.card b{display:block;font-size:22px;font-variant-numeric:tabular-nums;font-weight:600}\
.bar{height:6px;border-radius:3px;background:var(--copy);margin-top:8px;overflow:hidden}\
.bar i{display:block;height:100%;background:var(--kernel)}\
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}\
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}\
th,td{padding:7px 10px;text-align:left;white-space:nowrap}th:first-child,td:first-child{padding-left:14px}th:last-child,td:last-child{padding-right:14px}th{font-weight:500;color:var(--soft);font-size:13px}\
tr+tr td{border-top:1px solid var(--line)}thead+tbody tr:first-child td{border-top:1px solid var(--line)}\
.n{text-align:right}.kernel{color:var(--kernel)}.copy{color:var(--copy)}.bad{color:var(--bad)}\
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:0 18px}footer{margin-top:26px}";

/// A cell: its text, and the class that it is shown in.
type Cell = (String, &'static str);

/// The page for a status document.
pub fn render(status: &Value) -> String {
    let mut page = format!(
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Culvert</title>\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <meta http-equiv=\"refresh\" content=\"{REFRESH}\"><style>{STYLE}</style></head><body>"
    );
    header(&mut page, status);
    cards(&mut page, status);
    busiest(&mut page, status);
    listeners(&mut page, status);
    upstreams(&mut page, status);
    workers(&mut page, status);
    reasons(&mut page, status);
    page.push_str(
        "<footer class=\"soft\">The same as JSON: ask with <code>Accept: application/json</code>. Figures for \
         Prometheus: <code>/metrics</code>.</footer></body></html>\n",
    );
    page
}

fn header(page: &mut String, status: &Value) {
    let _ = write!(
        page,
        "<header><h1>Culvert</h1><span class=\"soft\">{} · up {} · configuration {} · {} restarted workers</span>",
        escape(&text(status, "/version")),
        duration(number(status, "/uptime_seconds")),
        number(status, "/generation"),
        number(status, "/worker_restarts")
    );
    let failed = number(status, "/reloads/failed");
    if failed > 0 {
        let _ = write!(page, "<span class=\"bad\">{failed} reloads refused</span>");
    }
    if let Some(reason) = status.pointer("/datapath_reason").and_then(Value::as_str) {
        let _ = write!(
            page,
            "<span class=\"copy\">all is copied: {}</span>",
            escape(reason)
        );
    }
    page.push_str("</header>");
}

fn cards(page: &mut String, status: &Value) {
    let active = number(status, "/sessions/active");
    let offloaded = number(status, "/sessions/offloaded");
    let share = (offloaded * 100).checked_div(active).unwrap_or(0);
    page.push_str("<div class=\"cards\">");
    card(
        page,
        "open sessions",
        &count(active),
        &format!("{} since the start", count(number(status, "/sessions/total"))),
    );
    let bar = match active {
        0 => String::new(),
        _ => format!("<div class=\"bar\"><i style=\"width:{share}%\"></i></div>"),
    };
    let _ = write!(
        page,
        "<div class=\"card\"><span class=\"soft\">in the kernel</span><b>{share} %</b><span class=\"soft\">{} of {}</span>\
         {bar}</div>",
        count(offloaded),
        count(active)
    );
    for (name, way) in [("to upstreams", "to_upstream"), ("to clients", "to_downstream")] {
        let carried =
            number(status, &format!("/bytes/sockmap/{way}")) + number(status, &format!("/bytes/relay/{way}"));
        let rate = number(status, &format!("/rates/{way}"));
        card(
            page,
            name,
            &format!("{}/s", bytes(rate)),
            &format!("{} since the start", bytes(carried)),
        );
    }
    page.push_str("</div>");
}

fn card(page: &mut String, name: &str, figure: &str, below: &str) {
    let _ = write!(
        page,
        "<div class=\"card\"><span class=\"soft\">{name}</span><b>{figure}</b><span class=\"soft\">{below}</span></div>"
    );
}

fn busiest(page: &mut String, status: &Value) {
    let rows = list(status, "/busiest").map(|session| {
        let rate = |way| format!("{}/s", bytes(number(session, &format!("/rates/{way}"))));
        let sum = |way| bytes(number(session, &format!("/bytes/{way}")));
        vec![
            plain(number(session, "/session").to_string()),
            plain(text(session, "/client")),
            plain(text(session, "/listener")),
            plain(text(session, "/peer")),
            datapath(&text(session, "/datapath")),
            right(rate("to_upstream")),
            right(rate("to_downstream")),
            right(sum("to_upstream")),
            right(sum("to_downstream")),
            right(duration(number(session, "/age_seconds"))),
            right(count(number(session, "/pauses"))),
        ]
    });
    let columns = [
        "#session", "client", "listener", "peer", "path", "#↑ now", "#↓ now", "#↑ sum", "#↓ sum", "#age",
        "#pauses",
    ];
    table(page, "Busiest sessions", &columns, rows.collect());
    page.push_str("<p class=\"soft\">↑ to the peer, ↓ to the client</p>");
}

fn listeners(page: &mut String, status: &Value) {
    let rows = list(status, "/listeners").map(|listener| {
        vec![
            plain(text(listener, "/address")),
            right(count(number(listener, "/active"))),
            right(count(number(listener, "/accepted"))),
            right(bytes(number(listener, "/bytes/to_upstream"))),
            right(bytes(number(listener, "/bytes/to_downstream"))),
        ]
    });
    let columns = ["address", "#open", "#accepted", "#received*", "#sent*"];
    table(page, "Listeners", &columns, rows.collect());
}

fn upstreams(page: &mut String, status: &Value) {
    let mut rows = Vec::new();
    for group in list(status, "/upstreams") {
        for peer in list(group, "/peers") {
            let failures = number(peer, "/connect_failures");
            rows.push(vec![
                plain(text(group, "/name")),
                plain(text(peer, "/address")),
                match text(peer, "/state") {
                    up if up == "up" => plain(up),
                    other => (other, "bad"),
                },
                right(number(peer, "/weight").to_string()),
                right(count(number(peer, "/active"))),
                right(count(number(peer, "/connected"))),
                (count(failures), if failures > 0 { "n bad" } else { "n" }),
                checks(peer),
                right(bytes(number(peer, "/bytes/to_upstream"))),
                right(bytes(number(peer, "/bytes/to_downstream"))),
            ]);
        }
    }
    let columns = [
        "upstream",
        "peer",
        "state",
        "#weight",
        "#open",
        "#connected",
        "#failures",
        "checks",
        "#sent*",
        "#received*",
    ];
    table(page, "Upstreams", &columns, rows);
    page.push_str("<p class=\"soft\">* over sessions that have ended</p>");
    queues(page, status);
}

/// What health checks found of a peer.
fn checks(peer: &Value) -> (String, &'static str) {
    let Some(last) = peer.pointer("/check/last") else {
        return plain("-".to_owned());
    };
    let (passed, failed) = (number(peer, "/check/passed"), number(peer, "/check/failed"));
    let shown = format!("{} of {} passed", count(passed), count(passed + failed));
    match last.as_str() {
        None | Some("passed") => plain(shown),
        Some(why) => (format!("{shown}, the last one: {why}"), "bad"),
    }
}

/// Sessions that wait for a place, if an upstream lets them.
fn queues(page: &mut String, status: &Value) {
    let groups = list(status, "/upstreams").filter(|group| group["queue"].is_object());
    let rows: Vec<_> = groups
        .map(|group| {
            vec![
                plain(text(group, "/name")),
                right(format!(
                    "{} of {}",
                    count(number(group, "/queue/waiting")),
                    count(number(group, "/queue/size"))
                )),
                right(count(number(group, "/queue/queued"))),
                right(count(number(group, "/queue/timed_out"))),
                right(count(number(group, "/queue/overflowed"))),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let columns = ["upstream", "#waiting", "#queued", "#timed out", "#refused, full"];
        table(page, "Queues", &columns, rows);
    }
}

fn workers(page: &mut String, status: &Value) {
    let rows = list(status, "/workers").map(|worker| {
        let draining = worker["draining"].as_bool().unwrap_or(false);
        let cpus: Vec<String> = list(worker, "/cpus").map(Value::to_string).collect();
        vec![
            plain(number(worker, "/slot").to_string()),
            plain(number(worker, "/pid").to_string()),
            plain(cpus.join(", ")),
            if draining {
                ("draining".to_owned(), "copy")
            } else {
                plain("serving".to_owned())
            },
            right(number(worker, "/generation").to_string()),
            right(count(number(worker, "/sessions"))),
            right(count(number(worker, "/offloaded"))),
            right(format!(
                "{} of {}",
                count(number(worker, "/slots_used")),
                count(number(worker, "/slots_total"))
            )),
        ]
    });
    let columns = [
        "worker",
        "process",
        "CPUs",
        "state",
        "#configuration",
        "#open",
        "#in the kernel",
        "#sockmap places",
    ];
    table(page, "Workers", &columns, rows.collect());
}

fn reasons(page: &mut String, status: &Value) {
    page.push_str("<div class=\"two\">");
    for (title, key) in [
        ("Why sessions ended", "/closes"),
        ("Copied, though the kernel should have taken them", "/fallbacks"),
    ] {
        let mut rows: Vec<(&String, u64)> = status
            .pointer(key)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter_map(|(reason, count)| Some((reason, count.as_u64().filter(|count| *count > 0)?)))
            .collect();
        rows.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let rows = rows
            .into_iter()
            .map(|(reason, of)| vec![plain(reason.replace('_', " ")), right(count(of))]);
        page.push_str("<div>");
        table(page, title, &["reason", "#sessions"], rows.collect());
        page.push_str("</div>");
    }
    page.push_str("</div>");
}

/// A column whose name begins with # holds figures.
fn table(page: &mut String, title: &str, columns: &[&str], rows: Vec<Vec<Cell>>) {
    let _ = write!(page, "<h2>{title}</h2>");
    if rows.is_empty() {
        page.push_str("<p class=\"soft\">none</p>");
        return;
    }
    page.push_str("<div class=\"wide\"><table><thead><tr>");
    for column in columns {
        let _ = match column.strip_prefix('#') {
            Some(name) => write!(page, "<th class=\"n\">{name}</th>"),
            None => write!(page, "<th>{column}</th>"),
        };
    }
    page.push_str("</tr></thead><tbody>");
    for row in rows {
        page.push_str("<tr>");
        for (text, class) in row {
            let _ = match class {
                "" => write!(page, "<td>{}</td>", escape(&text)),
                class => write!(page, "<td class=\"{class}\">{}</td>", escape(&text)),
            };
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
}

fn plain(text: String) -> Cell {
    (text, "")
}

fn right(text: String) -> Cell {
    (text, "n")
}

fn datapath(name: &str) -> Cell {
    match name {
        "sockmap" => ("kernel".to_owned(), "kernel"),
        _ => ("copied".to_owned(), "copy"),
    }
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn text(value: &Value, pointer: &str) -> String {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or("–")
        .to_owned()
}

fn list<'v>(value: &'v Value, pointer: &str) -> impl Iterator<Item = &'v Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// Names in the configuration may hold anything.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// With thin spaces between thousands.
fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

fn bytes(number: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = number as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{number} B"),
        _ if value < 10.0 => format!("{value:.2} {}", units[unit]),
        _ => format!("{value:.0} {}", units[unit]),
    }
}

fn duration(seconds: u64) -> String {
    match (
        seconds / 86_400,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    ) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_are_readable() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "0.98 KiB");
        assert_eq!(bytes(5 << 30), "5.00 GiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(90_061), "1 d 1 h");
    }

    #[test]
    fn nothing_in_the_document_becomes_markup() {
        let page = render(&json!({
            "upstreams": [{ "name": "<script>\"&", "peers": [{ "address": "unix:/<b>" }] }],
            "datapath_reason": "<i>",
        }));
        assert!(page.contains("&lt;script&gt;&quot;&amp;") && page.contains("unix:/&lt;b&gt;"));
        assert!(!page.contains("<script") && !page.contains("<b>unix") && !page.contains("<i>:"));
    }
}
