//! The identity of a user, and the key that proves it: a `.creds` file, as made by nsc or nats.

use std::{fmt, path::Path, sync::Arc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;

#[derive(Clone)]
pub struct Credentials {
    pub jwt: String,
    key: Arc<KeyPair>,
}

impl Credentials {
    /// # Errors
    /// Why the file can't be used.
    pub fn read(path: &Path) -> Result<Credentials, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        Credentials::parse(&text).ok_or_else(|| "it has no JWT and seed of a user".to_owned())
    }

    /// Each of the two stands after a line of its own.
    fn parse(text: &str) -> Option<Credentials> {
        let mut lines = text.lines().map(str::trim);
        let mut next = || {
            lines.find(|line| line.starts_with("---") && line.contains("BEGIN"))?;
            lines.next()
        };
        let (jwt, seed) = (next()?, next()?);
        Some(Credentials { jwt: jwt.to_owned(), key: Arc::new(KeyPair::from_seed(seed).ok()?) })
    }

    /// The signature of what a server gave to be signed.
    pub fn sign(&self, nonce: &[u8]) -> Option<Vec<u8>> {
        self.key.sign(nonce).ok()
    }

    /// The same as it is written into CONNECT.
    pub(super) fn signature(&self, nonce: &str) -> Option<String> {
        self.sign(nonce.as_bytes()).map(|bytes| URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}
