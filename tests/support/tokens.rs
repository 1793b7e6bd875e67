//! Tokens as an issuer makes them, and as an attacker does: with any header, any claims, any key.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, crypto, jwk::Jwk};
use serde_json::{Value, json};

pub const SECRET: &str = "a secret of thirty-two bytes or so";

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than that").as_secs()
}

/// A token with these claims and, unless they name one, an `exp` in an hour, signed with [`SECRET`].
pub fn token(claims: Value) -> String {
    let mut claims = claims;
    if claims.get("exp").is_none() {
        claims["exp"] = json!(now() + 3600);
    }
    forge(json!({"alg": "HS256"}), claims, &EncodingKey::from_secret(SECRET.as_bytes()), Algorithm::HS256)
}

/// A token that may read these filters.
pub fn reader(filters: &[&str]) -> String {
    token(json!({ "sub": "ann", "tidegate": { "subscribe": filters } }))
}

/// Any header and claims, signed by this key in this way, whatever the header says.
pub fn forge(header: Value, claims: Value, key: &EncodingKey, algorithm: Algorithm) -> String {
    let message = unsigned(&header, &claims);
    let signature = crypto::sign(message.as_bytes(), key, algorithm).expect("the key is for it");
    format!("{message}.{signature}")
}

/// The first two parts of a token.
pub fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// A pair of keys that openssl has made.
pub struct KeyPair {
    directory: PathBuf,
    pub algorithm: Algorithm,
}

impl KeyPair {
    pub fn make(algorithm: Algorithm) -> KeyPair {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("tidegate-keys-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory can be made");
        let pair = KeyPair { directory, algorithm };
        let kind: &[&str] = match algorithm {
            Algorithm::ES256 => &["EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            Algorithm::ES384 => &["EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
            Algorithm::EdDSA => &["ED25519"],
            _ => &["RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        };
        openssl(&[&["genpkey", "-out", path(&pair.private_file()), "-algorithm"], kind].concat());
        openssl(&["pkey", "-in", path(&pair.private_file()), "-pubout", "-out", path(&pair.public_file())]);
        pair
    }

    pub fn public_file(&self) -> PathBuf {
        self.directory.join("public.pem")
    }

    pub fn private_file(&self) -> PathBuf {
        self.directory.join("private.pem")
    }

    pub fn public_pem(&self) -> Vec<u8> {
        fs::read(self.public_file()).expect("openssl has made it")
    }

    pub fn signing(&self) -> EncodingKey {
        let pem = fs::read(self.private_file()).expect("openssl has made it");
        let key = match self.algorithm {
            Algorithm::ES256 | Algorithm::ES384 => EncodingKey::from_ec_pem(&pem),
            Algorithm::EdDSA => EncodingKey::from_ed_pem(&pem),
            _ => EncodingKey::from_rsa_pem(&pem),
        };
        key.expect("a key as openssl writes it")
    }

    /// A token of ann's, who may read `demo`.
    pub fn token(&self, kid: Option<&str>) -> String {
        self.token_by(self.algorithm, kid)
    }

    /// The same, signed in another way that this key is for.
    pub fn token_by(&self, algorithm: Algorithm, kid: Option<&str>) -> String {
        let mut header = json!({ "alg": algorithm });
        if let Some(kid) = kid {
            header["kid"] = kid.into();
        }
        let claims = json!({ "sub": "ann", "exp": now() + 3600, "tidegate": { "subscribe": ["demo"] } });
        forge(header, claims, &self.signing(), algorithm)
    }

    /// The public key as a member of a JWKS.
    pub fn jwk(&self, kid: &str) -> Value {
        let jwk = Jwk::from_encoding_key(&self.signing(), self.algorithm).expect("its public part is known");
        let mut jwk = serde_json::to_value(jwk).expect("it is JSON");
        jwk["kid"] = kid.into();
        jwk
    }
}

impl Drop for KeyPair {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

fn openssl(arguments: &[&str]) {
    let done = Command::new("openssl").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(done.expect("openssl is installed").success(), "openssl {arguments:?}");
}
