//! An application's own Pulls. Owned by the session's task.
//!
//! Trap: these are looks. No answer to one of them may reach the inbox, whose Pulls decide what was handed out.

use std::sync::Arc;
use std::time::Instant;

use proto::wire;

use super::asks::{Answer, Asks, PULLS};
use crate::answer::Page;
use crate::body::Body;
use crate::inbox::Message;

/// Pages that are being asked for.
#[derive(Debug)]
pub(super) struct Pulls(Asks<wire::Pull, Page>);

impl Default for Pulls {
    fn default() -> Self {
        Pulls(Asks::new(PULLS))
    }
}

impl Pulls {
    pub fn ask(&mut self, pull: wire::Pull, answer: Answer<Page>) {
        self.0.ask(pull, answer);
    }

    /// The frames that are due now: few at a time, because each answer may be a whole frame.
    pub fn due(&mut self, now: Instant) -> Vec<wire::Pull> {
        self.0.due(IN_FLIGHT_MAX, now, |pull, request| wire::Pull { request, ..pull.clone() })
    }

    /// When to look what is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.0.next_deadline()
    }

    pub fn forget_connection(&mut self) {
        self.0.forget_connection();
    }

    /// A page, if it was asked for here; else it is the inbox's. `is_hidden`: (chat, history, seq) that is not to be shown.
    pub fn take(
        &mut self,
        ack: wire::PullAck,
        is_hidden: impl Fn(&str, u64, u64) -> bool,
    ) -> Option<wire::PullAck> {
        if !self.0.is_theirs(ack.request) {
            return Some(ack);
        }
        let (pull, answer) = self.0.take(ack.request)?;
        let _ = answer.send(Ok(page(&pull, ack, is_hidden)));
        None
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        self.0.refused(error)
    }
}

fn page(pull: &wire::Pull, ack: wire::PullAck, is_hidden: impl Fn(&str, u64, u64) -> bool) -> Page {
    let (chat, history): (Arc<str>, u64) = (ack.chat.into(), ack.history);
    let last = ack.messages.last().map(|message| message.seq);
    // Forwards an answer may have nothing but damaged messages to tell of, and more behind them.
    let behind = if pull.reverse { None } else { ack.first.checked_sub(1) };
    let next = last.or(behind).filter(|_| ack.has_more);
    let message = |message: wire::Message| Message {
        chat: chat.clone(),
        history,
        seq: message.seq,
        sender: message.sender,
        time_us: message.time_us,
        body: Body { kind: message.kind, bytes: message.body },
    };
    let shown = ack.messages.into_iter().filter(|message| !is_hidden(&chat, history, message.seq));
    let messages = shown.map(message).collect();
    Page { chat: chat.clone(), history, messages, next, head: ack.head, first: ack.first }
}

/// As many as the inbox has.
const IN_FLIGHT_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::AskError;
    use tokio::sync::oneshot;

    fn ask(pulls: &mut Pulls, reverse: bool) -> (wire::Pull, oneshot::Receiver<Result<Page, AskError>>) {
        let (answer, told) = oneshot::channel();
        pulls.ask(wire::Pull { chat: "alice:bob".to_owned(), reverse, ..Default::default() }, answer);
        (pulls.due(Instant::now()).remove(0), told)
    }

    fn ack(request: u32, seqs: &[u64], has_more: bool) -> wire::PullAck {
        let message = |seq: &u64| wire::Message { seq: *seq, sender: "bob".into(), ..Default::default() };
        let (chat, messages) = ("alice:bob".to_owned(), seqs.iter().map(message).collect());
        wire::PullAck { request, chat, history: 7, messages, has_more, head: 9, first: 3, joined: 0 }
    }

    #[test]
    fn a_page_is_whose_it_was_asked_for_without_what_is_hidden() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        let (pull, mut told) = ask(&mut pulls, true);
        assert!(pulls.due(now).is_empty());
        let others = ack(5, &[1], false);
        assert_eq!(pulls.take(others.clone(), |_, _, _| false), Some(others));
        pulls.forget_connection();
        let again = pulls.due(now).remove(0);
        assert_ne!(again.request, pull.request);
        assert_eq!(pulls.take(ack(pull.request, &[9], false), |_, _, _| false), None, "late");
        assert!(told.try_recv().is_err());
        let hidden = |chat: &str, history, seq| (chat, history, seq) == ("alice:bob", 7, 8);
        assert_eq!(pulls.take(ack(again.request, &[9, 8, 7], true), hidden), None);
        let page = told.try_recv().unwrap().unwrap();
        let seqs: Vec<_> = page.messages.iter().map(|message| message.seq).collect();
        assert_eq!((seqs, page.next, page.head, page.first, page.history), (vec![9, 7], Some(7), 9, 3, 7));
    }

    #[test]
    fn where_all_is_damaged_the_next_page_begins_behind_it() {
        let mut pulls = Pulls::default();
        for (reverse, next) in [(false, Some(2)), (true, None)] {
            let (pull, mut told) = ask(&mut pulls, reverse);
            pulls.take(ack(pull.request, &[], true), |_, _, _| false);
            assert_eq!(told.try_recv().unwrap().unwrap().next, next);
        }
    }
}
