//! What can be used and is careless all the same: told at a start, and by `tidegate check`.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path};

use super::{Config, Sources};

/// Fewer different bytes than this make no secret, however long it is.
const DIFFERENT_BYTES_MIN: usize = 8;
/// A text that repeats itself after fewer bytes than this is no longer than that.
const PERIOD_MIN: usize = 16;
/// The bits of a file's mode for all users.
const READ: u32 = 0o004;
const WRITE: u32 = 0o002;

/// One line for each thing that an operator should know of. None quotes a secret.
pub fn advice(config: &Config, sources: &Sources) -> Vec<String> {
    let jwt = &config.auth.jwt;
    let mut advice = vec![];
    if is_sent_in_the_clear(&jwt.jwks_url) {
        let why =
            "auth.jwt.jwks_url begins with http://: an attacker on the network can replace the keys and issue tokens";
        advice.push(why.to_owned());
    }
    if !jwt.secret.is_empty() && is_guessable(jwt.secret.expose()) {
        let why = "auth.jwt.secret is easily guessed: it has few different characters, counts, or repeats itself; make one \
                   by `openssl rand -base64 48`";
        advice.push(why.to_owned());
    }
    let (file, has_secrets) = (sources.file(), sources.file_has_secrets());
    let credentials = Some(&*config.nats.credentials);
    let secret = file.filter(|_| has_secrets).into_iter().chain(credentials);
    let decisive = file.into_iter().chain(credentials).chain([&*jwt.key_file, &*jwt.jwks_file]);
    advice.extend(open_to_all(secret, READ).map(|file| format!("{file} has secrets, and every user can read it")));
    advice.extend(open_to_all(decisive, WRITE).map(|file| format!("every user can write {file}")));
    advice
}

fn open_to_all<'a>(files: impl Iterator<Item = &'a Path>, bit: u32) -> impl Iterator<Item = String> {
    let files: BTreeSet<_> = files.collect();
    let is_open = move |file: &Path| fs::metadata(file).is_ok_and(|file| file.permissions().mode() & bit != 0);
    files.into_iter().filter(move |file| is_open(file)).map(|file| file.display().to_string())
}

/// Whether keys come over a network on which others may be.
fn is_sent_in_the_clear(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("http://") else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    let is_loopback = name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback());
    !is_loopback
}

/// Whether a secret of the right length was made by a person at the keyboard rather than by chance.
fn is_guessable(secret: &[u8]) -> bool {
    let different = secret.iter().collect::<BTreeSet<_>>().len();
    let repeats =
        (1..PERIOD_MIN).any(|period| secret.iter().zip(&secret[period.min(secret.len())..]).all(|(a, b)| a == b));
    let steps = secret.windows(2).filter(|pair| pair[1].abs_diff(pair[0]) <= 1).count();
    different < DIFFERENT_BYTES_MIN || repeats || steps * 2 > secret.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_was_not_made_by_chance_is_told() {
        for bad in [
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "0123456789012345678901234567890123456789",
            "abcdefghijklmnopqrstuvwxyz012345",
            "secretsecretsecretsecretsecretsecret",
            "00000000000000000000000000000001",
            "112233445566778899001122334455667788",
        ] {
            assert!(is_guessable(bad.as_bytes()), "{bad}");
        }
        for good in [
            "Zm9yIGEgbG9uZyB0aW1lIEkgdXNlZCB0byBnbyB0byBiZWQgZWFybHku",
            "a3f1c09b7e5d2468a1b0c9d8e7f6a5b4c3d2e1f0",
            "correct horse battery staple, as it is said",
        ] {
            assert!(!is_guessable(good.as_bytes()), "{good}");
        }
    }

    #[test]
    fn keys_that_come_in_the_clear_are_told() {
        for (url, told) in [
            ("", false),
            ("https://id.example.com/jwks", false),
            ("http://id.example.com/jwks", true),
            ("http://user:pass@id.example.com:80", true),
            ("http://127.0.0.1:8080/jwks", false),
            ("http://localhost/jwks", false),
            ("http://[::1]:80/jwks", false),
            ("http://127.0.0.1.example.com/", true),
            ("http://127.0.0.1@example.com/", true),
        ] {
            assert_eq!(is_sent_in_the_clear(url), told, "{url}");
        }
    }
}
