//! The annotations that limit a pod's bandwidth: Kubernetes quantities of bits per second. Pure.

use crate::error::{Error, invalid};
use crate::spec::Map;

/// What the pod receives.
pub(crate) const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// What the pod sends.
pub(crate) const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// The least and the most that is a rate, as Kubernetes has it: 1k and 1P.
const REASONABLE: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// Refuses what is no rate.
pub(crate) fn check(annotations: &Map) -> Result<(), Error> {
    for name in [INGRESS, EGRESS] {
        if let Some(text) = annotations.get(name) {
            rate(text).map_err(|reason| invalid("annotations", format!("{name} {text:?}: {reason}")))?;
        }
    }
    Ok(())
}

/// Bits per second.
pub(crate) fn rate(text: &str) -> Result<u64, &'static str> {
    let bits = quantity(text).ok_or("not a quantity, as in 10M")?;
    match bits {
        small if small < *REASONABLE.start() => Err("unreasonably small (< 1kbit)"),
        large if large > *REASONABLE.end() => Err("unreasonably large (> 1Pbit)"),
        bits => Ok(bits),
    }
}

/// A Kubernetes quantity in whole units, rounded up: "10M", "1.5Gi", "1500", "1e6". Below zero is 0, above what u64 holds is its largest.
fn quantity(text: &str) -> Option<u64> {
    let (negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let split = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let (factor, mut exponent) = scale(suffix)?;
    if negative {
        return Some(0);
    }
    // All digits as one number, the point as a power of ten. More digits than this hold no rate.
    let mut digits = whole.trim_start_matches('0').to_owned();
    digits.push_str(fraction);
    exponent -= i32::try_from(fraction.len()).ok()?;
    if digits.trim_start_matches('0').is_empty() {
        return Some(0);
    }
    let value = digits.parse::<u128>().ok()?.saturating_mul(factor);
    let power = 10u128.checked_pow(exponent.unsigned_abs());
    let units = match (exponent < 0, power) {
        (false, Some(power)) => value.saturating_mul(power),
        (false, None) => u128::MAX,
        (true, Some(power)) => value.div_ceil(power),
        (true, None) => 1,
    };
    Some(u64::try_from(units).unwrap_or(u64::MAX))
}

/// What a suffix multiplies by: a factor, and a power of ten.
fn scale(suffix: &str) -> Option<(u128, i32)> {
    let binary = |n: u32| Some((1u128 << (10 * n), 0));
    match suffix {
        "" => Some((1, 0)),
        "n" => Some((1, -9)),
        "u" => Some((1, -6)),
        "m" => Some((1, -3)),
        "k" => Some((1, 3)),
        "M" => Some((1, 6)),
        "G" => Some((1, 9)),
        "T" => Some((1, 12)),
        "P" => Some((1, 15)),
        "E" => Some((1, 18)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        other => {
            let exponent = other.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            // Beyond this nothing is a rate, whichever way.
            is_number.then(|| (1, exponent.parse::<i32>().unwrap_or(99).clamp(-99, 99)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_annotations_are_quantities_of_bits() {
        for (text, want) in [
            ("10M", Some(10_000_000)),
            ("1Ki", Some(1024)),
            ("1.5Ki", Some(1536)),
            ("1500", Some(1500)),
            ("+2k", Some(2000)),
            ("1e6", Some(1_000_000)),
            ("2E3", Some(2000)),
            ("1P", Some(1_000_000_000_000_000)),
            ("1000.5", Some(1001)),
            ("2000000m", Some(2000)),
            (".5M", Some(500_000)),
            ("0.0000000000000000001", None),
            ("2P", None),
            ("1E", None),
            ("1e99999999999", None),
            ("7", None),
            ("0", None),
            ("-1M", None),
            ("x", None),
            ("", None),
            (".", None),
            ("M", None),
            ("1m", None),
            ("10 M", None),
            ("10MB", None),
            ("1.2.3M", None),
            ("1e", None),
            ("10Mbit", None),
        ] {
            assert_eq!(rate(text).ok(), want, "{text:?}");
        }
    }

    #[test]
    fn a_malformed_bandwidth_is_refused_by_the_annotations_name() {
        let with = |name: &str, value: &str| check(&[(name.to_owned(), value.to_owned())].into());
        with(INGRESS, "10M").unwrap();
        with("other/ingress-bandwidth", "fast").unwrap();
        let error = with(EGRESS, "fast").unwrap_err().to_string();
        assert!(error.contains(EGRESS) && error.contains("fast"), "{error}");
    }
}
