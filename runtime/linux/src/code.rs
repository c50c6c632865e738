//! The pages of the program's own code. Policy is the caller's.

use std::ffi::c_void;
use std::fs;
use std::io;

use rustix::mm::{Advice, madvise};

/// Unmaps the code that has run so far. What runs again is mapped again from the page cache, what only ran at the start stays out
/// (1.4 of an idle server's 16.3 MiB of PSS). Nothing can be lost, as code is never written to; data and constants that the loader
/// relocated are in other mappings and are not touched.
pub fn forget() -> io::Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    for (start, end) in maps.lines().filter_map(|line| code_of(line, &program.to_string_lossy())) {
        let address = std::ptr::with_exposed_provenance_mut::<c_void>(start);
        // SAFETY: a private mapping of a file without write permission has the file's bytes; after MADV_DONTNEED it has them again at
        // the next access (madvise(2)).
        unsafe { madvise(address, end - start, Advice::LinuxDontNeed) }?;
    }
    Ok(())
}

/// The range of a line of /proc/PID/maps (proc_pid_maps(5)) that is this program's code.
fn code_of(line: &str, program: &str) -> Option<(usize, usize)> {
    let mut fields = line.splitn(6, ' ');
    let (range, permissions) = (fields.next()?, fields.next()?);
    let path = fields.nth(3)?.trim_start();
    if permissions != "r-xp" || path != program {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_code_is_meant() {
        let line =
            |permissions: &str, path: &str| format!("5581c0a00000-5581c0b00000 {permissions} 00123000 fe:01 4711    {path}");
        assert_eq!(code_of(&line("r-xp", "/usr/bin/berth"), "/usr/bin/berth"), Some((0x5581_c0a0_0000, 0x5581_c0b0_0000)));
        for (permissions, path) in [("r--p", "/usr/bin/berth"), ("rw-p", "/usr/bin/berth"), ("r-xp", "/lib/ld.so"), ("r-xp", "")]
        {
            assert_eq!(code_of(&line(permissions, path), "/usr/bin/berth"), None);
        }
        assert_eq!(code_of(&line("r-xp", "/a b (deleted)"), "/a b (deleted)").map(|(start, _)| start), Some(0x5581_c0a0_0000));
    }

    #[test]
    fn the_program_runs_on_without_the_code_that_it_had_mapped() {
        let program = fs::read_link("/proc/self/exe").expect("a program").to_string_lossy().into_owned();
        let resident = || {
            let text = fs::read_to_string("/proc/self/smaps").expect("readable");
            let mut ours = false;
            let mut sum = 0;
            for line in text.lines() {
                if line.split(' ').next().is_some_and(|word| word.contains('-')) {
                    ours = code_of(line, &program).is_some();
                } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| ours) {
                    sum += kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
                }
            }
            sum
        };
        let before = resident();
        assert!(before > 0);
        forget().expect("unmapped");
        // Reading smaps runs code again, and the kernel maps what lies around it.
        assert!(resident() < before, "of {before} KiB");
    }
}
