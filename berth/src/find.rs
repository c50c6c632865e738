//! Finds the container that a person means: a container's id (or its start), or a pod's name with the container's name.

use anyhow::{Result, bail};
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri_api::v1::{Container, ContainerState, ListContainersRequest};
use tonic::transport::Channel;

const POD: &str = "io.kubernetes.pod.name";
const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const CONTAINER: &str = "io.kubernetes.container.name";

fn label<'a>(container: &'a Container, key: &str) -> &'a str {
    container.labels.get(key).map_or("", String::as_str)
}

/// The container's name: the kubelet's label, else what the CRI metadata says.
pub fn container_name(container: &Container) -> &str {
    match label(container, CONTAINER) {
        "" => container.metadata.as_ref().map_or("", |m| m.name.as_str()),
        name => name,
    }
}

/// The pod's namespace and name from the kubelet's labels; empty where crictl made the container.
pub fn pod_of(container: &Container) -> (&str, &str) {
    (label(container, NAMESPACE), label(container, POD))
}

/// Chooses among `all`; `previous` asks for the run before the newest one. Pure.
fn choose<'a>(all: &'a [Container], wanted: &str, container: Option<&str>, previous: bool) -> Result<&'a Container> {
    let by_id: Vec<&Container> = all.iter().filter(|c| wanted.len() >= 4 && c.id.starts_with(wanted)).collect();
    if let [one] = by_id[..] {
        return Ok(one);
    }
    let (namespace, pod) = wanted.split_once('/').map_or((None, wanted), |(n, p)| (Some(n), p));
    let mut found: Vec<&Container> =
        all.iter().filter(|c| label(c, POD) == pod && namespace.is_none_or(|n| label(c, NAMESPACE) == n)).collect();
    if found.is_empty() {
        bail!("no pod and no container {wanted:?} here: `berth pods` and `berth ps -a` list what there is");
    }
    let mut namespaces: Vec<&str> = found.iter().map(|c| label(c, NAMESPACE)).collect();
    namespaces.sort_unstable();
    namespaces.dedup();
    if namespaces.len() > 1 {
        bail!("pod {pod:?} is in several namespaces ({}): say NAMESPACE/{pod}", namespaces.join(", "));
    }
    if let Some(name) = container {
        found.retain(|c| container_name(c) == name);
        if found.is_empty() {
            bail!("pod {pod:?} has no container {name:?}");
        }
    }
    let mut names: Vec<&str> = found.iter().map(|c| container_name(c)).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() > 1 {
        // One that runs wins over init containers that ended; otherwise the person has to say.
        let mut running: Vec<&Container> =
            found.iter().copied().filter(|c| c.state() == ContainerState::ContainerRunning).collect();
        running.sort_by_key(|c| std::cmp::Reverse(c.created_at));
        match running[..] {
            [one] if !previous => return Ok(one),
            _ => bail!("pod {pod:?} has several containers ({}): say which with -c", names.join(", ")),
        }
    }
    found.sort_by_key(|c| std::cmp::Reverse(c.created_at));
    match (previous, found.as_slice()) {
        (false, [newest, ..]) | (true, [_, newest, ..]) => Ok(newest),
        _ => bail!("container {:?} of pod {pod:?} has no run before this one", names.first().unwrap_or(&"")),
    }
}

/// Asks the agent for all containers and chooses the one that is meant.
///
/// # Errors
/// When nothing matches or several do; the text says what to add.
pub async fn container(
    client: &mut RuntimeServiceClient<Channel>,
    wanted: &str,
    container: Option<&str>,
    previous: bool,
) -> Result<Container> {
    let all = client.list_containers(ListContainersRequest::default()).await?.into_inner().containers;
    choose(&all, wanted, container, previous).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(id: &str, pod: &str, name: &str, created_at: i64, state: ContainerState) -> Container {
        let labels = [(NAMESPACE, "default"), (POD, pod), (CONTAINER, name)];
        Container {
            id: id.into(),
            created_at,
            state: state.into(),
            labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_newest_run_is_meant_and_previous_is_the_one_before() {
        let all = [
            one("aaaa1", "web", "app", 1, ContainerState::ContainerExited),
            one("bbbb2", "web", "app", 2, ContainerState::ContainerRunning),
        ];
        assert_eq!(choose(&all, "web", None, false).expect("found").id, "bbbb2");
        assert_eq!(choose(&all, "default/web", None, true).expect("found").id, "aaaa1");
        assert_eq!(choose(&all, "aaaa", None, false).expect("found").id, "aaaa1");
        assert!(choose(&all, "nothing", None, false).is_err());
    }

    #[test]
    fn several_containers_need_a_name_unless_one_runs() {
        let mut all = vec![
            one("aaaa1", "web", "init", 1, ContainerState::ContainerExited),
            one("bbbb2", "web", "app", 2, ContainerState::ContainerRunning),
        ];
        assert_eq!(choose(&all, "web", None, false).expect("found").id, "bbbb2");
        all.push(one("cccc3", "web", "side", 3, ContainerState::ContainerRunning));
        let error = choose(&all, "web", None, false).expect_err("two run").to_string();
        assert!(error.contains("app, init, side"), "{error}");
        assert_eq!(choose(&all, "web", Some("side"), false).expect("found").id, "cccc3");
    }
}
