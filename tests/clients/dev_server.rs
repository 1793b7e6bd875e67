//! A bundler's development server in front of the gateway, which compresses what it passes on, if it may.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Stdio},
};

use super::{
    drivers::node,
    support::{
        gateway::Launch,
        http::{Connection, Request},
        sse::EventStream,
    },
};

/// express with `compression` and `http-proxy-middleware`. Ends with its owner.
struct DevServer {
    address: SocketAddr,
    child: Child,
}

impl DevServer {
    fn start(gateway: SocketAddr) -> DevServer {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/dev_server.mjs");
        let mut child = node()
            .args([script, &format!("http://{gateway}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tests/install brings node");
        let mut address = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut address).expect("stdout is text");
        DevServer { address: address.trim_end().parse().expect("it says where it listens"), child }
    }

    fn connect(&self) -> Connection {
        Connection::open(self.address)
    }
}

impl Drop for DevServer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn compressible(target: &str) -> Request {
    Request::get(target).header("Accept-Encoding", "gzip, deflate, br")
}

#[test]
fn a_development_server_that_compresses_passes_each_event_at_once() {
    let gateway = Launch::new().start();
    let server = DevServer::start(gateway.address);
    let mut page = server.connect();
    page.send(compressible("/page"));
    assert!(page.head().header("Content-Encoding").is_some(), "the server compresses what it may");

    let mut stream = EventStream::open(server.connect(), compressible("/events/demo"));

    for data in ["one", "two", "three"] {
        gateway.publish("demo", data);
        assert_eq!(stream.next().data, data);
    }
    assert_eq!(stream.head.header("Content-Encoding"), None);
}
