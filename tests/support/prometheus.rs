//! A real Prometheus with the configuration that is shipped, but for where the gateways are and how often it looks.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::http::Connection;

/// How long it may take to start, and to see what is there to be seen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Prometheus in a directory of its own. Ends with its owner.
pub struct Prometheus {
    address: SocketAddr,
    directory: PathBuf,
    child: Child,
}

impl Prometheus {
    /// One that watches these admin listeners.
    pub fn watch(gateways: [SocketAddr; 2]) -> Prometheus {
        let directory = std::env::temp_dir().join(format!("tidegate-prometheus-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory can be made");
        let [one, two] = gateways.map(|at| at.to_string());
        for (file, changes) in [
            ("prometheus.yml", &[("_interval: 5s", "_interval: 1s")][..]),
            ("rules.yml", &[]),
            ("gateways.yml", &[("127.0.0.1:9090", &one), ("127.0.0.1:9091", &two)]),
        ] {
            let mut text = shipped(file);
            for (from, to) in changes {
                assert!(text.contains(from), "{file} has no {from}");
                text = text.replace(from, to);
            }
            fs::write(directory.join(file), text).expect("a file can be written");
        }
        let address = TcpListener::bind("127.0.0.1:0").expect("there is a free port").local_addr().expect("it listens");
        let child = Command::new(tool("prometheus"))
            .args(["--config.file", "prometheus.yml", "--storage.tsdb.path", "data", "--web.listen-address"])
            .arg(address.to_string())
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it can be started");
        let prometheus = Prometheus { address, directory, child };
        prometheus.wait_until(|| TcpStream::connect(address).is_ok(), || "it does not start".into());
        prometheus
    }

    /// What a query has for an answer now, but for what is no number.
    pub fn ask(&self, query: &str) -> Vec<f64> {
        let mut connection = Connection::open(self.address);
        connection.send(format!("/api/v1/query?query={}", utf8_percent_encode(query, NON_ALPHANUMERIC)));
        let response = connection.response();
        if response.status == 503 {
            // It has yet to read its own log.
            return vec![];
        }
        assert_eq!(response.status, 200, "{query}: {response:?}");
        let answer = response.json();
        let value = |result: &Value| result["value"][1].as_str().and_then(|text| text.parse().ok());
        let results = answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{query}: {answer}"));
        results.iter().filter_map(value).filter(|value: &f64| !value.is_nan()).collect()
    }

    /// Asks until there are as many answers, at least.
    pub fn wait_for(&self, query: &str, count: usize) {
        self.wait_until(|| self.ask(query).len() >= count, || format!("{query} has {:?}", self.ask(query)));
    }

    fn wait_until(&self, so: impl Fn() -> bool, what: impl Fn() -> String) {
        let deadline = Instant::now() + PATIENCE;
        while !so() {
            assert!(Instant::now() < deadline, "after {PATIENCE:?}: {}", what());
            std::thread::yield_now();
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A file of grafana/.
pub fn shipped(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana").join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// prometheus or promtool, on the PATH or where tests/install puts them.
pub fn tool(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools");
    let mut places = std::env::split_paths(&path).chain([tools]).map(|directory| directory.join(name));
    places.find(|file| file.is_file()).unwrap_or_else(|| panic!("there is no {name}: tests/install {name} brings it"))
}
