//! Editors at a node's manifest folder: what runs is what the newest whole file says, whatever was done on the way.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use berth_e2e::node::{Berth, Half};
use berth_testkit::editors::{Choices, SAVES, litter, save};
use berth_testkit::{Sandbox, wait_until};
use serde_json::Value;

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// BERTH_ROUNDS says how many; without it, as many as fit into this.
const SOME: Duration = Duration::from_secs(20);
/// How long one edit may take to be what runs, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

fn manifest(round: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: edited\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    \
         image: berth.test/busybox:1\n    command: [sh, -c, 'echo $FIRST $LAST; trap exit TERM; while :; do sleep 1 & wait $!; done']\n    \
         env:\n    - name: FIRST\n      value: \"{round}\"\n    - name: LAST\n      value: \"{round}\"\n"
    )
}

fn runs(berth: &Berth, round: usize) -> bool {
    let told = |pod: &Value| pod["status"]["phase"] == "Running" && pod["spec"].to_string().contains(&format!("\"{round}\""));
    berth.pods().iter().filter(|pod| told(pod)).count() == 1 && berth.logs("edited-e2e") == [format!("{round} {round}")]
}

#[test]
fn what_runs_is_what_the_newest_whole_file_says() {
    Sandbox::new().shared_root().timeout(Some(Duration::from_secs(1800))).test(|| {
        let berth = Berth::start(Half::Node, WEB);
        let path = berth.dir.path().join("manifests/edited.yaml");
        let elsewhere = berth.dir.dir("elsewhere");
        let rounds: Option<usize> = std::env::var("BERTH_ROUNDS").ok().and_then(|n| n.parse().ok());
        let (mut choices, begun) = (Choices::new(11), Instant::now());
        let mut round = 0;
        while rounds.map_or_else(|| round == 0 || begun.elapsed() < SOME, |rounds| round < rounds) {
            round += 1;
            let how = choices.one(&SAVES);
            litter(&path, &manifest(round), &mut choices);
            for _ in 0..choices.below(3) {
                save(&path, &manifest(10_000 + round), choices.one(&SAVES), &elsewhere);
            }
            save(&path, &manifest(round), how, &elsewhere);
            let done = wait_until(PATIENCE, || runs(&berth, round));
            assert!(done, "round {round}, {how:?}: {:?}\n{:?}\n{}", berth.logs("edited-e2e"), berth.pods(), berth.agent_log());
        }
        println!("MEASURED editing: {round} rounds in {:?}", begun.elapsed());
        berth.remove_manifest("edited.yaml");
        assert!(wait_until(PATIENCE, || berth.pods().is_empty()));
        berth.finish();
    });
}
