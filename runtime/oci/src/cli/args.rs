//! Options as Go's programs take them: `-x`, `--x`, `--x value`, `--x=value`.

/// An option: its names, the first of which counts, and whether it takes a value.
pub(super) type Known = (&'static [&'static str], bool);

pub(super) const GLOBAL: &[Known] = &[
    (&["root"], true),
    (&["log"], true),
    (&["log-format"], true),
    (&["rootless"], true),
    (&["criu"], true),
    (&["debug"], false),
    (&["systemd-cgroup"], false),
    (&["help", "h"], false),
    (&["version", "v"], false),
];
pub(super) const NONE: &[Known] = &[];
pub(super) const CREATE: &[Known] = &[
    (&["bundle", "b"], true),
    (&["console-socket"], true),
    (&["pidfd-socket"], true),
    (&["pid-file"], true),
    (&["preserve-fds"], true),
    (&["no-pivot"], false),
    (&["no-new-keyring"], false),
    (&["no-subreaper"], false),
    (&["detach", "d"], false),
    (&["keep"], false),
];
pub(super) const KILL: &[Known] = &[(&["all", "a"], false)];
pub(super) const DELETE: &[Known] = &[(&["force", "f"], false)];
pub(super) const PS: &[Known] = &[(&["format", "f"], true)];
pub(super) const LIST: &[Known] = &[(&["format", "f"], true), (&["quiet", "q"], false)];
pub(super) const SPEC: &[Known] = &[(&["bundle", "b"], true), (&["rootless"], false)];
pub(super) const EXEC: &[Known] = &[
    (&["process", "p"], true),
    (&["console-socket"], true),
    (&["pidfd-socket"], true),
    (&["pid-file"], true),
    (&["cwd"], true),
    (&["env", "e"], true),
    (&["user", "u"], true),
    (&["additional-gids", "g"], true),
    (&["cap", "c"], true),
    (&["apparmor"], true),
    (&["process-label"], true),
    (&["cgroup"], true),
    (&["preserve-fds"], true),
    (&["tty", "t"], false),
    (&["detach", "d"], false),
    (&["no-new-privs"], false),
    (&["no-subreaper"], false),
    (&["ignore-paused"], false),
];
pub(super) const UPDATE: &[Known] = &[
    (&["resources", "r"], true),
    (&["memory"], true),
    (&["memory-reservation"], true),
    (&["memory-swap"], true),
    (&["cpu-share"], true),
    (&["cpu-quota"], true),
    (&["cpu-period"], true),
    (&["cpu-burst"], true),
    (&["cpu-idle"], true),
    (&["cpuset-cpus"], true),
    (&["cpuset-mems"], true),
    (&["pids-limit"], true),
    (&["blkio-weight"], true),
];

/// Options that were given, and what is left.
#[derive(Debug, Default)]
pub(super) struct Flags {
    given: Vec<(&'static str, String)>,
    pub(super) rest: Vec<String>,
}

impl Flags {
    /// The last value of an option; an empty one counts as none.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let last = self.given.iter().rev().find(|(given, _)| *given == name);
        last.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// All values of an option.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.given.iter().filter(move |(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// Whether an option without a value was given.
    pub(super) fn is(&self, name: &str) -> bool {
        self.all(name).last().is_some_and(|value| value == "true")
    }

    /// The value of an option as a number.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        self.get(name).map(|value| value.parse().map_err(|_| format!("--{name}: {value:?} is not a number"))).transpose()
    }
}

/// Reads options. `in_front`: only those in front of the first other word, which may be followed by another program's.
pub(super) fn parse(words: &[String], known: &[Known], in_front: bool) -> Result<Flags, String> {
    let mut flags = Flags::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|name| !name.is_empty()) else {
            if word == "--" {
                flags.rest.extend(words.by_ref().cloned());
                break;
            }
            flags.rest.push(word.clone());
            if in_front {
                flags.rest.extend(words.by_ref().cloned());
            }
            continue;
        };
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (option, None),
        };
        let Some((names, takes_value)) = known.iter().find(|(names, _)| names.contains(&name)) else {
            return Err(format!("flag provided but not defined: {word}"));
        };
        let value = match (takes_value, value) {
            (_, Some(value)) => value,
            (false, None) => "true".to_owned(),
            (true, None) => words.next().cloned().ok_or_else(|| format!("flag needs an argument: {word}"))?,
        };
        flags.given.push((names[0], value));
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_are_taken_as_go_programs_take_them() {
        let flags = parse(&words("--root /r -log=x --debug create --bundle b id"), GLOBAL, true).unwrap();
        assert_eq!((flags.get("root"), flags.get("log"), flags.is("debug")), (Some("/r"), Some("x"), true));
        let flags = parse(&flags.rest[1..], CREATE, false).unwrap();
        assert_eq!((flags.get("bundle"), flags.rest.as_slice()), (Some("b"), &["id".to_owned()][..]));
        let flags = parse(&words("kill id KILL --all"), KILL, false).unwrap();
        assert!(flags.is("all") && flags.rest == ["kill", "id", "KILL"]);
        let flags = parse(&words("-t --env A=1 -e B=2 id ls -l"), EXEC, true).unwrap();
        assert_eq!(flags.all("env").collect::<Vec<_>>(), ["A=1", "B=2"]);
        assert_eq!(flags.rest, ["id", "ls", "-l"]);
        assert!(parse(&words("--frob"), NONE, false).unwrap_err().contains("--frob"));
        assert!(parse(&words("--bundle"), CREATE, false).unwrap_err().contains("needs an argument"));
    }
}
