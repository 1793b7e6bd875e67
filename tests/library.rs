//! `tidegate.js` and the demos in a real browser.

mod support;

use std::{fs, io::Write, path::Path, process::Command, time::Instant};

use serde_json::{Value, json};
use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    http::{Connection, Request},
    nginx::Nginx,
    tokens::{SECRET, now, reader, token},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn drive(scenario: &str, gateway: &Gateway, arguments: &Value) -> Value {
    let script = Path::new(ROOT).join("tests/browser/library.mjs");
    let mut node = Command::new("node");
    node.arg(script).args([scenario, &format!("http://{}", gateway.address), &arguments.to_string()]);
    let output = node.args(std::env::var("SCREENSHOTS").ok()).output().expect("there is Node.js");
    let seen: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(seen.get("error"), None, "{seen:#}");
    assert_eq!(seen["violations"], json!([]), "no script fails, and nothing breaks the policy");
    seen
}

fn open_gateway() -> Gateway {
    Launch::new().with("limits.publishes_burst", "50000").with("limits.publishes", "50000").start()
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

#[test]
fn two_browsers_agree_after_a_thousand_racing_steps_and_a_cut() {
    let seen = drive("session", &open_gateway(), &json!({}));
    let stored: Vec<_> = seen["stored"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).collect();
    let total = stored[0] + stored[1];
    assert_eq!(seen["pictures"], json!([total, total]), "each step that was stored counts once");
    assert!(stored.iter().all(|count| *count > 0) && total <= 1000, "{stored:?}");
    let chat = texts(&seen["chat"]);
    assert_eq!(chat.len(), 101, "each word once: {chat:#?}");
    assert!((0..100).all(|number| chat[number].ends_with(&format!("word {number}"))));
    assert_eq!((&seen["strokes"], &seen["injected"], &seen["own"]), (&json!(1), &json!(0), &json!(1)));
    assert_eq!(seen["overflow"], 0, "nothing hangs over at 400 px");
}

#[test]
fn boards_open_and_close_on_one_connection() {
    let seen = drive("board", &open_gateway(), &json!({}));
    assert_eq!(seen["connections"], 2, "two documents on one connection");
    assert!((100..=200).contains(&seen["moves"].as_u64().unwrap()), "{seen:#}");
    assert_eq!(seen["overflow"], 0);
}

#[test]
fn the_wall_fills_with_whatever_comes() {
    let seen = drive("wall", &open_gateway(), &json!({}));
    assert_eq!(seen["newest"], "just text, not JSON <b>\nwall.curl");
    assert_eq!(seen["overflow"], 0);
}

#[test]
fn an_access_log_is_shown_as_it_is_written() {
    let gateway = open_gateway();
    let nginx = Nginx::origin(gateway.address, gateway.address);
    for target in ["/console", "/missing", "/openapi.json"] {
        Connection::ask(nginx.http, Request::get(target));
    }
    // nginx writes a line once it has sent the answer.
    let deadline = Instant::now() + PATIENCE;
    let log = loop {
        let log = fs::read_to_string(nginx.access_log()).unwrap();
        if log.lines().count() == 3 {
            break log;
        }
        assert!(Instant::now() < deadline, "{log}");
        std::thread::yield_now();
    };
    let log: Vec<_> = log.lines().collect();
    let seen = drive("log", &gateway, &json!({ "log": log }));
    let newest_first: Vec<_> = texts(&seen["lines"]).into_iter().rev().collect();
    assert_eq!(newest_first, log);
    assert!(seen["classes"].as_str().unwrap().contains("4xx 1"), "{seen:#}");
}

#[test]
fn a_source_renews_its_token_resumes_after_a_reload_and_survives_bad_storage() {
    let gateway = Launch::new().with("auth.jwt.secret", SECRET).with("auth.jwt.expiry_warning", "0s").start();
    let may = json!({ "subscribe": ["demo.>"], "publish": ["demo.>"] });
    let short = token(json!({ "exp": now() + 5, "tidegate": may }));
    let publisher = token(json!({ "tidegate": may }));
    let arguments = json!({
        "tokens": [short, reader(&["demo.>"])],
        "headers": { "Authorization": format!("Bearer {publisher}") },
    });
    let seen = drive("source", &gateway, &arguments);
    assert_eq!(texts(&seen["got"]), ["1", "paid 2 true", "3"]);
    assert_eq!(seen["tokens"], 2, "the token is asked for once, and again at its end");
    assert_eq!(texts(&seen["reloaded"]), ["while away"]);
    assert_eq!(seen["withoutStorage"], 4);
    assert_eq!(seen["refused"], json!([403, "forbidden", false, 2]));
}

#[test]
fn a_source_waits_for_room_and_leaves_a_dead_connection() {
    let gateway = Launch::new().with("limits.streams", "1").with("sse.heartbeat", "1s").start();
    let seen = drive("patience", &gateway, &json!({}));
    assert_eq!(seen["refused"], json!([503, "too_many_streams", true]));
    assert_eq!(seen["isAnother"], true);
    assert_eq!(texts(&seen["got"]), ["1", "2", "3", "4\u{2028}: \u{2029}x"]);
}

#[test]
fn all_tabs_of_an_origin_share_one_connection_and_survive_the_tab_that_reads() {
    let gateway = open_gateway();
    let seen = drive("share", &gateway, &json!({ "admin": format!("http://{}", gateway.admin) }));
    assert_eq!(seen["streams"], 1);
    let numbers: Vec<_> = (0..200).map(|number| number.to_string()).chain(["last".to_owned()]).collect();
    assert_eq!(texts(&seen["killed"]), numbers, "nothing is lost or repeated");
    assert_eq!(texts(&seen["other"]), ["two", "last"]);
    assert_eq!(seen["late"], 4 + 200 + 1 + 1);
}

#[test]
fn the_library_is_small_typed_and_there() {
    let gateway = Launch::new().with("auth.jwt.secret", SECRET).start();
    let library = gateway.ask("/tidegate.js");
    assert_eq!((library.status, library.header("Content-Type")), (200, Some("text/javascript; charset=utf-8")));
    assert_eq!(gateway.ask("/tidegate.d.ts").status, 200);
    assert_eq!(gateway.ask("/demos/wall").status, 404, "demos are for the own machine");
    let mut gzip = Command::new("gzip")
        .args(["-9", "-c"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("there is gzip");
    gzip.stdin.take().unwrap().write_all(library.text().as_bytes()).unwrap();
    let packed = gzip.wait_with_output().unwrap().stdout.len();
    assert!(packed < 6_000, "{packed} bytes");
    for demo in fs::read_dir(Path::new(ROOT).join("web/demos")).unwrap() {
        let demo = demo.unwrap().path();
        assert!(fs::read_to_string(&demo).unwrap().lines().count() < 120, "{}", demo.display());
    }
}
