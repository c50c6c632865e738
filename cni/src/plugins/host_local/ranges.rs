//! Ranges of addresses: parsed and completed as the reference plugin does, walked round-robin.

use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::fields::Fields;
use crate::cidr::{next_ip, previous_ip};
use crate::{Cidr, Error, Result};

const PLUGIN: &str = "host-local";

/// A piece of a subnet. All addresses are inside it, the first not after the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub subnet: Cidr,
    pub first: IpAddr,
    pub last: IpAddr,
    pub gateway: IpAddr,
}

#[derive(Debug, Clone, Deserialize)]
struct RawRange {
    subnet: Cidr,
    #[serde(default, with = "crate::result::optional_ip")]
    first: Option<IpAddr>,
    #[serde(default, with = "crate::result::optional_ip")]
    last: Option<IpAddr>,
    #[serde(default, with = "crate::result::optional_ip")]
    gateway: Option<IpAddr>,
}

impl Range {
    /// Takes `subnet`, `rangeStart`, `rangeEnd` and `gateway` from the fields; none without `subnet`.
    pub(super) fn take(fields: &mut Fields<'_>) -> Result<Option<Self>> {
        let Some(subnet) = fields.take::<Cidr>("subnet")? else { return Ok(None) };
        let mut ip = |name| -> Result<Option<IpAddr>> {
            match fields.take::<String>(name)?.as_deref() {
                None | Some("") => Ok(None),
                Some(text) => {
                    let invalid = |_| Error::invalid(PLUGIN, format!("{name} {text:?} is not an address"));
                    text.parse().map(Some).map_err(invalid)
                }
            }
        };
        let raw = RawRange { subnet, first: ip("rangeStart")?, last: ip("rangeEnd")?, gateway: ip("gateway")? };
        raw.complete().map(Some)
    }

    pub(super) fn of_object(object: Map<String, Value>) -> Result<Self> {
        let mut fields = Fields::nested(PLUGIN, "ipam.ranges.", object);
        let range = Self::take(&mut fields)?.ok_or_else(|| Error::invalid(PLUGIN, "a range has no subnet"))?;
        fields.finish()?;
        Ok(range)
    }

    fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.first.is_ipv4() && self.first <= ip && ip <= self.last
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.first) || self.contains(other.last) || other.contains(self.first)
    }
}

impl RawRange {
    fn complete(self) -> Result<Range> {
        let subnet = self.subnet;
        let invalid = |reason: String| Error::invalid(PLUGIN, reason);
        if subnet.network() != subnet {
            return Err(invalid(format!("subnet {subnet} has host bits set")));
        }
        if subnet.prefix() > if subnet.is_ipv4() { 30 } else { 126 } {
            return Err(invalid(format!("subnet {subnet} is too small to allocate from")));
        }
        // The prefix leaves at least four addresses: the second and the last but one exist.
        let second = next_ip(subnet.addr()).unwrap_or(subnet.addr());
        let end = if subnet.is_ipv4() { previous_ip(subnet.last()).unwrap_or(subnet.last()) } else { subnet.last() };
        let range = Range {
            subnet,
            first: self.first.unwrap_or(second),
            last: self.last.unwrap_or(end),
            gateway: self.gateway.unwrap_or(second),
        };
        for (name, ip) in [("rangeStart", range.first), ("rangeEnd", range.last)] {
            if !subnet.contains(ip) {
                return Err(invalid(format!("{name} {ip} is not in subnet {subnet}")));
            }
        }
        if range.first > range.last {
            return Err(invalid(format!("rangeStart {} is after rangeEnd {}", range.first, range.last)));
        }
        Ok(range)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Ranges of one family; a pod gets one address out of each set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RangeSet(pub Vec<Range>);

impl RangeSet {
    pub(super) fn check(&self) -> Result<()> {
        let Some(first) = self.0.first() else { return Err(Error::invalid(PLUGIN, "a range set is empty")) };
        for (at, range) in self.0.iter().enumerate() {
            if range.first.is_ipv4() != first.first.is_ipv4() {
                return Err(Error::invalid(PLUGIN, format!("range set {self} mixes address families")));
            }
            if self.0[..at].iter().any(|other| other.overlaps(range)) {
                return Err(Error::invalid(PLUGIN, format!("ranges of set {self} overlap")));
            }
        }
        Ok(())
    }

    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().any(|a| other.0.iter().any(|b| a.overlaps(b)))
    }

    /// Every address once, beginning after `last` where that is in the set: an address that was given back rests as long as
    /// there are others. Gateways are left out.
    pub(super) fn walk(&self, last: Option<IpAddr>) -> impl Iterator<Item = (IpAddr, &Range)> {
        let begin = last.and_then(|ip| self.0.iter().position(|r| r.contains(ip)).map(|at| (at, ip)));
        let (at, after) = begin.map_or((0, None), |(at, ip)| (at, Some(ip)));
        let count = self.0.len();
        // The first range from after `last`, the others whole, and the first again up to `last`.
        (0..=count)
            .flat_map(move |step| {
                let range = &self.0[(at + step) % count];
                let (first, last) = match (step, after) {
                    (0, Some(ip)) => (next_ip(ip).filter(|ip| *ip <= range.last), Some(range.last)),
                    (0, None) => (Some(range.first), Some(range.last)),
                    (step, Some(ip)) if step == count => (Some(range.first), Some(ip)),
                    (step, None) if step == count => (None, None),
                    _ => (Some(range.first), Some(range.last)),
                };
                std::iter::successors(first, move |ip| next_ip(*ip).filter(|ip| Some(*ip) <= last)).map(move |ip| (ip, range))
            })
            .filter(|(ip, range)| *ip != range.gateway)
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, range) in self.0.iter().enumerate() {
            write!(f, "{}{range}", if at > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn range(value: Value) -> Result<Range> {
        Range::of_object(value.as_object().cloned().unwrap())
    }

    #[test]
    fn a_subnet_is_completed_as_the_reference_does() {
        let v4 = range(json!({"subnet": "10.1.2.0/28"})).unwrap();
        assert_eq!((v4.to_string().as_str(), v4.gateway.to_string().as_str()), ("10.1.2.1-10.1.2.14", "10.1.2.1"));
        let v6 = range(json!({"subnet": "fd00::/124"})).unwrap();
        assert_eq!((v6.to_string().as_str(), v6.gateway.to_string().as_str()), ("fd00::1-fd00::f", "fd00::1"));
        let part =
            range(json!({"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.10", "rangeEnd": "10.1.2.20", "gateway": "10.1.2.254"}));
        assert_eq!(part.unwrap().to_string(), "10.1.2.10-10.1.2.20");
    }

    #[test]
    fn nonsense_is_refused() {
        for value in [
            json!({"subnet": "10.1.2.1/28"}),
            json!({"subnet": "10.1.2.0/31"}),
            json!({"subnet": "10.1.2.0/28", "rangeStart": "10.1.3.1"}),
            json!({"subnet": "10.1.2.0/28", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.3"}),
            json!({"subnet": "10.1.2.0/28", "rangeEnd": "x"}),
            json!({"subnet": "10.1.2.0/28", "first": "x"}),
            json!({}),
        ] {
            assert!(range(value.clone()).is_err(), "{value}");
        }
        let set = |ranges: &[&str]| RangeSet(ranges.iter().map(|s| range(json!({"subnet": s})).unwrap()).collect());
        assert!(set(&["10.0.0.0/24", "10.0.1.0/24"]).check().is_ok());
        assert!(set(&["10.0.0.0/24", "10.0.0.0/25"]).check().is_err());
        assert!(set(&["10.0.0.0/24", "fd00::/64"]).check().is_err());
        assert!(RangeSet(Vec::new()).check().is_err());
    }

    #[test]
    fn a_walk_visits_every_address_once_and_begins_after_the_last() {
        let set =
            RangeSet(vec![range(json!({"subnet": "10.0.0.0/29"})).unwrap(), range(json!({"subnet": "10.0.1.0/30"})).unwrap()]);
        let walk =
            |last: Option<&str>| set.walk(last.map(|ip| ip.parse().unwrap())).map(|(ip, _)| ip.to_string()).collect::<Vec<_>>();
        let all = ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.1.2"];
        assert_eq!(walk(None), all);
        assert_eq!(walk(Some("10.9.9.9")), all, "an address of an older configuration is forgotten");
        assert_eq!(walk(Some("10.0.0.4")), ["10.0.0.5", "10.0.0.6", "10.0.1.2", "10.0.0.2", "10.0.0.3", "10.0.0.4"]);
        assert_eq!(walk(Some("10.0.1.2")), all, "the end wraps around");
        assert_eq!(walk(Some("10.0.0.6")), ["10.0.1.2", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    }
}
