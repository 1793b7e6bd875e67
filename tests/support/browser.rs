//! A real Chromium with an EventSource, driven by Playwright.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use serde_json::Value;

/// How long a browser may take for anything; the waits before it reconnects are its own.
const PATIENCE: Duration = Duration::from_secs(40);

/// A page that reads one stream.
pub struct Browser {
    child: Child,
    says: Receiver<Value>,
    seen: VecDeque<String>,
    /// What was said while something else was waited for.
    aside: VecDeque<Value>,
}

impl Browser {
    /// Reads the stream at `url`, on a page of `origin` (below which it may be a path), and listens for `types` beside plain messages.
    pub fn watch(origin: &str, url: &str, types: &[&str]) -> Browser {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let modules =
            std::env::var("NODE_PATH").unwrap_or_else(|_| root.join("target/tools/node_modules").display().to_string());
        let mut child = Command::new("node")
            .arg(root.join("tests/browser/watch.mjs"))
            .args([origin, url])
            .args(types)
            .env("NODE_PATH", modules)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node is installed");
        let (sender, says) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        std::thread::spawn(move || {
            let lines = stdout.lines().map_while(Result::ok);
            lines
                .map(|line| serde_json::from_str(&line).expect("a line of JSON"))
                .try_for_each(|value| sender.send(value))
        });
        Browser { child, says, seen: VecDeque::new(), aside: VecDeque::new() }
    }

    /// What comes of a `fetch` on the page: `{"status","id","body"}`, of which the page may see all three, or `{"error"}`.
    pub fn fetch(&mut self, url: &str, options: Value) -> Value {
        let stdin = self.child.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{}", serde_json::json!([url, options])).expect("the browser listens");
        loop {
            let mut said = self.hear();
            match said.get_mut("fetched") {
                Some(fetched) => return fetched.take(),
                None => self.aside.push_back(said),
            }
        }
    }

    /// What the page says next: `{"state"}` or `{"event","id","data"}`.
    pub fn next(&mut self) -> Value {
        self.aside.pop_front().unwrap_or_else(|| self.hear())
    }

    fn hear(&mut self) -> Value {
        let said = self.says.recv_timeout(PATIENCE).unwrap_or_else(|error| {
            panic!("the browser says nothing more ({error}; tests/run installs what it needs); last: {:?}", self.seen)
        });
        if self.seen.len() == 5 {
            self.seen.pop_front();
        }
        self.seen.push_back(said.to_string());
        said
    }

    /// Waits for a state, and passes over everything before.
    pub fn wait_for_state(&mut self, state: &str) {
        while self.next()["state"] != state {}
    }

    /// The next event, whatever states are in between.
    pub fn event(&mut self) -> Value {
        loop {
            let said = self.next();
            assert_ne!(said["state"], "closed", "an EventSource that has given up does not come back");
            if said.get("event").is_some() {
                return said;
            }
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its standard input ends, on which it closes the browser; should it not, the kill comes after a moment.
        drop(self.child.stdin.take());
        while self.says.recv_timeout(Duration::from_secs(5)).is_ok() {}
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
