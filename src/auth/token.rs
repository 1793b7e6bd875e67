//! Tokens (RFC 7519): which are good, and what their bearers may do. And makes some, for development.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use jiff::Timestamp;
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, EncodingKey, Header, Validation, decode, decode_header, errors::ErrorKind,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    Principal, Refusal, StartError,
    jwks::{Known, RemoteKeys},
    key::{self, Key, SECRET_BYTES_MIN},
    policy::Template,
};
use crate::{
    config::{self, Rights},
    metrics::Metrics,
    shutdown::Tasks,
    subject::Filter,
};

type Claims = Map<String, Value>;

/// Keys that a token without a `kid` is tried with.
const KEYS_TRIED_MAX: usize = 4;
/// A token may be issued so long from now, whatever `auth.jwt.leeway` says: clocks are never quite the same.
const CLOCKS_APART: Duration = Duration::from_secs(10);
/// 64 bits tell the tokens of one day apart.
const TOKEN_HASH_DIGITS: usize = 16;

/// Verifies tokens.
pub(super) struct Tokens {
    keys: Vec<Key>,
    remote: Option<RemoteKeys>,
    subscribe: Vec<Template>,
    publish: Vec<Template>,
    token_bytes: usize,
    filters_max: usize,
    leeway: Duration,
    lifetime: Duration,
    takes_audience: bool,
}

impl Tokens {
    pub(super) async fn start(
        config: &config::Auth,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Result<Tokens, StartError> {
        let config::Auth { policy, jwt, .. } = config;
        let rules = rules(jwt);
        let keys = key::configured(jwt, &rules)?;
        let templates =
            |texts: &[String]| texts.iter().map(|text| Template::parse(text)).collect::<Result<Vec<_>, _>>();
        let (subscribe, publish) = (templates(&policy.subscribe)?, templates(&policy.publish)?);
        let remote = match jwt.jwks_url.is_empty() {
            true => None,
            false => Some(RemoteKeys::start(jwt, rules, metrics, tasks).await),
        };
        Ok(Tokens {
            keys,
            remote,
            subscribe,
            publish,
            token_bytes: config.token_bytes,
            filters_max: config.filters,
            leeway: jwt.leeway,
            lifetime: jwt.lifetime,
            takes_audience: !jwt.audience.is_empty(),
        })
    }

    /// The keys that were read from a URL last.
    pub(super) fn published(&self) -> Option<Weak<[Key]>> {
        self.remote.as_ref().map(|remote| Arc::downgrade(&remote.known().keys))
    }

    /// The principal of this token.
    pub(super) async fn verify(&self, token: &str) -> Result<Principal, Refusal> {
        if token.len() > self.token_bytes {
            return Err(invalid("the token is too long"));
        }
        let header = decode_header(token).map_err(explain)?;
        if header.crit.is_some() {
            return Err(invalid("the token demands extensions (crit), of which there are none here"));
        }
        let claims = self.claims(token, &header).await?;
        let expires = self.check_times(&claims)?;
        if !self.takes_audience && claims.contains_key("aud") {
            return Err(invalid("the token is for another audience (aud)"));
        }
        let rights = self.rights(&claims)?;
        Ok(Principal::of_token(&name(token, &claims), rights, expires))
    }

    async fn claims(&self, token: &str, header: &Header) -> Result<Claims, Refusal> {
        // There are no secrets among published keys.
        let remote = self.remote.as_ref().filter(|_| header.alg.family() != AlgorithmFamily::Hmac);
        let Some(remote) = remote else { return try_keys(&candidates(&self.keys, &[], header)?, token, header) };
        let known = remote.known();
        let tried = try_keys(&candidates(&self.keys, &known.keys, header)?, token, header);
        let is_known = |known: &Known| known.keys.iter().any(|key| key.has_id_of(header));
        let is_named = self.keys.iter().any(|key| key.is_named_by(header));
        if tried.is_ok() || is_named || is_known(&known) {
            return tried;
        }
        let known = remote.refreshed().await;
        match is_known(&known) {
            true => try_keys(&candidates(&[], &known.keys, header)?, token, header),
            false if known.failed => Err(Refusal::KeysAway),
            false => tried,
        }
    }

    /// When the token ends: its `exp`, which it must have, and what clocks may be apart.
    fn check_times(&self, claims: &Claims) -> Result<Timestamp, Refusal> {
        let whole =
            |name: &str| claims.get(name).map(|value| value.as_i64().ok_or_else(|| not_whole(name))).transpose();
        let expires = whole("exp")?.ok_or_else(|| invalid("the token has no exp"))?;
        let now = Timestamp::now().as_second();
        let longest = |from: i64| from.saturating_add_unsigned(self.lifetime.as_secs());
        let leeway = self.leeway.as_secs();
        let ends = expires.saturating_add_unsigned(leeway);
        if ends <= now {
            return Err(invalid("the token has expired"));
        }
        let too_long = |from: i64| expires > longest(from).saturating_add_unsigned(leeway);
        let issued = claims.get("iat").map(|iat| iat.as_f64().ok_or_else(|| invalid("the token's iat is no time")));
        let issued = issued.transpose()?.map_or(now, |iat| iat as i64);
        if issued > now.saturating_add_unsigned(leeway.max(CLOCKS_APART.as_secs())) {
            return Err(invalid("the token is issued in the future (iat)"));
        }
        if too_long(now) || too_long(issued) {
            return Err(invalid("the token lives too long"));
        }
        Timestamp::from_second(ends).map_err(|_| not_whole("exp"))
    }

    /// What the token's own claim names, and what the policies give to these claims.
    fn rights(&self, claims: &Claims) -> Result<Rights, Refusal> {
        #[derive(Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        struct Named {
            subscribe: Vec<String>,
            publish: Vec<String>,
        }
        let named = match claims.get("tidegate") {
            None => Named::default(),
            // A list would be taken for the fields in their order.
            Some(claim) => claim.as_object().and_then(|claim| Named::deserialize(claim).ok()).ok_or_else(|| {
                invalid(r#"the token's claim "tidegate" is {"subscribe": [filters], "publish": [filters]}"#)
            })?,
        };
        let join = |named: Vec<String>, templates: &[Template]| {
            if named.len() > self.filters_max {
                return Err(invalid("the token names too many filters"));
            }
            let named = named.iter().map(|text| {
                Filter::parse(text).map_err(|error| Refusal::Invalid(format!("the token names a filter: {error}")))
            });
            named.chain(templates.iter().filter_map(|template| template.fill(claims)).map(Ok)).collect()
        };
        Ok(Rights { subscribe: join(named.subscribe, &self.subscribe)?, publish: join(named.publish, &self.publish)? })
    }
}

/// What holds for every token, whatever its key. Its times are looked at by [`Tokens::check_times`], too, which is
/// stricter.
fn rules(config: &config::Jwt) -> Validation {
    let mut rules = Validation { leeway: config.leeway.as_secs(), validate_nbf: true, ..Validation::default() };
    let mut required = vec!["exp"];
    if !config.issuer.is_empty() {
        rules.set_issuer(&config.issuer);
        required.push("iss");
    }
    // Without one, a token for any audience is for another (RFC 7519, section 4.1.3).
    if !config.audience.is_empty() {
        rules.set_audience(&config.audience);
        required.push("aud");
    }
    rules.set_required_spec_claims(&required);
    rules
}

/// The keys, of those configured and those that a URL has, that may have signed a token: the one that its `kid` names, or
/// else those that could have.
///
/// # Errors
/// When these are too many to try: a signature takes 50 us to verify, and anybody may send a token.
fn candidates<'a>(configured: &'a [Key], published: &'a [Key], header: &Header) -> Result<Vec<&'a Key>, Refusal> {
    let fitting: Vec<_> = configured.iter().chain(published).filter(|key| key.fits(header)).collect();
    if let Some(named) = fitting.iter().find(|key| key.is_named_by(header)) {
        return Ok(vec![named]);
    }
    if fitting.len() > KEYS_TRIED_MAX {
        return Err(invalid(
            "the token names no key, and too many could have signed it: have its issuer name the key (kid) in the \
             token's header",
        ));
    }
    Ok(fitting)
}

/// The claims of a token that one of `keys` has signed.
fn try_keys(keys: &[&Key], token: &str, header: &Header) -> Result<Claims, Refusal> {
    let mut refusal = invalid("no key of this gateway verifies the token");
    for key in keys.iter().filter(|key| key.fits(header)) {
        match decode(token, &key.decoding, &key.validation) {
            Ok(token) => return Ok(token.claims),
            Err(error) if matches!(error.kind(), ErrorKind::InvalidSignature) => {}
            Err(error) => refusal = explain(error),
        }
    }
    Err(refusal)
}

/// What tells the bearers of tokens apart: `sub:` and the `sub`, a number as its text; where there is none, the token
/// stands for itself.
fn name(token: &str, claims: &Claims) -> String {
    match claims.get("sub") {
        Some(Value::String(sub)) if !sub.is_empty() => format!("sub:{sub}"),
        Some(Value::Number(number)) => format!("sub:{number}"),
        _ => {
            let hash: String = Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("token:{}", &hash[..TOKEN_HASH_DIGITS])
        }
    }
}

/// What is wrong with a token, without any of it: errors of parsers may quote what they parse.
fn explain(error: jsonwebtoken::errors::Error) -> Refusal {
    Refusal::Invalid(match error.kind() {
        ErrorKind::ExpiredSignature => "the token has expired".into(),
        ErrorKind::ImmatureSignature => "the token does not count yet (nbf)".into(),
        ErrorKind::InvalidIssuer => "the token is of another issuer (iss)".into(),
        ErrorKind::InvalidAudience => "the token is for another audience (aud)".into(),
        ErrorKind::MissingRequiredClaim(claim) => format!("the token has no proper {claim}"),
        ErrorKind::InvalidClaimFormat(claim) => format!("the token has no proper {claim}"),
        _ => "this is no token that is taken here".into(),
    })
}

fn not_whole(claim: &str) -> Refusal {
    Refusal::Invalid(format!("the token's {claim} is no whole number of seconds"))
}

fn invalid(why: &str) -> Refusal {
    Refusal::Invalid(why.into())
}

/// What a token that is to be made says.
pub struct Grant {
    pub sub: Option<String>,
    pub rights: Rights,
    pub lifetime: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum MintError {
    #[error("tokens are made with auth.jwt.secret (TIDEGATE_AUTH__JWT__SECRET), which is not set")]
    NoSecret,
    #[error("auth.jwt.secret has at least {SECRET_BYTES_MIN} bytes")]
    ShortSecret,
    #[error("a token may live for {0:?} at most (auth.jwt.lifetime)")]
    TooLong(Duration),
    #[error("the token could not be signed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// Makes a token that a gateway with this configuration takes.
///
/// # Errors
/// When there is no secret to make it with, or it would be refused.
pub fn mint(config: &config::Jwt, grant: &Grant) -> Result<String, MintError> {
    match config.secret.expose().len() {
        0 => return Err(MintError::NoSecret),
        1..SECRET_BYTES_MIN => return Err(MintError::ShortSecret),
        _ => {}
    }
    if grant.lifetime > config.lifetime {
        return Err(MintError::TooLong(config.lifetime));
    }
    let texts = |filters: &[Filter]| filters.iter().map(|filter| filter.as_str().to_owned()).collect::<Vec<_>>();
    let now = Timestamp::now().as_second();
    let mut claims = json!({
        "iat": now,
        "exp": now.saturating_add_unsigned(grant.lifetime.as_secs()),
        "tidegate": { "subscribe": texts(&grant.rights.subscribe), "publish": texts(&grant.rights.publish) },
    });
    for (name, value) in
        [("sub", &grant.sub), ("iss", &config.issuer.first().cloned()), ("aud", &config.audience.first().cloned())]
    {
        if let Some(value) = value {
            claims[name] = value.as_str().into();
        }
    }
    let key = EncodingKey::from_secret(config.secret.expose());
    Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key)?)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::Config,
        fuzz::{cases, nearly, text},
    };

    const SECRET: &str = "a secret of thirty-two bytes or so";

    static CONFIG: LazyLock<Config> =
        LazyLock::new(|| Config::load(None, vec![("auth.jwt.secret", SECRET.into())]).unwrap());

    /// Verifies with the secret alone, for which there is nothing to wait.
    fn verify(token: &str) -> Result<Principal, Refusal> {
        static TOKENS: LazyLock<Tokens> = LazyLock::new(|| Tokens {
            keys: key::configured(&CONFIG.auth.jwt, &rules(&CONFIG.auth.jwt)).unwrap(),
            remote: None,
            subscribe: vec![Template::parse("users.{sub}.>").unwrap()],
            publish: vec![],
            token_bytes: CONFIG.auth.token_bytes,
            filters_max: CONFIG.auth.filters,
            leeway: CONFIG.auth.jwt.leeway,
            lifetime: CONFIG.auth.jwt.lifetime,
            takes_audience: false,
        });
        TOKENS.verify(token).now_or_never().expect("nothing is waited for")
    }

    fn good() -> &'static str {
        static GOOD: LazyLock<String> = LazyLock::new(|| {
            let rights = Rights { subscribe: vec![Filter::parse("orders.>").unwrap()], publish: vec![] };
            let grant = Grant { sub: Some("ann".into()), rights, lifetime: Duration::from_secs(36_000) };
            mint(&CONFIG.auth.jwt, &grant).unwrap()
        });
        &GOOD
    }

    /// A header and claims as they are written here, signed with the secret.
    fn signed(header: &str, claims: &str) -> String {
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
        format!("{message}.{signature}")
    }

    fn claims() -> impl Strategy<Value = String> {
        let exp = Timestamp::now().as_second() + 3_600;
        let written = move |(sub, filter): (String, String)| {
            json!({ "exp": exp, "sub": sub, "tidegate": { "subscribe": [filter] } }).to_string()
        };
        let right = || (text(), nearly("[a-z.*>]{1,8}")).prop_map(written);
        prop_oneof![2 => right(), 2 => nearly(right()), 1 => text()]
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn fuzz_only_what_was_signed_is_taken(token in prop_oneof![3 => nearly(Just(good().to_owned())), 1 => text()]) {
            prop_assert_eq!(verify(&token).is_ok(), token == good(), "{}", token);
        }

        #[test]
        fn fuzz_whatever_was_signed_gives_only_filters(
            header in prop_oneof![Just(r#"{"alg":"HS256"}"#.to_owned()), nearly(Just(r#"{"typ":"JWT","alg":"HS256"}"#.to_owned()))],
            claims in claims(),
        ) {
            if let Ok(principal) = verify(&signed(&header, &claims)) {
                let said: Value = serde_json::from_str(&claims).expect("claims are JSON");
                for filter in &principal.rights().subscribe {
                    let own = said["tidegate"]["subscribe"].as_array().into_iter().flatten().any(|text| text == filter.as_str());
                    let sub = said["sub"].as_str().map(ToOwned::to_owned).or(said["sub"].as_u64().map(|n| n.to_string()));
                    let of_policy = sub.is_some_and(|sub| filter.as_str() == format!("users.{sub}.>"));
                    prop_assert!(own || of_policy, "{} of {}", filter, claims);
                    prop_assert!(Filter::parse(filter.as_str()).is_ok());
                }
                prop_assert!(principal.expires().is_some_and(|at| at > Timestamp::now()));
            }
        }
    }
}
