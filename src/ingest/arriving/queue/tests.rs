//! What is fetched next, in tables; and the same by looking at every file.

use super::*;

fn queue(files: &[u64]) -> Queue {
    let mut queue = Queue::default();
    for (entry, units) in (0..).zip(files) {
        queue.add(entry, *units, true, Early::Beginning, |_| false);
        queue.start(entry);
    }
    queue
}

fn background(queue: &mut Queue) -> Option<(u32, Range<u64>)> {
    queue.next_background().map(|step| (step.entry, step.units))
}

/// What the background would begin next, found by looking at every file.
fn by_looking(queue: &Queue) -> Option<(u32, Range<u64>)> {
    let free =
        |file: &&Queued| file.started && file.streams < RANGES_PER_FILE && file.first_missing() < file.units.len();
    let file = queue.files.iter().find(free)?;
    let at = queue.rank[&file.entry];
    Some((file.entry, queue.run(at, file.first_missing() as u64, queue.background_units())))
}

fn early_by_looking(queue: &Queue) -> Option<(usize, u64)> {
    (0..queue.files.len()).filter(|at| queue.files[*at].ranges).find_map(|at| {
        let (early, units) = (queue.files[at].early, queue.files[at].units.len() as u64);
        Some((at, (0..units).find(|unit| early.contains(*unit, units) && queue.missing(at, *unit))?))
    })
}

/// Whatever happens, the order is that of looking at every file in turn.
#[test]
fn the_order_is_that_of_looking_at_every_file() {
    for seed in 0..40_u64 {
        let mut seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let mut queue = Queue::default();
        for entry in 0..30 {
            let here = random(3);
            let early = [Early::Beginning, Early::BothEnds, Early::Whole][usize::try_from(random(3)).unwrap()];
            queue.add(entry, 1 + random(20), random(5) > 0, early, |unit| unit % 3 == here);
        }
        let mut steps: Vec<Step> = Vec::new();
        for _ in 0..600 {
            let entry = u32::try_from(random(30)).unwrap();
            match random(8) {
                0 => queue.start(entry),
                1 if random(4) == 0 && !steps.is_empty() => {
                    let at = usize::try_from(random(steps.len() as u64)).unwrap();
                    queue.rest(&steps[at]);
                }
                1 => queue.want(entry, random(20)..random(20)),
                2 => queue.set_read(random(4) == 0),
                3 => steps.extend(queue.next_wanted().map(|wanted| match wanted {
                    Wanted::Units(step) => step,
                    Wanted::Small(entry) => unreachable!("{entry} is not small"),
                })),
                4 | 5 if !steps.is_empty() => {
                    let at = usize::try_from(random(steps.len() as u64)).unwrap();
                    let step = steps.swap_remove(at);
                    let brought = random(step.units.end - step.units.start + 1);
                    for unit in step.units.clone().take(usize::try_from(brought).unwrap()) {
                        if queue.go_on(&step, unit) {
                            queue.here(step.entry, unit);
                        }
                    }
                    queue.end(&step);
                }
                _ if queue.read => steps.extend(queue.next_background()),
                _ => {
                    let expected = by_looking(&queue);
                    let step = queue.next_background();
                    assert_eq!(step.as_ref().map(|step| (step.entry, step.units.clone())), expected);
                    steps.extend(step);
                }
            }
            assert_eq!(queue.early.first().copied(), early_by_looking(&queue));
        }
    }
}

#[test]
fn files_that_are_not_started_cost_nothing() {
    let mut queue = queue(&[]);
    (0..200_000).for_each(|entry| queue.add(entry, 4, true, Early::Beginning, |_| false));
    queue.start(199_999);
    let begun = std::time::Instant::now();
    for _ in 0..20_000 {
        let step = queue.next_background().unwrap();
        assert_eq!(step.entry, 199_999);
        queue.end(&step);
    }
    assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());
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
    queue.add(7, 4, true, Early::Beginning, |unit| unit == 1);
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
fn a_stream_that_is_left_what_a_reader_waits_for_does_not_stand_still() {
    let mut queue = queue(&[20]);
    queue.here(0, 0);
    queue.set_read(true);
    let stream = queue.next_background().unwrap();
    assert_eq!(stream.units, 1..3);
    assert!(queue.go_on(&stream, 1));
    queue.want(0, 2..3);
    assert_eq!(queue.next_wanted(), None, "it is about to come");
    queue.want(0, 15..16);
    let Some(Wanted::Units(other)) = queue.next_wanted() else { panic!("nothing is wanted") };
    assert!(!queue.must_pause(&stream), "a reader waits for what it brings");
    queue.here(0, 1);
    assert!(queue.go_on(&stream, 2) && !queue.must_pause(&stream));
    queue.here(0, 2);
    assert!(queue.must_pause(&stream), "it has brought it");
    queue.end(&other);
    assert!(!queue.must_pause(&stream));
}

#[test]
fn a_long_range_ends_early_only_behind_what_a_reader_waits_for() {
    let mut queue = queue(&[20]);
    let stream = queue.next_background().unwrap();
    assert!(queue.go_on(&stream, 4));
    queue.set_read(true);
    queue.want(0, 5..6);
    assert!(queue.go_on(&stream, 5), "a reader would wait for what nobody fetches");
    assert!(!queue.go_on(&stream, 6));
}

#[test]
fn the_background_begins_nothing_while_something_wanted_waits_to_be_begun() {
    let mut queue = queue(&[20]);
    queue.add_small(7, 1);
    queue.set_read(true);
    queue.here(0, 0);
    queue.want(0, 1..2);
    assert_eq!(background(&mut queue), None, "it would take what a reader waits for");
    let Some(Wanted::Units(step)) = queue.next_wanted() else { panic!("nothing is wanted") };
    assert_eq!(step.units, 1..2);
    queue.here(0, 1);
    queue.end(&step);
    queue.want(7, 0..1);
    assert_eq!(background(&mut queue), None);
    assert_eq!(queue.next_wanted(), Some(Wanted::Small(7)));
    assert!(queue.next_background().is_some());
}

#[test]
fn what_has_not_begun_or_rests_is_left_nothing_that_a_reader_waits_for() {
    let mut queue = queue(&[20, 20]);
    let stream = queue.next_background().unwrap();
    queue.want(0, 0..1);
    let Some(Wanted::Units(wanted)) = queue.next_wanted() else { panic!("it is left to what waits for its turn") };
    assert_eq!(wanted.units, 0..1);
    assert!(!queue.go_on(&stream, 0));
    queue.end(&stream);
    queue.end(&wanted);

    let stream = queue.next_background().unwrap();
    assert!(queue.go_on(&stream, 0));
    queue.want(0, 0..2);
    assert_eq!(queue.next_wanted(), None);
    queue.rest(&stream);
    let Some(Wanted::Units(wanted)) = queue.next_wanted() else { panic!("it is left to what waits to try again") };
    assert_eq!(wanted.units, 0..2);
    queue.set_read(true);
    assert!(queue.must_pause(&stream));
    queue.rest(&wanted);
    assert!(!queue.must_pause(&stream));
    let other = queue.next_background().expect("what rests needs no way");
    queue.end(&other);

    queue.want(1, 15..16);
    assert!(queue.next_background().is_none(), "somebody is free to fetch it");
    queue.small_resting = limits::FETCHES_PER_SOURCE - 1;
    assert!(queue.next_background().is_some(), "nobody is, for who knows how long");
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
fn readers_get_indexes_and_directories_with_the_headers() {
    let mut queue = Queue::default();
    for (entry, early) in (0..).zip([Early::Whole, Early::BothEnds, Early::Beginning]) {
        queue.add(entry, 3, true, early, |_| false);
        queue.start(entry);
    }
    queue.set_read(true);
    let mut shown = Vec::new();
    while let Some(step) = queue.next_background() {
        shown.push((step.entry, step.units.clone()));
        step.units.clone().for_each(|unit| queue.here(step.entry, unit));
        queue.end(&step);
    }
    let expected = [(0, 0..1), (0, 1..2), (0, 2..3), (1, 0..1), (1, 2..3), (2, 0..1), (1, 1..2), (2, 1..3)];
    assert_eq!(shown, expected);
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
    (0..3).for_each(|entry| queue.add_small(entry, 1));
    queue.want(2, 0..1);
    assert_eq!(queue.next_wanted(), Some(Wanted::Small(2)));
    let rest: Vec<_> = std::iter::from_fn(|| queue.next_small(SMALL_AT_A_TIME).flatten()).collect();
    assert_eq!((rest, queue.next_small(SMALL_AT_A_TIME)), (vec![0, 1], Some(None)));
}

#[test]
fn small_files_that_were_taken_are_wanted_all_the_same_and_the_others_make_way() {
    let mut queue = queue(&[8]);
    (10..30).for_each(|entry| queue.add_small(entry, limits::UNIT_BYTES));
    queue.set_read(true);
    let taken: Vec<_> = std::iter::from_fn(|| queue.next_small(SMALL_AT_A_TIME).flatten()).collect();
    assert_eq!(taken.len() as u64, SMALL_BYTES_WHILE_READ / limits::UNIT_BYTES);
    queue.want(10, 0..1);
    assert!(queue.small_is_wanted(10) && !queue.small_is_wanted(11));
    assert_eq!(queue.next_wanted(), None, "whoever has taken it fetches it");
    taken.iter().for_each(|entry| queue.small_ended(*entry));
    queue.want(0, 5..6);
    assert_eq!(queue.next_small(SMALL_AT_A_TIME), None, "a reader waits for something");
    let Some(Wanted::Units(step)) = queue.next_wanted() else { panic!("nothing is wanted") };
    assert_eq!(queue.next_small(SMALL_AT_A_TIME), None, "what it waits for comes");
    queue.end(&step);
    assert!(queue.next_small(SMALL_AT_A_TIME).flatten().is_some());
}

#[test]
fn a_file_without_ranges_is_one_stream() {
    let mut queue = Queue::default();
    queue.add(0, 30, false, Early::Beginning, |unit| unit < 3);
    queue.start(0);
    assert_eq!(background(&mut queue), Some((0, 0..30)));
    queue.want(0, 20..21);
    assert_eq!(queue.next_wanted(), None);
}
