//! AppArmor: which profile a container's processes change to, and our own default profile's way into the kernel. Must not know
//! how a process changes to a profile: that is the OCI core's.

use std::ffi::CString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, pipe, spawn_exec};

use crate::error::{Error, file, invalid};
use crate::spec::{Profile, Security};

/// Our profile's name in the kernel.
pub(crate) const DEFAULT_PROFILE: &str = "berth-default";
const DEFAULT_TEXT: &str = include_str!("apparmor/berth-default");
/// Where distributions put the parser. An agent's PATH is whatever its unit says.
const PARSERS: [&str; 3] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/local/sbin/apparmor_parser"];
/// Says which kernel features a profile was written for. Without it newer parsers mediate what ours does not speak of, e.g. user namespaces.
const ABI: (&str, &str) = ("/etc/apparmor.d/abi/3.0", "abi <abi/3.0>,\n");
/// Compiling takes less than a second on slow machines; a parser that takes longer is stuck.
const PARSER_TIME: Duration = Duration::from_secs(30);
/// A parser that was stuck is left alone for so long.
const PARSER_AGAIN: Duration = Duration::from_secs(300);
/// A killed parser gets this long to be gone; one in uninterruptible sleep is left to its disk.
const PARSER_ENDS: Duration = Duration::from_secs(2);
/// How much of what a parser says is told: what fits into a pipe.
const SAID: usize = 64 << 10;

/// What the decision depends on.
#[derive(Debug, Clone, Copy)]
struct Host<'a> {
    /// The kernel labels processes, and says which profiles it has.
    active: bool,
    /// Our profile can be loaded, or is.
    default: bool,
    /// The kernel's list, a profile a line: `name (mode)`.
    loaded: &'a str,
}

/// What a container gets.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// No change of profile.
    Unconfined,
    /// As above, though a profile was due: nothing here could load it.
    NoParser,
    /// Our profile, which may have to be loaded first.
    Default,
    /// A profile that the administrator has loaded.
    Loaded(String),
}

/// As containerd does: what was asked for by name and cannot be had is an error; a container that asks for nothing runs unconfined
/// where there is no AppArmor or nothing to load a profile with.
fn choose(security: &Security, host: Host<'_>) -> Result<Choice, Error> {
    let missing = |what: &str| match host.active {
        false => Error::Unsupported { what: "apparmor", reason: format!("{what}: AppArmor is not active on this machine") },
        true => Error::Unsupported { what: "apparmor", reason: format!("{what}: apparmor_parser is not installed") },
    };
    match &security.apparmor {
        Some(Profile::Unconfined) => Ok(Choice::Unconfined),
        // The explicit wish first: it is refused for privileged containers too where it could not be had by others.
        Some(Profile::RuntimeDefault) if !host.default => Err(missing("profile RuntimeDefault")),
        None if !host.active => Ok(Choice::Unconfined),
        None | Some(Profile::RuntimeDefault) if security.privileged => Ok(Choice::Unconfined),
        None if !host.default => Ok(Choice::NoParser),
        None | Some(Profile::RuntimeDefault) => Ok(Choice::Default),
        Some(Profile::Localhost(reference)) => {
            let name = reference.strip_prefix("localhost/").unwrap_or(reference);
            if !host.active {
                return Err(missing(&format!("profile {name:?}")));
            }
            if !is_loaded(host.loaded, name) {
                return Err(invalid("apparmor", format!("apparmor profile not found {name}")));
            }
            Ok(Choice::Loaded(name.to_owned()))
        }
    }
}

/// A profile's name may hold anything; the mode is the last word.
fn is_loaded(list: &str, name: &str) -> bool {
    !name.is_empty() && list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(loaded, _)| loaded == name))
}

/// AppArmor of this machine. One of a server.
pub(crate) struct AppArmor {
    /// Holds the copy of our profile that was loaded in this boot.
    folder: PathBuf,
    loading: Mutex<Loading>,
}

/// How the last loading went.
#[derive(Default)]
struct Loading {
    /// The parser did not end: when, and its error's text.
    stuck: Option<(Instant, String)>,
}

impl Loading {
    /// Loads with what may get stuck. One that got stuck is not tried again for [`PARSER_AGAIN`]: each container that is to be
    /// created waits for it.
    fn load(
        &mut self,
        limit: Duration,
        now: impl Fn() -> Instant,
        load: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let begun = now();
        if let Some((at, reason)) = self.stuck.as_ref().filter(|(at, _)| begun.duration_since(*at) < PARSER_AGAIN) {
            let left = PARSER_AGAIN.saturating_sub(begun.duration_since(*at)).as_secs();
            let reason = format!("{reason}; tried again in {left} s");
            return Err(Error::AppArmor { profile: DEFAULT_PROFILE, reason });
        }
        self.stuck = None;
        let result = load();
        let ended = now();
        if let Err(Error::AppArmor { reason, .. }) = &result
            && ended.duration_since(begun) >= limit
        {
            self.stuck = Some((ended, reason.clone()));
        }
        result
    }
}

/// Whether the kernel labels processes.
fn is_active() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"))
}

fn parser() -> Option<&'static Path> {
    PARSERS.iter().map(Path::new).find(|path| path.exists())
}

impl AppArmor {
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, loading: Mutex::default() }
    }

    /// Of the status: what a container that names no profile gets here.
    pub(crate) fn default_profile(&self) -> &'static str {
        match is_active() && parser().is_some() {
            true => DEFAULT_PROFILE,
            false => "unconfined",
        }
    }

    /// The profile to change to; empty = none. `warn` is told what the administrator should know. Blocking: asks the kernel, and
    /// loads our profile where it is missing.
    pub(crate) fn profile(&self, security: &Security, warn: impl FnOnce(&str)) -> Result<String, Error> {
        let loaded = match is_active() {
            true => loaded_profiles()?,
            false => None,
        };
        let parser = parser();
        let list = loaded.as_deref().unwrap_or_default();
        let host = Host {
            active: loaded.is_some(),
            default: loaded.is_some() && (parser.is_some() || is_loaded(list, DEFAULT_PROFILE)),
            loaded: list,
        };
        match choose(security, host)? {
            Choice::Unconfined => Ok(String::new()),
            Choice::NoParser => {
                warn("AppArmor is on, but without apparmor_parser there is no default profile: containers run unconfined");
                Ok(String::new())
            }
            Choice::Default => {
                if let Some(parser) = parser {
                    self.ensure_default(parser)?;
                }
                Ok(DEFAULT_PROFILE.to_owned())
            }
            Choice::Loaded(name) => Ok(name),
        }
    }

    /// Loads our profile unless this very text is in the kernel. Tools of the administrator may have removed it since the last container.
    fn ensure_default(&self, parser: &Path) -> Result<(), Error> {
        let copy = self.folder.join(DEFAULT_PROFILE);
        let abi = if Path::new(ABI.0).exists() { ABI.1 } else { "" };
        let text = format!("{abi}{DEFAULT_TEXT}");
        let mut one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let known = std::fs::read(&copy).is_ok_and(|old| old == text.as_bytes());
        if known && loaded_profiles()?.is_some_and(|list| is_loaded(&list, DEFAULT_PROFILE)) {
            return Ok(());
        }
        // The copy is the record of what was loaded: under its name only once the kernel has it.
        let fresh = copy.with_extension("new");
        std::fs::create_dir_all(&self.folder).map_err(file("create", &self.folder))?;
        std::fs::write(&fresh, &text).map_err(file("write", &fresh))?;
        one.load(PARSER_TIME, Instant::now, || load(parser, &fresh, PARSER_TIME))?;
        std::fs::rename(&fresh, &copy).map_err(file("rename", &fresh))?;
        tracing::info!(profile = DEFAULT_PROFILE, "AppArmor profile loaded");
        Ok(())
    }
}

/// The kernel's list; none where it cannot be seen, as inside a container.
fn loaded_profiles() -> Result<Option<String>, Error> {
    let path = Path::new("/sys/kernel/security/apparmor/profiles");
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file("read", path)(error)),
    }
}

/// Compiles a profile and puts it in the place of one of its name.
fn load(parser: &Path, profile: &Path, limit: Duration) -> Result<(), Error> {
    let failed = |reason: String| Error::AppArmor { profile: DEFAULT_PROFILE, reason };
    let io = |error: std::io::Error| failed(error.to_string());
    let text = |s: &std::ffi::OsStr| CString::new(s.as_encoded_bytes()).unwrap_or_default();
    let (mut reader, writer) = pipe().map(|(r, w)| (std::fs::File::from(r), w)).map_err(io)?;
    rustix::io::ioctl_fionbio(&reader, true).map_err(|errno| io(errno.into()))?;
    let arguments = ["apparmor_parser", "--replace", "--skip-cache", "--quiet"].iter().map(|a| text(a.as_ref()));
    let (_, child) = spawn_exec(Spawn {
        exe: Executable::Path(text(parser.as_os_str())),
        argv: arguments.chain([text(profile.as_os_str())]).collect(),
        envp: Vec::new(),
        fds: vec![(writer, 2)],
        cwd: Some(c"/".into()),
    })
    .map_err(|error| failed(crate::error::text(&error)))?;
    let child = PidFd::from(child);
    if !child.wait_ended(Some(limit)).map_err(io)? {
        let _ = child.signal(9);
        let _ = child.wait_ended(Some(PARSER_ENDS));
        let _ = child.wait(true);
        return Err(failed(format!("{} did not end in {} s", parser.display(), limit.as_secs())));
    }
    match child.wait(false).map_err(io)? {
        Some(status) if status.success() => Ok(()),
        status => {
            // It ended without a reader. What it started may have the pipe still: its end is not waited for.
            let mut said = vec![0; SAID];
            let length = reader.read(&mut said).unwrap_or_default();
            let said = String::from_utf8_lossy(&said[..length]).trim().replace('\n', "; ");
            Err(failed(format!("{}: {status:?}: {said}", parser.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOADED: &str = "mine (enforce)\nodd (name) (complain)\n";
    const FULL: Host<'_> = Host { active: true, default: true, loaded: LOADED };
    const NO_PARSER: Host<'_> = Host { default: false, ..FULL };
    const OFF: Host<'_> = Host { active: false, default: false, loaded: "" };

    #[test]
    fn a_parser_that_was_stuck_is_left_alone_for_a_while() {
        let (begun, clock) = (Instant::now(), std::cell::Cell::new(Duration::ZERO));
        let now = || begun + clock.get();
        let mut loading = Loading::default();
        let refused = || Err(Error::AppArmor { profile: DEFAULT_PROFILE, reason: "stuck".into() });
        assert!(loading.load(PARSER_TIME, now, refused).is_err());
        assert!(loading.load(PARSER_TIME, now, || Ok(())).is_ok(), "a refusal that came at once is no reason to wait");
        let stuck = || {
            clock.set(clock.get() + PARSER_TIME);
            refused()
        };
        assert!(loading.load(PARSER_TIME, now, stuck).is_err());
        clock.set(clock.get() + Duration::from_secs(100));
        let error = loading.load(PARSER_TIME, now, || unreachable!("asked too early")).unwrap_err().to_string();
        assert!(error.ends_with("stuck; tried again in 200 s"), "{error}");
        clock.set(clock.get() + Duration::from_secs(200));
        assert!(loading.load(PARSER_TIME, now, || Ok(())).is_ok());
    }

    fn chosen(profile: Option<Profile>, privileged: bool, host: Host<'_>) -> Result<Choice, String> {
        let security = Security { privileged, apparmor: profile, ..Default::default() };
        choose(&security, host).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_named_is_had_or_refused_and_what_is_not_named_gets_the_default_where_there_is_one() {
        use Choice::{Default, Loaded, NoParser, Unconfined};
        let (default, local) = (Profile::RuntimeDefault, |name: &str| Some(Profile::Localhost(name.into())));
        for (profile, privileged, host, want) in [
            (None, false, FULL, Default),
            (None, true, FULL, Unconfined),
            (None, false, NO_PARSER, NoParser),
            (None, false, OFF, Unconfined),
            (Some(default.clone()), false, FULL, Default),
            (Some(default.clone()), true, FULL, Unconfined),
            (Some(Profile::Unconfined), false, FULL, Unconfined),
            (Some(Profile::Unconfined), false, OFF, Unconfined),
            (local("mine"), false, FULL, Loaded("mine".into())),
            (local("localhost/mine"), true, NO_PARSER, Loaded("mine".into())),
            (local("odd (name)"), false, FULL, Loaded("odd (name)".into())),
        ] {
            assert_eq!(chosen(profile.clone(), privileged, host), Ok(want), "{profile:?} {privileged} {host:?}");
        }
        for (profile, host, want) in [
            (Some(default.clone()), OFF, "not active"),
            (Some(default), NO_PARSER, "apparmor_parser is not installed"),
            (local("mine"), OFF, "not active"),
            (local("odd"), FULL, "not found odd"),
            (local("localhost/"), FULL, "not found"),
        ] {
            let error = chosen(profile, false, host).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn a_parser_that_fails_is_an_error_with_its_own_words() {
        use berth_testkit::write_program;
        let dir = berth_testkit::TempState::new();
        let script = dir.path().join("parser");
        write_program(&script, "#!/bin/sh\necho \"syntax error in $4\" >&2\nexit 3\n");
        let error = load(&script, Path::new("/some/profile"), PARSER_TIME).unwrap_err().to_string();
        assert!(error.contains("syntax error in /some/profile") && error.contains(DEFAULT_PROFILE), "{error}");
        write_program(&script, "#!/bin/sh\nexit 0\n");
        load(&script, Path::new("/some/profile"), PARSER_TIME).unwrap();
        assert!(load(Path::new("/no/such/parser"), Path::new("/x"), PARSER_TIME).is_err());
        // What it starts may have its standard error, and outlive it.
        write_program(&script, "#!/bin/sh\nsleep 5 &\necho no >&2\nexit 3\n");
        let begun = std::time::Instant::now();
        assert!(load(&script, Path::new("/some/profile"), PARSER_TIME).unwrap_err().to_string().ends_with(": no"));
        assert!(begun.elapsed() < Duration::from_secs(5));
        write_program(&script, "#!/bin/sh\nexec sleep 1000\n");
        let error = load(&script, Path::new("/some/profile"), Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("did not end in"), "{error}");
    }
}
