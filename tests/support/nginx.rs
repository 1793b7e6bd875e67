//! A real nginx with the configuration that is shipped, on ports of its own.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use super::{PATIENCE, nats::free_address};

/// nginx in a directory of its own. Ends with its owner.
pub struct Nginx {
    pub http: SocketAddr,
    pub https: SocketAddr,
    directory: PathBuf,
    child: Option<Child>,
}

impl Nginx {
    /// The shipped edge of two gateways. Only addresses are changed.
    pub fn edge(gateways: [SocketAddr; 2]) -> Nginx {
        Nginx::changed_edge(gateways, &[])
    }

    /// The same with other words in place of some of its own: for limits that a test can't wait for or fill.
    pub fn changed_edge(gateways: [SocketAddr; 2], changes: &[(&str, &str)]) -> Nginx {
        let (http, https) = (free_address(), free_address());
        let directory = scratch();
        let [one, two, http_port, https_port] = [gateways[0], gateways[1], http, https].map(|at| at.to_string());
        for (file, changes) in [
            ("nginx.conf", changes),
            ("gateways.conf", &[("127.0.0.1:8080", &one), ("127.0.0.1:8081", &two)]),
            ("listen.conf", &[("127.0.0.1:8000", &http_port), ("127.0.0.1:8443", &https_port)]),
        ] {
            let mut text = shipped(file);
            for (from, to) in changes {
                assert!(text.contains(from), "{file} has no {from}");
                text = text.replace(from, to);
            }
            fs::write(directory.join("nginx").join(file), text).expect("a file can be written");
        }
        make_certificate(&directory);
        let mut nginx = Nginx { http, https, directory, child: None };
        nginx.start();
        nginx
    }

    /// One origin for a site's pages and a gateway's events.
    pub fn origin(site: SocketAddr, gateway: SocketAddr) -> Nginx {
        Nginx::plain(&format!(
            "location / {{ proxy_pass http://{site}; }}\n\
             location /events {{ proxy_pass http://{gateway}; proxy_http_version 1.1; proxy_buffering off; }}"
        ))
    }

    /// A plain site that only logs what it was asked for.
    pub fn site() -> Nginx {
        Nginx::plain("location / { return 200 ok; }")
    }

    fn plain(locations: &str) -> Nginx {
        let http = free_address();
        let directory = scratch();
        fs::create_dir_all(directory.join("nginx/run")).expect("a directory can be made");
        let configuration = format!(
            "pid run/nginx.pid; error_log run/error.log; events {{}}\n\
             http {{ access_log run/access.log; client_body_temp_path run; proxy_temp_path run; fastcgi_temp_path run;\n\
             uwsgi_temp_path run; scgi_temp_path run;\n\
             server {{ listen {http}; {locations} }} }}"
        );
        fs::write(directory.join("nginx/nginx.conf"), configuration).expect("a file can be written");
        let mut nginx = Nginx { http, https: http, directory, child: None };
        nginx.start();
        nginx
    }

    pub fn access_log(&self) -> PathBuf {
        self.directory.join("nginx/run/access.log")
    }

    /// Everything that it has written, its name and what it says.
    pub fn written(&self) -> Vec<(PathBuf, String)> {
        let entries = fs::read_dir(self.directory.join("nginx/run")).expect("it writes there");
        let read = |path: PathBuf| fs::read(&path).map(|bytes| (path, String::from_utf8_lossy(&bytes).into_owned()));
        entries.filter_map(|entry| read(entry.expect("a directory can be read").path()).ok()).collect()
    }

    pub fn certificate(&self) -> PathBuf {
        self.directory.join("nginx/tls/localhost.crt")
    }

    pub fn start(&mut self) {
        let child = Command::new("nginx")
            .args(["-p", "nginx", "-c", "nginx.conf", "-g", "daemon off;"])
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx is installed (tests/run does it)");
        self.child = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while [self.http, self.https].iter().any(|address| TcpStream::connect(address).is_err()) {
            assert!(Instant::now() < deadline, "nginx does not listen: {}", self.errors());
            std::thread::yield_now();
        }
    }

    /// As an operator reloads it.
    pub fn reload(&self) {
        self.signal("HUP");
    }

    fn signal(&self, name: &str) {
        super::signal(self.child.as_ref().expect("nginx runs").id(), name);
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.directory.join("nginx/run/error.log")).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The fast shutdown of nginx: the master ends its workers first.
        self.signal("TERM");
        let _ = self.child.take().map(|mut child| child.wait());
        if std::thread::panicking() {
            eprintln!("nginx logged:\n{}", self.errors());
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn shipped(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("nginx").join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn scratch() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("tidegate-nginx-{}-{number}", std::process::id()));
    fs::create_dir_all(directory.join("nginx")).expect("a directory can be made");
    directory
}

/// Runs the line that the configuration itself, and the manual, name for it.
fn make_certificate(directory: &Path) {
    let configuration = shipped("nginx.conf");
    let line = configuration.lines().find(|line| line.contains("openssl req")).expect("the line is there");
    let line = line.trim_start_matches(['#', ' ']);
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/src/nginx.md");
    assert!(fs::read_to_string(page).expect("a page").contains(line), "the manual has the same line");
    let made = Command::new("sh").args(["-c", line]).current_dir(directory).stderr(Stdio::null()).status();
    assert!(made.expect("there is a shell").success(), "openssl makes a certificate");
}
