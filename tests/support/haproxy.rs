//! A real HAProxy in front of a gateway, on a port of its own.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use super::{PATIENCE, nats::free_address};

/// HAProxy with a configuration of its own. Ends with its owner.
pub struct HaProxy {
    pub address: SocketAddr,
    file: PathBuf,
    child: Child,
}

/// Whose requests a connection to the gateway carries.
#[derive(Clone, Copy, Debug)]
pub enum Reuse {
    /// Those of one client connection.
    Never,
    /// Anybody's, one after the other.
    Always,
}

impl HaProxy {
    /// In front of a gateway. It lets clients publish to `/events/demo` and to nothing else.
    pub fn start(gateway: SocketAddr, reuse: Reuse) -> HaProxy {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = std::env::temp_dir().join(format!("tidegate-haproxy-{}-{number}.cfg", std::process::id()));
        let address = free_address();
        let reuse = match reuse {
            Reuse::Never => "never",
            Reuse::Always => "always",
        };
        let configuration = format!(
            "defaults\n\
             mode http\n\
             timeout connect 5s\n\
             timeout client 60s\n\
             timeout server 60s\n\
             http-reuse {reuse}\n\
             listen edge\n\
             bind {address}\n\
             http-request deny if METH_POST !{{ path /events/demo }}\n\
             option forwardfor\n\
             server gateway {gateway}\n"
        );
        fs::write(&file, configuration).expect("a file can be written");
        let child = Command::new("haproxy")
            .args(["-db", "-q", "-f"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("HAProxy is installed (tests/run does it)");
        let haproxy = HaProxy { address, file, child };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "HAProxy does not listen");
            std::thread::yield_now();
        }
        haproxy
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.file);
    }
}
