//! Properties of whatever a request may say: targets, subjects, starts, ids, lines of a batch, addresses and origins.

use std::net::IpAddr;

use actix_web::http::{
    Uri,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use percent_encoding::percent_decode_str;
use proptest::prelude::*;
use serde_json::json;

use super::{
    client_address::Proxies,
    publication::{self, parse_key, parse_ttl, parse_type},
    query::{Parameters, Query, decode},
    subscribe::parse_start,
};
use crate::{
    auth::local::is_local_origin,
    config::{AddressHeader, parse_duration},
    event::EventId,
    fuzz::{cases, nearly, text},
    hub::StartAt,
    position::Position,
    subject::{BYTES_MAX, Filter, Subject},
};

const EVENT_BYTES_MAX: usize = 1000;

/// What no name that arrived over HTTP may hold: it would mean something else to NATS, or end a line.
fn assert_tame(name: &str) {
    let tame = |c: char| c.is_ascii_alphanumeric() || "-_~:@+=,.".contains(c);
    assert!(name.chars().all(tame) && name.len() <= BYTES_MAX, "{name:?}");
    assert!(!name.split('.').any(str::is_empty), "{name:?}");
}

fn assert_subject_holds(text: &str) {
    match Subject::parse(text) {
        Err(error) => assert!(!error.to_string().contains(['\r', '\n', '\0']), "{error}"),
        Ok(subject) => {
            assert_eq!(subject.as_str(), text);
            assert_tame(text);
            assert_eq!(Filter::parse(text).expect("a subject is a filter").exact(), Some(subject));
        }
    }
}

fn assert_filter_holds(text: &str) {
    let Ok(filter) = Filter::parse(text) else { return };
    assert_eq!(filter.as_str(), text);
    assert_tame(&text.replace(['*', '>'], "x"));
    assert!(filter.covers(&filter));
    assert_eq!(Filter::fold(vec![filter.clone(); 2]).len(), 1);
    let one_of_its = Subject::parse(&text.replace(['*', '>'], "x"));
    assert!(one_of_its.is_ok_and(|subject| filter.matches(&subject)), "{text:?}");
}

fn address_said(header: AddressHeader, peer: &str, field: &[u8]) -> Option<IpAddr> {
    let proxies = Proxies::new(vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()], header);
    let name = match header {
        AddressHeader::XForwardedFor => HeaderName::from_static("x-forwarded-for"),
        AddressHeader::Forwarded => HeaderName::from_static("forwarded"),
    };
    let mut headers = HeaderMap::new();
    headers.append(name, HeaderValue::from_bytes(field).ok()?);
    proxies.client(peer.parse().unwrap(), &headers)
}

fn line() -> impl Strategy<Value = String> {
    let right = (text(), text(), "[a-z.]{1,8}").prop_map(|(data, kind, subject)| {
        json!({ "subject": subject, "data": data, "type": kind, "ttl": "7d", "idempotency_key": data }).to_string()
    });
    prop_oneof![
        text(),
        nearly(right),
        nearly(Just(r#"{"subject":"a","data_base64":"eA==","if_match":"000000-1"}"#.into()))
    ]
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn subjects_and_filters_are_what_they_were_and_nothing_that_nats_takes_otherwise(text in nearly(text())) {
        assert_subject_holds(&text);
        assert_filter_holds(&text);
    }

    #[test]
    fn no_encoding_leads_out_of_the_alphabet(text in text()) {
        let Ok(decoded) = decode(&text) else { return Ok(()) };
        assert_subject_holds(&decoded);
        assert_filter_holds(&decoded);
        if !text.contains('%') {
            prop_assert_eq!(decoded, text);
        }
    }

    #[test]
    fn a_query_has_only_what_is_known(text in text()) {
        const KNOWN: &[&str] = &["subject", "from", "format", "lastEventId"];
        match Query::read(&text, &Parameters { known: KNOWN, advice: &[] }, None) {
            Err(error) => prop_assert!(error.problem().status == 400),
            Ok(query) => {
                let told = text.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with('_')).count();
                prop_assert_eq!(KNOWN.iter().map(|name| query.all(name).count()).sum::<usize>(), told);
                for value in KNOWN.iter().flat_map(|name| query.all(name)) {
                    let found = text.split('&').any(|pair| {
                        let value_in = pair.split_once('=').map_or("", |(_, value)| value).replace('+', " ");
                        percent_decode_str(&value_in).decode_utf8().is_ok_and(|decoded| decoded == value)
                    });
                    prop_assert!(found, "{:?} in {:?}", value, text);
                }
            }
        }
    }

    #[test]
    fn a_start_is_read_as_it_was_written(text in nearly("(now|first|snapshot|-[0-9]{1,20}(ms|s|m|h|d)?|[0-9a-z]{6}-[0-9]{1,20}|20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9](\\.[0-9]{1,12})?(Z|[+-][0-9]{2}:[0-9]{2}))")) {
        match parse_start(&text) {
            Ok(StartAt::After(id)) => prop_assert_eq!(id.to_string(), text),
            Ok(StartAt::Last(count)) => prop_assert_eq!(Ok(count), text[1..].parse()),
            Ok(StartAt::Now) => prop_assert_eq!(text, "now"),
            Ok(StartAt::First) => prop_assert_eq!(text, "first"),
            Ok(StartAt::Snapshot) => prop_assert_eq!(text, "snapshot"),
            Ok(StartAt::Time(_)) | Err(_) => {}
        }
    }

    #[test]
    fn whatever_starts_does_not_panic(text in text()) {
        let _ = parse_start(&text);
    }

    #[test]
    fn an_id_is_written_in_one_way(text in prop_oneof![text(), nearly("[0-9a-z]{6}-[0-9]{1,20}(~[a-z0-9]{6}[0-9]{1,3}(\\.[a-z0-9]{6}[0-9a-z]{1,4}){0,3})?")]) {
        if let Ok(id) = text.parse::<EventId>() {
            prop_assert_eq!(id.to_string(), &*text);
        }
        if let Ok(position) = text.parse::<Position>() {
            prop_assert_eq!(position.to_string(), &*text);
        }
    }

    #[test]
    fn durations_are_positive_and_mean_what_they_say(text in prop_oneof![text(), nearly("[0-9]{1,20}(ms|s|m|h|d)")]) {
        if let Some(duration) = parse_duration(&text) {
            prop_assert!(!duration.is_zero() && text.starts_with(|c: char| c.is_ascii_digit()));
            prop_assert_eq!(parse_duration(&format!("{}ms", duration.as_millis())), Some(duration));
            prop_assert_eq!(parse_ttl(&text).is_ok(), duration.subsec_nanos() == 0);
        }
    }

    #[test]
    fn types_and_keys_end_no_line(text in text()) {
        if let Ok(kind) = parse_type(&text) {
            prop_assert_eq!(kind.as_str(), &*text);
            prop_assert!(text.len() <= 128 && !text.chars().any(char::is_control) && !text.starts_with("tidegate."));
        }
        if let Ok(key) = parse_key(&text) {
            prop_assert!(key == text && !text.is_empty() && text.len() <= 255 && !text.chars().any(char::is_control));
        }
    }

    #[test]
    fn a_line_is_an_event_or_says_why_not(line in line()) {
        match publication::of_line(line.as_bytes(), EVENT_BYTES_MAX) {
            Err(error) => prop_assert!((400..500).contains(&error.problem().status)),
            Ok(publication) => {
                assert_tame(publication.subject.as_str());
                prop_assert!(publication.payload.len() <= EVENT_BYTES_MAX);
                prop_assert!(serde_json::from_str::<serde_json::Value>(&line).is_ok(), "{:?} is no JSON", line);
            }
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_no_line(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let _ = publication::of_line(&bytes, EVENT_BYTES_MAX);
        let _ = publication::of_line(&[b"{\"subject\":\"a\",\"data\":\"", &*bytes, b"\"}"].concat(), EVENT_BYTES_MAX);
    }

    #[test]
    fn a_text_arrives_as_it_was_sent(data in text()) {
        let line = json!({ "subject": "a", "data": data }).to_string();
        let parsed = publication::of_line(line.as_bytes(), data.len()).expect("it is right");
        prop_assert_eq!(&parsed.payload[..], data.as_bytes());
    }

    #[test]
    fn an_address_is_that_of_a_hop_that_was_named(field in text(), bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        for header in [AddressHeader::XForwardedFor, AddressHeader::Forwarded] {
            prop_assert!(address_said(header, "192.0.2.9", field.as_bytes()).is_none_or(|said| said.to_string() == "192.0.2.9"));
            let _ = address_said(header, "127.0.0.1", &bytes);
            let Some(said) = address_said(header, "127.0.0.1", field.as_bytes()) else { continue };
            // The name of a mapped or a compressed address may be written in several ways.
            let plainly = said.is_ipv4() && !field.contains("ffff:");
            prop_assert!(said.is_loopback() || !plainly || field.contains(&said.to_string()), "{} of {:?}", said, field);
        }
    }

    #[test]
    fn what_stands_left_of_what_a_proxy_says_changes_nothing(forged in text()) {
        let forged: String = forged.chars().filter(|c| !c.is_control()).collect();
        for (header, said) in [(AddressHeader::XForwardedFor, "192.0.2.7"), (AddressHeader::Forwarded, "for=192.0.2.7")] {
            for via in ["", ", 10.1.1.1"] {
                let via = if header == AddressHeader::Forwarded { via.replace("10.", "for=10.") } else { via.into() };
                let field = format!("{forged}, {said}{via}");
                prop_assert_eq!(address_said(header, "127.0.0.1", field.as_bytes()), Some([192, 0, 2, 7].into()), "{}", field);
            }
        }
    }

    #[test]
    fn an_origin_is_near_only_if_its_host_is(origin in prop_oneof![text(), nearly("https?://(localhost|127\\.0\\.0\\.1|\\[::1\\]|example\\.com)(:[0-9]{1,5})?")]) {
        if is_local_origin(&origin) {
            let uri: Uri = origin.parse().unwrap_or_else(|_| panic!("{origin:?} is no URI"));
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let is_loopback = |address: IpAddr| address.to_canonical().is_loopback();
            let near = host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(is_loopback);
            prop_assert!(near, "{:?}", origin);
        }
    }
}
