//! What is there beside events: the console, and the descriptions of the API.

use std::sync::LazyLock;

use actix_web::{
    HttpRequest, HttpResponse,
    http::{Method, header},
    web,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    App, api, authenticate,
    error::{ApiError, Code},
};
use crate::broker::Health;

const CONSOLE: &str = include_str!("../../web/console.html");

/// `script-src` and `style-src` of the console: nothing but what is in it.
static CONSOLE_SOURCES: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let (_, rest) = CONSOLE.split_once(&format!("<{tag}>")).expect("the console has one");
        let (text, _) = rest.split_once(&format!("</{tag}>")).expect("it ends");
        format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)))
    };
    format!("script-src {}; style-src {}", hash("script"), hash("style"))
});

/// `GET /`, `/console`, `/console/state`, `/openapi.json` and `/asyncapi.json`.
///
/// # Errors
/// 404 where the console is switched off, and for any other path.
pub(super) fn serve(app: &web::Data<App>, request: &HttpRequest) -> Result<HttpResponse, ApiError> {
    let nothing = || ApiError::new(Code::NotFound, "events are read and published at /events/{subject}");
    let is_local = app.auth.is_local_only();
    let is_there = match request.path() {
        "/openapi.json" | "/asyncapi.json" => true,
        "/" | "/console" | "/console/state" => is_local || app.console.enabled,
        _ => false,
    };
    if !is_there {
        return Err(nothing());
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(ApiError::method_not_allowed("GET, HEAD"));
    }
    if is_local {
        authenticate::check_local(app, request)?;
    }
    match request.path() {
        "/" => Ok(HttpResponse::Found().insert_header((header::LOCATION, "/console")).finish()),
        "/console" => Ok(console(app)),
        "/openapi.json" => Ok(api::openapi(app, request)),
        "/asyncapi.json" => Ok(api::asyncapi(app, request)),
        // What is told to operators alone elsewhere.
        "/console/state" if is_local => Ok(state(app)),
        _ => Err(nothing()),
    }
}

fn console(app: &App) -> HttpResponse {
    let images = app.console.images.join(" ");
    let policy = format!(
        "default-src 'none'; {}; connect-src 'self'; img-src data: {images}; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'",
        *CONSOLE_SOURCES
    );
    HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::CONTENT_SECURITY_POLICY, policy))
        .insert_header((header::REFERRER_POLICY, "no-referrer"))
        .insert_header(("Cross-Origin-Opener-Policy", "same-origin"))
        .body(CONSOLE.replace("{{images}}", &images))
}

fn state(app: &App) -> HttpResponse {
    let ready = match app.broker.health() {
        Health::Ready => "ready".to_owned(),
        Health::Away(why) | Health::Unfit(why) => why,
    };
    HttpResponse::Ok().insert_header((header::CACHE_CONTROL, "no-store")).json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "broker": app.broker.describe(),
        "streams": app.metrics.streams.get(),
        "feeds": app.metrics.feeds.get(),
        "ready": ready,
    }))
}
