//! What a request's target says. Path and query are decoded alike: percent-encoding, and `+` is itself.

use actix_web::HttpRequest;
use percent_encoding::percent_decode_str;

use super::error::{ApiError, Code};

/// The decoded query: only parameters that are known, in their order.
pub struct Query(Vec<(&'static str, String)>);

impl Query {
    /// Parses the query of `request`, in which the parameters `known` may occur. Those that begin with `_` are
    /// ignored: cache-busters.
    ///
    /// # Errors
    /// On a parameter that is not known (the nearest that is gets named), and on text that is not UTF-8.
    pub fn parse(request: &HttpRequest, known: &[&'static str]) -> Result<Query, ApiError> {
        Query::read(request.query_string(), known)
    }

    pub(super) fn read(text: &str, known: &[&'static str]) -> Result<Query, ApiError> {
        let mut parameters = vec![];
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if name.starts_with('_') {
                continue;
            }
            let name = decode(name)?;
            match known.iter().find(|known| **known == name) {
                Some(known) => parameters.push((*known, decode(value)?)),
                None => return Err(ApiError::new(Code::UnknownParameter, unknown(&name, known))),
            }
        }
        Ok(Query(parameters))
    }

    /// The value of a parameter that may occur once.
    pub fn one(&self, name: &str) -> Result<Option<&str>, ApiError> {
        let mut values = self.all(name);
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(ApiError::new(Code::InvalidParameter, format!("{name} may be given only once"))),
        }
    }

    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(known, _)| *known == name).map(|(_, value)| &**value)
    }
}

/// The subject or filter that stands in the path after `/events/`, decoded.
pub fn subject_in_path(request: &HttpRequest) -> Result<String, ApiError> {
    // Not `HttpRequest::path`, which has some characters decoded already.
    decode(request.uri().path().strip_prefix("/events/").unwrap_or_default())
}

pub(super) fn decode(text: &str) -> Result<String, ApiError> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded
        .map(|text| text.into_owned())
        .map_err(|_| ApiError::new(Code::InvalidParameter, "the request target is not UTF-8 once it is decoded"))
}

fn unknown(name: &str, known: &[&'static str]) -> String {
    let near =
        known.iter().map(|known| (strsim::damerau_levenshtein(&name.to_lowercase(), &known.to_lowercase()), known));
    match near.min() {
        Some((distance, near)) if distance <= 3 => format!("{name:?} is not known; did you mean {near:?}?"),
        Some(_) => format!("{name:?} is not known; these are: {}", known.join(", ")),
        None => format!("{name:?} is not known; there are none here"),
    }
}
