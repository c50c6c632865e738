//! All legs together: per round the medians of both sides and their ratio, then the median of the rounds' ratios. Writes the table,
//! the picture and the raw numbers.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::ReportArgs;
use crate::meter::{Leg, Spent, median, quantile};
use crate::rows::{Better, ROWS, Row, Target};
use crate::svg;

const OURS: &str = "berth";
const PEER: &str = "containerd";
/// A p99 of fewer samples is only their maximum.
const P99_SAMPLES: usize = 10;

/// A row with its figures.
#[derive(Debug, Clone)]
pub struct Line {
    /// What it is of.
    pub row: Row,
    /// Median and 99th percentile of all counted legs of ours and of the peer's.
    pub ours: (f64, Option<f64>),
    /// See `ours`.
    pub peer: (f64, Option<f64>),
    /// Median, least and greatest of the rounds' ratios; more than one is in our favour.
    pub ratio: [f64; 3],
    /// The peer's CPU time over ours: of the side's processes, and of the whole machine.
    pub cpu: Option<(f64, f64)>,
}

/// The legs that count, by round.
#[derive(Debug)]
struct Rounds(BTreeMap<u32, Vec<Leg>>);

impl Rounds {
    fn values(&self, round: Option<u32>, side: &str, metric: &str) -> Vec<f64> {
        let rounds = self.0.iter().filter(|(n, _)| round.is_none_or(|wanted| wanted == **n));
        let legs = rounds.flat_map(|(_, legs)| legs).filter(|leg| leg.side == side);
        legs.filter_map(|leg| leg.metrics.get(metric)).flatten().copied().collect()
    }

    /// The median over the rounds of the peer's cost over ours.
    fn cost_ratio(&self, workload: &str, of: impl Fn(&Spent) -> f64) -> Option<f64> {
        let ratio = |legs: &Vec<Leg>| {
            let side = |side: &str| {
                let spent = legs.iter().filter(|l| l.side == side).filter_map(|l| l.costs.get(workload));
                median(&spent.map(&of).collect::<Vec<_>>())
            };
            Some(side(PEER)? / side(OURS)?.max(1e-3))
        };
        median(&self.0.values().filter_map(ratio).collect::<Vec<_>>())
    }

    fn line(&self, row: Row) -> Option<Line> {
        let sum = |side: &str| {
            let all = self.values(None, side, row.metric);
            let p99 = (all.len() >= P99_SAMPLES).then(|| quantile(&all, 0.99)).flatten();
            Some((median(&all)?, p99))
        };
        let ratio = |round: &u32| {
            let of = |side| median(&self.values(Some(*round), side, row.metric));
            let (ours, peer) = (of(OURS)?, of(PEER)?);
            // A value at or below nothing (a clock's grain) is no reason for an infinite ratio.
            Some(if row.better == Better::Less { peer / ours.max(1e-3) } else { ours / peer.max(1e-3) })
        };
        let ratios: Vec<f64> = self.0.keys().filter_map(ratio).collect();
        let cpu = row.cost.and_then(|w| Some((self.cost_ratio(w, |s| s.side_ms)?, self.cost_ratio(w, |s| s.machine_ms)?)));
        Some(Line {
            row,
            ours: sum(OURS)?,
            peer: sum(PEER)?,
            ratio: [median(&ratios)?, quantile(&ratios, 0.0)?, quantile(&ratios, 1.0)?],
            cpu,
        })
    }
}

impl Line {
    /// Whether the target is met; none without one.
    pub fn met(&self) -> Option<bool> {
        match self.row.target {
            Target::Ratio(least) => Some(self.ratio[0] >= least),
            Target::AtMost(most) => Some(self.ours.0 <= most),
            Target::None => None,
        }
    }
}

/// Reads the legs and writes the results.
pub fn run(args: &ReportArgs) -> Result<()> {
    let mut legs = Vec::new();
    for entry in fs::read_dir(&args.legs).with_context(|| format!("read {}", args.legs.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "json") {
            let text = fs::read(&path)?;
            legs.push(serde_json::from_slice::<Leg>(&text).with_context(|| format!("read {}", path.display()))?);
        }
    }
    legs.sort_by_key(|leg| (leg.round, leg.leg));
    let (rounds, voids) = sort(&legs);
    let lines: Vec<Line> = ROWS.iter().filter_map(|row| rounds.line(*row)).collect();
    let text = table(&legs, &lines, &voids, &args.about);
    fs::create_dir_all(&args.out)?;
    fs::write(args.out.join("results.md"), &text)?;
    fs::write(args.out.join("results.svg"), svg::bars(&lines))?;
    let raw: Vec<String> = legs.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    fs::write(args.out.join("results.json"), format!("[\n{}\n]\n", raw.join(",\n")))?;
    println!("{text}");
    ensure!(!lines.is_empty(), "no round counts: {voids:?}");
    Ok(())
}

/// Leaves out the warm-up and the rounds in which a check failed, and says which those are.
fn sort(legs: &[Leg]) -> (Rounds, Vec<String>) {
    let mut rounds: BTreeMap<u32, Vec<Leg>> = BTreeMap::new();
    let warm_up_only = legs.iter().all(|leg| leg.round == 0);
    for leg in legs.iter().filter(|leg| leg.round > 0 || warm_up_only) {
        rounds.entry(leg.round).or_default().push(leg.clone());
    }
    let mut voids = Vec::new();
    rounds.retain(|round, legs| {
        let failures = legs.iter().flat_map(|leg| leg.failures.iter().map(move |f| format!("round {round}, {}: {f}", leg.side)));
        let before = voids.len();
        voids.extend(failures);
        voids.len() == before
    });
    (Rounds(rounds), voids)
}

fn table(legs: &[Leg], lines: &[Line], voids: &[String], about: &[String]) -> String {
    let mut text = String::from(
        "# berth next to containerd and runc\n\nWritten by `make bench`, `make bench-node` or `make bench-api`; docs/bench/README.md says what each row is.\n\n",
    );
    for line in about {
        let _ = writeln!(text, "- {line}");
    }
    let rounds = legs.iter().map(|l| l.round).filter(|r| (1..100).contains(r)).max().unwrap_or(0);
    let busy = legs.iter().map(|l| l.busy_percent).fold(0.0, f64::max);
    let _ = writeln!(
        text,
        "- {rounds} rounds after the warm-up, {} legs; the machine was at most {busy:.0} % busy with other things before a leg",
        legs.len()
    );
    if legs.iter().any(|l| l.quick && l.round > 0) {
        text.push_str("- **quick counts: whether everything works, not how fast**\n");
    }
    text.push_str("\n| workload | unit | berth, p50 / p99 | containerd, p50 / p99 | ratio [min–max] | CPU, side / machine | target | met |\n");
    text.push_str("|---|---|---|---|---|---|---|---|\n");
    for line in lines {
        let pair =
            |(p50, p99): (f64, Option<f64>)| p99.map_or_else(|| short(p50), |p99| format!("{} / {}", short(p50), short(p99)));
        let cpu = line.cpu.map_or_else(String::new, |(side, machine)| format!("{side:.1}× / {machine:.1}×"));
        let target = match line.row.target {
            Target::Ratio(least) => format!("≥ {least}×"),
            Target::AtMost(most) => format!("≤ {most} {}", line.row.unit),
            Target::None => String::new(),
        };
        let met = line.met().map_or("", |met| if met { "yes" } else { "**no**" });
        let [ratio, least, most] = line.ratio;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | **{ratio:.1}×** [{least:.1}–{most:.1}] | {cpu} | {target} | {met} |",
            line.row.label,
            line.row.unit,
            pair(line.ours),
            pair(line.peer),
        );
    }
    text.push_str("\nMore than 1× is in berth's favour; \"CPU\" is the peer's CPU time over berth's, of all processes of a side and of the whole machine.\n");
    if voids.is_empty() {
        text.push_str("Every check of every round passed.\n");
    } else {
        text.push_str("\nRounds that do not count, because a check failed:\n\n");
        voids.iter().for_each(|void| text.push_str(&format!("- {void}\n")));
    }
    memory(&mut text, legs);
    text
}

/// The roles of the memory, which have names of their own on each side.
fn memory(text: &mut String, legs: &[Leg]) {
    let mut roles: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for leg in legs.iter().filter(|l| l.round > 0) {
        for (metric, values) in leg.metrics.iter().filter(|(m, _)| m.contains(".PSS ")) {
            roles.entry((metric, &leg.side)).or_default().extend(values);
        }
    }
    if roles.is_empty() {
        return;
    }
    text.push_str("\nPSS by role, MiB: of the daemon in all, of the others a pod.\n\n| role | side | MiB |\n|---|---|---|\n");
    for ((metric, side), values) in roles {
        let _ = writeln!(text, "| {} | {side} | {:.3} |", metric.replace(".PSS ", ": "), median(&values).unwrap_or(0.0));
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(side: &str, round: u32, ms: &[f64]) -> Leg {
        let metrics = BTreeMap::from([("life1.RunPodSandbox".to_owned(), ms.to_vec())]);
        Leg { side: side.to_owned(), round, metrics, ..Default::default() }
    }

    #[test]
    fn the_ratio_is_the_median_of_the_rounds_without_the_warm_up() {
        let legs = [
            leg(OURS, 0, &[1.0]),
            leg(PEER, 0, &[1000.0]),
            leg(OURS, 1, &[2.0]),
            leg(PEER, 1, &[20.0]),
            leg(OURS, 2, &[1.0]),
            leg(PEER, 2, &[30.0]),
            leg(OURS, 3, &[1.0]),
            leg(PEER, 3, &[5.0]),
        ];
        let line = sort(&legs).0.line(ROWS[0]).unwrap();
        assert_eq!(line.ratio, [10.0, 5.0, 30.0]);
        assert_eq!(line.met(), Some(true));
    }

    #[test]
    fn a_failed_check_voids_its_round_and_is_told() {
        let mut bad = leg(OURS, 1, &[1.0]);
        bad.failures.push("no seccomp".to_owned());
        let legs = [bad, leg(PEER, 1, &[100.0]), leg(OURS, 2, &[1.0]), leg(PEER, 2, &[4.0])];
        let (rounds, voids) = sort(&legs);
        assert_eq!(rounds.line(ROWS[0]).unwrap().ratio, [4.0; 3]);
        assert_eq!(voids, ["round 1, berth: no seccomp"]);
        let text = table(&legs, &[rounds.line(ROWS[0]).unwrap()], &voids, &[]);
        assert!(text.contains("**no**") && text.contains("no seccomp"), "{text}");
    }
}
