//! What clients can't, as one table: which client, where, what happens, and why. Nothing but what stands here may happen,
//! and what stands here as certain must: a weakness that a new version has mended is taken out.

use std::collections::BTreeSet;

use super::{Place, Scenario, drivers::Seen};
use Place::*;
use Scenario::*;
use Symptom::*;

/// What is wrong with what a client has handed to its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Symptom {
    /// It does not come back any more.
    GivesUp,
    /// An event did not come, though the client still reads.
    Loses,
    Repeats,
    /// A message that was never published.
    Invents,
    /// A message without data.
    EmptyMessage,
    Disorders,
    /// `tidegate.gap`, though nothing is missing.
    Gap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chance {
    Certain,
    /// Which of two things comes first decides.
    Possible,
}
use Chance::*;

pub struct Weakness {
    pub client: &'static str,
    scenarios: &'static [Scenario],
    places: &'static [Place],
    symptom: Symptom,
    chance: Chance,
    pub reason: &'static str,
}

/// Scenarios in which connections end.
const ENDS: &[Scenario] =
    &[KilledFirst, Killed, ResetFirst, Reset, ResetInside, ClosedFirst, Closed, ClosedInside, Drained, Refused, Aged];
const KILLS: &[Scenario] = &[KilledFirst, Killed];
const EVERYWHERE: &[Place] = &[Direct, Http1, Http2];
const NGINX: &[Place] = &[Http1, Http2];
const OVER_HTTP_1: &[Place] = &[Direct, Http1];

const FAILED_CONNECTION: &str =
    "on a page of another origin, Firefox closes an EventSource for good when a connection fails";
const ORDERLY_END: &str =
    "the end of a response is the end of it all, unless the response was cut off; a refusal is not";
const ORDERLY_END_PREFLIGHT: &str =
    "as above, if a preflight was answered before the gateway was killed, and the request by nginx";
const BROKEN_BODY: &str = "a response that is cut off raises ClientPayloadError, which is not caught";
const LONG_LINE: &str = "lines of more than 512 KiB raise, unless the session has a larger read_bufsize";
const SMALL_BUFFER: &str =
    "an event of more than 64 KiB does not fit, and is asked for again for ever; ClientMaxBufferSize helps";
const HEARTBEAT: &str = "a heartbeat's comment that the connection ends behind is an event with the last id";
const HALF_EVENT: &str = "half an event that the connection ends in is handed out; the whole one follows";

#[rustfmt::skip]
pub const WEAKNESSES: &[Weakness] = &[
    weakness("Firefox",                  KILLS,      &[Direct],   GivesUp,      Certain,  FAILED_CONNECTION),
    weakness("fetch-event-source once",  &[Refused], &[Direct],   GivesUp,      Certain,  ORDERLY_END),
    weakness("fetch-event-source once",  KILLS,      NGINX,       GivesUp,      Possible, ORDERLY_END_PREFLIGHT),
    weakness("aiohttp-sse-client2 once", ENDS,       OVER_HTTP_1, GivesUp,      Certain,  BROKEN_BODY),
    weakness("aiohttp-sse-client2 once", &[Large],   &[Direct],   GivesUp,      Certain,  LONG_LINE),
    weakness("r3labs/sse once",          &[Refused], &[Direct],   GivesUp,      Certain,  ORDERLY_END),
    weakness("r3labs/sse once",          KILLS,      NGINX,       GivesUp,      Certain,  ORDERLY_END),
    weakness("r3labs/sse once",          &[Large],   &[Direct],   Loses,        Certain,  SMALL_BUFFER),
    weakness("r3labs/sse once",          ENDS,       EVERYWHERE,  EmptyMessage, Possible, HEARTBEAT),
    weakness("r3labs/sse once",          &[ClosedInside], &[Direct], Invents,   Certain,  HALF_EVENT),
    weakness("r3labs/sse once",          &[ResetInside],  &[Direct], Invents,   Possible, HALF_EVENT),
    weakness("r3labs/sse",               ENDS,       EVERYWHERE,  EmptyMessage, Possible, HEARTBEAT),
    weakness("r3labs/sse",               &[ClosedInside], &[Direct], Invents,   Certain,  HALF_EVENT),
    weakness("r3labs/sse",               &[ResetInside],  &[Direct], Invents,   Possible, HALF_EVENT),
];

const fn weakness(
    client: &'static str,
    scenarios: &'static [Scenario],
    places: &'static [Place],
    symptom: Symptom,
    chance: Chance,
    reason: &'static str,
) -> Weakness {
    Weakness { client, scenarios, places, symptom, chance, reason }
}

/// Whether a client is expected to go without an event for ever.
pub fn expects_loss(client: &str, scenario: Scenario, place: Place) -> bool {
    WEAKNESSES.iter().any(|weakness| weakness.symptom == Loses && weakness.is_of(client, scenario, place))
}

impl Weakness {
    fn is_of(&self, client: &str, scenario: Scenario, place: Place) -> bool {
        self.client == client && self.scenarios.contains(&scenario) && self.places.contains(&place)
    }
}

/// What is wrong with what was seen, where these were published.
pub fn symptoms(seen: &Seen, published: &[String]) -> BTreeSet<Symptom> {
    let mut found = BTreeSet::new();
    let mut note = |symptom, is_so: bool| {
        if is_so {
            found.insert(symptom);
        }
    };
    let events: Vec<&str> = seen.events.iter().filter(|event| !event.is_reserved()).map(|event| &*event.data).collect();
    let place = |data: &str| published.iter().position(|published| published == data);
    let places: Vec<usize> = events.iter().filter_map(|data| place(data)).collect();
    let distinct: BTreeSet<_> = places.iter().collect();
    note(GivesUp, seen.end.is_some());
    note(Loses, seen.end.is_none() && distinct.len() < published.len());
    note(Repeats, distinct.len() < places.len());
    note(EmptyMessage, events.contains(&""));
    note(Invents, events.iter().any(|data| !data.is_empty() && place(data).is_none()));
    note(Disorders, !places.is_sorted());
    note(Gap, seen.events.iter().any(|event| event.kind == "tidegate.gap"));
    found
}

/// Where that is not what the table says: one sentence each.
pub fn surprises(client: &str, scenario: Scenario, place: Place, found: &BTreeSet<Symptom>) -> Vec<String> {
    let expected: Vec<_> = WEAKNESSES.iter().filter(|weakness| weakness.is_of(client, scenario, place)).collect();
    let unexpected = found.iter().filter(|symptom| !expected.iter().any(|weakness| weakness.symptom == **symptom));
    let stale = expected.iter().filter(|weakness| weakness.chance == Certain && !found.contains(&weakness.symptom));
    let unexpected = unexpected.map(|symptom| format!("{client}: {symptom:?}, which nothing in the table explains"));
    let stale = stale.map(|weakness| {
        let Weakness { symptom, reason, .. } = weakness;
        format!("{client}: no {symptom:?} any more, which the table has because {reason}")
    });
    unexpected.chain(stale).collect()
}

/// The table tells of clients that there are, and says nothing twice.
#[test]
fn the_table_of_weaknesses_is_sound() {
    for (number, weakness) in WEAKNESSES.iter().enumerate() {
        assert!(super::drivers::CLIENTS.iter().any(|client| client.name == weakness.client), "{}", weakness.client);
        for other in &WEAKNESSES[number + 1..] {
            let same = weakness.client == other.client && weakness.symptom == other.symptom;
            let overlap = weakness.scenarios.iter().any(|scenario| other.scenarios.contains(scenario))
                && weakness.places.iter().any(|place| other.places.contains(place));
            assert!(!(same && overlap), "{} {:?} stands twice", weakness.client, weakness.symptom);
        }
    }
}
