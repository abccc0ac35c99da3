//! Which units are fetched next: a pure table, without bytes, time or tasks.
//!
//! Work comes from two ends. *Wanted* units are those that a reader waits for: they are taken first, by fetchers of their own, and are
//! taken away from a stream that would come to them only later. Everything else is the *background*: units of files that have been
//! started, in file order, several streams at a time. Once somebody reads ([`Queue::set_read`]), the background makes way: it begins with the
//! first unit of every file (headers), follows the order that an earlier job read in, then readers that go straight on, and
//! takes short ranges in few streams, so that a wanted unit never queues behind much.
//!
//! A unit is missing, claimed by one step, or here. A step may lose units it has not come to; it asks before each ([`Queue::go_on`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;

/// Units asked for in one range while nobody reads: few requests, yet several in flight for one file.
const UNITS_PER_RANGE: u64 = 8;

/// Ranges of one file under way at a time.
const RANGES_PER_FILE: usize = 4;

/// Units of one range once somebody reads: a stream is soon free for what is wanted.
const UNITS_PER_READ_RANGE: u64 = 2;

/// Streams of the background once somebody reads.
const STREAMS_WHILE_READ: usize = 4;

/// Background ranges that are begun one unit long and two at a time after something was wanted: what a paused stream has in its buffers still takes
/// its share of the line, and the next wanted unit is likely to follow.
const CAUTIOUS_FOR: u32 = 8;

/// Streams of the background while it is cautious.
const STREAMS_WHILE_CAUTIOUS: usize = 2;

/// Wanted units that lie together and are asked for in one range.
const UNITS_PER_WANTED_RANGE: u64 = 2;

/// Readers that go straight on and are followed.
const FOLLOWED: usize = 8;

/// A unit of a stream that is nearer than this is not taken away from it.
const NEAR: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Missing,
    Claimed(u32),
    Here,
}

#[derive(Debug)]
struct Queued {
    entry: u32,
    units: Vec<Unit>,
    /// Whether units can be asked for singly.
    ranges: bool,
    started: bool,
    streams: usize,
    /// Nothing before it is missing.
    cursor: usize,
}

/// One range to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::ingest) struct Step {
    pub(in crate::ingest) entry: u32,
    pub(in crate::ingest) units: Range<u64>,
    /// Whether a reader waits for it.
    pub(in crate::ingest) wanted: bool,
    token: u32,
}

/// What is to be fetched for a reader.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::ingest) enum Wanted {
    Small(u32),
    Units(Step),
}

#[derive(Debug)]
struct Running {
    at: usize,
    next: u64,
    wanted: bool,
}

/// A reader that goes straight on: the file, the next unit, and how often it was met there.
#[derive(Debug)]
struct Follow {
    at: usize,
    unit: u64,
    met: u32,
}

/// The units of one flight: see the module's page.
#[derive(Debug, Default)]
pub(in crate::ingest) struct Queue {
    files: Vec<Queued>,
    rank: HashMap<u32, usize>,
    small: VecDeque<u32>,
    small_left: HashSet<u32>,
    wanted: VecDeque<(u32, u64)>,
    running: HashMap<u32, Running>,
    tokens: u32,
    read: bool,
    /// Background ranges that are still to be cautious.
    cautious: u32,
    learned: VecDeque<(u32, u64)>,
    follows: VecDeque<Follow>,
    /// Files before it have nothing missing.
    first: usize,
}

impl Queue {
    /// Adds a file of at most one unit that is fetched whole.
    pub(in crate::ingest) fn add_small(&mut self, entry: u32) {
        if self.small_left.insert(entry) {
            self.small.push_back(entry);
        }
    }

    /// Adds a file of units, of which those in `here` need not come. Background order is the order of adding.
    pub(in crate::ingest) fn add(&mut self, entry: u32, units: u64, ranges: bool, here: impl Fn(u64) -> bool) {
        let units = (0..units).map(|unit| if here(unit) { Unit::Here } else { Unit::Missing }).collect();
        self.rank.insert(entry, self.files.len());
        self.files.push(Queued { entry, units, ranges, started: false, streams: 0, cursor: 0 });
    }

    /// The order in which an earlier job read: entries and units.
    pub(in crate::ingest) fn learn(&mut self, order: impl IntoIterator<Item = (u32, u64)>) {
        self.learned = order.into_iter().collect();
        let first: HashMap<u32, usize> =
            self.learned.iter().enumerate().rev().map(|(at, (entry, _))| (*entry, at)).collect();
        self.small.make_contiguous().sort_by_key(|entry| first.get(entry).copied().unwrap_or(usize::MAX));
    }

    /// Whether somebody reads what arrives.
    pub(in crate::ingest) fn set_read(&mut self, read: bool) {
        self.read = read;
    }

    /// Lets the background come to a file: its sealer follows.
    pub(in crate::ingest) fn start(&mut self, entry: u32) {
        if let Some(&at) = self.rank.get(&entry) {
            self.files[at].started = true;
            self.first = self.first.min(at);
        }
    }

    /// A reader waits for these units.
    pub(in crate::ingest) fn want(&mut self, entry: u32, units: Range<u64>) {
        if self.small_left.contains(&entry) {
            self.wanted.push_back((entry, 0));
            return;
        }
        let Some(&at) = self.rank.get(&entry) else { return };
        self.follow(at, &units);
        for unit in units {
            if self.take_away(at, unit) && !self.wanted.contains(&(entry, unit)) {
                self.wanted.push_back((entry, unit));
            }
        }
    }

    /// Whether the unit is to be fetched by itself: missing, or claimed by a stream that comes to it only later.
    fn take_away(&mut self, at: usize, unit: u64) -> bool {
        let file = &mut self.files[at];
        let Some(state) = index(unit).and_then(|unit| file.units.get_mut(unit)) else { return false };
        match *state {
            Unit::Here => false,
            Unit::Missing => file.ranges,
            Unit::Claimed(token) => {
                let far = self.running.get(&token).is_some_and(|running| !running.wanted && running.next + NEAR < unit);
                if far && file.ranges {
                    *state = Unit::Missing;
                    return true;
                }
                false
            }
        }
    }

    fn follow(&mut self, at: usize, units: &Range<u64>) {
        let near = |follow: &&mut Follow| follow.at == at && follow.unit.abs_diff(units.start) <= 2;
        if let Some(follow) = self.follows.iter_mut().find(near) {
            follow.unit = units.end;
            follow.met += 1;
            return;
        }
        if self.follows.len() >= FOLLOWED {
            self.follows.pop_front();
        }
        self.follows.push_back(Follow { at, unit: units.end, met: 0 });
    }

    /// The next small file of the background.
    pub(in crate::ingest) fn next_small(&mut self) -> Option<u32> {
        while let Some(entry) = self.small.pop_front() {
            if self.small_left.remove(&entry) {
                return Some(entry);
            }
        }
        None
    }

    /// The next thing that a reader waits for.
    pub(in crate::ingest) fn next_wanted(&mut self) -> Option<Wanted> {
        while let Some((entry, unit)) = self.wanted.pop_front() {
            if self.small_left.remove(&entry) {
                return Some(Wanted::Small(entry));
            }
            let Some(&at) = self.rank.get(&entry) else { continue };
            if self.missing(at, unit) {
                let mut end = unit + 1;
                while end - unit < UNITS_PER_WANTED_RANGE
                    && self.missing(at, end)
                    && self.wanted.front() == Some(&(entry, end))
                {
                    self.wanted.pop_front();
                    end += 1;
                }
                return Some(Wanted::Units(self.claim(at, unit..end, true)));
            }
        }
        None
    }

    /// The next range of the background, if it may begin one now.
    pub(in crate::ingest) fn next_background(&mut self) -> Option<Step> {
        if self.read {
            let background = self.running.values().filter(|running| !running.wanted).count();
            let streams = if self.cautious > 0 { STREAMS_WHILE_CAUTIOUS } else { STREAMS_WHILE_READ };
            if background >= streams || background < self.running.len() {
                return None;
            }
            self.cautious = self.cautious.saturating_sub(1);
            if let Some(step) = self.next_for_readers() {
                return Some(step);
            }
        }
        let most = self.background_units();
        while self.files.get(self.first).is_some_and(|file| file.started && file.first_missing() == file.units.len()) {
            self.first += 1;
        }
        for at in self.first..self.files.len() {
            let file = &mut self.files[at];
            if !file.started || file.streams >= RANGES_PER_FILE {
                continue;
            }
            file.cursor = file.first_missing();
            let start = file.cursor as u64;
            if file.cursor < file.units.len() {
                let units = self.run(at, start, most);
                return Some(self.claim(at, units, false));
            }
        }
        None
    }

    /// What readers will want soon: headers, what was learned, what comes next.
    fn next_for_readers(&mut self) -> Option<Step> {
        let headers = (0..self.files.len()).find(|at| self.files[*at].ranges && self.missing(*at, 0));
        if let Some(at) = headers {
            return Some(self.claim(at, 0..1, false));
        }
        while let Some((entry, unit)) = self.learned.pop_front() {
            if let Some(&at) = self.rank.get(&entry)
                && self.files[at].ranges
                && self.missing(at, unit)
            {
                return Some(self.claim(at, unit..unit + 1, false));
            }
        }
        let ahead = self.follows.iter().rev().filter(|follow| follow.met > 0).find_map(|follow| {
            let file = &self.files[follow.at];
            let until = follow.unit + UNITS_PER_RANGE;
            let next = (follow.unit..until).find(|unit| file.ranges && self.missing(follow.at, *unit))?;
            Some((follow.at, next))
        });
        ahead.map(|(at, unit)| {
            let units = self.run(at, unit, self.background_units());
            self.claim(at, units, false)
        })
    }

    /// How long a range of the background may be now.
    fn background_units(&self) -> u64 {
        match (self.read, self.cautious) {
            (false, _) => UNITS_PER_RANGE,
            (true, 0) => UNITS_PER_READ_RANGE,
            (true, _) => 1,
        }
    }

    fn missing(&self, at: usize, unit: u64) -> bool {
        index(unit).and_then(|unit| self.files[at].units.get(unit)) == Some(&Unit::Missing)
    }

    /// Missing units from `start`, at most `most`; all of a file without ranges.
    fn run(&self, at: usize, start: u64, most: u64) -> Range<u64> {
        let file = &self.files[at];
        if !file.ranges {
            return 0..file.units.len() as u64;
        }
        let end = (start..start + most).take_while(|unit| self.missing(at, *unit)).last().unwrap_or(start) + 1;
        start..end
    }

    fn claim(&mut self, at: usize, units: Range<u64>, wanted: bool) -> Step {
        self.tokens = self.tokens.wrapping_add(1);
        let token = self.tokens;
        let file = &mut self.files[at];
        for unit in units.clone() {
            if let Some(state) = index(unit).and_then(|unit| file.units.get_mut(unit))
                && *state != Unit::Here
            {
                *state = Unit::Claimed(token);
            }
        }
        file.streams += usize::from(!wanted);
        if wanted {
            self.cautious = CAUTIOUS_FOR;
        }
        self.running.insert(token, Running { at, next: units.start, wanted });
        Step { entry: file.entry, units, wanted, token }
    }

    /// Whether a step comes to `unit` next: it may have been taken away.
    pub(in crate::ingest) fn go_on(&mut self, step: &Step, unit: u64) -> bool {
        let Some(running) = self.running.get_mut(&step.token) else { return false };
        running.next = unit;
        let file = &self.files[running.at];
        let claimed = index(unit).and_then(|unit| file.units.get(unit));
        // A long range that was begun before anybody read ends early.
        let too_long = self.read && !step.wanted && unit - step.units.start >= UNITS_PER_READ_RANGE;
        !file.ranges || !too_long && matches!(claimed, Some(Unit::Claimed(token)) if *token == step.token)
    }

    /// Whether a step of the background is to stand still because something else is wanted.
    pub(in crate::ingest) fn must_pause(&self, step: &Step) -> bool {
        !step.wanted && self.read && self.running.values().any(|running| running.wanted)
    }

    /// Notes a unit that arrived.
    pub(in crate::ingest) fn here(&mut self, entry: u32, unit: u64) {
        if let Some(&at) = self.rank.get(&entry)
            && let Some(state) = index(unit).and_then(|unit| self.files[at].units.get_mut(unit))
        {
            *state = Unit::Here;
        }
    }

    /// Ends a step; what it had claimed and not brought is missing again.
    pub(in crate::ingest) fn end(&mut self, step: &Step) {
        let Some(running) = self.running.remove(&step.token) else { return };
        let file = &mut self.files[running.at];
        file.streams -= usize::from(!running.wanted);
        for unit in step.units.clone() {
            if let Some(unit) = index(unit)
                && file.units.get(unit) == Some(&Unit::Claimed(step.token))
            {
                file.units[unit] = Unit::Missing;
                file.cursor = file.cursor.min(unit);
                self.first = self.first.min(running.at);
            }
        }
    }
}

impl Queued {
    fn first_missing(&self) -> usize {
        let tail = self.units.get(self.cursor..).unwrap_or_default();
        tail.iter().position(|unit| *unit == Unit::Missing).map_or(self.units.len(), |next| self.cursor + next)
    }
}

fn index(unit: u64) -> Option<usize> {
    usize::try_from(unit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(files: &[u64]) -> Queue {
        let mut queue = Queue::default();
        for (entry, units) in (0..).zip(files) {
            queue.add(entry, *units, true, |_| false);
            queue.start(entry);
        }
        queue
    }

    fn background(queue: &mut Queue) -> Option<(u32, Range<u64>)> {
        queue.next_background().map(|step| (step.entry, step.units))
    }

    #[test]
    fn the_background_goes_in_file_order_and_long_ranges() {
        let mut queue = queue(&[10, 40]);
        assert_eq!(background(&mut queue), Some((0, 0..8)));
        assert_eq!(background(&mut queue), Some((0, 8..10)));
        let of_second: Vec<_> = std::iter::from_fn(|| background(&mut queue)).collect();
        assert_eq!(of_second, [(1, 0..8), (1, 8..16), (1, 16..24), (1, 24..32)]);
    }

    #[test]
    fn what_is_here_is_not_asked_for_and_what_was_not_started_waits() {
        let mut queue = Queue::default();
        queue.add(7, 4, true, |unit| unit == 1);
        assert_eq!(background(&mut queue), None);
        queue.start(7);
        assert_eq!(background(&mut queue), Some((7, 0..1)));
        assert_eq!(background(&mut queue), Some((7, 2..4)));
    }

    #[test]
    fn a_wanted_unit_comes_first_and_is_taken_from_a_stream_that_is_far_from_it() {
        let mut queue = queue(&[20]);
        let stream = queue.next_background().unwrap();
        queue.want(0, 6..7);
        queue.want(0, 15..16);
        let steps: Vec<_> = std::iter::from_fn(|| queue.next_wanted()).collect();
        let ranges: Vec<_> = steps
            .iter()
            .map(|step| match step {
                Wanted::Units(step) => step.units.clone(),
                Wanted::Small(_) => 0..0,
            })
            .collect();
        assert_eq!(ranges, [6..7, 15..16]);
        assert!((0..6).all(|unit| queue.go_on(&stream, unit)));
        assert!(!queue.go_on(&stream, 6), "the unit was taken away");
        queue.end(&stream);
        assert_eq!(background(&mut queue), Some((0, 0..6)));
    }

    #[test]
    fn a_unit_that_is_about_to_come_is_left_to_its_stream() {
        let mut queue = queue(&[20]);
        let stream = queue.next_background().unwrap();
        assert!(queue.go_on(&stream, 3));
        queue.want(0, 3..5);
        assert_eq!(queue.next_wanted(), None);
    }

    #[test]
    fn readers_get_headers_first_then_what_was_learned_and_few_short_streams() {
        let mut queue = queue(&[20, 20]);
        queue.set_read(true);
        queue.learn([(1, 9), (0, 0)]);
        let streams: Vec<_> = std::iter::from_fn(|| queue.next_background()).collect();
        let shown: Vec<_> = streams.iter().map(|step| (step.entry, step.units.clone())).collect();
        assert_eq!(shown, [(0, 0..1), (1, 0..1), (1, 9..10), (0, 1..3)]);
        queue.want(0, 12..13);
        let Some(Wanted::Units(wanted)) = queue.next_wanted() else { panic!("nothing is wanted") };
        assert!(queue.must_pause(&streams[0]) && !queue.must_pause(&wanted));
        streams.iter().for_each(|step| queue.end(step));
        assert_eq!(background(&mut queue), None, "the background began while something was wanted");
        queue.end(&wanted);
        assert!(queue.next_background().is_some());
    }

    #[test]
    fn long_ranges_end_early_once_somebody_reads() {
        let mut queue = queue(&[20]);
        let stream = queue.next_background().unwrap();
        assert!(queue.go_on(&stream, 4));
        queue.set_read(true);
        assert!(queue.go_on(&stream, 1) && !queue.go_on(&stream, 5));
        queue.end(&stream);
        assert_eq!(background(&mut queue), Some((0, 0..1)));
    }

    #[test]
    fn a_reader_that_goes_straight_on_is_followed() {
        let mut queue = queue(&[9, 60]);
        queue.set_read(true);
        for entry in 0..2 {
            queue.here(entry, 0);
        }
        for unit in 30..33 {
            queue.want(1, unit..unit + 1);
            let Some(Wanted::Units(step)) = queue.next_wanted() else { panic!("nothing is wanted") };
            queue.here(1, unit);
            queue.end(&step);
        }
        assert_eq!(background(&mut queue), Some((1, 33..34)));
    }

    #[test]
    fn small_files_are_taken_once_and_wanted_ones_first() {
        let mut queue = Queue::default();
        (0..3).for_each(|entry| queue.add_small(entry));
        queue.want(2, 0..1);
        assert_eq!(queue.next_wanted(), Some(Wanted::Small(2)));
        let rest: Vec<_> = std::iter::from_fn(|| queue.next_small()).collect();
        assert_eq!(rest, [0, 1]);
    }

    #[test]
    fn a_file_without_ranges_is_one_stream() {
        let mut queue = Queue::default();
        queue.add(0, 30, false, |unit| unit < 3);
        queue.start(0);
        assert_eq!(background(&mut queue), Some((0, 0..30)));
        queue.want(0, 20..21);
        assert_eq!(queue.next_wanted(), None);
    }
}
