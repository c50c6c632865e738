//! Finding and executing the container's program, and saying why that fails the way runc says it.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use berth_linux::process::execve;
use rustix::fs::FileType;

use crate::error::errno_text;
use crate::launch::StartError;
use crate::plan::ProcessPlan;

const ENOENT: i32 = 2;
const EACCES: i32 = 13;
const EISDIR: i32 = 21;

/// Executes the program. Returns only why it could not.
pub(super) fn execute(process: &ProcessPlan) -> StartError {
    let Some(name) = process.args.first() else { return failed("no program".into(), ENOENT) };
    if name.as_bytes().contains(&b'/') {
        let error = execve(name, &process.args, &process.env);
        return explain(name, &error);
    }
    if !name.as_bytes().is_empty() {
        for dir in process.search_path() {
            let Ok(candidate) = CString::new(dir.join(OsStr::from_bytes(name.as_bytes())).into_os_string().as_bytes()) else {
                continue;
            };
            if !is_program(&candidate) {
                continue;
            }
            let error = execve(&candidate, &process.args, &process.env);
            return explain(&candidate, &error);
        }
    }
    failed(format!("exec: {:?}: executable file not found in $PATH", name.to_string_lossy()), ENOENT)
}

/// A file that this user may execute, as far as can be asked.
fn is_program(path: &CString) -> bool {
    match rustix::fs::stat(path.as_c_str()) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
            rustix::fs::access(path.as_c_str(), rustix::fs::Access::EXEC_OK).is_ok()
        }
        _ => false,
    }
}

fn failed(message: String, errno: i32) -> StartError {
    StartError { message, errno: Some(errno) }
}

fn explain(path: &CString, error: &io::Error) -> StartError {
    let shown = path.to_string_lossy();
    let errno = error.raw_os_error().unwrap_or(0);
    let file = Path::new(OsStr::from_bytes(path.as_bytes()));
    match (errno, rustix::fs::stat(file)) {
        // What the name leads to, not what it needs (an interpreter, a loader).
        (ENOENT, Err(stat)) => failed(format!("exec: {shown:?}: stat {shown}: {}", errno_text(&stat.into())), ENOENT),
        (EACCES, Ok(stat)) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
            failed(format!("exec: {shown:?}: is a directory"), EISDIR)
        }
        (EACCES, Ok(_)) if rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_err() => {
            failed(format!("exec: {shown:?}: permission denied"), EACCES)
        }
        _ => failed(format!("exec {shown}: {}", errno_text(error)), errno),
    }
}
