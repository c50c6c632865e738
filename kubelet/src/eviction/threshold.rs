//! Eviction thresholds: which signal, how low it may get, for how long. Pure: parsing and arithmetic.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::quantity::Amount;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// Memory of the machine that is not in its working set.
    MemoryAvailable,
    /// Memory of the pods' share that is not in their working set.
    AllocatableMemoryAvailable,
    /// Bytes of the file system that holds the kubelet's folder.
    NodeFsAvailable,
    /// Its inodes.
    NodeFsInodesFree,
    /// Bytes of the file system that holds images.
    ImageFsAvailable,
    /// Its inodes.
    ImageFsInodesFree,
    /// Bytes of the file system that holds containers' own layers.
    ContainerFsAvailable,
    /// Its inodes.
    ContainerFsInodesFree,
    /// Process numbers.
    PidAvailable,
}

impl Signal {
    /// All of them.
    pub const ALL: [Signal; 9] = [
        Signal::MemoryAvailable,
        Signal::AllocatableMemoryAvailable,
        Signal::NodeFsAvailable,
        Signal::NodeFsInodesFree,
        Signal::ImageFsAvailable,
        Signal::ImageFsInodesFree,
        Signal::ContainerFsAvailable,
        Signal::ContainerFsInodesFree,
        Signal::PidAvailable,
    ];

    /// As configurations write it.
    pub fn name(self) -> &'static str {
        match self {
            Signal::MemoryAvailable => "memory.available",
            Signal::AllocatableMemoryAvailable => "allocatableMemory.available",
            Signal::NodeFsAvailable => "nodefs.available",
            Signal::NodeFsInodesFree => "nodefs.inodesFree",
            Signal::ImageFsAvailable => "imagefs.available",
            Signal::ImageFsInodesFree => "imagefs.inodesFree",
            Signal::ContainerFsAvailable => "containerfs.available",
            Signal::ContainerFsInodesFree => "containerfs.inodesFree",
            Signal::PidAvailable => "pid.available",
        }
    }

    /// The resource that is short, as messages call it.
    pub fn resource(self) -> &'static str {
        match self {
            Signal::MemoryAvailable | Signal::AllocatableMemoryAvailable => "memory",
            Signal::NodeFsAvailable | Signal::ImageFsAvailable | Signal::ContainerFsAvailable => "ephemeral-storage",
            Signal::NodeFsInodesFree | Signal::ImageFsInodesFree | Signal::ContainerFsInodesFree => "inodes",
            Signal::PidAvailable => "pids",
        }
    }

    /// The node's condition while it is low.
    pub fn condition(self) -> &'static str {
        match self.resource() {
            "memory" => "MemoryPressure",
            "pids" => "PIDPressure",
            _ => "DiskPressure",
        }
    }

    fn parse(name: &str) -> Option<Signal> {
        Signal::ALL.into_iter().find(|signal| signal.name() == name)
    }
}

/// An amount, or a part of the capacity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quota {
    /// So much.
    Amount(i64),
    /// A part, from 0 to 1.
    Part(f64),
}

impl Quota {
    /// Of a capacity.
    pub fn of(self, capacity: i64) -> i64 {
        match self {
            Quota::Amount(amount) => amount,
            // Capacities are far below 2^53: the product is exact enough, as in the upstream.
            #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
            Quota::Part(part) => (capacity as f64 * part) as i64,
        }
    }

    /// `100Mi` or `10%`; `None` for the two percentages that switch a threshold off.
    fn parse(text: &str) -> Result<Option<Quota>, String> {
        if let Some(number) = text.strip_suffix('%') {
            let part: f64 = number.parse().map_err(|_| format!("{text:?} is no percentage"))?;
            if !(0.0..=100.0).contains(&part) {
                return Err(format!("{text:?} is no percentage from 0% to 100%"));
            }
            return Ok((part > 0.0 && part < 100.0).then_some(Quota::Part(part / 100.0)));
        }
        let amount = Amount::parse(text).map_err(|error| error.to_string())?;
        if amount.is_negative() || amount.is_zero() {
            return Err(format!("{text:?}: a threshold is more than nothing"));
        }
        Ok(Some(Quota::Amount(amount.units())))
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Quota::Amount(amount) => f.write_str(&binary(*amount)),
            Quota::Part(part) => write!(f, "{}%", part * 100.0),
        }
    }
}

/// An amount of bytes as quantities are printed: `100Mi`, `1536Ki`, `7`.
pub fn binary(bytes: i64) -> String {
    for (unit, name) in [(1i64 << 40, "Ti"), (1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")] {
        if bytes >= unit && bytes % unit == 0 {
            return format!("{}{name}", bytes / unit);
        }
    }
    bytes.to_string()
}

/// A signal that has become too low is answered by evicting pods.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// What is watched.
    pub signal: Signal,
    /// It is low below this.
    pub below: Quota,
    /// A soft threshold: low for this long.
    pub grace: Option<Duration>,
    /// So much more is to be free before it counts as over.
    pub reclaim: Option<Quota>,
}

/// What the configuration says of thresholds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// `evictionHard`; `None`: not given.
    pub hard: Option<BTreeMap<String, String>>,
    /// `evictionSoft`.
    pub soft: BTreeMap<String, String>,
    /// `evictionSoftGracePeriod`.
    pub grace: BTreeMap<String, Duration>,
    /// `evictionMinimumReclaim`.
    pub reclaim: BTreeMap<String, String>,
    /// `mergeDefaultEvictionSettings`.
    pub merge: bool,
    /// `pods` is among `enforceNodeAllocatable`.
    pub allocatable: bool,
}

/// The upstream's hard thresholds.
const DEFAULTS: [(&str, &str); 5] = [
    ("memory.available", "100Mi"),
    ("nodefs.available", "10%"),
    ("nodefs.inodesFree", "5%"),
    ("imagefs.available", "15%"),
    ("imagefs.inodesFree", "5%"),
];

/// The thresholds of a configuration; the error is the field and what is wrong with it.
pub fn thresholds(given: &Given) -> Result<Vec<Threshold>, (&'static str, String)> {
    let mut hard = given.hard.clone().unwrap_or_default();
    if given.hard.is_none() || given.merge {
        for (signal, value) in DEFAULTS {
            hard.entry(signal.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    let reclaim = amounts("evictionMinimumReclaim", &given.reclaim)?;
    let mut found = Vec::new();
    for (signal, below) in amounts("evictionHard", &hard)? {
        found.push(Threshold { signal, below, grace: None, reclaim: reclaim.get(&signal).copied() });
    }
    for (signal, below) in amounts("evictionSoft", &given.soft)? {
        let Some(grace) = given.grace.get(signal.name()) else {
            return Err((
                "evictionSoftGracePeriod",
                format!("grace period must be specified for the soft eviction threshold {}", signal.name()),
            ));
        };
        found.push(Threshold { signal, below, grace: Some(*grace), reclaim: reclaim.get(&signal).copied() });
    }
    if given.allocatable {
        let of_pods = found.iter().find(|t| t.signal == Signal::MemoryAvailable && t.grace.is_none()).copied();
        found.extend(of_pods.map(|t| Threshold { signal: Signal::AllocatableMemoryAvailable, ..t }));
    }
    Ok(found)
}

fn amounts(field: &'static str, texts: &BTreeMap<String, String>) -> Result<BTreeMap<Signal, Quota>, (&'static str, String)> {
    let mut amounts = BTreeMap::new();
    for (name, text) in texts {
        let signal = Signal::parse(name).ok_or_else(|| (field, format!("unsupported eviction signal {name}")))?;
        let quota = Quota::parse(text).map_err(|problem| (field, format!("{name}: {problem}")))?;
        amounts.extend(quota.map(|quota| (signal, quota)));
    }
    Ok(amounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn the_defaults_hold_until_a_hard_threshold_is_given() {
        let names = |given: &Given| thresholds(given).unwrap().iter().map(|t| t.signal.name()).collect::<Vec<_>>();
        assert_eq!(names(&Given::default()).len(), 5);
        let given = Given { hard: Some(map(&[("pid.available", "5%")])), ..Given::default() };
        assert_eq!(names(&given), ["pid.available"]);
        assert_eq!(names(&Given { merge: true, ..given }).len(), 6);
        let off = Given { hard: Some(map(&[("memory.available", "0%"), ("nodefs.available", "100%")])), ..Given::default() };
        assert!(names(&off).is_empty());
        let with_pods = Given { allocatable: true, ..Given::default() };
        assert!(names(&with_pods).contains(&"allocatableMemory.available"));
    }

    #[test]
    fn thresholds_that_cannot_be_meant_are_refused_by_name() {
        let soft = |signal: &str, value: &str| Given { soft: map(&[(signal, value)]), ..Given::default() };
        for (given, field, text) in [
            (soft("memory.available", "1Gi"), "evictionSoftGracePeriod", "memory.available"),
            (soft("memory.free", "1Gi"), "evictionSoft", "unsupported eviction signal memory.free"),
            (soft("memory.available", "-1"), "evictionSoft", "more than nothing"),
            (soft("memory.available", "150%"), "evictionSoft", "percentage"),
            (Given { reclaim: map(&[("x", "1")]), ..Given::default() }, "evictionMinimumReclaim", "unsupported"),
        ] {
            let (found, problem) = thresholds(&given).unwrap_err();
            assert_eq!(found, field);
            assert!(problem.contains(text), "{problem}");
        }
    }

    #[test]
    fn parts_are_of_the_capacity() {
        assert_eq!(Quota::Part(0.1).of(1000), 100);
        assert_eq!(Quota::Amount(7).of(1000), 7);
        assert_eq!((Quota::Part(0.15).to_string(), Quota::Amount(100 << 20).to_string()), ("15%".into(), "100Mi".into()));
        assert_eq!((binary(1536 << 10), binary(7)), ("1536Ki".into(), "7".into()));
    }
}
