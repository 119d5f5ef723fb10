//! Questions about the user's settings, and changes of them. Owned by the session's task.

use std::time::Instant;

use proto::wire;

use super::asks::{Answer, Asks, SETTINGS};
use crate::client::Settings;

/// Settings that are being asked for, or changed.
#[derive(Debug)]
pub(super) struct Asked(Asks<Option<Settings>, Settings>);

impl Default for Asked {
    fn default() -> Self {
        Asked(Asks::new(SETTINGS))
    }
}

impl Asked {
    pub fn ask(&mut self, change: Option<Settings>, answer: Answer<Settings>) {
        self.0.ask(change, answer);
    }

    /// The frames that are due now.
    pub fn due(&mut self, now: Instant) -> Vec<wire::Settings> {
        self.0.due(usize::MAX, now, |change, request| {
            let Settings { hide_presence, hide_typing } = change.unwrap_or_default();
            wire::Settings { request, change: change.is_some(), hide_presence, hide_typing }
        })
    }

    /// When to look what is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.0.next_deadline()
    }

    pub fn forget_connection(&mut self) {
        self.0.forget_connection();
    }

    pub fn take(&mut self, ack: &wire::SettingsAck) {
        let wire::SettingsAck { request, hide_presence, hide_typing } = *ack;
        if let Some((_, answer)) = self.0.take(request) {
            let _ = answer.send(Ok(Settings { hide_presence, hide_typing }));
        }
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        self.0.refused(error)
    }
}
