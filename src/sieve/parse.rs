//! Reads a `where=` by hand, one function a rule of RFC 9535's grammar (section 2.3.5.1), so that whatever is wrong has a place.

use std::fmt;

use serde_json::Value;

use super::condition::{Condition, Operand, Operator, Path, Step, begins_name, continues_name};

/// Longest expression, in bytes.
pub const WHERE_BYTES_MAX: usize = 512;
/// Most parentheses in one another.
pub const PARENTHESES_MAX: usize = 16;
/// Most comparisons and paths in one expression.
pub const TERMS_MAX: usize = 32;
const NEGATION: &str = "! goes before a path or parentheses";
/// Whole numbers up to here are exact in a double (RFC 7493, section 2.2).
const INDEX_MAX: u64 = (1 << 53) - 1;

/// Why an expression can't be a condition, and where. Displayed with the expression and a caret under the place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhereError {
    message: String,
    /// The expression as one line.
    line: String,
    /// The place of the mistake, in characters.
    at: usize,
}

impl std::error::Error for WhereError {}

impl fmt::Display for WhereError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}\n{:at$}^", self.message, self.line, "", at = self.at)
    }
}

impl Condition {
    /// Parses what stands in `where=`.
    ///
    /// # Errors
    /// When it is no such expression, or one that is refused because of what it could cost.
    pub fn parse(text: &str) -> Result<Condition, WhereError> {
        let mut parser = Parser { text, at: 0, parentheses: 0, terms: 0 };
        let parsed = if text.len() > WHERE_BYTES_MAX {
            parser.at = up_to(text, WHERE_BYTES_MAX).len();
            Err(format!("where has at most {WHERE_BYTES_MAX} bytes, this one has {}", text.len()))
        } else {
            parser.whole()
        };
        parsed.map_err(|message| {
            let shown = up_to(text, WHERE_BYTES_MAX + 1);
            let at = shown[..parser.at.min(shown.len())].chars().count();
            let line = shown.chars().map(|character| if character.is_control() { ' ' } else { character }).collect();
            WhereError { message, line, at }
        })
    }
}

/// The characters of a text that fit into so many bytes.
fn up_to(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A message, whose place is where the parser stands.
type Parsed<T> = Result<T, String>;

struct Parser<'t> {
    text: &'t str,
    /// In bytes.
    at: usize,
    parentheses: usize,
    terms: usize,
}

impl Parser<'_> {
    fn whole(&mut self) -> Parsed<Condition> {
        self.blanks();
        if self.rest().is_empty() {
            return Err("where is an expression such as @.data.amount > 100".into());
        }
        let condition = self.any()?;
        match self.rest().chars().next() {
            None => Ok(condition),
            Some(')') => Err("there is no \"(\" for this".into()),
            Some(_) => Err(self.unexpected().unwrap_or("expected a comparison, && or ||, or the end").into()),
        }
    }

    /// What is wrong with what comes behind a condition, where that is known.
    fn unexpected(&self) -> Option<&'static str> {
        match self.rest().chars().next()? {
            '=' if !self.rest().starts_with("==") => Some("equality is =="),
            '&' | '|' => Some("conditions are joined by && or ||"),
            '=' | '!' | '<' | '>' => Some("comparisons have two sides: join several by &&"),
            _ if self.is_word_next(&["and", "or"]) => Some("conditions are joined by && or ||"),
            _ => None,
        }
    }

    fn is_word_next(&self, words: &[&str]) -> bool {
        let rest = self.rest();
        let word = &rest[..rest.find(|character| !continues_name(character)).unwrap_or(rest.len())];
        words.iter().any(|wanted| word.eq_ignore_ascii_case(wanted))
    }

    /// Conditions joined by `||`.
    fn any(&mut self) -> Parsed<Condition> {
        let first = self.all()?;
        self.joined(first, "||", Parser::all, Condition::Any)
    }

    /// Conditions joined by `&&`, which binds closer.
    fn all(&mut self) -> Parsed<Condition> {
        let first = self.basic()?;
        self.joined(first, "&&", Parser::basic, Condition::All)
    }

    fn joined(
        &mut self,
        first: Condition,
        by: &str,
        next: fn(&mut Self) -> Parsed<Condition>,
        join: fn(Vec<Condition>) -> Condition,
    ) -> Parsed<Condition> {
        let mut conditions = vec![first];
        while self.eat(by) {
            let condition = next(self)?;
            // Said twice, it costs once.
            if !conditions.contains(&condition) {
                conditions.push(condition);
            }
        }
        Ok(if conditions.len() == 1 { conditions.remove(0) } else { join(conditions) })
    }

    /// A condition in parentheses, a comparison, or a path alone.
    fn basic(&mut self) -> Parsed<Condition> {
        let at = self.at;
        if self.eat("!") {
            return match self.rest().chars().next() {
                Some('(') => Ok(Condition::Not(Box::new(self.in_parentheses(Parser::any)?))),
                Some('@') => {
                    let path = self.path()?;
                    self.count_term(at)?;
                    self.expect_no_comparison(
                        at,
                        "! goes with a path alone or with parentheses, as in !(@.data.a == 1)",
                    )?;
                    Ok(Condition::Not(Box::new(Condition::Exists(path))))
                }
                Some(first) if first.is_ascii_alphabetic() => self.word(self.at).and(Err(NEGATION.into())),
                _ => Err(NEGATION.into()),
            };
        }
        if self.rest().starts_with('(') {
            let condition = self.in_parentheses(Parser::any)?;
            self.expect_no_comparison(self.at, "what is in parentheses is true or false: it can't be compared")?;
            return Ok(condition);
        }
        let left = self.operand()?;
        self.count_term(at)?;
        let Some(operator) = self.operator() else {
            return match left {
                Operand::Path(path) => Ok(Condition::Exists(path)),
                Operand::Literal(_) | Operand::Length(_) => self.fail(at, "this has to be compared with something"),
            };
        };
        let right = self.operand()?;
        Ok(Condition::Compare(left, operator, right))
    }

    fn expect_no_comparison(&mut self, at: usize, message: &str) -> Parsed<()> {
        if self.operator().is_some() { self.fail(at, message) } else { Ok(()) }
    }

    fn count_term(&mut self, at: usize) -> Parsed<()> {
        self.terms += 1;
        if self.terms > TERMS_MAX {
            return self.fail(at, &format!("where has at most {TERMS_MAX} comparisons and paths"));
        }
        Ok(())
    }

    /// What stands between parentheses, which is read by `inner`.
    fn in_parentheses<T>(&mut self, inner: fn(&mut Self) -> Parsed<T>) -> Parsed<T> {
        self.parentheses += 1;
        if self.parentheses > PARENTHESES_MAX {
            return Err(format!("where has at most {PARENTHESES_MAX} parentheses in one another"));
        }
        self.eat("(");
        let found = inner(self)?;
        if !self.eat(")") {
            return Err(self.unexpected().unwrap_or("expected \")\"").into());
        }
        self.parentheses -= 1;
        Ok(found)
    }

    /// One side of a comparison.
    fn operand(&mut self) -> Parsed<Operand> {
        let at = self.at;
        match self.rest().chars().next() {
            None => Err("expected a path such as @.data.amount, or a value".into()),
            Some('@') => self.path().map(Operand::Path),
            Some('$') => Err("paths begin with @, which is the event: @.data, @.type, @.subject, @.time, @.id".into()),
            Some('"' | '\'') => {
                let text = self.string()?;
                self.blanks();
                Ok(Operand::Literal(text.into()))
            }
            Some('-' | '0'..='9') => self.number().map(Operand::Literal),
            Some(first) if first.is_ascii_alphabetic() || first == '_' => self.word(at),
            Some('(') => Err("a side of a comparison is a path, a value or length(...)".into()),
            Some('=') => Err("this comparison has no left side".into()),
            Some('!') => Err(NEGATION.into()),
            Some(_) => Err("expected a path such as @.data.amount, or a value".into()),
        }
    }

    /// `true`, `false`, `null`, or a function.
    fn word(&mut self, at: usize) -> Parsed<Operand> {
        let rest = self.rest();
        let length = rest.find(|character| !continues_name(character)).unwrap_or(rest.len());
        let word = &rest[..length];
        let literal = match word {
            "true" => Some(Value::Bool(true)),
            "false" => Some(Value::Bool(false)),
            "null" => Some(Value::Null),
            _ => None,
        };
        if let Some(literal) = literal {
            self.advance(length);
            return Ok(Operand::Literal(literal));
        }
        match word {
            "length" if rest[length..].starts_with('(') => {
                self.at += length;
                let of = self.in_parentheses(Parser::operand)?;
                Ok(Operand::Length(Box::new(of)))
            }
            "match" | "search" | "count" | "value" => Err(format!("{word}() is not supported: length() is")),
            "and" | "AND" => Err("conditions are joined by &&".into()),
            "or" | "OR" => Err("conditions are joined by ||".into()),
            "not" | "NOT" => Err("negation is !(...)".into()),
            "length" => Err("length is followed by parentheses, as in length(@.data.items)".into()),
            _ => self.fail(at, "paths begin with @, as in @.data.amount; text stands in quotes"),
        }
    }

    fn path(&mut self) -> Parsed<Path> {
        self.at += "@".len();
        let mut steps = vec![];
        loop {
            // Blanks may stand between steps.
            let end = self.at;
            self.blanks();
            let rest = self.rest();
            if rest.starts_with("..") {
                return Err("\"..\" is not supported: name one step after the other".into());
            } else if rest.starts_with('.') {
                self.at += 1;
                steps.push(self.shorthand()?);
            } else if rest.starts_with('[') {
                self.at += 1;
                self.blanks();
                steps.push(self.in_brackets()?);
            } else {
                if rest.starts_with(continues_name) && end == self.at {
                    return Err("after @ comes a step, as in @.data or @[\"data\"]".into());
                }
                return Ok(Path(steps));
            }
        }
    }

    fn shorthand(&mut self) -> Parsed<Step> {
        let rest = self.rest();
        match rest.chars().next() {
            Some('*') => Err("\"*\" is not supported: name one step after the other".into()),
            Some(first) if begins_name(first) => {
                let length = rest.find(|character| !continues_name(character)).unwrap_or(rest.len());
                let name = rest[..length].to_owned();
                self.at += length;
                if self.rest().starts_with('-') && self.rest()[1..].starts_with(begins_name) {
                    return Err(format!("a name with \"-\" stands in brackets, as in [\"{name}-...\"]"));
                }
                if self.rest().starts_with('(') {
                    return Err("there are no methods; length goes as length(@.data.items)".into());
                }
                Ok(Step::Name(name))
            }
            Some('0'..='9') => Err("an index stands in brackets, as in @.data[0]".into()),
            _ => Err("expected a name".into()),
        }
    }

    fn in_brackets(&mut self) -> Parsed<Step> {
        let step = match self.rest().chars().next() {
            Some('"' | '\'') => Step::Name(self.string()?),
            Some('-' | '0'..='9') => self.index()?,
            Some('*') => return Err("\"*\" is not supported: name one step after the other".into()),
            Some(':') => return Err("slices are not supported: name one index".into()),
            Some('?') => return Err("filters inside a path are not supported".into()),
            _ => return Err("in brackets stands a name in quotes, or an index".into()),
        };
        self.blanks();
        match self.rest().chars().next() {
            Some(']') => {
                self.at += 1;
                Ok(step)
            }
            Some(':') => Err("slices are not supported: name one index".into()),
            Some(',') => Err("several selectors are not supported: name one".into()),
            _ => Err("expected \"]\"".into()),
        }
    }

    fn index(&mut self) -> Parsed<Step> {
        let at = self.at;
        let is_negative = self.rest().starts_with('-');
        self.at += usize::from(is_negative);
        let digits = self.digits();
        let is_canonical = digits == "0" && !is_negative || !digits.starts_with('0') && !digits.is_empty();
        match digits.parse::<u64>() {
            Ok(number @ ..=INDEX_MAX) if is_canonical => {
                Ok(Step::Index(if is_negative { -(number as i64) } else { number as i64 }))
            }
            _ => self.fail(at, "an index is a whole number such as 0 or -1"),
        }
    }

    fn digits(&mut self) -> &str {
        let begin = self.at;
        self.at += self.rest().bytes().take_while(u8::is_ascii_digit).count();
        &self.text[begin..self.at]
    }

    /// A number as JSON has it, or `-0`. One beyond a double is the largest double.
    fn number(&mut self) -> Parsed<Value> {
        let at = self.at;
        let rest = self.rest();
        let length =
            rest.bytes().take_while(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-')).count();
        let Some(number) = super::document::number(&rest[..length]) else {
            return self.fail(at, "this is no number as JSON has it");
        };
        self.advance(length);
        Ok(number)
    }

    /// A text in quotes, of either kind (RFC 9535, section 2.3.1.1).
    fn string(&mut self) -> Parsed<String> {
        let begin = self.at;
        let quote = self.rest().chars().next().expect("a string begins with its quote");
        self.at += 1;
        let mut text = String::new();
        loop {
            let Some(character) = self.rest().chars().next() else {
                return self.fail(begin, "this quote is not closed");
            };
            match character {
                _ if character == quote => {
                    self.at += 1;
                    return Ok(text);
                }
                '\\' => text.push(self.escape(quote)?),
                '\0'..='\u{1f}' => return Err("control characters in quotes are written as \\u0000".into()),
                _ => {
                    self.at += character.len_utf8();
                    text.push(character);
                }
            }
        }
    }

    fn escape(&mut self, quote: char) -> Parsed<char> {
        let escaped = self.rest().chars().nth(1);
        let character = match escaped {
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some(same @ ('/' | '\\')) => same,
            Some(same) if same == quote => same,
            Some('u') => return self.unicode_escape(),
            _ => return Err("there is no such escape".into()),
        };
        self.at += 2;
        Ok(character)
    }

    /// One `\uXXXX`, or two that are a pair of surrogates.
    fn unicode_escape(&mut self) -> Parsed<char> {
        let unit = |text: &str| {
            let digits = text.strip_prefix("\\u")?.get(..4)?;
            digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u16::from_str_radix(digits, 16).ok())?
        };
        const WRONG: &str = "\\u is followed by four hexadecimal digits, and surrogates come in pairs";
        let first = unit(self.rest()).ok_or(WRONG)?;
        let second = self.rest().get(6..).and_then(unit);
        let units = [Some(first), second.filter(|_| (0xd800..0xdc00).contains(&first))];
        let mut decoded = char::decode_utf16(units.into_iter().flatten());
        let character = decoded.next().expect("there is a first unit").map_err(|_| WRONG)?;
        self.at += 6 * character.len_utf16();
        Ok(character)
    }

    fn operator(&mut self) -> Option<Operator> {
        use Operator::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual, NotEqual};
        // The longer ones first.
        [Equal, NotEqual, LessOrEqual, GreaterOrEqual, Less, Greater]
            .into_iter()
            .find(|operator| self.eat(operator.as_str()))
    }

    /// Goes past `token`, and the blanks after it, if it comes next.
    fn eat(&mut self, token: &str) -> bool {
        let is_next = self.rest().starts_with(token);
        if is_next {
            self.advance(token.len());
        }
        is_next
    }

    fn advance(&mut self, bytes: usize) {
        self.at += bytes;
        self.blanks();
    }

    fn blanks(&mut self) {
        self.at += self.rest().bytes().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')).count();
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn fail<T>(&mut self, at: usize, message: &str) -> Parsed<T> {
        self.at = at;
        Err(message.to_owned())
    }
}
