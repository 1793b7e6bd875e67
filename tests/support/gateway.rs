//! A gateway as its users have it: the built binary, in a process of its own, on ports of its own.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    PATIENCE,
    http::{Connection, Request, Response},
    sse::EventStream,
};

/// How much of a log is shown where a test fails. The whole log is in a file.
const TAIL_LINES: usize = 40;
const TAIL_COLUMNS: usize = 500;

/// A gateway that has not started yet.
#[derive(Clone)]
pub struct Launch {
    arguments: Vec<String>,
    settings: Vec<(String, String)>,
    listen: String,
    files: Option<u32>,
}

/// A gateway that serves. Ends with its owner; what it logged is shown if that fails.
pub struct Gateway {
    pub address: SocketAddr,
    pub admin: SocketAddr,
    launch: Launch,
    process: Option<Process>,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    /// On stdout.
    pub said: String,
    /// On stderr.
    pub log: String,
}

struct Process {
    child: Child,
    /// What it says on stdout, line by line. Closed when it ends.
    said: Mutex<Receiver<String>>,
    log: Option<JoinHandle<String>>,
}

impl Launch {
    pub fn new() -> Launch {
        Launch { arguments: vec![], settings: vec![], listen: "127.0.0.1:0".into(), files: None }
    }

    /// With this setting, as in `sse.heartbeat`, passed in the environment.
    pub fn with(mut self, key: &str, value: &str) -> Launch {
        let name = format!("TIDEGATE_{}", key.to_uppercase().replace('.', "__"));
        self.settings.push((name, value.into()));
        self
    }

    /// With this variable in its environment, which is no setting of its own.
    pub fn environment(mut self, name: &str, value: &str) -> Launch {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// With this flag and its value.
    pub fn flag(mut self, flag: &str, value: &str) -> Launch {
        self.arguments.extend([flag.into(), value.into()]);
        self
    }

    /// The same with a subcommand, such as `check`.
    pub fn command(mut self, name: &str) -> Launch {
        self.arguments.push(name.into());
        self
    }

    /// With so many open files at most.
    pub fn with_files(mut self, number: u32) -> Launch {
        self.files = Some(number);
        self
    }

    /// Runs it to its end, which it must come to by itself.
    pub fn run(self) -> Ended {
        let mut process = self.spawn();
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        loop {
            match process.hear(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => said.extend([&*line, "\n"]),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the program does not end:\n{said}{}", process.end()),
            }
        }
        let code = process.child.wait().expect("it was started").code();
        Ended { code, said, log: process.end() }
    }

    /// For clients that connect to this address.
    pub fn at(mut self, address: &str) -> Launch {
        self.listen = format!("{address}:0");
        self
    }

    pub fn start(self) -> Gateway {
        let mut process = self.spawn();
        let addresses = process.greeting().unwrap_or_else(|| {
            panic!("the gateway does not start:\n{}", process.end());
        });
        let mut launch = self;
        launch.listen = addresses.0.to_string();
        Gateway { address: addresses.0, admin: addresses.1, launch, process: Some(process) }
    }

    fn spawn(&self) -> Process {
        let binary = env!("CARGO_BIN_EXE_tidegate");
        let mut command = Command::new(if self.files.is_some() { "sh" } else { binary });
        if let Some(files) = self.files {
            command.args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\""), binary]);
        }
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEGATE_")) {
            command.env_remove(name);
        }
        let mut child = command
            .args(["--listen", &self.listen, "--admin-listen", "127.0.0.1:0"])
            .args(&self.arguments)
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the gateway's binary runs");
        let (lines, said) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let mut stderr = child.stderr.take().expect("stderr is piped");
        let log = std::thread::spawn(move || {
            let mut log = vec![];
            let _ = stderr.read_to_end(&mut log);
            String::from_utf8_lossy(&log).into_owned()
        });
        Process { child, said: Mutex::new(said), log: Some(log) }
    }
}

impl Process {
    /// The two addresses in the first line that it prints, unless it ends before.
    fn greeting(&mut self) -> Option<(SocketAddr, SocketAddr)> {
        let line = match self.hear(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => panic!("the gateway does not say where it listens:\n{}", self.end()),
        };
        let mut addresses = line.split("http://").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_digit() && !".:".contains(c)).unwrap_or(rest.len());
            rest[..end].parse().unwrap_or_else(|_| panic!("no address in {line:?}"))
        });
        Some((addresses.next().expect("the public address"), addresses.next().expect("the admin address")))
    }

    fn hear(&mut self, limit: Duration) -> Result<String, RecvTimeoutError> {
        self.said.get_mut().expect("nobody panics with it").recv_timeout(limit)
    }

    /// Kills it if it lives, and returns what it logged.
    fn end(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.log.take().map(|log| log.join().expect("the log is read to its end")).unwrap_or_default()
    }

    /// Waits until it ends by itself. Its stdout is closed then, which can be waited for with a bound.
    fn exit_status(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            match self.hear(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().expect("it was started"),
                Err(RecvTimeoutError::Timeout) => panic!("the gateway does not end:\n{}", self.end()),
            }
        }
    }
}

impl Gateway {
    /// SIGKILL: it has no chance to say anything.
    pub fn kill(&mut self) {
        self.process().end();
        self.process = None;
    }

    /// SIGTERM: it is to drain.
    pub fn terminate(&mut self) {
        self.signal("TERM");
    }

    /// SIGHUP: it is to read its settings again.
    pub fn hang_up(&mut self) {
        self.signal("HUP");
    }

    /// SIGSTOP: it keeps its connections and does nothing.
    pub fn freeze(&mut self) {
        super::freeze(self.process().child.id());
    }

    pub fn thaw(&mut self) {
        self.signal("CONT");
    }

    fn signal(&mut self, name: &str) {
        super::signal(self.process().child.id(), name);
    }

    /// Waits until it says that it is draining.
    pub fn wait_until_draining(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.ask_admin("/health/ready").text() != "draining\n" {
            assert!(Instant::now() < deadline, "it does not drain");
            std::thread::yield_now();
        }
    }

    /// Waits until the port refuses connections, and a client can go elsewhere.
    pub fn wait_until_it_refuses_connections(&self) {
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(self.address).is_ok() {
            assert!(Instant::now() < deadline, "it goes on to accept");
            std::thread::yield_now();
        }
    }

    /// How it ended, once it has by itself.
    pub fn exit_status(&mut self) -> ExitStatus {
        self.exit_status_within(PATIENCE)
    }

    /// The same, where it may take so long.
    pub fn exit_status_within(&mut self, limit: Duration) -> ExitStatus {
        self.process().exit_status(limit)
    }

    /// What it logged, once it has ended by itself.
    pub fn log(&mut self) -> String {
        self.exit_status();
        self.process().end()
    }

    /// Starts it again after its end, on the same address.
    pub fn restart(&mut self) {
        self.restart_within(PATIENCE);
    }

    /// The same, where what it needs to start may be away for so long.
    pub fn restart_within(&mut self, limit: Duration) {
        self.process = None;
        let deadline = Instant::now() + limit;
        loop {
            let mut process = self.launch.spawn();
            match process.greeting() {
                Some(addresses) => {
                    (self.address, self.admin) = addresses;
                    self.process = Some(process);
                    return;
                }
                // Somebody else's connection may have the port for a moment: it is one that the system gave.
                None if Instant::now() < deadline => {}
                None => panic!("the gateway does not start again:\n{}", process.end()),
            }
        }
    }

    /// A connection to the public listener.
    pub fn connect(&self) -> Connection {
        Connection::open(self.address)
    }

    /// A connection on which a client that does not read is soon noticed.
    pub fn connect_narrowly(&self) -> Connection {
        // Enough for whole segments on loopback: with less, each waits for a delayed acknowledgement.
        Connection::open_narrow(self.address, 128 * 1024)
    }

    /// The answer to one request, on a connection of its own.
    pub fn ask(&self, request: impl Into<Request>) -> Response {
        let mut connection = self.connect();
        connection.send(request);
        connection.response()
    }

    /// A stream, read up to its opening: a status of 200, `retry:` and a position.
    pub fn stream(&self, request: impl Into<Request>) -> EventStream {
        EventStream::open(self.connect(), request)
    }

    /// A stream that resumes after an id.
    pub fn resume(&self, target: &str, last_event_id: &str) -> EventStream {
        self.stream(Request::get(target).header("Last-Event-ID", last_event_id))
    }

    /// Publishes one event, and returns its id.
    pub fn publish(&self, subject: &str, payload: impl Into<Vec<u8>>) -> String {
        let response = self.ask(Request::post(format!("/events/{subject}")).body(payload));
        assert_eq!(response.status, 201, "{response:?}");
        response.json()["id"].as_str().expect("a receipt has an id").to_owned()
    }

    /// Publishes events of one subject in one batch, and returns their ids.
    pub fn publish_all<P: AsRef<str>>(&self, subject: &str, payloads: impl IntoIterator<Item = P>) -> Vec<String> {
        let lines = payloads.into_iter().map(|payload| {
            let line = serde_json::json!({ "subject": subject, "data": payload.as_ref() });
            format!("{line}\n")
        });
        let response = self.ask(Request::batch().body(lines.collect::<String>()));
        assert_eq!(response.status, 200, "{response:?}");
        let id = |answer: &serde_json::Value| answer["id"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
        response.json_lines().iter().map(id).collect()
    }

    /// The sum of a metric over its labels, now.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.ask_admin("/metrics").text();
        let values = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            (series.split('{').next()? == name).then(|| value.parse::<f64>().expect("values are numbers"))
        });
        values.sum()
    }

    /// Asks again and again until a metric has a value.
    pub fn wait_for_metric(&self, name: &str, value: f64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.metric(name);
            if now == value {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {now}, and does not become {value}");
            std::thread::yield_now();
        }
    }

    /// The answer of the admin listener.
    pub fn ask_admin(&self, request: impl Into<Request>) -> Response {
        let mut connection = Connection::open(self.admin);
        connection.send(request);
        connection.response()
    }

    /// What the process has in memory, in bytes.
    pub fn memory_bytes(&mut self) -> usize {
        let pid = self.process().child.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs, on Linux");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        let kilobytes: usize = resident.trim().trim_end_matches(" kB").parse().expect("a number of kB");
        kilobytes * 1024
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the gateway runs")
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let Some(process) = &mut self.process else { return };
        let log = process.end();
        if std::thread::panicking() && !log.is_empty() {
            show_tail(&log);
        }
    }
}

/// Writes a log to a file, and shows its last lines.
fn show_tail(log: &str) {
    let name = format!("tidegate-{}-{:?}.log", std::process::id(), std::thread::current().id());
    let file = std::env::temp_dir().join(name.replace(['(', ')'], ""));
    let file = match fs::write(&file, log) {
        Ok(()) => file.display().to_string(),
        Err(error) => error.to_string(),
    };
    let lines: Vec<_> = log.lines().collect();
    eprintln!("the gateway logged {} lines ({file}), the last of which are:", lines.len());
    for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
        eprintln!("{}", line.chars().take(TAIL_COLUMNS).collect::<String>());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}
