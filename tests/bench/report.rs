//! What came out: tables of medians, with the spread, and the raw data as JSON.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Options;
use crate::machine;
use crate::measures::{Place, Sample};

/// A row of the table of ratios.
#[derive(Debug)]
pub struct Row {
    /// The measure's name.
    pub measure: &'static str,
    /// The figure's name.
    pub figure: &'static str,
    /// What it is called.
    pub title: &'static str,
    /// The direct connection's unit.
    pub unit: &'static str,
    /// Whether less is better.
    pub is_cost: bool,
}

const fn row(measure: &'static str, figure: &'static str, title: &'static str, unit: &'static str) -> Row {
    let is_cost = false;
    Row {
        measure,
        figure,
        title,
        unit,
        is_cost,
    }
}

const fn cost(measure: &'static str, title: &'static str) -> Row {
    Row {
        measure,
        figure: "cpu_s_per_gib",
        title,
        unit: "s",
        is_cost: true,
    }
}

/// What is compared with the direct connection.
pub const RATIOS: &[Row] = &[
    row("up1", "gbit_s", "throughput, 1 stream to the upstream", "Gbit/s"),
    row("down1", "gbit_s", "throughput, 1 stream to the client", "Gbit/s"),
    row("up8", "gbit_s", "throughput, 8 streams to the upstream", "Gbit/s"),
    row("down8", "gbit_s", "throughput, 8 streams to the client", "Gbit/s"),
    row("pieces64", "gbit_s", "throughput, pieces of 64 B", "Gbit/s"),
    row("pieces1000", "gbit_s", "throughput, pieces of 1000 B", "Gbit/s"),
    row("rr1", "requests_s", "requests, 64 B, 1 connection", "/s"),
    row("rr64", "requests_s", "requests, 64 B, 64 connections", "/s"),
    row("conn1", "connections_s", "new connections, 1 client", "/s"),
    row("conn8", "connections_s", "new connections, 8 clients", "/s"),
    cost("up1", "CPU per GiB, 1 stream to the upstream"),
    cost("down1", "CPU per GiB, 1 stream to the client"),
    cost("pieces64", "CPU per GiB, pieces of 64 B"),
    cost("pieces1000", "CPU per GiB, pieces of 1000 B"),
    cost("up8", "CPU per GiB, 8 streams to the upstream"),
    cost("down8", "CPU per GiB, 8 streams to the client"),
];

/// What stands for itself: measure, figure, title.
const ABSOLUTE: &[(&str, &str, &str)] = &[
    ("idle", "user_kib_per_session", "KiB per idle session, user space"),
    ("idle", "resident_kib", "KiB resident without sessions"),
    ("stopped", "kernel_mib", "MiB of kernel memory, reader stopped"),
    ("stopped", "tcp_mib", "MiB of it charged to sockets"),
    (
        "stopped",
        "swallowed_mib",
        "MiB sent that the reader did not read",
    ),
];

/// Median and extremes.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// The middle one; the mean of the middle two.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// None of nothing.
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Spread { median, least, most })
    }
}

/// The values of one figure, one for each round, with the round.
fn values<'a>(
    samples: &'a [Sample],
    contender: &'a str,
    measure: &'a str,
    figure: &'a str,
) -> impl Iterator<Item = (usize, f64)> + 'a {
    samples
        .iter()
        .filter(move |s| s.contender == contender && s.measure == measure)
        .filter_map(move |s| Some((s.round, s.figure(figure)?)))
}

/// A figure's ratio to the direct connection of the same round.
pub fn ratio(samples: &[Sample], contender: &str, row: &Row) -> Option<Spread> {
    let ratios = values(samples, contender, row.measure, row.figure).filter_map(|(round, value)| {
        let direct = values(samples, "direct", row.measure, row.figure).find(|(r, _)| *r == round);
        Some(value / direct?.1)
    });
    Spread::of(ratios.collect())
}

fn absolute(samples: &[Sample], contender: &str, measure: &str, figure: &str) -> Option<Spread> {
    Spread::of(
        values(samples, contender, measure, figure)
            .map(|(_, value)| value)
            .collect(),
    )
}

/// Three digits, whatever the size.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn spread(value: Option<Spread>, format: impl Fn(f64) -> String) -> String {
    match value {
        None => "-".to_owned(),
        Some(Spread { median, least, most }) => {
            format!("{} ({}..{})", format(median), format(least), format(most))
        }
    }
}

/// Everything for people, as Markdown.
pub fn tables(samples: &[Sample], options: &Options) -> String {
    let proxies = options.contenders.iter().filter(|c| c.name != "direct");
    let mut text = String::new();

    let mut lines = Vec::new();
    // What the way itself costs is no proxy's.
    let rows = RATIOS.iter().filter(|row| !row.is_cost || options.way.is_none());
    for row in rows {
        let Some(direct) = absolute(samples, "direct", row.measure, row.figure) else {
            continue;
        };
        let mut line = vec![
            row.title.to_owned(),
            format!("{} {}", short(direct.median), row.unit),
        ];
        line.extend(
            proxies
                .clone()
                .map(|c| spread(ratio(samples, c.name, row), |v| format!("{v:.2}"))),
        );
        lines.push(line);
    }
    if !lines.is_empty() {
        let _ = writeln!(
            text,
            "Ratios to the direct connection of the same round: median (least..most) of {} rounds.\n",
            options.rounds
        );
        if let Some(way) = options.way {
            let (ms, mbit_s, lost) = (way.delay.as_millis(), way.mbit_s, way.lost as f64 / 1e4);
            let _ = writeln!(
                text,
                "Clients {ms} ms away, one way, over {mbit_s} Mbit/s that lose {lost} % of the packets.\n"
            );
        }
        let mut head = vec!["figure ÷ direct".to_owned(), "direct".to_owned()];
        head.extend(proxies.clone().map(|c| c.title.to_owned()));
        text += &table(&head, &lines);
    }

    let mut lines = Vec::new();
    for (measure, figure, title) in ABSOLUTE {
        if !samples.iter().any(|s| s.measure == *measure) {
            continue;
        }
        let mut line = vec![(*title).to_owned()];
        line.extend(options.contenders.iter().map(|c| {
            // Where there is no proxy, there is no memory of one.
            let value = absolute(samples, c.name, measure, figure);
            spread(value.filter(|_| *measure != "idle" || c.name != "direct"), short)
        }));
        lines.push(line);
    }
    if !lines.is_empty() {
        let _ = writeln!(text, "\nMemory: median (least..most).\n");
        let mut head = vec!["figure".to_owned()];
        head.extend(options.contenders.iter().map(|c| c.title.to_owned()));
        text += &table(&head, &lines);
    }

    let disturbed = samples.iter().filter(|s| s.is_disturbed()).count();
    if disturbed > 0 {
        let _ = writeln!(
            text,
            "\nBeside {disturbed} of {} runs other programs took more than 5 % of a CPU (cpu_foreign_s in the raw data).",
            samples.len()
        );
    }
    for sample in samples {
        if let Some(failure) = &sample.failure {
            let (measure, contender, round) = (sample.measure, sample.contender, sample.round + 1);
            let _ = writeln!(text, "\nFailed: {measure}, {contender}, round {round}: {failure}");
        }
    }
    text
}

/// Markdown that is also readable as it stands.
fn table(head: &[String], lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("| {cell:width$} "));
        padded.collect::<String>() + "|\n"
    };
    let rule = widths.iter().map(|&width| format!("|{}", "-".repeat(width + 2)));
    let mut text = line(head) + &rule.collect::<String>() + "|\n";
    for cells in lines {
        text += &line(cells);
    }
    text
}

/// Everything for programs.
pub fn json(samples: &[Sample], options: &Options, places: &[Place], took: Duration) -> String {
    let samples: Vec<Value> = samples
        .iter()
        .map(|s| {
            let figures: serde_json::Map<String, Value> = s
                .figures
                .iter()
                .map(|(name, value)| ((*name).to_owned(), json!(value)))
                .collect();
            json!({
                "round": s.round + 1,
                "measure": s.measure,
                "contender": s.contender,
                "figures": figures,
                "seconds": s.seconds,
                "cpu_busy_s": s.cpu.map(|c| c.busy_s),
                "cpu_stolen_s": s.cpu.map(|c| c.stolen_s),
                "cpu_foreign_s": s.cpu.map(|c| c.foreign_s),
                "failure": s.failure,
            })
        })
        .collect();
    let status: serde_json::Map<String, Value> = places
        .iter()
        .filter_map(|place| Some((place.contender.name.to_owned(), place.proxy.status()?)))
        .collect();
    let document = json!({
        "machine": machine::describe(),
        "way": options.way.map(|way| format!("{way:?}")),
        "rounds": options.rounds,
        "seconds_per_run": options.seconds,
        "workers": options.workers,
        "took_s": took.as_secs_f64(),
        "status_at_the_end": status,
        "samples": samples,
    });
    format!("{document:#}\n")
}
