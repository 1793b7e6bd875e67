//! Keys for backends: 256 random bits, of which the gateway knows only the SHA-256.
//!
//! One round of a fast hash is enough, because there is nothing to guess: slow, salted hashes protect passwords, which
//! people choose. Comparing hashes tells nothing about keys, and is done in constant time all the same.

use std::{fmt, sync::Arc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::{Principal, Refusal, StartError};
use crate::config::{self, Rights};

/// What every key begins with, so that one that leaked is recognised for what it is.
const PREFIX: &str = "tgk_";
/// What every hash in the configuration begins with.
const HASH_PREFIX: &str = "sha256:";

type Hash = [u8; 32];

/// The configured API keys.
pub(super) struct ApiKeys(Vec<ApiKey>);

struct ApiKey {
    name: Arc<str>,
    hash: Hash,
    rights: Arc<Rights>,
}

impl ApiKeys {
    pub(super) fn read(config: &[config::ApiKey]) -> Result<ApiKeys, StartError> {
        let mut keys: Vec<ApiKey> = vec![];
        for config::ApiKey { name, hash, subscribe, publish } in config {
            let wrong = |why| StartError::ApiKey(name.clone(), why);
            let hash = parse_hash(hash).ok_or(wrong("its hash is not one that `tidegate key new` printed"))?;
            if keys.iter().any(|other| *other.name == **name || other.hash == hash) {
                return Err(wrong("another key has the same name or hash"));
            }
            let rights = Rights { subscribe: subscribe.clone(), publish: publish.clone() };
            keys.push(ApiKey { name: name.as_str().into(), hash, rights: rights.into() });
        }
        Ok(ApiKeys(keys))
    }

    /// Whether a credential means to be a key.
    pub(super) fn is_key(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// The principal of this API key. Takes the same time for every key, known or not.
    pub(super) fn find(&self, text: &str) -> Result<Principal, Refusal> {
        let hash = hash(text);
        let mut found = u32::MAX;
        for (number, key) in (0..).zip(&self.0) {
            let is_it: Choice = key.hash.ct_eq(&hash);
            found.conditional_assign(&number, is_it);
        }
        match self.0.get(found as usize) {
            Some(key) => Ok(Principal::of_key(&key.name, &key.rights)),
            None => Err(Refusal::Invalid("this API key is not known".into())),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A key that has just been made; shown once.
pub struct NewKey {
    key: String,
    name: String,
    rights: Rights,
}

impl NewKey {
    /// Makes a key out of the operating system's randomness.
    pub fn make(name: String, rights: Rights) -> NewKey {
        let mut bits = [0; 32];
        rand::rng().fill_bytes(&mut bits);
        NewKey { key: format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bits)), name, rights }
    }
}

/// The key, and what to put into the configuration.
impl fmt::Display for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NewKey { key, name, rights } = self;
        let hash = hash(key).map(|byte| format!("{byte:02x}")).concat();
        writeln!(f, "{key}\n")?;
        writeln!(f, "# This key is not shown again. For the configuration:")?;
        writeln!(f, "[[auth.keys]]\nname = {}\nhash = \"{HASH_PREFIX}{hash}\"", serde_json::Value::from(&**name))?;
        write!(f, "subscribe = {:?}\npublish = {:?}", rights.subscribe, rights.publish)
    }
}

fn hash(key: &str) -> Hash {
    Sha256::digest(key).into()
}

fn parse_hash(text: &str) -> Option<Hash> {
    let digits = text.strip_prefix(HASH_PREFIX).filter(|digits| digits.len() == 64 && digits.is_ascii())?;
    let mut hash = [0; 32];
    for (byte, at) in hash.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    Some(hash)
}
