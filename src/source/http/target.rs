//! A file's URL and where its redirects led.
//!
//! Hubs answer a file's URL with a redirect to a signed URL elsewhere, and count how often they are asked. So the first request
//! of a file goes to its own URL, and those after it straight to where that led, until the place refuses (the signature
//! expired): then the file's own URL is asked again. Requests that come while the first is on its way
//! wait for it and do not ask too. A target keeps nothing but URLs; it is lost with the process.

use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;
use reqwest::header::HeaderName;
use tokio::sync::OnceCell;

use super::{Authorization, Failure, HttpClient, Reply, Request};

/// A URL that is read many times: see the module's page.
#[derive(Debug)]
pub(crate) struct Target {
    url: Url,
    authorization: Option<Authorization>,
    led_to: Mutex<Arc<OnceCell<Url>>>,
}

impl Target {
    /// A file at `url`; `authorization` is for that origin alone.
    pub(crate) fn new(url: Url, authorization: Option<Authorization>) -> Self {
        Self { url, authorization, led_to: Mutex::default() }
    }

    /// The file's own URL.
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// Sends a GET with `headers` to where the file is, finding that out first if need be.
    pub(crate) async fn get(&self, http: &HttpClient, headers: &[(HeaderName, String)]) -> Result<Reply, Failure> {
        let cell = self.cell();
        match self.get_once(&cell, http, headers).await {
            Err(failure) if self.is_stale(&cell, &failure) => {
                self.forget(&cell);
                self.get_once(&self.cell(), http, headers).await
            }
            other => other,
        }
    }

    async fn get_once(
        &self,
        cell: &OnceCell<Url>,
        http: &HttpClient,
        headers: &[(HeaderName, String)],
    ) -> Result<Reply, Failure> {
        let mut first = None;
        let found = cell
            .get_or_try_init(|| async {
                let request = Request::get(&self.url, self.authorization.as_ref()).headers(headers);
                let reply = http.send(&request).await?;
                let url = reply.url.clone();
                first = Some(reply);
                Ok::<_, Failure>(url)
            })
            .await?;
        if let Some(reply) = first {
            return Ok(reply);
        }
        let ours = found.origin() == self.url.origin();
        let authorization = self.authorization.as_ref().filter(|_| ours);
        http.send(&Request::get(found, authorization).headers(headers)).await
    }

    /// Whether `failure` came from a place that redirects led to, of the kind that asking again at the start may mend.
    fn is_stale(&self, cell: &OnceCell<Url>, failure: &Failure) -> bool {
        let elsewhere = cell.get().is_some_and(|found| *found != self.url);
        let refused = failure.status().is_some_and(|status| matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410));
        elsewhere && refused
    }

    fn cell(&self) -> Arc<OnceCell<Url>> {
        Arc::clone(&self.led_to.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts anew, unless somebody else has already.
    fn forget(&self, stale: &Arc<OnceCell<Url>>) {
        let mut led_to = self.led_to.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&led_to, stale) {
            *led_to = Arc::default();
        }
    }
}
