//! The counters of a network namespace's interfaces.

use std::os::fd::BorrowedFd;

/// An interface; bytes, packets, errors and drops.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) rx: [u64; 4],
    pub(crate) tx: [u64; 4],
}

/// The interfaces, without the loopback. Blocking.
pub(crate) fn read(netns: BorrowedFd<'_>) -> Option<Vec<Interface>> {
    let text = berth_linux::ns::with_netns(netns, || std::fs::read_to_string("/proc/thread-self/net/dev")).ok()?.ok()?;
    Some(parse(&text))
}

/// [`read`] for many namespaces, at the price of one thread. Blocking.
pub(crate) fn read_each<'a>(namespaces: impl Iterator<Item = BorrowedFd<'a>> + Send) -> Vec<Option<Vec<Interface>>> {
    let table = || std::fs::read_to_string("/proc/thread-self/net/dev").ok();
    let tables = berth_linux::ns::in_each_netns(namespaces, table).unwrap_or_default();
    tables.into_iter().map(|table| table.flatten().map(|text| parse(&text))).collect()
}

/// The lines of /proc/net/dev.
fn parse(text: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let n: Vec<u64> = numbers.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect();
        let four = |at: usize| std::array::from_fn(|i| n.get(at + i).copied().unwrap_or(0));
        Some(Interface { name: name.trim().to_owned(), rx: four(0), tx: four(8) })
    };
    text.lines().skip(2).filter_map(line).filter(|i| i.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_from_the_kernels_table() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 100 2 3 7 0 0 0 0 200 4 5 6 0 0 0 0\n";
        let got = parse(text);
        assert_eq!(got, [Interface { name: "eth0".into(), rx: [100, 2, 3, 7], tx: [200, 4, 5, 6] }]);
    }
}
