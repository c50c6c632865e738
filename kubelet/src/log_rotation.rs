//! Logs of runtimes that do not rotate them: a file that is too long is renamed and the runtime opens it anew. berth's own log
//! writers rotate at the byte limit that they are given, and are left alone. Nothing is compressed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_cri_api::v1 as cri;
use k8s_openapi::jiff::Timestamp;

use crate::config::{Config, LogLimits};
use crate::cri::{self as calls, Runtime};

/// Looks at the logs of running containers every [`crate::Timing::log_monitor`]. Never returns.
pub(crate) async fn run(config: Arc<Config>, runtime: Runtime) {
    loop {
        tokio::time::sleep(config.timing.log_monitor).await;
        let containers = match runtime.list_containers(None).await {
            Ok(containers) => containers,
            Err(error) => {
                tracing::debug!(error = %calls::message(&error), "logs are not looked at");
                continue;
            }
        };
        let running = containers.into_iter().filter(|container| container.state() == cri::ContainerState::ContainerRunning);
        for container in running {
            let Ok(Some(status)) = runtime.container_status(&container.id).await else { continue };
            let path = PathBuf::from(status.log_path);
            // Containers of others, or without a log.
            if !path.starts_with(&config.pod_logs_dir) {
                continue;
            }
            if let Err(error) =
                rotate(&path, config.log_limits, config.clock.now(), || runtime.reopen_container_log(&container.id)).await
            {
                tracing::warn!(path = %path.display(), %error, "the log is not rotated");
            }
        }
    }
}

/// Renames a log that is too long and has it opened anew; when that fails the name is given back. One that is not there is opened anew
/// too: the kubelet may have been killed between the two, and the runtime still writes the renamed file.
async fn rotate<F: Future<Output = crate::Result<()>>>(
    path: &Path,
    limits: LogLimits,
    now: Timestamp,
    reopen: impl FnOnce() -> F,
) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(file) if file.len() > limits.max_bytes => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return reopen().await.map_err(|error| io::Error::other(calls::message(&error)));
        }
        Err(error) => return Err(error),
    }
    // The live file and the one that it becomes count too.
    let keep = usize::try_from(limits.max_files).unwrap_or(usize::MAX).saturating_sub(2);
    let mut rotated = rotated_files(path)?;
    while rotated.len() > keep {
        fs::remove_file(rotated.remove(0))?;
    }
    let name = format!("{}.{}", path.display(), now.strftime("%Y%m%d-%H%M%S"));
    let mut target = PathBuf::from(&name);
    let mut n = 1;
    while target.exists() {
        // A clock that went back, or two rotations in a second.
        target = PathBuf::from(format!("{name}.{n}"));
        n += 1;
    }
    fs::rename(path, &target)?;
    if let Err(error) = reopen().await {
        fs::rename(&target, path)?;
        return Err(io::Error::other(calls::message(&error)));
    }
    Ok(())
}

/// The rotated files of a log, the oldest first: by when they were last written, since names follow the wall clock.
fn rotated_files(path: &Path) -> io::Result<Vec<PathBuf>> {
    let prefix = format!("{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let mut found = Vec::new();
    for entry in fs::read_dir(path.parent().unwrap_or(path))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    const LIMITS: LogLimits = LogLimits { max_bytes: 10, max_files: 3 };

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_long_log_is_renamed_and_the_oldest_one_goes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("0.log");
        for second in 0..4 {
            fs::write(&path, vec![b'x'; 11]).unwrap();
            let now = Timestamp::from_second(second).unwrap();
            rotate(&path, LIMITS, now, || async {
                fs::write(&path, "").unwrap();
                Ok(())
            })
            .await
            .unwrap();
            // The order is that of the files' times.
            fs::File::open(rotated_files(&path).unwrap().pop().unwrap()).unwrap();
        }
        assert_eq!(names(root.path()), ["0.log", "0.log.19700101-000002", "0.log.19700101-000003"]);
        rotate(&path, LIMITS, Timestamp::UNIX_EPOCH, || async { panic!("it is short") }).await.unwrap();
    }

    #[tokio::test]
    async fn a_log_whose_rotation_was_cut_short_is_opened_anew() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("0.log");
        fs::write(root.path().join("0.log.19700101-000000"), "x").unwrap();
        rotate(&path, LIMITS, Timestamp::UNIX_EPOCH, || async {
            fs::write(&path, "").unwrap();
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(names(root.path()), ["0.log", "0.log.19700101-000000"]);
    }

    #[tokio::test]
    async fn a_log_that_the_runtime_does_not_open_anew_keeps_its_name() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("0.log");
        fs::write(&path, vec![b'x'; 11]).unwrap();
        let failed = || async { Err(Error::Setting { field: "x".into(), problem: "y".into() }) };
        assert!(rotate(&path, LIMITS, Timestamp::UNIX_EPOCH, failed).await.is_err());
        assert_eq!(names(root.path()), ["0.log"]);
    }
}
