//! Which units are fetched next: a pure table, without bytes, time or tasks.
//!
//! Work comes from two ends. *Wanted* units are those that a reader waits for: they are taken first, by fetchers of their own, and are
//! taken away from a stream that would come to them only later, or that rests after a failure. One that its stream comes to next stays
//! there (unless it has not begun yet or rests), and makes it *urgent*: it does not pause, whatever else is wanted. Everything else is the *background*: units of files that have been
//! started, in file order, several streams at a time. Once somebody reads ([`Queue::set_read`]), the background makes way: it begins nothing while
//! something is wanted, stands still unless it is urgent, begins with what a loader reads first of every file ([`Early`]: indexes, headers), follows the order that an earlier job read in, then readers that go straight on, and
//! takes short ranges in few streams, so that a wanted unit never queues behind much.
//!
//! A unit is missing, claimed by one step, or here. A step may lose units it has not come to; it asks before each ([`Queue::go_on`]).
//!
//! What may be next is kept in order (files that were started, what is missing of what is read first), so that a step costs the same however many files
//! wait to be started.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Range;

use crate::ingest::early::Early;
use crate::limits;

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

/// Small files of the background under way: more than have streams, so that none of those idles.
pub(in crate::ingest) const SMALL_AT_A_TIME: usize = 2 * limits::STREAMS;

/// Bytes of small files of the background under way once somebody reads: as much as its ranges may have.
const SMALL_BYTES_WHILE_READ: u64 = STREAMS_WHILE_READ as u64 * UNITS_PER_READ_RANGE * limits::UNIT_BYTES;

/// Wanted units that lie together and are asked for in one range.
const UNITS_PER_WANTED_RANGE: u64 = 2;

/// Readers that go straight on and are followed.
const FOLLOWED: usize = 8;

/// A unit that is nearer than this to where a stream reads is not taken away from it.
const NEAR: u64 = 1;

/// A small file that the background has taken.
#[derive(Debug)]
struct SmallTaken {
    bytes: u64,
    /// A reader has come to wait for it.
    is_wanted: bool,
}

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
    early: Early,
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
    stage: Stage,
    /// The last of its units that a reader waits for and that was left to it.
    urgent: Option<u64>,
}

/// How far a step is with what it comes to next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has not asked for anything yet.
    Begins,
    Reads,
    /// It waits to try again.
    Rests,
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
    /// With their bytes.
    small: VecDeque<(u32, u64)>,
    small_left: HashSet<u32>,
    /// Small files that the background has taken and that have not come, and whether a reader has come to wait for them.
    small_taken: HashMap<u32, SmallTaken>,
    wanted: VecDeque<(u32, u64)>,
    running: HashMap<u32, Running>,
    tokens: u32,
    read: bool,
    /// Background ranges that are still to be cautious.
    cautious: u32,
    /// Of those who fetch for readers, how many wait to try a small file again.
    pub(in crate::ingest) small_resting: usize,
    learned: VecDeque<(u32, u64)>,
    follows: VecDeque<Follow>,
    /// Files that were started and may have something missing: the background's, in its order.
    open: BTreeSet<usize>,
    /// Missing units, by file, of files with ranges, that a loader reads first.
    early: BTreeSet<(usize, u64)>,
}

impl Queue {
    /// Adds a file of at most one unit that is fetched whole.
    pub(in crate::ingest) fn add_small(&mut self, entry: u32, bytes: u64) {
        if self.small_left.insert(entry) {
            self.small.push_back((entry, bytes));
        }
    }

    /// Adds a file of units, of which those in `here` need not come. Background order is the order of adding.
    pub(in crate::ingest) fn add(
        &mut self,
        entry: u32,
        units: u64,
        ranges: bool,
        early: Early,
        here: impl Fn(u64) -> bool,
    ) {
        let at = self.files.len();
        if ranges {
            self.early
                .extend((0..units).filter(|unit| early.contains(*unit, units) && !here(*unit)).map(|unit| (at, unit)));
        }
        let units = (0..units).map(|unit| if here(unit) { Unit::Here } else { Unit::Missing }).collect();
        self.rank.insert(entry, at);
        self.files.push(Queued { entry, units, early, ranges, started: false, streams: 0, cursor: 0 });
    }

    /// The order in which an earlier job read: entries and units.
    pub(in crate::ingest) fn learn(&mut self, order: impl IntoIterator<Item = (u32, u64)>) {
        self.learned = order.into_iter().collect();
        let first: HashMap<u32, usize> =
            self.learned.iter().enumerate().rev().map(|(at, (entry, _))| (*entry, at)).collect();
        self.small.make_contiguous().sort_by_key(|(entry, _)| first.get(entry).copied().unwrap_or(usize::MAX));
    }

    /// Whether somebody reads what arrives.
    pub(in crate::ingest) fn set_read(&mut self, read: bool) {
        self.read = read;
    }

    /// Lets the background come to a file: its sealer follows.
    pub(in crate::ingest) fn start(&mut self, entry: u32) {
        if let Some(&at) = self.rank.get(&entry) {
            self.files[at].started = true;
            self.open.insert(at);
        }
    }

    /// A reader waits for these units.
    pub(in crate::ingest) fn want(&mut self, entry: u32, units: Range<u64>) {
        if self.small_left.contains(&entry) {
            self.wanted.push_back((entry, 0));
            return;
        }
        if let Some(taken) = self.small_taken.get_mut(&entry) {
            taken.is_wanted = true;
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

    /// Whether the unit is to be fetched by itself: missing, or claimed by a stream that comes to it only later. A stream that it is left to is in a hurry.
    fn take_away(&mut self, at: usize, unit: u64) -> bool {
        let file = &self.files[at];
        let Some(state) = index(unit).and_then(|unit| file.units.get(unit)) else { return false };
        match *state {
            Unit::Here => false,
            Unit::Missing => file.ranges,
            Unit::Claimed(token) => {
                let Some(running) = self.running.get_mut(&token).filter(|running| !running.wanted) else {
                    return false;
                };
                let far = running.stage != Stage::Reads || running.next + NEAR < unit;
                if far && file.ranges {
                    self.set(at, unit, Unit::Missing);
                    return true;
                }
                running.urgent = running.urgent.max(Some(unit));
                false
            }
        }
    }

    /// Notes what becomes of a unit. One that is missing again and behind the background is for whoever made it so.
    fn set(&mut self, at: usize, unit: u64, state: Unit) {
        let file = &mut self.files[at];
        let Some(present) = index(unit).and_then(|unit| file.units.get_mut(unit)) else { return };
        *present = state;
        if !file.ranges || !file.early.contains(unit, file.units.len() as u64) {
            return;
        }
        match state {
            Unit::Missing => self.early.insert((at, unit)),
            Unit::Claimed(_) | Unit::Here => self.early.remove(&(at, unit)),
        };
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

    /// The next small file of the background, if it may begin one now, with `most` under way; `Some(None)` when there is none left.
    pub(in crate::ingest) fn next_small(&mut self, most: usize) -> Option<Option<u32>> {
        while self.small.front().is_some_and(|(entry, _)| !self.small_left.contains(entry)) {
            self.small.pop_front();
        }
        let Some(&(entry, bytes)) = self.small.front() else { return Some(None) };
        if self.small_taken.len() >= most || self.read && (self.makes_way() || self.is_much(bytes)) {
            return None;
        }
        self.small.pop_front();
        self.small_left.remove(&entry);
        let is_wanted = self.wanted.contains(&(entry, 0));
        self.small_taken.insert(entry, SmallTaken { bytes, is_wanted });
        Some(Some(entry))
    }

    /// Whether small files of so many bytes and those that were taken are more than may be on the line before what a reader comes to wait for.
    fn is_much(&self, bytes: u64) -> bool {
        let taken: u64 = self.small_taken.values().map(|taken| taken.bytes).sum();
        taken > 0 && taken + bytes > SMALL_BYTES_WHILE_READ
    }

    /// Whether a reader has come to wait for a small file that the background has taken.
    pub(in crate::ingest) fn small_is_wanted(&self, entry: u32) -> bool {
        self.small_taken.get(&entry).is_some_and(|taken| taken.is_wanted)
    }

    /// A small file that the background had taken has come, or nobody fetches it any more.
    pub(in crate::ingest) fn small_ended(&mut self, entry: u32) {
        self.small_taken.remove(&entry);
    }

    /// Whether the background begins nothing, for readers wait.
    fn makes_way(&mut self) -> bool {
        self.something_comes() || !self.all_rest() && self.something_waits()
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

    /// Whether everybody who fetches for readers waits to try again: what else they want may wait for long.
    fn all_rest(&self) -> bool {
        let steps = self.running.values().filter(|running| running.wanted && running.stage == Stage::Rests).count();
        steps + self.small_resting >= limits::FETCHES_PER_SOURCE
    }

    /// Whether a reader waits for something that nobody has begun to fetch.
    pub(in crate::ingest) fn something_waits(&mut self) -> bool {
        while let Some(&(entry, unit)) = self.wanted.front() {
            let is_missing = |at: &usize| self.missing(*at, unit);
            if self.small_left.contains(&entry) || self.rank.get(&entry).is_some_and(is_missing) {
                return true;
            }
            self.wanted.pop_front();
        }
        false
    }

    /// Whether something comes that a reader waits for.
    fn something_comes(&self) -> bool {
        self.running.values().any(|running| running.wanted && running.stage != Stage::Rests)
    }

    /// The next range of the background, if it may begin one now.
    pub(in crate::ingest) fn next_background(&mut self) -> Option<Step> {
        if self.read {
            let background = self.running.values().filter(|running| !running.wanted).count();
            let streams = if self.cautious > 0 { STREAMS_WHILE_CAUTIOUS } else { STREAMS_WHILE_READ };
            if background >= streams || self.makes_way() {
                return None;
            }
            self.cautious = self.cautious.saturating_sub(1);
            if let Some(step) = self.next_for_readers() {
                return Some(step);
            }
        }
        let most = self.background_units();
        let mut behind = 0;
        // Those that are passed over have all their streams, of which there are few, or are passed over for the last time.
        while let Some(at) = self.open.range(behind..).next().copied() {
            behind = at + 1;
            let file = &mut self.files[at];
            if file.streams >= RANGES_PER_FILE {
                continue;
            }
            file.cursor = file.first_missing();
            let start = file.cursor as u64;
            if file.cursor < file.units.len() {
                let units = self.run(at, start, most);
                return Some(self.claim(at, units, false));
            }
            self.open.remove(&at);
        }
        None
    }

    /// What readers will want soon: headers, what was learned, what comes next.
    fn next_for_readers(&mut self) -> Option<Step> {
        if let Some((at, unit)) = self.early.first().copied() {
            return Some(self.claim(at, unit..unit + 1, false));
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
        for unit in units.clone() {
            if index(unit).and_then(|unit| self.files[at].units.get(unit)) != Some(&Unit::Here) {
                self.set(at, unit, Unit::Claimed(token));
            }
        }
        let file = &mut self.files[at];
        file.streams += usize::from(!wanted);
        if wanted {
            self.cautious = CAUTIOUS_FOR;
        }
        let running = Running { at, next: units.start, wanted, stage: Stage::Begins, urgent: None };
        self.running.insert(token, running);
        Step { entry: self.files[at].entry, units, wanted, token }
    }

    /// Whether a step comes to `unit` next: it may have been taken away.
    pub(in crate::ingest) fn go_on(&mut self, step: &Step, unit: u64) -> bool {
        let Some(running) = self.running.get_mut(&step.token) else { return false };
        (running.next, running.stage) = (unit, Stage::Reads);
        let file = &self.files[running.at];
        let claimed = index(unit).and_then(|unit| file.units.get(unit));
        // A long range that was begun before anybody read ends early, though not before what it is waited for.
        let is_long = unit - step.units.start >= UNITS_PER_READ_RANGE;
        let too_long = self.read && !step.wanted && is_long && running.urgent < Some(unit);
        !file.ranges || !too_long && matches!(claimed, Some(Unit::Claimed(token)) if *token == step.token)
    }

    /// Whether a step of the background is to stand still because something else is wanted, and nothing of its own.
    pub(in crate::ingest) fn must_pause(&self, step: &Step) -> bool {
        !step.wanted && self.read && self.something_comes() && !self.is_urgent(step)
    }

    fn is_urgent(&self, step: &Step) -> bool {
        let Some(running) = self.running.get(&step.token) else { return false };
        let unit = running.urgent.and_then(index).and_then(|unit| self.files[running.at].units.get(unit));
        unit == Some(&Unit::Claimed(step.token))
    }

    /// A step waits to try again: what others wait for of a background step is for whoever comes first.
    pub(in crate::ingest) fn rest(&mut self, step: &Step) {
        let Some(running) = self.running.get_mut(&step.token) else { return };
        running.stage = Stage::Rests;
        let (at, next) = (running.at, running.next);
        let Some(urgent) = running.urgent.take().filter(|_| self.files[at].ranges) else { return };
        for unit in next..=urgent {
            if index(unit).and_then(|unit| self.files[at].units.get(unit)) == Some(&Unit::Claimed(step.token)) {
                self.set(at, unit, Unit::Missing);
                self.wanted.push_back((step.entry, unit));
            }
        }
    }

    /// Notes a unit that arrived.
    pub(in crate::ingest) fn here(&mut self, entry: u32, unit: u64) {
        if let Some(&at) = self.rank.get(&entry) {
            self.set(at, unit, Unit::Here);
        }
    }

    /// Ends a step; what it had claimed and not brought is missing again.
    pub(in crate::ingest) fn end(&mut self, step: &Step) {
        let Some(running) = self.running.remove(&step.token) else { return };
        let at = running.at;
        self.files[at].streams -= usize::from(!running.wanted);
        for unit in step.units.clone() {
            if let Some(place) = index(unit)
                && self.files[at].units.get(place) == Some(&Unit::Claimed(step.token))
            {
                self.set(at, unit, Unit::Missing);
                let file = &mut self.files[at];
                file.cursor = file.cursor.min(place);
                if file.started {
                    self.open.insert(at);
                }
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
mod tests;
