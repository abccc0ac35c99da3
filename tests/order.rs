//! In which order a source is asked for what nobody waits for: small files and indexes, then headers, then weights as they lie.

#![cfg(test)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::corpus::{Random, seed};
use support::daemon::{Daemon, LOOPBACK};
use support::ran::{run, wait_until};
use support::site::{Page, Site};

const UNIT: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// Rate at which a listing comes at once, and a small file takes seconds.
const HELD: u64 = 16 << 10;

/// Streams of one flight while somebody may read, and nobody waits.
const STREAMS_WHILE_READ: usize = 4;

/// Streams that the daemon has at a time, of all flights.
const STREAMS: usize = 32;

/// Files that are begun at a time.
const FILES_AT_A_TIME: usize = 8;

/// That files came in their order, but for those that were asked for together: their requests may overtake each other.
fn assert_in_order(found: &[usize], together: usize, what: &str) {
    let mut sorted = found.to_vec();
    sorted.sort_unstable();
    let is_near =
        |(at, file): (usize, &usize)| sorted.iter().position(|of| of == file).unwrap().abs_diff(at) < together;
    assert!(found.iter().enumerate().all(is_near), "{what} came in this order: {found:?}");
}

#[test]
fn what_nobody_waits_for_comes_in_the_order_of_its_use() {
    const WEIGHTS: usize = 20;
    let (daemon, site) = (Daemon::start_with(&[LOOPBACK]), Site::open());
    // Their names are the last, and one takes seconds.
    let small: Vec<String> = (0..STREAMS + 8).map(|number| format!("z{number:02}.json")).collect();
    let weights: Vec<String> = (0..WEIGHTS).map(|number| format!("w{number:02}.safetensors")).collect();
    // As large as weights, and read before them.
    let tokenizer = "y-tokenizer.json".to_owned();
    let large = weights.iter().chain([&tokenizer]).map(|name| (name, UNIT + (64 << 10)));
    let pages = small.iter().map(|name| (name, 60 << 10)).chain(large);
    let mut index = "<html><title>Directory listing for /</title>".to_owned();
    for (name, bytes) in pages {
        let bytes = Random::new(seed()).bytes(usize::try_from(bytes).unwrap());
        site.put(&format!("/m/{name}"), Page::Ranged(Arc::new([name.as_bytes(), &bytes].concat())));
        index.push_str(&format!("<li><a href=\"{name}\">{name}</a>"));
    }
    let url = site.put("/m/", Page::Html(Arc::new(index.into_bytes())));
    let asked = || -> Vec<(String, u64)> {
        let asked = site.asked().into_iter().map(|(path, from)| (path.trim_start_matches("/m/").to_owned(), from));
        asked.filter(|(name, _)| !name.is_empty()).collect()
    };
    site.limit(HELD);
    daemon.ctl(&["create", "m", "--type", "web", "--uri", &url]).ok();
    wait_until("as much is asked for as may be at a time", LIMIT, || asked().len() >= STREAMS);
    let first = asked();
    assert!(first[..STREAMS].iter().all(|(name, _)| small.contains(name)), "small files come first: {first:?}");

    // Who opens nothing yet.
    let target = daemon.place().dir("at");
    run(daemon.ctl_command().args(["attach", "job", "m", "--lazy", "--at"]).arg(&target)).ok();
    site.limit(0);
    daemon.wait_state("m", "ready", LIMIT);
    let of_weights: Vec<(usize, u64)> = asked()
        .iter()
        .filter_map(|(name, from)| Some((weights.iter().position(|weight| weight == name)?, *from)))
        .collect();
    let number = |is_header: bool| -> Vec<usize> {
        of_weights.iter().filter(|(_, from)| (*from == 0) == is_header).map(|(file, _)| *file).collect()
    };
    let place = |of: &dyn Fn(&str, u64) -> bool| asked().iter().position(|(name, from)| of(name, *from)).unwrap();
    let whole = place(&|name, _| name == tokenizer);
    let weight = place(&|name, from| weights.iter().any(|weight| weight == name) && from > 0);
    assert!(whole < weight, "what tells of the weights comes before them: {:?}", asked());
    // Those that were begun before anybody could read were asked for whole.
    assert_in_order(&number(true), FILES_AT_A_TIME, "headers");
    assert_eq!(number(true).len(), WEIGHTS);
    let headers_first = of_weights.iter().take_while(|(_, from)| *from == 0).count();
    assert!(headers_first + STREAMS_WHILE_READ > WEIGHTS, "headers come before the rest of any file: {of_weights:?}");
    assert_in_order(&number(false), FILES_AT_A_TIME, "the rest of weights");
    assert!(number(false).len() + FILES_AT_A_TIME >= WEIGHTS, "{of_weights:?}");
}
