//! The processes of a benchmark: started on a core of their own, asked for their cost, ended with their owner.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Lines, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

/// The core of what is measured, and the core of everything else.
pub const SERVER_CORE: &str = "0";
pub const LOAD_CORE: &str = "1";
pub const BOTH_CORES: &str = "0,1";

/// The kernel's unit in /proc/PID/stat.
const TICK: Duration = Duration::from_millis(10);

pub struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts a program on some cores, with as many open files as it may have.
    pub fn start(
        cores: &str,
        program: impl AsRef<OsStr>,
        arguments: &[&str],
        settings: &[(String, String)],
    ) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", r#"ulimit -n "$(ulimit -Hn)"; exec taskset -c "$0" "$@""#, cores]);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEGATE_")) {
            command.env_remove(name);
        }
        command.arg(program).args(arguments).envs(settings.iter().cloned());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh and taskset (util-linux) are there");
        let stdin = child.stdin.take().expect("stdin is piped");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        Process { child, stdin, stdout }
    }

    /// Another part of this program.
    pub fn start_self(cores: &str, arguments: &[&str]) -> Process {
        Process::start(cores, std::env::current_exe().expect("this program has a file"), arguments, &[])
    }

    pub fn next_line(&mut self) -> String {
        self.stdout.next().expect("the process answers").expect("in UTF-8")
    }

    /// Gives an order and waits for its answer, which is broken into words.
    pub fn ask(&mut self, order: &str) -> Vec<String> {
        self.order(order);
        self.answer(order)
    }

    pub fn order(&mut self, order: &str) {
        writeln!(self.stdin, "{order}").expect("the process listens");
    }

    pub fn answer(&mut self, order: &str) -> Vec<String> {
        let answer = self.next_line();
        assert!(!answer.starts_with("failed"), "{order}: {answer}");
        answer.split(' ').map(String::from).collect()
    }

    /// The time that it has spent on its core, in the kernel too.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("the process lives");
        let fields: Vec<_> = stat[stat.rfind(')').expect("its name") + 2..].split(' ').collect();
        let ticks: u32 = fields[11..13].iter().map(|field| field.parse::<u32>().expect("a number")).sum();
        TICK * ticks
    }

    /// Its proportional set size, in bytes.
    pub fn memory(&self) -> u64 {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).expect("the process lives");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).expect("a kernel since 4.14");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A gateway in a process of its own.
pub struct Gateway {
    pub process: Process,
    pub address: SocketAddr,
    admin: SocketAddr,
}

impl Gateway {
    /// The release build of this repository, or what `BENCH_GATEWAY` names.
    pub fn binary() -> String {
        std::env::var("BENCH_GATEWAY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_tidegate").into())
    }

    /// Starts one, on NATS if there is an address, with these settings on top of the defaults.
    pub fn start(binary: &str, cores: &str, nats: Option<&str>, settings: &[(&str, &str)]) -> Gateway {
        let mut arguments = vec!["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
        arguments.extend(nats.iter().flat_map(|url| ["--nats", url]));
        let name = |key: &str| format!("TIDEGATE_{}", key.to_uppercase().replace('.', "__"));
        let mut settings: Vec<_> = settings.iter().map(|(key, value)| (name(key), (*value).to_owned())).collect();
        settings.push((name("limits.streams"), "20000".into()));
        let mut process = Process::start(cores, binary, &arguments, &settings);
        let greeting = process.next_line();
        let mut addresses = greeting.split("http://").skip(1).map(|text| text.split([' ', ')']).next().unwrap_or(""));
        let mut address = || addresses.next().and_then(|text| text.parse().ok()).expect("the gateway greets");
        let (address, admin) = (address(), address());
        Gateway { process, address, admin }
    }

    /// One of its metrics, summed over labels.
    pub fn metric(&self, name: &str) -> f64 {
        let mut socket = TcpStream::connect(self.admin).expect("the gateway lives");
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it listens");
        let mut text = String::new();
        socket.read_to_string(&mut text).expect("it answers");
        let values = text.lines().filter(|line| line.starts_with(name));
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

/// Moves this program to some cores.
pub fn move_to(cores: &str) {
    let moved = Command::new("taskset").args(["-acp", cores, &std::process::id().to_string()]).output();
    assert!(moved.is_ok_and(|moved| moved.status.success()), "this takes two cores, and taskset (util-linux)");
}

/// The same for the current thread alone.
pub fn move_thread_to(cores: &str) {
    let thread = std::fs::read_link("/proc/thread-self").expect("Linux has it");
    let thread = thread.file_name().expect("a number").to_string_lossy().into_owned();
    let moved = Command::new("taskset").args(["-cp", cores, &thread]).output();
    assert!(moved.is_ok_and(|moved| moved.status.success()), "this takes two cores, and taskset (util-linux)");
}

/// A nats-server with JetStream and a store of its own.
pub struct NatsServer {
    process: Process,
    pub url: String,
    directory: PathBuf,
}

impl NatsServer {
    pub fn start(cores: &str) -> NatsServer {
        let directory = std::env::temp_dir().join(format!("tidegate-bench-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        let store = directory.to_str().expect("a readable path");
        let arguments = ["-js", "-sd", store, "-a", "127.0.0.1", "-p", &free.port().to_string(), "-l", "/dev/null"];
        let process = Process::start(cores, nats_binary(), &arguments, &[]);
        let began = Instant::now();
        while TcpStream::connect(free).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "nats-server does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        NatsServer { process, url: format!("nats://{free}"), directory }
    }

    pub fn cpu(&self) -> Duration {
        self.process.cpu()
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        let _ = self.process.child.kill();
        let _ = self.process.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// `NATS_SERVER_BIN`, or the one in `target/tools`, or nats-server on the PATH.
fn nats_binary() -> PathBuf {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/nats-server");
    let named = std::env::var_os("NATS_SERVER_BIN").map(PathBuf::from);
    named.or_else(|| tool.is_file().then_some(tool)).unwrap_or_else(|| "nats-server".into())
}
