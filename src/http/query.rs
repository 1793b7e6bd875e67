//! What a request's target says, decoded. In a query `+` is a blank, as forms and `URLSearchParams` write it; in a path it
//! is itself.

use actix_web::HttpRequest;
use percent_encoding::percent_decode_str;

use super::error::{ApiError, Code};

/// The parameters that a resource takes, and what is said of some that others would know: `(names, advice)`.
pub struct Parameters {
    pub known: &'static [&'static str],
    pub advice: &'static [(&'static [&'static str], &'static str)],
}

/// The decoded query: only parameters that are known, in their order.
pub struct Query(Vec<(&'static str, String)>);

impl Query {
    /// Parses the query of `request`, in which these parameters may occur, and perhaps one more. Those that begin with
    /// `_` are ignored: cache-busters.
    ///
    /// # Errors
    /// On a parameter that is not known (with what is meant most likely), and on text that is not UTF-8.
    pub fn parse(
        request: &HttpRequest,
        parameters: &Parameters,
        one_more: Option<&'static str>,
    ) -> Result<Query, ApiError> {
        Query::read(request.query_string(), parameters, one_more)
    }

    pub(super) fn read(
        text: &str,
        Parameters { known, advice }: &Parameters,
        one_more: Option<&'static str>,
    ) -> Result<Query, ApiError> {
        let mut parameters = vec![];
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if name.starts_with('_') {
                continue;
            }
            let name = decode_query(name)?;
            match known.iter().copied().chain(one_more).find(|known| *known == name) {
                Some(known) => parameters.push((known, decode_query(value)?)),
                None => return Err(ApiError::new(Code::UnknownParameter, unknown(&name, known, advice))),
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

pub(super) fn decode_query(text: &str) -> Result<String, ApiError> {
    match text.contains('+') {
        true => decode(&text.replace('+', " ")),
        false => decode(text),
    }
}

fn unknown(name: &str, known: &[&str], advice: &[(&[&str], &str)]) -> String {
    let lowercase = name.to_lowercase();
    if let Some((_, advice)) = advice.iter().find(|(names, _)| names.contains(&&*lowercase)) {
        return format!("{name:?} is not known: {advice}");
    }
    if name.trim_start().starts_with(['@', '!', '(']) {
        return format!(
            "{name:?} is no parameter; within where, && is written %26%26 (curl -G --data-urlencode does that)"
        );
    }
    let near = known.iter().map(|known| (strsim::damerau_levenshtein(&lowercase, &known.to_lowercase()), known));
    match near.min() {
        // Of a short name, three letters are all of it.
        Some((distance, near)) if distance <= 3 && 2 * distance <= name.chars().count() => {
            format!("{name:?} is not known; did you mean {near:?}?")
        }
        Some(_) => format!("{name:?} is not known; these are: {}", known.join(", ")),
        None => format!("{name:?} is not known; there are none here"),
    }
}
