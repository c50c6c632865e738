//! The kubelet half alone, over containerd: it reaches a runtime by the CRI contract and by nothing else.
#![allow(clippy::unwrap_used)]

use berth_e2e::containerd::Containerd;
use berth_e2e::node::{Berth, Half};
use berth_e2e::registry::Registry;
use berth_e2e::{SOON, fetch, image, tools};
use berth_testkit::sandbox::NODE_IP;
use berth_testkit::{Sandbox, wait_for, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

#[test]
fn a_manifest_becomes_a_pod_of_containerd() {
    Sandbox::new().shared_root().test(|| {
        let runc = tools::program("runc", "runc");
        let containerd = Containerd::start(&runc.display().to_string());
        let _registry = Registry::start(&containerd.dir, &containerd.dir.path().join("certs.d"));
        let archive = image::archive(&containerd.dir, WEB.as_ref());
        containerd.run(&["-n", "k8s.io", "images", "import", "--all-platforms", &archive.to_string_lossy()]);

        let mut kubelet = Berth::prepare(Half::Kubelet);
        kubelet.flags = vec!["--container-runtime-endpoint".into(), format!("unix://{}", containerd.socket().display())];
        kubelet.launch();
        kubelet.write_manifest("web.yaml", include_str!("../../manifests/web.yaml"));
        let pod = kubelet.wait_running("web");
        let ip = pod["status"]["podIP"].as_str().unwrap();
        let page = |address: &str, port| wait_for(SOON, || fetch::page(address, port, "/").ok());
        assert!(page(ip, 8080).is_some_and(|p| p.starts_with("hello from berth")));
        assert!(page(NODE_IP, 18080).is_some_and(|p| p.starts_with("hello from berth")));
        assert_eq!(containerd.crictl().run(&["pods", "-q"]).lines().count(), 1);

        kubelet.remove_manifest("web.yaml");
        assert!(wait_until(SOON, || kubelet.pods().is_empty()), "{:?}", kubelet.pods());
        assert!(wait_until(SOON, || containerd.crictl().run(&["ps", "-q"]).is_empty()));
        kubelet.kill_agent();
    });
}
