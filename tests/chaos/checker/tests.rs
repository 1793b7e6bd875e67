//! The checker bites: logs that are right pass, and each way of doctoring them is found.

use std::time::Duration;

use tidegate::subject::Subject;

use super::*;
use crate::ledger::{Incarnation, Publication, Removal};

const OLD: u64 = 1;
const NEW: u64 = 2;

fn id(stream: u64, sequence: u64) -> EventId {
    EventId { epoch: Epoch::from_seed(stream), sequence }
}

fn at_id(stream: u64, sequence: u64) -> Position {
    id(stream, sequence).into()
}

fn at(seconds: u64) -> Moment {
    Duration::from_secs(seconds)
}

/// Events 0 to 9 with sequences 1 to 10, by turns on `a` and `b`, one a second; then 10 to 13 in the stream that was
/// made again. Event 14 is uncertain, event 15 was refused.
fn truth() -> Truth {
    let publication = |token: u64, outcome| Publication {
        subject: Subject::parse(if token.is_multiple_of(2) { "a" } else { "b" }).unwrap(),
        begun: at(token),
        ttl: None,
        outcome,
        settled: at(token),
    };
    let old = (0..10).map(|token| publication(token, Outcome::Stored(id(OLD, token + 1))));
    let new = (10..14).map(|token| publication(token, Outcome::Stored(id(NEW, token - 9))));
    let rest = [publication(14, Outcome::Uncertain), publication(15, Outcome::Refused)];
    let incarnation = |seed| Incarnation::new(Epoch::from_seed(seed), 1);
    Truth {
        publications: old.chain(new).chain(rest).collect(),
        incarnations: vec![incarnation(OLD), incarnation(NEW)],
        removals: vec![],
    }
}

/// What a client of everything rightly sees.
fn right() -> Vec<What> {
    let old = (1..=10).map(|n| What::Event(at_id(OLD, n), n as Token - 1));
    let new = (1..=4).map(|n| What::Event(at_id(NEW, n), n as Token + 9));
    let opened = [What::Opened { last_event_id: None, by: "a test" }, What::Position(at_id(OLD, 0))];
    opened.into_iter().chain(old).chain([gap(id(OLD, 10), id(NEW, 0), "recreated")]).chain(new).collect()
}

fn gap(requested: EventId, resumed: EventId, reason: &str) -> What {
    What::Gap { requested: requested.to_string(), resumed: resumed.into(), reason: reason.into() }
}

fn judged(truth: &Truth, filter: &str, seen: Vec<What>) -> String {
    judged_with(truth, filter, Wants::default(), seen)
}

fn judged_with(truth: &Truth, filter: &str, wants: Wants, seen: Vec<What>) -> String {
    let entries = seen.into_iter().enumerate().map(|(second, what)| Entry { at: at(second as u64), what }).collect();
    let log =
        Log { name: "one".into(), filters: vec![Filter::parse(filter).unwrap()], wants, begins: Begins::Now, entries };
    let found = Checker::new(truth).judge(&log, true);
    found.into_iter().map(|violation| violation.what + "\n").collect()
}

/// The place of an event in what is rightly seen.
fn place(token: Token) -> usize {
    right().iter().position(|what| matches!(what, What::Event(_, seen) if *seen == token)).unwrap()
}

#[test]
fn what_is_right_passes() {
    assert_eq!(judged(&truth(), ">", right()), "");

    let resumed = place(5);
    let mut seen = right();
    seen.splice(
        resumed..resumed,
        [
            What::Ended,
            What::Opened { last_event_id: Some(at_id(OLD, 5)), by: "another" },
            What::Position(at_id(OLD, 5)),
        ],
    );
    assert_eq!(judged(&truth(), ">", seen), "");

    let mut seen = right();
    seen.retain(|what| !matches!(what, What::Event(_, token) if token % 2 == 1));
    seen.push(What::Position(at_id(NEW, 4)));
    assert_eq!(judged(&truth(), "a", seen), "");
}

#[test]
fn a_part_is_owed_as_a_part() {
    let of_groups = Wants { groups: Some(5), ..Wants::default() };
    let every = Wants { every: Some(1000), ..Wants::default() };
    let seen = |tokens: &[Token]| {
        let mut seen = right();
        seen.retain(|what| !matches!(what, What::Event(_, token) if !tokens.contains(token)));
        seen.push(What::Position(at_id(NEW, 4)));
        seen
    };
    let sifted = [0, 1, 2, 3, 4, 10, 11, 12, 13];
    assert_eq!(judged_with(&truth(), ">", of_groups, seen(&sifted)), "");
    assert!(judged_with(&truth(), ">", of_groups, seen(&sifted[1..])).contains("lost: 1 events"));
    let too_many = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13];
    assert!(judged_with(&truth(), ">", of_groups, seen(&too_many)).contains("none of those that were wanted"));

    let last = [3, 8, 9, 12, 13];
    assert_eq!(judged_with(&truth(), ">", every, seen(&last)), "");
    for without in [8, 9, 12, 13] {
        let tokens: Vec<_> = last.into_iter().filter(|token| *token != without).collect();
        assert!(judged_with(&truth(), ">", every, seen(&tokens)).contains("lost: 1 events"), "{without}");
    }
    let of_both = Wants { groups: Some(9), ..every };
    assert_eq!(judged_with(&truth(), ">", of_both, seen(&[7, 8, 12, 13])), "");
    assert!(judged_with(&truth(), ">", of_both, seen(&[5, 8, 12, 13])).contains("lost: 1 events"));
}

#[test]
fn what_is_wrong_is_found() {
    type Doctor = fn(&mut Vec<What>);
    let doctored: &[(&str, Doctor, &str)] = &[
        ("one is lost", |seen| drop(seen.remove(place(4))), "lost: 1 events"),
        ("the first is lost", |seen| drop(seen.remove(place(0))), "lost: 1 events"),
        ("the last is lost", |seen| drop(seen.remove(place(13))), "lost: 1 events"),
        ("three are lost", |seen| drop(seen.drain(place(4)..place(7))), "lost: 3 events"),
        ("one is repeated", |seen| seen.insert(place(4), What::Event(at_id(OLD, 4), 3)), "repeated"),
        ("one comes again much later", |seen| seen.insert(place(9), What::Event(at_id(OLD, 2), 1)), "repeated"),
        ("two are swapped", |seen| seen.swap(place(4), place(5)), "goes back"),
        ("one comes again in the new stream", |seen| seen.push(What::Event(at_id(NEW, 5), 12)), "elsewhere"),
        ("one was never published", |seen| seen.push(What::Event(at_id(NEW, 5), 99)), "never published"),
        ("one was refused", |seen| seen.push(What::Event(at_id(NEW, 5), 15)), "refused"),
        ("one has another's id", |seen| seen[place(9)] = What::Event(at_id(OLD, 10), 14), "elsewhere"),
        (
            "an uncertain one comes twice",
            |seen| seen.extend([What::Event(at_id(NEW, 5), 14), What::Event(at_id(NEW, 6), 14)]),
            "elsewhere",
        ),
        ("an id is of no stream", |seen| seen.push(What::Position(at_id(3, 1))), "no stream"),
        ("the new stream comes without a gap", |seen| drop(seen.remove(place(9) + 1)), "no gap says so"),
        ("the old stream comes again", |seen| seen.push(gap(id(NEW, 4), id(OLD, 0), "recreated")), "not of a later"),
        ("a position passes an event", |seen| seen[place(4)] = What::Position(at_id(OLD, 5)), "lost: 1 events"),
        ("a position goes back", |seen| seen.insert(place(4), What::Position(at_id(OLD, 2))), "goes back"),
        (
            "a gap is too narrow",
            |seen| {
                seen.drain(place(4)..place(7));
                seen.insert(place(4), gap(id(OLD, 5), id(OLD, 7), "expired"));
            },
            "lost: 1 events",
        ),
        (
            "a gap starts too late",
            |seen| {
                seen.drain(place(4)..place(7));
                seen.insert(place(4), gap(id(OLD, 6), id(OLD, 7), "expired"));
            },
            "lost: 2 events",
        ),
        (
            "a gap names what is kept",
            |seen| {
                seen.drain(place(7)..=place(9));
                seen.insert(place(6) + 1, gap(id(OLD, 7), id(OLD, 10), "expired"));
            },
            "lost: 3 events",
        ),
        (
            "a gap has no need",
            |seen| seen.insert(place(8), gap(id(OLD, 8), id(OLD, 8), "expired")),
            "nothing was dropped",
        ),
        (
            "the new stream's first is jumped over",
            |seen| {
                seen[place(9) + 1] = gap(id(OLD, 10), id(NEW, 1), "recreated");
                seen.remove(place(10));
            },
            "lost: 1 events",
        ),
        (
            "a gap is for another client",
            |seen| seen.insert(place(4), gap(id(NEW, 1), id(OLD, 4), "expired")),
            "for a client at",
        ),
        (
            "a gap has no good reason",
            |seen| seen.insert(place(4), gap(id(OLD, 4), id(OLD, 4), "unknown-id")),
            "no reason that there was",
        ),
        (
            "after a gap it goes back",
            |seen| {
                seen.insert(place(4), gap(id(OLD, 4), id(OLD, 6), "expired"));
            },
            "goes back",
        ),
        ("there is nonsense", |seen| seen.push(What::Nonsense("half an event".into())), "nonsense"),
    ];
    for (how, doctor, finding) in doctored {
        let mut truth = truth();
        // The stream's limits have dropped the first seven.
        truth.incarnations[0].first = 8;
        let mut seen = right();
        doctor(&mut seen);
        let found = judged(&truth, ">", seen);
        assert!(found.contains(finding), "{how}: {found:?}");
    }
}

#[test]
fn an_event_of_another_subject_is_found() {
    let found = judged(&truth(), "a", right());
    assert!(found.contains("does not match"), "{found}");
}

#[test]
fn what_expired_or_was_purged_may_be_missing_but_only_since_then() {
    let without = |token| {
        let mut seen = right();
        seen.remove(place(token));
        seen
    };
    // It would have come in second 6; the one after it tells in second 6 that it does not.
    let mut expiring = truth();
    expiring.publications[4].ttl = Some(Duration::from_secs(2));
    assert_eq!(judged(&expiring, ">", without(4)), "");
    expiring.publications[4].ttl = Some(Duration::from_secs(3));
    assert!(judged(&expiring, ">", without(4)).contains("lost"));

    let purge = |subject, begun| {
        let removal = Removal { filter: Filter::parse(subject).unwrap(), begun: at(begun), ended: at(begun + 1) };
        Truth { removals: vec![removal], ..truth() }
    };
    assert_eq!(judged(&purge("a", 5), ">", without(4)), "");
    assert!(judged(&purge("b", 5), ">", without(4)).contains("lost"), "another subject");
    assert!(judged(&purge("a", 7), ">", without(4)).contains("lost"), "purged later");
    assert!(judged(&purge("a", 2), ">", without(4)).contains("lost"), "published later");
}

#[test]
fn an_event_may_come_twice_only_after_it_had_been_dropped() {
    // In seconds 17 and 18.
    let mut seen = right();
    seen.extend([What::Event(at_id(NEW, 5), 14), What::Event(at_id(NEW, 6), 14)]);
    let dropped = |oldest, second| {
        let mut truth = truth();
        truth.incarnations[1].firsts.push((at(second), oldest));
        truth
    };
    assert_eq!(judged(&dropped(6, 18), ">", seen.clone()), "");
    assert!(judged(&dropped(6, 20), ">", seen.clone()).contains("elsewhere"), "dropped later");
    assert!(judged(&dropped(5, 18), ">", seen.clone()).contains("elsewhere"), "another was dropped");

    let mut expired = truth();
    expired.publications[14].ttl = Some(Duration::from_secs(4));
    assert_eq!(judged(&expired, ">", seen.clone()), "");
    expired.publications[14].ttl = Some(Duration::from_secs(5));
    assert!(judged(&expired, ">", seen).contains("elsewhere"), "still there");
}

#[test]
fn one_that_begins_with_the_first_must_see_the_first() {
    let mut truth = truth();
    truth.incarnations[0].first = 4;
    let judged = |position: u64| {
        let entries = vec![Entry { at: at(0), what: What::Position(at_id(OLD, position)) }];
        let log = Log {
            name: "one".into(),
            filters: vec![Filter::parse("b").unwrap()],
            wants: Wants::default(),
            begins: Begins::First,
            entries,
        };
        Checker::new(&truth).judge(&log, false).len()
    };
    assert_eq!(judged(3), 0);
    assert_eq!(judged(4), 1);
}

#[test]
fn a_sequence_given_twice_is_a_contradiction() {
    let mut truth = truth();
    assert!(Checker::new(&truth).contradictions().is_empty());
    truth.publications[3].outcome = Outcome::Stored(id(OLD, 1));
    assert_eq!(Checker::new(&truth).contradictions().len(), 1);
}
