//! What the black-box tests are written with: a gateway in a process of its own, a client that sends exactly the bytes
//! it is told to, and a reader of event streams that owes nothing to the gateway's code.
//!
//! Nothing here sleeps. A test waits for the thing itself, at most for [`PATIENCE`], and then fails with what
//! it has seen.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code, reason = "each test uses a part of it")]

pub mod backend;
pub mod broker;
pub mod browser;
pub mod chunks;
pub mod cut;
pub mod gateway;
pub mod haproxy;
pub mod http;
pub mod nats;
pub mod nginx;
pub mod prometheus;
pub mod site;
pub mod sse;
pub mod tokens;
pub mod wire;

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

/// How long anything that must happen may take. Far more than it does, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Sends a signal by its name, such as `TERM`.
fn signal(pid: u32, name: &str) {
    let sent = Command::new("sh").args(["-c", "kill -$0 $1", name, &pid.to_string()]).status();
    assert!(sent.expect("there is a shell").success(), "SIG{name} could not be sent");
}

/// SIGSTOP, and waits until none of its threads does anything any more.
fn freeze(pid: u32) {
    signal(pid, "STOP");
    let deadline = Instant::now() + PATIENCE;
    let runs = || {
        let mut threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it is there");
        // "7 (name) T ..": the name may hold anything.
        threads.any(|thread| {
            let stat = fs::read_to_string(thread.expect("threads can be listed").path().join("stat"));
            stat.is_ok_and(|stat| !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
        })
    };
    while runs() {
        assert!(Instant::now() < deadline, "{pid} does not stop");
        std::thread::yield_now();
    }
}
