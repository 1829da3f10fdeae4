//! The picture: ratios to the direct connection as bars with their spread, as one SVG. It paints its own
//! background and follows the reader's colour scheme, so that it can stand on any page.

use std::fmt::Write;

use crate::Options;
use crate::contenders::Contender;
use crate::measures::Sample;
use crate::report::{RATIOS, Row, ratio};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 270.0;
const RIGHT: f64 = 60.0;
const BAR: f64 = 11.0;
const GAP: f64 = 12.0;

const STYLE: &str = "
    .paper { fill: #ffffff; } .text { fill: #24292f; } .faint { fill: #57606a; }
    .grid { stroke: #d8dee4; } .one { stroke: #24292f; stroke-width: 1.5; stroke-dasharray: 4 3; } .spread { stroke: #24292f; }
    .c1 { fill: #0a7d5a; } .c2 { fill: #7cc4a8; } .c3 { fill: #9a6700; } .c4 { fill: #d9a94a; } .c5 { fill: #5a6fb5; }
    text { font: 12px system-ui, sans-serif; } .title { font-size: 15px; font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #161b22; } .text { fill: #e6edf3; } .faint { fill: #9198a1; }
      .grid { stroke: #30363d; } .one { stroke: #e6edf3; } .spread { stroke: #e6edf3; }
      .c1 { fill: #2fbf8f; } .c2 { fill: #1f6f55; } .c3 { fill: #e0b050; } .c4 { fill: #8a6420; } .c5 { fill: #8ea2ea; }
    }
";

/// The whole file. None if nothing was measured that has a ratio.
pub fn svg(samples: &[Sample], options: &Options) -> Option<String> {
    let proxies: Vec<&Contender> = options
        .contenders
        .iter()
        .copied()
        .filter(|c| c.name != "direct")
        .collect();
    let mut body = String::new();
    let mut y = 34.0;
    legend(&mut body, &proxies, &mut y);
    let start = y;
    panel(&mut body, samples, &proxies, &mut y, false);
    panel(&mut body, samples, &proxies, &mut y, true);
    if y == start || proxies.is_empty() {
        return None;
    }
    let rounds = options.rounds;
    let _ = writeln!(
        body,
        r#"<text class="faint" x="20" y="{:.0}">Medians of {rounds} interleaved rounds on loopback; the lines show the least and the most.</text>"#,
        y + 6.0
    );
    let height = y + 22.0;
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH:.0} {height:.0}\" width=\"{WIDTH:.0}\" \
         height=\"{height:.0}\" role=\"img\">\n<title>Proxies compared with a direct connection</title>\n\
         <style>{STYLE}</style>\n<rect class=\"paper\" width=\"100%\" height=\"100%\" rx=\"8\"/>\n{body}</svg>\n"
    ))
}

fn legend(body: &mut String, proxies: &[&Contender], y: &mut f64) {
    let mut x = 20.0;
    for (number, contender) in proxies.iter().enumerate() {
        let _ = writeln!(
            body,
            r#"<rect class="c{}" x="{x:.0}" y="{:.0}" width="12" height="12" rx="2"/><text class="text" x="{:.0}" y="{y:.0}">{}</text>"#,
            number + 1,
            *y - 10.0,
            x + 17.0,
            contender.title
        );
        x += 40.0 + 6.9 * contender.title.len() as f64;
    }
    *y += 30.0;
}

/// One scale for all rows of a kind.
fn panel(body: &mut String, samples: &[Sample], proxies: &[&Contender], y: &mut f64, is_cost: bool) {
    let shown =
        |row: &&Row| row.is_cost == is_cost && proxies.iter().any(|c| ratio(samples, c.name, row).is_some());
    let rows: Vec<&Row> = RATIOS.iter().filter(shown).collect();
    if rows.is_empty() {
        return;
    }
    let most = rows
        .iter()
        .flat_map(|row| proxies.iter().filter_map(|c| ratio(samples, c.name, row)))
        .map(|spread| spread.most)
        .fold(1.0, f64::max);
    let step = if most > 2.5 { 0.5 } else { 0.2 };
    let end = (most / step).ceil() * step;
    let x = |value: f64| LEFT + value / end * (WIDTH - LEFT - RIGHT);
    let title = if is_cost {
        "CPU time of the whole machine ÷ direct: less is better"
    } else {
        "Speed ÷ direct: more is better"
    };
    let _ = writeln!(
        body,
        r#"<text class="text title" x="20" y="{y:.0}">{title}</text>"#
    );
    *y += 24.0;

    let group = proxies.len() as f64 * BAR + GAP;
    let bottom = *y + rows.len() as f64 * group;
    for tick in 0..=(end / step).round() as usize {
        let value = tick as f64 * step;
        let class = if (value - 1.0).abs() < 1e-9 { "one" } else { "grid" };
        let at = x(value);
        let _ = writeln!(
            body,
            r#"<line class="{class}" x1="{at:.1}" x2="{at:.1}" y1="{:.0}" y2="{bottom:.0}"/><text class="faint" x="{at:.1}" y="{:.0}" text-anchor="middle">{value:.1}</text>"#,
            *y - 2.0,
            bottom + 14.0
        );
    }
    for row in rows {
        let middle = *y + (group - GAP) / 2.0 + 4.0;
        let _ = writeln!(
            body,
            r#"<text class="text" x="{:.0}" y="{middle:.0}" text-anchor="end">{}</text>"#,
            LEFT - 10.0,
            row.title
        );
        for (number, contender) in proxies.iter().enumerate() {
            let top = *y + number as f64 * BAR;
            let Some(spread) = ratio(samples, contender.name, row) else {
                continue;
            };
            let _ = writeln!(
                body,
                r#"<rect class="c{}" x="{LEFT}" y="{top:.1}" width="{:.1}" height="{:.1}"/><line class="spread" x1="{:.1}" x2="{:.1}" y1="{mid:.1}" y2="{mid:.1}"/><text class="faint" x="{:.1}" y="{:.1}" style="font-size:10px">{:.2}</text>"#,
                number + 1,
                x(spread.median) - LEFT,
                BAR - 1.5,
                x(spread.least),
                x(spread.most),
                x(spread.most) + 5.0,
                top + BAR - 2.5,
                spread.median,
                mid = top + (BAR - 1.5) / 2.0,
            );
        }
        *y += group;
    }
    *y = bottom + 48.0;
}
