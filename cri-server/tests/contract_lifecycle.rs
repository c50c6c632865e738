//! The contract of the lifecycle calls over a real socket with real pods: what clients rely on, and what survives.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use berth_cri_api::v1;
use berth_testkit::image::Layer;
use berth_testkit::{in_namespaces, report_measured, wait_until};
use support::{Agent, container, kill};
use tonic::Code;

const SOON: Duration = Duration::from_secs(20);

fn state(status: &v1::ContainerStatus) -> v1::ContainerState {
    status.state.try_into().unwrap()
}

#[test]
fn a_pod_lives_from_run_to_remove_and_leaves_nothing() {
    in_namespaces(|| {
        let agent = Agent::start();
        let pod = agent.run_sandbox("one");
        assert!(agent.sandbox_status(&pod).network.unwrap().ip.starts_with("10.99."));
        let id = agent.run_script(&pod, "one", "c", "echo out; echo err >&2; exec sleep 1000");
        let output = agent.exec(&id, &["sh", "-c", "echo -n $HOSTNAME; echo oops >&2; exit 3"], 10).unwrap();
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice(), output.exit_code), (&b"one"[..], &b"oops\n"[..], 3));
        let log = agent.container_status(&id).log_path;
        let whole = || std::fs::read_to_string(&log).unwrap_or_default();
        assert!(wait_until(SOON, || whole().contains(" stdout F out\n") && whole().contains(" stderr F err\n")), "{}", whole());
        let mut client = agent.runtime();
        let stop = v1::StopContainerRequest { container_id: id.clone(), timeout: 1 };
        agent.client.block_on(client.stop_container(stop)).unwrap();
        let status = agent.container_status(&id);
        assert_eq!(
            (state(&status), status.exit_code, status.reason.as_str()),
            (v1::ContainerState::ContainerExited, 143, "Error")
        );
        assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at);
        agent.finish();
    });
}

#[test]
fn unknown_ids_are_fine_to_stop_and_remove_and_not_found_else() {
    in_namespaces(|| {
        let agent = Agent::start();
        let id = || "0f8fad5b-d9cb-469f-a165-70867728950e".to_owned();
        let mut client = agent.runtime();
        agent.client.block_on(async {
            client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id() }).await.unwrap();
            client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id() }).await.unwrap();
            client.stop_container(v1::StopContainerRequest { container_id: id(), timeout: 0 }).await.unwrap();
            client.remove_container(v1::RemoveContainerRequest { container_id: id() }).await.unwrap();
            let codes = [
                client
                    .pod_sandbox_status(v1::PodSandboxStatusRequest { pod_sandbox_id: id(), verbose: false })
                    .await
                    .unwrap_err()
                    .code(),
                client
                    .container_status(v1::ContainerStatusRequest { container_id: id(), verbose: false })
                    .await
                    .unwrap_err()
                    .code(),
                client.start_container(v1::StartContainerRequest { container_id: id() }).await.unwrap_err().code(),
                client
                    .exec_sync(v1::ExecSyncRequest { container_id: id(), cmd: vec!["a".into()], timeout: 0 })
                    .await
                    .unwrap_err()
                    .code(),
                client.container_stats(v1::ContainerStatsRequest { container_id: id() }).await.unwrap_err().code(),
                client.reopen_container_log(v1::ReopenContainerLogRequest { container_id: id() }).await.unwrap_err().code(),
            ];
            assert!(codes.iter().all(|c| *c == Code::NotFound), "{codes:?}");
            let listed = client.list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner();
            assert!(listed.containers.is_empty());
        });
        assert_eq!(agent.create("nobody", "x", container("c", &["true"])).unwrap_err().code(), Code::NotFound);
        let pod = agent.run_sandbox("one");
        let mut absent = container("c", &["true"]);
        absent.image = Some(v1::ImageSpec { image: "docker.io/test/absent:1".into(), ..Default::default() });
        assert_eq!(agent.create(&pod, "one", absent).unwrap_err().code(), Code::NotFound);
        agent.finish();
    });
}

#[test]
fn a_client_that_gives_up_leaves_nothing_half_made_and_its_retry_joins() {
    in_namespaces(|| {
        let agent = Agent::start();
        let request = || v1::RunPodSandboxRequest { config: Some(agent.sandbox_config("one")), runtime_handler: String::new() };
        // Gives up sooner and later; whatever was made by then, the retry gets one pod.
        for patience in [0, 1, 3, 8] {
            let mut client = agent.runtime();
            let given_up = agent.client.block_on(async {
                tokio::time::timeout(Duration::from_millis(patience), client.run_pod_sandbox(request())).await.is_err()
            });
            if !given_up {
                break;
            }
        }
        let mut client = agent.runtime();
        let retry = agent.client.block_on(client.run_pod_sandbox(request()));
        let listed = agent.client.block_on(client.list_pod_sandbox(v1::ListPodSandboxRequest::default())).unwrap().into_inner();
        assert_eq!(listed.items.len(), 1, "{retry:?}");
        let pod = listed.items[0].id.clone();
        assert_eq!(retry.unwrap().into_inner().pod_sandbox_id, pod);
        let again = agent.client.block_on(client.run_pod_sandbox(request())).unwrap();
        assert_eq!(again.into_inner().pod_sandbox_id, pod, "an answer may be lost after it was given");
        let mut other = request();
        other.config.as_mut().unwrap().hostname = "another".into();
        let refused = agent.client.block_on(client.run_pod_sandbox(other)).unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists);
        for _ in 0..3 {
            let mut client = agent.runtime();
            let create = v1::CreateContainerRequest {
                pod_sandbox_id: pod.clone(),
                config: Some(container("c", &["sleep", "1000"])),
                sandbox_config: Some(agent.sandbox_config("one")),
            };
            let _ = agent
                .client
                .block_on(async { tokio::time::timeout(Duration::from_millis(1), client.create_container(create)).await });
        }
        agent.create(&pod, "one", container("c", &["sleep", "1000"])).unwrap();
        let containers =
            agent.client.block_on(client.list_containers(v1::ListContainersRequest::default())).unwrap().into_inner();
        assert_eq!(containers.containers.len(), 1);
        agent.finish();
    });
}

#[test]
fn a_missing_program_is_the_users_error_and_the_container_says_so() {
    in_namespaces(|| {
        let agent = Agent::start();
        let pod = agent.run_sandbox("one");
        let id = agent.create(&pod, "one", container("c", &["/no/such/program"])).unwrap();
        let error = agent.start_container(&id).unwrap_err();
        assert!(error.message().contains("/no/such/program"), "{error}");
        let status = agent.container_status(&id);
        assert_eq!(
            (state(&status), status.exit_code, status.reason.as_str()),
            (v1::ContainerState::ContainerExited, 128, "StartError")
        );
        assert!(status.message.contains("no such file"), "{}", status.message);
        agent.finish();
    });
}

#[test]
fn a_command_that_runs_too_long_is_killed_and_the_deadline_is_the_error() {
    in_namespaces(|| {
        let agent = Agent::start();
        let pod = agent.run_sandbox("one");
        let id = agent.run_script(&pod, "one", "c", "exec sleep 1000");
        let error = agent.exec(&id, &["sh", "-c", "sleep 4321"], 1).unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded);
        let left = agent.exec(&id, &["sh", "-c", "cat /proc/[0-9]*/cmdline"], 10).unwrap();
        assert!(!String::from_utf8_lossy(&left.stdout).contains("4321"));
        // What is over a message's size is thrown away, and the call still succeeds.
        let big = agent.exec(&id, &["sh", "-c", "head -c 20000000 /dev/zero"], 30).unwrap();
        assert!(big.stdout.len() > 8 << 20 && big.exit_code == 0);
        agent.finish();
    });
}

#[test]
fn everything_runs_on_and_is_known_again_after_the_agent_was_killed() {
    in_namespaces(|| {
        let mut agent = Agent::start();
        let pods: Vec<String> = (0..10).map(|i| agent.run_sandbox(&format!("p{i}"))).collect();
        let running: Vec<String> =
            pods.iter().enumerate().map(|(i, pod)| agent.run_script(pod, &format!("p{i}"), "c", "exec sleep 1000")).collect();
        let ended = agent.run_script(&pods[0], "p0", "ended", "exit 5");
        assert!(wait_until(SOON, || state(&agent.container_status(&ended)) == v1::ContainerState::ContainerExited));
        let created = agent.create(&pods[1], "p1", container("created", &["true"])).unwrap();
        let all = |agent: &Agent| -> Vec<v1::ContainerStatus> {
            running.iter().chain([&ended, &created]).map(|id| agent.container_status(id)).collect()
        };
        let (before, ips) = (all(&agent), agent.sandbox_status(&pods[3]).network);
        agent.kill();
        let took = agent.run();
        report_measured(&format!("recovery of 10 pods: {} ms", took.as_millis()));
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert_eq!(all(&agent), before);
        assert_eq!(agent.sandbox_status(&pods[3]).network, ips);
        assert_eq!(agent.exec(&running[4], &["echo", "-n", "hi"], 10).unwrap().stdout, b"hi");
        agent.start_container(&created).unwrap();
        agent.finish();
    });
}

#[test]
fn restarts_of_the_agent_leave_the_links_of_living_pods_alone_and_lists_are_whole_at_once() {
    in_namespaces(|| {
        let mut agent = Agent::start();
        let pods: Vec<String> = (0..3).map(|i| agent.run_sandbox(&format!("p{i}"))).collect();
        let links = || std::fs::read_dir("/sys/class/net").unwrap().flatten().count();
        let (before, first) = (links(), agent.sandbox_status(&pods[0]).network);
        for round in 0..20 {
            agent.kill();
            agent.run();
            // The first question, before anything had time to settle.
            let listed = agent.client.block_on(agent.runtime().list_pod_sandbox(v1::ListPodSandboxRequest::default()));
            assert_eq!(listed.unwrap().into_inner().items.len(), pods.len(), "round {round}");
            assert_eq!(agent.sandbox_status(&pods[0]).network, first, "round {round}");
            assert!(agent.leaks().is_empty() && links() == before, "round {round}: {} links, {before} before", links());
        }
        agent.finish();
    });
}

#[test]
fn the_death_of_a_shim_ends_its_pod_whether_the_agent_watches_or_not() {
    in_namespaces(|| {
        let mut agent = Agent::start();
        let (one, two) = (agent.run_sandbox("one"), agent.run_sandbox("two"));
        let a = agent.run_script(&one, "one", "c", "exec sleep 1000");
        let b = agent.run_script(&two, "two", "c", "exec sleep 1000");
        let second = agent.shim_pid(&two);
        kill(agent.shim_pid(&one));
        let lost = |agent: &Agent, pod: &str, id: &str| {
            let status = agent.container_status(id);
            agent.sandbox_status(pod).state == i32::from(v1::PodSandboxState::SandboxNotready)
                && (state(&status), status.exit_code, status.reason.as_str())
                    == (v1::ContainerState::ContainerExited, 255, "Unknown")
        };
        assert!(wait_until(SOON, || lost(&agent, &one, &a)));
        agent.kill();
        kill(second);
        agent.run();
        assert!(lost(&agent, &one, &a) && lost(&agent, &two, &b));
        assert_eq!(agent.leaks(), Vec::<String>::new());
        assert_eq!(agent.create(&one, "one", container("d", &["true"])).unwrap_err().code(), Code::FailedPrecondition);
        agent.finish();
    });
}

#[test]
fn after_a_reboot_old_pods_are_listed_as_ended_until_they_are_removed() {
    in_namespaces(|| {
        let mut agent = Agent::start();
        let pod = agent.run_sandbox("one");
        let id = agent.run_script(&pod, "one", "c", "exec sleep 1000");
        let done = agent.run_script(&pod, "one", "done", "exit 0");
        assert!(wait_until(SOON, || state(&agent.container_status(&done)) == v1::ContainerState::ContainerExited));
        let kept = agent.root.join("containers").join(&id);
        assert!(kept.join("upper").exists());
        let shim = agent.shim_pid(&pod);
        // The durable records follow within a moment.
        let record = agent.root.join("containers").join(&done).join("record.json");
        assert!(wait_until(SOON, || std::fs::read_to_string(&record).is_ok_and(|t| t.contains("Completed"))));
        agent.kill();
        kill(shim);
        // The power goes: tmpfs is empty, the kernel has another boot id.
        std::fs::remove_dir_all(agent.state.join("sandboxes")).unwrap();
        for record in [
            kept.join("record.json"),
            agent.root.join("containers").join(&done).join("record.json"),
            agent.root.join("sandboxes").join(&pod).join("record.json"),
        ] {
            let mut value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&record).unwrap()).unwrap();
            value["boot"] = "another".into();
            std::fs::write(&record, value.to_string()).unwrap();
        }
        agent.run();
        assert_eq!(agent.sandbox_status(&pod).state, i32::from(v1::PodSandboxState::SandboxNotready));
        let (lost, ended) = (agent.container_status(&id), agent.container_status(&done));
        assert_eq!((lost.exit_code, lost.reason.as_str()), (255, "Unknown"));
        assert_eq!((ended.exit_code, ended.reason.as_str()), (0, "Completed"));
        assert!(!kept.join("upper").exists(), "a volatile layer of another boot is never used again");
        agent.finish();
    });
}

#[test]
fn environment_values_may_be_any_bytes_and_the_user_is_the_images() {
    in_namespaces(|| {
        let agent = Agent::start();
        let pod = agent.run_sandbox("one");
        let mut config = container("c", &["sleep", "1000"]);
        config.envs = vec![v1::KeyValue { key: "RAW".into(), value: vec![b'a', 0xff, b'b'] }];
        config.linux = Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                run_as_username: "web".into(),
                supplemental_groups: vec![1234],
                ..Default::default()
            }),
            ..Default::default()
        });
        let id = agent.create(&pod, "one", config).unwrap();
        agent.start_container(&id).unwrap();
        assert_eq!(agent.exec(&id, &["sh", "-c", "printf %s \"$RAW\""], 10).unwrap().stdout, [b'a', 0xff, b'b']);
        // The kernel sorts them.
        assert_eq!(agent.exec(&id, &["id", "-G"], 10).unwrap().stdout, b"33 77 1234\n");
        let user = agent.container_status(&id).user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid, user.supplemental_groups), (33, 33, vec![33, 1234, 77]));
        agent.finish();
    });
}

#[test]
fn an_image_is_a_volume_whole_or_in_part_read_only_and_never_out_of_itself() {
    in_namespaces(|| {
        let agent = Agent::start();
        let low = Layer::new().dir("etc", 0o755).file("etc/base", 0o644, "base").file("etc/gone", 0o644, "gone");
        let low = low.dir("data", 0o755).file("data/file", 0o644, "content").symlink("data/out", "../../../../../../bin");
        let top = Layer::new().dir("etc", 0o755).file("etc/.wh.gone", 0o644, "").file("etc/more", 0o644, "more");
        agent.import_image("docker.io/test/data:1", &[low.into_tar(), top.symlink("link", "data").into_tar()]);
        let pod = agent.run_sandbox("volumes");
        let volume = |path: &str, sub: &str| v1::Mount {
            container_path: path.into(),
            readonly: true,
            image: Some(v1::ImageSpec { image: "docker.io/test/data:1".into(), ..Default::default() }),
            image_sub_path: sub.into(),
            ..Default::default()
        };
        let with = |name: &str, mounts| v1::ContainerConfig { mounts, ..container(name, &["sleep", "1000"]) };
        let mounts = vec![volume("/all", ""), volume("/part", "etc"), volume("/file", "link/file")];
        let id = agent.create(&pod, "volumes", with("c", mounts)).unwrap();
        agent.start_container(&id).unwrap();
        let run = |script: &str| String::from_utf8(agent.exec(&id, &["sh", "-c", script], 10).unwrap().stdout).unwrap();
        assert_eq!(run("ls /all /part; cat /file"), "/all:\ndata\netc\nlink\n\n/part:\nbase\nmore\ncontent");
        assert_eq!(run("(echo > /all/x) 2>&1; (echo > /part/x) 2>&1; (echo > /file) 2>&1").matches("Read-only").count(), 3);
        let status = agent.container_status(&id);
        let image = status.mounts[1].image.clone().unwrap();
        assert_eq!((image.image.as_str(), status.mounts[1].image_sub_path.as_str()), ("docker.io/test/data:1", "etc"));
        assert!(image.image_ref.starts_with("sha256:"), "{image:?}");
        for sub in ["none", "data/out", "etc/gone"] {
            let error = agent.create(&pod, "volumes", with(&sub.replace('/', "-"), vec![volume("/v", sub)])).unwrap_err();
            assert!(error.message().starts_with("ImageVolumeMountFailed"), "{error}");
        }
        agent.finish();
    });
}

#[test]
fn exit_codes_survive_a_crash_right_after_the_pod_was_stopped_and_nothing_is_a_leak_meanwhile() {
    berth_testkit::in_namespaces(|| {
        let mut agent = Agent::start();
        let sandbox = agent.run_sandbox("stopped");
        let id = agent.run_script(&sandbox, "stopped", "c", "exit 7");
        let ended = || (agent.container_status(&id).exit_code == 7).then_some(());
        berth_testkit::wait_for(Duration::from_secs(10), ended).unwrap();
        let mut client = agent.runtime();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        agent.client.block_on(client.stop_pod_sandbox(request)).unwrap();
        let path = agent.root.join("containers").join(&id).join("record.json");
        // Records are committed off the reply's path.
        berth_testkit::wait_for(Duration::from_secs(10), || path.exists().then_some(())).unwrap();
        agent.kill();
        // As a crash leaves it that comes before the durable record is committed.
        let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        record.as_object_mut().unwrap().remove("exit");
        std::fs::write(&path, record.to_string()).unwrap();
        agent.run();
        let status = agent.container_status(&id);
        assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
        agent.finish();
    });
}

#[test]
fn leaks_without_an_agent_reads_the_records_and_changes_nothing() {
    berth_testkit::in_namespaces(|| {
        let mut agent = Agent::start();
        let sandbox = agent.run_sandbox("kept");
        agent.run_script(&sandbox, "kept", "c", "sleep 1000");
        agent.kill();
        let stray = agent.root.join("containers").join("ab".repeat(32));
        std::fs::create_dir_all(stray.join("upper")).unwrap();
        assert_eq!(agent.leaks_on_record(), [format!("snapshot {}", stray.display())]);
        assert!(stray.exists(), "looking must not drain");
        agent.run();
        assert_eq!(agent.sandbox_status(&sandbox).state(), v1::PodSandboxState::SandboxReady);
        assert!(!stray.exists());
        agent.finish();
    });
}

#[test]
fn an_update_of_the_oom_score_reaches_the_running_processes() {
    berth_testkit::in_namespaces(|| {
        let agent = Agent::start();
        let sandbox = agent.run_sandbox("score");
        let id = agent.run_script(&sandbox, "score", "c", "sleep 1000");
        let mut client = agent.runtime();
        let update = |score| v1::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(v1::LinuxContainerResources { oom_score_adj: score, ..Default::default() }),
            ..Default::default()
        };
        agent.client.block_on(client.update_container_resources(update(900))).unwrap();
        let seen = agent.exec(&id, &["sh", "-c", "cat /proc/[0-9]*/oom_score_adj"], 10).unwrap();
        assert!(seen.stdout.split(|b| *b == b'\n').any(|score| score == b"900"), "{:?}", String::from_utf8_lossy(&seen.stdout));
        let refused = agent.client.block_on(client.update_container_resources(update(1001))).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        agent.finish();
    });
}

#[test]
fn a_resized_pod_is_still_so_after_a_restart_and_after_its_stop() {
    berth_testkit::in_namespaces(|| {
        let mut agent = Agent::start();
        let pod = agent.run_sandbox("sized");
        let resize = |agent: &Agent, id: &str, shares| {
            let limits = v1::LinuxContainerResources { cpu_shares: shares, ..Default::default() };
            let request = v1::UpdatePodSandboxResourcesRequest {
                pod_sandbox_id: id.into(),
                resources: Some(limits),
                overhead: Some(v1::LinuxContainerResources { memory_limit_in_bytes: 1 << 20, ..Default::default() }),
            };
            agent.client.block_on(agent.runtime().update_pod_sandbox_resources(request))
        };
        let seen = |agent: &Agent| {
            let request = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true };
            let status = agent.client.block_on(agent.runtime().pod_sandbox_status(request)).unwrap().into_inner();
            let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
            (info["config"]["resources"]["cpu_shares"].as_i64(), info["config"]["overhead"]["memory_limit"].as_i64())
        };
        assert_eq!(resize(&agent, "nobody", 1).unwrap_err().code(), tonic::Code::NotFound);
        assert_eq!(seen(&agent), (None, None));
        resize(&agent, &pod, 700).unwrap();
        assert_eq!(seen(&agent), (Some(700), Some(1 << 20)));
        agent.kill();
        agent.run();
        assert_eq!(seen(&agent), (Some(700), Some(1 << 20)));
        resize(&agent, &pod, 800).unwrap();
        let stop = v1::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
        agent.client.block_on(agent.runtime().stop_pod_sandbox(stop)).unwrap();
        agent.kill();
        agent.run();
        assert_eq!(seen(&agent), (Some(800), Some(1 << 20)));
        assert!(resize(&agent, &pod, 1).is_err());
        agent.finish();
    });
}

#[test]
fn every_event_names_its_pod_also_the_last_one() {
    in_namespaces(|| {
        let agent = Agent::start();
        let mut client = agent.runtime();
        let mut events = agent.client.block_on(client.get_container_events(v1::GetEventsRequest {})).unwrap().into_inner();
        let pod = agent.run_sandbox("told");
        let id = agent.run_script(&pod, "told", "c", "exit 0");
        agent.client.block_on(async {
            client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
            client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
            let mut seen = Vec::new();
            loop {
                let event = tokio::time::timeout(SOON, events.message()).await.unwrap().unwrap().unwrap();
                let status = event.pod_sandbox_status.as_ref().unwrap();
                assert_eq!((status.id.as_str(), status.metadata.as_ref().unwrap().name.as_str()), (pod.as_str(), "told"));
                let last =
                    event.container_id == pod && event.container_event_type() == v1::ContainerEventType::ContainerDeletedEvent;
                seen.push((event.container_id.clone(), event.container_event_type()));
                if last {
                    assert_eq!(status.state(), v1::PodSandboxState::SandboxNotready);
                    break;
                }
            }
            assert!(seen.contains(&(id, v1::ContainerEventType::ContainerDeletedEvent)), "{seen:?}");
        });
        agent.finish();
    });
}
