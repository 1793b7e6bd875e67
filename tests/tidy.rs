//! Rules of the code that a compiler does not hold: which module may use which, and which module owns which foreign crate.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use tidegate::metrics::Metrics;

/// Each room of `src` and the rooms it may use. Downwards only: a room is named below all that use it.
const MAY_USE: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    ("cli", &["gateway", "auth", "fd_limit", "config", "log", "subject"]),
    (
        "gateway",
        &["http", "auth", "delivery", "limits", "hub", "broker", "memory", "metrics", "panics", "shutdown", "config"],
    ),
    (
        "http",
        &[
            "auth", "delivery", "limits", "hub", "broker", "wire", "sieve", "position", "event", "subject", "memory",
            "metrics", "pace", "config", "fuzz",
        ],
    ),
    ("auth", &["subject", "metrics", "shutdown", "config", "fuzz"]),
    ("delivery", &["limits", "hub", "wire", "position", "memory", "metrics", "shutdown", "backoff", "config"]),
    ("limits", &["config"]),
    (
        "hub",
        &[
            "broker", "wire", "sieve", "position", "event", "subject", "memory", "metrics", "pace", "panics",
            "shutdown", "backoff", "config",
        ],
    ),
    ("wire", &["position", "event"]),
    ("sieve", &["event", "subject", "fuzz"]),
    ("pace", &["memory"]),
    ("position", &["event", "subject"]),
    ("broker", &["nats", "memory", "position", "event", "subject", "panics", "backoff", "config", "fuzz"]),
    ("nats", &["backoff", "fuzz"]),
    ("event", &["subject"]),
    ("fd_limit", &["config"]),
    ("config", &["subject", "fuzz"]),
    ("log", &["config"]),
    ("backoff", &[]),
    ("metrics", &["panics"]),
    ("panics", &["backoff"]),
    ("memory", &[]),
    ("shutdown", &[]),
    ("subject", &[]),
    ("fuzz", &[]),
    ("lib", &[]),
];

/// Foreign crates that only some rooms may name.
const OWNED: &[(&str, &[&str])] = &[
    ("actix_", &["http", "gateway"]),
    ("async_nats", &["broker/nats"]),
    ("nkeys", &["nats/credentials"]),
    ("rustls", &["nats/connection"]),
    ("tokio_util::codec", &["nats"]),
    ("jsonwebtoken", &["auth"]),
    ("ureq", &["auth/jwks"]),
    ("subtle", &["auth"]),
    ("governor", &["limits"]),
    ("ipnet", &["http/client_address", "config"]),
    ("prometheus", &["metrics"]),
    ("tracing_subscriber", &["log"]),
    ("figment", &["config"]),
    ("toml_edit", &["config"]),
    ("clap", &["cli", "main"]),
    ("socket2", &["delivery"]),
    ("use nix::", &["delivery", "fd_limit"]),
];

#[test]
fn rooms_use_only_what_is_below_them() {
    let mut wrong = vec![];
    for (path, text) in sources() {
        let room = room_of(&path);
        let allowed = MAY_USE.iter().find(|(name, _)| *name == room);
        let allowed = allowed.unwrap_or_else(|| panic!("{room} is not in the table of this test")).1;
        for used in used_rooms(&text) {
            if used != room && !allowed.contains(&&*used) {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn foreign_crates_have_their_rooms() {
    let mut wrong = vec![];
    for (path, text) in sources() {
        let file = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap().to_owned();
        for (foreign, rooms) in OWNED {
            let named = code_of(&text).contains(foreign);
            if named && !rooms.iter().any(|room| file.starts_with(room)) {
                wrong.push(format!("{file} names {foreign}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_room_says_what_it_is_for() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!"), "{} does not begin with //!", path.display());
    }
}

#[test]
fn the_dashboard_and_the_rules_know_every_metric_and_no_other() {
    let asked: String = ["provisioning/dashboards/tidegate.json", "rules.yml"]
        .map(|file| fs::read_to_string(root().join("grafana").join(file)).unwrap())
        .concat();
    let named: BTreeSet<_> = asked.split("tidegate_").skip(1).map(name_at_start).collect();
    let series = |name: &str| {
        let name = format!("tidegate_{name}");
        ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part).map(str::to_owned)).unwrap_or(name)
    };
    let named: BTreeSet<_> = named.iter().flatten().map(|name| series(name)).collect();
    let known: BTreeSet<_> = Metrics::names().iter().map(|name| name.to_string()).collect();
    let wrong: Vec<_> = named.symmetric_difference(&known).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<(PathBuf, String)> {
    fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = vec![];
    collect(&root().join("src"), &mut found);
    assert!(found.len() > 10, "the sources are looked for in the wrong place");
    found.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// The module directly below the crate's root that a file belongs to.
fn room_of(path: &Path) -> String {
    let file = path.strip_prefix(root().join("src")).unwrap();
    let first = file.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// The lines that are not comments.
fn code_of(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The rooms named by `crate::room` and `use crate::{room, ..}`, and by `tidegate::room` in `main`.
fn used_rooms(text: &str) -> BTreeSet<String> {
    let code = code_of(text);
    let mut used = BTreeSet::new();
    for prefix in ["crate::", "tidegate::"] {
        for (at, _) in code.match_indices(prefix) {
            let rest = &code[at + prefix.len()..];
            match rest.strip_prefix('{') {
                Some(group) => used.extend(top_level_names(group)),
                None => used.extend(name_at_start(rest)),
            }
        }
    }
    used
}

/// The first name of each part of a group that has just been opened: `a::b, c::{d, e}}` names `a` and `c`.
fn top_level_names(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => parts.push(String::new()),
            _ if depth == 0 => parts.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    parts.iter().filter_map(|part| name_at_start(part.trim())).collect()
}

fn name_at_start(text: &str) -> Option<String> {
    let name: String = text.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}
