//! Real nats-servers for tests: started on a free port of the loopback, with a store of their own, killed when dropped.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU16, AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use tidegate::config::{self, Config};

/// How long a server may take to start.
const START: Duration = Duration::from_secs(20);

pub struct NatsServer {
    child: Child,
    port: u16,
    directory: PathBuf,
    binary: PathBuf,
    arguments: Vec<String>,
}

impl NatsServer {
    /// With JetStream, open to everyone on this machine.
    pub fn start() -> NatsServer {
        NatsServer::with("")
    }

    /// With JetStream and more configuration.
    pub fn with(configuration: &str) -> NatsServer {
        NatsServer::configured(&format!("jetstream {{ store_dir: store }}\n{configuration}"))
    }

    /// With this configuration and no other, but for the port. A relative `store_dir` is in a directory of its own.
    pub fn configured(configuration: &str) -> NatsServer {
        NatsServer::launch(binary(), configuration)
    }

    fn launch(binary: PathBuf, configuration: &str) -> NatsServer {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("tidegate-nats-{}-{number}", std::process::id()));
        let file = directory.join("nats-server.conf");
        fs::create_dir_all(&directory).unwrap();
        fs::write(&file, configuration).unwrap();
        let port = free_address().port();
        let arguments =
            ["-c", "nats-server.conf", "-a", "127.0.0.1", "-p", &port.to_string()].map(String::from).to_vec();
        let child = run(&binary, &arguments, &directory);
        NatsServer { child, port, directory, binary, arguments }
    }

    /// Kills the server as a crash would, and starts it again on the same port with what it had stored.
    pub fn restart(&mut self) {
        self.kill();
        self.resume();
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts a server that was killed.
    pub fn resume(&mut self) {
        self.child = run(&self.binary, &self.arguments, &self.directory);
    }

    /// Stops the server's time: it keeps its connections and answers nothing.
    pub fn freeze(&self) {
        super::freeze(self.child.id());
    }

    pub fn thaw(&self) {
        super::signal(self.child.id(), "CONT");
    }

    /// Puts a copy of its store aside. It must have been killed.
    pub fn back_up(&self) {
        self.copy("store", "backup");
    }

    /// Puts the copy back in the place of its store. It must have been killed.
    pub fn restore(&self) {
        self.copy("backup", "store");
    }

    /// Forgets everything that is stored, as a new disk has. The server is not running meanwhile.
    pub fn wipe(&self) {
        fs::remove_dir_all(self.directory.join("store")).unwrap();
    }

    fn copy(&self, from: &str, to: &str) {
        let [from, to] = [from, to].map(|name| self.directory.join(name));
        let _ = fs::remove_dir_all(&to);
        let copied = Command::new("cp").args([&"-a".into(), &from.into_os_string(), &to.into_os_string()]).status();
        assert!(copied.expect("there is cp").success());
    }

    /// Has it take over another configuration, beside that of JetStream, while it runs.
    pub fn reconfigure(&self, configuration: &str) {
        let configuration = format!("jetstream {{ store_dir: store }}\n{configuration}");
        fs::write(self.directory.join("nats-server.conf"), configuration).unwrap();
        super::signal(self.child.id(), "HUP");
    }

    /// Has it ask its clients to go elsewhere, as before it is stopped for maintenance.
    pub fn go_lame(&self) {
        super::signal(self.child.id(), "USR2");
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its answer to one request, on a connection of its own.
    pub fn ask(&self, subject: &str, request: &str) -> String {
        self.try_ask(subject, request, START).expect("a server answers")
    }

    /// The same, if there is one in this time.
    pub fn try_ask(&self, subject: &str, request: &str, limit: Duration) -> Option<String> {
        let nats = BufReader::new(TcpStream::connect(self.address()).unwrap());
        nats.get_ref().set_read_timeout(Some(limit)).unwrap();
        let request =
            format!("CONNECT {{}}\r\nSUB answer 1\r\nPUB {subject} answer {}\r\n{request}\r\n", request.len());
        nats.get_ref().write_all(request.as_bytes()).unwrap();
        nats.lines().map_while(Result::ok).find(|line| line.starts_with('{'))
    }

    /// The settings of a gateway on this server.
    pub fn settings(&self) -> config::Nats {
        self.settings_as("")
    }

    /// The same as a user: `user:password@`.
    pub fn settings_as(&self, user: &str) -> config::Nats {
        Config::load(None, vec![("nats.url", format!("nats://{user}{}", self.address()))]).unwrap().nats
    }
}

/// Three servers that are one: a stream with three replicas outlives any one of them. Open to everyone on this machine.
pub struct Cluster {
    pub nodes: [NatsServer; 3],
}

impl Cluster {
    /// Starts the servers. They have yet to find each other and to elect the one that decides on streams. Clients are not told
    /// of the other servers: they know those that they shall know.
    pub fn start() -> Cluster {
        Cluster::with("no_advertise: true", "")
    }

    /// The same with these settings of its nodes, within `cluster` and beside it.
    pub fn with(within: &str, beside: &str) -> Cluster {
        let routes = [0; 3].map(|_| free_address().port());
        let urls = routes.map(|port| format!("\"nats-route://127.0.0.1:{port}\"")).join(", ");
        let nodes = std::array::from_fn(|n| {
            NatsServer::with(&format!(
                "server_name: node-{n}\n{beside}\n\
                 cluster {{ name: tide, listen: \"127.0.0.1:{}\", routes: [{urls}]\n{within} }}",
                routes[n]
            ))
        });
        Cluster { nodes }
    }

    /// The node that calls itself so, as in a stream's `cluster.leader`.
    pub fn named(&mut self, name: &str) -> Option<&mut NatsServer> {
        let number: usize = name.strip_prefix("node-")?.parse().ok()?;
        self.nodes.get_mut(number)
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Starts the server and waits until it says that it is ready.
fn run(binary: &Path, arguments: &[String], directory: &Path) -> Child {
    let mut child = Command::new(binary)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{} could not be started: {error}", binary.display()));
    let log = BufReader::new(child.stderr.take().unwrap());
    let (ready, is_ready) = mpsc::channel();
    std::thread::spawn(move || {
        let mut said = vec![];
        // Reads to the end: a server whose log nobody reads would block.
        for line in log.lines().map_while(Result::ok) {
            if line.contains("Server is ready") {
                let _ = ready.send(Ok(()));
            }
            said.push(line);
        }
        let _ = ready.send(Err(said.join("\n")));
    });
    match is_ready.recv_timeout(START) {
        Ok(Ok(())) => child,
        Ok(Err(said)) => panic!("nats-server ended:\n{said}"),
        Err(_) => {
            let _ = child.kill();
            panic!("nats-server was not ready in {START:?}");
        }
    }
}

/// An address that nobody listens on, nor is likely to: the system gives connections no port below 32768, and what is
/// returned here once is not returned again, so that tests that begin together do not take the same.
pub fn free_address() -> SocketAddr {
    static TRIED: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random()));
    let next = || SocketAddr::from(([127, 0, 0, 1], 12_000 + TRIED.fetch_add(1, Ordering::Relaxed) % 20_000));
    std::iter::repeat_with(next).find(|address| TcpListener::bind(address).is_ok()).expect("it is endless")
}

/// `NATS_SERVER_BIN`, or nats-server on the PATH, or the one in `target/tools`.
pub fn binary() -> PathBuf {
    let named = std::env::var_os("NATS_SERVER_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|directory| directory.join("nats-server"));
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/nats-server");
    match named {
        Some(named) => named,
        None => on_path.chain([tool]).find(|file| file.is_file()).expect(
            "these tests run against a real nats-server (2.11 or later), and there is none: put one on the PATH or at \
             target/tools/nats-server, or set NATS_SERVER_BIN",
        ),
    }
}
