//! Where the foreign tools are that `e2e/tools.sh` built.

use std::path::{Path, PathBuf};

/// The folder of a tool whose name starts like this, e.g. `containerd`; none when the tools were not built.
#[must_use]
pub fn dir(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("BERTH_TOOLS").map(PathBuf::from).or_else(|| {
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|cache| cache.join("berth-tools"))
    })?;
    // lib.sh says which version of each tool is meant.
    let script = format!(". {}/lib.sh; echo ${}", env!("CARGO_MANIFEST_DIR"), name.to_uppercase().replace('-', "_"));
    let out = std::process::Command::new("bash").args(["-c", &script]).env("BERTH_TOOLS", cache).output().ok()?;
    let path = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
    path.is_dir().then_some(path)
}

/// A program of a tool.
///
/// # Panics
/// When it was not built: `make e2e` and `make test` build it.
#[must_use]
pub fn program(tool: &str, program: &str) -> PathBuf {
    let path = dir(tool).map(|dir| dir.join(program)).filter(|path| path.exists());
    path.unwrap_or_else(|| panic!("{program} is not in the tools' cache: run e2e/tools.sh"))
}

/// The berth binary under test.
///
/// # Panics
/// When it was not built: `make build` builds it.
#[must_use]
pub fn berth() -> PathBuf {
    let built = || {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let triples = std::fs::read_dir(target).into_iter().flatten().flatten();
        triples.map(|t| t.path().join("release/berth")).find(|p| p.exists())
    };
    let path = std::env::var_os("BERTH_BIN").map(PathBuf::from).or_else(built);
    path.filter(|p| p.exists()).expect("no berth binary: run make build, or set BERTH_BIN")
}
