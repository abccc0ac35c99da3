//! When a right that ends by itself is over: a pure function of rows and clocks.
//!
//! A right ends at a time of the wall clock, which may be wrong: until the first answer of NTP a host may believe to be in another
//! year, and all rights would be over at once when it learns better. Nor could a scheduler renew anything while the daemon was not there. So a
//! [`Watch`] compares the wall clock with one that nobody sets and that goes on while the host sleeps (`CLOCK_BOOTTIME`). After a start, and
//! when the wall clock has gone forward by much more than time has, the rights that are over by what it shows now are *in doubt*: they are left for a grace
//! in which they can be renewed. A right that was given an end since is in no doubt, since whoever gave it has seen the new time.
//!
//! A clock that is set back makes rights last longer by as much. One that is set forward by less than [`LEAP_MS`] makes them end earlier
//! by as much.

use std::time::Duration;

/// A wall clock that has gained this much more than time has was set.
const LEAP_MS: i64 = 30_000;

/// What a clock that is only slewed may gain, as a part of the time that went by: twice the 500 ppm that the kernel allows.
const SLEW_PART: i64 = 1000;

/// Two clocks, read together, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    /// Since the epoch.
    pub(super) wall_ms: i64,
    /// Since boot, sleep included.
    pub(super) boot_ms: i64,
}

/// What is to be done with rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Decision {
    /// Jobs whose right is over.
    pub(super) over: Vec<String>,
    /// When to look again by the wall clock; `None`: when a row changes.
    pub(super) again_ms: Option<i64>,
}

/// What is remembered from one look to the next.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    last: Option<Clocks>,
    doubt: Option<Doubt>,
}

/// Rights with an end up to `wall_ms` are in doubt until the other clock shows `until_boot_ms`.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    wall_ms: i64,
    until_boot_ms: i64,
}

impl Watch {
    /// Looks at `rows` (job, end) at the time `now`.
    pub(super) fn look(&mut self, rows: &[(String, i64)], now: Clocks, grace: Duration) -> Decision {
        let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
        if self.last.replace(now).is_none_or(|last| leapt(last, now)) {
            self.doubt = Some(Doubt { wall_ms: now.wall_ms, until_boot_ms: now.boot_ms.saturating_add(grace_ms) });
        }
        let doubt = self.doubt.filter(|doubt| now.boot_ms < doubt.until_boot_ms);
        self.doubt = doubt;
        let mut decision = Decision::default();
        for (job, end) in rows {
            let again = match doubt {
                _ if *end > now.wall_ms => *end,
                Some(doubt) if *end <= doubt.wall_ms => now.wall_ms.saturating_add(doubt.until_boot_ms - now.boot_ms),
                _ => {
                    decision.over.push(job.clone());
                    continue;
                }
            };
            decision.again_ms = Some(decision.again_ms.map_or(again, |earlier| earlier.min(again)));
        }
        decision
    }
}

/// Whether the wall clock was set forward since `last`.
fn leapt(last: Clocks, now: Clocks) -> bool {
    let passed = now.boot_ms.saturating_sub(last.boot_ms).max(0);
    now.wall_ms.saturating_sub(last.wall_ms) > passed.saturating_add(passed / SLEW_PART).saturating_add(LEAP_MS)
}

/// The end of a right that is asked for again: the later one. No end is the latest; asking without one changes nothing.
pub(super) fn extended(end: Option<i64>, asked: Option<i64>) -> Option<i64> {
    let (Some(end), Some(asked)) = (end, asked) else { return end };
    Some(end.max(asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(60);
    const HOUR: i64 = 3_600_000;

    /// A look: both clocks, the rows there are, who is over, when to look again.
    type Look<'a> = (i64, i64, &'a [(&'a str, i64)], &'a [&'a str], Option<i64>);

    fn check(name: &str, looks: &[Look<'_>]) {
        let mut watch = Watch::default();
        for (number, (wall_ms, boot_ms, rows, over, again_ms)) in looks.iter().enumerate() {
            let rows: Vec<_> = rows.iter().map(|(job, end)| ((*job).to_owned(), *end)).collect();
            let decision = watch.look(&rows, Clocks { wall_ms: *wall_ms, boot_ms: *boot_ms }, GRACE);
            let over = over.iter().map(|job| (*job).to_owned()).collect();
            assert_eq!(decision, Decision { over, again_ms: *again_ms }, "{name}, look {number}");
        }
    }

    #[test]
    fn rights_end_at_their_time_and_the_earliest_is_waited_for() {
        check("nothing", &[(HOUR, 5, &[], &[], None)]);
        let rows = &[("a", HOUR + 10), ("b", HOUR + 20)];
        check(
            "one after the other",
            &[
                (HOUR, 0, rows, &[], Some(HOUR + 10)),
                (HOUR + 9, 9, rows, &[], Some(HOUR + 10)),
                (HOUR + 10, 10, rows, &["a"], Some(HOUR + 20)),
                (HOUR + 20, 20, &rows[1..], &["b"], None),
            ],
        );
        check(
            "after a long sleep of the host",
            &[(HOUR, 0, rows, &[], Some(HOUR + 10)), (9 * HOUR, 8 * HOUR, rows, &["a", "b"], None)],
        );
    }

    #[test]
    fn what_is_over_at_a_start_has_a_grace() {
        let rows = &[("a", HOUR - 1), ("b", HOUR + 5)];
        check(
            "start",
            &[
                (HOUR, 1000, rows, &[], Some(HOUR + 5)),
                (HOUR + 5, 1005, rows, &["b"], Some(HOUR + 60_000)),
                (HOUR + 60_000, 61_000, &rows[..1], &["a"], None),
            ],
        );
        check(
            "renewed in the grace",
            &[
                (HOUR, 1000, &[("a", HOUR - 1)], &[], Some(HOUR + 60_000)),
                (HOUR + 9, 1009, &[("a", 2 * HOUR)], &[], Some(2 * HOUR)),
                (HOUR + 60_000, 61_000, &[("a", 2 * HOUR)], &[], Some(2 * HOUR)),
                (2 * HOUR, HOUR + 1000, &[("a", 2 * HOUR)], &["a"], None),
            ],
        );
    }

    #[test]
    fn a_clock_that_leaps_forward_ends_nothing_at_once() {
        let years = 300_000 * HOUR;
        let rows = &[("a", HOUR), ("b", years + 20_000)];
        check(
            "NTP at boot",
            &[
                (0, 0, rows, &[], Some(HOUR)),
                (years, 5000, rows, &[], Some(years + 20_000)),
                (years + 20_000, 25_000, rows, &["b"], Some(years + 60_000)),
                (years + 60_000, 65_000, &rows[..1], &["a"], None),
            ],
        );
        check(
            "set twice",
            &[
                (0, 0, &rows[..1], &[], Some(HOUR)),
                (HOUR, 5000, &rows[..1], &[], Some(HOUR + 60_000)),
                (2 * HOUR, 6000, &rows[..1], &[], Some(2 * HOUR + 60_000)),
                (2 * HOUR + 60_000, 66_000, &rows[..1], &["a"], None),
            ],
        );
    }

    #[test]
    fn a_clock_that_is_slewed_or_set_back_is_believed() {
        let rows = &[("a", 2 * HOUR)];
        check(
            "slewed over a week",
            &[(HOUR, 0, rows, &[], Some(2 * HOUR)), (170 * HOUR, 169 * HOUR - 300_000, rows, &["a"], None)],
        );
        check("a little", &[(HOUR, 0, rows, &[], Some(2 * HOUR)), (2 * HOUR, HOUR - 29_000, rows, &["a"], None)]);
        check("back", &[(HOUR, 0, rows, &[], Some(2 * HOUR)), (0, HOUR, rows, &[], Some(2 * HOUR))]);
    }

    #[test]
    fn asking_again_takes_nothing_back() {
        for (end, asked, then) in [
            (None, None, None),
            (None, Some(1), None),
            (Some(2), None, Some(2)),
            (Some(2), Some(1), Some(2)),
            (Some(2), Some(3), Some(3)),
        ] {
            assert_eq!(extended(end, asked), then, "{end:?} {asked:?}");
        }
    }
}
