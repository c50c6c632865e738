//! Confined paths, passed descriptors, memfds, attributes, holes, nodes and watches, with the real kernel.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use berth_linux::beneath::{Root, remove_at};
use berth_linux::device::{Device, DeviceKind, make_node};
use berth_linux::fdpass::{recv_with_fds, send_with_fds};
use berth_linux::inotify::{Inotify, ReadFlags, WatchFlags};
use berth_linux::memfd::{is_sealed, reopen, seal, sealed_memfd};
use berth_linux::{sparse, xattr};
use berth_testkit::{TempState, in_namespaces};
use common::open_fds;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::pipe::{PipeFlags, SpliceFlags};

fn folder(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

const DIR_MODE: Mode = Mode::from_raw_mode(0o755);

#[test]
fn links_lead_to_places_inside_the_root_only() {
    let state = TempState::new();
    let root_path = state.dir("root");
    state.file("secret", "outside");
    fs::create_dir(root_path.join("etc")).unwrap();
    fs::write(root_path.join("etc/passwd"), "inside").unwrap();
    for (link, target) in
        [("absolute", "/etc/passwd"), ("up", "../../../../../../etc/passwd"), ("out", "../secret"), ("dir", "/etc")]
    {
        symlink(target, root_path.join(link)).unwrap();
    }
    let root = Root::in_root(folder(&root_path));
    let read = |path: &str| {
        let fd = root.open(Path::new(path), OFlags::RDONLY, Mode::empty())?;
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text)?;
        Ok::<_, std::io::Error>(text)
    };
    for path in ["absolute", "/absolute", "up", "dir/passwd", "../../etc/passwd", "dir/../../../etc/passwd"] {
        assert_eq!(read(path).unwrap(), "inside", "{path}");
    }
    assert_eq!(read("out").unwrap_err().kind(), std::io::ErrorKind::NotFound);

    let strict = Root::strict(folder(&root_path));
    for path in ["absolute", "up", "dir/passwd", "../secret", "etc/../../secret"] {
        assert!(strict.open(Path::new(path), OFlags::RDONLY, Mode::empty()).is_err(), "{path}");
    }
    assert!(strict.open(Path::new("/etc/passwd"), OFlags::RDONLY, Mode::empty()).is_ok());
}

#[test]
fn folders_and_files_are_made_where_links_lead_inside() {
    let state = TempState::new();
    let root_path = state.dir("root");
    let outside = state.dir("outside");
    fs::create_dir_all(root_path.join("data")).unwrap();
    symlink("/data", root_path.join("var")).unwrap();
    symlink(&outside, root_path.join("trap")).unwrap();
    let root = Root::in_root(folder(&root_path));
    root.mkdir_all(Path::new("/var/lib/x"), DIR_MODE).unwrap();
    assert!(root_path.join("data/lib/x").is_dir());
    // The link to outside means a folder inside that does not exist.
    assert!(root.mkdir_all(Path::new("trap/x"), DIR_MODE).is_err());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);

    let file = root.create_file(Path::new("var/file"), Mode::from_raw_mode(0o600)).unwrap();
    File::from(file).write_all(b"x").unwrap();
    assert_eq!(fs::read(root_path.join("data/file")).unwrap(), b"x");
    assert!(root.create_file(Path::new("var"), Mode::from_raw_mode(0o600)).is_err());
    root.symlink(Path::new("anywhere"), Path::new("data/link")).unwrap();
    assert_eq!(root.readlink(Path::new("var/link")).unwrap(), Path::new("anywhere"));
    root.link(Path::new("var/file"), Path::new("data/again")).unwrap();
    assert_eq!(fs::metadata(root_path.join("data/again")).unwrap().nlink(), 2);
    let link = root.open_path_nofollow(Path::new("var/link")).unwrap();
    assert_eq!(rustix::fs::fstat(&link).unwrap().st_mode & libc::S_IFMT, libc::S_IFLNK);
}

#[test]
fn removal_takes_deep_trees_and_never_follows_links() {
    let state = TempState::new();
    let keep = state.dir("keep");
    fs::write(keep.join("file"), "kept").unwrap();
    let tree = state.dir("tree");
    let mut deep = tree.clone();
    for _ in 0..60 {
        deep.push("d");
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("f"), "x").unwrap();
        symlink(&keep, deep.join("link")).unwrap();
    }
    let root = Root::strict(folder(state.path()));
    root.remove(Path::new("tree")).unwrap();
    root.remove(Path::new("tree")).unwrap();
    root.remove(Path::new("no/such/file")).unwrap();
    assert!(!tree.exists());
    assert_eq!(fs::read_to_string(keep.join("file")).unwrap(), "kept");
    symlink(&keep, state.path().join("link")).unwrap();
    remove_at(folder(state.path()).as_fd(), Path::new("link")).unwrap();
    assert!(keep.join("file").exists());
}

#[test]
fn descriptors_cross_a_socket_close_on_exec_and_a_short_list_is_an_error() {
    in_namespaces(|| {
        let (left, right) = UnixStream::pair().unwrap();
        let first = sealed_memfd("first", b"first", false).unwrap();
        let second = sealed_memfd("second", b"second", false).unwrap();
        let fds = [first.as_fd(), second.as_fd()];
        assert_eq!(send_with_fds(left.as_fd(), b"hello", &fds).unwrap(), 5);
        let mut buffer = [0u8; 16];
        let (read, got) = recv_with_fds(right.as_fd(), &mut buffer, 4).unwrap();
        assert_eq!((&buffer[..read], got.len()), (&b"hello"[..], 2));
        let mut text = String::new();
        let mut file = File::from(got.into_iter().nth(1).unwrap());
        let flags = rustix::io::fcntl_getfd(&file).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "second");
        drop(file);

        // Nothing may stay open after a message that had more than was asked for.
        for allowed in [0, 1] {
            let before = open_fds();
            send_with_fds(left.as_fd(), b"x", &[first.as_fd(); 3]).unwrap();
            assert!(recv_with_fds(right.as_fd(), &mut buffer, allowed).is_err(), "{allowed}");
            assert_eq!(open_fds(), before, "{allowed}");
        }
        send_with_fds(left.as_fd(), b"plain", &[]).unwrap();
        assert_eq!(recv_with_fds(right.as_fd(), &mut buffer, 0).unwrap().0, 5);
        drop(left);
        assert_eq!(recv_with_fds(right.as_fd(), &mut buffer, 1).unwrap().0, 0);
    });
}

#[test]
fn a_sealed_memfd_cannot_be_changed_even_through_its_path() {
    let fd = sealed_memfd("sealed", b"fixed", true).unwrap();
    assert!(is_sealed(fd.as_fd()));
    assert!(!is_sealed(File::open("/dev/null").unwrap().as_fd()));
    let mut text = String::new();
    File::from(reopen(fd.as_fd(), OFlags::RDONLY).unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "fixed");
    if let Ok(writer) = reopen(fd.as_fd(), OFlags::RDWR) {
        assert!(rustix::io::write(&writer, b"x").is_err());
        assert!(rustix::fs::ftruncate(&writer, 0).is_err());
    }
}

#[test]
fn a_page_that_somebody_holds_for_a_while_delays_a_seal_and_does_not_refuse_it() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("held", flags).unwrap();
    rustix::io::write(&memfd, b"held").unwrap();
    // What is spliced into a pipe is the page itself: the pipe holds it until somebody reads.
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    assert_eq!(rustix::pipe::splice(&memfd, Some(&mut 0), &writer, None, 4, SpliceFlags::empty()).unwrap(), 4);
    let busy = || {
        let before = Instant::now();
        assert_eq!(rustix::fs::fcntl_add_seals(&memfd, SealFlags::WRITE), Err(rustix::io::Errno::BUSY));
        before.elapsed()
    };
    // Longer than the kernel's own wait is at least one refusal. The shortest of some: the machine may stand still in one.
    let wait = busy().min(busy()).min(busy());
    std::thread::scope(|scope| {
        let sealing = scope.spawn(|| seal(memfd.as_fd()));
        let begun = Instant::now();
        while begun.elapsed() < 3 * wait {
            busy();
        }
        assert!(!sealing.is_finished());
        drop(reader);
        drop(writer);
        sealing.join().unwrap().unwrap();
    });
    assert!(is_sealed(memfd.as_fd()));
}

#[test]
fn attributes_are_set_on_files_folders_and_links() {
    in_namespaces(|| {
        let state = TempState::new();
        state.file("f", "x");
        symlink("nowhere", state.path().join("link")).unwrap();
        let dir = folder(state.path());
        let file = rustix::fs::openat(&dir, "f", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        xattr::set(file.as_fd(), c"trusted.test", b"a\0b").unwrap();
        assert_eq!(xattr::get(file.as_fd(), c"trusted.test").unwrap(), Some(b"a\0b".to_vec()));
        assert_eq!(xattr::get(file.as_fd(), c"trusted.none").unwrap(), None);
        assert!(xattr::list(file.as_fd()).unwrap().iter().any(|name| name.as_c_str() == c"trusted.test"));
        xattr::remove(file.as_fd(), c"trusted.test").unwrap();
        xattr::remove(file.as_fd(), c"trusted.test").unwrap();
        assert_eq!(xattr::get(file.as_fd(), c"trusted.test").unwrap(), None);
        xattr::set_in_folder(dir.as_fd(), Path::new("link"), c"trusted.test", b"l").unwrap();
        for bad in ["../x", "/x", ".", ""] {
            assert!(xattr::set_in_folder(dir.as_fd(), Path::new(bad), c"trusted.test", b"l").is_err(), "{bad:?}");
        }
    });
}

#[test]
fn zero_blocks_become_holes_and_data_is_found_again() {
    let state = TempState::new();
    let file = File::options().read(true).write(true).create_new(true).open(state.path().join("sparse")).unwrap();
    let mut content = vec![0u8; 1 << 20];
    content[500_000..500_010].copy_from_slice(b"0123456789");
    sparse::write_sparse(file.as_fd(), 0, &content).unwrap();
    rustix::fs::ftruncate(&file, content.len() as u64).unwrap();
    assert_eq!(fs::read(state.path().join("sparse")).unwrap(), content);
    let ranges = sparse::data_ranges(file.as_fd()).unwrap();
    assert!(ranges.iter().any(|range| range.contains(&500_005)));
    let data: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    assert!(data < 100_000, "{ranges:?}");
}

#[test]
fn nodes_have_exactly_the_mode_and_owner_given() {
    in_namespaces(|| {
        let state = TempState::new();
        let dir = folder(state.path());
        let null = Device::of_path(Path::new("/dev/null")).unwrap().unwrap();
        assert_eq!(null, Device { kind: DeviceKind::Char, major: 1, minor: 3 });
        berth_linux::prctl::set_umask(0o077);
        make_node(dir.as_fd(), Path::new("null"), null, 0o666, Some((5, 6))).unwrap();
        let meta = fs::metadata(state.path().join("null")).unwrap();
        assert!(meta.file_type().is_char_device());
        assert_eq!((meta.permissions().mode() & 0o7777, meta.uid(), meta.gid()), (0o666, 5, 6));
        assert_eq!(Device::of_path(state.path()).unwrap(), None);
    });
}

#[test]
fn changes_of_a_folder_arrive_as_events() {
    let state = TempState::new();
    let watcher = Inotify::new().unwrap();
    let watch = watcher.add(state.path(), WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::DELETE).unwrap();
    assert!(watcher.read().unwrap().is_empty());
    state.file("a", "x");
    fs::rename(state.path().join("a"), state.path().join("b")).unwrap();
    fs::remove_file(state.path().join("b")).unwrap();
    let mut seen = Vec::new();
    assert!(berth_testkit::wait_until(Duration::from_secs(5), || {
        seen.extend(watcher.read().unwrap());
        seen.len() >= 3
    }));
    let kinds: Vec<_> = seen.iter().map(|event| event.flags).collect();
    assert_eq!(kinds, [ReadFlags::CLOSE_WRITE, ReadFlags::MOVED_TO, ReadFlags::DELETE]);
    assert!(seen.iter().all(|event| event.watch == watch));
    assert_eq!(seen[1].name.as_deref(), Some("b".as_ref()));
}
