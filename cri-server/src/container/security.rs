//! Capabilities and seccomp of a container, from its security context.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use berth_linux::caps::CapSet;
use berth_oci::spec::{Capabilities, Seccomp};

use crate::error::{Error, file, invalid};
use crate::id::ContainerId;
use crate::spec::{Profile, Security};

/// What containerd gives by default, and images expect.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

fn one(name: &str) -> Result<CapSet, Error> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") };
    CapSet::from_name(&full).ok_or_else(|| invalid("capabilities", format!("unknown capability {name:?}")))
}

fn is_all(names: &[String]) -> bool {
    names.iter().any(|n| n.eq_ignore_ascii_case("ALL"))
}

/// The set a container gets: bounding, permitted and effective; and the ambient one.
pub(crate) fn capabilities(security: &Security, bounding: CapSet) -> Result<(CapSet, CapSet), Error> {
    if security.privileged {
        return Ok((bounding, CapSet::EMPTY));
    }
    let mut set = CapSet::EMPTY;
    for name in DEFAULT {
        set = set.union(one(name)?);
    }
    if is_all(&security.add_capabilities) {
        set = bounding;
    }
    if is_all(&security.drop_capabilities) {
        set = CapSet::EMPTY;
    }
    let singles = |names: &[String]| -> Result<CapSet, Error> {
        let mut out = CapSet::EMPTY;
        for name in names.iter().filter(|n| !n.eq_ignore_ascii_case("ALL")) {
            out = out.union(one(name)?);
        }
        Ok(out)
    };
    let mut ambient = singles(&security.ambient_capabilities)?;
    if is_all(&security.ambient_capabilities) {
        ambient = ambient.union(bounding);
    }
    set = set.union(singles(&security.add_capabilities)?).union(ambient);
    set = set.difference(singles(&security.drop_capabilities)?);
    Ok((set, ambient.intersection(set)))
}

/// The five sets of the OCI spec.
pub(crate) fn oci_capabilities(set: CapSet, ambient: CapSet) -> Capabilities {
    Capabilities {
        bounding: set.names(),
        effective: set.names(),
        permitted: set.names(),
        inheritable: ambient.names(),
        ambient: ambient.names(),
    }
}

/// The seccomp profile, if one is to be in force. Blocking: reads a file.
pub(crate) fn seccomp(security: &Security, caps: CapSet) -> Result<Option<Seccomp>, Error> {
    if security.privileged {
        return Ok(None);
    }
    match &security.seccomp {
        None | Some(Profile::Unconfined) => Ok(None),
        Some(Profile::RuntimeDefault) => {
            let names = caps.names();
            Ok(Some(berth_oci::seccomp::default_profile(|name| names.iter().any(|n| n == name))))
        }
        Some(Profile::Localhost(reference)) => {
            let path = Path::new(reference.strip_prefix("localhost/").unwrap_or(reference));
            if !path.is_absolute() {
                return Err(invalid("seccomp.localhost_ref", format!("{reference:?} is not an absolute path")));
            }
            let text = std::fs::read(path).map_err(file("read seccomp profile", path))?;
            let profile = serde_json::from_slice(&text)
                .map_err(|e| invalid("seccomp.localhost_ref", format!("seccomp profile {}: {e}", path.display())))?;
            Ok(Some(profile))
        }
    }
}

/// A compiled filter as JSON, for the orders of execs, and a sealed memfd of it for the shim.
pub(crate) struct Compiled {
    pub(crate) json: Vec<u8>,
    pub(crate) memfd: OwnedFd,
}

/// Compiled filters by the text of their profile: most containers of a node share one.
#[derive(Default)]
pub(crate) struct FilterCache {
    known: Mutex<HashMap<String, Arc<Compiled>>>,
    /// Of containers in which something has been run: a probe's command comes every second, and neither the container's profile nor its
    /// program is read for it again.
    of: Mutex<HashMap<ContainerId, Option<Arc<Compiled>>>>,
}

/// More different profiles than a node has; beyond it the cache starts anew.
const CACHED: usize = 64;
/// The same of containers.
const CONTAINERS: usize = 1024;

impl FilterCache {
    /// The filter of a profile. Blocking: compiles it the first time.
    pub(crate) fn get(&self, profile: &Seccomp) -> Result<Arc<Compiled>, Error> {
        let bad = |e: &dyn std::fmt::Display| invalid("seccomp", format!("profile: {e}"));
        let key = serde_json::to_string(profile).map_err(|e| bad(&e))?;
        if let Some(found) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(found.clone());
        }
        let filter = berth_oci::seccomp::compile(profile).map_err(|e| bad(&e))?;
        let json = serde_json::to_vec(&filter).map_err(|e| bad(&e))?;
        let memfd = berth_linux::memfd::sealed_memfd("seccomp", &json, false).map_err(file("make", "seccomp filter"))?;
        let compiled = Arc::new(Compiled { json, memfd });
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= CACHED {
            known.clear();
        }
        known.insert(key, compiled.clone());
        Ok(compiled)
    }

    /// What is known of a container's filter: that it has none, or which.
    pub(crate) fn of(&self, id: &ContainerId) -> Option<Option<Arc<Compiled>>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Remembers a container's filter until [`Self::forget`].
    pub(crate) fn remember(&self, id: &ContainerId, filter: Option<Arc<Compiled>>) {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if of.len() >= CONTAINERS {
            of.clear();
        }
        of.insert(id.clone(), filter);
    }

    /// The container is gone.
    pub(crate) fn forget(&self, id: &ContainerId) {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(add: &[&str], drop: &[&str], ambient: &[&str]) -> Result<(Vec<String>, Vec<String>), Error> {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let security = Security {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            ambient_capabilities: owned(ambient),
            ..Default::default()
        };
        capabilities(&security, CapSet::ALL).map(|(set, ambient)| (set.names(), ambient.names()))
    }

    #[test]
    fn all_comes_first_then_single_additions_then_single_drops() {
        assert_eq!(caps(&[], &[], &[]).unwrap().0.len(), 14);
        assert_eq!(caps(&["ALL"], &[], &[]).unwrap().0.len(), CapSet::ALL.names().len());
        assert!(caps(&[], &["ALL"], &[]).unwrap().0.is_empty());
        assert_eq!(caps(&["NET_ADMIN"], &["ALL"], &[]).unwrap().0, ["CAP_NET_ADMIN"]);
        assert!(!caps(&["ALL"], &["net_raw"], &[]).unwrap().0.contains(&"CAP_NET_RAW".to_owned()));
        assert_eq!(
            caps(&[], &["ALL"], &["NET_BIND_SERVICE"]).unwrap(),
            (vec!["CAP_NET_BIND_SERVICE".into()], vec!["CAP_NET_BIND_SERVICE".into()])
        );
        assert!(caps(&["NO_SUCH"], &[], &[]).is_err());
    }

    #[test]
    fn a_privileged_container_has_what_the_agent_has_and_no_filter() {
        let bounding = CapSet::from_name("CAP_SYS_ADMIN").unwrap();
        let security = Security { privileged: true, seccomp: Some(Profile::RuntimeDefault), ..Default::default() };
        assert_eq!(capabilities(&security, bounding).unwrap().0, bounding);
        assert_eq!(seccomp(&security, bounding).unwrap(), None);
    }

    #[test]
    fn equal_profiles_are_compiled_once() {
        let cache = FilterCache::default();
        let profile = berth_oci::seccomp::default_profile(|_| false);
        let (a, b) = (cache.get(&profile).unwrap(), cache.get(&profile.clone()).unwrap());
        assert!(Arc::ptr_eq(&a, &b));
    }

    #[test]
    fn a_missing_seccomp_file_is_an_error_by_name() {
        let security = Security { seccomp: Some(Profile::Localhost("/no/such/profile.json".into())), ..Default::default() };
        let text = crate::error::text(&seccomp(&security, CapSet::EMPTY).unwrap_err());
        assert!(text.contains("/no/such/profile.json"), "{text}");
    }
}
