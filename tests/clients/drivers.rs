//! The clients, and the programs that run them: one for each runtime, which carries all streams of its clients. A program
//! is told by lines on its standard input, and tells by lines on its standard output:
//!
//! ```text
//! {"open":"7","client":"httpx-sse","url":"..","page":"..","certificate":".."}    {"close":"7"}
//! {"ready":".."}    {"of":"7","event":{"type","id","data"}}    {"of":"7","error":".."}    {"of":"7","end":".."}
//! ```
//!
//! An error is told for the record. After an end the client has given up.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// A client that users have, set up as its documentation says, or as `docs/src/clients.md` does.
#[derive(Debug, PartialEq, Eq)]
pub struct Client {
    pub name: &'static str,
    program: Program,
    /// What its program calls it.
    called: &'static str,
    /// A browser's page is one of the stream's origin.
    pub same_origin: bool,
    /// Speaks HTTP/2 over TLS.
    pub http2: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Program {
    Chromium,
    Firefox,
    Node,
    Python,
    Go,
    Rust,
    Java,
    Curl,
}

pub const CLIENTS: &[Client] = &[
    client("Chromium", Program::Chromium, "native").with_http2(),
    client("Chromium, same origin", Program::Chromium, "native").on_its_origin().with_http2(),
    client("Firefox", Program::Firefox, "native").with_http2(),
    client("Firefox, same origin", Program::Firefox, "native").on_its_origin().with_http2(),
    client("fetch-event-source once", Program::Chromium, "fetch-event-source once").with_http2(),
    client("fetch-event-source", Program::Chromium, "fetch-event-source").with_http2(),
    client("reconnecting-eventsource", Program::Chromium, "reconnecting-eventsource").with_http2(),
    client("reconnecting-eventsource in Firefox", Program::Firefox, "reconnecting-eventsource").with_http2(),
    client("eventsource", Program::Node, "eventsource"),
    client("eventsource-client", Program::Node, "eventsource-client"),
    client("eventsource-parser", Program::Node, "eventsource-parser"),
    client("undici", Program::Node, "undici"),
    client("event-source-polyfill", Program::Node, "event-source-polyfill"),
    client("httpx-sse", Program::Python, "httpx-sse").with_http2(),
    client("sseclient-py over httpx", Program::Python, "sseclient-py over httpx").with_http2(),
    client("sseclient-py over requests", Program::Python, "sseclient-py over requests"),
    client("sseclient-py over urllib3", Program::Python, "sseclient-py over urllib3"),
    client("requests", Program::Python, "requests"),
    client("requests-sse", Program::Python, "requests-sse"),
    client("aiohttp-sse-client2 once", Program::Python, "aiohttp-sse-client2 once"),
    client("aiohttp-sse-client2", Program::Python, "aiohttp-sse-client2"),
    client("r3labs/sse once", Program::Go, "r3labs/sse once").with_http2(),
    client("r3labs/sse", Program::Go, "r3labs/sse").with_http2(),
    client("tmaxmax/go-sse", Program::Go, "tmaxmax/go-sse").with_http2(),
    client("launchdarkly/eventsource", Program::Go, "launchdarkly/eventsource").with_http2(),
    client("reqwest-eventsource", Program::Rust, "reqwest-eventsource"),
    client("eventsource-client in Rust", Program::Rust, "eventsource-client in Rust"),
    client("okhttp-eventsource", Program::Java, "okhttp-eventsource"),
    client("okhttp-sse", Program::Java, "okhttp-sse"),
    client("curl", Program::Curl, "").with_http2(),
];

const fn client(name: &'static str, program: Program, called: &'static str) -> Client {
    Client { name, program, called, same_origin: false, http2: false }
}

impl Client {
    const fn with_http2(mut self) -> Client {
        self.http2 = true;
        self
    }

    const fn on_its_origin(mut self) -> Client {
        self.same_origin = true;
        self
    }

    /// Whether its runtime is here. All are, where `tests/install` has run, but for those of Go and Java, which it does not
    /// bring. On CI there must be a Go.
    pub fn is_here(&self) -> bool {
        static GO: LazyLock<bool> = LazyLock::new(|| {
            let found =
                Command::new("go").arg("version").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
            assert!(found || std::env::var_os("CI").is_none(), "there is no Go toolchain");
            found || left_out("Go")
        });
        static JAVA: LazyLock<bool> = LazyLock::new(|| tools().join("java").is_dir() || left_out("Java"));
        match self.program {
            Program::Go => *GO,
            Program::Java => *JAVA,
            _ => true,
        }
    }

    /// Begins to read the stream at `url`, with TLS where there is a certificate.
    pub fn open(&'static self, url: &str, certificate: Option<&Path>) -> Reader {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let of = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
        BOARD.seen.lock().unwrap().insert(of.clone(), Seen::default());
        if self.program == Program::Curl {
            return Reader { client: self, of: of.clone(), curl: Some(run_curl(of, url, certificate)) };
        }
        let origin = url.split_inclusive('/').take(3).collect::<String>();
        running(self.program).tell(&json!({
            "open": of,
            "client": self.called,
            "url": url,
            "page": self.same_origin.then(|| format!("{origin}page")),
            "certificate": certificate,
        }));
        Reader { client: self, of, curl: None }
    }
}

/// What a client has told of one stream.
#[derive(Clone, Default, Debug)]
pub struct Seen {
    pub events: Vec<Event>,
    pub errors: Vec<String>,
    /// Why it gave up.
    pub end: Option<String>,
}

impl Seen {
    pub fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// How many events of this type.
    pub fn count(&self, kind: &str) -> usize {
        self.events.iter().filter(|event| event.kind == kind).count()
    }
}

#[derive(Clone, Debug)]
pub struct Event {
    pub kind: String,
    pub data: String,
}

impl Event {
    /// One of the gateway's own, and nobody's who listens to messages.
    pub fn is_reserved(&self) -> bool {
        self.kind.starts_with("tidegate.")
    }
}

/// What all clients have told, by stream.
static BOARD: Board = Board { seen: LazyLock::new(Mutex::default), changed: Condvar::new() };

struct Board {
    seen: LazyLock<Mutex<HashMap<String, Seen>>>,
    changed: Condvar,
}

impl Board {
    fn note(&self, of: &str, line: &mut Value) {
        let mut seen = self.seen.lock().unwrap();
        // What comes after the close is of no interest.
        let Some(seen) = seen.get_mut(of) else { return };
        if let Some(event) = line.get_mut("event") {
            let mut text = |name: &str| match event[name].take() {
                Value::String(text) => text,
                _ => String::new(),
            };
            seen.events.push(Event { kind: text("type"), data: text("data") });
        } else if let Some(error) = line["error"].as_str() {
            seen.errors.push(error.into());
        } else if let Some(end) = line["end"].as_str() {
            seen.end.get_or_insert_with(|| end.into());
        }
        self.changed.notify_all();
    }
}

/// Waits until something is so, looking again whenever a client has told something, and now and then. Whether it came to
/// be so within the limit.
pub fn wait_until(limit: Duration, mut so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !so() {
        if Instant::now() > deadline {
            return false;
        }
        let seen = BOARD.seen.lock().unwrap();
        drop(BOARD.changed.wait_timeout(seen, Duration::from_millis(20)).unwrap());
    }
    true
}

/// One stream that a client reads. Closes it at its end.
pub struct Reader {
    pub client: &'static Client,
    of: String,
    curl: Option<Child>,
}

impl Reader {
    pub fn look<T>(&self, at: impl FnOnce(&Seen) -> T) -> T {
        at(&BOARD.seen.lock().unwrap()[&self.of])
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        match &mut self.curl {
            Some(curl) => {
                drop(curl.stdin.take());
                let _ = curl.wait();
            }
            None => running(self.client.program).tell(&json!({ "close": self.of })),
        }
        BOARD.seen.lock().unwrap().remove(&self.of);
    }
}

/// A program that runs. Ends when the test program does, because its standard input does.
struct Running {
    program: Program,
    stdin: Mutex<ChildStdin>,
}

impl Running {
    fn tell(&self, order: &Value) {
        let mut stdin = self.stdin.lock().unwrap();
        let told = writeln!(stdin, "{order}");
        assert!(told.is_ok() || std::thread::panicking(), "the program of {:?} has ended", self.program);
    }
}

/// The program, which starts with the first stream of one of its clients.
fn running(program: Program) -> Arc<Running> {
    static ALL: LazyLock<Mutex<HashMap<Program, Arc<Running>>>> = LazyLock::new(Mutex::default);
    let mut all = ALL.lock().unwrap();
    all.entry(program).or_insert_with(|| Arc::new(start(program))).clone()
}

fn start(program: Program) -> Running {
    // Libraries log each end of a stream; for whom looks for it, here it is.
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("clients-{program:?}.log"));
    let log = File::create(log).expect("a file can be made");
    let mut child = command(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{program:?}: {error} (tests/install brings what is needed)"));
    let stdin = Mutex::new(child.stdin.take().expect("stdin is piped"));
    let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            let Ok(mut line) = serde_json::from_str::<Value>(&line) else { panic!("{program:?} says {line:?}") };
            if line.get("ready").is_some() {
                let _ = ready.send(());
            } else if let Some(of) = line["of"].as_str().map(str::to_owned) {
                BOARD.note(&of, &mut line);
            } else {
                eprintln!("{program:?}: {line}");
            }
        }
        let _ = child.wait();
    });
    is_ready.recv_timeout(START).unwrap_or_else(|_| panic!("{program:?} does not start"));
    Running { program, stdin }
}

/// How long a program may take to start: a browser on a busy machine, or one that is compiled first.
const START: Duration = Duration::from_secs(120);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn left_out(language: &str) -> bool {
    eprintln!("{language} is not installed, and its clients are left out");
    false
}

/// Where `tests/install` puts what these tests alone need.
fn tools() -> PathBuf {
    root().join("target/tools/clients")
}

fn here(file: &str) -> PathBuf {
    root().join("tests/clients").join(file)
}

/// Node itself comes from npm, too: the newest clients need a newer one than a distribution has.
pub fn node() -> Command {
    let modules = tools().join("node_modules");
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "x64" };
    let mut command = Command::new(modules.join(format!("node-linux-{architecture}/bin/node")));
    command.env("NODE_PATH", modules);
    command
}

fn command(program: Program) -> Command {
    match program {
        Program::Chromium | Program::Firefox => {
            let mut command = node();
            command.arg(here("browser.mjs")).arg(if program == Program::Firefox { "firefox" } else { "chromium" });
            command
        }
        Program::Node => {
            let mut command = node();
            command.arg(here("node.mjs"));
            command
        }
        Program::Python => {
            let mut command = Command::new(tools().join("python/bin/python"));
            command.arg(here("python.py"));
            command
        }
        // Both are built from what is there now; only the first time takes long.
        Program::Go => {
            let binary = tools().join("go-clients");
            build(Command::new("go").args(["build", "-o"]).arg(&binary).arg(".").current_dir(here("go")));
            Command::new(binary)
        }
        Program::Rust => {
            let target = tools().join("rust");
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let mut build_it = Command::new(cargo);
            // Not as cargo has it for the tests themselves.
            for (name, _) in
                std::env::vars().filter(|(name, _)| name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR")
            {
                build_it.env_remove(name);
            }
            build(
                build_it.args(["build", "--quiet", "--locked", "--target-dir"]).arg(&target).current_dir(here("rust")),
            );
            Command::new(target.join("debug/clients"))
        }
        Program::Java => {
            let mut command = Command::new("java");
            command.arg("-cp").arg(tools().join("java/*")).arg(here("java/Clients.java"));
            command
        }
        Program::Curl => unreachable!("curl has a process for each stream"),
    }
}

fn build(command: &mut Command) {
    let built = command.status().expect("a compiler is installed");
    assert!(built.success(), "{command:?} fails");
}

/// A shell with a script that asks with curl, again and again. Both end when the shell's standard input does.
fn run_curl(of: String, url: &str, certificate: Option<&Path>) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "\"$@\" & cat; kill 0", "sh"]).arg(here("curl.sh")).arg(url);
    if let Some(certificate) = certificate {
        command.args(["--http2", "--cacert"]).arg(certificate);
    }
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).spawn().expect("there is a shell");
    let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
    std::thread::spawn(move || {
        let mut next = || {
            let mut text = vec![];
            stdout.read_until(0, &mut text).ok().filter(|_| text.pop() == Some(0))?;
            Some(String::from_utf8_lossy(&text).into_owned())
        };
        while let (Some(kind), Some(id), Some(data)) = (next(), next(), next()) {
            BOARD.note(&of, &mut json!({ "event": { "type": kind, "id": id, "data": data } }));
        }
    });
    child
}
