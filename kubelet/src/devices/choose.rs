//! Pure: which devices of a resource a container gets. Asks nobody; where the plugin may have a preference it says so.

use std::collections::BTreeSet;

/// What is known of a resource when devices are chosen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool {
    /// Devices that work.
    pub healthy: BTreeSet<String>,
    /// Devices that other containers have.
    pub taken: BTreeSet<String>,
}

/// What a container asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// The resource.
    pub resource: &'a str,
    /// How many devices.
    pub count: usize,
    /// Devices of the pod's init containers, which have ended by then.
    pub reusable: &'a BTreeSet<String>,
}

/// What comes of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// These.
    Devices(BTreeSet<String>),
    /// There are several possibilities: the plugin may prefer some.
    Several {
        /// To choose from.
        available: BTreeSet<String>,
        /// What it is going to be in any case.
        certain: BTreeSet<String>,
    },
}

/// Chooses. `preferred` is the plugin's answer, where it was asked; the errors are the upstream's words.
pub(crate) fn choose(wish: Wish<'_>, pool: &Pool, preferred: Option<&BTreeSet<String>>) -> Result<Choice, String> {
    let Wish { resource, count, reusable } = wish;
    if pool.healthy.is_empty() {
        return Err(format!("no healthy devices present; cannot allocate unhealthy devices {resource}"));
    }
    let certain: BTreeSet<String> = reusable.intersection(&pool.healthy).take(count).cloned().collect();
    if certain.len() == count {
        return Ok(Choice::Devices(certain));
    }
    let available: BTreeSet<String> =
        pool.healthy.iter().filter(|id| !pool.taken.contains(*id) && !certain.contains(*id)).cloned().collect();
    let needed = count - certain.len();
    if available.len() < needed {
        let there = available.len();
        return Err(format!("requested number of devices unavailable for {resource}. Requested: {needed}, Available: {there}"));
    }
    let Some(preferred) = preferred else {
        return Ok(Choice::Several { available: available.union(&certain).cloned().collect(), certain });
    };
    let first = preferred.intersection(&available);
    let rest = available.difference(preferred);
    let chosen = first.chain(rest).take(needed).cloned();
    Ok(Choice::Devices(chosen.chain(certain.iter().cloned()).collect()))
}

/// Whether devices that a container has had can be used again.
pub(crate) fn check_kept(resource: &str, kept: &BTreeSet<String>, pool: &Pool) -> Result<(), String> {
    if pool.healthy.is_empty() {
        return Err(format!("no healthy devices present; cannot allocate unhealthy devices {resource}"));
    }
    match kept.is_subset(&pool.healthy) {
        true => Ok(()),
        false => Err(format!("previously allocated devices are no longer healthy; cannot allocate unhealthy devices {resource}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &str) -> BTreeSet<String> {
        names.split_whitespace().map(str::to_owned).collect()
    }

    fn chosen(count: usize, healthy: &str, taken: &str, reusable: &str, preferred: Option<&str>) -> String {
        let reusable = set(reusable);
        let wish = Wish { resource: "v.io/d", count, reusable: &reusable };
        let pool = Pool { healthy: set(healthy), taken: set(taken) };
        let list = |ids: BTreeSet<String>| ids.into_iter().collect::<Vec<_>>().join(" ");
        match choose(wish, &pool, preferred.map(set).as_ref()) {
            Ok(Choice::Devices(ids)) => list(ids),
            Ok(Choice::Several { available, certain }) => format!("of {} with {}", list(available), list(certain)),
            Err(text) => text,
        }
    }

    #[test]
    fn the_plugin_may_prefer_some_of_what_is_free_and_healthy() {
        for (count, healthy, taken, reusable, preferred, expected) in [
            (1, "a b c", "a", "", None, "of b c with "),
            (1, "a b c", "a", "", Some(""), "b"),
            (1, "a b c", "a", "", Some("c"), "c"),
            // What it may not have, and too little, are filled up.
            (2, "a b c d", "a", "", Some("a d"), "b d"),
            (2, "a b c", "a", "a", None, "of a b c with a"),
            (2, "a b c", "a", "a", Some("c"), "a c"),
            (1, "a b c", "a", "a", None, "a"),
            (1, "b c", "", "a", None, "of b c with "),
        ] {
            assert_eq!(chosen(count, healthy, taken, reusable, preferred), expected);
        }
    }

    #[test]
    fn refusals_have_the_upstreams_words() {
        assert_eq!(
            chosen(2, "a b", "b", "", None),
            "requested number of devices unavailable for v.io/d. Requested: 2, Available: 1"
        );
        assert_eq!(chosen(1, "", "", "", None), "no healthy devices present; cannot allocate unhealthy devices v.io/d");
        let pool = |healthy: &str| Pool { healthy: set(healthy), taken: BTreeSet::new() };
        assert_eq!(check_kept("v.io/d", &set("a"), &pool("a b")), Ok(()));
        let lost = "previously allocated devices are no longer healthy; cannot allocate unhealthy devices v.io/d";
        assert_eq!(check_kept("v.io/d", &set("a"), &pool("b")), Err(lost.to_owned()));
    }
}
