//! Filters with claims in braces, such as `users.{sub}.>`: what ordinary tokens may do, that say nothing of filters.
//!
//! Invariant: a claim fills a place within a token of the filter, and never changes the filter's shape. What would
//! (dots, wildcards, blanks, nothing at all) is not put in: the filter then is none for that token.

use serde_json::{Map, Value};

use super::StartError;
use crate::subject::{Filter, Subject};

/// A filter with places for claims.
pub(super) struct Template(Vec<Piece>);

enum Piece {
    Text(String),
    Claim(String),
}

impl Template {
    pub(super) fn parse(text: &str) -> Result<Template, StartError> {
        let wrong = |why: String| StartError::Policy(text.into(), why);
        let mut pieces = vec![];
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (claim, after) =
                after.split_once('}').ok_or_else(|| wrong("a brace is opened and not closed".into()))?;
            if claim.is_empty() || claim.contains('{') {
                return Err(wrong("a claim's name is missing between braces".into()));
            }
            pieces.extend([Piece::Text(before.into()), Piece::Claim(claim.into())]);
            rest = after;
        }
        pieces.push(Piece::Text(rest.into()));
        let template = Template(pieces);
        // Any claim will do to see the shape.
        let filled = template.write(|_| Some("x".into())).expect("every claim is there");
        Filter::parse(&filled).map_err(|error| wrong(error.to_string()))?;
        Ok(template)
    }

    /// The filter that this is for a principal with these claims; `None` where one is missing or does not fit.
    pub(super) fn fill(&self, claims: &Map<String, Value>) -> Option<Filter> {
        let text = self.write(|name| match claims.get(name)? {
            Value::String(text) => as_token(text.clone()),
            Value::Number(number) if number.is_u64() => Some(number.to_string()),
            _ => None,
        })?;
        Filter::parse(&text).ok()
    }

    fn write(&self, claim: impl Fn(&str) -> Option<String>) -> Option<String> {
        let texts = self.0.iter().map(|piece| match piece {
            Piece::Text(text) => Some(text.clone()),
            Piece::Claim(name) => claim(name),
        });
        texts.collect()
    }
}

/// A text that is exactly one token of a subject.
fn as_token(text: String) -> Option<String> {
    (!text.contains('.') && Subject::parse(&text).is_ok()).then_some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::fuzz::{cases, text};

    fn fill(template: &str, claims: Value) -> Option<String> {
        let template = Template::parse(template).unwrap_or_else(|error| panic!("{error}"));
        template.fill(claims.as_object().unwrap()).map(|filter| filter.as_str().to_owned())
    }

    #[test]
    fn claims_fill_their_places() {
        assert_eq!(fill("public.>", json!({})).unwrap(), "public.>");
        assert_eq!(fill("users.{sub}.>", json!({"sub": "ann"})).unwrap(), "users.ann.>");
        assert_eq!(fill("{org}.u-{id}.*", json!({"org": "acme", "id": 7})).unwrap(), "acme.u-7.*");
        assert_eq!(fill("{https://x.test/org}", json!({"https://x.test/org": "acme"})).unwrap(), "acme");
    }

    #[test]
    fn a_claim_that_would_change_the_shape_gives_nothing() {
        for sub in ["", ">", "*", "a.b", ".", "a b", " ", "a\n", "a/b", "$SYS", "{sub}", "é", "a*", "\u{0}"] {
            assert_eq!(fill("users.{sub}.>", json!({ "sub": sub })), None, "{sub:?}");
        }
        for sub in [json!(null), json!(["a"]), json!({"a": 1}), json!(true), json!(1.5), json!(-1)] {
            assert_eq!(fill("users.{sub}.>", json!({ "sub": sub })), None, "{sub}");
        }
        assert_eq!(fill("users.{sub}.>", json!({})), None);
        assert_eq!(fill("users.{sub}.>", json!({"sub": "a".repeat(255)})), None, "too long");
    }

    #[test]
    fn what_is_no_template_is_refused_at_start() {
        for text in ["", "a..b", "users.{sub", "users.{}.>", "users.{{sub}}", "a.>.{sub}", "users.sub}"] {
            assert!(Template::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn fuzz_whatever_a_claim_says_the_shape_stays(sub in prop_oneof![text(), "[a.*> ]{0,4}"]) {
            if let Some(filter) = fill("users.{sub}.>", json!({ "sub": sub.clone() })) {
                prop_assert_eq!(filter.split('.').collect::<Vec<_>>(), ["users", &sub, ">"]);
            }
        }
    }
}
