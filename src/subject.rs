//! Subjects and filters: what an event is about, and what a reader asks for.
//!
//! The rules are those of NATS (tokens separated by dots, `*` for one token, `>` for one or more at the end), with a
//! smaller alphabet for what arrives over HTTP. Knows nothing of prefixes: `broker::nats` adds and strips its own.

use std::{fmt, sync::Arc};

/// Longest subject or filter accepted, in bytes. NATS bounds a whole control line to 4,096 bytes, prefixes, reply
/// subject and numbers included, and closes the connection on a longer one.
pub const BYTES_MAX: usize = 255;

/// What one event is about: tokens separated by dots, without wildcards, such as `orders.eu.42`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject(Arc<str>);

/// What a reader asks for: a subject in which a token may be `*` (any one token) and the last may be `>` (one or more
/// tokens).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Filter(Arc<str>);

/// Why a text is no subject or no filter. Its display is for the author of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubjectError {
    #[error("a subject may not be empty")]
    Empty,
    #[error("a subject has at most {BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    #[error("a token between two dots, or before or after one, may not be empty")]
    EmptyToken,
    #[error("'/' is not allowed in a subject: separate its tokens by dots, as in {0:?}")]
    Slash(String),
    #[error(
        "{0:?} is not allowed in a subject: its tokens are made of A-Z a-z 0-9 - _ ~ : @ + = , and separated by dots"
    )]
    Character(char),
    #[error("an event is published to one subject: wildcards (* and >) are for reading")]
    Wildcard,
    #[error("'*' and '>' stand for whole tokens, and '>' only for the last")]
    MisplacedWildcard,
}

impl Subject {
    /// Parses a subject that a client named.
    ///
    /// # Errors
    /// When it is empty, longer than [`BYTES_MAX`], has an empty token, a wildcard or a character outside the alphabet
    /// `A-Z a-z 0-9 - _ ~ : @ + = ,`.
    pub fn parse(text: &str) -> Result<Subject, SubjectError> {
        check(text)?;
        if text.contains(['*', '>']) {
            return Err(SubjectError::Wildcard);
        }
        Ok(Subject(text.into()))
    }

    /// Takes over the subject of a stored event. Publishers that use the broker directly may use characters that
    /// [`Subject::parse`] refuses; such events are reached by wildcards.
    pub fn stored(text: &str) -> Subject {
        Subject(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What asks for this subject alone.
    pub fn filter(&self) -> Filter {
        Filter(self.0.clone())
    }
}

impl Filter {
    /// Parses a filter that a client named.
    ///
    /// # Errors
    /// As [`Subject::parse`], but that wildcards are allowed as whole tokens, and `>` as the last one.
    pub fn parse(text: &str) -> Result<Filter, SubjectError> {
        check(text)?;
        let mut tokens = text.split('.').peekable();
        while let Some(token) = tokens.next() {
            let well_placed = match token {
                "*" => true,
                ">" => tokens.peek().is_none(),
                literal => !literal.contains(['*', '>']),
            };
            if !well_placed {
                return Err(SubjectError::MisplacedWildcard);
            }
        }
        Ok(Filter(text.into()))
    }

    /// The one subject that this filter matches, when it has no wildcard.
    pub fn exact(&self) -> Option<Subject> {
        (!self.0.contains(['*', '>'])).then(|| Subject(self.0.clone()))
    }

    /// Whether an event on `subject` is what this filter asks for.
    pub fn matches(&self, subject: &Subject) -> bool {
        let mut tokens = subject.0.split('.');
        for wanted in self.0.split('.') {
            match (wanted, tokens.next()) {
                (">", Some(_)) => return true,
                ("*", Some(_)) => {}
                (literal, Some(token)) if literal == token => {}
                _ => return false,
            }
        }
        tokens.next().is_none()
    }

    /// Whether this filter matches every subject that `other` matches.
    pub fn covers(&self, other: &Filter) -> bool {
        let mut theirs = other.0.split('.');
        for ours in self.0.split('.') {
            match (ours, theirs.next()) {
                (">", Some(_)) => return true,
                (_, Some(">")) => return false,
                ("*", Some(_)) => {}
                (literal, Some(token)) if literal == token => {}
                _ => return false,
            }
        }
        theirs.next().is_none()
    }

    /// Whether some subject is matched by both.
    pub fn overlaps(&self, other: &Filter) -> bool {
        let (mut ours, mut theirs) = (self.0.split('.'), other.0.split('.'));
        loop {
            match (ours.next(), theirs.next()) {
                (Some(">"), Some(_)) | (Some(_), Some(">")) | (None, None) => return true,
                (Some("*"), Some(_)) | (Some(_), Some("*")) => {}
                (Some(one), Some(other)) if one == other => {}
                _ => return false,
            }
        }
    }

    /// What matches the subjects that both match, if there are any.
    pub fn intersection(&self, other: &Filter) -> Option<Filter> {
        let (mut ours, mut theirs) = (self.0.split('.'), other.0.split('.'));
        let mut tokens = vec![];
        loop {
            match (ours.next(), theirs.next()) {
                (None, None) => break,
                (Some(">"), Some(token)) => {
                    tokens.extend(std::iter::once(token).chain(theirs));
                    break;
                }
                (Some(token), Some(">")) => {
                    tokens.extend(std::iter::once(token).chain(ours));
                    break;
                }
                (Some("*"), Some(token)) | (Some(token), Some("*")) => tokens.push(token),
                (Some(one), Some(other)) if one == other => tokens.push(one),
                _ => return None,
            }
        }
        Some(Filter(tokens.join(".").into()))
    }

    /// What matches every subject that either matches, and as few others as one filter can.
    pub fn union(&self, other: &Filter) -> Filter {
        let (mut ours, mut theirs) = (self.0.split('.'), other.0.split('.'));
        let mut tokens = vec![];
        loop {
            match (ours.next(), theirs.next()) {
                (None, None) => break,
                (None, Some(_)) | (Some(_), None) => {
                    // What `>` stands for is a token at least.
                    tokens.pop();
                    tokens.push(">");
                    break;
                }
                (Some(">"), _) | (_, Some(">")) => {
                    tokens.push(">");
                    break;
                }
                (Some(one), Some(other)) => tokens.push(if one == other { one } else { "*" }),
            }
        }
        Filter(tokens.join(".").into())
    }

    /// The fewest of `filters` that match what all of them do together: each that another covers is left out.
    pub fn fold(filters: Vec<Filter>) -> Vec<Filter> {
        let mut folded: Vec<Filter> = vec![];
        for filter in filters {
            if !folded.iter().any(|other| other.covers(&filter)) {
                folded.retain(|other| !filter.covers(other));
                folded.push(filter);
            }
        }
        folded
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What holds for subjects and filters alike.
fn check(text: &str) -> Result<(), SubjectError> {
    if text.is_empty() {
        return Err(SubjectError::Empty);
    }
    if text.len() > BYTES_MAX {
        return Err(SubjectError::TooLong(text.len()));
    }
    if text.contains('/') {
        return Err(SubjectError::Slash(dotted(text)));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_~:@+=,.*>".contains(c);
    if let Some(character) = text.chars().find(|c| !allowed(*c)) {
        return Err(SubjectError::Character(character));
    }
    if text.split('.').any(str::is_empty) {
        return Err(SubjectError::EmptyToken);
    }
    Ok(())
}

/// The tokens of what looks like a path, as a subject has them.
fn dotted(path: &str) -> String {
    let tokens: Vec<_> = path.split(['/', '.']).filter(|token| !token.is_empty()).collect();
    if tokens.is_empty() { "orders.eu".into() } else { tokens.join(".") }
}

macro_rules! show_as_text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    )*};
}
show_as_text!(Subject, Filter);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(alphabet: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
        prop::collection::vec(prop::sample::select(alphabet), 1..5)
    }

    fn filter() -> impl Strategy<Value = Filter> {
        (tokens(&["a", "b", "*"]), any::<bool>()).prop_map(|(mut tokens, tail)| {
            if tail {
                tokens.push(">");
            }
            Filter::parse(&tokens.join(".")).unwrap()
        })
    }

    fn subject() -> impl Strategy<Value = Subject> {
        tokens(&["a", "b", "c"]).prop_map(|tokens| Subject::parse(&tokens.join(".")).unwrap())
    }

    /// The definition, read off the NATS documentation, by recursion over the tokens.
    fn naive_match(filter: &[&str], subject: &[&str]) -> bool {
        match (filter, subject) {
            ([], []) => true,
            ([">"], [_, ..]) => true,
            (["*", filter @ ..], [_, subject @ ..]) => naive_match(filter, subject),
            ([f, filter @ ..], [s, subject @ ..]) => f == s && naive_match(filter, subject),
            _ => false,
        }
    }

    /// Every subject of up to six tokens over an alphabet that has one token more than the filters know.
    fn all_subjects() -> Vec<Subject> {
        let mut all = vec![];
        let mut longest: Vec<String> = vec![String::new()];
        for _ in 0..6 {
            longest = longest
                .iter()
                .flat_map(|head| {
                    ["a", "b", "z"].map(|t| if head.is_empty() { t.into() } else { format!("{head}.{t}") })
                })
                .collect();
            all.extend(longest.iter().map(|s| Subject::stored(s)));
        }
        all
    }

    proptest! {
        #[test]
        fn matching_agrees_with_the_definition(filter in filter(), subject in subject()) {
            let f: Vec<_> = filter.as_str().split('.').collect();
            let s: Vec<_> = subject.as_str().split('.').collect();
            prop_assert_eq!(filter.matches(&subject), naive_match(&f, &s));
        }

        #[test]
        fn two_filters_as_one_match_what_both_and_what_either_matches(one in filter(), other in filter(), subject in subject()) {
            let (both, either) = (one.intersection(&other), one.union(&other));
            prop_assert_eq!(both.is_some(), one.overlaps(&other));
            let is_both = both.is_some_and(|both| both.matches(&subject));
            prop_assert_eq!(is_both, one.matches(&subject) && other.matches(&subject));
            prop_assert!(either.covers(&one) && either.covers(&other), "{}", either);
        }

        #[test]
        fn parsing_never_panics_and_keeps_the_text(text in "\\PC{0,300}") {
            if let Ok(subject) = Subject::parse(&text) {
                prop_assert_eq!(subject.as_str(), &text);
                prop_assert_eq!(Filter::parse(&text).unwrap().exact(), Some(subject));
            }
        }
    }

    #[test]
    fn covering_is_matching_of_everything() {
        let all = all_subjects();
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(400));
        let pairs = (filter(), filter());
        runner
            .run(&pairs, |(a, b)| {
                let by_definition = all.iter().filter(|s| b.matches(s)).all(|s| a.matches(s));
                prop_assert_eq!(a.covers(&b), by_definition, "{} covers {}", a, b);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn folding_leaves_what_nothing_else_covers() {
        let fold = |texts: &[&str]| {
            let folded = Filter::fold(texts.iter().map(|text| Filter::parse(text).unwrap()).collect());
            folded.iter().map(|filter| filter.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(fold(&["a.b", "a.*", "a.b", "c", "a.>"]), ["c", "a.>"]);
        assert_eq!(fold(&["a.*", "*.b"]), ["a.*", "*.b"]);
    }

    #[test]
    fn what_is_no_subject_says_why() {
        let long = "a".repeat(BYTES_MAX + 1);
        for (text, error) in [
            ("", SubjectError::Empty),
            (&*long, SubjectError::TooLong(256)),
            ("a..b", SubjectError::EmptyToken),
            (".a", SubjectError::EmptyToken),
            ("a.", SubjectError::EmptyToken),
            ("a/b", SubjectError::Slash("a.b".into())),
            ("a.b/", SubjectError::Slash("a.b".into())),
            ("/a//b./", SubjectError::Slash("a.b".into())),
            ("/", SubjectError::Slash("orders.eu".into())),
            ("a b", SubjectError::Character(' ')),
            ("$SYS.x", SubjectError::Character('$')),
            ("a\u{0}", SubjectError::Character('\u{0}')),
            ("é", SubjectError::Character('é')),
            ("a.*", SubjectError::Wildcard),
            ("a.>", SubjectError::Wildcard),
        ] {
            assert_eq!(Subject::parse(text), Err(error), "{text:?}");
        }
        for text in ["a*", "a.>.b", ">.a", "a.b>", "**"] {
            assert_eq!(Filter::parse(text), Err(SubjectError::MisplacedWildcard), "{text:?}");
        }
        assert!(Subject::parse(&"a".repeat(BYTES_MAX)).is_ok());
    }

    #[test]
    fn filters_overlap_where_a_subject_matches_both() {
        for (one, other, overlap) in [
            ("a.*", "*.b", true),
            ("a.>", "*.b.c", true),
            (">", "a", true),
            ("a", "a", true),
            ("a.*", "a", false),
            ("a.>", "a", false),
            ("a.*.c", "a.b.*", true),
            ("a.*.c", "a.b.d", false),
            ("a.b", "a.c", false),
        ] {
            let [one, other] = [one, other].map(|text| Filter::parse(text).unwrap());
            assert_eq!((one.overlaps(&other), other.overlaps(&one)), (overlap, overlap), "{one} {other}");
        }
    }
}
