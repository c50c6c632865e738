use super::*;

fn entries(bytes: &[u8]) -> io::Result<Vec<(Entry, Vec<u8>)>> {
    let mut reader = TarReader::new(bytes);
    let mut out = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut data = Vec::new();
        let mut buffer = [0u8; 100];
        loop {
            match reader.read_data(&mut buffer)? {
                0 => break,
                count => data.extend_from_slice(&buffer[..count]),
            }
        }
        out.push((entry, data));
    }
    Ok(out)
}

/// A tar made by the system's tar from the shell commands in `script`.
fn foreign(script: &str, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("sh").arg("-ec").arg(script).current_dir(dir.path()).status().unwrap();
    assert!(status.success());
    let out = std::process::Command::new("tar")
        .args(options)
        .args(["--sort=name", "-C"])
        .arg(dir.path())
        .args(["-cf", "-", "."])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

#[test]
fn gnu_and_pax_long_names_are_read() {
    let long = "d".repeat(120);
    let script = format!("mkdir -p {long}/{long}; echo hi > {long}/{long}/file; ln -s {long}/{long}/file link");
    for format in ["--format=gnu", "--format=pax"] {
        let all = entries(&foreign(&script, &[format])).unwrap();
        let file = all.iter().find(|(entry, _)| entry.kind == Kind::File).unwrap();
        assert_eq!(file.0.path, format!("./{long}/{long}/file").into_bytes(), "{format}");
        assert_eq!(file.1, b"hi\n");
        let link = all.iter().find(|(entry, _)| entry.kind == Kind::Symlink).unwrap();
        assert_eq!(link.0.link, format!("{long}/{long}/file").into_bytes());
    }
}

#[test]
fn ustar_prefix_is_joined() {
    let long = "d".repeat(90);
    let all =
        entries(&foreign(&format!("mkdir -p {long}; echo hi > {long}/file-name-of-some-length"), &["--format=ustar"])).unwrap();
    assert!(all.iter().any(|(entry, _)| entry.path == format!("./{long}/file-name-of-some-length").into_bytes()));
}

#[test]
fn every_sparse_form_gives_the_same_map() {
    let script = "truncate -s 10M f; printf abc | dd of=f bs=1 seek=4194304 conv=notrunc status=none; \
                  printf xyz | dd of=f bs=1 seek=8388608 conv=notrunc status=none";
    let forms: [&[&str]; 4] = [
        &["-S", "--format=gnu"],
        &["-S", "--format=pax", "--sparse-version=0.0"],
        &["-S", "--format=pax", "--sparse-version=0.1"],
        &["-S", "--format=pax", "--sparse-version=1.0"],
    ];
    for form in forms {
        let all = entries(&foreign(script, form)).unwrap();
        let (entry, data) = all.iter().find(|(entry, _)| entry.path == b"./f").unwrap_or_else(|| panic!("{form:?}"));
        let sparse = entry.sparse.as_ref().unwrap();
        assert_eq!(sparse.real_size, 10 << 20, "{form:?}");
        let chunks: Vec<_> = sparse.chunks.iter().filter(|chunk| chunk.1 > 0).collect();
        assert_eq!(chunks.iter().map(|chunk| chunk.0).collect::<Vec<_>>(), [4 << 20, 8 << 20], "{form:?}");
        assert_eq!(data.len() as u64, sparse.chunks.iter().map(|chunk| chunk.1).sum::<u64>());
        assert_eq!(&data[..3], b"abc");
    }
}

#[test]
fn many_sparse_chunks_are_read_from_extension_blocks() {
    let script =
        "truncate -s 8M f; for i in $(seq 0 39); do printf x | dd of=f bs=1 seek=$((i*200000)) conv=notrunc status=none; done";
    for form in [&["-S", "--format=gnu"][..], &["-S", "--format=pax"][..]] {
        let all = entries(&foreign(script, form)).unwrap();
        let (entry, _) = all.iter().find(|(entry, _)| entry.path == b"./f").unwrap();
        assert!(entry.sparse.as_ref().unwrap().chunks.len() >= 39, "{form:?}");
    }
}

#[test]
fn truncated_and_damaged_archives_are_errors() {
    let whole = foreign("head -c 3000 /dev/zero > a", &["--format=gnu"]);
    assert!(entries(&whole).is_ok());
    for cut in [100, 512 + 200, 1024 + 1000] {
        assert!(entries(&whole[..cut]).is_err(), "cut at {cut}");
    }
    let mut damaged = whole.clone();
    damaged[3] ^= 1;
    assert!(entries(&damaged).is_err());
    assert!(
        entries(b"this is no archive at all, just some text that is long enough for one block".repeat(10).as_slice()).is_err()
    );
}

#[test]
fn an_archive_without_end_blocks_is_accepted() {
    let whole = foreign("echo a > a", &["--format=gnu"]);
    let end = whole.iter().rposition(|&byte| byte != 0).unwrap();
    let cut = end.next_multiple_of(BLOCK);
    assert_eq!(entries(&whole[..cut]).unwrap().len(), 2);
}

#[test]
fn pax_records_override_the_header() {
    let records = [
        ("path", "other/name".as_bytes()),
        ("size", b"5"),
        ("uid", b"3000000"),
        ("mtime", b"-1.25"),
        ("SCHILY.xattr.user.bin", b"a=\n\0b"),
    ];
    let mut body = Vec::new();
    for (key, value) in records {
        let mut length = key.len() + value.len() + 3;
        while format!("{length}").len() + key.len() + value.len() + 3 != length {
            length = format!("{length}").len() + key.len() + value.len() + 3;
        }
        body.extend_from_slice(format!("{length} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    let mut archive = Vec::new();
    push(&mut archive, b"x", b'x', &body);
    push(&mut archive, b"name", b'0', b"hello");
    let all = entries(&archive).unwrap();
    let (entry, data) = &all[0];
    assert_eq!(entry.path, b"other/name");
    assert_eq!((entry.uid, entry.mtime), (3_000_000, (-2, 750_000_000)));
    assert_eq!(entry.xattrs, [(b"user.bin".to_vec(), b"a=\n\0b".to_vec())]);
    assert_eq!(data, b"hello");
}

#[test]
fn numbers_are_read_in_octal_and_base_256() {
    let cases: [(&[u8], Option<i64>); 7] = [
        (b"0000644\0", Some(0o644)),
        (b"  644 \0\0", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"\x80\0\0\0\0\0\x01\0", Some(256)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
        (b"00x00000", None),
        (b"9       ", None),
    ];
    for (bytes, expected) in cases {
        assert_eq!(signed(bytes), expected, "{bytes:?}");
    }
}

fn push(archive: &mut Vec<u8>, name: &[u8], flag: u8, data: &[u8]) {
    let mut block = [0u8; BLOCK];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0000000");
    block[116..123].copy_from_slice(b"0000000");
    block[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    block[136..147].copy_from_slice(b"00000000000");
    block[156] = flag;
    block[257..263].copy_from_slice(b"ustar\0");
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    archive.extend_from_slice(&block);
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
}

#[test]
fn damaged_headers_are_errors_and_never_panics() {
    let script = "mkdir d; echo hi > d/f; ln d/f h; ln -s d s; truncate -s 10M sp; printf x | dd of=sp bs=1 seek=5000000 conv=notrunc status=none; \
                  touch $(printf 'n%.0s' $(seq 150))";
    let mut state = 88_172_645_463_325_252u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for format in [
        &["-S", "--format=gnu"][..],
        &["-S", "--format=pax", "--sparse-version=1.0"],
        &["-S", "--format=pax", "--sparse-version=0.1"],
    ] {
        let whole = foreign(script, format);
        for _ in 0..3000 {
            let mut bytes = whole.clone();
            let block = random(bytes.len() / BLOCK) * BLOCK;
            for _ in 0..=random(3) {
                let at = block + [random(512), 124 + random(12), 156, 386 + random(110)][random(4)];
                bytes[at] = [random(256) as u8, b'9', 0xff, 0x80, b'7', 0][random(6)];
            }
            bytes[block + 148..block + 156].copy_from_slice(b"        ");
            let sum: u32 = bytes[block..block + BLOCK].iter().map(|&byte| u32::from(byte)).sum();
            bytes[block + 148..block + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            let _ = entries(&bytes);
        }
    }
}
