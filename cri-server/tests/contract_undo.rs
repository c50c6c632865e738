//! A sandbox that fails, and whose undoing fails too: nothing of it is lost, neither by the agent's going on nor by its death.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use berth_cri_api::v1;
use berth_testkit::{in_namespaces, wait_until};
use support::Agent;

/// Above the pauses between the tries.
const LATER: Duration = Duration::from_secs(90);

/// An agent with a CNI plugin that fails while a file of the verb's name is there.
fn agent() -> Agent {
    let agent = Agent::tuned(|config| config.cni_bin_dirs = vec![config.root.join("bin")]);
    let (bin, conf) = (agent.root.join("bin"), agent.root.join("cni"));
    std::fs::create_dir_all(&bin).unwrap();
    std::fs::create_dir_all(&conf).unwrap();
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\necho \"$CNI_COMMAND $CNI_NETNS\" >> {root}/calls\n\
         if [ -e {root}/$CNI_COMMAND ]; then echo '{{\"cniVersion\":\"1.0.0\",\"code\":99,\"msg\":\"told to fail\"}}'; exit 1; fi\n\
         [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.1.2.3/24\"}}]}}'\nexit 0\n",
        root = agent.root.display()
    );
    std::fs::write(bin.join("moody"), script).unwrap();
    std::fs::set_permissions(bin.join("moody"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let list = r#"{"cniVersion":"1.0.0","name":"moody-net","plugins":[{"type":"moody"}]}"#;
    std::fs::write(conf.join("10.conflist"), list).unwrap();
    agent
}

fn fail(agent: &Agent, verb: &str) {
    std::fs::write(agent.root.join(verb), "").unwrap();
}

fn heal(agent: &Agent, verb: &str) {
    std::fs::remove_file(agent.root.join(verb)).unwrap();
}

fn run(agent: &Agent, name: &str) -> Result<String, tonic::Status> {
    let request = v1::RunPodSandboxRequest { config: Some(agent.sandbox_config(name)), runtime_handler: String::new() };
    let mut client = agent.runtime();
    agent.client.block_on(client.run_pod_sandbox(request)).map(|reply| reply.into_inner().pod_sandbox_id)
}

fn listed(agent: &Agent) -> Vec<(String, v1::PodSandboxState)> {
    let mut client = agent.runtime();
    let reply = agent.client.block_on(client.list_pod_sandbox(v1::ListPodSandboxRequest::default())).unwrap().into_inner();
    reply.items.iter().map(|pod| (pod.id.clone(), pod.state())).collect()
}

/// The names of network namespaces of berths here.
fn netns() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("berth-")).collect()
}

/// A pod whose ADD and DEL failed; its id.
fn broken(agent: &Agent) -> String {
    fail(agent, "ADD");
    fail(agent, "DEL");
    let error = run(agent, "one").unwrap_err();
    for part in ["(ADD): told to fail", "(DEL): told to fail", "moody"] {
        assert!(error.message().contains(part), "{error}");
    }
    let pods = listed(agent);
    let [(id, state)] = pods.as_slice() else { panic!("{pods:?}") };
    assert_eq!(*state, v1::PodSandboxState::SandboxNotready);
    assert_eq!(agent.leaks(), Vec::<String>::new(), "all that is left has an owner");
    assert_eq!(netns().len(), 1, "{:?}", netns());
    id.clone()
}

#[test]
fn a_sandbox_that_can_not_be_undone_stays_until_a_client_removes_it() {
    in_namespaces(|| {
        let agent = agent();
        let id = broken(&agent);
        let mut client = agent.runtime();
        let stop = || v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
        let error = agent.client.block_on(client.stop_pod_sandbox(stop())).unwrap_err();
        assert!(error.message().contains("told to fail"), "{error}");
        let why = agent.why(&id);
        for part in ["RunPodSandbox at the step \"set up the network\"", "told to fail"] {
            assert!(why.contains(part), "{why}");
        }
        heal(&agent, "DEL");
        agent.client.block_on(async {
            client.stop_pod_sandbox(stop()).await.unwrap();
            client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id.clone() }).await.unwrap();
        });
        assert_eq!((listed(&agent), netns()), (vec![], vec![]));
        assert_eq!(agent.leaks(), Vec::<String>::new());
        heal(&agent, "ADD");
        run(&agent, "one").unwrap();
        agent.finish();
    });
}

#[test]
fn a_sandbox_that_can_not_be_undone_goes_by_itself_once_it_can() {
    in_namespaces(|| {
        let agent = agent();
        broken(&agent);
        heal(&agent, "DEL");
        assert!(wait_until(LATER, || listed(&agent).is_empty()), "{}", agent.why("one"));
        assert_eq!((netns(), agent.leaks()), (vec![], vec![]));
        heal(&agent, "ADD");
        agent.finish();
    });
}

#[test]
fn the_next_agent_goes_on_with_what_could_not_be_undone() {
    in_namespaces(|| {
        let mut agent = agent();
        let id = broken(&agent);
        agent.kill();
        agent.run();
        // It is shown again once its undoing has failed again.
        assert!(wait_until(LATER, || listed(&agent).iter().any(|(listed, _)| *listed == id)), "{}", agent.why("one"));
        assert_eq!(agent.leaks(), Vec::<String>::new());
        assert_eq!(netns().len(), 1);
        heal(&agent, "DEL");
        assert!(wait_until(LATER, || listed(&agent).is_empty()), "{}", agent.why("one"));
        assert_eq!((netns(), agent.leaks()), (vec![], vec![]));
        let calls = std::fs::read_to_string(agent.root.join("calls")).unwrap();
        let last = calls.lines().last().unwrap();
        assert!(last.starts_with("DEL /run/netns/berth-"), "the plugin is still given the namespace's name: {last}");
        agent.finish();
    });
}

#[test]
fn the_next_agent_gives_back_what_a_dead_shim_of_a_failed_sandbox_left() {
    in_namespaces(|| {
        let mut agent = agent();
        let id = broken(&agent);
        agent.kill();
        let shims = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        let is_shim = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(format!("berth-shim\0{id}").as_bytes())
        };
        for pid in shims.filter(is_shim) {
            support::kill(pid);
        }
        heal(&agent, "DEL");
        agent.run();
        assert!(wait_until(LATER, || listed(&agent).is_empty() && netns().is_empty()), "{}", agent.why("one"));
        assert_eq!(agent.leaks(), Vec::<String>::new());
        agent.finish();
    });
}

/// An agent that died while it removed what the one before it had left half made.
#[test]
fn a_container_that_is_on_record_as_half_made_goes_whatever_its_shim_says_of_it() {
    in_namespaces(|| {
        let mut agent = Agent::start();
        let pod = agent.run_sandbox("p");
        let id = agent.run_script(&pod, "p", "c", "exec sleep 1000");
        agent.kill();
        let path = agent.state.join(format!("sandboxes/{pod}/containers/{id}/record.json"));
        let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        record["forlorn"] = true.into();
        std::fs::write(&path, record.to_string()).unwrap();
        agent.run();
        let listed = || {
            let request = v1::ListContainersRequest::default();
            agent.client.block_on(agent.runtime().list_containers(request)).unwrap().into_inner().containers
        };
        assert_eq!(listed(), [], "nobody was told of it");
        // The name is free: its next bearer waits until it is gone.
        let next = agent.run_script(&pod, "p", "c", "exec sleep 1000");
        assert_ne!(next, id);
        assert_eq!(listed().iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), [next.as_str()]);
        assert_eq!(agent.leaks(), Vec::<String>::new());
        agent.finish();
    });
}
