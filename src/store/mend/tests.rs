//! What becomes of a blob that is lost and of what borrows from it.

use crate::catalog::blobs::{self, BlobRow};
use crate::catalog::scrubs;
use crate::digest::Digest;
use crate::store::removal::tests::{Fixture, read};
use crate::store::verify::{Rot, Verdict};

/// Loses `bytes`, all of which are found to be rotten.
async fn lose_all(fixture: &Fixture, bytes: &[u8]) -> Option<Vec<BlobRow>> {
    let blob = fixture.row(bytes).await;
    let rotten = whole(fixture, blob).await;
    lose(fixture, blob, vec![rotten]).await
}

async fn whole(fixture: &Fixture, blob: BlobRow) -> Rot {
    let store = fixture.store.clone();
    tokio::task::spawn_blocking(move || store.whole(blob)).await.unwrap().unwrap()
}

async fn lose(fixture: &Fixture, blob: BlobRow, rotten: Vec<Rot>) -> Option<Vec<BlobRow>> {
    let store = fixture.store.clone();
    tokio::task::spawn_blocking(move || {
        assert!(matches!(store.heal(&blob, &rotten).unwrap(), Verdict::Rotten(_)), "there is no other copy");
        store.lose(&blob, &rotten).unwrap()
    })
    .await
    .unwrap()
}

async fn verify(fixture: &Fixture, blob: BlobRow) -> Verdict {
    let store = fixture.store.clone();
    tokio::task::spawn_blocking(move || store.verify(&blob, &mut |_| true)).await.unwrap().unwrap()
}

/// Changes one byte on the disk.
fn rot(fixture: &Fixture, bytes: &[u8], at: usize) {
    fixture.store.disk().mend(&Digest::of(bytes), at as u64, &[bytes[at] ^ 1]).unwrap();
}

#[tokio::test]
async fn a_lost_home_that_comes_back_keeps_what_others_borrow_from_it() {
    let mut fixture = Fixture::new().await;
    rot(&fixture, &fixture.weights, 1 << 20);
    lose_all(&fixture, &fixture.weights).await.unwrap();
    let other = [b"a header of another length".as_slice(), &fixture.weights].concat();
    let (weights, header) = (fixture.weights.clone(), other.len() - fixture.weights.len());
    fixture.bring("c", &[("other", other.clone(), &[header])]).await;
    fixture.bring("d", &[("weights", weights.clone(), &[0])]).await;
    let reader = fixture.reader("b").await;
    assert!(read(&reader, &fixture.tuned) == fixture.tuned, "what it lent before");
    assert!(read(&*fixture.reader("c").await, &other) == other);
    assert!(fixture.stored(&weights) >= weights.len() as u64);
}

#[tokio::test]
async fn copies_that_were_made_of_rotten_bytes_are_to_be_read_when_their_home_is_lost() {
    let fixture = Fixture::new().await;
    rot(&fixture, &fixture.weights, 1 << 20);
    let reader = fixture.reader("b").await;
    let tree = fixture.tree("b").digest();
    assert_eq!(fixture.store.hydrate(tree, &reader, || 0).await.unwrap().blobs, 1);
    let copy = fixture.row(&fixture.tuned).await;
    assert_eq!(lose_all(&fixture, &fixture.weights).await.unwrap(), [copy]);
    let due = fixture.store.catalog().read(|tx| scrubs::due(tx, &None, 1, 0, i64::MAX)).await.unwrap();
    assert_eq!(due, [copy], "should the scrub end here");
    assert!(matches!(verify(&fixture, copy).await, Verdict::Rotten(_)));
}

#[tokio::test]
async fn who_borrows_what_is_right_of_a_lost_home_gets_it() {
    let mut fixture = Fixture::new().await;
    let middle = fixture.weights.len();
    // No tree of the fixture has any of it.
    let [left, right] =
        [3, 5].map(|times| fixture.weights.iter().map(|byte| byte.wrapping_mul(times)).collect::<Vec<u8>>());
    let home = [left.as_slice(), &right].concat();
    let [on_left, on_right] = [&left, &right].map(|half| [b"a header".as_slice(), half].concat());
    fixture.bring("home", &[("home", home.clone(), &[0, middle])]).await;
    fixture.bring("left", &[("left", on_left.clone(), &[8])]).await;
    fixture.bring("right", &[("right", on_right.clone(), &[8])]).await;
    assert!(fixture.stored(&on_left) < 1 << 20 && fixture.stored(&on_right) < 1 << 20, "they are compact");
    rot(&fixture, &home, 7);
    let (blob, borrower) = (fixture.row(&home).await, fixture.row(&on_right).await);
    let session = fixture.reader("right").await;
    let open = session.open(&Digest::of(&on_right), on_right.len() as u64).unwrap();
    let Verdict::Rotten(rotten) = verify(&fixture, blob).await else { panic!("it is rotten") };
    assert_eq!(lose(&fixture, blob, rotten).await.unwrap(), [borrower], "who is read again");

    assert!(read(&*fixture.reader("right").await, &on_right) == on_right);
    assert!(matches!(verify(&fixture, borrower).await, Verdict::Right));
    let mut found = vec![0; on_right.len()];
    assert_eq!(open.read_at(&mut found, 0).unwrap(), on_right.len(), "a file that is open");
    assert!(found == on_right && read(&session, &on_right) == on_right, "and a session that goes on");
    let refused = fixture.reader("left").await.open(&Digest::of(&on_left), on_left.len() as u64).unwrap_err();
    assert_eq!(refused.reason(), "BLOB_MISSING");
}

#[tokio::test]
async fn a_file_that_came_again_is_not_lost_for_the_one_that_was_rotten() {
    let mut fixture = Fixture::new().await;
    let (own, blob) = (fixture.own.clone(), fixture.row(&fixture.own).await);
    fixture.store.catalog().write(move |tx| scrubs::set_verified(tx, &[blob.id], 1)).await.unwrap();
    let rotten = whole(&fixture, blob).await;
    fixture.store.remove_checkpoint("b").await.unwrap().end().await.unwrap();
    assert_eq!(lose(&fixture, blob, vec![rotten.clone()]).await, None, "it is gone");
    fixture.bring("c", &[("own", own.clone(), &[0])]).await;
    let again = fixture.row(&own).await;
    assert_eq!(lose(&fixture, again, vec![Rot { holder: again, ..rotten }]).await, None);
    assert!(read(&*fixture.reader("c").await, &own) == own);

    // Nor while one is on its way to its place.
    let rotten = whole(&fixture, again).await;
    let begins = move |tx: &rusqlite::Connection| blobs::begin_publishing(tx, [(&again.digest, "f", 1)].into_iter());
    fixture.store.catalog().write(begins).await.unwrap();
    assert_eq!(lose(&fixture, again, vec![rotten.clone()]).await, None);
    fixture.store.catalog().write(move |tx| blobs::end_publishing(tx, &again.digest)).await.unwrap();
    assert_eq!(lose(&fixture, again, vec![rotten]).await, Some(vec![]));
    assert!(!fixture.store.disk().blob_path(&again.digest).exists());
}

#[tokio::test]
async fn a_blob_that_is_right_when_it_is_read_once_more_is_right() {
    let fixture = Fixture::new().await;
    let (store, blob) = (fixture.store.clone(), fixture.row(&fixture.tuned).await);
    let verdict = tokio::task::spawn_blocking(move || {
        let (reader, borrows) = store.reader_of(&blob).unwrap().unwrap();
        store.locate(&blob, &borrows, &reader).unwrap()
    });
    assert!(matches!(verdict.await.unwrap(), Verdict::Right));
}
