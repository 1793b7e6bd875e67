//! docs/src/clients.md has the code that was run, and the versions.

use std::{collections::BTreeMap, fs, path::Path};

use super::drivers::CLIENTS;

const PROGRAMS: &[&str] =
    &["page.mjs", "node.mjs", "python.py", "go/main.go", "rust/src/main.rs", "java/Clients.java", "curl.sh"];

/// Where versions are named: for installing, and for building.
const PINS: [&str; 4] =
    ["tests/install", "tests/clients/go/go.mod", "tests/clients/rust/Cargo.lock", "tests/clients/java/pom.xml"];

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What stands between `docs: NAME` and `docs end` in the programs, without the indentation that all of it has.
fn snippets() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for program in PROGRAMS {
        let text = read(&format!("tests/clients/{program}"));
        let mut rest = &*text;
        while let Some((_, from)) = rest.split_once(" docs: ") {
            let (name, from) = from.split_once('\n').expect("a line has an end");
            let (snippet, after) = from.split_once("docs end").expect("a snippet has an end");
            let lines: Vec<_> = snippet.lines().collect();
            let lines = &lines[..lines.len() - 1];
            let indentation = |line: &&str| line.len() - line.trim_start().len();
            let common = lines.iter().filter(|line| !line.trim().is_empty()).map(indentation).min().unwrap_or(0);
            let lines = lines.iter().map(|line| line.get(common..).unwrap_or("").to_owned() + "\n");
            assert!(found.insert(name.to_owned(), lines.collect()).is_none(), "two snippets are called {name}");
            rest = after;
        }
    }
    assert!(found.len() > 10, "the snippets are looked for in the wrong place");
    found
}

#[test]
fn the_docs_show_the_code_that_was_run() {
    let docs = read("docs/src/clients.md");
    let missing: Vec<_> =
        snippets().into_iter().filter(|(_, snippet)| !docs.contains(&format!("\n{snippet}```\n"))).collect();
    assert!(missing.is_empty(), "docs/src/clients.md does not have, as it is: {missing:#?}");
}

/// A row of the table begins with a client's name and its version.
#[test]
fn the_docs_tell_of_each_client_and_its_version() {
    let docs = read("docs/src/clients.md");
    let rows: Vec<Vec<_>> = docs
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    let told = |name: &str| rows.iter().any(|row| row[1].replace('`', "") == name);
    let untold: Vec<_> = CLIENTS.iter().map(|client| client.name).filter(|name| !told(name)).collect();
    assert!(untold.is_empty(), "the table in docs/src/clients.md lacks {untold:?}");

    let pins = PINS.map(read).concat();
    let versions = rows.iter().map(|row| row[2]).filter(|version| version.split('.').count() == 3);
    let unknown: Vec<_> = versions
        .filter(|version| version.split('.').all(|part| part.parse::<u32>().is_ok()) && !pins.contains(version))
        .collect();
    assert!(unknown.is_empty(), "nothing installs {unknown:?}");
}
