//! What proves to Google who asks: a bearer token, given or made of a service account's key.
//!
//! Google's interfaces take a token that the service account signed itself (RFC 7523 in its short form, "Using OAuth 2.0 for Server to Server Applications:
//! service account authorization without OAuth"), so no token endpoint is asked, and none that a key's file names can be abused.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;

use super::super::super::http::Sign;
use crate::error::{Error, Result};

/// What may be done with a token: reading.
const SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_only";

/// How long a token holds; Google allows an hour.
const LIFE: TimeDelta = TimeDelta::hours(1);

/// How long before its end a token is made anew: clocks differ.
const EARLY: TimeDelta = TimeDelta::minutes(10);

/// A service account, and the token it signed last.
pub(super) struct ServiceAccount {
    email: String,
    key_id: String,
    key: RsaKeyPair,
    token: Mutex<Option<(String, DateTime<Utc>)>>,
}

#[derive(Deserialize)]
struct KeyFile {
    client_email: String,
    #[serde(default)]
    private_key_id: String,
    private_key: String,
}

impl ServiceAccount {
    /// Reads a key file as the console gives it.
    ///
    /// # Errors
    /// `BAD_CREDENTIALS`, which repeats nothing of it.
    pub(super) fn parse(json: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::invalid("BAD_CREDENTIALS", format!("the service account's key {why}"))
                .remedy("give the whole JSON file that the console made for the service account")
        };
        let file: KeyFile = serde_json::from_str(json).map_err(|_| bad("is not a key file"))?;
        let der = PrivatePkcs8KeyDer::from_pem_slice(file.private_key.as_bytes())
            .map_err(|_| bad("has no private key in PEM"))?;
        let key = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).map_err(|_| bad("has no RSA key"))?;
        Ok(Self { email: file.client_email, key_id: file.private_key_id, key, token: Mutex::default() })
    }

    /// A token that holds for some time yet.
    fn token(&self, now: DateTime<Utc>) -> Result<String> {
        let mut kept = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((token, until)) = kept.as_ref()
            && now + EARLY < *until
        {
            return Ok(token.clone());
        }
        let token = self.sign_token(now)?;
        *kept = Some((token.clone(), now + LIFE));
        Ok(token)
    }

    /// Drops the token that is kept: a clock that was set, here or there, ends one before its time.
    pub(super) fn forget_token(&self) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn sign_token(&self, now: DateTime<Utc>) -> Result<String> {
        let coded = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let head = coded(serde_json::json!({"alg": "RS256", "typ": "JWT", "kid": self.key_id}));
        let claims = coded(serde_json::json!({
            "iss": self.email,
            "sub": self.email,
            "scope": SCOPE,
            "iat": now.timestamp(),
            "exp": (now + LIFE).timestamp(),
        }));
        let text = format!("{head}.{claims}");
        let mut signature = vec![0; self.key.public().modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), text.as_bytes(), &mut signature)
            .map_err(|_| Error::internal("signing a token failed"))?;
        Ok(format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }
}

#[async_trait]
impl Sign for ServiceAccount {
    async fn sign(&self, request: &mut reqwest::Request) -> Result<()> {
        let text = format!("Bearer {}", self.token(Utc::now())?);
        let mut value =
            HeaderValue::from_str(&text).map_err(|_| Error::internal("a token does not fit in a header"))?;
        value.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_key_file_is_refused_and_not_shown() {
        for junk in [
            "",
            "{}",
            r#"{"client_email": "a@b", "private_key": "hunter2"}"#,
            r#"{"client_email": "a@b", "private_key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"}"#,
        ] {
            let error = ServiceAccount::parse(junk).err().unwrap();
            assert_eq!(error.reason(), "BAD_CREDENTIALS");
            assert!(!format!("{error:?}").contains("hunter2"));
        }
    }
}
