//! Reads that wait: how many may, and what becomes of them.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::source::{Expected, File, Listed};

const READS: usize = 10_000;

/// What is told of reads: how many were answered well, how many refused, and how many were let go unanswered.
#[derive(Clone, Default)]
struct Told(Arc<[AtomicUsize; 3]>);

/// Counts as let go unless it is answered.
struct Read(Told, bool);

impl Read {
    fn answer(mut self, outcome: &Result<()>) {
        self.0.0[usize::from(outcome.is_err())].fetch_add(1, Ordering::Relaxed);
        self.1 = true;
    }
}

impl Drop for Read {
    fn drop(&mut self) {
        if !self.1 {
            self.0.0[2].fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Told {
    fn resume(&self) -> Resume {
        let read = Read(self.clone(), false);
        Box::new(move |outcome| read.answer(&outcome))
    }

    fn now(&self) -> [usize; 3] {
        [0, 1, 2].map(|kind| self.0[kind].load(Ordering::Relaxed))
    }
}

/// A file of `units` units of which nothing is here.
fn arriving(directory: &tempfile::TempDir, units: u64) -> Arriving {
    let store = Store::open(directory.path()).unwrap();
    let size = Some(units * UNIT_BYTES);
    let file = File { locator: "w".into(), size, executable: false, ranges: true, expected: Expected::default() };
    let listed = Listed { path: EntryPath::new(&b"w"[..]).unwrap(), what: What::File(file) };
    let listing = Listing::new("1".into(), vec![listed]);
    Arriving::new(store, "flight".into(), &listing, false).unwrap()
}

fn range_of(read: usize, units: u64) -> Range<u64> {
    let at = read as u64 * 4096 % (units * UNIT_BYTES);
    at..at + 4096
}

#[test]
fn ten_thousand_reads_wait_and_each_goes_its_way() {
    let directory = tempfile::tempdir().unwrap();
    let (arriving, told) = (arriving(&directory, 16), Told::default());
    let numbers: Vec<u64> = (0..READS)
        .map(|read| arriving.when_here(0, range_of(read, 16), told.resume()).expect("nothing is here"))
        .collect();
    assert_eq!((told.now(), arriving.lock().waits), ([0; 3], READS));
    // From both ends and the middle, some twice.
    let gone: Vec<u64> = numbers.iter().copied().step_by(5).chain([numbers[READS - 1], numbers[0]]).collect();
    gone.iter().rev().for_each(|number| arriving.give_up(0, *number));
    let let_go = READS / 5 + 1;
    assert_eq!((told.now(), arriving.lock().waits), ([0, 0, let_go], READS - let_go));
    arriving.give_up(1, numbers[1]);
    assert_eq!(arriving.lock().waits, READS - let_go, "of another file");
    arriving.fail(&Error::unavailable("SOURCE_GONE", "the source went away"));
    assert_eq!((told.now(), arriving.lock().waits), ([0, READS - let_go, let_go], 0));
    assert!(arriving.when_here(0, 0..1, told.resume()).is_none(), "what cannot come is not waited for");
    assert_eq!(told.now()[1], READS - let_go + 1);
}

#[test]
fn one_more_than_may_wait_is_refused_at_once_and_has_its_place_when_another_goes() {
    let directory = tempfile::tempdir().unwrap();
    let (arriving, told) = (arriving(&directory, 16), Told::default());
    let numbers: Vec<u64> =
        (0..WAITING).map(|read| arriving.when_here(0, range_of(read, 16), told.resume()).unwrap()).collect();
    let (refused, heard) = std::sync::mpsc::channel();
    let one_more = Box::new(move |outcome: Result<()>| refused.send(outcome).unwrap());
    assert!(arriving.when_here(0, 0..1, one_more).is_none());
    assert_eq!(heard.try_recv().unwrap().unwrap_err().reason(), "TOO_MANY_READS");
    arriving.give_up(0, numbers[WAITING / 2]);
    assert!(arriving.when_here(0, 0..1, told.resume()).is_some());
    assert_eq!((told.now(), arriving.lock().waits), ([0, 0, 1], WAITING));
    arriving.fail(&Error::unavailable("SOURCE_GONE", "the source went away"));
    assert_eq!(told.now(), [0, WAITING, 1]);
}
