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
const LIBRARY: &str = include_str!("../../web/tidegate.js");
const LIBRARY_TYPES: &str = include_str!("../../web/tidegate.d.ts");
const DEMOS: [(&str, &str); 4] = [
    ("/demos/wall", include_str!("../../web/demos/wall.html")),
    ("/demos/session", include_str!("../../web/demos/session.html")),
    ("/demos/board", include_str!("../../web/demos/board.html")),
    ("/demos/log", include_str!("../../web/demos/log.html")),
];

/// `script-src` and `style-src` of the console: nothing but what is in it.
static CONSOLE_SOURCES: LazyLock<String> =
    LazyLock::new(|| format!("script-src {}; style-src {}", hash(CONSOLE, "script"), hash(CONSOLE, "style")));

/// The source expression for the one element of a page with this tag (CSP Level 3, section 2.3.1).
fn hash(page: &str, tag: &str) -> String {
    let (_, rest) = page.split_once(&format!("<{tag}")).expect("the page has one");
    let (_, rest) = rest.split_once('>').expect("a tag ends");
    let (text, _) = rest.split_once(&format!("</{tag}>")).expect("it ends");
    format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)))
}

/// `GET /`, `/console`, `/console/state`, `/demos/{name}`, `/tidegate.js`, `/tidegate.d.ts`, `/openapi.json` and
/// `/asyncapi.json`.
///
/// # Errors
/// 404 where the console is switched off (and the demos with it), and for any other path.
pub(super) fn serve(app: &web::Data<App>, request: &HttpRequest) -> Result<HttpResponse, ApiError> {
    let nothing = || ApiError::new(Code::NotFound, "events are read and published at /events/{subject}");
    let is_local = app.auth.is_local_only();
    let demo = DEMOS.iter().find(|(path, _)| *path == request.path()).map(|(_, page)| *page);
    let is_there = match request.path() {
        "/openapi.json" | "/asyncapi.json" | "/tidegate.js" | "/tidegate.d.ts" => true,
        "/" | "/console" | "/console/state" => is_local || app.console.enabled,
        _ => demo.is_some() && (is_local || app.console.enabled),
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
        "/tidegate.js" => Ok(file("text/javascript; charset=utf-8", LIBRARY)),
        "/tidegate.d.ts" => Ok(file("text/plain; charset=utf-8", LIBRARY_TYPES)),
        "/openapi.json" => Ok(api::openapi(app, request)),
        "/asyncapi.json" => Ok(api::asyncapi(app, request)),
        // What is told to operators alone elsewhere.
        "/console/state" if is_local => Ok(state(app)),
        _ => demo.map(page_of_demo).ok_or_else(nothing),
    }
}

fn console(app: &App) -> HttpResponse {
    let images = app.console.images.join(" ");
    page(&CONSOLE_SOURCES, &images, CONSOLE.replace("{{images}}", &images))
}

fn page_of_demo(text: &'static str) -> HttpResponse {
    // Tiles and cards have colours of their own, which are set as style properties: no policy minds.
    let sources = format!("script-src 'self' {}; style-src {}", hash(text, "script"), hash(text, "style"));
    page(&sources, "", text.to_owned())
}

fn page(sources: &str, images: &str, text: String) -> HttpResponse {
    let policy = format!(
        "default-src 'none'; {sources}; connect-src 'self'; img-src data: {images}; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    );
    HttpResponse::Ok()
        .content_type("text/html; charset=utf-8")
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::CONTENT_SECURITY_POLICY, policy))
        .insert_header((header::REFERRER_POLICY, "no-referrer"))
        .insert_header(("Cross-Origin-Opener-Policy", "same-origin"))
        .body(text)
}

fn file(content_type: &'static str, text: &'static str) -> HttpResponse {
    HttpResponse::Ok().content_type(content_type).insert_header((header::CACHE_CONTROL, "no-cache")).body(text)
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
