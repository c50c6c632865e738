//! Known ways out of a container, one test each: what was done to other runtimes is tried on this one.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod kit;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_testkit::{in_namespaces, wait_until};
use kit::{Bundle, capabilities, mount};

#[test]
fn the_runtimes_binary_cannot_be_overwritten_through_proc_self_exe() {
    in_namespaces(|| {
        // A program that is a link to the runtime that executes it: the classic way. All capabilities, to make it easy.
        let mut bundle = Bundle::new("");
        // A copy, since another build may replace the program meanwhile.
        bundle.program = bundle.temp.path().join("berth-oci");
        std::fs::copy(kit::example("berth-oci"), &bundle.program).unwrap();
        let before = std::fs::read(&bundle.program).unwrap();
        bundle.process().capabilities = Some(capabilities(&["CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]));
        bundle.process().args = vec!["/proc/self/exe".into(), "features".into()];
        bundle.write();
        let output = bundle.output(&["run", "c"]);
        // What runs is the sealed copy in memory, not a file.
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // From the inside, while an exec joins the container: every process that shows up is opened and written to.
        let attack = r#"
            echo '#!/proc/self/exe' > /bin/evil; chmod 755 /bin/evil
            echo ready > /ready
            while :; do
                for p in /proc/[0-9]*; do
                    case $(readlink $p/exe) in
                        *busybox*|'') ;;
                        *) readlink $p/exe >> /seen; (echo overwritten > $p/exe) 2>> /errors && echo HIT >> /hits ;;
                    esac
                done
            done"#;
        bundle.process().args = ["sh", "-c", attack].map(str::to_owned).to_vec();
        bundle.write();
        bundle.detached(&["run", "-d", "c2"]);
        assert!(wait_until(Duration::from_secs(10), || bundle.rootfs().join("ready").exists()));
        for _ in 0..20 {
            let _ = bundle.output(&["exec", "c2", "/bin/evil"]);
            bundle.ok(&["exec", "c2", "true"]);
        }
        bundle.ok(&["delete", "-f", "c2"]);
        assert!(!bundle.rootfs().join("hits").exists());
        assert!(std::fs::read(&bundle.program).unwrap() == before);
        // What could be seen at all was the copy.
        let seen = std::fs::read_to_string(bundle.rootfs().join("seen")).unwrap_or_default();
        let strange: Vec<_> =
            seen.lines().filter(|line| !line.starts_with("/memfd:berth-oci") && !line.contains("busybox")).collect();
        assert!(strange.is_empty(), "{strange:?}");
        assert!(seen.contains("/memfd:berth-oci"), "the attack saw nothing to attack");
    });
}

#[test]
fn a_working_directory_behind_a_leaked_descriptor_is_refused() {
    in_namespaces(|| {
        let bundle_at = |cwd: String| {
            let mut bundle = Bundle::new("ls; cat ../../../etc/hostname");
            bundle.process().cwd = cwd;
            bundle
        };
        for number in 3..24 {
            for base in ["/proc/self/fd", "/proc/1/fd", "/proc/self/task/1/fd"] {
                let bundle = bundle_at(format!("{base}/{number}"));
                let error = bundle.run_fails();
                assert!(error.contains("/fd/") || error.contains("working directory"), "{error}");
            }
        }
        // The same through a link of the image, and with exec in a running container.
        let bundle = bundle_at("/link".into());
        symlink("/proc/self/fd/7/", bundle.rootfs().join("link")).unwrap();
        assert!(!bundle.output(&["run", "c"]).status.success());
        let bundle = Bundle::new("exec sleep 1000");
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        for number in 3..24 {
            let error = bundle.fails(&["exec", "--cwd", &format!("/proc/self/fd/{number}"), "c", "ls"]);
            assert!(error.contains("/proc/self/fd/"), "{error}");
        }
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn no_descriptor_of_the_runtime_or_of_its_caller_reaches_the_container() {
    in_namespaces(|| {
        let bundle = Bundle::new("ls -l /proc/self/fd /proc/1/fd");
        bundle.write();
        // The caller leaks a folder of the machine without close-on-exec, at a high number.
        let mut command = std::process::Command::new("sh");
        let script = format!(
            "exec 9</etc; exec 8</; exec {} --root {} run c",
            kit::example("berth-oci").display(),
            bundle.temp.path().join("state").display()
        );
        let output = command
            .args(["-c", &script])
            .current_dir(bundle.temp.path().join("b"))
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let numbers = text.lines().filter_map(|line| line.split(" -> ").next()?.rsplit(' ').next()?.parse::<u32>().ok());
        assert!(numbers.clone().count() >= 6 && numbers.clone().all(|number| number <= 3), "{text}");
        assert!(!text.contains("-> /etc") && !text.contains("-> /\n"), "{text}");
        // Those that are meant to be passed are.
        let script = script
            .replace("exec 9</etc; exec 8</;", "exec 3</etc/passwd; exec 4</;")
            .replace(" run c", " run --preserve-fds 1 c");
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .current_dir(bundle.temp.path().join("b"))
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("3 -> /etc/passwd") && !text.contains("4 -> /\n"), "{text}");
    });
}

#[test]
fn a_descriptor_of_the_runtimes_own_is_never_taken_for_one_to_be_preserved() {
    in_namespaces(|| {
        let bundle = Bundle::new("ls -l /proc/self/fd");
        bundle.write();
        // Nobody has passed number 3: it will be the log's, or a folder's.
        let log = bundle.temp.path().join("log").to_string_lossy().into_owned();
        for command in [&["run", "--preserve-fds", "1", "c"][..], &["run", "--preserve-fds", "4294967295", "c"]] {
            let words: Vec<&str> = ["--log", &log].into_iter().chain(command.iter().copied()).collect();
            let error = bundle.fails(&words);
            assert!(error.contains("descriptor 3 is to be preserved"), "{error}");
        }
    });
}

#[test]
fn an_exec_gets_a_session_keyring_of_its_own_and_not_its_callers() {
    in_namespaces(|| {
        let sessions = |text: String| -> std::collections::BTreeSet<String> {
            let lines = text.lines().filter(|line| line.contains("keyring   _ses"));
            lines.filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect()
        };
        let bundle = Bundle::new("exec sleep 1000");
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let before = sessions(std::fs::read_to_string("/proc/keys").unwrap());
        let during = sessions(bundle.ok(&["exec", "c", "cat", "/proc/keys"]));
        assert!(during.difference(&before).next().is_some(), "{during:?}");
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn while_it_waits_at_its_gate_a_container_holds_no_folder_of_the_machine() {
    in_namespaces(|| {
        let bundle = Bundle::new("true");
        bundle.write();
        bundle.detached(&["create", "c"]);
        let pid = bundle.pid("c");
        let links: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|entry| Some(std::fs::read_link(entry.unwrap().path()).ok()?.to_string_lossy().into_owned()))
            .collect();
        assert!(
            links.iter().all(|link| link.contains("exec.fifo") || link.contains("/streams") || link == "/dev/null"),
            "{links:?}"
        );
        // Nobody may look into it from the container's side: it is not dumpable.
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("/proc/{pid}/environ")).unwrap());
        assert_eq!(owner, 0);
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        assert!(maps.contains("memfd:berth-oci"), "the program is the sealed copy");
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn mount_targets_that_are_swapped_for_links_meanwhile_lead_nowhere_else() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("true");
        let victim = bundle.temp.dir("victim");
        let volume = bundle.temp.dir("volume");
        bundle.spec.mounts.push(mount("/swap/deep/target", "bind", &volume.to_string_lossy(), &["bind"]));
        bundle.write();
        let swap = bundle.rootfs().join("swap");
        let (real, link) = (bundle.rootfs().join("swap-real"), bundle.rootfs().join("swap-link"));
        std::fs::create_dir_all(real.join("deep/target")).unwrap();
        std::fs::create_dir_all(victim.join("deep")).unwrap();
        symlink(&victim, &link).unwrap();
        std::fs::rename(&real, &swap).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Folder and link change places, as another container that shares the volume can do.
                    let exchange = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(rustix::fs::CWD, &swap, rustix::fs::CWD, &link, exchange).unwrap();
                }
            });
            for _ in 0..60 {
                // It may fail where the link stands in the way; it may not touch what the link names on the machine.
                let _ = bundle.output(&["run", "c"]);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(std::fs::read_dir(victim.join("deep")).unwrap().count(), 0, "something was made in the machine's folder");
        assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains("victim"));
    });
}

#[test]
fn masked_paths_that_are_replaced_by_links_are_covered_where_they_lead_inside() {
    in_namespaces(|| {
        let mut bundle = Bundle::new(
            "cat /secret/key; cat /real/key; ls /masked-dir; cat /up/etc/hostname 2>/dev/null; touch /ro/x || echo refused; echo x > /proc/sys/kernel/hostname || echo refused; exit 0",
        );
        let rootfs = bundle.rootfs();
        std::fs::create_dir_all(rootfs.join("real")).unwrap();
        std::fs::write(rootfs.join("real/key"), "secret").unwrap();
        symlink("/real", rootfs.join("secret")).unwrap();
        std::fs::create_dir_all(rootfs.join("masked-dir")).unwrap();
        std::fs::write(rootfs.join("masked-dir/inside"), "").unwrap();
        std::fs::create_dir_all(rootfs.join("ro")).unwrap();
        let outside = bundle.temp.dir("outside");
        std::fs::write(outside.join("file"), "").unwrap();
        symlink(&outside, rootfs.join("away")).unwrap();
        // The image's /dev/null is a trap: what covers is the machine's device and not what the image says.
        std::fs::remove_dir_all(rootfs.join("dev")).unwrap();
        symlink("/real", rootfs.join("dev")).unwrap();
        bundle.spec.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
        bundle.spec.linux.masked_paths = ["/secret/key", "/masked-dir", "/away/file", "/not/there"].map(str::to_owned).to_vec();
        bundle.spec.linux.readonly_paths = ["/ro", "/proc/sys", "/away"].map(str::to_owned).to_vec();
        let out = bundle.run();
        assert!(!out.contains("secret") && !out.contains("inside"), "{out}");
        assert_eq!(out.matches("refused").count(), 2, "{out}");
        assert!(std::fs::write(outside.join("file"), "still writable").is_ok());
    });
}

#[test]
fn proc_and_sys_must_be_ordinary_folders_and_nothing_is_mounted_inside_them() {
    in_namespaces(|| {
        let bundle = Bundle::new("true");
        let rootfs = bundle.rootfs();
        std::fs::remove_dir(rootfs.join("proc")).unwrap();
        std::fs::create_dir(rootfs.join("fake")).unwrap();
        symlink("/fake", rootfs.join("proc")).unwrap();
        let error = bundle.run_fails();
        assert!(error.contains("must be mounted on an ordinary folder"), "{error}");
        let mut bundle = Bundle::new("true");
        let volume = bundle.temp.dir("volume");
        symlink("/proc/self", bundle.rootfs().join("alias")).unwrap();
        bundle.spec.mounts.push(mount("/alias/attr", "bind", &volume.to_string_lossy(), &["bind"]));
        let error = bundle.run_fails();
        assert!(error.contains("inside /proc"), "{error}");
    });
}

#[test]
fn a_fake_proc_does_not_redirect_what_the_runtime_writes() {
    in_namespaces(|| {
        // A tmpfs with the same names takes the place of proc. The parameter is set all the same, in the kernel.
        let mut bundle = Bundle::new("exec sleep 1000");
        let fake = bundle.temp.dir("fake");
        std::fs::create_dir_all(fake.join("sys/kernel")).unwrap();
        std::fs::write(fake.join("sys/kernel/shm_rmid_forced"), "untouched").unwrap();
        std::fs::create_dir_all(fake.join("self/attr")).unwrap();
        bundle.spec.mounts.retain(|mount| mount.destination != "/proc");
        bundle.spec.mounts.push(mount("/proc", "bind", &fake.to_string_lossy(), &["bind"]));
        // A volume that says it is proc is refused; an image that has the files in its own folder is not.
        let error = bundle.run_fails();
        assert!(error.contains("only a proc filesystem"), "{error}");
        bundle.spec.mounts.pop();
        std::fs::remove_dir_all(bundle.rootfs().join("proc")).unwrap();
        std::fs::rename(&fake, bundle.rootfs().join("proc")).unwrap();
        let fake = bundle.rootfs().join("proc");
        bundle.spec.linux.sysctl.insert("kernel.shm_rmid_forced".into(), "1".into());
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let pid = bundle.pid("c").to_string();
        assert_eq!(kit::tool("nsenter", &["-t", &pid, "-i", "cat", "/proc/sys/kernel/shm_rmid_forced"]).trim(), "1");
        assert_eq!(std::fs::read_to_string(fake.join("sys/kernel/shm_rmid_forced")).unwrap(), "untouched");
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn a_console_that_is_a_link_does_not_lead_the_terminal_elsewhere() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("ls -l /dev/console; echo done");
        bundle.process().terminal = true;
        // The image brings /dev: its console points at something that must not be covered or opened.
        let precious = bundle.rootfs().join("precious");
        std::fs::write(&precious, "precious").unwrap();
        bundle.spec.mounts.retain(|mount| mount.destination != "/dev");
        symlink("/precious", bundle.rootfs().join("dev/console")).unwrap();
        std::fs::create_dir(bundle.rootfs().join("dev/pts")).unwrap();
        bundle.write();
        let output = bundle.output(&["run", "c"]);
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
        let inside = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!output.status.success() || inside.contains("done"), "{inside}");
        // A devpts that is none gives no terminal.
        let mut bundle = Bundle::new("true");
        bundle.process().terminal = true;
        bundle.spec.mounts.retain(|mount| mount.destination != "/dev/pts");
        std::fs::create_dir_all(bundle.rootfs().join("dev/pts")).unwrap();
        bundle.spec.mounts.push(mount("/dev/pts", "tmpfs", "tmpfs", &[]));
        let error = bundle.run_fails();
        assert!(error.contains("not a devpts filesystem"), "{error}");
    });
}

#[test]
fn set_user_id_programs_gain_nothing_under_no_new_privileges() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("/bin/busybox-suid id -u; /bin/busybox-suid grep CapEff /proc/self/status");
        std::fs::copy("/bin/busybox", bundle.rootfs().join("bin/busybox-suid")).unwrap();
        std::fs::set_permissions(bundle.rootfs().join("bin/busybox-suid"), PermissionsExt::from_mode(0o4755)).unwrap();
        bundle.process().user.uid = 1000;
        bundle.process().no_new_privileges = true;
        let out = bundle.run();
        assert!(out.starts_with("1000\n") && out.contains("0000000000000000"), "{out}");
    });
}
