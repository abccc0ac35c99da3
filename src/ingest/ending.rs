//! What became of something that is under way, for whoever waits for it: said once, heard by any number, also by those who come later.

use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, Result};

/// The end of one thing, which may not have come yet.
#[derive(Debug, Default)]
pub struct Ending(watch::Sender<Option<std::result::Result<(), Arc<Error>>>>);

impl Ending {
    /// Says what came of it, once nothing of it runs any more.
    pub fn conclude(&self, outcome: Result<()>) {
        self.0.send_replace(Some(outcome.map_err(Arc::new)));
    }

    /// Waits until nothing of it runs any more.
    ///
    /// # Errors
    /// What it failed with.
    pub async fn concluded(&self) -> Result<()> {
        let mut outcome = self.0.subscribe();
        // Cannot fail: the sender is ours.
        let concluded = outcome.wait_for(Option::is_some).await.map_err(|_| Error::internal("an end was forgotten"))?;
        match concluded.as_ref() {
            Some(Err(error)) => Err(error.share()),
            _ => Ok(()),
        }
    }
}
