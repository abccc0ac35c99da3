//! The catalogue: listed, made from, its terms told, replaced by the operator's.

use std::fs;

use serde_json::json;

use crate::support::daemon::{Daemon, LOCALHOST, LOOPBACK};
use crate::support::files::assert_same_tree;
use crate::support::place::Place;
use crate::support::relay::Relay;
use crate::support::standin::Standin;
use crate::support::webserver::{certificates, nginx_tls_before};

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

/// The platform's list: names, where they are at the hub, and of which branch.
const OFFERED: [(&str, &str, &str); 19] = [
    ("stable-diffusion-v1-4", "CompVis/stable-diffusion-v-1-4-original", "main"),
    ("stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "main"),
    ("stable-diffusion-v2-depth", "stabilityai/stable-diffusion-2-depth", "main"),
    ("stable-diffusion-v2-inpainting", "stabilityai/stable-diffusion-2-inpainting", "main"),
    ("stable-diffusion-v2-upscaler", "stabilityai/stable-diffusion-x4-upscaler", "main"),
    ("stable-diffusion-v2-1", "stabilityai/stable-diffusion-2-1", "main"),
    ("stable-diffusion-v1-4-diffuser", "CompVis/stable-diffusion-v1-4", "main"),
    ("stable-diffusion-v1-5-diffuser", "runwayml/stable-diffusion-v1-5", "main"),
    ("stable-diffusion-v2-diffuser", "stabilityai/stable-diffusion-2", "main"),
    ("stable-diffusion-v2-1-diffuser", "stabilityai/stable-diffusion-2-1", "main"),
    ("bloomz-7b1", "bigscience/bloomz-7b1", "main"),
    ("gpt-j-6b", "EleutherAI/gpt-j-6B", "main"),
    ("gpt-j-6b-float16", "EleutherAI/gpt-j-6B", "float16"),
    ("gpt-neox-20b", "EleutherAI/gpt-neox-20b", "main"),
    ("whisper-large-v2", "openai/whisper-large-v2", "main"),
    ("whisper-medium", "openai/whisper-medium", "main"),
    ("whisper-small", "openai/whisper-small", "main"),
    ("whisper-base", "openai/whisper-base", "main"),
    ("whisper-tiny", "openai/whisper-tiny", "main"),
];

#[test]
fn every_checkpoint_of_the_built_in_catalogue_is_asked_of_the_hub_and_tells_its_terms() {
    let (place, hub) = (Place::new(), Standin::start());
    let made = certificates(&place, &["huggingface.co"]);
    let tls = nginx_tls_before(&place, hub.port, &made.join("huggingface.co.pem"));
    let proxy = Relay::proxy(tls.port);
    let daemon = Daemon::start_with(&[
        LOOPBACK,
        ("SSL_CERT_FILE", &made.join("ca.pem").display().to_string()),
        ("HTTPS_PROXY", &format!("http://127.0.0.1:{}", proxy.port())),
    ]);
    let listed = daemon.json(&["catalog"]);
    let entries = listed["checkpoints"].as_array().unwrap();
    assert_eq!(entries.len(), OFFERED.len());
    let mut line = vec!["--json", "attach", "job", "--owner", "team-a", "--at"];
    let target = daemon.place().dir("at");
    line.push(target.to_str().unwrap());
    let mut terms = Vec::new();
    for (entry, (name, repository, branch)) in entries.iter().zip(OFFERED) {
        let source = &entry["source"];
        assert_eq!((&entry["name"], &source["uri"]), (&json!(name), &json!(repository)));
        assert_eq!(source["options"].get("branch").map_or("main", |branch| branch.as_str().unwrap()), branch);
        let question = format!("GET /api/models/{repository}/revision/{branch} ");
        let before = hub.asked(&question);
        daemon.ctl(&["create", "--catalog", name, "--wait"]).ok();
        assert_eq!(hub.asked(&question), before + 1, "{question}: {:?}", hub.requests());
        terms.push(format!("{name}: {}", entry["terms_url"].as_str().unwrap()));
        line.extend(["--public-checkpoint", name]);
    }
    assert!(proxy.asked().iter().all(|head| head.starts_with("CONNECT huggingface.co:443 ")), "{:?}", proxy.asked());
    let ran = daemon.ctl(&line).ok();
    assert_eq!(ran.json()["terms"], json!(terms));
    for ((name, repository, branch), terms) in OFFERED.into_iter().zip(&terms) {
        let commit = if branch == "main" { "a" } else { "b" }.repeat(40);
        let shown = fs::read_to_string(target.join(name).join("name.txt")).unwrap();
        assert_eq!(shown, format!("{repository} {commit}\n"), "{name}");
        let page = format!("https://huggingface.co/{repository}");
        let page = if branch == "main" { page } else { format!("{page}/tree/{branch}") };
        assert_eq!(*terms, format!("{name}: {page}"));
    }
}
