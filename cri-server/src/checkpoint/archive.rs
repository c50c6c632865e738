//! Tar archives: a writable layer as an OCI layer, and the whole checkpoint. The layer belongs to a container that is running and may
//! change it meanwhile: every path is opened below the layer, no link is followed.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use berth_linux::beneath::Root;
use berth_linux::xattr;
use rustix::fs::{Dir, FileType, Mode, OFlags, Stat};
use tar::{Builder, EntryType, Header};
use tokio_util::sync::CancellationToken;

use crate::spec::IdMap;

/// How overlayfs marks a folder that hides what is below it.
const OPAQUE: [&CStr; 2] = [c"trusted.overlay.opaque", c"user.overlay.opaque"];
/// The same, and a deleted file, in OCI layers.
const OPAQUE_MARK: &str = ".wh..wh..opq";
const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// Maps of users and groups.
pub(super) type Users = (Vec<IdMap>, Vec<IdMap>);

/// A file that is written for as long as somebody wants it.
pub(super) struct Output {
    file: File,
    given_up: CancellationToken,
}

impl Output {
    /// A new file, for root alone.
    pub(super) fn create(path: &Path, given_up: &CancellationToken) -> io::Result<Self> {
        let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Self { file, given_up: given_up.clone() })
    }

    fn sync(self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// An error once nobody wants it any more.
fn wanted(given_up: &CancellationToken) -> io::Result<()> {
    if given_up.is_cancelled() { Err(io::Error::other("the checkpoint was given up")) } else { Ok(()) }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        wanted(&self.given_up)?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes the upper folder of an overlay as an OCI layer.
pub(super) fn layer(upper: &Path, users: &Users, out: Output) -> io::Result<()> {
    let root = Root::strict(Root::open_dir(upper)?.into_fd());
    let mut layer = Layer { tar: Builder::new(out), users, links: BTreeMap::new() };
    // A list instead of recursion: a container nests folders as deep as it likes.
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = match root.open(&folder, flags, Mode::empty()) {
            Ok(opened) => opened,
            Err(error) if has_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        for entry in Dir::new(opened)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let path = folder.join(OsStr::from_bytes(name));
            match layer.add(&root, &path) {
                Ok(true) => folders.push(path),
                Ok(false) => {}
                Err(error) if has_gone(&error) => {}
                Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
            }
        }
    }
    layer.tar.into_inner()?.sync()
}

/// Removed, or changed into something else, since it was listed.
fn has_gone(error: &io::Error) -> bool {
    let gone = [rustix::io::Errno::NOENT, rustix::io::Errno::NOTDIR, rustix::io::Errno::LOOP, rustix::io::Errno::NXIO];
    error.raw_os_error().is_some_and(|code| gone.iter().any(|errno| errno.raw_os_error() == code))
}

struct Layer<'a> {
    tar: Builder<Output>,
    users: &'a Users,
    /// Files with several names, by device and inode.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl Layer<'_> {
    /// Adds one path; whether it is a folder.
    fn add(&mut self, root: &Root, path: &Path) -> io::Result<bool> {
        let fd = root.open_path_nofollow(path)?;
        let stat = rustix::fs::fstat(&fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            let mut name = WHITEOUT_PREFIX.to_vec();
            name.extend_from_slice(path.file_name().unwrap_or_default().as_bytes());
            return self.mark(&path.with_file_name(OsStr::from_bytes(&name)), &stat).map(|()| false);
        }
        let mut header = self.header(&stat);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let key = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&key) {
                header.set_entry_type(EntryType::Link);
                return self.tar.append_link(&mut header, path, first).map(|()| false);
            }
            self.links.insert(key, path.to_owned());
        }
        self.attributes(&fd)?;
        match kind {
            FileType::Directory => {
                header.set_entry_type(EntryType::Directory);
                self.tar.append_data(&mut header, path, io::empty())?;
                if OPAQUE.iter().any(|name| xattr::get(fd.as_fd(), name).is_ok_and(|v| v.as_deref() == Some(b"y"))) {
                    self.mark(&path.join(OPAQUE_MARK), &stat)?;
                }
                return Ok(true);
            }
            FileType::Symlink => {
                header.set_entry_type(EntryType::Symlink);
                self.tar.append_link(&mut header, path, root.readlink(path)?)?;
            }
            FileType::RegularFile => self.file(&mut header, root, path, &stat)?,
            FileType::Socket => {} // Its other end is a process: no layer has it.
            other => {
                header.set_entry_type(match other {
                    FileType::CharacterDevice => EntryType::Char,
                    FileType::BlockDevice => EntryType::Block,
                    _ => EntryType::Fifo,
                });
                if other != FileType::Fifo {
                    header.set_device_major(rustix::fs::major(stat.st_rdev))?;
                    header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
                }
                self.tar.append_data(&mut header, path, io::empty())?;
            }
        }
        Ok(false)
    }

    fn file(&mut self, header: &mut Header, root: &Root, path: &Path, stat: &Stat) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(root.open(path, flags, Mode::empty())?);
        let now = rustix::fs::fstat(&file)?;
        if (now.st_dev, now.st_ino) != (stat.st_dev, stat.st_ino) {
            return Err(rustix::io::Errno::NOENT.into());
        }
        let size = u64::try_from(now.st_size).unwrap_or(0);
        header.set_entry_type(EntryType::Regular);
        header.set_size(size);
        // A file that shrinks meanwhile is filled up: the header has been written.
        self.tar.append_data(header, path, file.chain(io::repeat(0)).take(size))
    }

    fn header(&self, stat: &Stat) -> Header {
        let mut header = Header::new_gnu();
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(u64::from(inside(&self.users.0, stat.st_uid)));
        header.set_gid(u64::from(inside(&self.users.1, stat.st_gid)));
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
        header.set_size(0);
        header
    }

    /// An empty file whose name is what it says.
    fn mark(&mut self, path: &Path, stat: &Stat) -> io::Result<()> {
        let mut header = self.header(stat);
        header.set_mode(0);
        header.set_entry_type(EntryType::Regular);
        self.tar.append_data(&mut header, path, io::empty())
    }

    /// The attributes of what comes next, but for overlayfs' own.
    fn attributes(&mut self, fd: &OwnedFd) -> io::Result<()> {
        let mut found = Vec::new();
        for name in xattr::list(fd.as_fd())? {
            let text = name.to_string_lossy();
            if text.starts_with("trusted.overlay.") || text.starts_with("user.overlay.") {
                continue;
            }
            if let Some(value) = xattr::get(fd.as_fd(), &name)? {
                found.push((format!("SCHILY.xattr.{text}"), value));
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        self.tar.append_pax_extensions(found.iter().map(|(name, value)| (name.as_str(), value.as_slice())))
    }
}

/// An id of the machine as the container sees it; one without a place there stays.
fn inside(maps: &[IdMap], id: u32) -> u32 {
    let map = maps.iter().find(|map| id >= map.host && id - map.host < map.length);
    map.map_or(id, |map| map.container + (id - map.host))
}

/// Archives a folder to a file that is there whole or not at all; given up, not at all. Blocking.
pub(super) fn place(folder: &Path, location: &Path, given_up: &CancellationToken) -> io::Result<()> {
    let name = location.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let partial = location.with_file_name(format!(".{name}.partial"));
    let written = write_all(folder, &partial, given_up).and_then(|()| {
        wanted(given_up)?;
        std::fs::rename(&partial, location)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn write_all(folder: &Path, partial: &Path, given_up: &CancellationToken) -> io::Result<()> {
    match std::fs::remove_file(partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut tar = Builder::new(Output::create(partial, given_up)?);
    tar.follow_symlinks(false);
    tar.append_dir_all("", folder)?;
    tar.into_inner()?.sync()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn entries(bytes: &[u8]) -> BTreeMap<String, (EntryType, u64, Vec<u8>, String)> {
        let mut archive = tar::Archive::new(bytes);
        let all = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let link = entry.link_name().unwrap().map(|l| l.to_string_lossy().into_owned()).unwrap_or_default();
            let (kind, uid) = (entry.header().entry_type(), entry.header().uid().unwrap());
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (path, (kind, uid, content, link))
        });
        all.collect()
    }

    #[test]
    fn a_layer_has_files_links_and_whiteouts_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("upper");
        let deep = upper.join("a").join("x".repeat(120));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), "hello").unwrap();
        std::fs::hard_link(deep.join("file"), upper.join("again")).unwrap();
        symlink("/etc", upper.join("away")).unwrap();
        let whiteout = rustix::fs::mknodat(rustix::fs::CWD, upper.join("gone"), FileType::CharacterDevice, Mode::empty(), 0);
        let out = dir.path().join("out.tar");
        let own = rustix::process::getuid().as_raw();
        let users = (vec![IdMap { container: 7, host: own, length: 1 }], vec![]);
        layer(&upper, &users, Output::create(&out, &CancellationToken::new()).unwrap()).unwrap();
        let found = entries(&std::fs::read(&out).unwrap());
        let long = format!("a/{}/file", "x".repeat(120));
        let (first, second) = (&found[&long], &found["again"]);
        let (file, link) = if first.0 == EntryType::Regular { (first, second) } else { (second, first) };
        assert_eq!((file.2.as_slice(), file.1), (b"hello".as_slice(), 7));
        assert_eq!(link.0, EntryType::Link);
        assert_eq!((found["away"].0, found["away"].3.as_str()), (EntryType::Symlink, "/etc"));
        assert!(!found.keys().any(|path| path.starts_with("away/")));
        if whiteout.is_ok() {
            assert_eq!((found[".wh.gone"].0, found.contains_key("gone")), (EntryType::Regular, false));
        }
    }

    #[test]
    fn an_archive_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        std::fs::create_dir_all(work.join("checkpoint")).unwrap();
        std::fs::write(work.join("checkpoint/core-1.img"), "core").unwrap();
        std::fs::write(work.join("config.dump"), "{}").unwrap();
        let location = dir.path().join("c.tar");
        std::fs::write(&location, "older and longer than nothing").unwrap();
        place(&work, &location, &CancellationToken::new()).unwrap();
        let found = entries(&std::fs::read(&location).unwrap());
        assert_eq!(found["checkpoint/core-1.img"].2, b"core");
        assert_eq!(found["config.dump"].2, b"{}");
        assert!(place(&work, &dir.path().join("absent/c.tar"), &CancellationToken::new()).is_err());
        assert!(place(&dir.path().join("nothing"), &dir.path().join("d.tar"), &CancellationToken::new()).is_err());
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!names.iter().any(|n| n.to_string_lossy().contains("partial")), "{names:?}");
    }

    #[test]
    fn an_archive_that_was_given_up_leaves_nothing_at_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let (work, location) = (dir.path().join("work"), dir.path().join("c.tar"));
        std::fs::create_dir(&work).unwrap();
        std::fs::write(work.join("f"), "x").unwrap();
        let given_up = CancellationToken::new();
        given_up.cancel();
        assert!(place(&work, &location, &given_up).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the folder alone");
    }

    #[test]
    fn ids_are_those_that_the_container_sees() {
        let maps = [IdMap { container: 0, host: 1000, length: 10 }, IdMap { container: 50, host: 5000, length: 1 }];
        for (outside, want) in [(1000, 0), (1009, 9), (1010, 1010), (5000, 50), (7, 7)] {
            assert_eq!(inside(&maps, outside), want, "{outside}");
        }
    }
}
