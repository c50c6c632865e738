//! What only /proc tells about a container's processes. A process that ends meanwhile does not count.

use std::path::Path;

/// Counts over the processes of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Processes {
    /// Processes.
    pub(super) count: u64,
    /// Open descriptors.
    pub(super) descriptors: u64,
    /// Those of them that are sockets.
    pub(super) sockets: u64,
    /// How many descriptors its first process may have; `u64::MAX` is any number.
    pub(super) soft_limit: Option<u64>,
}

/// Looks at processes. Blocking.
pub(super) fn read(pids: &[i32], first: Option<i32>) -> Processes {
    let mut out = Processes { count: pids.len() as u64, ..Default::default() };
    for pid in pids {
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            out.descriptors += 1;
            out.sockets += u64::from(std::fs::read_link(entry.path()).is_ok_and(|target| is_socket(&target)));
        }
    }
    let text = first.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/limits")).ok());
    out.soft_limit = text.and_then(|text| soft_limit(&text));
    out
}

fn is_socket(target: &Path) -> bool {
    target.as_os_str().as_encoded_bytes().starts_with(b"socket:")
}

/// The soft limit in the line `Max open files   1024   4096   files`.
fn soft_limit(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_the_kernels_table() {
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax processes   1  2  processes\nMax open files            1024                 4096                 files\n";
        assert_eq!(soft_limit(text), Some(1024));
        assert_eq!(soft_limit("Max open files unlimited unlimited files"), Some(u64::MAX));
        assert_eq!(soft_limit(""), None);
    }

    #[test]
    fn the_sockets_of_a_process_are_among_its_descriptors() {
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let got = read(&[own], Some(own));
        assert!(got.sockets >= 2 && got.descriptors >= got.sockets && got.soft_limit.is_some(), "{got:?}");
        assert_eq!(read(&[i32::MAX], None).descriptors, 0);
    }
}
