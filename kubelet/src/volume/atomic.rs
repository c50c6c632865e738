//! A folder of files that changes all at once: the files are in a hidden folder that `..data` names, what is seen are links
//! through `..data`, and a change is one rename of that link. Readers see the old files or the new ones, never both.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use k8s_openapi::jiff::Timestamp;
use k8s_openapi::jiff::tz::TimeZone;

use super::payload::{FileContent, Payload};

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes the folder hold exactly these files; whether anything changed. With a group the files are its and it may read them.
pub fn write(folder: &Path, payload: &Payload, group: Option<u32>, now: Timestamp) -> io::Result<bool> {
    let payload: Payload = payload.iter().map(|(path, file)| (path.clone(), readable(file, group))).collect();
    if let Some(bad) = payload.keys().find(|path| !is_inside(path)) {
        return Err(io::Error::other(format!("{bad:?} is not a path inside the volume")));
    }
    let data = folder.join(DATA);
    let before = fs::read_link(&data).ok();
    if let Some(current) = before.as_deref().filter(|_| holds(&data, &payload, group) && are_linked(folder, &payload)) {
        // A write that was cut short may have left a folder or a link.
        remove_stale(folder, &payload, current)?;
        return Ok(false);
    }
    let fresh = fresh_folder(folder, group, now)?;
    let name = fresh.file_name().map(PathBuf::from).unwrap_or_default();
    if let Err(error) = fill(&fresh, &payload, group).and_then(|()| swap(folder, &name)) {
        let _ = fs::remove_dir_all(&fresh);
        return Err(error);
    }
    link_visible(folder, &payload)?;
    remove_stale(folder, &payload, &name)?;
    Ok(true)
}

/// Whether the folder has been written before.
pub fn is_written(folder: &Path) -> bool {
    fs::symlink_metadata(folder.join(DATA)).is_ok()
}

fn readable(file: &FileContent, group: Option<u32>) -> FileContent {
    let mode = if group.is_some() { file.mode | 0o440 } else { file.mode };
    FileContent { bytes: file.bytes.clone(), mode, owner: file.owner }
}

/// A relative path of plain names, none of which looks like one of ours.
pub fn is_inside(path: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(name) if name.len() <= 255);
    !path.is_empty() && !path.starts_with("..") && path.len() < 4096 && Path::new(path).components().all(plain)
}

/// The first names of all paths: what is seen in the folder.
fn visible(payload: &Payload) -> BTreeSet<String> {
    payload.keys().filter_map(|path| path.split('/').find(|part| !part.is_empty() && *part != ".")).map(str::to_owned).collect()
}

fn are_linked(folder: &Path, payload: &Payload) -> bool {
    visible(payload).iter().all(|name| fs::read_link(folder.join(name)).is_ok_and(|to| to == Path::new(DATA).join(name)))
}

/// Whether the current files are those of the payload and no others.
fn holds(data: &Path, payload: &Payload, group: Option<u32>) -> bool {
    let mut found = BTreeSet::new();
    if list(data, Path::new(""), &mut found).is_err() || found.len() != payload.len() {
        return false;
    }
    payload.iter().all(|(path, file)| {
        let at = data.join(path);
        let Ok(metadata) = fs::symlink_metadata(&at) else { return false };
        metadata.is_file()
            && metadata.permissions().mode() & 0o7777 == file.mode
            && group.is_none_or(|group| metadata.gid() == group)
            && file.owner.is_none_or(|owner| metadata.uid() == owner)
            && fs::read(&at).is_ok_and(|bytes| bytes == file.bytes)
    })
}

fn list(root: &Path, below: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list(root, &path, found)?;
        } else {
            found.insert(path);
        }
    }
    Ok(())
}

/// `..2026_01_31_12_00_00.123456789`: the time for people, the number so that two of one second differ.
fn fresh_folder(folder: &Path, group: Option<u32>, now: Timestamp) -> io::Result<PathBuf> {
    let time = now.to_zoned(TimeZone::UTC).strftime("%Y_%m_%d_%H_%M_%S").to_string();
    loop {
        let mut random = [0u8; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let path = folder.join(format!("..{time}.{}", u32::from_le_bytes(random)));
        match fs::DirBuilder::new().mode(0o755).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            made => made?,
        }
        open_to_all(&path, group)?;
        return Ok(path);
    }
}

/// Any user's container looks in, whatever the umask says. With a group the folder is its, and what is made in it too.
fn open_to_all(folder: &Path, group: Option<u32>) -> io::Result<()> {
    if group.is_some() {
        std::os::unix::fs::chown(folder, None, group)?;
    }
    let mode = if group.is_some() { 0o2755 } else { 0o755 };
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
}

fn fill(folder: &Path, payload: &Payload, group: Option<u32>) -> io::Result<()> {
    for (path, file) in payload {
        let at = folder.join(path);
        let parents: Vec<&Path> = Path::new(path).ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        for parent in parents.into_iter().rev().map(|parent| folder.join(parent)) {
            if !parent.is_dir() {
                fs::create_dir(&parent)?;
                open_to_all(&parent, group)?;
            }
        }
        create(&at, &file.bytes)?;
        if group.is_some() || file.owner.is_some() {
            std::os::unix::fs::chown(&at, file.owner, group)?;
        }
        // After the owner: a change of owner takes bits away.
        fs::set_permissions(&at, fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}

/// A file that nobody else can open before it has its owner and mode: the folder is seen by containers already.
fn create(at: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(at)?.write_all(bytes)
}

fn swap(folder: &Path, name: &Path) -> io::Result<()> {
    let new = folder.join(NEW_DATA);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(name, &new)?;
    fs::rename(&new, folder.join(DATA))
}

fn link_visible(folder: &Path, payload: &Payload) -> io::Result<()> {
    for name in visible(payload) {
        let (link, target) = (folder.join(&name), Path::new(DATA).join(&name));
        if fs::read_link(&link).is_ok_and(|to| to == target) {
            continue;
        }
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(target, &link)?;
    }
    Ok(())
}

/// Links to files that are no more, and the folders of before.
fn remove_stale(folder: &Path, payload: &Payload, current: &Path) -> io::Result<()> {
    let wanted = visible(payload);
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text == DATA || name == current.as_os_str() || wanted.contains(&*text) {
            continue;
        }
        let kind = entry.file_type()?;
        if text.starts_with("..") && kind.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if kind.is_symlink() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str, u32)]) -> Payload {
        let file = |text: &str, mode| FileContent { bytes: text.as_bytes().to_vec(), mode, owner: None };
        files.iter().map(|(path, text, mode)| ((*path).to_owned(), file(text, *mode))).collect()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.starts_with("..1970"));
        names.sort();
        names
    }

    #[test]
    fn files_are_seen_through_data_and_change_at_once() {
        let root = tempfile::tempdir().unwrap();
        let now = Timestamp::UNIX_EPOCH;
        let first = payload(&[("a", "1", 0o644), ("sub/b", "2", 0o400), ("sub/deep/c", "3", 0o644)]);
        assert!(write(root.path(), &first, None, now).unwrap());
        assert_eq!(names(root.path()), ["..data", "a", "sub"]);
        assert_eq!(fs::read_to_string(root.path().join("sub/deep/c")).unwrap(), "3");
        assert_eq!(fs::metadata(root.path().join("sub/b")).unwrap().permissions().mode() & 0o7777, 0o400);
        assert_eq!(fs::read_link(root.path().join("a")).unwrap(), Path::new("..data/a"));
        let before = fs::read_link(root.path().join(DATA)).unwrap();
        assert!(before.to_string_lossy().starts_with("..1970_01_01_00_00_00."), "{before:?}");
        assert!(!write(root.path(), &first, None, now).unwrap(), "nothing changed, nothing is touched");
        assert_eq!(fs::read_link(root.path().join(DATA)).unwrap(), before);
        // A reader that holds the old folder goes on with the old files.
        let held = fs::File::open(root.path().join("a")).unwrap();
        let second = payload(&[("a", "new", 0o644), ("d", "4", 0o644)]);
        assert!(write(root.path(), &second, None, now).unwrap());
        assert_eq!(names(root.path()), ["..data", "a", "d"]);
        assert_eq!(fs::read_to_string(root.path().join("a")).unwrap(), "new");
        assert!(!root.path().join(&before).exists());
        assert_eq!(io::read_to_string(held).unwrap(), "1");
        assert!(write(root.path(), &payload(&[]), None, now).unwrap());
        assert_eq!(names(root.path()), ["..data"]);
    }

    #[test]
    fn a_file_is_its_owners_alone_until_it_has_its_mode() {
        let root = tempfile::tempdir().unwrap();
        create(&root.path().join("a"), b"secret").unwrap();
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().permissions().mode() & 0o7777, 0o600);
    }

    #[test]
    fn a_change_of_mode_alone_counts_and_a_group_may_read() {
        let root = tempfile::tempdir().unwrap();
        let now = Timestamp::UNIX_EPOCH;
        write(root.path(), &payload(&[("a", "1", 0o400)]), None, now).unwrap();
        assert!(write(root.path(), &payload(&[("a", "1", 0o600)]), None, now).unwrap());
        let own = rustix::process::getgid().as_raw();
        assert!(write(root.path(), &payload(&[("a", "1", 0o400)]), Some(own), now).unwrap());
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().permissions().mode() & 0o7777, 0o440);
        assert!(!write(root.path(), &payload(&[("a", "1", 0o400)]), Some(own), now).unwrap());
    }

    #[test]
    fn folders_belong_to_the_group_and_what_is_made_in_them_too() {
        let root = tempfile::tempdir().unwrap();
        let own = rustix::process::getgid().as_raw();
        write(root.path(), &payload(&[("sub/b.conf", "1", 0o400)]), Some(own), Timestamp::UNIX_EPOCH).unwrap();
        let of = |path: &str| fs::metadata(root.path().join(path)).unwrap();
        assert_eq!((of("sub").permissions().mode() & 0o7777, of("sub").gid()), (0o2755, own));
        assert_eq!(of(DATA).permissions().mode() & 0o7777, 0o2755);
    }

    #[test]
    fn what_a_write_that_was_cut_short_left_goes_with_the_next() {
        let root = tempfile::tempdir().unwrap();
        let now = Timestamp::UNIX_EPOCH;
        let files = payload(&[("a", "1", 0o644)]);
        write(root.path(), &files, None, now).unwrap();
        let before = fs::read_link(root.path().join(DATA)).unwrap();
        let half = root.path().join("..2026_01_01_00_00_00.123");
        let leave = || {
            fs::create_dir(&half).unwrap();
            fs::write(half.join("a"), "half").unwrap();
            symlink("..2026_01_01_00_00_00.123", root.path().join(NEW_DATA)).unwrap();
        };
        leave();
        assert!(!write(root.path(), &files, None, now).unwrap());
        assert_eq!(fs::read_link(root.path().join(DATA)).unwrap(), before, "what is whole stays");
        assert!(!half.exists() && fs::symlink_metadata(root.path().join(NEW_DATA)).is_err());
        leave();
        assert!(write(root.path(), &payload(&[("a", "2", 0o644)]), None, now).unwrap());
        assert!(!half.exists() && names(root.path()) == ["..data", "a"]);
        // Cut short between the swap and the links: what is seen is made to fit.
        fs::remove_file(root.path().join("a")).unwrap();
        assert!(write(root.path(), &payload(&[("a", "2", 0o644)]), None, now).unwrap());
        assert_eq!(fs::read_to_string(root.path().join("a")).unwrap(), "2");
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for bad in ["/etc/passwd", "../x", "a/../../x", "..data", ""] {
            assert!(!is_inside(bad), "{bad}");
            assert!(write(root.path(), &payload(&[(bad, "x", 0o644)]), None, Timestamp::UNIX_EPOCH).is_err(), "{bad}");
        }
        assert!(is_inside("a/b..c"));
        assert_eq!(names(root.path()), [""; 0]);
    }
}
