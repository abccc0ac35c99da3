//! One request of a listing, asked again while its failure may pass: a listing of thousands of requests must not begin anew for one of them.
//!
//! Where the other side says how long to wait, that is waited for here, too: services that count requests over minutes are met with every long
//! listing. What does not pass within a few attempts is for whoever lists, who tries all of it again.

use std::time::Duration;

use crate::error::{Kind, Result};

/// Times that one request is made.
const ATTEMPTS: u32 = 5;

/// The first pause where the other side names none; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// What is waited for one request here, in all, where it is asked for: the longest that services are known to count over.
const LONGEST_ASKED: Duration = Duration::from_secs(300);

/// What `ask` gives, asked a few times while it is unavailable.
///
/// # Errors
/// The last one; at once where it will not pass, or not soon.
pub(super) async fn ask_again<T, F: Future<Output = Result<T>>>(mut ask: impl FnMut() -> F) -> Result<T> {
    let (mut pause, mut waited) = (FIRST_PAUSE, Duration::ZERO);
    for _ in 1..ATTEMPTS {
        match ask().await {
            Err(error) if error.kind() == Kind::Unavailable => {
                let asked = error.retry_after();
                waited += asked.unwrap_or_default();
                if waited > LONGEST_ASKED {
                    return Err(error);
                }
                tracing::info!(error = %error.chain(), "will ask again");
                tokio::time::sleep(asked.unwrap_or(pause)).await;
                pause *= 2;
            }
            done => return done,
        }
    }
    ask().await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::error::Error;

    /// How often `error` is asked for before it is believed, and how long that takes.
    async fn asked(error: fn() -> Error) -> (u32, Duration) {
        let (times, began) = (AtomicU32::new(0), tokio::time::Instant::now());
        let asked = ask_again(|| async {
            times.fetch_add(1, Ordering::Relaxed);
            Err::<(), _>(error())
        });
        asked.await.unwrap_err();
        (times.into_inner(), began.elapsed())
    }

    #[tokio::test]
    async fn only_what_may_pass_soon_is_asked_again() {
        assert_eq!(asked(|| Error::invalid("X", "x")).await.0, 1);
        assert_eq!(asked(|| Error::unavailable("X", "x").fact("retry_after_s", 301)).await.0, 1);
        let (times, took) = asked(|| Error::unavailable("X", "x").fact("retry_after_s", 1)).await;
        assert_eq!(times, ATTEMPTS);
        assert!(took >= Duration::from_secs(4), "{took:?}");
        assert_eq!(asked(|| Error::unavailable("X", "x")).await.0, ATTEMPTS);
    }
}
