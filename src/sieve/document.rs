//! An event as a condition sees it: the object of `format=json`, in which `data` is parsed where it is JSON. What several
//! sieves ask for is made once.

use std::{cell::OnceCell, str};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};

use super::condition::Root;
use crate::event::{Epoch, Event, EventId};

/// An event, and what has been asked of it so far.
pub struct Document<'e> {
    pub event: &'e Event,
    epoch: Epoch,
    members: [OnceCell<Option<Value>>; NAMES.len()],
    whole: OnceCell<Value>,
}

const NAMES: [&str; 6] = ["id", "subject", "time", "type", "data", "data_base64"];

impl<'e> Document<'e> {
    pub fn new(epoch: Epoch, event: &'e Event) -> Document<'e> {
        Document { event, epoch, members: Default::default(), whole: OnceCell::new() }
    }

    fn make(&self, name: &str) -> Option<Value> {
        let Event { sequence, subject, time, kind, payload, expires: _ } = self.event;
        let text = || str::from_utf8(payload);
        match name {
            "id" => Some(EventId { epoch: self.epoch, sequence: *sequence }.to_string().into()),
            "subject" => Some(subject.as_str().into()),
            "time" => Some(time.to_string().into()),
            "type" => Some(kind.as_ref().map_or(Value::Null, |kind| kind.as_str().into())),
            "data" => text().ok().map(value),
            "data_base64" => text().is_err().then(|| STANDARD.encode(payload).into()),
            _ => None,
        }
    }
}

impl Root for Document<'_> {
    fn whole(&self) -> &Value {
        self.whole.get_or_init(|| {
            let members = NAMES.into_iter().filter_map(|name| Some((name.to_owned(), self.member(name)?.clone())));
            Value::Object(members.collect::<Map<_, _>>())
        })
    }

    fn member(&self, name: &str) -> Option<&Value> {
        let number = NAMES.iter().position(|known| *known == name)?;
        self.members[number].get_or_init(|| self.make(name)).as_ref()
    }
}

/// A payload: what it says as JSON, or else its text. Of a name that an object has twice, the last counts, as in browsers.
fn value(text: &str) -> Value {
    match serde_json::from_str(text) {
        Ok(value) => value,
        // The only number that is JSON and can't be read.
        Err(error) if error.to_string().starts_with("number out of range") => {
            serde_json::from_str(&within_doubles(text)).unwrap_or_else(|_| text.into())
        }
        Err(_) => text.into(),
    }
}

/// A number as JSON has it; one beyond a double is the largest double.
pub(super) fn number(text: &str) -> Option<Value> {
    let read = |text: &str| serde_json::from_str(text).ok().filter(Value::is_number);
    read(text).or_else(|| read(&within_doubles(text)))
}

/// The same text with the largest double in the place of each number beyond it.
fn within_doubles(text: &str) -> String {
    let mut within = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.bytes().next() {
        let length = match first {
            b'"' => string_bytes(rest),
            b'-' | b'0'..=b'9' => {
                let number = |byte: &u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
                rest.bytes().take_while(number).count()
            }
            _ => rest.find(['"', '-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']).unwrap_or(rest.len()),
        };
        let (token, behind) = rest.split_at(length);
        match token.parse::<f64>() {
            Ok(number) if number.is_infinite() && token.ends_with(|last: char| last.is_ascii_digit()) => {
                within.push_str(if number > 0.0 { LARGEST } else { SMALLEST });
            }
            _ => within.push_str(token),
        }
        rest = behind;
    }
    within
}

const LARGEST: &str = "1.7976931348623157e308";
const SMALLEST: &str = "-1.7976931348623157e308";

/// The length of the string that a text begins with, its quotes included.
fn string_bytes(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let is_end = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        is_end
    });
    end.map_or(text.len(), |end| end + "\"\"".len())
}
