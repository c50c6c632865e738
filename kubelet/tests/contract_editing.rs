//! Editors at a manifest folder: whatever they do on the way, the pods are those of the newest whole files, and no pod is missing
//! in between.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_kubelet::clock::Clock;
use berth_kubelet::source::SourceUpdate;
use berth_kubelet::source::file::{FileSourceConfig, run};
use berth_testkit::TempState;
use berth_testkit::editors::{Choices, SAVES, litter, save};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 200;
const SOON: Duration = Duration::from_secs(30);

fn manifest(pod: &str, version: usize) -> String {
    // Half of it is a pod too, and another one.
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {pod}\nspec:\n  containers:\n  - name: c\n    image: i:{version}\n    \
         env:\n    - name: VERSION\n      value: \"{version}\"\n    - name: LAST\n      value: \"{version}\"\n"
    )
}

/// Each pod's version: its image, when all of it says the same.
fn versions(update: &SourceUpdate) -> BTreeMap<String, String> {
    let version = |pod: &berth_kubelet::Pod| {
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let mut said: Vec<&str> = container.env.iter().flatten().filter_map(|e| e.value.as_deref()).collect();
        let image = container.image.as_deref().unwrap().trim_start_matches("i:");
        said.push(image);
        let whole = said.len() == 3 && said.iter().all(|s| *s == image);
        if whole { image.to_owned() } else { format!("half of a file: {said:?}") }
    };
    update.pods.iter().map(|pod| (pod.metadata.name.clone().unwrap(), version(pod))).collect()
}

struct Folder {
    path: PathBuf,
    elsewhere: PathBuf,
    updates: mpsc::Receiver<SourceUpdate>,
    last: BTreeMap<String, String>,
    uids: BTreeMap<String, String>,
}

impl Folder {
    fn start(state: &TempState, shutdown: &CancellationToken) -> Folder {
        let (path, elsewhere) = (state.dir("manifests"), state.dir("elsewhere"));
        let (sender, updates) = mpsc::channel(1000);
        let config = FileSourceConfig {
            path: path.clone(),
            node_name: "n".into(),
            kubelet_root: state.dir("kubelet"),
            settle: Duration::from_secs(3),
            rescan: Duration::from_secs(20),
            allowed_unsafe_sysctls: Vec::new(),
            clock: Clock::default(),
        };
        tokio::spawn(run(config, sender, shutdown.clone()));
        Folder { path, elsewhere, updates, last: BTreeMap::new(), uids: BTreeMap::new() }
    }

    /// Reads updates until the pods are these; none on the way may lack a pod of `kept` or hold half of one.
    async fn wait_for(&mut self, wanted: &BTreeMap<String, String>, kept: &[&str], what: &str) {
        let deadline = tokio::time::Instant::now() + SOON;
        while self.last != *wanted {
            let update = tokio::time::timeout_at(deadline, self.updates.recv()).await;
            let Ok(Some(update)) = update else { panic!("{what}: {:?} instead of {wanted:?}", self.last) };
            self.last = versions(&update);
            let uid = |pod: &berth_kubelet::Pod| (pod.metadata.name.clone().unwrap(), pod.metadata.uid.clone().unwrap());
            self.uids = update.pods.iter().map(|pod| uid(pod)).collect();
            for pod in kept {
                assert!(self.last.contains_key(*pod), "{what}: {pod} was gone: {:?}", update.problems);
            }
            assert!(!self.last.values().any(|v| v.starts_with("half")), "{what}: {:?}", self.last);
        }
    }
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_any_edit_the_pods_are_those_of_the_newest_whole_files() {
    let state = TempState::new();
    let shutdown = CancellationToken::new();
    let mut folder = Folder::start(&state, &shutdown);
    let mut choices = Choices::new(std::env::var("BERTH_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7));
    let (a, b) = (folder.path.join("a.yaml"), folder.path.join("b.yml"));
    let wanted = |a: usize, b: usize| BTreeMap::from([("a-n".to_owned(), a.to_string()), ("b-n".to_owned(), b.to_string())]);
    save(&a, &manifest("a", 0), SAVES[0], &folder.elsewhere);
    save(&b, &manifest("b", 0), SAVES[0], &folder.elsewhere);
    folder.wait_for(&wanted(0, 0), &[], "the first files").await;
    let (mut at_a, mut at_b) = (0, 0);
    for round in 1..=ROUNDS {
        let how = choices.one(&SAVES);
        let what = format!("round {round}, {how:?}");
        let (path, pod, version) = match choices.below(2) {
            0 => (&a, "a", &mut at_a),
            _ => (&b, "b", &mut at_b),
        };
        *version = round;
        if choices.below(3) == 0 {
            litter(path, &manifest(pod, round), &mut choices);
        }
        // Several saves in a row: the last one counts.
        for _ in 0..choices.below(3) {
            save(path, &manifest(pod, 1000 + round), choices.one(&SAVES), &folder.elsewhere);
        }
        save(path, &manifest(pod, round), how, &folder.elsewhere);
        folder.wait_for(&wanted(at_a, at_b), &["a-n", "b-n"], &what).await;
    }
    // A file that is spoilt or half there harms nobody, and one that goes ends its pod.
    fs::write(&a, "apiVersion: v1\nkind: Po").unwrap();
    remove(&b);
    folder.wait_for(&BTreeMap::from([("a-n".to_owned(), at_a.to_string())]), &["a-n"], "a spoilt and a removed file").await;
    shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_or_copied_file_keeps_its_pod() {
    let state = TempState::new();
    let shutdown = CancellationToken::new();
    let mut folder = Folder::start(&state, &shutdown);
    let (a, b, c) = (folder.path.join("a.yaml"), folder.path.join("b.yaml"), folder.path.join("c.json"));
    let one = |version: &str| BTreeMap::from([("a-n".to_owned(), version.to_owned())]);
    fs::write(&a, manifest("a", 1)).unwrap();
    folder.wait_for(&one("1"), &[], "the first file").await;
    let uid = folder.uids.clone();
    fs::rename(&a, &b).unwrap();
    fs::copy(&b, &c).unwrap();
    remove(&b);
    // Something else that must be seen: what came before has been looked at then.
    fs::write(folder.path.join("z.yaml"), manifest("z", 1)).unwrap();
    let mut both = one("1");
    both.insert("z-n".into(), "1".into());
    folder.wait_for(&both, &["a-n"], "a copy of a renamed file").await;
    assert_eq!(folder.uids["a-n"], uid["a-n"]);
    remove(&folder.path.join("z.yaml"));
    folder.wait_for(&one("1"), &["a-n"], "another file removed").await;
    assert_eq!(folder.uids, uid, "the pod is the one that it was");
    shutdown.cancel();
}
