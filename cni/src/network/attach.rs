//! Attach and detach as operations that own themselves: a caller that goes away changes nothing, a caller that comes again joins.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::inner::{Current, Inner, Operation, attachment_of, lock};
use crate::cache::CachedResult;
use crate::conf::NetworkConf;
use crate::invocation::Invocation;
use crate::kernel::refuse_own_netns;
use crate::names::{check_container_id, check_ifname};
use crate::plugins::Config;
use crate::plugins::host_local::Owner;
use crate::{Attachment, Error, Netns, PodNetwork, Result};

/// How long an attach waits for the deletion of an earlier link of the same sandbox.
const EARLIER_LINK: Duration = Duration::from_secs(10);

fn invocation(pod: &PodNetwork, netns: Option<Netns>) -> Invocation {
    let (fd, path) = netns.map_or((None, None), |netns| (Some(Arc::new(netns.fd)), netns.path));
    let args = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", pod.namespace.as_str()),
        ("K8S_POD_NAME", pod.name.as_str()),
        ("K8S_POD_INFRA_CONTAINER_ID", pod.sandbox_id.as_str()),
        ("K8S_POD_UID", pod.uid.as_str()),
    ];
    Invocation {
        container_id: pod.sandbox_id.clone(),
        ifname: pod.ifname.clone(),
        netns: fd,
        netns_path: path,
        args: args.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec(),
    }
}

/// What plugins may ask for by their capabilities.
fn capabilities(pod: &PodNetwork) -> Config {
    let mut capabilities = Config::new();
    let ports: Vec<_> = pod.port_mappings.iter().filter(|mapping| mapping.host_port != 0).collect();
    if !ports.is_empty() {
        capabilities.insert("portMappings".to_owned(), json!(ports));
    }
    if let Some(bandwidth) = &pod.bandwidth {
        capabilities.insert("bandwidth".to_owned(), json!(bandwidth));
    }
    if let Some(dns) = &pod.dns {
        capabilities.insert("dns".to_owned(), json!(dns));
    }
    if let Some(path) = &pod.cgroup_path {
        capabilities.insert("cgroupPath".to_owned(), json!(path));
    }
    if !pod.annotations.is_empty() {
        capabilities.insert("io.kubernetes.cri.pod-annotations".to_owned(), json!(pod.annotations));
    }
    capabilities
}

/// Runs `work` as the one operation of this interface. An operation of the same kind under way is joined; one of the other kind is
/// waited for first.
async fn operate<F, W>(inner: &Arc<Inner>, owner: &Owner, is_attach: bool, work: W) -> Result<Option<Attachment>>
where
    W: FnOnce() -> F,
    F: Future<Output = Result<Option<Attachment>>> + Send + 'static,
{
    let aborted = || Error::Aborted { sandbox_id: owner.container_id.clone() };
    loop {
        let (sender, receiver) = watch::channel(None);
        let other = {
            let mut operations = lock(&inner.operations);
            match operations.get(owner) {
                Some(other) => Some(other.clone()),
                None => {
                    operations.insert(owner.clone(), Operation { is_attach, outcome: receiver.clone() });
                    None
                }
            }
        };
        let (joined, mut outcome) = match other {
            Some(other) => (Some(other.is_attach), other.outcome),
            None => {
                let ended = Ended { inner: Arc::clone(inner), owner: owner.clone() };
                let work = work();
                tokio::spawn(async move {
                    let outcome = work.await;
                    // No longer under way before anybody is told.
                    drop(ended);
                    sender.send_replace(Some(outcome));
                });
                let mut receiver = receiver;
                let outcome = receiver.wait_for(Option::is_some).await.map_err(|_| aborted())?;
                return outcome.clone().unwrap_or_else(|| Err(aborted()));
            }
        };
        let finished = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        if joined == Some(is_attach) {
            return finished.ok().flatten().unwrap_or_else(|| Err(aborted()));
        }
    }
}

/// Takes the operation off the table, also when its task panics.
struct Ended {
    inner: Arc<Inner>,
    owner: Owner,
}

impl Drop for Ended {
    fn drop(&mut self) {
        lock(&self.inner.operations).remove(&self.owner);
    }
}

fn check_names(pod: &PodNetwork) -> Result<Owner> {
    check_container_id(&pod.sandbox_id)?;
    check_ifname(&pod.ifname)?;
    for value in [&pod.namespace, &pod.name, &pod.uid] {
        if value.contains([';', '=', '\n', '\0']) {
            return Err(Error::InvalidName { what: "pod name, namespace or UID", value: value.clone() });
        }
    }
    Ok(Owner { container_id: pod.sandbox_id.clone(), ifname: pod.ifname.clone() })
}

pub(super) async fn attach(inner: &Arc<Inner>, pod: &PodNetwork, netns: Netns) -> Result<Attachment> {
    let owner = check_names(pod)?;
    let work = || {
        let (inner, pod, owner) = (Arc::clone(inner), pod.clone(), owner.clone());
        async move { add(&inner, &pod, &owner, netns).await.map(Some) }
    };
    let aborted = || Error::Aborted { sandbox_id: owner.container_id.clone() };
    operate(inner, &owner, true, work).await?.ok_or_else(aborted)
}

async fn add(inner: &Inner, pod: &PodNetwork, owner: &Owner, netns: Netns) -> Result<Attachment> {
    if let Some(cached) = inner.cache.find(&owner.container_id, &owner.ifname)? {
        if !cached.is_undo() {
            return attachment_of(&cached.result, &owner.ifname);
        }
        // What an earlier try has left goes first: plugins need not bear an ADD on top of half of one.
        let fd = netns.fd.try_clone().map_err(Error::file("duplicate", "the network namespace".as_ref()))?;
        delete(inner, pod, Some(Netns { fd, path: netns.path.clone() })).await?;
    }
    if inner.reaper.is_pending(owner) && !inner.reaper.settle(EARLIER_LINK).await {
        return Err(Error::NotReady { reason: format!("the earlier link of sandbox {} is not deleted yet", owner.container_id) });
    }
    refuse_own_netns(netns.fd.as_fd())?;
    let Current { conf, .. } = inner.current()?;
    let chain = inner.chain(&conf);
    let (call, capabilities) = (invocation(pod, Some(netns)), capabilities(pod));
    let added = match chain.missing_binary() {
        Some(error) => return Err(error),
        None => chain.add(&call, &capabilities).await,
    };
    let recorded = added.and_then(|result| {
        let cached = cached(&call, &conf, &capabilities, result.to_json(conf.version));
        let attachment = attachment_of(&cached.result, &owner.ifname)?;
        if attachment.ips.is_empty() {
            return Err(Error::NoAddress { network: conf.name.clone() });
        }
        inner.cache.write(&cached, chain.has_external())?;
        Ok(attachment)
    });
    let Err(error) = recorded else { return recorded };
    // The error that counts is the first one. What cannot be undone now is on record, with the configuration that it was made by: the
    // teardown of the sandbox and reconcile send DEL again.
    if let Err(undo) = chain.delete(&call, &capabilities, None).await {
        if let Err(error) = inner.cache.write(&cached(&call, &conf, &capabilities, Value::Null), chain.has_external()) {
            tracing::warn!(sandbox = owner.container_id, error = error.chain_text(), "what is to be undone is not on record");
        }
        return Err(Error::NotUndone { cause: Box::new(error), undo: Box::new(undo) });
    }
    Err(error)
}

/// The record of an attachment; without a result that of one that has still to be undone.
fn cached(call: &Invocation, conf: &NetworkConf, capabilities: &Config, result: Value) -> CachedResult {
    let mut cached = CachedResult::new(&call.container_id, &call.ifname, &conf.name, &conf.bytes);
    cached.netns.clone_from(&call.netns_path);
    cached.cni_args.clone_from(&call.args);
    cached.capability_args.clone_from(capabilities);
    cached.result = result;
    cached
}

/// What DEL and CHECK need: from the cached result, or made of what the caller says and the present configuration.
struct Known {
    conf: Arc<NetworkConf>,
    call: Invocation,
    capabilities: Config,
    result: Value,
    cached: Option<CachedResult>,
}

fn known(inner: &Inner, pod: &PodNetwork, netns: Option<Netns>) -> Result<Known> {
    let mut call = invocation(pod, netns);
    let Some(cached) = inner.cache.find(&pod.sandbox_id, &pod.ifname)? else {
        let conf = inner.current()?.conf;
        return Ok(Known { conf, call, capabilities: capabilities(pod), result: Value::Null, cached: None });
    };
    call.args.clone_from(&cached.cni_args);
    // Where the namespace is gone an external plugin gets no path; where it is there, the one that it knows.
    if call.netns.is_some() && call.netns_path.is_none() {
        call.netns_path = cached.netns.clone().filter(|path| path.exists());
    }
    let conf = NetworkConf::parse(&cached.config_bytes()?, "cached result", None)?;
    Ok(Known {
        conf: Arc::new(conf),
        call,
        capabilities: cached.capability_args.clone(),
        result: cached.result.clone(),
        cached: Some(cached),
    })
}

pub(super) async fn detach(inner: &Arc<Inner>, pod: &PodNetwork, netns: Option<Netns>) -> Result<()> {
    let owner = check_names(pod)?;
    let work = || {
        let (inner, pod) = (Arc::clone(inner), pod.clone());
        async move { delete(&inner, &pod, netns).await.map(|()| None) }
    };
    operate(inner, &owner, false, work).await.map(drop)
}

/// DEL of the chain, then the end of the record: a failure is tried again by the next call.
pub(super) async fn delete(inner: &Inner, pod: &PodNetwork, netns: Option<Netns>) -> Result<()> {
    // Without a network nothing was attached, and what was attached before there was none is on record.
    if inner.has_no_network() && inner.cache.find(&pod.sandbox_id, &pod.ifname)?.is_none() {
        return Ok(());
    }
    let known = known(inner, pod, netns)?;
    let result = Some(&known.result).filter(|result| !result.is_null());
    inner.chain(&known.conf).delete(&known.call, &known.capabilities, result).await?;
    known.cached.as_ref().map_or(Ok(()), |cached| inner.cache.remove(cached))
}

pub(super) async fn check(inner: &Arc<Inner>, pod: &PodNetwork, netns: Netns) -> Result<()> {
    check_names(pod)?;
    let known = known(inner, pod, Some(netns))?;
    if known.cached.as_ref().is_none_or(CachedResult::is_undo) {
        return Err(Error::Check { subject: pod.sandbox_id.clone(), reason: "it is not attached".to_owned() });
    }
    inner.chain(&known.conf).check(&known.call, &known.capabilities, &known.result).await
}
