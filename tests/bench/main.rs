//! `make bench`: measures Culvert against no proxy at all, nginx's stream module and HAProxy, on loopback or with a long way between
//! client and proxy, interleaved in one run, and reports every figure as a ratio to the direct connection of the same round.
//!
//! | room | owns |
//! |---|---|
//! | `main` | the arguments and the order of the runs |
//! | `contenders` | what is compared: configurations, start, stop |
//! | `site` | where all of them are: on loopback, or the clients at the other end of a long way |
//! | `peers` | the servers that the contenders lead to |
//! | `load` | the clients |
//! | `measures` | one run of one measure |
//! | `machine` | what the kernel says: CPU, memory, versions |
//! | `report` | the tables and the raw data |
//! | `plot` | the picture |
//!
//! Never talks to anything but loopback and networks of its own, and never changes a setting of the machine.

#[path = "../harness/mod.rs"]
mod harness;

mod contenders;
mod load;
mod machine;
mod measures;
mod peers;
mod plot;
mod report;
mod site;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use contenders::{Contender, Setup};
use harness::long_way::Way;
use measures::{MEASURES, Measure, Place, Sample};
use peers::Peers;
use site::Site;

const USAGE: &str = "arguments, as in: make bench BENCH=\"--quick --only up1,rr1\"
  --rounds N         how often everything is measured (5; the memory figures half as often)
  --seconds N        how long one run of load takes (2)
  --quick            2 rounds of 1 second
  --only A,B         only these measures: up1 down1 up8 down8 pieces64 pieces1000 rr1 rr64 conn1 conn8 idle stopped
  --contenders A,B   only these beside direct: culvert at_once relayed equipped nginx16k nginx256k haproxy
  --workers N        worker processes or threads of each proxy (2)
  --sessions N       idle sessions for the memory figure (2000)
  --way MS,MBIT,LOST a way of so many ms, one way, between the clients and the rest, that carries so many Mbit/s and loses so
                     many of a million packets; up1 and down1 with --seconds 8 are of use there
  --stopped N        keep the stopped reader for N whole seconds (otherwise 20, or until nothing moves any more)
  --out DIR          where the raw data, the tables and the plot go (bench/ in cargo's target directory)
  --keep             put a copy into tests/bench/results/ as well";

/// What the command line asks for.
#[derive(Debug, Clone)]
pub struct Options {
    rounds: usize,
    seconds: f64,
    measures: Vec<&'static Measure>,
    contenders: Vec<&'static Contender>,
    workers: usize,
    sessions: usize,
    stopped: Option<f64>,
    way: Option<Way>,
    out: PathBuf,
    keep: bool,
}

fn main() -> Result<()> {
    let Some(options) = parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(());
    };
    contenders::check_installed(&options.contenders)?;
    machine::raise_descriptor_limit()?;
    let begun = Instant::now();
    let setup = Setup {
        site: Site::new(options.way)?,
        dir: options.out.join("work"),
        workers: options.workers,
    };
    std::fs::create_dir_all(&setup.dir)
        .with_context(|| format!("failed to create {}", setup.dir.display()))?;

    let mut places = Vec::new();
    for &contender in &options.contenders {
        let peers = Peers::start(&setup)?;
        let proxy = contender.start(&peers.ports(), &setup)?;
        places.push(Place {
            contender,
            peers,
            proxy,
        });
    }

    let mut samples = Vec::new();
    for round in 0..options.rounds {
        for (number, measure) in options.measures.iter().enumerate() {
            if measure.is_about_memory() && round >= options.rounds.div_ceil(2) {
                continue;
            }
            eprint!("round {}/{} {:8}", round + 1, options.rounds, measure.name);
            for turn in 0..places.len() {
                // Another order in every round and measure, so that nobody always follows the same neighbour.
                let place = (round + number + turn) % places.len();
                let sample = measures::run(measure, &mut places[place], round, &setup, &options);
                eprint!("  {} {}", sample.contender, sample.short());
                samples.push(sample);
            }
            eprintln!();
        }
    }
    finish(&options, &samples, &places, begun)
}

fn finish(options: &Options, samples: &[Sample], places: &[Place], begun: Instant) -> Result<()> {
    let tables = report::tables(samples, options);
    println!("\n{tables}");
    let mut files = vec![
        (
            "latest.json",
            report::json(samples, options, places, begun.elapsed()),
        ),
        ("tables.md", tables),
    ];
    if options.way.is_none()
        && let Some(plot) = plot::svg(samples, options)
    {
        files.push(("plot.svg", plot));
    }
    let mut places = vec![options.out.clone()];
    if options.keep {
        let results = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/bench/results"));
        places.push(match options.way {
            Some(_) => results.join("long_way"),
            None => results,
        });
    }
    for dir in places {
        std::fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        for (name, text) in &files {
            let path = dir.join(name);
            std::fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
        }
        println!("raw data, tables and plot: {}", dir.display());
    }
    let failures = samples.iter().filter(|s| s.failure.is_some()).count();
    if failures > 0 {
        bail!("{failures} of {} runs failed, see above", samples.len());
    }
    println!("took {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// None where only the usage is asked for.
fn parse(mut args: impl Iterator<Item = String>) -> Result<Option<Options>> {
    let mut options = Options {
        rounds: 5,
        seconds: 2.0,
        measures: MEASURES.iter().collect(),
        contenders: contenders::ALL.iter().collect(),
        workers: 2,
        sessions: 2000,
        stopped: None,
        way: None,
        out: default_out()?,
        keep: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .with_context(|| format!("{arg} needs a value\n{USAGE}"))
        };
        match arg.as_str() {
            // cargo's own way of saying that this is a benchmark.
            "--bench" => {}
            "--rounds" => options.rounds = value()?.parse().context("--rounds takes a number")?,
            "--seconds" => options.seconds = value()?.parse().context("--seconds takes a number")?,
            "--quick" => (options.rounds, options.seconds) = (2, 1.0),
            "--workers" => options.workers = value()?.parse().context("--workers takes a number")?,
            "--sessions" => options.sessions = value()?.parse().context("--sessions takes a number")?,
            "--stopped" => options.stopped = Some(value()?.parse().context("--stopped takes a number")?),
            "--way" => options.way = Some(site::way(&value()?)?),
            "--out" => options.out = std::path::absolute(value()?)?,
            "--keep" => options.keep = true,
            "--only" => options.measures = pick(&value()?, MEASURES, |m| m.name)?,
            "--contenders" => {
                let list = format!("direct,{}", value()?);
                options.contenders = pick(&list, contenders::ALL, |c| c.name)?;
            }
            "--help" | "-h" => return Ok(None),
            _ => bail!("unknown argument {arg}\n{USAGE}"),
        }
    }
    if options.rounds == 0 || options.workers == 0 || options.sessions == 0 || options.seconds < 0.1 {
        bail!("--rounds, --workers and --sessions must be at least 1, --seconds at least 0.1");
    }
    if options.way.is_some() {
        options.measures.retain(|measure| !measure.is_about_memory());
    }
    Ok(Some(options))
}

/// The items named in a list with commas, in their own order.
fn pick<T>(list: &str, from: &'static [T], name: impl Fn(&T) -> &'static str) -> Result<Vec<&'static T>> {
    let wanted: Vec<&str> = list.split(',').map(str::trim).collect();
    for word in &wanted {
        if !from.iter().any(|item| name(item) == *word) {
            bail!("unknown name {word}\n{USAGE}");
        }
    }
    Ok(from.iter().filter(|item| wanted.contains(&name(item))).collect())
}

/// `bench/` in the target directory that this program was built into.
fn default_out() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("failed to find this program's own path")?;
    let target = exe
        .ancestors()
        .nth(3)
        .context("this program lies outside a target directory")?;
    Ok(target.join("bench"))
}
