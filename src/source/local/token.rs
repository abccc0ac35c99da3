//! Who may send a checkpoint's bytes: the bearer of its token.
//!
//! A token is `<checkpoint>.<created>.<mac>`: the id and the time of creation of the record, and a keyed BLAKE3 of the two (256 bits)
//! under the secret of the state directory. So no token is ever stored, every one survives restarts and can be shown again, checking
//! costs one hash and no look-up, and the token of a removed checkpoint does not open another that is given its id. Debug shows
//! neither key nor token.

use std::fmt;

use crate::disk::SECRET_BYTES;

/// Keeps these tokens apart from whatever else the secret may come to be used for.
const PURPOSE: &[u8] = b"ckptd local transfer token 1\0";

/// Makes and checks tokens, and knows where they are to be used.
pub struct Tokens {
    key: [u8; SECRET_BYTES],
    url: String,
}

/// What a token that holds was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bearer<'a> {
    /// Id of the checkpoint.
    pub checkpoint: &'a str,
    /// When its record was made, in milliseconds since the epoch.
    pub created_ms: i64,
}

impl Tokens {
    /// Tokens under `key`, to be used at `url`.
    pub fn new(key: [u8; SECRET_BYTES], url: String) -> Self {
        Self { key, url }
    }

    /// Base URL of the transfer protocol.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The token of a record.
    pub fn token(&self, checkpoint: &str, created_ms: i64) -> String {
        let mac = self.mac(Bearer { checkpoint, created_ms });
        format!("{checkpoint}.{created_ms}.{}", mac.to_hex())
    }

    /// What `token` was made for; `None` unless it was made here. Takes the same time however much of it is right.
    pub fn check<'a>(&self, token: &'a str) -> Option<Bearer<'a>> {
        let (subject, mac) = token.rsplit_once('.')?;
        let (checkpoint, created) = subject.rsplit_once('.')?;
        let bearer = Bearer { checkpoint, created_ms: created.parse().ok()? };
        // Equality of `blake3::Hash` is in constant time.
        (blake3::Hash::from_hex(mac).ok()? == self.mac(bearer)).then_some(bearer)
    }

    fn mac(&self, bearer: Bearer<'_>) -> blake3::Hash {
        let mut digester = blake3::Hasher::new_keyed(&self.key);
        digester.update(PURPOSE);
        digester.update(&bearer.created_ms.to_le_bytes());
        digester.update(bearer.checkpoint.as_bytes());
        digester.finalize()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("url", &self.url).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_its_own_checkpoint_and_no_other() {
        let tokens = Tokens::new([7; SECRET_BYTES], "http://h".to_owned());
        let token = tokens.token("a.b-c", 17);
        assert_eq!(tokens.check(&token), Some(Bearer { checkpoint: "a.b-c", created_ms: 17 }));
        let mac = token.rsplit_once('.').unwrap().1;
        for wrong in [
            format!("a.b-d.17.{mac}"),
            format!("a.b-c.18.{mac}"),
            format!("a.b-c.17.{}", "0".repeat(64)),
            format!("a.b-c.17.{}", &mac[1..]),
            mac.to_owned(),
            String::new(),
        ] {
            assert_eq!(tokens.check(&wrong), None, "{wrong}");
        }
        assert_eq!(Tokens::new([8; SECRET_BYTES], String::new()).check(&token), None);
        assert!(!format!("{tokens:?}").contains("7, 7"));
    }
}
