//! `where=` says what RFC 9535 says: held against its compliance suite, and against another implementation.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tidegate::sieve::{Condition, WHERE_BYTES_MAX};

/// What is refused though it is an expression: see docs/src/subscribing.md.
const LEFT_OUT: [&str; 4] = ["not supported", "begin with @", "where has at most", "in brackets stands a name"];

/// What the other implementation takes though the grammar (RFC 9535, section 2.3.5.1) does not have it: `!!@.a`, `!@.a == 1`,
/// `1 < 2 < 3`, `(@.a) == 1`, `(0)`, `-01`.
const NOT_IN_THE_GRAMMAR: [&str; 5] =
    ["! goes", "has to be compared", "two sides", "can't be compared", "this is no number"];

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/clients/api")
}

fn is_left_out(refusal: &str) -> bool {
    LEFT_OUT.iter().any(|words| refusal.contains(words))
}

#[test]
fn the_compliance_suite_is_passed_as_far_as_it_is_about_conditions() {
    let suite = "node_modules/jsonpath-rfc9535/src/__tests__/jsonpath-compliance-test-suite/cts.json";
    let suite = std::fs::read(tools().join(suite)).expect("tests/install brings it");
    let suite: Value = serde_json::from_slice(&suite).unwrap();
    let (mut evaluated, mut refused, mut left_out) = (0, 0, 0);
    for case in suite["tests"].as_array().unwrap() {
        let selector = case["selector"].as_str().unwrap();
        let Some(expression) = selector.strip_prefix("$[?").and_then(|rest| rest.strip_suffix(']')) else { continue };
        let parsed = Condition::parse(expression);
        let name = &case["name"];
        match (parsed, case["invalid_selector"] == json!(true)) {
            (Ok(_), true) => panic!("{name}: {selector} is no expression"),
            (Err(_), true) => refused += 1,
            // The path goes on behind the filter, or there are several selectors.
            (Err(_), false) if name.as_str().is_some_and(|name| name.contains("followed by")) => left_out += 1,
            (Err(_), false) if name.as_str().is_some_and(|name| name.contains("multiple selectors")) => left_out += 1,
            (Err(error), false) if is_left_out(&error.to_string()) => left_out += 1,
            (Err(error), false) => panic!("{name}: {error}"),
            (Ok(condition), false) => {
                let document = &case["document"];
                let children: Vec<_> = match document {
                    Value::Array(items) => items.iter().collect(),
                    Value::Object(members) => members.values().collect(),
                    _ => vec![],
                };
                let mut found: Vec<_> = children.into_iter().filter(|child| condition.holds(*child)).cloned().collect();
                let results = case["results"].as_array().cloned().unwrap_or_else(|| vec![case["result"].clone()]);
                // Members of an object are in no order.
                let sort = |values: &mut Vec<Value>| values.sort_by_key(ToString::to_string);
                sort(&mut found);
                let is_one = results.into_iter().any(|result| {
                    let mut result = result.as_array().unwrap().clone();
                    sort(&mut result);
                    result == found
                });
                assert!(is_one, "{name}: {selector} finds {found:?} in {document}");
                evaluated += 1;
            }
        }
    }
    println!("{evaluated} cases evaluated, {refused} refused as they should be, {left_out} left out");
    assert!(evaluated >= 150 && refused >= 60, "{evaluated} evaluated, {refused} refused");
}

fn pick<'t>(dice: &mut StdRng, from: &[&'t str]) -> &'t str {
    from[dice.random_range(0..from.len())]
}

fn path(dice: &mut StdRng) -> String {
    let steps = (0..dice.random_range(0..4)).map(|_| {
        let bracketed = ["['a']", "[\"b\"]", "['a b']", "[0]", "[1]", "[-1]", "[-2]", "['é']", "[ 'a' ]", " [0]"];
        if dice.random() { pick(dice, &[".a", ".b", ".c", ".é", "._"]) } else { pick(dice, &bracketed) }
    });
    "@".to_owned() + &steps.collect::<String>()
}

fn literal(dice: &mut StdRng) -> String {
    let literals = [
        "0",
        "-0",
        "1",
        "1.0",
        "-1",
        "2",
        "100",
        "1.5",
        "9007199254740991",
        "'a'",
        "\"a\"",
        "''",
        "'b'",
        "'é'",
        "\"\\u00e9\"",
        "'\\ud83e\\udd80'",
        "'it\\'s'",
        "true",
        "false",
        "null",
    ];
    pick(dice, &literals).to_owned()
}

fn operand(dice: &mut StdRng) -> String {
    match dice.random_range(0..10) {
        0..=4 => path(dice),
        5..=8 => literal(dice),
        _ => format!("length({})", if dice.random() { path(dice) } else { literal(dice) }),
    }
}

fn condition(dice: &mut StdRng, depth: usize) -> String {
    let blank = pick(dice, &["", "", " ", "  "]);
    match dice.random_range(0..10) {
        0 | 1 if depth > 0 => {
            let by = pick(dice, &["&&", "||"]);
            format!("{}{blank}{by}{blank}{}", condition(dice, depth - 1), condition(dice, depth - 1))
        }
        2 if depth > 0 => format!("({blank}{}{blank})", condition(dice, depth - 1)),
        3 if depth > 0 => format!("!({})", condition(dice, depth - 1)),
        4 => format!("!{}", path(dice)),
        5 => path(dice),
        _ => {
            let operator = pick(dice, &["==", "!=", "<", "<=", ">", ">="]);
            format!("{}{blank}{operator}{blank}{}", operand(dice), operand(dice))
        }
    }
}

/// The same with a character too many, too few, or another one.
fn damaged(dice: &mut StdRng, text: &str) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    let at = dice.random_range(0..characters.len());
    let piece = pick(
        dice,
        &["(", ")", "[", "]", "'", "\"", "@", ".", "!", "=", "&", "|", "<", "0", "a", " ", "\\", "*", ",", "-"],
    );
    match dice.random_range(0..3) {
        0 => drop(characters.remove(at)),
        1 => characters[at] = piece.chars().next().unwrap(),
        _ => characters.insert(at, piece.chars().next().unwrap()),
    }
    characters.into_iter().collect()
}

fn value(dice: &mut StdRng, depth: usize) -> Value {
    match dice.random_range(0..if depth > 0 { 12 } else { 8 }) {
        0 => json!(null),
        1 => json!(dice.random::<bool>()),
        2 => json!(dice.random_range(-2..3)),
        3 => [json!(1.0), json!(1.5), json!(100.0), json!(9_007_199_254_740_991_u64)][dice.random_range(0..4)].clone(),
        4..=7 => json!(pick(dice, &["a", "b", "", "é", "🦀", "it's", "1"])),
        8 | 9 => (0..dice.random_range(0..4)).map(|_| value(dice, depth - 1)).collect(),
        _ => {
            let names = ["a", "b", "c", "é", "_", "a b"];
            (0..dice.random_range(0..4)).map(|_| (pick(dice, &names).to_owned(), value(dice, depth - 1))).collect()
        }
    }
}

/// What Python's implementation says of each: whether it holds, or null where it is no expression.
fn asked_elsewhere(cases: &[(String, Value)]) -> Vec<Option<bool>> {
    const SCRIPT: &str = "
import json, sys
import jsonpath_rfc9535
for line in sys.stdin:
    expression, document = json.loads(line)
    try:
        print(json.dumps(len(jsonpath_rfc9535.find('$[?' + expression + ']', [document])) > 0))
    except jsonpath_rfc9535.JSONPathError:
        print('null')
";
    let mut python = Command::new(tools().join("bin/python"))
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("tests/install brings it");
    let mut stdin = python.stdin.take().expect("it is piped");
    let lines: String =
        cases.iter().map(|(expression, document)| format!("{}\n", json!([expression, document]))).collect();
    let writing = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = python.wait_with_output().expect("it ends");
    writing.join().unwrap().expect("it reads all");
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn another_implementation_agrees() {
    let cases = std::env::var("FUZZ_CASES").map_or(2_000, |cases| cases.parse().expect("FUZZ_CASES is a number"));
    let mut dice = StdRng::seed_from_u64(rand::random());
    let mut generated = vec![];
    while generated.len() < cases {
        let mut expression = condition(&mut dice, 3);
        if dice.random_ratio(1, 3) {
            expression = damaged(&mut dice, &expression);
        }
        // More selectors than one, or a path that goes on, is not what stands in where.
        if expression.len() <= WHERE_BYTES_MAX && !expression.contains(',') {
            // (That one takes `!@` of a value such as 0 for true.)
            let document = [json!([]), json!({ "a": value(&mut dice, 2) }), value(&mut dice, 3)];
            let document = document.into_iter().rev().find(|value| value.is_array() || value.is_object());
            generated.push((expression, document.expect("the first is one")));
        }
    }
    let elsewhere = asked_elsewhere(&generated);
    assert_eq!(elsewhere.len(), generated.len());
    let (mut held, mut refused) = (0, 0);
    for ((expression, document), elsewhere) in generated.iter().zip(elsewhere) {
        match (Condition::parse(expression), elsewhere) {
            (Ok(condition), Some(holds)) => {
                assert_eq!(condition.holds(document), holds, "{expression} of {document}");
                held += usize::from(holds);
            }
            (Err(_), None) => refused += 1,
            (Err(error), Some(_)) => {
                let refusal = error.to_string();
                assert!(
                    is_left_out(&refusal) || NOT_IN_THE_GRAMMAR.iter().any(|words| refusal.contains(words)),
                    "{error}"
                );
            }
            (Ok(_), None) => panic!("refused elsewhere: {expression}"),
        }
    }
    println!("{cases} cases, of which {held} hold and {refused} are refused by both");
    assert!(held > cases / 20 && refused > cases / 20, "{held} hold, {refused} are refused");
}
