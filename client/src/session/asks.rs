//! Questions of the application on their way, of one kind: asked again on a new connection, answered once. Owned by the session's task.
//!
//! Trap: each kind has numbers of its own, so that an answer or error that comes late is nobody else's. Below all of them are the
//! inbox's.

use std::ops::Range;

use proto::wire;
use tokio::sync::oneshot;

use crate::answer::AskError;

/// Of questions about settings; behind them are those of watches (`presence.rs`).
pub(super) const SETTINGS: Range<u32> = 1 << 29..crate::presence::REQUESTS.start;
/// Of questions about members.
pub(super) const MEMBERS: Range<u32> = crate::presence::REQUESTS.end..3 << 30;
/// Of an application's own Pulls.
pub(super) const PULLS: Range<u32> = 3 << 30..u32::MAX;

/// Who waits for what is asked.
pub(super) type Answer<T> = oneshot::Sender<Result<T, AskError>>;

/// Questions `Q` that are answered by a `T`.
#[derive(Debug)]
pub(super) struct Asks<Q, T> {
    numbers: Range<u32>,
    last: u32,
    asked: Vec<Ask<Q, T>>,
}

#[derive(Debug)]
struct Ask<Q, T> {
    question: Q,
    answer: Answer<T>,
    /// Its number on this connection; `None`: it is due.
    request: Option<u32>,
}

impl<Q, T> Asks<Q, T> {
    /// None yet.
    pub fn new(numbers: Range<u32>) -> Self {
        Asks { last: numbers.start, numbers, asked: Vec::new() }
    }

    /// One more.
    pub fn ask(&mut self, question: Q, answer: Answer<T>) {
        self.asked.push(Ask { question, answer, request: None });
    }

    /// What is to be sent now, with so many on their way at most. Nobody waits for what nobody waits for.
    pub fn due<F>(&mut self, in_flight_max: usize, frame: impl Fn(&Q, u32) -> F) -> Vec<F> {
        self.asked.retain(|ask| !ask.answer.is_closed());
        let in_flight = self.asked.iter().filter(|ask| ask.request.is_some()).count();
        let due = self.asked.iter_mut().filter(|ask| ask.request.is_none());
        let number = |ask: &mut Ask<Q, T>| {
            self.last = if self.last + 1 < self.numbers.end { self.last + 1 } else { self.numbers.start };
            ask.request = Some(self.last);
            frame(&ask.question, self.last)
        };
        due.take(in_flight_max.saturating_sub(in_flight)).map(number).collect()
    }

    /// All are due again.
    pub fn forget_connection(&mut self) {
        self.asked.iter_mut().for_each(|ask| ask.request = None);
    }

    /// Changes the question of this number and asks it again, if `change` says so. `None`: it is none of these.
    pub fn ask_again(&mut self, request: u32, change: impl FnOnce(&mut Q) -> bool) -> Option<bool> {
        let ask = self.asked.iter_mut().find(|ask| ask.request == Some(request))?;
        let again = change(&mut ask.question);
        if again {
            ask.request = None;
        }
        Some(again)
    }

    /// The question of this number, and who waits for its answer.
    pub fn take(&mut self, request: u32) -> Option<(Q, Answer<T>)> {
        let at = self.asked.iter().position(|ask| ask.request == Some(request))?;
        let Ask { question, answer, .. } = self.asked.remove(at);
        Some((question, answer))
    }

    /// Whether the number is one of theirs, be it of a question that is over.
    pub fn is_theirs(&self, request: u32) -> bool {
        self.numbers.contains(&request)
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        if let Some((_, answer)) = self.take(error.request) {
            let _ = answer.send(Err(AskError::Refused { code: error.code(), text: error.text.clone() }));
        }
        self.is_theirs(error.request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::wire::Code;

    fn ask(asks: &mut Asks<char, u32>, question: char) -> oneshot::Receiver<Result<u32, AskError>> {
        let (answer, told) = oneshot::channel();
        asks.ask(question, answer);
        told
    }

    fn due(asks: &mut Asks<char, u32>) -> Vec<(char, u32)> {
        asks.due(2, |question, request| (*question, request))
    }

    #[test]
    fn few_are_on_their_way_and_all_are_asked_again_on_a_new_connection() {
        let mut asks = Asks::new(100..104);
        let (mut a, _b, c) = (ask(&mut asks, 'a'), ask(&mut asks, 'b'), ask(&mut asks, 'c'));
        assert_eq!((due(&mut asks), due(&mut asks)), (vec![('a', 101), ('b', 102)], vec![]));
        asks.forget_connection();
        assert!(asks.take(101).is_none(), "of another connection");
        assert_eq!(due(&mut asks), [('a', 103), ('b', 100)], "numbers go round");
        let (question, answer) = asks.take(103).unwrap();
        answer.send(Ok(7)).unwrap();
        assert_eq!((question, a.try_recv().unwrap().ok()), ('a', Some(7)));
        drop(c);
        assert_eq!(due(&mut asks), [], "nobody waits for it any more");
        assert_eq!(asks.ask_again(100, |question| std::mem::replace(question, 'd') == 'b'), Some(true));
        assert_eq!(asks.ask_again(100, |_| true), None);
        assert_eq!(due(&mut asks), [('d', 101)]);
    }

    #[test]
    fn a_refusal_is_told_and_a_late_one_is_nobody_elses() {
        let mut asks = Asks::new(100..200);
        let mut told = ask(&mut asks, 'a');
        let request = due(&mut asks)[0].1;
        let error = |request| wire::Error { request, code: Code::NotAMember as i32, ..Default::default() };
        assert!(asks.refused(&error(request)) && asks.refused(&error(request)));
        assert!(matches!(told.try_recv(), Ok(Err(AskError::Refused { code: Code::NotAMember, .. }))));
        assert!(!asks.refused(&error(5)) && !asks.refused(&error(200)));
    }
}
