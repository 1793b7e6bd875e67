//! Metrics and readiness, on the admin listener.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use actix_web::{HttpResponse, http::StatusCode, web};

use super::App;
use crate::{broker::Health, memory::Part, metrics::Now};

/// `GET /metrics`
pub async fn metrics(app: web::Data<App>) -> HttpResponse {
    let (link, runtime) = (app.broker.link(), app.runtime.metrics());
    let now = Now {
        streams_limit: app.limits.borrow().streams,
        connections_limit: app.limits.borrow().connections,
        broker_down: link.states.iter().filter(|state| state.trouble.is_some()).map(|state| state.name).collect(),
        memory: Part::ALL.iter().map(|part| (part.as_str(), app.memory.used_by(*part))).collect(),
        memory_limit: app.memory.limit(),
        broker_connections: link.connections,
        broker_round_trip: link.round_trip,
        runtime_tasks: runtime.num_alive_tasks(),
        runtime_queue: runtime.global_queue_depth(),
        runtime_workers: runtime.num_workers(),
        runtime_busy: (0..runtime.num_workers()).map(|worker| runtime.worker_total_busy_duration(worker)).sum(),
    };
    HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(app.metrics.encode(now))
}

/// `GET /health/ready`: 200 while this node should get requests, else 503; the body says why not, and what is wrong though
/// it should.
pub async fn ready(app: web::Data<App>) -> HttpResponse {
    let away = |why: &str| {
        HttpResponse::build(StatusCode::SERVICE_UNAVAILABLE)
            .content_type("text/plain; charset=utf-8")
            .body(format!("{why}\n"))
    };
    let ready = |but: &str| {
        let body = if but.is_empty() { "ready\n".to_owned() } else { format!("ready\n{but}\n") };
        HttpResponse::Ok().content_type("text/plain; charset=utf-8").body(body)
    };
    let health = app.broker.health();
    let is_short = app.absence.is_short(&health);
    match health {
        _ if app.leaving.is_cancelled() => away("draining"),
        Health::Unfit(why) => away(&format!("broker: {why}")),
        Health::Away(why) if !is_short => away(&format!("broker: {why}")),
        Health::Ready | Health::Away(_) if app.deliveries.is_full() => {
            away("full: there is no room for another stream")
        }
        Health::Ready | Health::Away(_) if app.room.is_full() => away("full: there is no room for another connection"),
        Health::Away(why) => ready(&format!("for a short time: {why}")),
        Health::Ready => ready(&app.broker.link().warning.unwrap_or_default()),
    }
}

/// How long the broker has been away, as far as anybody has asked.
pub struct Absence {
    /// One that is not longer is nothing to speak of.
    bearable: Duration,
    since: Mutex<Option<Instant>>,
}

impl Absence {
    pub fn bearable_for(bearable: Duration) -> Absence {
        Absence { bearable, since: Mutex::default() }
    }

    fn is_short(&self, health: &Health) -> bool {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        match health {
            Health::Away(_) => since.get_or_insert_with(Instant::now).elapsed() < self.bearable,
            Health::Ready | Health::Unfit(_) => {
                *since = None;
                true
            }
        }
    }
}
