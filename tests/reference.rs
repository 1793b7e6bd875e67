//! The reference in docs/src/reference is made of what the code says: settings with their defaults and reasons, error codes,
//! metrics, exit codes. `UPDATE=1 cargo test --test reference` writes it anew.

mod support;

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use serde_json::Value;
use support::gateway::Launch;
use tidegate::{config, http::error::Code, metrics::Metrics};

const NOTE: &str = "<!-- Made by tests/reference.rs: UPDATE=1 cargo test --test reference -->";

fn docs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/src")
}

/// Holds a page against what it should be, or writes it.
fn check(page: &str, text: &str) {
    let path = docs().join("reference").join(page);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, text).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let differs = found.lines().zip(text.lines()).find(|(found, text)| found != text);
    assert!(found == text, "{page} is out of date (UPDATE=1 cargo test --test reference): {differs:?}");
}

/// The settings as a list, in the order of the default settings, under the comments there.
fn settings() -> String {
    let mut page = format!(
        "{NOTE}\n\n# Settings\n\nEverything works without any. A file (`--config tidegate.toml`, or `TIDEGATE_CONFIG`) needs only what differs \
         from these defaults.\nThe names are the same everywhere: `sse.heartbeat` is `TIDEGATE_SSE__HEARTBEAT` in the environment and\n\
         `--set sse.heartbeat=5s` as a flag; `--listen`, `--admin-listen` and `--nats` are short for the common ones. Flags win over the\n\
         environment, which wins over the file. An unknown key is an error that names its place and the nearest key. Times are\n\
         `\"15s\"`, `\"10m\"`, `\"24h\"`, `\"7d\"`.\n\n\
         - `tidegate config` prints the settings in force, as a file of settings, with the origin of each value, without passwords and\n  \
           secrets. (Every user of the machine sees flags: secrets belong in the environment or the file.)\n\
         - `tidegate check` says whether a gateway could start: it reads the settings and the keys that they name, and asks NATS. It\n  \
           changes nothing and binds no port. It warns, as a start does in the log, of a JWKS over plain `http://`, of a secret that is\n  \
           easily guessed, and of files that every user of the machine can write, or read though they have secrets.\n\
         - `SIGHUP` (`systemctl reload tidegate`) reads file and environment again and applies `auth.*` (but for `jwt.expiry_warning`),\n  \
           `cors.*`, `log.filter` and `limits.*` (but for `event_bytes`, `backlog`, `connections`, `request_head` and `keep_alive`). Open\n  \
           streams are not affected and keep their rights; an open batch is checked against the new settings from its next line on.\n  \
           The log names changed settings that need a restart. On an error nothing changes. The file is read once it has not changed for\n  \
           a quarter of a second.\n"
    );
    let mut section = String::new();
    let mut comment: Vec<&str> = vec![];
    for line in config::DEFAULTS.lines().skip_while(|line| line.starts_with('#')) {
        if let Some(text) = line.strip_prefix('#') {
            comment.push(text.strip_prefix(' ').unwrap_or(text));
        } else if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
            page += &format!("\n## {}\n", section.trim_end_matches('.'));
            comment.clear();
        } else if let Some((key, value)) = line.split_once(" = ") {
            if section.is_empty() && !page.contains("\n## ") {
                page += "\n## General\n";
            }
            if !comment.is_empty() {
                page += &format!("\n{}\n\n", comment.join("\n").replace('<', "&lt;"));
            }
            page += &format!("- `{section}{key}` = `{value}`\n");
            comment.clear();
        } else {
            comment.clear();
        }
    }
    page
}

#[test]
fn the_settings_are_those_of_the_code() {
    check("settings.md", &settings());
}

#[test]
fn the_error_codes_are_those_of_the_code() {
    let mut page = format!(
        "{NOTE}\n\n# Error codes\n\nErrors are `application/problem+json` (RFC 9457): `{{\"status\",\"code\",\"title\",\"detail\",\"request_id\"}}`. Codes are \
         stable; titles and\ndetails are for people.\n\n| status | code | title | when |\n|---|---|---|---|\n"
    );
    for code in Code::ALL {
        let (status, name, title) = (code.status().as_u16(), code.as_str(), code.title());
        page += &format!("| {status} | `{name}` | {title} | {} |\n", code.explanation());
    }
    check("errors.md", &page);
    let titles: BTreeSet<_> = Code::ALL.iter().map(|code| code.title()).collect();
    assert_eq!(titles.len(), Code::ALL.len(), "titles tell codes apart");
}

#[test]
fn the_metrics_are_those_of_the_code() {
    let mut page = format!(
        "{NOTE}\n\n# Metrics\n\n`GET /metrics` on the admin listener. Labels are closed sets, never a subject, an address or a token, and every \
         series is there\nfrom the start.\n\n| metric | type | |\n|---|---|---|\n"
    );
    for (name, kind, help) in Metrics::table() {
        let kind = match *kind {
            "IntCounter" | "IntCounterVec" | "Counter" => "counter",
            "IntGauge" | "IntGaugeVec" | "Gauge" => "gauge",
            "Histogram" => "histogram",
            other => panic!("{name} is of another kind: {other}"),
        };
        page += &format!("| `{name}` | {kind} | {help} |\n");
    }
    page += "| `process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_open_fds`, `process_max_fds`, ... | | The process, on Linux. |\n";
    check("metrics.md", &page);
}

#[test]
fn the_exit_codes_are_those_of_the_code() {
    let help = Command::new(env!("CARGO_BIN_EXE_tidegate")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, codes) = help.split_once("Exit codes:\n").expect("the help has them");
    let mut page = format!("{NOTE}\n\n# Exit codes\n\n| code | meaning |\n|---|---|\n");
    for line in codes.lines() {
        let (code, meaning) = line.trim().split_once("  ").expect("a code and its meaning");
        page += &format!("| {code} | {} |\n", meaning.trim());
    }
    check("exit-codes.md", &page);
}

/// Every link within the book leads to a page, and to a heading of it.
#[test]
fn links_lead_somewhere() {
    let root = docs();
    let mut pages = vec![];
    for folder in [root.clone(), root.join("reference")] {
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(files.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    assert!(pages.len() > 15, "{pages:?}");
    let summary = fs::read_to_string(root.join("SUMMARY.md")).unwrap();
    let mut wrong = vec![];
    for page in pages.iter().chain([&root.join("../../README.md")]) {
        let text = fs::read_to_string(page).unwrap();
        let name = page.strip_prefix(&root).unwrap_or(page).display().to_string();
        if !name.ends_with("SUMMARY.md") && !name.ends_with("README.md") && !summary.contains(&format!("({name})")) {
            wrong.push(format!("{name} is not in SUMMARY.md"));
        }
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") || link.starts_with('<') {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let Ok(target) = fs::read(&target)
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .or_else(|_| fs::read_dir(&target).map(|_| String::new()))
            else {
                wrong.push(format!("{name}: {link}"));
                continue;
            };
            let mut headings = target.lines().filter(|line| line.starts_with('#')).map(anchor);
            if !heading.is_empty() && !headings.any(|found| found == heading) {
                wrong.push(format!("{name}: {link}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The anchor of a heading, as mdBook and GitHub make it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// A schema in a few words.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str() {
        return name.rsplit('/').next().unwrap().to_owned();
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.iter().map(|value| format!("`{}`", value.as_str().unwrap())).collect::<Vec<_>>().join(", ");
    }
    match schema["type"].as_str() {
        Some("array") => format!("{}, once or several times", kind(&schema["items"])),
        Some(name) => name.to_owned(),
        None => String::new(),
    }
}

/// What the gateway says of itself, as text.
fn api(document: &Value) -> String {
    let mut page = format!(
        "{NOTE}\n\n# HTTP API\n\nThis is `GET /openapi.json` of a gateway with the default settings. \
         [Endpoints](endpoints.md) has the rest.\n"
    );
    let text = |value: &Value| value.as_str().unwrap_or_default().trim().replace('\n', " ").replace('|', "\\|");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let title = [&operation["summary"], &operation["description"]].map(&text).join("\n\n");
            page += &format!("\n## {} {path}\n\n{}\n", method.to_uppercase(), title.trim());
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            if !parameters.is_empty() {
                page += "\n| parameter | in | values | |\n|---|---|---|---|\n";
            }
            for parameter in &parameters {
                let [name, place, words] = ["name", "in", "description"].map(|key| text(&parameter[key]));
                page += &format!("| `{name}` | {place} | {} | {words} |\n", kind(&parameter["schema"]));
            }
            page += "\n| status | |\n|---|---|\n";
            for (status, answer) in operation["responses"].as_object().unwrap() {
                let shared = answer["$ref"].as_str().map(|name| name.rsplit('/').next().unwrap());
                let answer = shared.map_or(answer, |name| &document["components"]["responses"][name]);
                page += &format!("| {status} | {} |\n", text(&answer["description"]));
            }
        }
    }
    page
}

#[test]
fn the_api_is_what_the_gateway_says_of_itself() {
    check("api.md", &api(&Launch::new().start().ask("/openapi.json").json()));
}
