//! An application's own Pulls on their way, asked again on a new connection. Owned by the session's task.
//!
//! Trap: these are looks. No answer to one of them may reach the inbox, whose Pulls decide what was handed out.

use std::sync::Arc;

use proto::wire;
use tokio::sync::oneshot;

use crate::answer::{AskError, Page};
use crate::body::Body;
use crate::inbox::Message;

/// Who waits for the page.
pub(super) type Answer = oneshot::Sender<Result<Page, AskError>>;

/// Pages that are being asked for.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    request: u32,
    asked: Vec<Asked>,
}

#[derive(Debug)]
struct Asked {
    pull: wire::Pull,
    answer: Answer,
    /// On this connection.
    sent: bool,
}

/// Numbers of requests from here on, so that none is anybody else's.
pub(super) const REQUESTS_FROM: u32 = 3 << 30;

impl Pulls {
    pub fn ask(&mut self, pull: wire::Pull, answer: Answer) {
        self.asked.push(Asked { pull, answer, sent: false });
    }

    /// The frames that are due now: few at a time, because each answer may be a whole frame.
    pub fn due(&mut self) -> Vec<wire::Pull> {
        self.asked.retain(|asked| !asked.answer.is_closed());
        let room = IN_FLIGHT_MAX.saturating_sub(self.asked.iter().filter(|asked| asked.sent).count());
        let mut due = Vec::new();
        for asked in self.asked.iter_mut().filter(|asked| !asked.sent).take(room) {
            self.request = (self.request + 1) % (u32::MAX - REQUESTS_FROM);
            (asked.pull.request, asked.sent) = (REQUESTS_FROM + self.request, true);
            due.push(asked.pull.clone());
        }
        due
    }

    pub fn forget_connection(&mut self) {
        self.asked.iter_mut().for_each(|asked| asked.sent = false);
    }

    /// A page, if it was asked for here; else it is the inbox's. `is_hidden`: (chat, history, seq) that is not to be shown.
    pub fn take(
        &mut self,
        ack: wire::PullAck,
        is_hidden: impl Fn(&str, u64, u64) -> bool,
    ) -> Option<wire::PullAck> {
        if ack.request < REQUESTS_FROM {
            return Some(ack);
        }
        let Asked { pull, answer, .. } = self.take_asked(ack.request)?;
        let _ = answer.send(Ok(page(&pull, ack, is_hidden)));
        None
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        if error.request < REQUESTS_FROM {
            return false;
        }
        if let Some(Asked { answer, .. }) = self.take_asked(error.request) {
            let _ = answer.send(Err(AskError::Refused { code: error.code(), text: error.text.clone() }));
        }
        true
    }

    fn take_asked(&mut self, request: u32) -> Option<Asked> {
        let at = self.asked.iter().position(|asked| asked.sent && asked.pull.request == request)?;
        Some(self.asked.remove(at))
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
    use proto::wire::Code;

    fn ask(pulls: &mut Pulls, reverse: bool) -> (wire::Pull, oneshot::Receiver<Result<Page, AskError>>) {
        let (answer, told) = oneshot::channel();
        pulls.ask(wire::Pull { chat: "alice:bob".to_owned(), reverse, ..Default::default() }, answer);
        (pulls.due().remove(0), told)
    }

    fn ack(request: u32, seqs: &[u64], has_more: bool) -> wire::PullAck {
        let message = |seq: &u64| wire::Message { seq: *seq, sender: "bob".into(), ..Default::default() };
        let (chat, messages) = ("alice:bob".to_owned(), seqs.iter().map(message).collect());
        wire::PullAck { request, chat, history: 7, messages, has_more, head: 9, first: 3, joined: 0 }
    }

    #[test]
    fn a_page_is_whose_it_was_asked_for_without_what_is_hidden() {
        let mut pulls = Pulls::default();
        let (pull, mut told) = ask(&mut pulls, true);
        assert!(pulls.due().is_empty());
        let others = ack(5, &[1], false);
        assert_eq!(pulls.take(others.clone(), |_, _, _| false), Some(others));
        pulls.forget_connection();
        let again = pulls.due().remove(0);
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

    #[test]
    fn a_refusal_is_told_and_few_are_on_their_way_at_a_time() {
        let mut pulls = Pulls::default();
        let (pull, mut told) = ask(&mut pulls, false);
        let error = |request| wire::Error { request, code: Code::NotAMember as i32, ..Default::default() };
        assert!(!pulls.refused(&error(5)) && !pulls.refused(&error(1 << 31)));
        assert!(pulls.refused(&error(pull.request)) && pulls.refused(&error(pull.request)));
        assert!(matches!(told.try_recv(), Ok(Err(AskError::Refused { code: Code::NotAMember, .. }))));
        let waiting: Vec<_> = (0..=IN_FLIGHT_MAX)
            .map(|_| {
                let (answer, told) = oneshot::channel();
                pulls.ask(wire::Pull::default(), answer);
                told
            })
            .collect();
        let sent = pulls.due();
        assert_eq!((sent.len(), pulls.due().len()), (IN_FLIGHT_MAX, 0));
        pulls.take(ack(sent[0].request, &[], false), |_, _, _| false);
        assert_eq!(pulls.due().len(), 1);
        drop(waiting);
        assert!(pulls.due().is_empty() && pulls.asked.is_empty());
    }
}
