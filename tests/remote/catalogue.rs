//! The catalogue: listed, made from, its terms told, replaced by the operator's.

use std::fs;

use serde_json::json;

use crate::support::daemon::{Daemon, LOCALHOST};
use crate::support::files::assert_same_tree;
use crate::support::place::Place;
use crate::support::standin::Standin;

use super::huggingface::bring;

#[test]
fn a_checkpoint_of_the_operators_catalogue_is_public_and_tells_its_terms() {
    let (place, hub) = (Place::new(), Standin::start());
    let file = place.join("catalogue.toml");
    let text = format!(
        "[[checkpoint]]\nname = 'tiny'\ntype = 'huggingface'\nuri = 'acme/tiny'\noptions = {{ endpoint = '{endpoint}' }}\n\
         terms = 'https://hub.example/acme/tiny'\n\
         [[checkpoint]]\nname = 'tiny-half'\ntype = 'huggingface'\nuri = 'acme/tiny'\n\
         options = {{ endpoint = '{endpoint}', branch = 'float16' }}\nterms = 'https://hub.example/acme/tiny/half'\n",
        endpoint = hub.url("")
    );
    fs::write(&file, text).unwrap();
    let daemon = Daemon::start_with(&[LOCALHOST, ("CKPTD_CATALOGUE__FILE", file.to_str().unwrap())]);
    let listed = daemon.json(&["catalog"]);
    assert_eq!(listed["checkpoints"][1]["name"], "tiny-half");
    daemon.ctl(&["create", "--catalog", "tiny", "--wait"]).ok();
    daemon.ctl(&["create", "mine", "--catalog", "tiny-half", "--wait"]).ok();
    daemon.ctl(&["create", "--catalog", "tinny"]).refused(&[3], &["tinny", "did you mean tiny"]);
    let record = daemon.json(&["get", "tiny"]);
    assert_eq!((&record["public"], &record["owner"]), (&json!(true), &json!("")));
    let expected = place.join("expected");
    bring(&hub.url(""), "acme/tiny", &expected);
    let target = daemon.place().dir("at");
    let line = ["--json", "attach", "job", "--public-checkpoint", "tiny", "--public-checkpoint", "mine"];
    let ran = daemon.ctl(&[&line[..], &["--owner", "team-a", "--at", target.to_str().unwrap()]].concat()).ok();
    let terms = json!(["tiny: https://hub.example/acme/tiny", "mine: https://hub.example/acme/tiny/half"]);
    assert_eq!(ran.json()["terms"], terms);
    assert!(ran.stderr.contains("by attaching you accept: tiny: https://hub.example/acme/tiny\n"), "{ran}");
    assert_same_tree(&expected, &target.join("tiny"));
    // The same bytes made private are no checkpoint of the catalogue.
    let endpoint = format!("endpoint={}", hub.url(""));
    let line = ["create", "own", "--type", "huggingface", "--uri", "acme/tiny", "--option", &endpoint, "--wait"];
    daemon.ctl(&line).ok();
    assert_eq!(daemon.json(&["reserve", "other", "own"])["terms"], json!([]));
    assert_eq!(daemon.rows("jobs")[0]["terms"], terms);
}

#[test]
fn the_built_in_catalogue_is_what_the_platform_lists() {
    let daemon = Daemon::start();
    let listed = daemon.json(&["catalog"]);
    let entries = listed["checkpoints"].as_array().unwrap();
    assert_eq!(entries.len(), 19);
    let half = entries.iter().find(|entry| entry["name"] == "gpt-j-6b-float16").unwrap();
    assert_eq!(half["source"]["options"], json!({"branch": "float16"}));
}
