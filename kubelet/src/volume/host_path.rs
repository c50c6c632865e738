//! hostPath volumes: the path itself, after its type was checked.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;

/// As [`check`]; of a pod whose containers have the path already it is made where it is missing, and not judged again.
pub fn set_up(source: &HostPathVolumeSource, begun: bool) -> Result<(), String> {
    match check(source) {
        Err(error) if begun => {
            tracing::info!(error, "a path of the host is not what it was; a container that runs keeps what it has");
            Ok(())
        }
        checked => checked,
    }
}

/// Checks the path against its type and makes what the type asks for; the error is the kubelet's message.
pub fn check(source: &HostPathVolumeSource) -> Result<(), String> {
    let path = Path::new(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let failed = |what: &str| Err(format!("hostPath type check failed: {} is not {what}", path.display()));
    let io_failed = |e: io::Error| format!("hostPath {}: {e}", path.display());
    match kind {
        "DirectoryOrCreate" if !path.exists() => {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(io_failed)?;
            return fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(io_failed);
        }
        "FileOrCreate" if !path.exists() => {
            let created = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path);
            return created.map(drop).map_err(io_failed);
        }
        _ => {}
    }
    let file_type = match fs::metadata(path) {
        Ok(metadata) => Some(metadata.file_type()),
        Err(_) => None,
    };
    let is = |test: fn(&fs::FileType) -> bool| file_type.as_ref().is_some_and(test);
    match kind {
        "" => Ok(()),
        "Directory" | "DirectoryOrCreate" if !is(fs::FileType::is_dir) => failed("a directory"),
        "File" | "FileOrCreate" if !is(fs::FileType::is_file) => failed("a file"),
        "Socket" if !is(FileTypeExt::is_socket) => failed("a socket file"),
        "CharDevice" if !is(FileTypeExt::is_char_device) => failed("a character device"),
        "BlockDevice" if !is(FileTypeExt::is_block_device) => failed("a block device"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(path: &Path, kind: &str) -> Result<(), String> {
        check(&HostPathVolumeSource { path: path.to_string_lossy().into_owned(), type_: Some(kind.to_owned()) })
    }

    #[test]
    fn each_type_is_checked_and_two_of_them_create() {
        let root = tempfile::tempdir().unwrap();
        let (dir, file) = (root.path().join("a/b"), root.path().join("f"));
        assert_eq!(run(&dir, ""), Ok(()));
        assert!(run(&dir, "Directory").unwrap_err().ends_with("a/b is not a directory"));
        run(&dir, "DirectoryOrCreate").unwrap();
        run(&dir, "Directory").unwrap();
        assert!(run(&file, "File").unwrap_err().ends_with("/f is not a file"));
        run(&file, "FileOrCreate").unwrap();
        run(&file, "File").unwrap();
        assert!(run(&file, "Directory").is_err() && run(&dir, "FileOrCreate").is_err());
        assert!(run(&root.path().join("no/f"), "FileOrCreate").is_err(), "the parent must exist");
        assert!(run(&file, "Socket").unwrap_err().ends_with("is not a socket file"));
        assert!(run(&file, "BlockDevice").unwrap_err().ends_with("is not a block device"));
        run(Path::new("/dev/null"), "CharDevice").unwrap();
    }
}
