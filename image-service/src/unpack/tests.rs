use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};

use super::stream::{Expected, unpack};
use super::testtar::TestTar;
use super::*;
use crate::digest::Digest;
use crate::error::Error;

struct Layer {
    dir: tempfile::TempDir,
}

impl Layer {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("fs").join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn meta(&self, name: &str) -> std::fs::Metadata {
        std::fs::symlink_metadata(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn exists(&self, name: &str) -> bool {
        std::fs::symlink_metadata(self.path(name)).is_ok()
    }

    fn is_whiteout(&self, name: &str) -> bool {
        self.meta(name).file_type().is_char_device() && self.meta(name).rdev() == 0
    }

    fn xattr(&self, name: &str, key: &str) -> Option<Vec<u8>> {
        let mut value = vec![0u8; 1000];
        let length = rustix::fs::lgetxattr(self.path(name), key, &mut value[..]).ok()?;
        value.truncate(length);
        Some(value)
    }

    fn is_opaque(&self, name: &str) -> bool {
        self.xattr(name, "trusted.overlay.opaque").as_deref() == Some(b"y")
    }

    fn fd(&self) -> OwnedFd {
        open(&self.path(""))
    }
}

fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn try_apply(bytes: Vec<u8>) -> Result<(Layer, Applied), Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("fs")).unwrap();
    std::fs::write(dir.path().join("outside"), "untouched").unwrap();
    let layer = Layer { dir };
    let expected = Expected { blob: None, diff_id: Digest::of(&bytes) };
    let applied = unpack(std::io::Cursor::new(bytes), &expected, layer.fd());
    let outside: Vec<_> = std::fs::read_dir(layer.dir.path()).unwrap().map(|item| item.unwrap().file_name()).collect();
    assert_eq!(outside.len(), 2, "something was written outside: {outside:?}");
    assert_eq!(std::fs::read_to_string(layer.dir.path().join("outside")).unwrap(), "untouched");
    applied.map(|applied| (layer, applied))
}

fn apply(tar: TestTar) -> (Layer, Applied) {
    try_apply(tar.build()).unwrap()
}

/// Applies and completes a layer over finished ones, the top one first.
fn apply_over(parents: &[&Layer], tar: TestTar) -> Layer {
    let (layer, mut applied) = apply(tar);
    assert!(!applied.is_self_contained());
    complete(&mut applied, &Merged::new(parents.iter().map(|parent| parent.fd()).collect())).unwrap();
    layer
}

#[test]
fn owners_modes_times_and_set_id_bits_are_kept() {
    let (layer, applied) = apply(
        TestTar::new()
            .owned(1000, 1001)
            .dir("./", 0o555)
            .dir("d", 0o1777)
            .file_mode("d/su", 0o6755, "x")
            .at(1_600_000_000)
            .symlink("d/link", "su")
            .fifo("d/pipe", 0o620)
            .device("d/null", 0o666, false, 1, 3)
            .device("d/loop", 0o660, true, 7, 0),
    );
    assert!(applied.is_self_contained());
    assert_eq!(applied.root_meta, Some(RootMeta { mode: 0o555, uid: 1000, gid: 1001 }));
    for (name, mode, mtime) in [
        ("", 0o40555, 1_700_000_000),
        ("d", 0o41777, 1_700_000_000),
        ("d/su", 0o106755, 1_700_000_000),
        ("d/link", 0o120777, 1_600_000_000),
        ("d/pipe", 0o10620, 1_600_000_000),
        ("d/null", 0o20666, 1_600_000_000),
        ("d/loop", 0o60660, 1_600_000_000),
    ] {
        let meta = layer.meta(name);
        assert_eq!((meta.mode(), meta.uid(), meta.gid(), meta.mtime()), (mode, 1000, 1001, mtime), "{name}");
    }
    assert_eq!(layer.meta("d/null").rdev(), rustix::fs::makedev(1, 3));
    assert_eq!(std::fs::read_link(layer.path("d/link")).unwrap(), Path::new("su"));
}

#[test]
fn attributes_survive_except_those_that_overlayfs_reads() {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let (layer, _) = apply(
        TestTar::new()
            .owned(5, 5)
            .xattr("security.capability", capability)
            .xattr("user.note", b"a\0b")
            .xattr("trusted.overlay.opaque", b"y")
            .xattr("trusted.overlay.redirect", b"/etc")
            .file_mode("ping", 0o755, "x")
            .xattr("trusted.overlay.opaque", b"y")
            .xattr("user.dir", b"1")
            .dir("d", 0o755),
    );
    assert_eq!(layer.xattr("ping", "security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(layer.xattr("ping", "user.note").as_deref(), Some(&b"a\0b"[..]));
    assert_eq!(layer.xattr("ping", "trusted.overlay.redirect"), None);
    assert_eq!(layer.xattr("d", "user.dir").as_deref(), Some(&b"1"[..]));
    assert!(!layer.is_opaque("ping") && !layer.is_opaque("d"));
}

#[test]
fn whiteouts_hide_lower_layers_and_never_the_same_layer() {
    let (layer, applied) = apply(
        TestTar::new()
            .dir("etc", 0o755)
            .whiteout("etc", "gone")
            .whiteout("", "root-file")
            .file("etc/kept", "own")
            .whiteout("etc", "kept")
            .whiteout("etc", "before")
            .file("etc/before", "own")
            .dir("etc/dir", 0o755)
            .file("etc/dir/f", "own")
            .whiteout("etc", "dir")
            .whiteout("etc", "dir2")
            .dir("etc/dir2", 0o755)
            .dir("etc/opq", 0o755)
            .opaque("etc/opq")
            .file("etc/opq/f", "own"),
    );
    assert!(applied.is_self_contained() && !applied.root_opaque);
    assert!(layer.is_whiteout("etc/gone") && layer.is_whiteout("root-file"));
    assert_eq!((layer.read("etc/kept"), layer.read("etc/before")), ("own".into(), "own".into()));
    assert!(layer.is_opaque("etc/dir") && layer.is_opaque("etc/dir2") && layer.is_opaque("etc/opq"));
    assert!(!layer.is_opaque("etc"));
    assert_eq!((layer.read("etc/dir/f"), layer.read("etc/opq/f")), ("own".into(), "own".into()));
    for name in ["etc/.wh.gone", "etc/opq/.wh..wh..opq", ".wh..wh..opq"] {
        assert!(!layer.exists(name), "{name}");
    }
}

#[test]
fn an_opaque_root_and_aufs_leftovers_are_understood() {
    let (layer, applied) =
        apply(TestTar::new().opaque("").dir(".wh..wh.plnk", 0o700).file(".wh..wh.plnk/1.2", "x").file("f", "x"));
    assert!(applied.root_opaque && applied.is_self_contained());
    assert_eq!(std::fs::read_dir(layer.path("")).unwrap().count(), 1);
}

#[test]
fn later_entries_replace_earlier_ones_of_any_kind() {
    let (layer, applied) = apply(
        TestTar::new()
            .dir("a", 0o755)
            .file("a/x/y", "implied inside")
            .file("a", "file now")
            .file("b", "file")
            .dir("b", 0o700)
            .file("b/in", "in")
            .symlink("c", "/etc")
            .dir("c", 0o755)
            .file("c/in", "not in etc")
            .file("d", "one")
            .file("d", "two")
            .symlink("e", "nowhere")
            .file("e", "file now"),
    );
    assert!(applied.is_self_contained(), "{:?}", applied.implied);
    assert_eq!(layer.read("a"), "file now");
    assert_eq!(layer.read("b/in"), "in");
    assert_eq!(layer.read("c/in"), "not in etc");
    assert!(!layer.exists("etc"));
    assert_eq!(layer.read("d"), "two");
    assert_eq!(layer.read("e"), "file now");
}

#[test]
fn hard_links_share_an_inode() {
    let (layer, applied) = apply(
        TestTar::new()
            .dir("bin", 0o755)
            .file("bin/busybox", "elf")
            .hard("bin/sh", "bin/busybox")
            .hard("bin/ls", "./bin//busybox")
            .symlink("bin/s", "busybox")
            .hard("bin/s2", "/bin/s"),
    );
    assert!(applied.is_self_contained());
    assert_eq!(layer.meta("bin/busybox").nlink(), 3);
    assert_eq!(layer.meta("bin/sh").ino(), layer.meta("bin/busybox").ino());
    assert!(layer.meta("bin/s2").file_type().is_symlink(), "the link itself is linked, not what it points to");
}

#[test]
fn sparse_files_keep_their_holes() {
    let dir = tempfile::tempdir().unwrap();
    let script = "truncate -s 10M f; printf abc | dd of=f bs=1 seek=4194304 conv=notrunc status=none; \
                  tar -S --format=pax --sparse-version=1.0 -cf out.tar f";
    assert!(Command::new("sh").args(["-ec", script]).current_dir(dir.path()).status().unwrap().success());
    let (layer, _) = try_apply(std::fs::read(dir.path().join("out.tar")).unwrap()).unwrap();
    assert_eq!(std::fs::read(layer.path("f")).unwrap(), std::fs::read(dir.path().join("f")).unwrap());
    assert!(layer.meta("f").blocks() * 512 < 1 << 20);
}

#[test]
fn nothing_is_written_outside_the_root() {
    let refused = [
        TestTar::new().file("../outside", "bad"),
        TestTar::new().file("a/../../outside", "bad"),
        TestTar::new().hard("f", "../outside"),
        TestTar::new().whiteout("..", "outside"),
        TestTar::new().hard("f", "outside"),
        TestTar::new().file("a", "x").file("a/../../outside", "bad"),
        TestTar::new().symlink("l", "..").hard("f", "l/outside"),
        TestTar::new().entry("f", b'1', 0o644, "/proc/self/exe", (0, 0), b""),
    ];
    for (at, tar) in refused.into_iter().enumerate() {
        let result = try_apply(tar.build()).and_then(|(layer, mut applied)| {
            complete(&mut applied, &Merged::new(Vec::new()))?;
            Ok(layer)
        });
        assert!(result.is_err(), "case {at}");
    }
    let (layer, _) = apply(
        TestTar::new()
            .symlink("up", "../../..")
            .file("up/outside", "in root")
            .symlink("abs", "/")
            .file("abs/abs-file", "in root")
            .symlink("loop/../x", "y")
            .file("/absolute", "in root")
            .symlink("deep", "../../../../tmp/new")
            .file("deep/f", "in root")
            .opaque("up")
            .whiteout("up", "hidden"),
    );
    for name in ["outside", "abs-file", "absolute", "tmp/new/f"] {
        assert_eq!(layer.read(name), "in root", "{name}");
    }
    assert!(layer.is_whiteout("hidden"));
}

#[test]
fn entries_through_a_file_or_a_link_loop_are_refused() {
    for tar in [
        TestTar::new().file("a", "x").file("a/b", "y"),
        TestTar::new().symlink("a", "b").symlink("b", "a").file("a/b", "y"),
        TestTar::new().file("./", "root is no file"),
        TestTar::new().hard("a", "a"),
        TestTar::new().dir("d", 0o755).hard("a", "d"),
        TestTar::new().file(".wh.", "nothing"),
        TestTar::new().file(".wh...", "dots"),
        TestTar::new().entry("odd", b'V', 0o644, "", (0, 0), b""),
    ] {
        assert!(try_apply(tar.build()).is_err());
    }
}

#[test]
fn implied_folders_make_a_layer_depend_on_its_parents() {
    let (_, applied) = apply(TestTar::new().file("tmp/x", "x").file("a/b/c", "c").dir("a", 0o700));
    assert_eq!(applied.implied, [b"a/b".to_vec(), b"tmp".to_vec()]);
    assert!(!applied.is_self_contained());
}

#[test]
fn implied_folders_take_after_the_layer_below() {
    let (base, _) =
        apply(TestTar::new().owned(7, 8).xattr("user.k", b"v").dir("tmp", 0o1777).dir("a", 0o711).owned(0, 0).file("plain", "x"));
    let layer = apply_over(&[&base], TestTar::new().file("tmp/x", "x").file("a/b/c", "c").file("plain/under", "x"));
    let tmp = layer.meta("tmp");
    assert_eq!((tmp.mode(), tmp.uid(), tmp.gid(), tmp.mtime()), (0o41777, 7, 8, 1_700_000_000));
    assert_eq!(layer.xattr("tmp", "user.k").as_deref(), Some(&b"v"[..]));
    assert_eq!(layer.meta("a").mode(), 0o40711);
    let made = layer.meta("a/b");
    assert_eq!((made.mode(), made.uid(), made.mtime()), (0o40755, 0, 0));
    assert_eq!(layer.meta("plain").mode(), 0o40755);
}

#[test]
fn the_same_layer_differs_over_two_bases() {
    let (one, _) = apply(TestTar::new().dir("tmp", 0o1777));
    let (two, _) = apply(TestTar::new().owned(3, 3).dir("tmp", 0o700));
    let tar = || TestTar::new().file("tmp/x", "x");
    assert_eq!(apply_over(&[&one], tar()).meta("tmp").mode(), 0o41777);
    assert_eq!(apply_over(&[&two], tar()).meta("tmp").mode(), 0o40700);
    let (cut, _) = apply(TestTar::new().whiteout("", "tmp"));
    assert_eq!(apply_over(&[&cut, &one], tar()).meta("tmp").mode(), 0o40755);
    let (opaque, _) = apply(TestTar::new().dir("a", 0o755).opaque("a"));
    let (deep, _) = apply(TestTar::new().dir("a", 0o755).dir("a/tmp", 0o700));
    let tar = TestTar::new().file("a/tmp/x", "x");
    assert_eq!(apply_over(&[&opaque, &deep], tar).meta("a/tmp").mode(), 0o40755);
    let own = TestTar::new().dir("tmp", 0o750).opaque("tmp").file("tmp/in/x", "x");
    let (below, _) = apply(TestTar::new().dir("tmp", 0o755).dir("tmp/in", 0o700));
    assert_eq!(apply_over(&[&below], own).meta("tmp/in").mode(), 0o40755);
}

#[test]
fn hard_links_into_lower_layers_copy_the_file_up() {
    let (base, _) = apply(
        TestTar::new()
            .dir("bin", 0o750)
            .owned(9, 9)
            .xattr("user.k", b"v")
            .file_mode("bin/tool", 0o4755, "tool")
            .owned(0, 0)
            .dir("lib", 0o755)
            .symlink("usr", "lib")
            .file("lib/so", "so")
            .symlink("lib/alias", "so"),
    );
    let layer = apply_over(
        &[&base],
        TestTar::new()
            .dir("new", 0o755)
            .hard("new/one", "bin/tool")
            .hard("new/two", "bin/tool")
            .hard("new/three", "new/one")
            .hard("new/so", "usr/so")
            .hard("new/alias", "lib/alias"),
    );
    for name in ["new/one", "new/two", "new/three", "bin/tool"] {
        let meta = layer.meta(name);
        assert_eq!((meta.mode(), meta.uid(), meta.nlink()), (0o104755, 9, 4), "{name}");
        assert_eq!(layer.xattr(name, "user.k").as_deref(), Some(&b"v"[..]));
    }
    assert_eq!(layer.meta("bin").mode(), 0o40750, "the folder made for the copy takes after the one below");
    assert_eq!(layer.meta("lib/so").ino(), layer.meta("new/so").ino());
    assert_eq!(std::fs::read_link(layer.path("new/alias")).unwrap(), Path::new("so"));
}

#[test]
fn a_link_to_a_lower_file_keeps_it_even_when_the_layer_replaces_that_file() {
    let (base, _) = apply(TestTar::new().file("old", "lower").file("gone", "lower"));
    let layer = apply_over(
        &[&base],
        TestTar::new().hard("kept", "old").file("old", "upper").whiteout("", "gone").hard("kept2", "gone").hard("again", "kept2"),
    );
    assert_eq!((layer.read("kept"), layer.read("old"), layer.read("kept2")), ("lower".into(), "upper".into(), "lower".into()));
    assert_eq!(layer.meta("again").ino(), layer.meta("kept2").ino());
    assert!(layer.is_whiteout("gone"));
}

#[test]
fn a_link_to_nothing_is_refused_by_name() {
    let (base, _) = apply(TestTar::new().file("f", "x"));
    let (_, mut applied) = apply(TestTar::new().hard("l", "missing"));
    let error = complete(&mut applied, &Merged::new(vec![base.fd()])).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn entries_below_a_link_of_a_lower_layer_go_where_it_leads() {
    let (base, _) =
        apply(TestTar::new().dir("usr", 0o755).dir("usr/lib", 0o711).symlink("lib", "usr/lib").symlink("lib64", "/lib"));
    let layer = apply_over(
        &[&base],
        TestTar::new()
            .file("lib/x", "x")
            .file("lib64/sub/y", "y")
            .dir("lib64/own", 0o700)
            .file("usr/lib/z", "z")
            .hard("h", "lib/x"),
    );
    assert!(!layer.exists("lib") && !layer.exists("lib64"));
    for name in ["usr/lib/x", "usr/lib/sub/y", "usr/lib/z", "usr/lib/own"] {
        assert!(layer.exists(name), "{name}");
    }
    assert_eq!(layer.meta("usr/lib").mode(), 0o40711);
    assert_eq!((layer.meta("usr/lib/own").mode(), layer.meta("usr/lib/own").mtime()), (0o40700, 1_700_000_000));
}

#[test]
fn every_compression_gives_the_same_layer_and_both_digests_are_checked() {
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let plain = TestTar::new().file("small", "s").file("big", &data).build();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain[..1000]).unwrap();
    let mut gzip = gzip.finish().unwrap();
    let mut second = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    second.write_all(&plain[1000..]).unwrap();
    gzip.extend(second.finish().unwrap());
    let zstd = zstd::stream::encode_all(&plain[..], 3).unwrap();
    for blob in [plain.clone(), gzip, zstd] {
        let try_unpack = |bytes: Vec<u8>, expected: &Expected| {
            let dir = tempfile::tempdir().unwrap();
            let done = unpack(std::io::Cursor::new(bytes), expected, open(dir.path()));
            let same = std::fs::read(dir.path().join("big")).is_ok_and(|found| found == data);
            done.map(|_| assert!(same))
        };
        let good = Expected { blob: Some((Digest::of(&blob), blob.len() as u64)), diff_id: Digest::of(&plain) };
        try_unpack(blob.clone(), &good).unwrap();
        try_unpack(blob.clone(), &Expected { blob: None, ..good.clone() }).unwrap();
        let wrong = Digest::of(b"wrong");
        let bad_blob = Expected { blob: Some((wrong, blob.len() as u64)), ..good.clone() };
        assert!(matches!(try_unpack(blob.clone(), &bad_blob), Err(Error::DigestMismatch { .. })));
        let bad_diff = Expected { diff_id: wrong, ..good.clone() };
        assert!(matches!(try_unpack(blob.clone(), &bad_diff), Err(Error::DigestMismatch { .. })));
        for cut in [0, 3, blob.len() / 2, blob.len() - 1] {
            assert!(try_unpack(blob[..cut].to_vec(), &good).is_err(), "cut at {cut}");
        }
        for at in [blob.len() / 3, blob.len() - 3] {
            let mut damaged = blob.clone();
            damaged[at] ^= 0x40;
            assert!(try_unpack(damaged, &good).is_err(), "damaged at {at}");
        }
        let mut longer = blob.clone();
        longer.extend_from_slice(&[0; 1000]);
        assert!(try_unpack(longer, &good).is_err());
    }
}

#[test]
fn a_layer_of_the_systems_tar_unpacks_like_the_systems_tar() {
    let dir = tempfile::tempdir().unwrap();
    let long = "n".repeat(150);
    let script = format!(
        "mkdir -p src/a/b src/{long}; echo hi > src/a/f; chmod 4751 src/a/f; ln src/a/f src/a/hard; ln -s ../f src/a/b/s; \
         mkfifo src/p; mknod src/n c 1 3; echo x > src/{long}/{long}; chown -R 12:34 src/a; chmod 1777 src/a/b; \
         setfattr -n user.t -v 1 src/a/b 2>/dev/null || true; touch -d @1234567890.5 src/a/b src/a/f; \
         tar --format=FORMAT --xattrs -C src -cf out.tar .; mkdir theirs; tar --xattrs --xattrs-include='*' -C theirs -xpf out.tar"
    );
    for format in ["gnu", "pax"] {
        let work = dir.path().join(format);
        std::fs::create_dir(&work).unwrap();
        let script = script.replace("FORMAT", format);
        assert!(Command::new("sh").args(["-ec", &script]).current_dir(&work).status().unwrap().success());
        let (layer, applied) = try_apply(std::fs::read(work.join("out.tar")).unwrap()).unwrap();
        assert!(applied.is_self_contained());
        let list = |root: &Path| {
            let find = "find . -printf '%P %y %m %U %G %n %T@ %l %s\\n' | grep -v ' d ' | sort; find . -type d -printf '%P %m %U %G %T@\\n' | sort";
            let out = Command::new("sh").args(["-ec", find]).current_dir(root).output().unwrap();
            String::from_utf8(out.stdout).unwrap()
        };
        assert_eq!(list(&layer.path("")), list(&work.join("theirs")), "{format}");
        assert!(list(&work.join("theirs")).lines().count() > 8);
    }
}
