//! What an operator does to the stream, and asks of it, through whichever node answers.

use std::{net::SocketAddr, time::Duration};

use async_nats::{Client, ConnectOptions};
use serde_json::{Value, json};
use tidegate::event::Epoch;
use tokio::time::Instant;

/// How long one node may take to answer, before another is asked.
const ANSWER: Duration = Duration::from_secs(2);
/// How long anything may take: an election takes up to nine seconds.
const PATIENCE: Duration = Duration::from_secs(40);

pub struct Operator {
    nodes: Vec<Client>,
}

/// The stream as its leader describes it.
pub struct Stream {
    pub epoch: Epoch,
    pub first: u64,
    pub last: u64,
    pub leader: Option<String>,
    /// Whether every replica is where the leader is.
    pub is_whole: bool,
    pub config: Value,
}

impl Operator {
    pub async fn of(nodes: &[SocketAddr]) -> Operator {
        let mut clients = vec![];
        for node in nodes {
            let options = ConnectOptions::new().retry_on_initial_connect().ping_interval(Duration::from_secs(2));
            clients.push(options.connect(node.to_string()).await.expect("it connects in its own time"));
        }
        Operator { nodes: clients }
    }

    /// Asks until there is an answer that is no error, or one of these, which mean that it was done before.
    async fn ask(&self, verb: &str, body: Value, done: &[u64]) -> Value {
        let subject = format!("$JS.API.{verb}");
        let until = Instant::now() + PATIENCE;
        let mut said = String::new();
        while Instant::now() < until {
            for node in &self.nodes {
                let body = if body.is_null() { String::new() } else { body.to_string() };
                let answer = tokio::time::timeout(ANSWER, node.request(subject.clone(), body.into())).await;
                let Ok(Ok(answer)) = answer else { continue };
                let answer: Value = serde_json::from_slice(&answer.payload).expect("JetStream answers in JSON");
                let error = &answer["error"]["err_code"];
                if error.is_null() || error.as_u64().is_some_and(|code| done.contains(&code)) {
                    return answer;
                }
                said = answer["error"].to_string();
            }
            // Pacing: a cluster in an election answers nothing useful, at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{subject} {body} was not done in {PATIENCE:?}: {said}");
    }

    /// Waits until the servers have found each other.
    pub async fn wait_for_cluster(&self) {
        self.ask("STREAM.NAMES", Value::Null, &[]).await;
    }

    pub async fn stream(&self) -> Stream {
        let mut answer = self.ask("STREAM.INFO.EVENTS", Value::Null, &[]).await;
        let created: jiff::Timestamp = answer["created"].as_str().expect("a time").parse().expect("a time");
        let replicas = answer["cluster"]["replicas"].as_array().cloned().unwrap_or_default();
        let is_current = |replica: &Value| replica["current"] == json!(true) && replica["offline"] != json!(true);
        Stream {
            epoch: Epoch::from_seed(created.as_nanosecond() as u64),
            first: answer["state"]["first_seq"].as_u64().expect("a number"),
            last: answer["state"]["last_seq"].as_u64().expect("a number"),
            leader: answer["cluster"]["leader"].as_str().map(str::to_owned),
            is_whole: replicas.len() == 2 && replicas.iter().all(is_current),
            config: answer["config"].take(),
        }
    }

    /// Waits until the stream has a leader and all replicas, so that another may fail.
    pub async fn wait_until_whole(&self) -> Stream {
        let until = Instant::now() + PATIENCE;
        loop {
            let stream = self.stream().await;
            if stream.is_whole && stream.leader.is_some() {
                return stream;
            }
            assert!(Instant::now() < until, "a replica of the stream does not come back");
            // Pacing.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn step_down(&self) {
        self.ask("STREAM.LEADER.STEPDOWN.EVENTS", Value::Null, &[]).await;
    }

    /// Removes what there is now. A request that was not answered in time, and is sent again, may be carried out once more,
    /// later: it must not remove what was stored meanwhile.
    pub async fn purge(&self, filter: Option<&str>) {
        let mut body = json!({ "seq": self.stream().await.last + 1 });
        if let Some(filter) = filter {
            body["filter"] = json!(filter);
        }
        self.ask("STREAM.PURGE.EVENTS", body, &[]).await;
    }

    /// Keeps at most so many events; -1: as many as ever.
    pub async fn limit(&self, events: i64) {
        let mut config = self.stream().await.config;
        config["max_msgs"] = json!(events);
        self.ask("STREAM.UPDATE.EVENTS", config, &[]).await;
    }

    pub async fn delete(&self) {
        self.ask("STREAM.DELETE.EVENTS", Value::Null, &[10059]).await;
    }

    /// Makes the stream as it is shipped, on all nodes.
    pub async fn make(&self) -> Stream {
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/nats/stream.json");
        let text = std::fs::read_to_string(shipped).expect("nats/stream.json is there");
        let mut config: Value = serde_json::from_str(&text).expect("it is JSON");
        config["num_replicas"] = json!(3);
        self.ask("STREAM.CREATE.EVENTS", config, &[10058]).await;
        self.stream().await
    }
}
