//! `tests/stack`, the whole of Tidegate in one command: it serves, and leaves nothing behind, however it ends.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use support::{PATIENCE, http::Connection};

/// Seven processes start one after the other, and may wait so long for each.
const START: Duration = Duration::from_secs(90);

struct Stack {
    child: Child,
    lines: Receiver<String>,
    /// All that it has said so far.
    said: Vec<String>,
    directory: PathBuf,
}

impl Stack {
    fn start(name: &str, arguments: &[&str]) -> Stack {
        let directory = directory_of(name);
        let mut child = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stack"))
            .args(arguments)
            .arg("--directory")
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("there is a python3");
        let (line, lines) = channel();
        let out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let err = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let other = line.clone();
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        std::thread::spawn(move || err.lines().map_while(Result::ok).try_for_each(|text| other.send(text)));
        Stack { child, lines, said: vec![], directory }
    }

    /// Waits for a line with these words.
    fn wait_for(&mut self, words: &str) {
        let deadline = Instant::now() + START;
        while !self.said.last().is_some_and(|line| line.contains(words)) {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.said.push(line),
                Err(error) => panic!("{words:?} is not said ({error}): {:#?}", self.said),
            }
        }
    }

    /// Reads what it says up to its end, and how it ended.
    fn end(&mut self) -> Option<i32> {
        let deadline = Instant::now() + START;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.said.push(line);
        }
        self.child.wait().expect("it was started").code()
    }

    fn signal(&self, name: &str) {
        signal(name, self.child.id());
    }

    /// The line that was last said about this part.
    fn line_of(&self, part: &str) -> &str {
        let line = self.said.iter().rev().find(|line| line.starts_with(part) && line.contains(" pid "));
        line.unwrap_or_else(|| panic!("nothing of {part}: {:#?}", self.said))
    }

    fn pid_of(&self, part: &str) -> u32 {
        self.line_of(part).split_whitespace().skip_while(|word| *word != "pid").nth(1).expect("a pid").parse().unwrap()
    }

    fn pids(&self) -> Vec<u32> {
        let pid = |line: &String| line.split_once(" pid ")?.1.split(' ').next()?.parse().ok();
        self.said.iter().filter_map(pid).collect()
    }

    /// What is after this scheme in the line of a part.
    fn address_of(&self, part: &str, scheme: &str) -> String {
        let line = self.line_of(part);
        let rest = line.split(scheme).nth(1).unwrap_or_else(|| panic!("no {scheme} in {line:?}"));
        rest.split([' ', '/']).next().expect("a text has a first part").to_owned()
    }

    /// curl over TLS, to the nginx of this stack.
    fn curl(&self, arguments: &[&str], target: &str) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "10", "--cacert"])
            .arg(self.directory.join("nginx/tls/localhost.crt"))
            .args(arguments)
            .arg(format!("https://{}{target}", self.address_of("nginx", "https://")));
        curl
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // Only if the test has failed does it still run; its parts end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn one_command_serves_over_tls_is_seen_by_prometheus_and_ends_with_ctrl_c() {
    let mut stack = Stack::start("whole", &["--free-ports", "--gateway", env!("CARGO_BIN_EXE_tidegate")]);
    stack.wait_for("ready");

    let published = stack.curl(&["-d", "hello"], "/events/demo").output().expect("curl is installed");
    assert!(String::from_utf8_lossy(&published.stdout).contains("\"id\""), "{published:?}");
    let mut reading = stack.curl(&["-N"], "/events/demo?from=first").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(reading.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line == "data: hello"));
    let prometheus: SocketAddr = stack.address_of("prometheus", "http://").parse().unwrap();
    wait_until(|| gateways_up(prometheus) == 2);

    stack.signal("INT");
    assert_eq!(stack.end(), Some(0), "{:#?}", stack.said);
    assert_eq!(stack.pids().len(), 7, "{:#?}", stack.said);
    assert_eq!(living(&stack.pids()), [0; 0]);
    let _ = reading.wait();
}

#[test]
fn what_ends_is_started_again_and_nothing_outlives_a_killed_stack() {
    let mut stack = Stack::start("killed", &["--free-ports", "--gateway", env!("CARGO_BIN_EXE_tidegate")]);
    stack.wait_for("ready");

    let killed = stack.pid_of("gateway-1");
    signal("KILL", killed);
    stack.wait_for("gateway-1 ended (SIGKILL)");
    stack.wait_for("started again");
    assert_ne!(stack.pid_of("gateway-1"), killed);

    stack.signal("KILL");
    stack.end();
    wait_until(|| living(&stack.pids()).is_empty());
}

#[test]
fn a_start_that_fails_half_way_leaves_nothing_behind() {
    let mut stack = Stack::start("half", &["--free-ports", "--gateway", "/bin/false"]);
    assert_eq!(stack.end(), Some(1));
    assert!(stack.said.last().unwrap().contains("gateway-1 ended (exit code 1)"), "{:#?}", stack.said);
    assert_eq!(stack.pids().len(), 3, "three of NATS had started");
    assert_eq!(living(&stack.pids()), [0; 0]);
}

#[test]
fn a_port_that_is_taken_is_named_and_nothing_starts() {
    // If it can't be had, somebody else has taken it, which is as good.
    let _taken = TcpListener::bind("127.0.0.1:8443");
    let mut stack = Stack::start("taken", &["--gateway", env!("CARGO_BIN_EXE_tidegate")]);
    assert_eq!(stack.end(), Some(1));
    assert_eq!(stack.said.len(), 1, "{:#?}", stack.said);
    assert!(stack.said[0].contains("127.0.0.1:8443 (https)") && stack.said[0].contains("taken"), "{:#?}", stack.said);
}

#[test]
fn a_directory_of_somebody_else_is_not_emptied() {
    let directory = directory_of("foreign");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("mine"), "keep").unwrap();
    let mut stack = Stack::start("foreign", &["--free-ports", "--gateway", "/bin/false"]);
    assert_eq!(stack.end(), Some(1));
    assert!(stack.said[0].contains("not empty"), "{:#?}", stack.said);
    assert!(directory.join("mine").exists());
}

fn directory_of(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("tidegate-stack-{}-{name}", std::process::id()))
}

/// How many gateways Prometheus has found to be up.
fn gateways_up(prometheus: SocketAddr) -> usize {
    let mut connection = Connection::open(prometheus);
    connection.send("/api/v1/query?query=up");
    let answer = connection.response().json();
    let results = answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{answer}")).clone();
    results.iter().filter(|result| result["metric"]["job"] == "tidegate" && result["value"][1] == "1").count()
}

/// The processes of these groups that live: each part of the stack leads one, and nginx has workers.
fn living(groups: &[u32]) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("this is Linux").filter_map(|entry| {
        let stat = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        // pid (command) state parent group ...
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let group = fields[2].parse().ok()?;
        (fields[0] != "Z" && groups.contains(&group)).then(|| stat.split(' ').next()?.parse().ok())?
    });
    processes.collect()
}

fn signal(name: &str, pid: u32) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.expect("there is a kill").success(), "SIG{name} could not be sent");
}

fn wait_until(so: impl Fn() -> bool) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::yield_now();
    }
}
