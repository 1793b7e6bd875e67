//! The console in a real browser, and where it is not.

mod support;

use std::{path::Path, process::Command};

use serde_json::Value;
use support::{
    gateway::{Gateway, Launch},
    http::Request,
};

fn drive(gateway: &Gateway) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser/console.mjs");
    let mut node = Command::new("node");
    node.arg(script).arg(format!("http://{}", gateway.address)).args(std::env::var("SCREENSHOTS").ok());
    let output = node.output().expect("there is Node.js");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn the_console_shows_publishes_pauses_resumes_and_stays_usable() {
    let gateway = Launch::new().with("limits.publishes_burst", "50000").start();
    let seen = drive(&gateway);
    assert_eq!(seen.get("error"), None, "{seen:#}");
    assert_eq!(seen["url"], format!("http://{}/console", gateway.address), "/ leads to it");
    let refused = |text: &Value| ["412", "400"].iter().any(|status| text.as_str().unwrap().contains(status));
    let violations: Vec<_> = seen["violations"].as_array().unwrap().iter().filter(|text| !refused(text)).collect();
    assert!(violations.is_empty(), "no script fails, and nothing breaks the policy: {violations:#?}");
    assert_eq!(seen["injected"], 0, "an event is text");
    assert_eq!(seen["whilePaused"], 0);
    let data: Vec<_> = seen["data"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(data.len(), 4, "each once: {data:#?}");
    assert!(seen["resumed"].as_i64().unwrap() >= 3, "{seen:#}");
    assert!(seen["mistake"].as_str().unwrap().ends_with("\n@.data.order = 42\n             ^"), "{seen:#}");
    assert_eq!(seen["selected"].as_array().unwrap().len(), 1, "{seen:#}");
    assert!(seen["hash"].as_str().unwrap().contains("where=%40.data.order+%3D%3D+42&every=200ms"), "{seen:#}");
    assert!(seen["fields"].as_str().unwrap().contains("orders.eu"));
    assert!(seen["conflict"].as_str().unwrap().starts_with("412"), "{seen:#}");
    assert!(seen["counts"].as_str().unwrap().contains("too fast to be drawn"), "{seen:#}");
    assert!(seen["rows"].as_u64().unwrap() <= 500);
    assert_eq!(seen["narrowOverflow"], 0, "nothing hangs over at 400 px");
    assert_eq!(seen["wallImages"], 0, "a picture of an origin that is not listed is not loaded");
    let curl = seen["curl"].as_str().unwrap();
    let answer = Command::new("bash").args(["-c", &format!("{curl} -s")]).output().expect("there is a shell");
    assert!(String::from_utf8_lossy(&answer.stdout).contains("\"duplicate\":false"), "{curl}: {answer:?}");
}

#[test]
fn the_console_is_there_where_it_may_be() {
    let local = Launch::new().start();
    let page = local.ask("/console");
    assert_eq!(page.status, 200);
    let policy = page.header("Content-Security-Policy").expect("it has a policy");
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    assert_eq!(local.ask("/").status, 302);
    assert_eq!(local.ask(Request::get("/console").header("X-Forwarded-For", "192.0.2.1")).status, 403);
    assert_eq!(local.ask(Request::post("/console").body("")).status, 405);
    assert!(local.ask("/console/state").json()["broker"].as_str().unwrap().starts_with("embedded"));

    let protected = Launch::new().with("auth.anonymous.subscribe", r#"["public.>"]"#);
    let closed = protected.start();
    for path in ["/", "/console", "/console/state"] {
        assert_eq!(closed.ask(path).status, 404, "{path}");
    }
    let shown = Launch::new()
        .with("auth.anonymous.subscribe", r#"["public.>"]"#)
        .with("console.enabled", "true")
        .with("console.images", r#"["https://images.example.com"]"#)
        .start();
    let page = shown.ask("/console");
    assert!(page.header("Content-Security-Policy").unwrap().contains("img-src data: https://images.example.com;"));
    assert!(page.text().contains(r#"content="https://images.example.com""#));
    assert_eq!(shown.ask("/console/state").status, 404, "the node's state is for operators");
}
