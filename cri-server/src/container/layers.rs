//! Reading one file of an image without mounting it: the overlay's rules (whiteouts, opaque folders) and symbolic links are
//! followed over the layers' folders, one component at a time, never out of them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

/// How many symbolic links one lookup may follow.
const LINKS: usize = 40;

/// The layers of an image, top first.
pub(crate) struct Layers {
    roots: Vec<OwnedFd>,
}

enum Found {
    Nothing,
    Folder(Vec<OwnedFd>),
    Link(OsString),
    File(OwnedFd),
}

impl Layers {
    /// Opens the layers' folders.
    pub(crate) fn open(links: &Path, lowers: &[String]) -> io::Result<Self> {
        let roots = lowers
            .iter()
            .map(|name| {
                Ok(rustix::fs::open(links.join(name), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { roots })
    }

    /// The content of a regular file; none where the image has no such file. At most `limit` bytes.
    pub(crate) fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.resolve(path)? else { return Ok(None) };
        let open = berth_linux::memfd::reopen(file.as_fd(), OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK)?;
        let mut content = Vec::new();
        std::fs::File::from(open).take(limit).read_to_end(&mut content)?;
        Ok(Some(content))
    }

    /// The regular file that a path means.
    fn resolve(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let mut todo: VecDeque<OsString> = components(path);
        let mut stack: Vec<Vec<OwnedFd>> = vec![duplicate(&self.roots)?];
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let here = &stack[stack.len() - 1];
            match lookup(here, &name)? {
                Found::Nothing => return Ok(None),
                Found::Folder(folders) => stack.push(folders),
                Found::File(file) => return Ok(todo.is_empty().then_some(file)),
                Found::Link(target) => {
                    links += 1;
                    if links > LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = std::path::PathBuf::from(target);
                    if target.is_absolute() {
                        stack.truncate(1);
                    }
                    let mut rest = components(&target);
                    rest.append(&mut todo);
                    todo = rest;
                }
            }
        }
        Ok(None)
    }
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

fn duplicate(fds: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    fds.iter().map(OwnedFd::try_clone).collect()
}

/// One name in a merged folder (`here`, top first).
fn lookup(here: &[OwnedFd], name: &OsString) -> io::Result<Found> {
    let mut folders = Vec::new();
    for folder in here {
        let entry = match rustix::fs::openat(
            folder,
            name.as_os_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Ok(entry) => entry,
            Err(Errno::NOENT) => continue,
            Err(e) => return Err(e.into()),
        };
        let stat = rustix::fs::statat(&entry, c"", AtFlags::EMPTY_PATH)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let opaque = is_opaque(&entry);
                folders.push(entry);
                if opaque {
                    break;
                }
            }
            // A whiteout: what lies below is deleted.
            FileType::CharacterDevice if stat.st_rdev == 0 => break,
            _ if !folders.is_empty() => break,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&entry, c"", Vec::new())?;
                return Ok(Found::Link(OsString::from_vec(target.into_bytes())));
            }
            FileType::RegularFile => return Ok(Found::File(entry)),
            _ => return Ok(Found::Nothing),
        }
    }
    Ok(if folders.is_empty() { Found::Nothing } else { Found::Folder(folders) })
}

fn is_opaque(folder: &OwnedFd) -> bool {
    let path = berth_linux::memfd::proc_path(folder.as_fd());
    let mut value = [0u8; 1];
    matches!(rustix::fs::getxattr(path.as_str(), "trusted.overlay.opaque", &mut value[..]), Ok(1) if value[0] == b'y')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn layers(build: impl Fn(&Path, &Path)) -> (tempfile::TempDir, Layers) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["top", "low"] {
            fs::create_dir_all(dir.path().join(name).join("etc")).unwrap();
        }
        build(&dir.path().join("top"), &dir.path().join("low"));
        let layers = Layers::open(dir.path(), &["top".into(), "low".into()]).unwrap();
        (dir, layers)
    }

    fn read(layers: &Layers, path: &str) -> Option<String> {
        layers.read(Path::new(path), 1 << 20).unwrap().map(|b| String::from_utf8(b).unwrap())
    }

    #[test]
    fn the_topmost_layer_with_the_file_wins() {
        let (_dir, layers) = layers(|top, low| {
            fs::write(low.join("etc/passwd"), "low").unwrap();
            fs::write(low.join("etc/group"), "low").unwrap();
            fs::write(top.join("etc/passwd"), "top").unwrap();
        });
        assert_eq!(read(&layers, "/etc/passwd").as_deref(), Some("top"));
        assert_eq!(read(&layers, "/etc/group").as_deref(), Some("low"));
        assert_eq!(read(&layers, "/etc/none"), None);
    }

    #[test]
    fn links_are_followed_inside_the_image_only() {
        let (_dir, layers) = layers(|top, low| {
            fs::create_dir_all(low.join("usr/share")).unwrap();
            fs::write(low.join("usr/share/passwd"), "shared").unwrap();
            symlink("/usr/share/passwd", top.join("etc/passwd")).unwrap();
            symlink("../../../../../../../../etc/hostname", top.join("etc/out")).unwrap();
            symlink("loop", top.join("etc/loop")).unwrap();
        });
        assert_eq!(read(&layers, "/etc/passwd").as_deref(), Some("shared"));
        assert_eq!(read(&layers, "/etc/out"), None);
        assert!(layers.read(Path::new("/etc/loop"), 10).is_err());
    }

    #[test]
    fn a_fifo_in_the_place_of_a_file_is_no_file() {
        let (_dir, layers) = layers(|top, _| {
            rustix::fs::mknodat(rustix::fs::CWD, top.join("etc/passwd"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        });
        assert_eq!(read(&layers, "/etc/passwd"), None);
    }
}
