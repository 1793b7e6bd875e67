//! Authentication and authorization: principals and anonymous clients, what either may do, and every way that was thought of to be or
//! to do more.

mod support;

use std::{
    fs,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Instant,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey};
use serde_json::{Value, json};
use support::{
    PATIENCE,
    backend::Backend,
    browser::Browser,
    gateway::{Gateway, Launch},
    http::{Request, Response},
    nginx::Nginx,
    site::{Page, Site},
    sse::{Event, EventStream, Signal, farewell},
    tokens::{KeyPair, SECRET, forge, now, reader, token, unsigned},
};

/// A gateway that takes tokens made with [`SECRET`].
fn with_secret() -> Launch {
    Launch::new().with("auth.jwt.secret", SECRET)
}

fn get(target: &str) -> Request {
    Request::get(target)
}

fn post(target: &str) -> Request {
    Request::post(target).body("x")
}

/// Status and code of an answer; the status of a stream is followed by nothing.
fn ask(gateway: &Gateway, request: Request) -> (u16, String) {
    let mut connection = gateway.connect();
    connection.send(request);
    let head = connection.head();
    if head.status < 300 {
        return (head.status, String::new());
    }
    let mut body = vec![];
    while let Some(piece) = connection.piece() {
        body.extend(piece);
    }
    let problem: Value = serde_json::from_slice(&body).expect("a refusal is a problem");
    (head.status, problem["code"].as_str().expect("a problem has a code").to_owned())
}

#[track_caller]
fn assert_asked(gateway: &Gateway, rows: impl IntoIterator<Item = (Request, u16, &'static str)>) {
    let mut wrong = vec![];
    for (request, status, code) in rows {
        let answer = ask(gateway, request.clone());
        if answer != (status, code.to_owned()) {
            wrong.push(format!("{request:?}\n    is answered {answer:?}, not {status} {code}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_bad_token_is_refused_and_never_counts_as_none() {
    let gateway = with_secret()
        .with("auth.jwt.issuer", r#"["us"]"#)
        .with("auth.jwt.audience", r#"["gateway"]"#)
        .with("auth.jwt.lifetime", "2h")
        .with("auth.filters", "3")
        .with("auth.token_bytes", "4000")
        .with("auth.anonymous.subscribe", r#"["public"]"#)
        .start();
    let good = || json!({ "sub": "ann", "exp": now() + 3600, "iss": "us", "aud": "gateway" });
    let but = |name: &str, value: Value| {
        let mut claims = good();
        claims[name] = value;
        claims
    };
    let without = |name: &str| {
        let mut claims = good();
        claims.as_object_mut().unwrap().remove(name);
        claims
    };
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let hs256 = |claims: Value| forge(json!({"alg": "HS256"}), claims, &key, Algorithm::HS256);
    let with_header = |header: Value| forge(header, good(), &key, Algorithm::HS256);
    let signed = hs256(good());
    let (message, signature) = signed.rsplit_once('.').unwrap();
    let (header, _) = message.split_once('.').unwrap();
    let raw = |claims: String| {
        let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims));
        let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
        format!("{message}.{signature}")
    };

    let mut tokens = vec![];
    for alg in ["none", "None", "NONE", "nOnE", "", "HS257", "hs256", "RS256", "ES256", "EdDSA"] {
        tokens.push((format!("alg {alg:?}"), format!("{}.{signature}", unsigned(&json!({ "alg": alg }), &good()))));
        tokens.push((format!("alg {alg:?}, unsigned"), format!("{}.", unsigned(&json!({ "alg": alg }), &good()))));
    }
    for (what, exp) in [
        ("long ago", json!(1)),
        ("zero", json!(0)),
        ("a moment ago", json!(now() - 1)),
        ("now", json!(now())),
        ("negative", json!(-1)),
        ("huge", json!(u64::MAX)),
        ("as large as a time can be", json!(i64::MAX)),
        ("1e300", json!(1e300)),
        ("a fraction", json!(now() as f64 + 60.5)),
        ("a text", json!((now() + 60).to_string())),
        ("null", Value::Null),
        ("a list", json!([now() + 60])),
        ("true", json!(true)),
        ("too far off", json!(now() + 7300)),
    ] {
        tokens.push((format!("exp is {what}"), hs256(but("exp", exp))));
    }
    let subscribe = |filters: Value| but("tidegate", json!({ "subscribe": filters }));
    tokens.extend(
        [
            ("no exp", hs256(without("exp"))),
            ("exp twice", raw(good().to_string().replacen('{', r#"{"exp":1,"#, 1))),
            ("not yet", hs256(but("nbf", json!(now() + 600)))),
            ("nbf is nonsense", hs256(but("nbf", json!("soon")))),
            ("issued too long before its end", hs256(but("iat", json!(now() - 7200)))),
            ("issued in the future", hs256(but("iat", json!(now() + 60)))),
            ("iat is nonsense", hs256(but("iat", json!("soon")))),
            ("another issuer", hs256(but("iss", json!("them")))),
            ("a list of other issuers", hs256(but("iss", json!(["them"])))),
            ("an issuer that is a number", hs256(but("iss", json!(7)))),
            ("no issuer", hs256(without("iss"))),
            ("another audience", hs256(but("aud", json!("them")))),
            ("other audiences", hs256(but("aud", json!(["a", "b"])))),
            ("an audience that is an object", hs256(but("aud", json!({"gateway": true})))),
            ("no audience", hs256(without("aud"))),
            ("a wrong signature", format!("{message}.{}", signature.chars().rev().collect::<String>())),
            ("no signature", format!("{message}.")),
            ("two parts", message.into()),
            ("four parts", format!("{signed}.{signature}")),
            ("a signature with padding", format!("{signed}=")),
            (
                "another secret",
                forge(json!({"alg": "HS256"}), good(), &EncodingKey::from_secret(b"x"), Algorithm::HS256),
            ),
            (
                "signed with nothing",
                forge(json!({"alg": "HS256"}), good(), &EncodingKey::from_secret(b""), Algorithm::HS256),
            ),
            ("a kid with a path, signed with an empty file", {
                let header = json!({"alg": "HS256", "kid": "../../../../dev/null"});
                forge(header, good(), &EncodingKey::from_secret(b""), Algorithm::HS256)
            }),
            ("a key of its own", {
                let jwk = json!({"kty": "oct", "k": URL_SAFE_NO_PAD.encode("own")});
                forge(json!({"alg": "HS256", "jwk": jwk}), good(), &EncodingKey::from_secret(b"own"), Algorithm::HS256)
            }),
            ("a critical extension", with_header(json!({"alg": "HS256", "crit": ["exp"]}))),
            ("claims that are a list", raw("[]".into())),
            ("claims that are no JSON", raw("x".into())),
            ("a filter that is none", hs256(subscribe(json!(["a..b"])))),
            ("a filter with a line break", hs256(subscribe(json!(["a\r\nX: y"])))),
            ("filters that are a text", hs256(subscribe(json!(">")))),
            ("too many filters", hs256(subscribe(json!(["a", "b", "c", "d"])))),
            ("a claim that is mistyped", hs256(but("tidegate", json!({"subscibe": [">"]})))),
            ("a claim that is a list", hs256(but("tidegate", json!([">"])))),
            ("a claim that is a list of lists", hs256(but("tidegate", json!([[">"], [">"]])))),
            ("a claim that is null", hs256(but("tidegate", Value::Null))),
            ("a claim that is a text", hs256(but("tidegate", json!(">")))),
            ("too long", hs256(but("x", json!("x".repeat(4000))))),
            ("nothing", String::new()),
            ("nonsense", "x".into()),
            ("dots", "..".into()),
            ("bytes", "\u{ff}\u{fe}.\u{0}".replace('\0', "~")),
            ("an unknown key", "tgk_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".into()),
            ("the beginning of a key", "tgk_".into()),
        ]
        .map(|(what, token)| (what.to_owned(), token)),
    );

    assert_eq!(gateway.stream(get("/events/public").bearer(&hs256(subscribe(json!(["public"]))))).head.status, 200);
    for (what, token) in tokens {
        for request in [get("/events/public"), get("/events/secret"), post("/events/public"), Request::batch()] {
            let mut connection = gateway.connect();
            connection.send(request.bearer(&token));
            let answer = connection.response();
            assert_eq!((answer.status, code(&answer)), (401, "invalid_token".into()), "{what}: {answer:?}");
            assert_eq!(answer.header("WWW-Authenticate"), Some(r#"Bearer error="invalid_token""#), "{what}");
        }
        if !token.is_empty() && token.is_ascii() {
            let answer = gateway.ask(get("/events/public").header("Cookie", format!("a=b; tidegate={token}")));
            assert_eq!((answer.status, code(&answer)), (401, "invalid_token".into()), "{what}, in a cookie");
        }
    }
}

#[test]
fn a_token_for_any_audience_is_for_another_where_none_is_set() {
    let gateway = with_secret().start();
    let with = |aud: Option<Value>| {
        let mut claims = json!({ "sub": "ann", "tidegate": { "subscribe": ["demo"] } });
        aud.into_iter().for_each(|aud| claims["aud"] = aud);
        get("/events/demo").bearer(&token(claims))
    };
    assert_eq!(ask(&gateway, with(None)).0, 200);
    for aud in [json!("them"), json!(["them"]), json!([]), json!(7), json!({"them": true}), json!(true), Value::Null] {
        assert_eq!(ask(&gateway, with(Some(aud.clone()))), (401, "invalid_token".into()), "{aud}");
    }
}

#[test]
fn a_token_that_names_no_key_is_tried_with_few() {
    let pairs: Vec<_> = (0..5).map(|_| KeyPair::make(Algorithm::ES256)).collect();
    let file = std::env::temp_dir().join(format!("tidegate-many-keys-{}.json", std::process::id()));
    let keys: Vec<_> = (0..).zip(&pairs).map(|(number, pair)| pair.jwk(&format!("key-{number}"))).collect();
    let start = |keys: &[Value]| {
        fs::write(&file, json!({ "keys": keys }).to_string()).unwrap();
        Launch::new().with("auth.jwt.jwks_file", file.to_str().unwrap()).start()
    };
    let few = start(&keys[..4]);
    for (number, pair) in (0..4).zip(&pairs) {
        assert_eq!(ask(&few, get("/events/demo").bearer(&pair.token(None))).0, 200, "{number}");
    }
    let many = start(&keys);
    let refused = many.ask(get("/events/demo").bearer(&pairs[0].token(None)));
    assert!(refused.status == 401 && refused.text().contains("have its issuer name the key (kid)"), "{refused:?}");
    for (number, pair) in (0..5).zip(&pairs) {
        assert_eq!(ask(&many, get("/events/demo").bearer(&pair.token(Some(&format!("key-{number}"))))).0, 200);
        let others = pair.token(Some(&format!("key-{}", (number + 1) % 5)));
        assert_eq!(ask(&many, get("/events/demo").bearer(&others)).0, 401);
    }
    fs::remove_file(file).unwrap();
}

#[test]
fn bad_tokens_that_would_publish_are_attempts() {
    let gateway =
        with_secret().with("limits.address_attempts", "1").with("limits.address_attempts_burst", "10").start();
    let good = token(json!({ "sub": "ann", "tidegate": { "publish": ["demo"] } }));
    let from = |address: &str, token: &str| post("/events/demo").bearer(token).header("X-Forwarded-For", address);
    // Good ones are not.
    for _ in 0..30 {
        assert_eq!(ask(&gateway, from("192.0.2.1", &good)).0, 201);
    }
    let refused = || ask(&gateway, from("192.0.2.1", &format!("{good}x"))).1;
    assert_eq!(refused(), "invalid_token");
    let deadline = Instant::now() + PATIENCE;
    while refused() != "too_many_attempts" {
        assert!(Instant::now() < deadline, "they are looked at for ever");
    }
    assert_eq!(ask(&gateway, from("192.0.2.2", &good)).0, 201, "another address is another matter");
}

#[test]
fn bearers_without_a_name_are_not_one_principal() {
    let gateway = with_secret().with("limits.principal_streams", "1").start();
    let bearer = |sub: Option<Value>, note: &str| {
        let mut claims = json!({ "note": note, "tidegate": { "subscribe": ["demo"] } });
        sub.into_iter().for_each(|sub| claims["sub"] = sub);
        get("/events/demo").bearer(&token(claims))
    };
    let (one, two) = (bearer(None, "one"), bearer(None, "two"));
    let others = [json!(""), json!(7), json!(8), json!("ann")].map(|sub| bearer(Some(sub), "x"));
    let mut open = vec![];
    for request in [&one, &two].into_iter().chain(&others) {
        open.push(gateway.stream(request.clone()));
        assert_eq!(ask(&gateway, request.clone()), (429, "too_many_streams_of_principal".into()), "{request:?}");
    }
    assert_eq!(ask(&gateway, bearer(Some(json!("7")), "y")).0, 429, "a number is its text");
    let seen = gateway.ask_admin("/debug/streams").json();
    let names: Vec<_> =
        seen["streams"].as_array().unwrap().iter().map(|stream| stream["principal"].to_string()).collect();
    assert!(names[0].starts_with("\"token:") && names[0] != names[1], "{names:?}");
    assert!(names.contains(&"\"sub:7\"".to_owned()), "{names:?}");
}

fn code(answer: &Response) -> String {
    answer.json()["code"].as_str().expect("a problem has a code").to_owned()
}

#[test]
fn every_kind_of_key_verifies_its_own_algorithms_and_no_others() {
    use Algorithm::*;
    for (made, taken) in [
        (RS256, &[RS256, RS384, RS512, PS256, PS384, PS512][..]),
        (ES256, &[ES256]),
        (ES384, &[ES384]),
        (EdDSA, &[EdDSA]),
    ] {
        let pair = KeyPair::make(made);
        let gateway = Launch::new().with("auth.jwt.key_file", pair.public_file().to_str().unwrap()).start();
        for algorithm in taken {
            let token = pair.token_by(*algorithm, Some("any"));
            assert_eq!(ask(&gateway, get("/events/demo").bearer(&token)).0, 200, "{algorithm:?}");
        }
        // The public key, which everybody has, as a secret.
        let pem = pair.public_pem();
        let text = String::from_utf8(pem.clone()).unwrap();
        let der = base64::engine::general_purpose::STANDARD
            .decode(text.lines().filter(|line| !line.starts_with('-')).collect::<String>())
            .unwrap();
        for secret in [&pem[..], text.trim().as_bytes(), &der] {
            for algorithm in [HS256, HS384, HS512] {
                let claims = json!({ "exp": now() + 60, "tidegate": { "subscribe": ["demo"] } });
                let token = forge(json!({ "alg": algorithm }), claims, &EncodingKey::from_secret(secret), algorithm);
                assert_eq!(ask(&gateway, get("/events/demo").bearer(&token)).0, 401, "{made:?} as {algorithm:?}");
            }
        }
    }
    let gateway = with_secret().start();
    for algorithm in [HS256, HS384, HS512] {
        let claims = json!({ "exp": now() + 60, "tidegate": { "subscribe": ["demo"] } });
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        let token = forge(json!({ "alg": algorithm }), claims, &key, algorithm);
        assert_eq!(ask(&gateway, get("/events/demo").bearer(&token)).0, 200, "{algorithm:?}");
    }
}

#[test]
fn the_algorithm_of_a_published_key_narrows_what_it_is_for() {
    let pair = KeyPair::make(Algorithm::RS256);
    let secret = json!({ "kty": "oct", "kid": "secret", "k": URL_SAFE_NO_PAD.encode(SECRET) });
    let for_encryption = {
        let mut jwk = pair.jwk("encryption");
        jwk["use"] = "enc".into();
        jwk
    };
    let unknown = json!({ "kty": "EC", "crv": "secp256k1", "kid": "odd", "x": "AA", "y": "AA" });
    let file = std::env::temp_dir().join(format!("tidegate-jwks-{}.json", std::process::id()));
    fs::write(&file, json!({ "keys": [secret, unknown, for_encryption, pair.jwk("good")] }).to_string()).unwrap();
    let gateway = Launch::new().with("auth.jwt.jwks_file", file.to_str().unwrap()).start();

    let with_secret = {
        let claims = json!({ "exp": now() + 60, "tidegate": { "subscribe": ["demo"] } });
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        forge(json!({ "alg": "HS256", "kid": "secret" }), claims, &key, Algorithm::HS256)
    };
    assert_asked(
        &gateway,
        [
            (get("/events/demo").bearer(&pair.token(Some("good"))), 200, ""),
            (get("/events/demo").bearer(&pair.token(None)), 200, ""),
            (get("/events/demo").bearer(&pair.token_by(Algorithm::PS256, Some("good"))), 401, "invalid_token"),
            (get("/events/demo").bearer(&pair.token(Some("encryption"))), 401, "invalid_token"),
            (get("/events/demo").bearer(&with_secret), 401, "invalid_token"),
        ],
    );
    fs::remove_file(file).unwrap();
}

#[test]
fn what_is_asked_must_be_covered_whole_by_one_allowed_filter() {
    let gateway = with_secret().start();
    let may =
        |filters: &[&str]| token(json!({ "sub": "ann", "tidegate": { "subscribe": filters, "publish": filters } }));
    let one_token = may(&["orders.*", "notes"]);
    let read = |filter: &str, token: &str| get(&format!("/events/{filter}")).bearer(token);
    let publish = |subject: &str, token: &str| post(&format!("/events/{subject}")).bearer(token);
    let all = may(&[">"]);
    let two = may(&["a.b", "a.*.c"]);
    assert_asked(
        &gateway,
        [
            (read("orders.eu", &one_token), 200, ""),
            (read("orders.*", &one_token), 200, ""),
            (get("/events?subject=orders.eu&subject=notes").bearer(&one_token), 200, ""),
            (publish("orders.eu", &one_token), 201, ""),
            (publish("notes", &one_token), 201, ""),
            (read(">", &all), 200, ""),
            (publish("a.b.c", &all), 201, ""),
            (read("a.x.c", &two), 200, ""),
        ],
    );
    let refused = ["orders.>", ">", "*", "*.eu", "*.*", "orders", "orders.eu.x", "orders.*.x", "Orders.eu", "notes.x"];
    assert_asked(&gateway, refused.map(|filter| (read(filter, &one_token), 403, "forbidden")));
    assert_asked(&gateway, ["orders", "orders.eu.x", "notes.x"].map(|s| (publish(s, &one_token), 403, "forbidden")));
    assert_asked(
        &gateway,
        [
            (get("/events?subject=orders.eu&subject=secret").bearer(&one_token), 403, "forbidden"),
            (get("/events?subject=orders.*&subject=%3E").bearer(&one_token), 403, "forbidden"),
            (read("a.*", &two), 403, "forbidden"),
            (read("orders.%3E", &one_token), 403, "forbidden"),
            (publish("orders.eu", &reader(&["orders.*"])), 403, "forbidden"),
            (read("orders.eu", &token(json!({}))), 403, "forbidden"),
            (get("/events/orders.eu"), 401, "unauthenticated"),
            (post("/events/orders.eu"), 401, "unauthenticated"),
            (Request::batch().body("{}"), 401, "unauthenticated"),
            (Request::batch().body("{}").bearer(&reader(&[">"])), 403, "forbidden"),
        ],
    );
}

#[test]
fn a_refusal_is_the_same_whether_the_subject_exists_or_not() {
    let gateway = with_secret().start();
    let writer = token(json!({ "tidegate": { "publish": [">"] } }));
    let stored = gateway.ask(post("/events/there").bearer(&writer)).json()["id"].as_str().unwrap().to_owned();
    let feeds = gateway.metric("tidegate_feeds");
    let answers = ["there", "gone."].map(|subject| {
        let subject = subject.trim_end_matches('.');
        let target = format!("/events/{subject}?from=first");
        let answer = gateway.ask(
            get(&target).bearer(&reader(&["other"])).header("Last-Event-ID", &stored).header("X-Request-Id", "id"),
        );
        answer.text().replace(subject, "SUBJECT")
    });
    assert_eq!(answers[0], answers[1]);
    assert!(!answers[0].contains(&stored));
    let condition = post("/events/there").header("If-None-Match", "*").bearer(&reader(&[">"]));
    assert_eq!(ask(&gateway, condition), (403, "forbidden".into()), "and not 412");
    assert_eq!(gateway.metric("tidegate_feeds"), feeds, "nothing was looked up");
}

#[test]
fn policies_put_claims_into_their_places_and_nowhere_else() {
    let gateway = with_secret()
        .with("auth.policy.subscribe", r#"["users.{sub}.>", "public.>"]"#)
        .with("auth.policy.publish", r#"["inbox.{sub}"]"#)
        .start();
    let of = |sub: Value| token(json!({ "sub": sub, "tidegate": { "subscribe": ["extra"] } }));
    let ann = of(json!("ann"));
    assert_asked(
        &gateway,
        [
            (get("/events/users.ann.>").bearer(&ann), 200, ""),
            (get("/events/users.ann.a.b").bearer(&ann), 200, ""),
            (get("/events/public.x").bearer(&ann), 200, ""),
            (get("/events/extra").bearer(&ann), 200, ""),
            (post("/events/inbox.ann").bearer(&ann), 201, ""),
            (get("/events/users.7.x").bearer(&of(json!(7))), 200, ""),
            (get("/events/users.bob.x").bearer(&ann), 403, "forbidden"),
            (get("/events/users.*.x").bearer(&ann), 403, "forbidden"),
            (get("/events/users.>").bearer(&ann), 403, "forbidden"),
            (post("/events/inbox.bob").bearer(&ann), 403, "forbidden"),
        ],
    );
    let odd = ["", ">", "*", "a.b", "ann.>", "ann.", ".", " ", "a b", "a\r\nX-Evil: 1", "\u{0}", "{sub}", "é", "$SYS"];
    for sub in odd.map(Value::from).into_iter().chain([json!(null), json!(true), json!(1.5)]) {
        let token = of(sub.clone());
        for filter in ["users.>", "users.*.>", "users.a.b.x", "users.a.x", "users.ann.x", ">"] {
            let answer = ask(&gateway, get(&format!("/events/{filter}")).bearer(&token));
            assert_eq!(answer, (403, "forbidden".into()), "{sub} reads {filter}");
        }
        assert_eq!(ask(&gateway, get("/events/public.x").bearer(&token)).0, 200, "{sub} keeps what is for everybody");
    }
}

#[test]
fn tokens_come_by_header_or_cookie_and_different_ones_are_refused() {
    let gateway = with_secret().start();
    let (one, other) = (reader(&["demo"]), reader(&["demo", "other"]));
    let cookie = |value: String| get("/events/demo").header("Cookie", value);
    let ambiguous = "ambiguous_token";
    assert_asked(
        &gateway,
        [
            (get("/events/demo").bearer(&one), 200, ""),
            (get("/events/demo").header("Authorization", format!("bearer {one}")), 200, ""),
            (cookie(format!("tidegate={one}")), 200, ""),
            (cookie(format!("a=b; tidegate={one}; c=d")), 200, ""),
            (cookie(format!("a=b;tidegate=\"{one}\"")), 200, ""),
            (cookie(format!("tidegate={one}")).bearer(&one), 200, ""),
            (cookie(format!("tidegate=; tidegate={one}")), 200, ""),
            (cookie(format!(";;=;===;tidegate;\u{ff}; tidegate={one}")), 200, ""),
            (cookie(format!("tidegate={one}")).header("Cookie", "x=y"), 200, ""),
            (cookie(format!("tidegate={one}")).bearer(&other), 400, ambiguous),
            (cookie(format!("tidegate={one}; tidegate={other}")), 400, ambiguous),
            (cookie(format!("tidegate={one}; tidegate=x")), 400, ambiguous),
            (get("/events/demo").bearer(&one).bearer(&other), 400, ambiguous),
            (cookie("tidegate=".into()), 401, "unauthenticated"),
            (cookie("tidegate".into()), 401, "unauthenticated"),
            (cookie(format!("Tidegate={one}")), 401, "unauthenticated"),
            (cookie(format!("xtidegate={one}")), 401, "unauthenticated"),
            (cookie(format!("tidegate={one}x")), 401, "invalid_token"),
            (cookie("tidegate=%00".into()), 401, "invalid_token"),
            (get("/events/demo").header("Authorization", format!("Basic {one}")), 401, "unauthenticated"),
            (
                get("/events/demo").header("Authorization", "Digest username=\"ann\", realm=\"x\""),
                401,
                "unauthenticated",
            ),
            (cookie(format!("tidegate={one}")).header("Authorization", "Basic YW5uOnNlY3JldA=="), 200, ""),
            (cookie("tidegate=x".into()).header("Authorization", "Basic YW5uOnNlY3JldA=="), 401, "invalid_token"),
            (get("/events/demo").header("Authorization", format!("{one} Bearer")), 401, "invalid_token"),
            (get("/events/demo").header("Authorization", format!(" Bearer  {one}")), 200, ""),
            (get("/events/demo").header("Authorization", "Bearer"), 401, "invalid_token"),
            (get("/events/demo").header("Authorization", "Bearer Basic"), 401, "invalid_token"),
            (get("/events/demo").header("Authorization", &one), 401, "invalid_token"),
            (get("/events/demo").header("Authorization", ""), 401, "invalid_token"),
            (get(&format!("/events/demo?token={one}")), 400, "unknown_parameter"),
            (get(&format!("/events/demo?token={one}")).bearer(&one), 400, "unknown_parameter"),
        ],
    );
    let several = gateway.ask(cookie(format!("tidegate={one}; tidegate={other}")));
    let detail = several.json()["detail"].as_str().expect("a problem has a detail").to_owned();
    assert!(detail.contains("several cookies are named tidegate"), "{detail}");
}

#[test]
fn a_token_in_the_query_counts_only_where_that_is_switched_on() {
    let gateway = with_secret().with("auth.query_token", "true").with("auth.cookie", "__Host-tidegate").start();
    let (one, other) = (reader(&["demo"]), reader(&["demo", "other"]));
    let query = |token: &str| get(&format!("/events/demo?token={token}"));
    assert_asked(
        &gateway,
        [
            (query(&one), 200, ""),
            (query(&one).bearer(&one).header("Cookie", format!("__Host-tidegate={one}")), 200, ""),
            (query(""), 401, "unauthenticated"),
            (query("x"), 401, "invalid_token"),
            (query(&one).bearer(&other), 400, "ambiguous_token"),
            (query(&one).header("Cookie", format!("__Host-tidegate={other}")), 400, "ambiguous_token"),
            (get(&format!("/events/demo?token={one}&token={other}")), 400, "ambiguous_token"),
            (get("/events/demo").header("Cookie", format!("tidegate={one}")), 401, "unauthenticated"),
        ],
    );
}

#[test]
fn anonymous_access_is_a_list_of_filters() {
    let gateway = with_secret().with("auth.anonymous.subscribe", r#"["public.>"]"#).start();
    assert_asked(
        &gateway,
        [
            (get("/events/public.x"), 200, ""),
            (get("/events/public.>"), 200, ""),
            (get("/events/other"), 401, "unauthenticated"),
            (get("/events/>"), 401, "unauthenticated"),
            (post("/events/public.x"), 401, "unauthenticated"),
            (get("/events/public.x").bearer(&token(json!({}))), 403, "forbidden"),
            // The password of the whole site, which nginx in front has looked at.
            (get("/events/public.x").header("Authorization", "Basic YW5uOnNlY3JldA=="), 200, ""),
            (get("/events/other").header("Authorization", "Basic YW5uOnNlY3JldA=="), 401, "unauthenticated"),
        ],
    );
    let answer = gateway.ask("/events/other");
    assert_eq!(answer.header("WWW-Authenticate"), Some("Bearer"));
}

#[test]
fn the_keys_of_two_principals_are_two_and_a_renewed_token_is_the_same_one() {
    for broker in [Backend::embedded(), Backend::nats()] {
        let gateway = broker
            .gateway()
            .with("auth.jwt.secret", SECRET)
            .with("auth.anonymous.publish", r#"["demo"]"#)
            .with("auth.anonymous.subscribe", r#"["demo"]"#)
            .start();
        let publish = |sub: Option<&str>, lifetime: u64, payload: &str| {
            let request = Request::post("/events/demo").header("Idempotency-Key", "guessed").body(payload);
            let bearer =
                |sub| token(json!({ "sub": sub, "exp": now() + lifetime, "tidegate": { "publish": ["demo"] } }));
            let answer = gateway.ask(sub.map_or(request.clone(), |sub| request.bearer(&bearer(sub))));
            assert_eq!(answer.status, 201, "{answer:?}");
            (answer.json()["id"].clone(), answer.json()["duplicate"].clone())
        };

        let mallory = publish(Some("mallory"), 60, "hers");
        let ann = publish(Some("ann"), 60, "anns");
        let anybody = publish(None, 60, "anybodys");

        assert_eq!([&mallory.1, &ann.1, &anybody.1], [false; 3], "nobody's event is taken for another's");
        assert_eq!(publish(Some("ann"), 120, "anns"), (ann.0, json!(true)), "under another token");
        assert_eq!(gateway.stream("/events/demo?from=first").data(3), ["hers", "anns", "anybodys"]);
    }
}

#[test]
fn a_publisher_that_may_not_read_a_subject_is_not_told_its_last_id() {
    let gateway = with_secret().start();
    let rights = |subscribe: &[&str]| token(json!({ "tidegate": { "subscribe": subscribe, "publish": [">"] } }));
    let refused = |subscribe: &[&str]| {
        let token = rights(subscribe);
        let first = post("/events/orders.eu").header("If-None-Match", "*").bearer(&token);
        gateway.ask(first.clone());
        gateway.ask(first).json()
    };
    let of_reader = refused(&["orders.*"]);
    let id = of_reader["last_id"].as_str().expect("who may read it is told");

    for others in [&["orders"][..], &["orders.eu.>", "*"], &[]] {
        let problem = refused(others);
        assert_eq!((&problem["status"], &problem["last_id"]), (&json!(412), &Value::Null), "{problem}");
        assert!(!problem.to_string().contains(id), "{problem}");
    }
}

#[test]
fn each_line_of_a_batch_is_held_against_the_token() {
    let gateway = with_secret().start();
    let token = token(json!({ "exp": now() + 4, "tidegate": { "subscribe": [">"], "publish": ["orders.*"] } }));
    let mut clock = gateway.stream(get("/events/>").bearer(&token));
    let mut batch = gateway.connect();
    batch.send(Request::batch().bearer(&token).chunked());
    let mut answer = |subject: &str, first: bool| {
        batch.send_chunk(format!("{{\"subject\":\"{subject}\",\"data\":1}}\n"));
        if first {
            assert_eq!(batch.head().status, 200);
        }
        serde_json::from_str::<Value>(&batch.line().expect("an answer")).unwrap()
    };

    assert!(answer("orders.eu", true)["id"].is_string());
    let refused = answer("secret", false);
    assert_eq!((&refused["status"], &refused["code"]), (&json!(403), &json!("forbidden")));
    assert!(answer("orders.us", false)["id"].is_string());

    // The stream with the same token ends when that does.
    clock.rest();
    let refused = answer("orders.eu", false);
    assert_eq!((&refused["status"], &refused["code"]), (&json!(401), &json!("invalid_token")));
}

#[test]
fn a_stream_ends_with_its_token_and_goes_on_with_the_next() {
    let gateway = with_secret().with("auth.jwt.expiry_warning", "2s").start();
    let writer = token(json!({ "tidegate": { "publish": [">"] } }));
    let publish = |payload: &str| {
        let answer = gateway.ask(Request::post("/events/demo").body(payload).bearer(&writer));
        answer.json()["id"].as_str().expect("it is stored").to_owned()
    };
    let until = now() + 4;
    let short = token(json!({ "exp": until, "tidegate": { "subscribe": ["demo"] } }));
    let mut stream = gateway.stream(get("/events/demo").bearer(&short));
    let one = publish("one");
    assert_eq!(stream.next(), Event::new(&one, "message", "one"));

    let warning = stream.next();
    assert_eq!((warning.kind.as_str(), &warning.id), ("tidegate.token-expiring", &one), "the position stays");
    let expires: jiff::Timestamp = warning.json()["expires"].as_str().unwrap().parse().unwrap();
    assert_eq!(expires.as_second(), until as i64);
    assert!(now() < until, "the warning comes ahead");

    let two = publish("two");
    assert_eq!(stream.next(), Event::new(&two, "message", "two"), "until the end the stream goes on");
    let rest = stream.rest();
    assert!(now() >= until, "it ends at exp");
    let [.., Signal::Retry(_), Signal::Event(bye)] = &rest[..] else { panic!("{rest:?} has no farewell") };
    assert_eq!((bye.reason("tidegate.bye"), &bye.id), ("token_expired".into(), &two));
    gateway.wait_for_metric("tidegate_streams", 0.0);
    assert!(gateway.ask_admin("/metrics").text().contains(r#"reason="token-expired"} 1"#));

    publish("while away");
    let again =
        get("/events/demo").header("Last-Event-ID", &stream.last_event_id).header("Accept", "text/event-stream");
    assert_eq!(ask(&gateway, again.clone().bearer(&short)), (401, "invalid_token".into()));
    assert_eq!(ask(&gateway, again), (401, "unauthenticated".into()));
    let mut stream =
        gateway.stream(get("/events/demo").header("Last-Event-ID", &stream.last_event_id).bearer(&reader(&["demo"])));
    assert_eq!(stream.next().data, "while away");
}

#[test]
fn a_stream_whose_token_is_about_to_expire_is_warned_at_once() {
    let gateway = with_secret().start();
    let mut stream = gateway
        .stream(get("/events/demo").bearer(&token(json!({ "exp": now() + 3, "tidegate": { "subscribe": ["demo"] } }))));
    assert_eq!(stream.next().kind, "tidegate.token-expiring");
    stream.rest();
}

#[test]
fn a_client_that_does_not_read_is_cut_when_its_token_expires() {
    let gateway = with_secret().start();
    let writer = token(json!({ "tidegate": { "publish": [">"] } }));
    let short = token(json!({ "exp": now() + 4, "tidegate": { "subscribe": ["demo"] } }));
    let stream = EventStream::open(gateway.connect_narrowly(), get("/events/demo").bearer(&short));
    for _ in 0..10 {
        let big = Request::post("/events/demo").body(vec![b'x'; 900_000]).bearer(&writer);
        assert_eq!(gateway.ask(big).status, 201);
    }
    gateway.wait_for_metric("tidegate_streams", 0.0);
    assert!(gateway.ask_admin("/metrics").text().contains(r#"reason="token-expired"} 1"#));
    drop(stream);
}

/// An identity provider whose keys can be changed.
fn provider(keys: Arc<Mutex<Vec<Value>>>) -> impl Fn(&str) -> Page + Send + 'static {
    move |_| Page { headers: vec![], body: json!({ "keys": *keys.lock().unwrap() }).to_string() }
}

fn wait_for(gateway: &Gateway, request: impl Fn() -> Request, status: u16) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask(gateway, request());
        if answer.0 == status {
            return;
        }
        assert!(Instant::now() < deadline, "it is answered {answer:?}, and not {status}");
        std::thread::yield_now();
    }
}

#[test]
fn unknown_kids_do_not_make_a_flood_of_reads() {
    let pair = KeyPair::make(Algorithm::ES256);
    let keys = Arc::new(Mutex::new(vec![pair.jwk("one")]));
    let site = Site::start(provider(keys));
    let gateway = Launch::new()
        .with("auth.jwt.jwks_url", &format!("http://{}/jwks", site.address))
        .with("auth.jwt.jwks_refresh_min", "1h")
        .start();
    assert_eq!(ask(&gateway, get("/events/demo").bearer(&pair.token(Some("one")))).0, 200);
    for number in 0..200 {
        let kid = format!("../../{number}");
        assert_eq!(ask(&gateway, get("/events/demo").bearer(&pair.token(Some(&kid)))).0, 401);
    }
    assert_eq!(site.asked(), 1, "only at the start");
}

#[test]
fn a_new_key_is_found_and_known_ones_outlive_their_endpoint() {
    let (old, new) = (KeyPair::make(Algorithm::ES256), KeyPair::make(Algorithm::ES256));
    let keys = Arc::new(Mutex::new(vec![old.jwk("old")]));
    let site = Site::start(provider(keys.clone()));
    let address = site.address;
    let gateway = Launch::new()
        .with("auth.jwt.jwks_url", &format!("http://{address}/jwks"))
        .with("auth.jwt.jwks_refresh_min", "100ms")
        .start();
    let with = |pair: &KeyPair, kid: &str| get("/events/demo").bearer(&pair.token(Some(kid)));
    assert_eq!(ask(&gateway, with(&old, "old")).0, 200);
    assert_eq!(ask(&gateway, with(&new, "new")).0, 401);

    keys.lock().unwrap().push(new.jwk("new"));
    wait_for(&gateway, || with(&new, "new"), 200);

    drop(site);
    wait_for(&gateway, || with(&new, "unknown"), 503);
    assert_eq!(ask(&gateway, with(&new, "unknown")), (503, "keys_unavailable".into()));
    assert_eq!(ask(&gateway, with(&old, "old")).0, 200);
    assert_eq!(ask(&gateway, with(&new, "new")).0, 200);

    let site = Site::start_at(address, |_| Page { headers: vec![], body: "{}".into() });
    wait_for(&gateway, || with(&new, "unknown"), 503);
    assert_eq!(ask(&gateway, with(&new, "new")).0, 200, "nonsense is no reason to forget");
    drop(site);
}

#[test]
fn a_key_that_is_not_published_any_more_stops_an_open_batch() {
    let (old, new) = (KeyPair::make(Algorithm::ES256), KeyPair::make(Algorithm::ES256));
    let keys = Arc::new(Mutex::new(vec![old.jwk("old")]));
    let site = Site::start(provider(keys.clone()));
    let gateway = Launch::new()
        .with("auth.jwt.jwks_url", &format!("http://{}/jwks", site.address))
        .with("auth.jwt.jwks_refresh_min", "100ms")
        .with("auth.policy.publish", r#"[">"]"#)
        .start();
    let mut batch = gateway.connect();
    batch.send(Request::batch().bearer(&old.token(Some("old"))).chunked());
    batch.send_chunk("{\"subject\":\"a\",\"data\":1}\n");
    assert_eq!(batch.head().status, 200);
    assert!(batch.line().expect("an answer").contains("\"id\""));

    *keys.lock().unwrap() = vec![new.jwk("new")];
    wait_for(&gateway, || get("/events/demo").bearer(&new.token(Some("new"))), 200);

    batch.send_chunk("{\"subject\":\"a\",\"data\":1}\n");
    let refused = batch.line().expect("an answer");
    assert!(refused.contains("invalid_token"), "{refused}");
}

#[test]
fn a_gateway_starts_while_its_provider_is_down() {
    let pair = KeyPair::make(Algorithm::EdDSA);
    let keys = Arc::new(Mutex::new(vec![pair.jwk("one")]));
    let address = support::nats::free_address();
    let gateway = Launch::new()
        .with("auth.jwt.jwks_url", &format!("http://{address}/jwks"))
        .with("auth.jwt.jwks_refresh_min", "100ms")
        .with("auth.anonymous.subscribe", r#"["public"]"#)
        .start();
    let request = || get("/events/demo").bearer(&pair.token(Some("one")));
    assert_eq!(ask(&gateway, request()), (503, "keys_unavailable".into()));
    let told = EventStream::begin(gateway.connect(), request().header("Accept", "text/event-stream")).rest();
    assert_eq!(farewell(&told).reason("tidegate.refused"), "keys_unavailable");
    assert_eq!(ask(&gateway, get("/events/public")).0, 200);

    let _site = Site::start_at(address, provider(keys));
    wait_for(&gateway, request, 200);
}

#[test]
fn an_open_gateway_serves_its_own_machine_only() {
    let gateway = Launch::new().start();
    let refused = |name: &str, value: &str| (get("/events/demo").header(name, value), 403, "open_only_locally");
    assert_asked(
        &gateway,
        [
            refused("X-Forwarded-For", "127.0.0.1"),
            refused("Forwarded", "for=127.0.0.1"),
            refused("X-Real-IP", "127.0.0.1"),
            refused("Via", "1.1 proxy"),
            refused("Host", "evil.example"),
            refused("Host", "localhost.evil.example:8080"),
            refused("Host", "127.0.0.1.nip.io"),
            refused("Host", "10.0.0.1:8080"),
            refused("Origin", "https://evil.example"),
            refused("Origin", "http://localhost.evil.example"),
            refused("Origin", "null"),
            (post("/events/demo").header("Origin", "https://evil.example"), 403, "open_only_locally"),
            (Request::batch().header("X-Forwarded-For", "1.2.3.4"), 403, "open_only_locally"),
            (get("http://evil.example/events/demo"), 403, "open_only_locally"),
            (get("/events/demo").header("Host", "127.0.0.1:8080"), 200, ""),
            (get("/events/demo").header("Host", "[::1]:8080"), 200, ""),
            (get("/events/demo").header("Origin", "http://localhost:5173"), 200, ""),
            (post("/events/demo").header("Origin", "http://127.0.0.1:5173"), 201, ""),
        ],
    );
    let answer = gateway.ask(get("/events/demo").header("X-Forwarded-For", "1.2.3.4"));
    assert!(answer.text().contains("auth.mode = \\\"open\\\""), "it says how to mend it: {answer:?}");

    let open = Launch::new().with("auth.mode", "open").start();
    assert_asked(
        &open,
        [
            (get("/events/demo").header("X-Forwarded-For", "1.2.3.4"), 200, ""),
            (get("/events/demo").header("Host", "events.example"), 200, ""),
            (post("/events/demo").header("Origin", "https://pages.example"), 201, ""),
        ],
    );
}

/// Runs the command to its end, with these settings in its environment.
fn tidegate(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEGATE_")) {
        command.env_remove(name);
    }
    command.args(arguments).envs(settings.iter().copied()).stdin(Stdio::null()).output().expect("the binary runs")
}

#[test]
fn settings_that_would_let_in_too_many_are_refused_at_start() {
    let short = "x".repeat(31);
    let pair = KeyPair::make(Algorithm::ES256);
    let private = pair.private_file();
    for (arguments, settings, said) in [
        (&["--listen", "0.0.0.0:0"][..], vec![], "auth.mode = \"open\""),
        (&["--listen", "[::]:0"], vec![], "auth.mode = \"open\""),
        (&[], vec![("TIDEGATE_AUTH__JWT__SECRET", &*short)], "at least 32 bytes"),
        (
            &[],
            vec![("TIDEGATE_AUTH__JWT__SECRET", SECRET), ("TIDEGATE_AUTH__MODE", "open")],
            "lets everybody do everything",
        ),
        (&[], vec![("TIDEGATE_AUTH__JWT__KEY_FILE", private.to_str().unwrap())], "private key"),
        (&[], vec![("TIDEGATE_AUTH__POLICY__SUBSCRIBE", r#"["a.{sub}"]"#)], "auth.jwt has no key"),
        (
            &[],
            vec![("TIDEGATE_AUTH__JWT__SECRET", SECRET), ("TIDEGATE_AUTH__POLICY__SUBSCRIBE", r#"["a.{sub"]"#)],
            "a brace is opened",
        ),
        (&[], vec![("TIDEGATE_AUTH__KEYS", r#"[{name="a",hash="x"}]"#)], "tidegate key new"),
        (&[], vec![("TIDEGATE_AUTH__ANONYMOUS__SUBSCRIBE", r#"["a..b"]"#)], "may not be empty"),
    ] {
        let arguments = [arguments, &["--admin-listen", "127.0.0.1:0"]].concat();
        let output = tidegate(&arguments, &settings);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{error}");
        assert!(error.contains(said) && error.lines().count() == 1, "{said}: {error}");
        assert!(!error.contains(&short), "{error}");
    }
}

#[test]
fn a_new_key_publishes_what_it_may() {
    let output = tidegate(&["key", "new", "--name", "billing", "--publish", "orders.>"], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    let (key, configuration) = text.split_once('\n').unwrap();
    assert!(key.starts_with("tgk_") && !configuration.contains(key), "{text}");
    let file = std::env::temp_dir().join(format!("tidegate-key-{}.toml", std::process::id()));
    fs::write(&file, configuration).unwrap();

    let gateway = Launch::new().flag("--config", file.to_str().unwrap()).start();
    assert_asked(
        &gateway,
        [
            (post("/events/orders.eu").bearer(key), 201, ""),
            (post("/events/other").bearer(key), 403, "forbidden"),
            (get("/events/orders.eu").bearer(key), 403, "forbidden"),
            (post("/events/orders.eu"), 401, "unauthenticated"),
            (post("/events/orders.eu").bearer(&format!("{key}x")), 401, "invalid_token"),
            (post("/events/orders.eu").bearer(&reader(&[">"])), 401, "invalid_token"),
        ],
    );
    fs::remove_file(file).unwrap();
}

#[test]
fn a_minted_token_is_taken() {
    // Of digits, which a parser of settings would take for a number.
    let secret = ("TIDEGATE_AUTH__JWT__SECRET", "01234567890123456789012345678901234567890");
    let gateway = Launch::new().with("auth.jwt.secret", secret.1).start();
    let mint = |arguments: &[&str]| {
        let output = tidegate(&[&["token"], arguments].concat(), &[secret]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    };
    let token = mint(&["--sub", "ann", "--subscribe", "orders.*", "--publish", "orders.eu", "--expires", "5m"]);
    assert_asked(
        &gateway,
        [
            (get("/events/orders.eu").bearer(&token), 200, ""),
            (post("/events/orders.eu").bearer(&token), 201, ""),
            (post("/events/orders.us").bearer(&token), 403, "forbidden"),
        ],
    );
    let refused = tidegate(&["token", "--sub", "ann"], &[]);
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(78) && error.contains("auth.jwt.secret"), "{error}");
    let refused = tidegate(&["token", "--expires", "30d"], &[secret]);
    assert!(String::from_utf8(refused.stderr).unwrap().contains("auth.jwt.lifetime"));
}

#[test]
fn nothing_that_is_logged_holds_a_token_a_key_a_secret_or_a_payload() {
    let mut gateway = with_secret().with("log.filter", "debug,tidegate=trace").with("auth.query_token", "true").start();
    let good = reader(&["demo"]);
    let bad = format!("{good}x");
    let key = format!("tgk_{}", "k".repeat(43));
    let writer = token(json!({ "sub": "ben", "tidegate": { "publish": ["demo"] } }));
    assert_eq!(gateway.ask(Request::post("/events/demo").body("a payload").bearer(&writer)).status, 201);
    for token in [&good, &bad, &key] {
        ask(&gateway, get("/events/demo").bearer(token));
        ask(&gateway, get("/events/demo").header("Cookie", format!("tidegate={token}")));
        ask(&gateway, get(&format!("/events/demo?token={token}")));
    }
    gateway.terminate();
    let log = gateway.log();
    let signature = good.rsplit_once('.').unwrap().1;
    assert!(log.contains("stream ended"), "{log}");
    for secret in [signature, writer.rsplit_once('.').unwrap().1, &key, SECRET, "a payload"] {
        assert!(!log.contains(secret), "{secret} is in {log}");
    }
}

/// A page that renews its cookie when it is warned, as the README has it; the events themselves are the test's to watch.
const PAGE: &str = r#"<!doctype html><script>
  const Plain = EventSource;
  window.EventSource = class extends Plain {
    constructor(...target) {
      super(...target);
      this.addEventListener("tidegate.token-expiring", () => fetch("/login"));
    }
  };
</script>"#;

#[test]
fn a_browser_whose_token_is_renewed_under_its_stream_misses_nothing() {
    let gateway = with_secret().with("auth.jwt.expiry_warning", "2s").with("sse.retry", "500ms").start();
    let logins = Site::start(|path| {
        let token = token(json!({ "sub": "ann", "exp": now() + 5, "tidegate": { "subscribe": ["demo"] } }));
        let cookie = format!("tidegate={token}; Path=/; HttpOnly; SameSite=Strict");
        let headers = vec![("Content-Type", "text/html".into()), ("Cache-Control", "no-store".into())];
        match path {
            // The browser asks for one by itself.
            "/favicon.ico" => Page { headers, body: String::new() },
            _ => Page { headers: [headers, vec![("Set-Cookie", cookie)]].concat(), body: PAGE.into() },
        }
    });
    let edge = Nginx::origin(logins.address, gateway.address);
    let writer = token(json!({ "tidegate": { "publish": ["demo"] } }));
    let mut published = vec![];
    let mut publish = || {
        let number = published.len().to_string();
        let answer = gateway.ask(Request::post("/events/demo").body(&*number).bearer(&writer));
        assert_eq!(answer.status, 201, "{answer:?}");
        published.push(number);
    };
    let mut browser = Browser::watch(&format!("http://{}", edge.http), "/events/demo", &["tidegate.token-expiring"]);
    browser.wait_for_state("open");

    let (mut seen, mut reopened) = (vec![], 0);
    publish();
    while reopened < 2 {
        let said = browser.next();
        match (said["state"].as_str(), said["event"].as_str()) {
            (Some("open"), _) => reopened += 1,
            // The stream has ended with its token: nobody is there to see this one yet.
            (Some("reconnecting"), _) => publish(),
            (Some(state), _) => panic!("an EventSource that is {state} does not come back"),
            (None, Some("message")) => seen.push(said["data"].clone()),
            // One more while the token still counts, and the next is being fetched.
            (None, _) => publish(),
        }
    }
    publish();
    while seen.last().is_none_or(|data| Some(data) != published.last().map(|last| json!(last)).as_ref()) {
        let event = browser.event();
        if event["event"] == "message" {
            seen.push(event["data"].clone());
        }
    }
    assert!(logins.asked() >= 3, "a login and two renewals");
    assert_eq!(seen, published);
}
