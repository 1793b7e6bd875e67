//! Keys that verify tokens, each with the algorithms that it is for.
//!
//! Invariant: what a token says of its algorithm chooses nothing. It must name one that its key is for, so that a public
//! key is never taken for a secret, and `none` is no algorithm at all.

use std::{fs, path::Path};

use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind, Header, Validation, crypto,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse},
};
use serde::Deserialize;
use serde_json::Value;

use super::StartError;
use crate::config::Jwt;

/// Shorter secrets can be guessed offline by anyone with one token (RFC 7518, section 3.2).
pub(super) const SECRET_BYTES_MIN: usize = 32;
/// A shorter RSA modulus (2,048 bits) is not safe any more (RFC 7518, section 3.3).
const RSA_BYTES_MIN: usize = 256;

/// A key, and how tokens are validated with it.
pub(super) struct Key {
    /// Its `kid`, in a set.
    id: Option<String>,
    pub decoding: DecodingKey,
    pub validation: Validation,
}

/// Why a text is no key that tokens could be verified with.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeyError {
    #[error("a secret has at least {SECRET_BYTES_MIN} bytes, this one has {0}")]
    ShortSecret(usize),
    #[error("an RSA key has at least 2048 bits")]
    ShortRsa,
    #[error("this is a private key: the gateway needs, and should have, only the public one")]
    Private,
    #[error("this is no public key (RSA, EC P-256 or P-384, Ed25519) in PEM")]
    NotPem,
    #[error("this is no JWKS: {0}")]
    NotJwks(serde_json::Error),
    #[error("there is no key in it that tokens can be verified with (RSA, EC P-256 or P-384, Ed25519)")]
    NoKey,
}

impl Key {
    /// Whether a token with this header may have been signed with this key.
    pub(super) fn fits(&self, header: &Header) -> bool {
        self.has_id_of(header) && self.validation.algorithms.contains(&header.alg)
    }

    /// Whether the token's `kid` is this key's. Those that are not from a set have none, nor need tokens have.
    pub(super) fn has_id_of(&self, header: &Header) -> bool {
        match (&self.id, &header.kid) {
            (Some(ours), Some(theirs)) => ours == theirs,
            (None, _) | (_, None) => true,
        }
    }

    /// Whether the token names this very key by its `kid`.
    pub(super) fn is_named_by(&self, header: &Header) -> bool {
        self.id.is_some() && self.id == header.kid
    }

    fn new(id: Option<String>, decoding: DecodingKey, algorithms: Vec<Algorithm>, rules: &Validation) -> Option<Key> {
        // An error here is not a wrong signature, but a key that could never verify one.
        let try_out = |algorithm: &Algorithm| crypto::verify("", b"", &decoding, *algorithm).is_ok();
        let usable = !algorithms.is_empty() && algorithms.iter().all(try_out);
        usable.then(|| Key { id, decoding, validation: Validation { algorithms, ..rules.clone() } })
    }
}

/// The keys that the configuration names, but for those behind a URL.
pub(super) fn configured(config: &Jwt, rules: &Validation) -> Result<Vec<Key>, StartError> {
    let mut keys = vec![];
    if !config.secret.is_empty() {
        let key = from_secret(config.secret.expose(), rules);
        keys.push(key.map_err(|error| StartError::Key("auth.jwt.secret", error.to_string()))?);
    }
    if let Some(text) = read("auth.jwt.key_file", &config.key_file)? {
        let key = from_pem(&text, rules);
        keys.push(key.map_err(|error| StartError::Key("auth.jwt.key_file", error.to_string()))?);
    }
    if let Some(text) = read("auth.jwt.jwks_file", &config.jwks_file)? {
        let set = from_jwks(&text, config.jwks_keys, rules);
        keys.extend(set.map_err(|error| StartError::Key("auth.jwt.jwks_file", error.to_string()))?);
    }
    Ok(keys)
}

fn read(key: &'static str, file: &Path) -> Result<Option<Vec<u8>>, StartError> {
    if file.as_os_str().is_empty() {
        return Ok(None);
    }
    let unreadable = |source| StartError::Unreadable { key, file: file.to_owned(), source };
    fs::read(file).map(Some).map_err(unreadable)
}

fn from_secret(secret: &[u8], rules: &Validation) -> Result<Key, KeyError> {
    if secret.len() < SECRET_BYTES_MIN {
        return Err(KeyError::ShortSecret(secret.len()));
    }
    let algorithms = AlgorithmFamily::Hmac.algorithms().to_vec();
    Ok(Key::new(None, DecodingKey::from_secret(secret), algorithms, rules).expect("any bytes are a secret"))
}

fn from_pem(pem: &[u8], rules: &Validation) -> Result<Key, KeyError> {
    let text = String::from_utf8_lossy(pem);
    if text.contains("PRIVATE KEY-----") {
        return Err(KeyError::Private);
    }
    if !text.contains("PUBLIC KEY-----") {
        return Err(KeyError::NotPem);
    }
    let tries = [DecodingKey::from_rsa_pem, DecodingKey::from_ec_pem, DecodingKey::from_ed_pem];
    let decoding = tries.iter().find_map(|from_pem| from_pem(pem).ok()).ok_or(KeyError::NotPem)?;
    let bytes = decoding.try_get_as_bytes().map_err(|_| KeyError::NotPem)?.len();
    let algorithms = match decoding.family() {
        // As DER, a modulus of 2,048 bits and an exponent are a little more than this, and one of 1,024 bits half.
        AlgorithmFamily::Rsa if bytes < RSA_BYTES_MIN => return Err(KeyError::ShortRsa),
        family @ (AlgorithmFamily::Rsa | AlgorithmFamily::Ed) => family.algorithms().to_vec(),
        AlgorithmFamily::Ec => match bytes {
            // A point: one byte, and two coordinates.
            65 => vec![Algorithm::ES256],
            97 => vec![Algorithm::ES384],
            _ => return Err(KeyError::NotPem),
        },
        AlgorithmFamily::Hmac => return Err(KeyError::NotPem),
    };
    Key::new(None, decoding, algorithms, rules).ok_or(KeyError::NotPem)
}

/// The keys of a set that tokens can be verified with, at most so many. Others (for encryption, of other kinds, and
/// secrets, which don't belong there) are passed over, as RFC 7517, section 5, has it.
pub(super) fn from_jwks(text: &[u8], keys_max: usize, rules: &Validation) -> Result<Vec<Key>, KeyError> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(text).map_err(KeyError::NotJwks)?;
    let jwks = set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok());
    let keys: Vec<_> = jwks.filter_map(|jwk| from_jwk(&jwk, rules)).take(keys_max).collect();
    if keys.is_empty() { Err(KeyError::NoKey) } else { Ok(keys) }
}

fn from_jwk(jwk: &Jwk, rules: &Validation) -> Option<Key> {
    let common = &jwk.common;
    let for_signatures = common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature)
        && common.key_operations.as_ref().is_none_or(|operations| operations.contains(&KeyOperations::Verify));
    if !for_signatures {
        return None;
    }
    let decoding = DecodingKey::from_jwk(jwk).ok()?;
    let mut algorithms = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) if rsa_bytes(&decoding) >= RSA_BYTES_MIN => {
            AlgorithmFamily::Rsa.algorithms().to_vec()
        }
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => vec![Algorithm::ES256],
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => vec![Algorithm::ES384],
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => vec![Algorithm::EdDSA],
        _ => return None,
    };
    if let Some(algorithm) = common.key_algorithm {
        algorithms.retain(|possible| algorithm == (*possible).into());
    }
    Key::new(common.key_id.clone(), decoding, algorithms, rules)
}

fn rsa_bytes(key: &DecodingKey) -> usize {
    match key.kind() {
        DecodingKeyKind::RsaModulusExponent { n, .. } => n.iter().skip_while(|byte| **byte == 0).count(),
        DecodingKeyKind::SecretOrDer(_) => 0,
    }
}
