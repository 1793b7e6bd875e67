//! Of all that grafana/ asks, a real Prometheus knows an answer: of two real gateways, on good days and on bad ones.

mod support;

use std::{path::Path, process::Command};

use serde_json::Value;
use support::{
    backend::Backend,
    http::Request,
    prometheus::{Prometheus, shipped, tool},
};

const DASHBOARD: &str = "provisioning/dashboards/tidegate.json";
/// More than one in ten seconds, taken over five minutes.
const REFUSALS: usize = 60;

#[test]
fn every_panel_and_rule_has_data_and_alerts_see_what_is_wrong() {
    let nats = Backend::nats();
    let one = nats.gateway().with("limits.streams", "3").start();
    let mut two = nats.gateway().start();
    let prometheus = Prometheus::watch([one.admin, two.admin]);
    // What happens before it has looked once is no increase.
    prometheus.wait_for("up == 1 and tidegate_streams == 0", 2);

    // A day: streams, publishes, history, somebody who was away for too long, and somebody for whom there is no room.
    let _open = [one.stream("/events/demo"), one.stream("/events/>"), two.stream("/events/demo")];
    let first = one.publish("demo", "long ago");
    two.publish_all("demo", ["a", "b", "c"]);
    assert_eq!(two.stream("/events/*?from=first").data(4), ["long ago", "a", "b", "c"]);
    nats.keep_only(1);
    let mut late = one.resume("/events/*", &first);
    assert_eq!(late.next().kind, "tidegate.gap");
    assert_eq!(one.ask("/events/demo").status, 503);

    for query in panel_queries() {
        prometheus.wait_for(&query, 1);
    }
    for rule in rules() {
        prometheus.wait_for(rule["record"].as_str().unwrap_or_else(|| measured(&rule)), 1);
    }

    // And a bad one: a gateway is killed, and NATS ends.
    two.kill();
    let Backend::Nats(mut server) = nats else { unreachable!("it is on NATS") };
    server.kill();
    prometheus.wait_for("min by (instance) (tidegate_broker_up) == 0", 1);
    for _ in 0..REFUSALS {
        assert_eq!(one.ask(Request::post("/events/demo").body("x")).status, 503);
    }
    for alert in ["NodeAway", "BrokerAway", "Gaps", "Refuses", "PublishesFail", "NearlyFull"] {
        // Pending, where it is to last for some time: tests/rules.yml has that.
        prometheus.wait_for(&format!("ALERTS{{alertname=\"Tidegate{alert}\"}}"), 1);
    }
}

#[test]
fn prometheus_takes_the_rules_and_every_alert_fires_when_it_should() {
    for arguments in [["check", "config", "grafana/prometheus.yml"], ["test", "rules", "tests/rules.yml"]] {
        let checked = Command::new(tool("promtool")).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
        let checked = checked.expect("promtool can be started");
        assert!(checked.status.success(), "{checked:?}");
    }
    let tests = read("tests/rules.yml");
    for rule in rules() {
        let Some(alert) = rule["alert"].as_str() else { continue };
        assert!(
            tests.contains(&format!("[{{ labels: '{{alertname=\"{alert}\"}}', value: 1 }}]")),
            "{alert} never fires"
        );
        for said in ["summary", "description"] {
            assert!(rule["annotations"][said].is_string(), "{alert} has no {said}");
        }
    }
}

/// The queries of all panels, for all gateways, over what Grafana would take for a step.
fn panel_queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&shipped(DASHBOARD)).expect("it is JSON");
    let panels = dashboard["panels"].as_array().expect("it has panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let variables = [("$job", ".+"), ("$instance", ".+"), ("$__rate_interval", "1m")];
    let query = |target: &Value| {
        let text = target["expr"].as_str().expect("a target has a query").to_owned();
        variables.iter().fold(text, |text, (name, value)| text.replace(name, value))
    };
    let queries: Vec<_> = targets.map(query).collect();
    assert!(queries.len() > 30, "{queries:#?}");
    queries
}

fn rules() -> Vec<Value> {
    let file: Value = serde_saphyr::from_str(&shipped("rules.yml")).expect("it is YAML");
    let groups = file["groups"].as_array().expect("it has groups");
    groups.iter().flat_map(|group| group["rules"].as_array().expect("a group has rules")).cloned().collect()
}

/// What an alert compares with a number, whatever that is.
fn measured(alert: &Value) -> &str {
    let text = alert["expr"].as_str().expect("an alert has an expression");
    let end = text.rfind(" > ").or(text.rfind(" == ")).unwrap_or_else(|| panic!("{text} compares nothing"));
    assert!(text[end..].trim_start_matches([' ', '>', '=']).parse::<f64>().is_ok(), "{text}");
    &text[..end]
}

fn read(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect("it is there")
}
