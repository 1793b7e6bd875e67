//! Pages of other origins: what they may read and publish, what a browser makes of it, and that every answer, streams and
//! refusals too, carries what the browser needs to know.

mod support;

use serde_json::json;
use support::{
    browser::Browser,
    gateway::{Gateway, Launch},
    http::{Head, Request, Response},
    nginx::Nginx,
    sse::EventStream,
    tokens::{SECRET, token},
};

const LISTED: &str = "https://app.example.com";
const FOREIGN: &str = "https://evil.example.com";
const NEAR: &str = "http://localhost:5173";

fn listing(origins: &str) -> Gateway {
    Launch::new().with("cors.origins", origins).start()
}

fn from(origin: &str, request: Request) -> Request {
    request.header("Origin", origin)
}

fn preflight(gateway: &Gateway, origin: &str, target: &str) -> Response {
    let request = from(origin, Request::new("OPTIONS", target)).header("Access-Control-Request-Method", "POST");
    gateway.ask(request.header("Access-Control-Request-Headers", "idempotency-key"))
}

/// The origin that may read this answer, which says that it depends on who asks.
fn reader(head: &Head) -> Option<&str> {
    assert_eq!(head.header("Vary"), Some("Origin"), "{head:?}");
    head.header("Access-Control-Allow-Origin")
}

#[test]
fn no_answer_is_taken_for_a_page() {
    let gateway = Launch::new().start();
    for answer in [
        gateway.ask(Request::post("/events/demo").body("<script>")),
        gateway.ask("/nowhere"),
        gateway.ask("/events/a..b"),
        gateway.ask_admin("/health/ready"),
        gateway.ask_admin("/debug/streams"),
    ] {
        assert_eq!(answer.header("X-Content-Type-Options"), Some("nosniff"), "{answer:?}");
    }
    let stream = gateway.stream("/events/demo");
    assert_eq!(stream.head.header("X-Content-Type-Options"), Some("nosniff"));
}

#[test]
fn a_page_of_another_site_gets_nothing_for_want_of_an_origin() {
    let open = Launch::new().start();
    let of_page = |request: Request| request.header("Sec-Fetch-Site", "cross-site").header("Sec-Fetch-Mode", "no-cors");
    for request in [Request::post("/events/demo").body("x"), Request::batch().body(""), Request::get("/events/demo")] {
        assert_eq!(open.ask(of_page(request)).json()["code"], "open_only_locally");
    }
    let by_link =
        Request::get("/events/demo").header("Sec-Fetch-Site", "cross-site").header("Sec-Fetch-Mode", "navigate");
    assert_eq!(EventStream::begin(open.connect(), by_link).head.status, 200);
    let closed = Launch::new().with("auth.anonymous.publish", r#"["demo"]"#).start();
    let publish = || Request::post("/events/demo").body("x");
    let refused = closed.ask(of_page(publish()).header("Cookie", "a=b"));
    assert_eq!((refused.status, &refused.json()["code"]), (403, &"origin_not_allowed".into()));
    assert_eq!(closed.ask(of_page(publish())).status, 201, "what everybody may");
}

#[test]
fn a_page_without_tls_publishes_with_no_cookie_of_the_site_that_has_it() {
    let gateway = Launch::new().with("auth.anonymous.publish", r#"["demo"]"#).start();
    let publish = |scheme: &str, proto: &str| {
        let request =
            Request::post("/events/demo").body("x").header("Host", "events.example.com").header("Cookie", "a=b");
        let origin = format!("{scheme}://events.example.com");
        gateway.ask(request.header("Origin", origin).header("X-Forwarded-Proto", proto)).status
    };
    assert_eq!([publish("https", "https"), publish("http", "http"), publish("http", "https")], [201, 201, 403]);
}

#[test]
fn a_page_on_another_port_streams_and_publishes_by_default() {
    let gateway = Launch::new().start();
    let site = Nginx::site();
    let events = format!("http://127.0.0.1:{}/events/demo", gateway.address.port());
    let mut page = Browser::watch(&format!("http://localhost:{}", site.http.port()), &events, &["note"]);
    page.wait_for_state("open");

    // Its headers make the browser ask first.
    let options = json!({ "method": "POST", "body": "hello", "headers": {
        "Idempotency-Key": "1", "Content-Type": "application/json", "If-None-Match": "*" } });
    let published = page.fetch(&format!("{events}?type=note"), options);

    assert_eq!(published["status"], 201, "{published}");
    assert!(published["id"].is_string(), "the page may read the request's id");
    assert_eq!(page.event()["data"], "hello");
    let refused = page.fetch(&format!("{events}?nonsense=1"), json!({}));
    assert_eq!(refused["status"], 400, "a page can read why it was refused: {refused}");
}

#[test]
fn a_foreign_page_neither_streams_nor_publishes() {
    let gateway = Launch::new().start();
    let site = Nginx::site();
    let events = format!("http://127.0.0.1:{}/events/demo", gateway.address.port());
    let mut page = Browser::watch(&format!("http://evil.example.com:{}", site.http.port()), &events, &[]);

    while page.next()["state"] != "closed" {}
    for options in [
        json!({}),
        json!({ "method": "POST", "body": "forged" }),
        json!({ "method": "POST", "body": "forged", "mode": "no-cors" }),
        json!({ "method": "POST", "body": "forged", "headers": { "Content-Type": "application/json" } }),
    ] {
        let fetched = page.fetch(&events, options.clone());
        assert!(fetched["error"].is_string() || fetched["status"] == 0, "{options}: {fetched}");
    }
    let mut kept = gateway.stream("/events/demo?from=first");
    gateway.publish("demo", "own");
    assert_eq!(kept.next().data, "own", "nothing that was forged is stored");
}

#[test]
fn an_open_gateway_is_for_pages_of_this_machine() {
    let gateway = Launch::new().start();
    for near in [NEAR, "https://localhost", "http://127.0.0.1:3000", "http://[::1]:5173"] {
        let answer = gateway.ask(from(near, Request::post("/events/demo").body("x")));
        assert_eq!((answer.status, reader(&answer.head)), (201, Some(near)));
        assert_eq!(preflight(&gateway, near, "/events/demo").status, 204);
    }
    for far in
        [FOREIGN, "null", "http://localhost.example.com", "http://127.0.0.1.example.com", "http://localhost@evil"]
    {
        let answer = gateway.ask(from(far, Request::post("/events/demo").body("x")));
        assert_eq!((answer.status, reader(&answer.head)), (403, None), "{far}");
        assert_eq!(answer.json()["code"], "open_only_locally");
        let refused = gateway.ask(from(far, Request::batch().body("")));
        assert_eq!(refused.json()["code"], "open_only_locally", "{far}");
        let refused = gateway.ask(from(far, Request::get("/events/demo")));
        assert_eq!((refused.status, reader(&refused.head)), (403, None), "{far}");
        let refused = preflight(&gateway, far, "/events");
        assert_eq!((refused.status, reader(&refused.head)), (403, None), "{far}");
    }
    let listed = listing(&format!("[{LISTED:?}]"));
    assert_eq!(listed.ask(from(LISTED, Request::post("/events/demo").body("x"))).status, 201, "it is let in by name");
}

#[test]
fn a_preflight_says_what_pages_may_send() {
    let gateway = listing(&format!("[{LISTED:?}]"));
    for target in ["/events", "/events/demo", "/events/a.>", "/events/demo?type=x"] {
        let answer = preflight(&gateway, LISTED, target);
        assert_eq!((answer.status, reader(&answer.head)), (204, Some(LISTED)));
        assert_eq!(answer.header("Access-Control-Allow-Credentials"), Some("true"));
        assert_eq!(answer.header("Access-Control-Allow-Methods"), Some("GET, POST"));
        assert_eq!(answer.header("Access-Control-Max-Age"), Some("600"));
        let headers = answer.header("Access-Control-Allow-Headers").expect("some");
        for header in ["Last-Event-ID", "Content-Type", "Idempotency-Key", "If-Match", "Authorization", "Cache-Control"]
        {
            assert!(headers.contains(header), "{header} is not among {headers}");
        }
    }
    assert_eq!(preflight(&gateway, FOREIGN, "/events/demo").status, 403);
    assert_eq!(preflight(&gateway, LISTED, "/nowhere").status, 404);
    let no_preflight = gateway.ask(from(LISTED, Request::new("OPTIONS", "/events/demo")));
    assert_eq!((no_preflight.status, reader(&no_preflight.head)), (405, Some(LISTED)));
}

#[test]
fn everyone_is_let_in_without_credentials() {
    let gateway = listing(&format!("[\"*\", {LISTED:?}]"));

    let stream = EventStream::open(gateway.connect(), from(FOREIGN, Request::get("/events/demo")));
    assert_eq!(reader(&stream.head), Some("*"));
    assert_eq!(stream.head.header("Access-Control-Allow-Credentials"), None);
    let asked = preflight(&gateway, FOREIGN, "/events/demo");
    assert_eq!((asked.status, reader(&asked.head)), (204, Some("*")));
    assert!(!asked.header("Access-Control-Allow-Headers").expect("some").contains("Authorization"));

    let listed = EventStream::open(gateway.connect(), from(LISTED, Request::get("/events/demo")));
    assert_eq!(reader(&listed.head), Some(LISTED));
    assert_eq!(listed.head.header("Access-Control-Allow-Credentials"), Some("true"));

    let post = |origin| from(origin, Request::post("/events/demo").body("x"));
    assert_eq!(gateway.ask(post(FOREIGN)).status, 201);
    let with_cookie = gateway.ask(post(FOREIGN).header("Cookie", "session=stolen"));
    assert_eq!((with_cookie.status, with_cookie.json()["code"].as_str()), (403, Some("origin_not_allowed")));
    assert_eq!(gateway.ask(post(LISTED).header("Cookie", "session=own")).status, 201);
}

#[test]
fn what_is_for_everybody_is_read_from_anywhere_and_a_cookie_publishes_only_for_its_own_pages() {
    let gateway = Launch::new()
        .with("auth.jwt.secret", SECRET)
        .with("auth.anonymous.subscribe", r#"["public.>"]"#)
        .with("cors.origins", &format!("[{LISTED:?}]"))
        .start();
    let session = token(json!({ "tidegate": { "subscribe": [">"], "publish": [">"] } }));
    let cookie = format!("tidegate={session}");

    let public = EventStream::open(gateway.connect(), from(FOREIGN, Request::get("/events/public.a")));
    assert_eq!(reader(&public.head), Some("*"));
    let mine = from(LISTED, Request::get("/events/mine")).header("Cookie", &cookie);
    assert_eq!(reader(&EventStream::open(gateway.connect(), mine).head), Some(LISTED));
    // A browser shows nothing of it to a page that asked with credentials: `*` is for requests without.
    let theirs =
        EventStream::open(gateway.connect(), from(FOREIGN, Request::get("/events/mine")).header("Cookie", &cookie));
    assert_eq!((reader(&theirs.head), theirs.head.header("Access-Control-Allow-Credentials")), (Some("*"), None));

    let post = |origin| from(origin, Request::post("/events/mine").body("x")).header("Cookie", &cookie);
    for (request, status) in [
        (post(LISTED), 201),
        (post("http://localhost"), 201),
        (post(FOREIGN), 403),
        (post("null"), 403),
        (post(NEAR), 403),
        (from(FOREIGN, Request::batch().body("{\"subject\":\"mine\",\"data\":1}\n")).header("Cookie", &cookie), 403),
    ] {
        let answer = gateway.ask(&request);
        assert_eq!(answer.status, status, "{request:?}");
        assert!(status == 201 || answer.json()["code"] == "origin_not_allowed", "{answer:?}");
    }
}

#[test]
fn every_answer_says_who_may_read_it() {
    let gateway = Launch::new().with("limits.streams", "1").start();
    let stream = EventStream::open(gateway.connect(), from(NEAR, Request::get("/events/demo")));
    assert_eq!(reader(&stream.head), Some(NEAR));

    let event_source = Request::get("/events/demo").header("Accept", "text/event-stream");
    for (request, status) in [
        (event_source, 200),
        (Request::get("/events/demo"), 503),
        (Request::get("/events/a..b"), 400),
        (Request::get("/nowhere"), 404),
        (Request::new("PUT", "/events/demo"), 405),
        (Request::new("HEAD", "/events/demo"), 503),
        (Request::post("/events/demo").body("x"), 201),
        (Request::post("/events/demo?ttl=x").body("x"), 400),
        (Request::batch().body("nonsense\n"), 200),
        (Request::post("/events").body("x"), 415),
    ] {
        let answer = gateway.ask(from(NEAR, request.clone()));
        assert_eq!((answer.status, reader(&answer.head)), (status, Some(NEAR)), "{request:?}");
        assert_eq!(answer.header("Access-Control-Expose-Headers"), Some("Retry-After, X-Request-Id"));
        let plain = gateway.ask(&request);
        assert_eq!((plain.status, reader(&plain.head)), (status, None), "{request:?}");
    }
    let admin = gateway.ask_admin(from(NEAR, Request::get("/metrics")));
    assert_eq!(admin.header("Access-Control-Allow-Origin"), None, "metrics are for no page");
}

#[test]
fn every_answer_has_a_request_id() {
    let gateway = Launch::new().start();
    let answered = |request: Request| {
        let answer = gateway.ask(request);
        let id = answer.header("X-Request-Id").expect("an id").to_owned();
        assert_eq!(answer.status == 400, answer.json()["request_id"] == id, "{answer:?}");
        id
    };

    let proxied = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";
    assert_eq!(answered(Request::post("/events/demo").header("X-Request-Id", proxied).body("x")), proxied);
    assert_eq!(answered(Request::get("/events/a..b").header("X-Request-Id", proxied)), proxied);
    let stream = EventStream::open(gateway.connect(), Request::get("/events/demo").header("X-Request-Id", proxied));
    assert_eq!(stream.head.header("X-Request-Id"), Some(proxied));

    let long = "x".repeat(129);
    for unfit in ["", "a b", "a;b", "\u{e9}", "<script>", &long] {
        let made = answered(Request::get("/events/a..b").header("X-Request-Id", unfit));
        assert!(made.len() == 32 && made.bytes().all(|byte| byte.is_ascii_hexdigit()), "{unfit:?}: {made}");
    }
    assert_ne!(answered(Request::get("/events/a..b")), answered(Request::get("/events/a..b")));

    let direct = Launch::new().with("trusted_proxies", "[]").start();
    let answer = direct.ask(Request::get("/events/a..b").header("X-Request-Id", proxied));
    assert_ne!(answer.header("X-Request-Id"), Some(proxied), "it is taken from nobody else");
}

#[test]
fn a_stream_behind_pipelined_requests_has_its_own_headers() {
    let gateway = Launch::new().start();
    let mut connection = gateway.connect();
    for (request, id) in [
        (from(FOREIGN, Request::get("/events/a..b")), "one"),
        (from(NEAR, Request::post("/events/demo").body("x")), "two"),
        (from(NEAR, Request::get("/events/demo?from=first")), "three"),
    ] {
        connection.send(request.header("X-Request-Id", id));
    }
    let mut answered = |status, id, allowed| {
        let answer = connection.response();
        assert_eq!((answer.status, answer.header("X-Request-Id"), reader(&answer.head)), (status, Some(id), allowed));
    };
    answered(403, "one", None);
    answered(201, "two", Some(NEAR));
    let stream = connection.head();
    assert_eq!((stream.status, stream.header("X-Request-Id"), reader(&stream)), (200, Some("three"), Some(NEAR)));
    while !connection.line().expect("the stream goes on").starts_with("data: x") {}
}

#[test]
fn a_stream_over_http_1_0_has_them_too() {
    let gateway = Launch::new().start();
    let request = from(NEAR, Request::get("/events/demo")).header("X-Request-Id", "old").http_1_0();
    let stream = EventStream::open(gateway.connect(), request);
    assert_eq!((stream.head.header("X-Request-Id"), reader(&stream.head)), (Some("old"), Some(NEAR)));
}
