//! What the Dockerfile, compose.yaml and deploy/ say of the gateway is true of it: settings, ports, drain times, files.
//! None of them can be run here; deploy/README.md says what they were checked with besides.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use tidegate::config::{Config, DEFAULTS};

const SYSTEMD: &str = "deploy/systemd/tidegate.service";
const KUBERNETES: &str = "deploy/kubernetes/tidegate.yaml";

#[test]
fn configurations_are_valid() {
    for text in configurations() {
        load(&text);
    }
}

#[test]
fn variables_are_settings() {
    for file in ["Dockerfile", "compose.yaml", SYSTEMD, KUBERNETES] {
        let text = read(file);
        let known = |name: &str| name == "CONFIG" || settings().contains(&name.to_lowercase().replace("__", "."));
        let names = text.split("TIDEGATE_").skip(1).map(name_at_start);
        let unknown: Vec<&str> = names.filter(|name| !known(name)).collect();
        assert!(unknown.is_empty() && text.contains("TIDEGATE_"), "{file}: {unknown:?}");
    }
}

#[test]
fn whoever_stops_a_gateway_waits_for_longer_than_it_drains() {
    let compose = yaml("compose.yaml");
    let compose = compose["services"]["gateway-1"]["stop_grace_period"].as_str().expect("a time");
    let kubernetes = &pod()["terminationGracePeriodSeconds"];
    let [stack, kubernetes_toml] = configurations();
    for (patience, configuration) in [
        (seconds(compose), &*stack),
        (seconds(value_after("STOP_SECONDS = ", &read("tests/stack"))), &*stack),
        (seconds(value_after("TimeoutStopSec=", &read(SYSTEMD))), ""),
        (Duration::from_secs(kubernetes.as_u64().expect("a number of seconds")), &*kubernetes_toml),
    ] {
        let drain = load(configuration).drain;
        let room = Duration::from_secs(2);
        assert!(drain.limit >= drain.spread + room, "{drain:?}");
        assert!(patience >= drain.notice + drain.limit + room, "{patience:?} for {drain:?}");
    }
}

#[test]
fn kubernetes_is_given_time_to_notice_and_adds_no_settings_of_its_own() {
    let [_, kubernetes_toml] = configurations();
    let probe = pod()["containers"][0]["readinessProbe"]["periodSeconds"].as_u64().expect("a number of seconds");
    assert!(load(&kubernetes_toml).drain.notice > Duration::from_secs(probe));
    // A Service of this name is told to pods as TIDEGATE_PORT, TIDEGATE_SERVICE_HOST and more.
    assert_eq!(pod()["enableServiceLinks"], false);
}

#[test]
fn systemd_reloads_without_a_restart_and_gives_up_only_where_none_helps() {
    let unit = read(SYSTEMD);
    assert!(unit.contains("\nExecReload=/bin/kill -HUP $MAINPID\n"));
    assert!(unit.contains("\nRestartPreventExitStatus=64 78\n"));
}

#[test]
fn ports_are_those_of_the_image() {
    let dockerfile = read("Dockerfile");
    let listen = value_after("TIDEGATE_LISTEN=0.0.0.0:", &dockerfile);
    let admin = value_after("TIDEGATE_ADMIN_LISTEN=0.0.0.0:", &dockerfile);
    assert!(dockerfile.contains(&format!("EXPOSE {listen} {admin}\n")));
    for gateway in ["gateway-1", "gateway-2"] {
        assert!(yaml("compose.yaml")["services"][gateway].is_object());
        assert!(
            read("deploy/compose/gateways.conf").contains(&format!("server {gateway}:{listen} resolve max_fails=0;"))
        );
        assert!(read("deploy/compose/gateways.yml").contains(&format!("\"{gateway}:{admin}\"")));
    }
    let container = &pod()["containers"][0];
    assert_eq!(container["ports"][0]["containerPort"].to_string(), listen);
    assert_eq!(container["ports"][1]["containerPort"].to_string(), admin);
    assert_eq!(container["env"][0]["value"], format!("0.0.0.0:{listen}"));
    assert_eq!(container["env"][1]["value"], format!("0.0.0.0:{admin}"));
    assert_eq!(template()["metadata"]["annotations"]["prometheus.io/port"], admin);
    let published = yaml("compose.yaml")["services"]["nginx"]["ports"].to_string();
    for line in read("deploy/compose/listen.conf").lines().filter(|line| line.starts_with("listen ")) {
        let port = line.split([' ', ';']).nth(1).expect("a port");
        assert!(published.contains(&format!("127.0.0.1:{port}:{port}")), "{port} is not in {published}");
    }
}

#[test]
fn probes_ask_what_the_admin_listener_answers() {
    let container = &pod()["containers"][0];
    for (probe, path) in [("readinessProbe", "/health/ready"), ("livenessProbe", "/health/live")] {
        let asked = &container[probe]["httpGet"];
        assert_eq!((asked["path"].as_str(), asked["port"].as_str()), (Some(path), Some("admin")));
    }
    let image = format!("tidegate:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(container["image"], image);
}

#[test]
fn what_compose_mounts_is_there() {
    // Made by its user before the start, as its first lines say.
    let made = ["./nginx/tls"];
    let compose = yaml("compose.yaml");
    let services = compose["services"].as_object().expect("services are named").values();
    let volumes = services.filter_map(|service| service["volumes"].as_array()).flatten();
    let mounts: BTreeSet<_> = volumes.filter_map(|volume| volume.as_str()?.split(':').next()).collect();
    let missing: Vec<_> = mounts
        .into_iter()
        .filter(|mount| mount.starts_with("./") && !made.contains(mount) && !root().join(mount).exists())
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_image_is_built_from_all_that_the_sources_include() {
    let (dockerfile, ignored) = (read("Dockerfile"), read(".dockerignore"));
    let outside = ["src/config.rs", "src/broker/nats/requirements.rs", "src/http/pages.rs"].map(read).concat();
    let included = outside.split("include_str!(\"").skip(1).filter_map(|rest| rest.split('"').next());
    let included: Vec<_> = included.filter(|path| path.starts_with("../")).collect();
    assert!(!included.is_empty());
    for path in included {
        let path = path.trim_start_matches("../");
        let path = path.split_once('/').map_or(path, |(folder, _)| if folder == "web" { folder } else { path });
        assert!(dockerfile.contains(&format!("COPY {path} ")), "{path} is not copied");
        assert!(ignored.contains(&format!("!{path}\n")), "{path} is ignored");
    }
}

/// Every configuration file of a gateway.
fn configurations() -> [String; 2] {
    let map = documents(KUBERNETES).into_iter().find(|document| document["kind"] == "ConfigMap").expect("there is one");
    let text = map["data"]["tidegate.toml"].as_str().expect("it has the file").to_owned();
    [read("deploy/stack.toml"), text]
}

fn load(text: &str) -> Config {
    let path = std::env::temp_dir().join(format!("tidegate-{}-{:p}.toml", std::process::id(), text));
    fs::write(&path, text).unwrap();
    let config = Config::load(Some(path.clone()), vec![]);
    fs::remove_file(path).unwrap();
    config.unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

/// The names of all settings, as in `nats.url`.
fn settings() -> BTreeSet<String> {
    let mut section = String::new();
    let mut names = BTreeSet::new();
    for line in DEFAULTS.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            names.insert(format!("{section}{key}"));
        }
    }
    names
}

fn template() -> Value {
    let mut documents = documents(KUBERNETES).into_iter();
    documents.find(|document| document["kind"] == "Deployment").expect("there is one")["spec"]["template"].take()
}

fn pod() -> Value {
    template()["spec"].take()
}

fn yaml(file: &str) -> Value {
    documents(file).swap_remove(0)
}

fn documents(file: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// What stands between these words and the next blank or quote.
fn value_after<'a>(words: &str, text: &'a str) -> &'a str {
    let rest = text.split(words).nth(1).unwrap_or_else(|| panic!("there is no {words}"));
    rest.split(|c: char| c.is_whitespace() || c == '"').next().expect("a text has a first part")
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs(text.trim_end_matches('s').parse().unwrap_or_else(|_| panic!("{text} is no time in seconds")))
}

fn name_at_start(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(text.len());
    &text[..end]
}

fn read(file: impl AsRef<Path>) -> String {
    let path = root().join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
