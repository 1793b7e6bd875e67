//! The stream's definition (`nats/stream.json`), and whether a stream that is there keeps our promises.

use serde_json::{Value, json};

use super::provision::HEADER_BYTES;
use crate::config::NatsStream;

const DEFINITION: &str = include_str!("../../../nats/stream.json");

/// A setting with which the promises can't be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its {setting} is {found}, but must be {wanted}")]
pub struct Mismatch {
    pub setting: &'static str,
    pub found: String,
    pub wanted: String,
    /// What to set it to, where that takes nothing away from anyone.
    mend: Option<Value>,
}

/// What a stream must be for this gateway.
pub(super) struct Requirements {
    settings: NatsStream,
    message_bytes: usize,
}

impl Requirements {
    pub fn new(settings: NatsStream, event_bytes: usize) -> Requirements {
        Requirements { settings, message_bytes: event_bytes.saturating_add(HEADER_BYTES) }
    }

    pub fn mismatches(&self, config: &Value) -> Vec<Mismatch> {
        mismatches(config, &self.settings, self.message_bytes)
    }
}

/// The definition with this gateway's names.
pub(super) fn definition(settings: &NatsStream) -> Value {
    let mut config: Value = serde_json::from_str(DEFINITION).expect("nats/stream.json is tested to be JSON");
    config["name"] = json!(settings.name);
    config["subjects"] = json!([subjects(settings)]);
    config["num_replicas"] = json!(settings.replicas);
    config["republish"] = republish(settings);
    config
}

/// Everything about `config` that breaks a promise.
///
/// Settings that the promises do not depend on (limits, storage, replicas, placement, compression) are the operator's.
fn mismatches(config: &Value, settings: &NatsStream, message_bytes: usize) -> Vec<Mismatch> {
    let mut mismatches = vec![];
    let mut must = |setting: &'static str, fits: bool, wanted: Value, mend: Option<Value>| {
        if !fits {
            mismatches.push(Mismatch {
                setting,
                found: config[setting].to_string(),
                wanted: wanted.as_str().map_or_else(|| wanted.to_string(), str::to_owned),
                mend,
            });
        }
    };
    let off = |setting: &str| matches!(config[setting], Value::Null | Value::Bool(false));
    let on = |setting: &str| config[setting] == json!(true);
    let at_most = |setting: &str, limit: i64| config[setting].as_i64().is_none_or(|value| value <= limit);

    let subjects = json!([subjects(settings)]);
    must("subjects", config["subjects"] == subjects, subjects, None);
    must("retention", config["retention"] == "limits", json!("limits"), None);
    // With "new", a full stream would refuse events instead of letting the oldest go.
    must("discard", matches!(&config["discard"], Value::Null) || config["discard"] == "old", json!("old"), None);
    must("allow_direct", on("allow_direct"), json!(true), Some(json!(true)));
    must("allow_msg_ttl", on("allow_msg_ttl"), json!(true), Some(json!(true)));
    let window = config["duplicate_window"].as_i64().unwrap_or(0);
    let two_minutes = json!(120_000_000_000_i64);
    must("duplicate_window", window > 0, json!("more than nothing (2m)"), Some(two_minutes));

    let found = &config["republish"];
    let wanted = republish(settings);
    let whole = matches!(found["headers_only"], Value::Null | Value::Bool(false));
    let fits = found["src"] == wanted["src"] && found["dest"] == wanted["dest"] && whole;
    // A stream that republishes elsewhere does so for a reason.
    let mend = found.is_null().then(|| wanted.clone());
    must("republish", fits, wanted, mend);

    let unlimited = settings.compacted || at_most("max_msgs_per_subject", 0);
    must("max_msgs_per_subject", unlimited, json!("-1 (or set nats.stream.compacted = true)"), None);
    let room = config["max_msg_size"].as_i64().is_none_or(|bytes| bytes <= 0 || bytes >= message_bytes as i64);
    must(
        "max_msg_size",
        room,
        json!(format!("-1, or at least {message_bytes} (limits.event_bytes and headers)")),
        None,
    );
    for setting in ["mirror", "sources", "subject_transform"] {
        let none = config[setting].is_null() || config[setting].as_array().is_some_and(Vec::is_empty);
        must(setting, none, json!("absent"), None);
    }
    for setting in ["sealed", "no_ack", "allow_msg_counter"] {
        must(setting, off(setting), json!(false), None);
    }
    // An acknowledged event could be lost, and its sequence given to another.
    must("persist_mode", config["persist_mode"] != "async", json!("default"), None);
    mismatches
}

/// `config` with what may be mended mended and all else as it was, or the first setting that may not be.
pub(super) fn mended(mut config: Value, mismatches: &[Mismatch]) -> Result<Value, Mismatch> {
    for mismatch in mismatches {
        config[mismatch.setting] = mismatch.mend.clone().ok_or_else(|| mismatch.clone())?;
    }
    Ok(config)
}

fn subjects(settings: &NatsStream) -> String {
    format!("{}>", settings.prefix)
}

fn republish(settings: &NatsStream) -> Value {
    json!({ "src": subjects(settings), "dest": format!("{}>", settings.live_prefix) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> NatsStream {
        NatsStream {
            name: "EVENTS".into(),
            prefix: "events.".into(),
            live_prefix: "live.events.".into(),
            replicas: 1,
            manage: true,
            compacted: false,
        }
    }

    #[test]
    fn the_definition_fits() {
        assert_eq!(mismatches(&definition(&settings()), &settings(), 1_004_096), []);
    }

    #[test]
    fn the_file_is_what_a_gateway_with_default_settings_makes() {
        assert_eq!(definition(&settings()), serde_json::from_str::<Value>(DEFINITION).unwrap());
    }

    #[test]
    fn each_setting_that_breaks_a_promise_is_named() {
        for (setting, value, mendable) in [
            ("subjects", json!(["events.>", "more.>"]), false),
            ("retention", json!("interest"), false),
            ("discard", json!("new"), false),
            ("allow_direct", json!(false), true),
            ("allow_msg_ttl", Value::Null, true),
            ("duplicate_window", Value::Null, true),
            ("republish", Value::Null, true),
            ("republish", json!({ "src": "events.>", "dest": "other.>" }), false),
            ("republish", json!({ "src": "events.>", "dest": "live.events.>", "headers_only": true }), false),
            ("max_msgs_per_subject", json!(10), false),
            ("max_msg_size", json!(1000), false),
            ("mirror", json!({ "name": "M" }), false),
            ("sources", json!([{ "name": "M" }]), false),
            ("subject_transform", json!({ "src": "a", "dest": "b" }), false),
            ("sealed", json!(true), false),
            ("no_ack", json!(true), false),
            ("persist_mode", json!("async"), false),
        ] {
            let mut config = definition(&settings());
            config[setting] = value;

            let found = mismatches(&config, &settings(), 1_004_096);

            assert_eq!(found.iter().map(|mismatch| mismatch.setting).collect::<Vec<_>>(), [setting]);
            assert_eq!(mended(config, &found).is_ok(), mendable, "{setting}");
        }
    }

    #[test]
    fn mending_keeps_all_that_the_operator_set() {
        let mut config = definition(&settings());
        config["allow_direct"] = json!(false);
        config["max_age"] = json!(1);
        config["a_setting_of_tomorrow"] = json!({ "kept": true });
        let mut wanted = config.clone();
        wanted["allow_direct"] = json!(true);

        let found = mismatches(&config, &settings(), 0);

        assert_eq!(mended(config, &found), Ok(wanted));
    }

    #[test]
    fn a_compacted_stream_may_limit_its_subjects() {
        let mut config = definition(&settings());
        config["max_msgs_per_subject"] = json!(1);
        assert_eq!(mismatches(&config, &NatsStream { compacted: true, ..settings() }, 0), []);
    }
}
