//! The examples do what they say, against a gateway on NATS that is killed between their events.

mod support;

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
};

use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    nats::NatsServer,
};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// A subscriber that runs until it is dropped.
struct Subscriber {
    child: Child,
    lines: Receiver<String>,
}

impl Subscriber {
    fn start(mut command: Command) -> Subscriber {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the language is installed (tests/run does it)");
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Subscriber { child, lines }
    }

    fn next(&self) -> String {
        self.lines.recv_timeout(2 * PATIENCE).expect("the subscriber prints the event")
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Publishes, subscribes, and has the gateway killed in between.
fn run(program: &[&str], publish: &str, subscribe: &str) {
    let server = NatsServer::start();
    let launch = || Launch::new().flag("--nats", &format!("nats://{}", server.address())).with("sse.retry", "50ms");
    let mut gateway: Gateway = launch().start();
    let url = format!("http://{}", gateway.address);
    let command = |script: &str, arguments: &[&str]| {
        let script = examples().join(script);
        let script = script.to_str().expect("a path is text");
        let words: Vec<_> = program.iter().copied().chain([script]).chain(arguments.iter().copied()).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("TIDEGATE_URL", &url).current_dir(examples());
        command
    };
    let published = |data: &str| {
        let output = command(publish, &["orders.eu", data]).output().expect("the publisher runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("an id is text").trim().to_owned()
    };

    let first = published(r#"{"n":1}"#);
    assert!(first.ends_with("-1"), "{first} is the first event's id");
    let subscriber = Subscriber::start(command(subscribe, &["orders.>"]));
    assert_eq!(subscriber.next(), r#"{"n":1}"#);
    published("two words");
    assert_eq!(subscriber.next(), "two words");

    gateway.restart();
    published("three ☃");
    assert_eq!(subscriber.next(), "three ☃", "nothing is missed, nothing comes twice");
}

#[test]
fn python() {
    run(&["python3"], "python/publish.py", "python/subscribe.py");
}

#[test]
fn node() {
    run(&["node"], "node/publish.mjs", "node/subscribe.mjs");
}

#[test]
fn php() {
    run(&["php"], "php/publish.php", "php/subscribe.php");
}

#[test]
fn bash() {
    run(&["bash"], "bash/publish.sh", "bash/subscribe.sh");
}

/// Built first: `go run` leaves its child alone when it is killed.
#[test]
fn go() {
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-examples");
    std::fs::create_dir_all(&built).unwrap();
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&built).arg("./...").current_dir(examples().join("go"));
    assert!(build.status().expect("Go is installed").success());
    let program = |name: &str| built.join(name).to_str().unwrap().to_owned();
    run(&[], &program("publish"), &program("subscribe"));
}
