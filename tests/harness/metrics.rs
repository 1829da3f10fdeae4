//! The page of metrics, read twice: by the letter of the format, and by `prometheus_client`, whose parser knows nothing
//! of this one and leaves out what a rule of ours might forgive.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use super::plan::Scratch;
use super::program::{need, run};

/// What a page says of itself: Prometheus' text format.
pub const CONTENT_TYPE: &str = "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n";

/// Where Debian has the library.
const LIBRARY: &str = "/usr/lib/python3/dist-packages/prometheus_client";

/// Prints each family's name and kind, and each sample's name, labels and value.
const READER: &str = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families
page = open(sys.argv[1], newline='').read()
json.dump([[family.name, family.type, [[s.name, list(s.labels.items()), s.value] for s in family.samples]]
           for family in text_string_to_metric_families(page)], sys.stdout)
";

/// A metric as the reader prints it: name, kind, samples with name, labels and value.
type Family = (String, String, Vec<(String, Vec<(String, String)>, f64)>);

/// What stands in a page.
#[derive(Debug, PartialEq)]
struct Page {
    /// The kind of each metric.
    kinds: BTreeMap<String, String>,
    /// The values, by name and labels as the page writes them.
    samples: BTreeMap<String, f64>,
}

/// The samples of a page of metrics, by name and labels; panics where it breaks a rule of the format, or where
/// Prometheus' own library reads anything else in it.
#[track_caller]
pub fn samples(page: &str) -> BTreeMap<String, f64> {
    assert!(page.ends_with('\n'));
    let (mut families, mut samples) = (BTreeMap::new(), BTreeMap::new());
    let (mut helped, mut current) = (BTreeSet::new(), String::new());
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("a help text");
            assert!(!text.is_empty() && helped.insert(name.to_owned()), "{line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert!(helped.contains(name), "no help before {line}");
            assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(name.starts_with("culvert_"), "{line}");
            assert!(
                families.insert(name.to_owned(), kind.to_owned()).is_none(),
                "twice: {line}"
            );
            current = name.to_owned();
        } else {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let name = series.split('{').next().expect("a name");
            assert!(
                name.chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            );
            let histogram = families[&current] == "histogram"
                && ["_bucket", "_sum", "_count"]
                    .iter()
                    .any(|end| name.strip_suffix(end) == Some(&current));
            assert!(name == current || histogram, "{line} is not of {current}");
            if let Some(labels) = series.strip_prefix(name).filter(|labels| !labels.is_empty()) {
                let labels = labels.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
                for label in labels.expect("labels in braces").split("\",") {
                    let (name, value) = label.split_once("=\"").expect("a label");
                    assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{line}");
                    let bare = value.replace("\\\\", "").replace("\\\"", "");
                    assert!(!bare.trim_end_matches('"').contains('"'), "{line}");
                }
            }
            let value: f64 = value.parse().unwrap_or_else(|e| panic!("{e}: {line}"));
            assert!(value.is_finite() && value >= 0.0, "{line}");
            assert!(
                samples.insert(series.to_owned(), value).is_none(),
                "twice: {line}"
            );
        }
    }
    for family in families.keys() {
        assert!(
            samples.keys().any(|series| series.starts_with(family.as_str()))
                || family.ends_with("cpu_bytes_total")
        );
    }
    assert_eq!(
        Page {
            kinds: families,
            samples: samples.clone()
        },
        as_prometheus_reads(page)
    );
    samples
}

/// What the library reads in a page.
#[track_caller]
fn as_prometheus_reads(page: &str) -> Page {
    assert!(
        std::path::Path::new(LIBRARY).is_dir(),
        "prometheus_client is not installed: apt-get install python3-prometheus-client"
    );
    let scratch = Scratch::new();
    let file = scratch.file("page");
    std::fs::write(&file, page).expect("writing the page");
    need("python3", "python3");
    // Debian's packages belong to Debian's Python, whichever else comes first.
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", READER]).arg(&file);
    let read = run(command, Duration::from_secs(20)).must_succeed("reading the page with prometheus_client");
    let families: Vec<Family> = serde_json::from_str(&read).expect("what the reader prints");
    let (mut kinds, mut samples) = (BTreeMap::new(), BTreeMap::new());
    for (family, kind, of_family) in families {
        // The library names counters as OpenMetrics does.
        let name = match kind.as_str() {
            "counter" => format!("{family}_total"),
            _ => family,
        };
        assert!(
            kinds.insert(name.clone(), kind).is_none(),
            "{name} is there twice"
        );
        for (sample, labels, value) in of_family {
            let series = sample + &written(&labels);
            assert!(!samples.contains_key(&series), "{series} is there twice");
            samples.insert(series, value);
        }
    }
    Page { kinds, samples }
}

/// Labels as a page has them.
fn written(labels: &[(String, String)]) -> String {
    let one = |(name, value): &(String, String)| {
        let escaped = value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n");
        format!("{name}=\"{escaped}\"")
    };
    match labels.is_empty() {
        true => String::new(),
        false => format!("{{{}}}", labels.iter().map(one).collect::<Vec<_>>().join(",")),
    }
}
