//! The descriptions of the API: valid, and true, which a tester finds out that sends what they describe.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use support::gateway::{Gateway, Launch};

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/clients/api")
}

/// A description in a file of its own.
fn save(gateway: &Gateway, path: &str, name: &str) -> PathBuf {
    let answer = gateway.ask(path);
    assert_eq!(answer.status, 200, "{path}");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&file, answer.text()).unwrap();
    file
}

fn passes(command: &mut Command) {
    let output = command.output().expect("tests/install brings it");
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{said}");
}

#[test]
fn the_openapi_description_is_valid() {
    let gateway = Launch::new().with("auth.anonymous.subscribe", r#"["public.>"]"#).start();
    let file = save(&gateway, "/openapi.json?version=3.1", "openapi-3.1.json");
    passes(Command::new(tools().join("bin/openapi-spec-validator")).arg(file));
    let newest = gateway.ask("/openapi.json").json();
    assert_eq!(newest["openapi"], "3.2.0");
    let stream = &newest["paths"]["/events/{subject}"]["get"]["responses"]["200"]["content"]["text/event-stream"];
    assert!(stream["itemSchema"].is_object(), "{stream}");
    assert_eq!(newest["servers"][0]["url"], "http://localhost");
    assert!(newest["components"]["securitySchemes"]["bearer"].is_object());
    let open = Launch::new().start();
    assert_eq!(open.ask("/openapi.json").json()["components"]["securitySchemes"], serde_json::json!({}));
}

#[test]
fn the_asyncapi_description_is_valid() {
    let gateway = Launch::new().start();
    let file = save(&gateway, "/asyncapi.json", "asyncapi.json");
    let script = "
        const { Parser } = require('@asyncapi/parser');
        new Parser().parse(require('fs').readFileSync(process.argv[1], 'utf8')).then(({ document, diagnostics }) => {
          const errors = diagnostics.filter((diagnostic) => diagnostic.severity === 0);
          if (!document || errors.length) { console.error(JSON.stringify(errors, null, 1)); process.exit(1); }
        });";
    passes(Command::new("node").args(["-e", script]).arg(file).env("NODE_PATH", tools().join("node_modules")));
}

/// Requests that the description allows, and some that it does not, are answered as it says. Streams are ended by `follow=0`.
#[test]
fn what_the_description_says_is_so() {
    let gateway = Launch::new().with("limits.address_attempts_burst", "100000").start();
    let mut document = gateway.ask("/openapi.json?version=3.1").json();
    for path in ["/events/{subject}", "/events"] {
        let parameters = document["paths"][path]["get"]["parameters"].as_array_mut().unwrap();
        // Without an end a stream would keep the tester waiting.
        parameters
            .retain(|parameter| !["follow", "until", "wait", "limit"].contains(&parameter["name"].as_str().unwrap()));
        let end = serde_json::json!({ "name": "follow", "in": "query", "required": true, "schema": { "enum": ["0"] } });
        parameters.push(end);
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openapi-tested.json");
    fs::write(&file, document.to_string()).unwrap();
    let url = format!("http://{}", gateway.address);
    passes(
        Command::new(tools().join("bin/schemathesis"))
            .current_dir(env!("CARGO_TARGET_TMPDIR"))
            .args(["run", "--url", &url, "--max-examples", "25", "--seed", "7", "--request-timeout", "10"])
            .args(["--checks", "not_a_server_error,status_code_conformance,content_type_conformance"])
            .args(["--phases", "examples,coverage,fuzzing"])
            // It knows no way to write NDJSON.
            .args(["--exclude-operation-id", "publishBatch"])
            .arg(file),
    );
    assert_eq!(gateway.ask_admin("/health/ready").text(), "ready\n");
}
