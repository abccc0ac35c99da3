//! Sentences about what goes and what stays.

use super::*;
use crate::catalog::checkpoints::Origin;

/// A change of a record by its name, and what keeps the record then.
type Change = (&'static str, fn(&mut Kept), Keeper);

/// A record of a tree of its own that can be fetched again; used at `used_ms`.
fn kept(id: &str, bytes: u64, used_ms: i64) -> Kept {
    Kept {
        id: id.into(),
        name: format!("name of {id}"),
        owner: String::new(),
        manifest: Digest::of(id.as_bytes()),
        origin: Origin { kind: "web".into(), uri: "u".into(), options: Default::default() },
        revision: "r".into(),
        pinned: false,
        leased: false,
        secrets_given: false,
        used_ms,
        own_bytes: bytes,
        logical_bytes: bytes,
    }
}

fn known(kept: Vec<Kept>) -> Known {
    Known { kept, ..Known::default() }
}

fn want(bytes: u64) -> Wanted {
    Wanted { bytes, why: Why::Watermark, keep_latest: false, force: false }
}

fn duplicate(id: i64, bytes: u64) -> Duplicate {
    Duplicate { blob: BlobRow { id, digest: Digest::of(&id.to_le_bytes()), size: 100 }, bytes, tree: None }
}

/// Ids of what is evicted, in order; blobs that are punched as `#id`.
fn steps(plan: &Plan) -> Vec<String> {
    let shown = |step: &Step| match step {
        Step::Punch(blob, _) => format!("#{}", blob.id),
        Step::Evict(eviction) => eviction.id.clone(),
    };
    plan.steps.iter().map(shown).collect()
}

#[test]
fn nothing_goes_when_nothing_is_wanted() {
    let mut known = known(vec![kept("a", 10, 1)]);
    known.duplicates = vec![duplicate(1, 5)];
    assert_eq!(steps(&plan(&known, want(0), 9)), [] as [&str; 0]);
}

#[test]
fn the_least_recently_used_goes_first_and_no_more_than_is_needed() {
    let known = known(vec![kept("a", 10, 1), kept("b", 10, 2), kept("c", 10, 3)]);
    for (bytes, gone) in [(1, &["a"][..]), (10, &["a"]), (11, &["a", "b"]), (30, &["a", "b", "c"])] {
        let plan = plan(&known, want(bytes), 9);
        assert_eq!(steps(&plan), gone, "{bytes}");
        assert_eq!(plan.lacking_bytes, 0);
    }
}

#[test]
fn copies_that_nobody_reads_go_before_any_checkpoint() {
    let mut known = known(vec![kept("a", 10, 1)]);
    known.duplicates = vec![duplicate(1, 5), duplicate(2, 5)];
    assert_eq!(steps(&plan(&known, want(5), 9)), ["#1"]);
    assert_eq!(steps(&plan(&known, want(12), 9)), ["#1", "#2", "a"]);
}

#[test]
fn copies_that_went_are_not_counted_again_with_their_tree() {
    let mut known = known(vec![kept("a", 24, 1), kept("b", 10, 2)]);
    known.duplicates = vec![Duplicate { tree: Some(Digest::of(b"a")), ..duplicate(1, 12) }];
    let short = plan(&known, want(36), 9);
    assert_eq!((steps(&short), short.bytes, short.lacking_bytes), (vec!["#1".into(), "a".into(), "b".into()], 34, 2));
    assert_eq!(steps(&plan(&known, want(24), 9)), ["#1", "a"]);

    known.shared = vec![(7, 50, Digest::of(b"a")), (7, 50, Digest::of(b"b"))];
    known.duplicates.push(duplicate(7, 30));
    let all = plan(&known, want(200), 9);
    assert_eq!(all.bytes, 12 + 30 + (24 - 12) + 10 + (50 - 30), "each byte once");
}

#[test]
fn every_victim_has_its_bytes_and_why_it_goes() {
    let plan = plan(&known(vec![kept("a", 10, 1)]), want(1), 9);
    let [Step::Evict(eviction)] = &plan.steps[..] else { panic!("{plan:?}") };
    assert_eq!((eviction.bytes, eviction.idle_ms, eviction.name.as_str()), (10, 8, "name of a"));
    assert_eq!(eviction.why, Why::Watermark);
}

#[test]
fn what_somebody_has_a_right_to_or_nobody_can_fetch_again_stays() {
    let changes: &[Change] = &[
        ("leased", |record| record.leased = true, Keeper::Leased),
        ("pinned", |record| record.pinned = true, Keeper::Pinned),
        ("uploaded", |record| record.origin.kind = "upload".into(), Keeper::Sent),
        ("sent by HTTP", |record| record.origin.kind = "local".into(), Keeper::Sent),
        ("captured", |record| record.origin.kind = "directory".into(), Keeper::Sent),
        ("of a source that is not known any more", |record| record.origin.kind = "tape".into(), Keeper::Sent),
        ("filled with given secrets", |record| record.secrets_given = true, Keeper::Secrets),
        ("not vouched for", |record| record.revision = "unpinned:1".into(), Keeper::Unvouched),
        ("an archive not vouched for", |record| record.revision = "archive:unpinned:1".into(), Keeper::Unvouched),
    ];
    for (name, change, keeper) in changes {
        let mut record = kept("a", 10, 1);
        change(&mut record);
        assert_eq!(keeper_of(&record, false, false), Some(*keeper), "{name}");
        let plan = plan(&known(vec![record, kept("b", 4, 2)]), want(14), 9);
        assert_eq!((steps(&plan), plan.lacking_bytes), (vec!["b".to_owned()], 10), "{name}");
    }
    assert_eq!(keeper_of(&kept("a", 10, 1), true, false), Some(Keeper::InUse));
    assert_eq!(keeper_of(&kept("a", 10, 1), false, false), None);
}

#[test]
fn only_what_needs_somebodys_doubt_overruled_goes_by_force() {
    let with = |change: fn(&mut Kept)| {
        let mut record = kept("a", 10, 1);
        change(&mut record);
        keeper_of(&record, false, true)
    };
    assert_eq!(with(|record| record.secrets_given = true), None);
    assert_eq!(with(|record| record.revision = "unpinned:1".into()), None);
    assert_eq!(with(|record| record.origin.kind = "upload".into()), Some(Keeper::Sent));
    assert_eq!(with(|record| record.pinned = true), Some(Keeper::Pinned));
    assert_eq!(with(|record| record.leased = true), Some(Keeper::Leased));
}

#[test]
fn what_a_call_waits_for_stays() {
    let mut known = known(vec![kept("a", 10, 1), kept("b", 10, 2)]);
    known.in_use.insert("a".into());
    assert_eq!(steps(&plan(&known, want(5), 9)), ["b"]);
}

#[test]
fn what_was_found_open_stays_and_keeps_no_other_from_going() {
    let mut known = known(vec![kept("a", 10, 1), kept("b", 10, 2)]);
    known.open.insert("a".into());
    let plan = plan(&known, want(10), 9);
    assert_eq!((steps(&plan), plan.lacking_bytes, plan.standing.leased_bytes), (vec!["b".to_owned()], 0, 10));
    assert_eq!(known.keeper_of(&known.kept[0], true), Some(Keeper::Open));
    known.kept[0].pinned = true;
    assert_eq!(known.keeper_of(&known.kept[0], true), Some(Keeper::Pinned));
}

#[test]
fn what_was_used_last_stays_where_only_order_is_kept() {
    let wanted = Wanted { keep_latest: true, ..want(100) };
    assert_eq!(steps(&plan(&known(vec![kept("a", 10, 1), kept("b", 10, 2)]), wanted, 9)), ["a"]);
    let mut last = kept("b", 10, 2);
    last.leased = true;
    assert_eq!(steps(&plan(&known(vec![kept("a", 10, 1), last]), wanted, 9)), ["a"], "the last is leased anyhow");
}

#[test]
fn records_of_one_tree_go_together_when_the_last_used_of_them_may() {
    let same = |id: &str, used_ms| Kept { manifest: Digest::of(b"same"), ..kept(id, 10, used_ms) };
    let all = known(vec![same("a", 1), kept("b", 10, 2), same("c", 3)]);
    assert_eq!(steps(&plan(&all, want(5), 9)), ["b"]);
    let twenty = plan(&all, want(20), 9);
    assert_eq!((steps(&twenty), twenty.bytes), (vec!["b".to_owned(), "a".to_owned(), "c".to_owned()], 20));
    let mut leased = all.clone();
    leased.kept[2].leased = true;
    let short = plan(&leased, want(20), 9);
    assert_eq!((steps(&short), short.lacking_bytes), (vec!["b".to_owned()], 10), "one of them keeps the bytes");
}

#[test]
fn what_several_trees_share_comes_with_the_last_of_them() {
    let mut known = known(vec![kept("a", 1, 1), kept("b", 2, 2), kept("c", 3, 3)]);
    let name = |id: &str| Digest::of(id.as_bytes());
    known.shared = vec![(7, 50, name("a")), (7, 50, name("b")), (8, 70, name("b")), (8, 70, name("c"))];
    let plan_for = |known: &Known, bytes| plan(known, want(bytes), 9);
    let some = plan_for(&known, 53);
    assert_eq!((steps(&some), some.bytes), (vec!["a".to_owned(), "b".to_owned()], 53));
    assert_eq!(plan_for(&known, 200).bytes, 1 + 2 + 3 + 50 + 70);
    known.kept[2].pinned = true;
    assert_eq!(plan_for(&known, 200).bytes, 1 + 2 + 50, "a pinned tree keeps what it shares");
    known.shared.push((9, 30, name("gone")));
    known.shared.push((9, 30, name("a")));
    assert_eq!(plan_for(&known, 200).bytes, 1 + 2 + 50 + 30, "a tree that nobody has keeps nothing");
}

#[test]
fn a_plan_that_falls_short_says_what_keeps_the_space() {
    let mut all = vec![kept("a", 1, 1), kept("b", 2, 2), kept("c", 4, 3), kept("d", 8, 4), kept("e", 16, 5)];
    all[1].leased = true;
    all[2].pinned = true;
    all[3].origin.kind = "upload".into();
    all[4].leased = true;
    all[4].pinned = true;
    let plan = plan(&known(all), want(10), 9);
    let expected = Standing { evictable_bytes: 1, leased_bytes: 2 + 16, pinned_bytes: 4, not_refetchable_bytes: 8 };
    assert_eq!((plan.standing, plan.lacking_bytes), (expected, 9));
}
