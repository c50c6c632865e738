//! The records on a real disk.

use std::os::unix::fs::PermissionsExt as _;

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::super::super::services::Reachable;
use super::*;

fn key(byte: u8) -> Option<SealingKey> {
    SealingKey::parse(&[byte; 32])
}

fn uid(text: &str) -> PodUid {
    PodUid::new(text).unwrap()
}

fn name(kind: &'static str, name: &str) -> ObjectName {
    ObjectName { kind, namespace: "ns".to_owned(), name: name.to_owned() }
}

fn secret(value: &str) -> Held {
    let object = json!({"metadata": {"name": "s", "namespace": "ns"}, "stringData": {"password": value}});
    Held::Secret(Arc::new(serde_json::from_value(object).unwrap()))
}

fn map(value: &str) -> Held {
    let object = json!({"metadata": {"name": "m", "namespace": "ns"}, "data": {"a": value}});
    Held::ConfigMap(Arc::new(serde_json::from_value(object).unwrap()))
}

fn pod(text: &str) -> KeptPod {
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": text, "namespace": "ns", "uid": text}, "spec": {"containers": [{"name": "c", "image": "i"}]}}),
    )
    .unwrap();
    let token = Token { text: format!("token-of-{text}"), expires: Timestamp::from_second(1000).unwrap() };
    KeptPod {
        pod: Arc::new(pod),
        names: [name("Secret", "s"), name("ConfigMap", "m")].into(),
        tokens: [((String::new(), 3607), Arc::new(token))].into(),
        ..KeptPod::default()
    }
}

/// Two pods that share a Secret and a ConfigMap.
fn kept() -> Kept {
    Kept {
        pods: [(uid("a"), pod("a")), (uid("b"), pod("b"))].into(),
        objects: [(name("Secret", "s"), Some(secret("hunter2"))), (name("ConfigMap", "m"), Some(map("one")))].into(),
        contact: Timestamp::from_second(500).ok(),
        ..Kept::default()
    }
}

fn write(store: &Store, before: &mut Kept, wanted: &Kept) -> usize {
    let writes = plan_writes(before, wanted, store.has_key());
    let count = writes.len();
    for write in writes {
        store.write(&write).unwrap();
        apply(before, write);
    }
    count
}

fn all_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        match entry.path().is_dir() {
            true => found.extend(all_files(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

#[test]
fn what_is_written_is_read_back_and_is_written_once() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::below(root.path(), key(1));
    let (mut written, wanted) = (Kept::default(), kept());
    assert_eq!(write(&store, &mut written, &wanted), 7, "two objects, two pods with tokens, the contact");
    let loaded = store.load();
    assert!(loaded.kept.pods == wanted.pods && loaded.kept.objects == wanted.objects);
    assert_eq!(loaded.kept.contact, wanted.contact);
    assert!(loaded.unusable_objects.is_empty() && loaded.unusable_tokens.is_empty());
    assert_eq!(write(&store, &mut written, &wanted), 0);
    let mut later = Kept { contact: Timestamp::from_second(900).ok(), ..wanted.clone() };
    assert_eq!(write(&store, &mut loaded.kept.clone(), &later), 0, "another agent has nothing to write, nor has a new contact");
    later.objects.insert(name("ConfigMap", "m"), Some(map("two")));
    assert_eq!(write(&store, &mut written, &later), 2, "the object, and with it the contact");
    assert_eq!(store.load().kept.contact, later.contact);
    for file in all_files(root.path()) {
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
    }
}

#[test]
fn a_token_of_minutes_is_written_once_an_hour() {
    let (before, mut wanted) = (kept(), kept());
    for (later, writes) in [(3599, 0), (3600, 2)] {
        let token = Token { text: "newer".to_owned(), expires: Timestamp::from_second(1000 + later).unwrap() };
        wanted.pods.get_mut(&uid("a")).unwrap().tokens = [((String::new(), 3607), Arc::new(token))].into();
        assert_eq!(plan_writes(&before, &wanted, true).len(), writes, "{later}");
    }
    wanted.pods.get_mut(&uid("a")).unwrap().tokens.clear();
    assert!(matches!(plan_writes(&before, &wanted, true)[..], [Write::RemoveTokens(_), Write::Contact(_)]));
}

#[test]
fn nothing_secret_is_on_disk_with_a_key_or_without() {
    for key in [key(1), None] {
        let root = tempfile::tempdir().unwrap();
        let store = Store::below(root.path(), key.clone());
        write(&store, &mut Kept::default(), &kept());
        for file in all_files(root.path()) {
            let text = fs::read_to_string(&file).unwrap();
            for secret in ["hunter2", "aHVudGVyMg", "token-of-"] {
                assert!(!text.contains(secret), "{secret} in {}", file.display());
            }
        }
        let loaded = store.load();
        assert_eq!(loaded.kept.objects.contains_key(&name("Secret", "s")), key.is_some());
        assert_eq!(loaded.kept.objects.get(&name("ConfigMap", "m")), Some(&Some(map("one"))));
    }
}

#[test]
fn an_object_goes_with_the_last_pod_that_names_it() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::below(root.path(), key(1));
    let (mut written, mut wanted) = (Kept::default(), kept());
    write(&store, &mut written, &wanted);
    wanted.pods.remove(&uid("a"));
    assert_eq!(write(&store, &mut written, &wanted), 3, "the pod, its tokens, the contact");
    assert_eq!(all_files(root.path()).len(), 5);
    assert_eq!(write(&store, &mut written, &Kept::default()), 4);
    let left: Vec<_> = all_files(root.path());
    assert_eq!(left, [root.path().join("api-pods/contact.json")]);
}

#[test]
fn files_that_take_anothers_place_or_are_broken_are_named_and_no_more() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::below(root.path(), key(1));
    let mut wanted = kept();
    wanted.objects.insert(name("Secret", "t"), Some(secret("other")));
    wanted.pods.get_mut(&uid("a")).unwrap().names.insert(name("Secret", "t"));
    write(&store, &mut Kept::default(), &wanted);
    let (s, t) = (store.object_file(&name("Secret", "s")), store.object_file(&name("Secret", "t")));
    let swapped = [fs::read(&s).unwrap(), fs::read(&t).unwrap()];
    fs::write(&s, &swapped[1]).unwrap();
    fs::write(&t, &swapped[0]).unwrap();
    fs::copy(store.tokens_file(&uid("b")), store.tokens_file(&uid("a"))).unwrap();
    fs::write(store.pod_file(&uid("b")), b"{half").unwrap();
    let loaded = store.load();
    assert_eq!(loaded.kept.pods.keys().collect::<Vec<_>>(), [&uid("a")]);
    assert_eq!(loaded.unusable_objects.len(), 2);
    assert_eq!(loaded.unusable_tokens.get(&uid("a")), Some(&Unusable::Damaged));
    // Once the API server has told what there is, what nobody can use goes.
    store.sweep(&loaded.kept);
    assert!(!store.pod_file(&uid("b")).exists() && !s.exists() && store.pod_file(&uid("a")).exists());
}

#[test]
fn a_start_without_the_key_keeps_what_is_sealed_for_the_pods_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::below(folder.path(), key(7));
    let (mut before, mut wanted) = (Kept::default(), kept());
    write(&store, &mut before, &wanted);
    let keyless = Store::below(folder.path(), None);
    let loaded = keyless.load();
    assert!(!loaded.unusable_objects.is_empty() && !loaded.unusable_tokens.is_empty());
    keyless.sweep(&loaded.kept);
    let again = Store::below(folder.path(), key(7)).load();
    assert_eq!((again.kept.objects.len(), again.unusable_objects.len(), again.unusable_tokens.len()), (2, 0, 0));
    wanted.pods.remove(&uid("b"));
    keyless.sweep(&wanted);
    assert_eq!(all_files(&folder.path().join(FOLDER).join(TOKENS)).len(), 1, "they go with their pod");
}

#[test]
fn another_machines_key_opens_nothing() {
    let root = tempfile::tempdir().unwrap();
    write(&Store::below(root.path(), key(1)), &mut Kept::default(), &kept());
    for other in [key(2), None] {
        let loaded = Store::below(root.path(), other).load();
        assert_eq!(loaded.kept.pods.len(), 2);
        assert_eq!((loaded.unusable_objects.len(), loaded.unusable_tokens.len()), (1, 2));
        assert!(loaded.kept.pods.values().all(|pod| pod.tokens.is_empty()));
    }
}

/// What version 1's files in `golden/v1` say.
fn golden() -> Kept {
    let node: Node = serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {"disk": "ssd"}}})).unwrap();
    let port = json!({"name": "https", "number": 443, "protocol": "TCP"});
    let api: Reachable = serde_json::from_value(json!({"address": "10.96.0.1", "ports": [port]})).unwrap();
    let mut kept = kept();
    kept.objects.insert(name("ConfigMap", "gone"), None);
    kept.pods.get_mut(&uid("a")).unwrap().names.insert(name("ConfigMap", "gone"));
    Kept { services: Some([(("default".to_owned(), "kubernetes".to_owned()), api)].into()), node: Some(Arc::new(node)), ..kept }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => _ = fs::copy(entry.path(), to.join(entry.file_name())).unwrap(),
        }
    }
}

/// A field's name, a file's name, what a seal is about: nothing of it may change unless the version does, or no node finds its pods again.
#[test]
fn the_files_of_version_1_are_read_and_are_all_that_is_written() {
    let root = tempfile::tempdir().unwrap();
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/offline/golden/v1");
    copy(&old, &root.path().join(FOLDER));
    let loaded = Store::below(root.path(), key(7)).load();
    let wanted = golden();
    assert!(loaded.kept.pods == wanted.pods && loaded.kept.objects == wanted.objects);
    assert_eq!((loaded.kept.services, loaded.kept.node, loaded.kept.contact), (wanted.services, wanted.node, wanted.contact));
    assert!(loaded.unusable_objects.is_empty() && loaded.unusable_tokens.is_empty());
    let now = tempfile::tempdir().unwrap();
    write(&Store::below(now.path(), key(7)), &mut Kept::default(), &golden());
    let names =
        |root: &Path| all_files(root).into_iter().map(|path| path.strip_prefix(root).unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&now.path().join(FOLDER)), names(&old));
    for file in names(&old).into_iter().filter(|file| !file.starts_with(TOKENS)) {
        let (before, after) =
            (fs::read_to_string(old.join(&file)).unwrap(), fs::read_to_string(now.path().join(FOLDER).join(&file)).unwrap());
        assert!(before == after || before.contains("\"sealed\""), "{}: {before} {after}", file.display());
    }
}
