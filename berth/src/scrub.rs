//! Takes a secret of the command line out of the sight of others: every user may read `/proc/PID/cmdline`, every helper process gets the
//! environment, and a `berth join` lives on as the node.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

/// Overwrites every occurrence of the secret in this process's arguments and environment with as many `x`.
pub fn scrub(secret: &str) -> io::Result<()> {
    let (begin, end) = strings(&fs::read_to_string("/proc/self/stat")?)?;
    let memory = File::options().read(true).write(true).open("/proc/self/mem")?;
    let mut text = vec![0; usize::try_from(end.saturating_sub(begin)).map_err(io::Error::other)?];
    memory.read_exact_at(&mut text, begin)?;
    for at in occurrences(&text, secret.as_bytes()) {
        memory.write_all_at("x".repeat(secret.len()).as_bytes(), begin + at as u64)?;
    }
    Ok(())
}

/// Where arguments and environment lie: fields 48 to 51 of proc_pid_stat(5), arg_start, arg_end, env_start and env_end.
fn strings(stat: &str) -> io::Result<(u64, u64)> {
    // The second field is the name, which may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).and_then(|f| f.trim().parse::<u64>().ok());
    match (field(48), field(51)) {
        (Some(begin), Some(end)) if 0 < begin && begin < end => Ok((begin, end)),
        _ => Err(io::Error::other("/proc/self/stat does not tell where the arguments are")),
    }
}

fn occurrences<'a>(text: &'a [u8], secret: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    text.windows(secret.len().max(1)).enumerate().filter(move |(_, window)| *window == secret).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strings_are_found_behind_a_name_with_anything_in_it() {
        let rest: Vec<String> = (3..=52).map(|n: u32| n.to_string()).collect();
        assert_eq!(strings(&format!("7 (a) b) {}", rest.join(" "))).unwrap(), (48, 51));
        assert!(strings("7 (a) S 1").is_err() && strings("").is_err());
    }

    #[test]
    fn every_occurrence_is_found_and_what_is_not_there_is_no_error() {
        assert_eq!(occurrences(b"a secret, secret", b"secret").collect::<Vec<_>>(), [2, 10]);
        assert_eq!(occurrences(b"", b"secret").count(), 0);
        scrub("this is in neither of them").unwrap();
    }
}
