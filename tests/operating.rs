//! A gateway in the hands of its operator: configured, asked, told to change and to end, and with everything that can be
//! wrong around it.

mod support;

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{
    PATIENCE,
    backend::Backend,
    gateway::{Ended, Gateway, Launch},
    http::Request,
    nats::NatsServer,
    sse::{Signal, farewell},
    tokens::{SECRET, token},
};

/// A file of settings that is gone with the test.
struct File(PathBuf);

impl File {
    fn with(text: &str) -> File {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = File(std::env::temp_dir().join(format!("tidegate-operating-{}-{number}.toml", std::process::id())));
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        fs::write(&self.0, text).expect("a file can be written");
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("the name is plain")
    }

    fn launch(&self) -> Launch {
        Launch::new().flag("--config", self.path())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn the_admin_listener_answers_head_and_says_which_methods_it_takes() {
    let gateway = Launch::new().start();
    for target in ["/metrics", "/health/live", "/health/ready", "/debug/streams", "/debug/feeds"] {
        let (get, head) = (gateway.ask_admin(target), gateway.ask_admin(Request::new("HEAD", target)));
        assert_eq!((get.status, head.status), (200, 200), "{target}");
        assert_eq!(head.header("Content-Type"), get.header("Content-Type"), "{target}");
        assert!(head.body.is_empty() && head.header("Content-Length").is_some(), "{head:?}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "QUERY"] {
            let refused = gateway.ask_admin(Request::new(method, target));
            assert_eq!((refused.status, refused.header("Allow")), (405, Some("GET, HEAD")), "{method} {target}");
            assert_eq!(refused.json()["code"], "method_not_allowed");
        }
    }
    assert_eq!(gateway.ask_admin(Request::new("HEAD", "/nowhere")).status, 404);
    assert_eq!(gateway.ask_admin(Request::post("/nowhere")).status, 404);
}

/// The program ends with this code, and one line on stderr that has all these words.
#[track_caller]
fn ends(launch: Launch, code: i32, words: &[&str]) {
    let ended = launch.run();
    assert_eq!(ended.code, Some(code), "{ended:?}");
    let lines: Vec<_> = ended.log.lines().filter(|line| line.starts_with("tidegate: ")).collect();
    assert_eq!(lines.len(), 1, "{ended:?}");
    for words in words {
        assert!(lines[0].contains(words), "{words:?} is not in {:?}", lines[0]);
    }
}

fn line_of<'a>(ended: &'a Ended, key: &str) -> &'a str {
    let line = ended.said.lines().find(|line| line.starts_with(&format!("{key} = ")));
    line.unwrap_or_else(|| panic!("{key} is not there: {ended:?}"))
}

#[test]
fn flags_win_over_the_environment_which_wins_over_the_file() {
    let file = File::with("[sse]\nheartbeat = '1s'\nretry = '1s'\nmax_life = '1s'\n");
    let launch = file.launch().with("sse.retry", "2s").with("sse.max_life", "2s").flag("--set", "sse.max_life=3s");
    let ended = launch.command("config").run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(line_of(&ended, "sse.heartbeat"), format!("sse.heartbeat = \"1s\"  # {}:2", file.path()));
    assert_eq!(line_of(&ended, "sse.retry"), "sse.retry = \"2s\"  # the environment");
    assert_eq!(line_of(&ended, "sse.max_life"), "sse.max_life = \"3s\"  # the flags");
    assert_eq!(line_of(&ended, "sse.write_bytes"), "sse.write_bytes = 65536");
}

#[test]
fn what_config_prints_is_a_file_of_the_same_settings() {
    let file =
        File::with("[sse]\nheartbeat = '1s'\n[[auth.keys]]\nname = 'a'\nhash = 'sha256:00'\npublish = ['a.>']\n");
    let printed = file.launch().command("config").run().said;
    let again = File::with(&printed);
    let values =
        |text: &str| text.lines().map(|line| line.split("  # ").next().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(values(&again.launch().command("config").run().said), values(&printed));
}

#[test]
fn config_hides_what_is_secret() {
    let launch = Launch::new()
        .with("auth.jwt.secret", "correct horse battery staple 32 b")
        .with("nats.url", "nats://gate:horse@one:4222,nats://horsetoken@two");
    let ended = launch.command("config").run();
    assert_eq!(line_of(&ended, "auth.jwt.secret"), "auth.jwt.secret = \"(hidden)\"  # the environment");
    assert!(line_of(&ended, "nats.url").contains("nats://gate:(hidden)@one:4222,nats://(hidden)@two"), "{ended:?}");
    assert!(!ended.said.contains("horse"), "{ended:?}");
}

#[test]
fn neither_config_nor_an_error_shows_a_secret_in_a_url_or_in_place_of_a_hash() {
    let url = "https://gate:horse1@id.example.com/jwks?key=horse2#horse3";
    let keys = "[auth]\nkeys = [{ name = 'a', hash = 'tgk_horse4', publish = ['a.>'] }]\n";
    let file = File::with(keys);
    let shown = file.launch().with("auth.jwt.jwks_url", url).command("config").run();
    assert!(
        line_of(&shown, "auth.jwt.jwks_url").contains("https://gate:(hidden)@id.example.com/jwks?(hidden)"),
        "{shown:?}"
    );
    let line = line_of(&shown, "auth.keys");
    assert!(line.contains("\"a.>\"") && line.contains("(hidden)"), "{line}");
    let wrong = |text: &str| File::with(text).launch().command("check").run();
    let all = [
        shown,
        file.launch().command("check").run(),
        file.launch().run(),
        wrong("[auth]\nkeys = 'tgk_horse'\n"),
        wrong("[auth]\nkeys = ['tgk_horse']\n"),
        wrong("[[auth.keys]]\nname = 'a'\nhash = ['tgk_horse']\n"),
        wrong("[[auth.keys]]\nname = 'a'\nhash = 'tgk_horse'\n"),
        wrong("[auth.jwt]\njwks_url = ['https://horse@a']\n"),
        wrong("[auth.jwt]\njwks_url = 'htps://gate:horse@a/?horse'\n"),
        wrong("[auth.jwt]\nsecret = ['horse']\n"),
        wrong("[nats]\nurl = ['nats://gate:horse@a']\n"),
        Launch::new().with("auth.keys", "tgk_horse").command("check").run(),
        Launch::new().with("auth.jwt.jwks_url", "htps://gate:horse@a").run(),
    ];
    for ended in all {
        assert!(!ended.said.contains("horse") && !ended.log.contains("horse"), "{ended:?}");
    }
}

#[test]
fn what_is_careless_is_told_at_a_start_and_by_check() {
    use std::os::unix::fs::PermissionsExt;
    let secret = "aaaaaaaabbbbbbbbaaaaaaaabbbbbbbb";
    let file = File::with(&format!(
        "[auth.jwt]\nsecret = '{secret}'\njwks_url = 'http://192.0.2.1/jwks'\njwks_timeout = '1ms'\n"
    ));
    let may = |mode| fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).expect("it is ours");
    let told = |launch: Launch| launch.command("check").run().said;
    may(0o606);
    let warnings =
        ["jwks_url begins with http://", "secret is easily guessed", "every user can read it", "every user can write"];
    for said in [told(file.launch()), {
        let mut gateway = file.launch().start();
        gateway.terminate();
        gateway.log()
    }] {
        for warning in warnings {
            assert!(said.contains(warning), "{warning:?} is not in {said}");
        }
        assert!(!said.contains(secret), "{said}");
    }
    may(0o600);
    let said = told(file.launch());
    assert!(!said.contains("every user"), "{said}");
    let plain = File::with("[auth]\nmode = 'local'\n");
    fs::set_permissions(plain.path(), fs::Permissions::from_mode(0o644)).expect("it is ours");
    let said = told(plain.launch());
    assert!(!said.contains("warning"), "{said}");
}

#[test]
fn what_is_printed_may_be_read_in_part() {
    use std::process::{Command, Stdio};
    let binary = env!("CARGO_BIN_EXE_tidegate");
    for arguments in [
        &["key", "new"][..],
        &["config"],
        &["check"],
        &["token", "--set", "auth.jwt.secret=0123456789abcdef0123456789abcdef"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        // Nobody reads it.
        drop(reader);
        let mut command = Command::new(binary);
        let output = command.args(arguments).stdout(writer).stderr(Stdio::piped()).output().expect("it runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !error.contains("panicked"), "{arguments:?}: {error}");
    }
}

#[test]
fn a_storm_of_connections_finds_room_in_the_backlog() {
    let most = fs::read_to_string("/proc/sys/net/core/somaxconn").expect("Linux has it");
    let most: usize = most.trim().parse().expect("a number");
    let mut gateway = Launch::new().with("limits.backlog", "1000000").start();
    gateway.freeze();
    // As many as are kept, none of which is accepted.
    let wanted = most.min(1_000);
    let connections: Vec<_> = (0..wanted).map(|_| gateway.connect()).collect();
    gateway.thaw();
    for mut connection in connections.into_iter().take(200) {
        connection.send("/nowhere");
        assert_eq!(connection.response().status, 404);
    }
    gateway.terminate();
    let log = gateway.log();
    assert!(log.contains("limits.backlog is 1000000") && log.contains("net.core.somaxconn"), "{log}");
}

#[test]
fn an_unknown_setting_is_named_with_its_place_and_the_nearest() {
    let file = File::with("[sse]\n# so often\nhartbeat = '1s'\n");
    ends(file.launch(), 78, &[&format!("{}:3", file.path()), "no setting sse.hartbeat", "did you mean sse.heartbeat?"]);
    let in_environment = Launch::new().with("sse.hartbeat", "1s");
    ends(in_environment, 78, &["TIDEGATE_SSE__HARTBEAT", "did you mean TIDEGATE_SSE__HEARTBEAT?"]);
    ends(Launch::new().flag("--set", "heartbeat=1s"), 78, &["the flags", "did you mean sse.heartbeat?"]);
}

#[test]
fn a_broken_file_is_told_with_its_line() {
    for (text, line, words) in [
        ("[sse\nheartbeat = '1s'\n", ":1", "invalid table header"),
        ("[sse]\nheartbeat = 15\n", ":2", "expected a time such as 15s"),
        ("[sse]\n\nheartbeat = '15'\n", ":3", "expected a time such as 15s"),
        ("[nats.stream]\nreplicas = 'three'\n", ":2", "nats.stream.replicas: invalid type"),
        ("[limits]\nstreams = 'many'\n", ":2", "limits.streams: invalid type"),
        ("[limits]\nstreams = 0\n", ":2", "limits.streams: must be at least 1"),
        ("[auth.jwt]\nsecret = 12345\n", ":2", "auth.jwt.secret: must be a text"),
        ("[[auth.keys]]\nname = 'a'\nhash = 'b'\n[[auth.keys]]\nnam = 'c'\n", ":5", "auth.keys.1.nam: unknown field"),
    ] {
        let file = File::with(text);
        ends(file.launch().command("check"), 78, &[&format!("{}{line}: ", file.path()), words]);
    }
    ends(Launch::new().flag("--config", "/nowhere/tidegate.toml"), 66, &["/nowhere/tidegate.toml can't be read"]);
    let secret = Launch::new().flag("--set", "auth.jwt.secret=12345").run();
    assert!(secret.code == Some(78) && !secret.log.contains("12345"), "{secret:?}");
}

#[test]
fn a_wrong_command_line_ends_with_64() {
    assert_eq!(Launch::new().flag("--lisen", "127.0.0.1:0").run().code, Some(64));
    assert_eq!(Launch::new().flag("--set", "sse.heartbeat").run().code, Some(64));
    assert_eq!(Launch::new().command("--help").run().code, Some(0));
}

#[test]
fn a_file_that_cannot_be_read_ends_with_66() {
    let key = Launch::new().with("auth.jwt.key_file", "/nowhere/key.pem");
    ends(key, 66, &["auth.jwt.key_file: /nowhere/key.pem can't be read"]);
    let credentials =
        Launch::new().flag("--nats", "nats://127.0.0.1:1").with("nats.credentials", "/nowhere/nats.creds");
    ends(credentials, 66, &["/nowhere/nats.creds"]);
}

#[test]
fn a_port_that_is_taken_is_named_and_ends_with_71() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    ends(Launch::new().flag("--set", &format!("listen={address}")), 71, &[&address, "(listen)"]);
}

#[test]
fn nats_that_is_away_ends_with_69_and_a_wrong_password_with_77() {
    ends(Launch::new().flag("--nats", "nats://127.0.0.1:1"), 69, &["127.0.0.1:1 can't be reached"]);
    let server = NatsServer::with("authorization { user: gate, password: right }");
    let url = format!("nats://gate:wrong@{}", server.address());
    ends(Launch::new().flag("--nats", &url), 77, &["refused the user", "mend user:password@"]);
    let shown = Launch::new().flag("--nats", &url).command("check").run();
    assert!(shown.code == Some(77) && !shown.log.contains("wrong"), "{shown:?}");
}

#[test]
fn a_stream_of_somebody_else_is_left_alone_and_ends_with_76() {
    let broker = Backend::nats();
    drop(broker.gateway().with("nats.stream.name", "THEIRS").start());
    ends(broker.gateway(), 76, &["EVENTS could not be made", "subjects overlap", "nats.stream.name"]);
    let check = broker.gateway().command("check");
    ends(check, 76, &["EVENTS could not be made", "subjects overlap", "THEIRS", "nats.stream.name"]);
    let theirs = broker.gateway().with("nats.stream.name", "THEIRS").with("nats.stream.live_prefix", "other.");
    ends(theirs, 76, &["THEIRS does not fit", "nothing was changed"]);
}

#[test]
fn check_says_what_it_finds_and_changes_nothing() {
    let broker = Backend::nats();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let check = || {
        let address = format!("listen={}", taken.local_addr().unwrap());
        let ended = broker.gateway().flag("--set", &address).command("check").run();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.said
    };
    for _ in 0..2 {
        assert!(check().contains("where the stream EVENTS will be made"), "{}", check());
    }
    drop(broker.gateway().start());
    let said = check();
    assert!(
        said.lines().any(|line| line.starts_with("broker: NATS ") && line.contains("stream EVENTS (file")),
        "{said}"
    );
}

#[test]
fn a_hangup_takes_new_keys_and_no_stream_notices() {
    let rights = "[auth.anonymous]\nsubscribe = ['public.>']\npublish = ['public.>']\n";
    let file = File::with(rights);
    let mut gateway = file.launch().start();
    let mut stream = gateway.stream("/events/public.a");
    let publish =
        |gateway: &Gateway, subject: &str| gateway.ask(Request::post(format!("/events/{subject}")).body("x")).status;
    assert_eq!(publish(&gateway, "private.a"), 401);

    file.write("[auth.anonymous]\npublish = ['private.>', 'public.>']\n[limits]\nstreams = 1\n[cors]\norigins = ['https://a.example']\n[sse]\nretry = '9s'\n");
    gateway.hang_up();
    wait_until(|| publish(&gateway, "private.a") == 201);
    let of_page = gateway.ask(Request::get("/events/public.a").header("Origin", "https://a.example"));
    assert_eq!(
        of_page.header("Access-Control-Allow-Credentials"),
        Some("true"),
        "its origin is listed now: {of_page:?}"
    );
    assert!(gateway.ask_admin("/health/ready").text().starts_with("full"), "one stream is all there may be");
    assert_eq!(gateway.metric("tidegate_streams_limit"), 1.0);
    file.write("[auth.anonymous]\npublish = 'nonsense'\n");
    gateway.hang_up();
    assert_eq!(gateway.ask("/events/public.a").status, 401, "what was taken away is gone");
    assert_eq!(publish(&gateway, "public.a"), 201);
    assert_eq!(stream.next().data, "x", "the stream of before is still there");

    gateway.terminate();
    stream.rest();
    let log = gateway.log();
    for words in ["these settings change only with a restart: sse.retry", "could not reload the settings", "nonsense"] {
        assert!(log.contains(words), "{words:?} is not in {log}");
    }
}

#[test]
fn what_is_taken_away_stops_an_open_batch_at_its_next_line() {
    let key = "tgk_of_a_test";
    let hash: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
    let some = format!(
        "[[auth.keys]]\nname = 'one'\nhash = 'sha256:{hash}'\npublish = ['a']\n[auth.policy]\npublish = ['a']\n\
         [auth.anonymous]\npublish = ['a']\n"
    );
    let file = File::with(&some);
    let mut gateway = file.launch().with("auth.jwt.secret", SECRET).start();
    let token = token(json!({ "sub": "ann" }));
    let by = |who: &str, request: Request| match who {
        "" => request,
        bearer => request.bearer(bearer),
    };
    let mut batches = [(key, 401, "invalid_token"), (&token, 403, "forbidden"), ("", 401, "unauthenticated")].map(
        |(who, status, code)| {
            let mut batch = gateway.connect();
            batch.send(by(who, Request::batch().chunked()));
            (batch, status, code)
        },
    );
    let mut answers = |begin: bool| {
        batches.each_mut().map(|(batch, status, code)| {
            batch.send_chunk("{\"subject\":\"a\",\"data\":1}\n");
            if begin {
                assert_eq!(batch.head().status, 200);
            }
            let answer: Value = serde_json::from_str(&batch.line().expect("an answer")).expect("JSON");
            let refused = answer["status"] == json!(*status) && answer["code"] == json!(*code);
            (answer["id"].is_string(), refused, answer)
        })
    };
    let status = |gateway: &Gateway| gateway.ask(Request::post("/events/a").bearer(key).body("x")).status;
    assert!(answers(true).iter().all(|(is_stored, _, _)| *is_stored));

    file.write("[auth.anonymous]\nsubscribe = ['public']\n");
    gateway.hang_up();
    wait_until(|| status(&gateway) == 401);
    let refused = answers(false);
    assert!(refused.iter().all(|(_, is_refused, _)| *is_refused), "{refused:?}");

    file.write(&some);
    gateway.hang_up();
    wait_until(|| status(&gateway) == 201);
    let stored = answers(false);
    assert!(stored.iter().all(|(is_stored, _, _)| *is_stored), "{stored:?}");
}

#[test]
fn a_file_that_lost_its_auth_opens_nothing_at_a_reload() {
    let closed = "[auth.anonymous]\nsubscribe = ['public.>']\n";
    let status = |gateway: &Gateway| gateway.ask(Request::post("/events/private").body("x")).status;
    for text in ["", "\n# [auth]\n", "[limits]\nstreams = 77\n", "[auth]\nmode = 'auto'\n"] {
        let file = File::with(closed);
        let mut gateway = file.launch().start();
        file.write(text);
        gateway.hang_up();
        // What was handed over before the end is judged before it.
        gateway.terminate();
        let log = gateway.log();
        assert!(
            log.contains("could not reload the settings") && log.contains("does not configure authentication"),
            "{log}"
        );
        assert!(!log.contains("reloaded the settings"), "{log}");
    }
    let file = File::with(closed);
    let mut gateway = file.launch().start();
    assert_eq!(status(&gateway), 401);
    file.write("[auth]\nmode = 'local'\n");
    gateway.hang_up();
    wait_until(|| status(&gateway) == 201);
}

#[test]
fn a_file_that_lost_its_auth_opens_nothing_at_a_start() {
    for text in ["", "[sse]\nheartbeat = '5s'\n"] {
        let file = File::with(text);
        ends(file.launch(), 78, &[file.path(), "does not configure authentication", "auth.mode = \"local\""]);
        ends(Launch::new().environment("TIDEGATE_CONFIG", file.path()), 78, &["does not configure authentication"]);
        ends(file.launch().command("check"), 78, &["does not configure authentication"]);
        assert_eq!(file.launch().command("config").run().code, Some(0), "it can still be looked at");
        assert_eq!(file.launch().with("auth.mode", "local").start().ask("/nowhere").status, 404);
    }
}

#[test]
fn a_reload_does_not_take_half_a_file() {
    let keys = |count: usize| {
        let key = |number: usize| {
            let hash = format!("sha256:{number:064x}");
            format!("[[auth.keys]]\nname = 'key-{number}'\nhash = '{hash}'\npublish = ['a.>']\n")
        };
        format!("[limits]\nstreams = {count}\n{}", (0..count).map(key).collect::<String>())
    };
    let file = File::with(&keys(1));
    let mut gateway = file.launch().with("log.filter", "debug").start();
    // As a slow editor writes it, with a signal in between. Each piece but the last is a file of settings, too.
    let text = keys(40);
    let mut written = String::new();
    for piece in text.split_inclusive("publish = ['a.>']\n") {
        written += piece;
        file.write(&written);
        gateway.hang_up();
    }
    gateway.wait_for_metric("tidegate_streams_limit", 40.0);
    gateway.terminate();
    let log = gateway.log();
    let read: Vec<_> = log.lines().filter(|line| line.contains("API keys")).collect();
    assert!(read.iter().all(|line| line.contains(", 40 API keys")), "{log}");
    assert!(!read.is_empty(), "{log}");
}

#[test]
fn a_node_that_leaves_serves_everything_until_it_has_been_noticed() {
    let mut gateway = Launch::new().with("drain.notice", "5s").with("drain.spread", "1ms").start();
    let mut before = gateway.stream("/events/demo");
    let began = Instant::now();
    gateway.terminate();
    gateway.wait_until_draining();
    let mut after = gateway.stream("/events/demo");
    gateway.publish("demo", "still here");
    assert_eq!((before.next().data, after.next().data), ("still here".into(), "still here".into()));
    let mut retries = [&mut before, &mut after].map(|stream| {
        let said = stream.rest();
        assert_eq!(farewell(&said).reason("tidegate.bye"), "draining");
        stream.retry
    });
    retries.sort();
    assert!(retries[0] != retries[1], "each has a retry of its own: {retries:?}");
    assert!(gateway.exit_status().success() && began.elapsed() >= Duration::from_secs(5));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut gateway = Launch::new().with("drain.notice", "10m").start();
    let _stream = gateway.stream("/events/demo");
    gateway.terminate();
    gateway.wait_until_draining();
    gateway.terminate();
    assert_eq!(gateway.exit_status().code(), Some(130));
}

#[test]
fn a_stream_has_a_longest_life_and_goes_on_where_it_was() {
    let gateway = Launch::new().with("sse.max_life", "1s").with("sse.heartbeat", "100ms").start();
    let mut stream = gateway.stream("/events/demo");
    gateway.publish("demo", "one");
    let one = stream.next();
    let said = stream.rest();
    let [.., Signal::Retry(_), Signal::Event(bye)] = &said[..] else { panic!("{said:?} has no farewell") };
    assert_eq!((&*one.data, bye.reason("tidegate.bye"), &bye.id), ("one", "max_life".into(), &one.id));
    assert!(stream.retry.unwrap() <= 400, "it may come back at once: {:?}", stream.retry);
    gateway.publish("demo", "two");
    assert_eq!(gateway.resume("/events/demo", &stream.last_event_id).next().data, "two");
    let metrics = gateway.ask_admin("/metrics").text();
    assert!(metrics.contains("tidegate_streams_ended_total{reason=\"aged\"} 1"), "{metrics}");
}

#[test]
fn a_node_with_few_open_files_refuses_politely_and_recovers() {
    // 64 for itself, 2 for operators, 8 for other connections, 26 streams.
    let mut gateway = Launch::new().with_files(100).start();
    let mut streams: Vec<_> = (0..26).map(|_| gateway.stream("/events/demo")).collect();
    let refused = gateway.ask(Request::get("/events/demo").header("Accept", "text/event-stream"));
    assert_eq!((refused.status, refused.text().contains("\nretry: ")), (200, true), "{refused:?}");
    assert!(refused.text().contains("too_many_streams"), "{refused:?}");
    let ready = gateway.ask_admin("/health/ready");
    assert_eq!((ready.status, ready.text().starts_with("full")), (503, true), "{ready:?}");

    let idle: Vec<_> = (0..60).map(|_| gateway.connect()).collect();
    drop(idle);
    gateway.publish("demo", "for all");
    for stream in &mut streams {
        assert_eq!(stream.next().data, "for all");
    }
    streams.pop();
    gateway.wait_for_metric("tidegate_streams", 25.0);
    streams.push(gateway.stream("/events/demo"));
    drop(streams);
    gateway.wait_for_metric("tidegate_streams", 0.0);
    gateway.terminate();
    let log = gateway.log();
    assert!(log.contains("100 open files") && log.contains("only 26 streams"), "{log}");
}

#[test]
fn a_short_absence_of_nats_takes_no_node_out() {
    let mut server = NatsServer::start();
    let launch = || Launch::new().flag("--nats", &format!("nats://{}", server.address()));
    let (patient, strict) = (launch().start(), launch().with("nats.away_after", "0s").start());
    server.kill();
    wait_until(|| strict.ask_admin("/health/ready").text().starts_with("broker: not connected to NATS for "));
    assert_eq!(patient.ask_admin("/health/ready").status, 200);
    server.resume();
    wait_until(|| strict.ask_admin("/health/ready").status == 200);
}

#[test]
fn a_full_disk_under_nats_refuses_publishes_and_loses_nothing() {
    let server = NatsServer::configured("jetstream { store_dir: store, max_file_store: 400KB }");
    make_stream_without_bounds(&server);
    let gateway = Launch::new().flag("--nats", &format!("nats://{}", server.address())).start();
    let mut stored = vec![];
    let refused = loop {
        let payload = format!("{} {}", stored.len(), "x".repeat(20_000));
        let answer = gateway.ask(Request::post("/events/demo").body(payload.clone()));
        match answer.status {
            201 => stored.push(payload),
            _ => break answer,
        }
        assert!(stored.len() < 100, "the store never fills");
    };
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("broker_refused")), "{refused:?}");
    assert!(stored.len() > 5, "{}", stored.len());
    assert_eq!(gateway.stream("/events/demo?from=first").data(stored.len()), stored);
}

/// What an operator may have made, with room for more than the disk has.
fn make_stream_without_bounds(server: &NatsServer) {
    let definition = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/nats/stream.json")).unwrap();
    let mut definition: serde_json::Value = serde_json::from_str(&definition).unwrap();
    definition["max_bytes"] = (-1).into();
    let answer = server.ask("$JS.API.STREAM.CREATE.EVENTS", &definition.to_string());
    assert!(answer.contains("\"created\""), "{answer}");
}

fn wait_until(so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::yield_now();
    }
}
