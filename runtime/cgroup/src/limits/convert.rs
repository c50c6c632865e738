//! Values of v1, which the OCI specification and CRI speak, in the measures of v2. Pure functions.

/// The weight of v2 (1 to 10000) for shares of v1 (2 to 262144): linear, as the kubelet does it. 0 is unset and stays 0.
#[must_use]
pub fn shares_to_weight(shares: u64) -> u64 {
    if shares == 0 { 0 } else { 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142 }
}

/// The shares of v1 for a weight of v2.
#[must_use]
pub fn weight_to_shares(weight: u64) -> u64 {
    if weight == 0 { 0 } else { 2 + (weight.clamp(1, 10_000) - 1) * 262_142 / 9999 }
}

/// The weight of v2's `io.weight` (1 to 10000) for one of v1 (10 to 1000).
#[must_use]
pub fn blkio_weight_to_io(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

/// The limit of swap alone, as v2 has it, for a limit of memory and swap together. -1 is unlimited. `None` when there is
/// nothing to set, which is also so for a swap limit without a memory limit: then nobody can say how much of it is swap.
#[must_use]
pub fn swap_to_v2(limit: Option<i64>, swap: Option<i64>) -> Option<i64> {
    match (limit.unwrap_or(0), swap.unwrap_or(0)) {
        (_, 0) => None,
        (_, swap) if swap < 0 => Some(-1),
        (limit, _) if limit <= 0 => None,
        (limit, swap) => Some((swap - limit).max(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_weights_follow_the_formula() {
        for (shares, weight) in [(0, 0), (1, 1), (2, 1), (1024, 39), (4096, 157), (262_144, 10_000), (999_999, 10_000)] {
            assert_eq!(shares_to_weight(shares), weight, "{shares}");
        }
        assert_eq!(weight_to_shares(10_000), 262_144);
        assert_eq!(weight_to_shares(1), 2);
        assert_eq!(blkio_weight_to_io(10), 1);
        assert_eq!(blkio_weight_to_io(1000), 10_000);
    }

    #[test]
    fn swap_is_what_remains_after_memory() {
        for (limit, swap, wanted) in [
            (Some(100), Some(100), Some(0)),
            (Some(100), Some(150), Some(50)),
            (Some(100), Some(-1), Some(-1)),
            (Some(-1), Some(-1), Some(-1)),
            (Some(100), Some(0), None),
            (Some(100), None, None),
            (None, Some(100), None),
        ] {
            assert_eq!(swap_to_v2(limit, swap), wanted, "{limit:?} {swap:?}");
        }
    }
}
