//! The one HTTP client of all sources.
//!
//! Owns what every source must get right and none should repeat:
//!
//! * *Egress.* Every request and every redirect is judged by [`EgressPolicy`], names after they are resolved.
//! * *Redirects* are followed here, at most [`REDIRECTS`] of them. `Authorization` goes to the origin (scheme, host and
//!   port) it was given for and to no other; a redirect from https to http is refused.
//! * *Time.* Connecting has a limit, and so has every silence, while waiting for the answer as well as between two
//!   pieces of its body; a transfer as a whole has none, for a checkpoint may take hours.
//! * *Bytes.* Bodies are asked for as they are (`Accept-Encoding: identity`, unless a source knows better) and are never decoded. [`Wanted`] holds a reply to the
//!   range that was asked for, to the byte.
//! * *Secrets.* Errors name a URL without user information and query, and the transport's own errors are stripped of theirs.
//!
//! HTTP/1.1 only: parallel ranges are to have a connection each, not one window of flow control between them.
//!
//! TLS is rustls over *ring* with the host's trust store. [`HttpClient::new`] installs *ring* as the process's
//! provider unless `main` has installed one.

mod body;
mod proxy;
mod status;
mod target;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, HeaderName, LOCATION};
use reqwest::{Client, Method, RequestBuilder, StatusCode, Url};
use tokio::time::timeout;

use self::proxy::Proxies;
use super::egress::{EgressPolicy, GuardedResolver, Refusal};
use crate::error::{CUT_SHORT, Error, LATER, OUT_OF_REACH, Result};

pub(super) use body::{ContentRange, Wanted, announced_length, read_document};
pub(super) use status::{Answer, Failure};
pub(super) use target::Target;

/// Redirects followed for one request: `curl` stops at 50, browsers at 20, real chains are shorter than 5.
const REDIRECTS: usize = 10;

/// Body of a redirect that is read so that its connection can be used again; more is not worth it.
const REDIRECT_BODY_BYTES: usize = 64 << 10;

/// Body of a refusal that is kept: object stores say in some hundred bytes why they refuse.
const EXPLANATION_BYTES: usize = 16 << 10;

/// How long the next piece of such a body is waited for: the refusal is known without it.
const EXPLANATION_WITHIN: Duration = Duration::from_secs(5);

/// Times of the client.
#[derive(Clone, Debug)]
pub struct HttpSettings {
    /// For name, connection and TLS together.
    pub connect_timeout: Duration,
    /// For any silence of the other side after that.
    pub inactivity_timeout: Duration,
    /// Whether `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` of the environment count; see [`proxy`] for what that means.
    pub environment_proxy: bool,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            inactivity_timeout: Duration::from_secs(30),
            environment_proxy: true,
        }
    }
}

/// The client; clones share connections.
#[derive(Clone)]
pub struct HttpClient {
    client: Client,
    policy: Arc<EgressPolicy>,
    proxies: Arc<Proxies>,
    inactivity: Duration,
    answer_within: Duration,
}

impl HttpClient {
    /// Builds the client under `policy`.
    ///
    /// # Errors
    /// `TLS_NOT_READY` where the host has no trust store that can be read.
    pub fn new(settings: &HttpSettings, policy: Arc<EgressPolicy>) -> Result<Self> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // Fails only if somebody else was first, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let proxies = Arc::new(Proxies::new(settings.environment_proxy));
        let mut builder = Client::builder()
            .user_agent(concat!("ckptd/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .http1_only()
            .connect_timeout(settings.connect_timeout)
            .dns_resolver(GuardedResolver::new(Arc::clone(&policy), proxies.hosts().to_vec()));
        if !settings.environment_proxy {
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| {
            Error::new(crate::error::Kind::Unsupported, "TLS_NOT_READY", "setting up TLS for sources")
                .remedy("install the host's CA certificates (package ca-certificates)")
                .because(error.without_url())
        })?;
        Ok(Self {
            client,
            policy,
            proxies,
            inactivity: settings.inactivity_timeout,
            answer_within: settings.connect_timeout + settings.inactivity_timeout,
        })
    }

    /// Sends `request`, follows redirects, and gives the first answer that is a success.
    pub(super) async fn send(&self, request: &Request<'_>) -> Result<Reply, Failure> {
        let mut url = without_user_information(request.url.clone());
        let mut authorization = request.authorization;
        for _ in 0..=REDIRECTS {
            let response = self.exchange(request, &url, authorization).await?;
            if !request.follow || !is_redirect(response.status()) {
                return self.judge(response, url, authorization.is_some()).await;
            }
            let next = redirect_of(&response, &url)?;
            if request.body.is_some() && !matches!(response.status().as_u16(), 307 | 308) {
                let message = format!("fetching {}: what is posted there is redirected", shown(&url));
                return Err(Error::invalid("BAD_REDIRECT", message).into());
            }
            if next.origin() != url.origin() {
                authorization = None;
            }
            self.drain(response).await;
            url = next;
        }
        let message = format!("fetching {}: it is redirected more than {REDIRECTS} times", shown(request.url));
        Err(Error::invalid("REDIRECT_LOOP", message).into())
    }

    /// One request and its answer's head, at `url`, under the policy.
    async fn exchange(
        &self,
        request: &Request<'_>,
        url: &Url,
        authorization: Option<&Authorization>,
    ) -> Result<reqwest::Response> {
        let during = |refused: Error| refused.during(format!("fetching {}", shown(url)));
        self.policy.check_url(url).map_err(during)?;
        self.proxies.check(url, &self.policy).await.map_err(during)?;
        let mut call = self.client.request(request.method.clone(), url.clone());
        if !request.headers.iter().any(|(name, _)| *name == ACCEPT_ENCODING) {
            call = call.header(ACCEPT_ENCODING, "identity");
        }
        for (name, value) in &request.headers {
            call = call.header(name, value);
        }
        if let Some(body) = &request.body {
            call = call.body(body.clone());
        }
        if let Some(authorization) = authorization {
            call = authorization.apply(call);
        }
        let mut call = call.build().map_err(|error| transport_fault(error, url))?;
        if let Some(Authorization::Signed(signer)) = authorization {
            signer.sign(&mut call).await?;
        }
        match timeout(self.answer_within, self.client.execute(call)).await {
            Ok(sent) => sent.map_err(|error| transport_fault(error, url)),
            Err(_) => Err(stalled(url, self.answer_within)),
        }
    }

    async fn judge(&self, response: reqwest::Response, url: Url, authorized: bool) -> Result<Reply, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(Reply { response, url });
        }
        let (headers, shown) = (response.headers().clone(), shown(&url));
        let body = self.explanation(response).await;
        Err(Failure::Refused(Box::new(Answer { status, headers, body, shown, authorized })))
    }

    /// The beginning of a refusal's body; whatever goes wrong, the refusal itself is what counts.
    async fn explanation(&self, mut response: reqwest::Response) -> Vec<u8> {
        let mut body = Vec::new();
        while let Ok(Ok(Some(bytes))) = timeout(self.inactivity.min(EXPLANATION_WITHIN), response.chunk()).await {
            body.extend_from_slice(&bytes[..bytes.len().min(EXPLANATION_BYTES - body.len())]);
            if body.len() == EXPLANATION_BYTES {
                break;
            }
        }
        body
    }

    async fn drain(&self, mut response: reqwest::Response) {
        let mut left = REDIRECT_BODY_BYTES;
        while let Ok(Ok(Some(bytes))) = timeout(self.inactivity, response.chunk()).await {
            if bytes.len() > left {
                return;
            }
            left -= bytes.len();
        }
    }
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient").field("inactivity", &self.inactivity).finish_non_exhaustive()
    }
}

/// What to send.
pub(super) struct Request<'a> {
    method: Method,
    url: &'a Url,
    authorization: Option<&'a Authorization>,
    headers: Vec<(HeaderName, String)>,
    body: Option<Bytes>,
    follow: bool,
}

impl<'a> Request<'a> {
    /// A GET; `authorization` is for the origin of `url` alone.
    pub(super) fn get(url: &'a Url, authorization: Option<&'a Authorization>) -> Self {
        Self { method: Method::GET, url, authorization, headers: Vec::new(), body: None, follow: true }
    }

    /// A HEAD.
    pub(super) fn head(url: &'a Url, authorization: Option<&'a Authorization>) -> Self {
        Self { method: Method::HEAD, ..Self::get(url, authorization) }
    }

    /// A POST of `body`; only redirects that keep the method are followed.
    pub(super) fn post(url: &'a Url, authorization: Option<&'a Authorization>, body: Bytes) -> Self {
        Self { method: Method::POST, body: Some(body), ..Self::get(url, authorization) }
    }

    /// The same, and a redirect is a refusal: for what is signed for one address.
    pub(super) fn without_redirects(self) -> Self {
        Self { follow: false, ..self }
    }

    /// Adds headers that redirects keep.
    pub(super) fn headers(mut self, headers: &[(HeaderName, String)]) -> Self {
        self.headers.extend_from_slice(headers);
        self
    }
}

/// A successful answer whose body has not been read.
#[derive(Debug)]
pub(super) struct Reply {
    /// Head and body.
    pub(super) response: reqwest::Response,
    /// Where redirects led; may hold a signature.
    pub(super) url: Url,
}

/// What an `Authorization` header is made of.
#[derive(Clone)]
pub(super) enum Authorization {
    /// `Bearer`, as Hugging Face and most interfaces take it.
    Bearer(String),
    /// `Basic` (RFC 7617): user name and password.
    Basic(String, String),
    /// Made anew for each request, of the whole request.
    Signed(Arc<dyn Sign>),
}

/// Signs requests one by one, as object stores want it; may fetch or renew what it signs with.
#[async_trait]
pub(super) trait Sign: Send + Sync {
    /// Adds to `request` what proves who asks. Headers and query may be changed, the body not.
    async fn sign(&self, request: &mut reqwest::Request) -> Result<()>;
}

impl Authorization {
    /// `Bearer` with `token`, less the white space that files end in.
    pub(super) fn bearer(token: &str) -> Result<Self> {
        let token = token.trim();
        if token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(Self::Bearer(token.to_owned()));
        }
        Err(Error::invalid("BAD_CREDENTIALS", "the token holds characters that HTTP cannot carry")
            .remedy("check that it was given whole and on one line"))
    }

    fn apply(&self, call: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Bearer(token) => call.bearer_auth(token),
            Self::Basic(username, password) => call.basic_auth(username, Some(password)),
            Self::Signed(_) => call,
        }
    }
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorization(..)")
    }
}

/// A URL for people: no user information, query or fragment.
pub(super) fn shown(url: &Url) -> String {
    let mut plain = without_user_information(url.clone());
    plain.set_query(None);
    plain.set_fragment(None);
    plain.into()
}

/// The same URL without user name and password; a URL that cannot have them is left alone.
pub(super) fn without_user_information(mut url: Url) -> Url {
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn redirect_of(response: &reqwest::Response, url: &Url) -> Result<Url> {
    let unusable =
        |why: &str| Error::invalid("BAD_REDIRECT", format!("fetching {}: it is redirected {why}", shown(url)));
    let location = response.headers().get(LOCATION).ok_or_else(|| unusable("to nowhere"))?;
    let text = std::str::from_utf8(location.as_bytes()).map_err(|_| unusable("to what is not a URL"))?;
    let next = without_user_information(url.join(text).map_err(|_| unusable("to what is not a URL"))?);
    if url.scheme() == "https" && next.scheme() == "http" {
        return Err(unusable(&format!("from https to http ({})", shown(&next)))
            .remedy("ask the server's operator to mend it, or give the http address itself"));
    }
    Ok(next)
}

fn stalled(url: &Url, limit: Duration) -> Error {
    Error::unavailable("STALLED", format!("fetching {}: nothing came for {} s", shown(url), limit.as_secs_f64()))
        .remedy(LATER)
}

/// What a failure below HTTP means for the receiver.
fn transport_fault(error: reqwest::Error, url: &Url) -> Error {
    let doing = format!("fetching {}", shown(url));
    let error = error.without_url();
    if let Some(refusal) = cause::<Refusal>(&error) {
        return Error::from(refusal.clone()).during(doing);
    }
    let fault = if matches!(cause::<rustls::Error>(&error), Some(rustls::Error::InvalidCertificate(_))) {
        Error::denied("CERTIFICATE_REFUSED", doing)
            .remedy("check the server's certificate, or add its authority to the host's trust store")
    } else if error.is_builder() {
        Error::invalid("BAD_URI", doing)
    } else if error.is_timeout() {
        Error::unavailable("CONNECT_TIMED_OUT", doing).remedy(OUT_OF_REACH)
    } else if error.is_connect() {
        Error::unavailable("CONNECT_FAILED", doing).remedy(OUT_OF_REACH)
    } else if matches!(cause::<std::io::Error>(&error), Some(io) if io.kind() == std::io::ErrorKind::UnexpectedEof) {
        Error::unavailable("BODY_TOO_SHORT", format!("{doing}: the body is shorter than announced")).remedy(CUT_SHORT)
    } else {
        Error::unavailable("CONNECTION_BROKEN", doing).remedy(LATER)
    };
    fault.because(error)
}

/// The first cause of type `T`; looks inside I/O errors, which hide what they wrap from `source`.
fn cause<'a, T: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(inner) => Some(inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_shown_without_what_is_secret() {
        let url = Url::parse("https://user:secret@example.com/a/b?X-Amz-Signature=secret#secret").unwrap();
        assert_eq!(shown(&url), "https://example.com/a/b");
    }

    #[test]
    fn credentials_never_show() {
        let authorization = Authorization::bearer("hf_secret").unwrap();
        assert!(!format!("{authorization:?}").contains("hf_secret"));
        let error = Authorization::bearer("hf_secret\nx").unwrap_err();
        assert!(!format!("{error:?}").contains("hf_secret"));
    }
}
