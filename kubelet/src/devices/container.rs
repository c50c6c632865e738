//! What plugins want a container to get, put together and into its configuration. Pure.

use std::collections::BTreeMap;

use berth_cri_api::v1 as cri;

use super::wire::v1beta1::ContainerAllocateResponse;

/// The answers of all plugins for one container. Of two that want the same name or path, the first counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prepared {
    envs: BTreeMap<String, String>,
    mounts: Vec<cri::Mount>,
    devices: Vec<cri::Device>,
    annotations: BTreeMap<String, String>,
    cdi_devices: Vec<cri::CdiDevice>,
}

impl Prepared {
    /// Adds a plugin's answer.
    pub fn add(&mut self, answer: ContainerAllocateResponse) {
        for (lists, texts) in [(&mut self.envs, answer.envs), (&mut self.annotations, answer.annotations)] {
            texts.into_iter().for_each(|(key, value)| _ = lists.entry(key).or_insert(value));
        }
        for mount in answer.mounts {
            if !self.mounts.iter().any(|m| m.container_path == mount.container_path) {
                self.mounts.push(cri::Mount {
                    container_path: mount.container_path,
                    host_path: mount.host_path,
                    readonly: mount.read_only,
                    ..cri::Mount::default()
                });
            }
        }
        for device in answer.devices {
            if !self.devices.iter().any(|d| d.container_path == device.container_path) {
                self.devices.push(cri::Device {
                    container_path: device.container_path,
                    host_path: device.host_path,
                    permissions: device.permissions,
                });
            }
        }
        for device in answer.cdi_devices {
            if !self.cdi_devices.iter().any(|d| d.name == device.name) {
                self.cdi_devices.push(cri::CdiDevice { name: device.name });
            }
        }
    }

    /// Puts it into a container's configuration. The pod's own environment comes later and wins, as do the kubelet's annotations.
    pub fn apply_to(self, config: &mut cri::ContainerConfig) {
        let envs = self.envs.into_iter().map(|(key, value)| cri::KeyValue { key, value: value.into_bytes() });
        config.envs.splice(0..0, envs);
        config.mounts.splice(0..0, self.mounts);
        config.devices.splice(0..0, self.devices);
        config.cdi_devices.extend(self.cdi_devices);
        for (key, value) in self.annotations {
            config.annotations.entry(key).or_insert(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::v1beta1 as wire;
    use super::*;

    #[test]
    fn the_first_plugin_wins_and_the_pods_own_environment_comes_last() {
        let answer = |value: &str| wire::ContainerAllocateResponse {
            envs: [("A".to_owned(), value.to_owned())].into(),
            mounts: vec![wire::Mount { container_path: "/lib/x".into(), host_path: format!("/{value}"), read_only: true }],
            devices: vec![wire::DeviceSpec {
                container_path: "/dev/x".into(),
                host_path: format!("/dev/{value}"),
                permissions: "rw".into(),
            }],
            annotations: [("a".to_owned(), value.to_owned()), ("berth/log-max-files".to_owned(), value.to_owned())].into(),
            cdi_devices: vec![wire::CdiDevice { name: "v.io/x=1".into() }],
        };
        let mut prepared = Prepared::default();
        prepared.add(answer("one"));
        prepared.add(answer("two"));
        let own = cri::KeyValue { key: "A".into(), value: b"own".to_vec() };
        let mut config = cri::ContainerConfig {
            envs: vec![own.clone()],
            mounts: vec![cri::Mount { container_path: "/v".into(), ..cri::Mount::default() }],
            annotations: [("berth/log-max-files".to_owned(), "5".to_owned())].into(),
            ..cri::ContainerConfig::default()
        };
        prepared.apply_to(&mut config);
        assert_eq!(config.envs, [cri::KeyValue { key: "A".into(), value: b"one".to_vec() }, own]);
        let paths: Vec<_> = config.mounts.iter().map(|m| (m.container_path.as_str(), m.host_path.as_str(), m.readonly)).collect();
        assert_eq!(paths, [("/lib/x", "/one", true), ("/v", "", false)]);
        assert_eq!(config.devices.len(), 1);
        assert_eq!((config.devices[0].host_path.as_str(), config.devices[0].permissions.as_str()), ("/dev/one", "rw"));
        assert_eq!(config.cdi_devices, [cri::CdiDevice { name: "v.io/x=1".into() }]);
        assert_eq!((config.annotations["a"].as_str(), config.annotations["berth/log-max-files"].as_str()), ("one", "5"));
    }
}
