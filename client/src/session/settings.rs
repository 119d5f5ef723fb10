//! Questions about the user's settings on their way, and changes of them; asked again on a new connection. Owned by the session's task.

use proto::wire;
use tokio::sync::oneshot;

use crate::answer::AskError;
use crate::client::Settings;

/// Settings that are being asked for.
#[derive(Debug, Default)]
pub(super) struct Asked {
    request: u32,
    asked: Vec<One>,
}

#[derive(Debug)]
struct One {
    request: u32,
    change: Option<Settings>,
    answer: oneshot::Sender<Result<Settings, AskError>>,
    /// On this connection.
    sent: bool,
}

/// Numbers of requests from here on, below those of watches and above the inbox's.
const REQUESTS_FROM: u32 = 1 << 29;

impl Asked {
    pub fn ask(&mut self, change: Option<Settings>, answer: oneshot::Sender<Result<Settings, AskError>>) {
        self.asked.push(One { request: 0, change, answer, sent: false });
    }

    /// The frames that are due now.
    pub fn due(&mut self) -> Vec<wire::Settings> {
        self.asked.retain(|one| !one.answer.is_closed());
        let mut due = Vec::new();
        for one in self.asked.iter_mut().filter(|one| !one.sent) {
            self.request = (self.request + 1) % REQUESTS_FROM;
            (one.request, one.sent) = (REQUESTS_FROM + self.request, true);
            let Settings { hide_presence, hide_typing } = one.change.unwrap_or_default();
            let change = one.change.is_some();
            due.push(wire::Settings { request: one.request, change, hide_presence, hide_typing });
        }
        due
    }

    pub fn forget_connection(&mut self) {
        self.asked.iter_mut().for_each(|one| one.sent = false);
    }

    pub fn take(&mut self, ack: &wire::SettingsAck) {
        let wire::SettingsAck { request, hide_presence, hide_typing } = *ack;
        self.answer(request, Ok(Settings { hide_presence, hide_typing }));
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        let told = Err(AskError::Refused { code: error.code(), text: error.text.clone() });
        self.answer(error.request, told) || (REQUESTS_FROM..2 * REQUESTS_FROM).contains(&error.request)
    }

    fn answer(&mut self, request: u32, told: Result<Settings, AskError>) -> bool {
        let at = self.asked.iter().position(|one| one.sent && one.request == request);
        let one = at.map(|at| self.asked.swap_remove(at));
        one.map(|one| drop(one.answer.send(told))).is_some()
    }
}
