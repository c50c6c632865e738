//! Kubernetes quantities (`500m`, `128Mi`, `1e3`) as exact numbers. Knows no resource names.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// An exact amount, in billionths of the unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Amount(i128);

/// Text that is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a quantity (like 500m, 2, 128Mi)")]
pub struct NotAQuantity(String);

const NANO: i128 = 1_000_000_000;

impl Amount {
    /// Parses a quantity.
    pub fn parse(text: &str) -> Result<Amount, NotAQuantity> {
        parse(text.trim()).ok_or_else(|| NotAQuantity(text.to_owned()))
    }

    /// The amount of a quantity that has been validated; zero for one that does not parse.
    pub fn of(quantity: &Quantity) -> Amount {
        Amount::parse(&quantity.0).unwrap_or_default()
    }

    /// Whole units, rounded up.
    pub fn units(self) -> i64 {
        clamp(ceil_div(self.0, NANO))
    }

    /// Thousandths, rounded up.
    pub fn millis(self) -> i64 {
        clamp(ceil_div(self.0, NANO / 1000))
    }

    /// `ceil(self / divisor)`; a zero divisor counts as one.
    pub fn divided_by(self, divisor: Amount) -> i64 {
        clamp(ceil_div(self.0, if divisor.0 == 0 { NANO } else { divisor.0 }))
    }

    /// Whether nothing is asked for.
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Whether the amount is below zero.
    pub fn is_negative(self) -> bool {
        self.0 < 0
    }
}

impl std::ops::Add for Amount {
    type Output = Amount;
    fn add(self, other: Amount) -> Amount {
        Amount(self.0.saturating_add(other.0))
    }
}

impl std::iter::Sum for Amount {
    fn sum<I: Iterator<Item = Amount>>(iter: I) -> Amount {
        iter.fold(Amount::default(), |a, b| a + b)
    }
}

fn clamp(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

fn ceil_div(value: i128, by: i128) -> i128 {
    let floor = value.div_euclid(by);
    if value.rem_euclid(by) == 0 { floor } else { floor + 1 }
}

fn parse(text: &str) -> Option<Amount> {
    let (negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let (multiplier, exponent) = suffix_scale(suffix)?;
    // value = digits * multiplier * 10^(exponent - fraction length), in nano
    let digits: i128 = format!("{whole}{fraction}")
        .trim_start_matches('0')
        .parse()
        .or_else(|e| match number {
            _ if format!("{whole}{fraction}").bytes().all(|b| b == b'0') => Ok(0),
            _ => Err(e),
        })
        .ok()?;
    let power = i32::try_from(fraction.len()).ok().map(|len| exponent + 9 - len)?;
    let scaled = digits.checked_mul(multiplier)?;
    let value = match u32::try_from(power) {
        Ok(power) => scaled.checked_mul(10i128.checked_pow(power)?)?,
        Err(_) => ceil_div(scaled, 10i128.checked_pow(power.unsigned_abs())?),
    };
    Some(Amount(if negative { -value } else { value }))
}

/// Multiplier and power of ten of a suffix.
fn suffix_scale(suffix: &str) -> Option<(i128, i32)> {
    let binary = |power: u32| Some((1024i128.pow(power), 0));
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
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let power: i32 = exponent.strip_prefix('+').unwrap_or(exponent).parse().ok()?;
            (-18..=18).contains(&power).then_some((1, power))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_exact_in_every_notation() {
        let cases = [
            ("1", 1, 1000),
            ("500m", 1, 500),
            ("0.5", 1, 500),
            ("1.5", 2, 1500),
            ("128Mi", 134_217_728, 134_217_728_000),
            ("1k", 1000, 1_000_000),
            ("1e3", 1000, 1_000_000),
            ("1E3", 1000, 1_000_000),
            ("100u", 1, 1),
            ("0", 0, 0),
            ("0.0", 0, 0),
            (".5Gi", 536_870_912, 536_870_912_000),
            ("1.", 1, 1000),
            ("+2", 2, 2000),
            ("-1500m", -1, -1500),
            ("1E", 1_000_000_000_000_000_000, i64::MAX),
        ];
        for (text, units, millis) in cases {
            let amount = Amount::parse(text).unwrap();
            assert_eq!((amount.units(), amount.millis()), (units, millis), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "abc", "1 Gi", "1Gib", "Mi", "1.2.3", "--1", "1e", "0x10", "1e99"] {
            assert!(Amount::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn divisors_round_up() {
        let parse = |t| Amount::parse(t).unwrap();
        assert_eq!(parse("1500m").divided_by(parse("1")), 2);
        assert_eq!(parse("1500m").divided_by(parse("1m")), 1500);
        assert_eq!(parse("100Mi").divided_by(parse("1Mi")), 100);
        assert_eq!(parse("100Mi").divided_by(Amount::default()), 104_857_600);
    }
}
