//! What `where=` says: the inside of an RFC 9535 filter, cut down to what costs little, over the object that `format=json` shows.
//!
//! Kept here and not in a JSONPath library: the subset, the place of a mistake and the bound of what an expression may cost are
//! ours in any case, so that a library would be a second reading of the same text.

use std::fmt;

use serde_json::{Number, Value};

/// What an event has to meet. Two that are written alike, but for blanks and quotes, are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Condition {
    /// `||`
    Any(Vec<Condition>),
    /// `&&`
    All(Vec<Condition>),
    /// `!`
    Not(Box<Condition>),
    /// A path alone: whether there is something.
    Exists(Path),
    Compare(Operand, Operator, Operand),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    Path(Path),
    Literal(Value),
    /// `length(...)`
    Length(Box<Operand>),
}

/// One step after the other from `@`: names at most one value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Path(pub Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Name(String),
    /// From the end, if it is negative.
    Index(i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// What `@` stands for.
pub trait Root {
    /// All of it.
    fn whole(&self) -> &Value;
    /// One of its members, if it is an object.
    fn member(&self, name: &str) -> Option<&Value>;
}

impl Root for Value {
    fn whole(&self) -> &Value {
        self
    }

    fn member(&self, name: &str) -> Option<&Value> {
        self.get(name)
    }
}

impl Condition {
    /// Whether `root` meets the condition (RFC 9535, sections 2.3.5.2 and 2.4.4).
    pub fn holds(&self, root: &impl Root) -> bool {
        match self {
            Condition::Any(conditions) => conditions.iter().any(|condition| condition.holds(root)),
            Condition::All(conditions) => conditions.iter().all(|condition| condition.holds(root)),
            Condition::Not(condition) => !condition.holds(root),
            Condition::Exists(path) => path.of(root).is_some(),
            Condition::Compare(left, operator, right) => {
                let (mut left_length, mut right_length) = (Value::Null, Value::Null);
                compare(left.of(root, &mut left_length), *operator, right.of(root, &mut right_length))
            }
        }
    }
}

impl Operand {
    /// The value, if there is one; a length is put down in `length`.
    fn of<'v>(&'v self, root: &'v impl Root, length: &'v mut Value) -> Option<&'v Value> {
        match self {
            Operand::Literal(literal) => Some(literal),
            Operand::Path(path) => path.of(root),
            Operand::Length(of) => {
                // The length of a length is nothing.
                let count = match &**of {
                    Operand::Literal(literal) => count(literal),
                    Operand::Path(path) => path.of(root).and_then(count),
                    Operand::Length(_) => None,
                };
                *length = Value::from(count?);
                Some(length)
            }
        }
    }
}

/// RFC 9535, section 2.4.4.
fn count(value: &Value) -> Option<usize> {
    match value {
        Value::String(text) => Some(text.chars().count()),
        Value::Array(items) => Some(items.len()),
        Value::Object(members) => Some(members.len()),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

impl Path {
    fn of<'v>(&self, root: &'v impl Root) -> Option<&'v Value> {
        let (first, rest) = match self.0.split_first() {
            None => return Some(root.whole()),
            Some((Step::Name(name), rest)) => (root.member(name)?, rest),
            Some((Step::Index(index), rest)) => (item(root.whole(), *index)?, rest),
        };
        rest.iter().try_fold(first, |value, step| match step {
            Step::Name(name) => value.get(name),
            Step::Index(index) => item(value, *index),
        })
    }
}

fn item(value: &Value, index: i64) -> Option<&Value> {
    let items = value.as_array()?;
    let from_start = match usize::try_from(index) {
        Ok(index) => index,
        Err(_) => items.len().checked_sub(usize::try_from(index.unsigned_abs()).ok()?)?,
    };
    items.get(from_start)
}

/// RFC 9535, section 2.3.5.2.2: nothing equals nothing, and only numbers and strings have an order.
fn compare(left: Option<&Value>, operator: Operator, right: Option<&Value>) -> bool {
    let equal = || match (left, right) {
        (Some(left), Some(right)) => equals(left, right),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    };
    match operator {
        Operator::Equal => equal(),
        Operator::NotEqual => !equal(),
        Operator::Less => is_less(left, right),
        Operator::LessOrEqual => is_less(left, right) || equal(),
        Operator::Greater => is_less(right, left),
        Operator::GreaterOrEqual => is_less(right, left) || equal(),
    }
}

fn equals(left: &Value, right: &Value) -> bool {
    match (left, right) {
        _ if std::ptr::eq(left, right) => true,
        (Value::Number(left), Value::Number(right)) => order(left, right).is_some_and(|order| order.is_eq()),
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| equals(left, right))
        }
        (Value::Object(left), Value::Object(right)) => {
            let has_same = |(name, value)| right.get(name).is_some_and(|other| equals(value, other));
            left.len() == right.len() && left.iter().all(has_same)
        }
        (left, right) => left == right,
    }
}

fn is_less(left: Option<&Value>, right: Option<&Value>) -> bool {
    match (left, right) {
        (Some(Value::Number(left)), Some(Value::Number(right))) => {
            order(left, right).is_some_and(|order| order.is_lt())
        }
        // Byte by byte: the order of Unicode scalar values.
        (Some(Value::String(left)), Some(Value::String(right))) => left < right,
        _ => false,
    }
}

/// Whole numbers of 64 bits as they are, all others as doubles.
fn order(left: &Number, right: &Number) -> Option<std::cmp::Ordering> {
    match (left.as_i128(), right.as_i128()) {
        (Some(left), Some(right)) => Some(left.cmp(&right)),
        _ => left.as_f64()?.partial_cmp(&right.as_f64()?),
    }
}

impl Operator {
    pub fn as_str(self) -> &'static str {
        match self {
            Operator::Equal => "==",
            Operator::NotEqual => "!=",
            Operator::Less => "<",
            Operator::LessOrEqual => "<=",
            Operator::Greater => ">",
            Operator::GreaterOrEqual => ">=",
        }
    }
}

/// In one way of writing, whatever way it came in.
impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |f: &mut fmt::Formatter<'_>,
                      conditions: &[Condition],
                      by: &str,
                      needs_parentheses: fn(&Condition) -> bool| {
            for (number, condition) in conditions.iter().enumerate() {
                f.write_str(if number == 0 { "" } else { by })?;
                match needs_parentheses(condition) {
                    true => write!(f, "({condition})")?,
                    false => write!(f, "{condition}")?,
                }
            }
            Ok(())
        };
        match self {
            Condition::Any(conditions) => joined(f, conditions, " || ", |inner| matches!(inner, Condition::Any(_))),
            Condition::All(conditions) => {
                joined(f, conditions, " && ", |inner| matches!(inner, Condition::Any(_) | Condition::All(_)))
            }
            Condition::Not(inner) if matches!(**inner, Condition::Exists(_)) => write!(f, "!{inner}"),
            Condition::Not(inner) => write!(f, "!({inner})"),
            Condition::Exists(path) => write!(f, "{path}"),
            Condition::Compare(left, operator, right) => write!(f, "{left} {} {right}", operator.as_str()),
        }
    }
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operand::Path(path) => write!(f, "{path}"),
            // In double quotes, as JSON.
            Operand::Literal(literal) => write!(f, "{literal}"),
            Operand::Length(of) => write!(f, "length({of})"),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("@")?;
        self.0.iter().try_for_each(|step| match step {
            Step::Name(name) if is_shorthand(name) => write!(f, ".{name}"),
            Step::Name(name) => write!(f, "[{}]", Value::from(&**name)),
            Step::Index(index) => write!(f, "[{index}]"),
        })
    }
}

/// Whether a name may stand after a dot (RFC 9535, section 2.5.1.1).
fn is_shorthand(name: &str) -> bool {
    name.chars().next().is_some_and(begins_name) && name.chars().all(continues_name)
}

pub(super) fn begins_name(character: char) -> bool {
    character == '_' || character.is_ascii_alphabetic() || !character.is_ascii()
}

pub(super) fn continues_name(character: char) -> bool {
    begins_name(character) || character.is_ascii_digit()
}
