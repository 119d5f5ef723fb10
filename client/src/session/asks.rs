//! Questions of the application on their way, of one kind: asked again on a new connection and where no answer comes, answered once.
//! Owned by the session's task.
//!
//! Trap: each kind has numbers of its own, so that an answer or error that comes late is nobody else's. Below all of them are the
//! inbox's.

use std::ops::Range;
use std::time::{Duration, Instant};

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
    /// Its number on this connection, and when it is asked again if nothing is heard; `None`: it is due.
    asked: Option<(u32, Instant)>,
    /// How long an answer is waited for. Doubles each time, because the link may be slow.
    answer_ms: u64,
}

impl<Q, T> Asks<Q, T> {
    /// None yet.
    pub fn new(numbers: Range<u32>) -> Self {
        Asks { last: numbers.start, numbers, asked: Vec::new() }
    }

    /// One more.
    pub fn ask(&mut self, question: Q, answer: Answer<T>) {
        self.asked.push(Ask { question, answer, asked: None, answer_ms: ANSWER_MS_MIN });
    }

    /// What is to be sent now, with so many on their way at most. Nobody waits for what nobody waits for.
    pub fn due<F>(&mut self, in_flight_max: usize, now: Instant, frame: impl Fn(&Q, u32) -> F) -> Vec<F> {
        self.asked.retain(|ask| !ask.answer.is_closed());
        for ask in &mut self.asked {
            if ask.asked.take_if(|(_, until)| now >= *until).is_some() {
                ask.answer_ms = (ask.answer_ms * 2).min(ANSWER_MS_MAX);
            }
        }
        let in_flight = self.asked.iter().filter(|ask| ask.asked.is_some()).count();
        let due = self.asked.iter_mut().filter(|ask| ask.asked.is_none());
        let number = |ask: &mut Ask<Q, T>| {
            self.last = if self.last + 1 < self.numbers.end { self.last + 1 } else { self.numbers.start };
            ask.asked = Some((self.last, now + Duration::from_millis(ask.answer_ms)));
            frame(&ask.question, self.last)
        };
        due.take(in_flight_max.saturating_sub(in_flight)).map(number).collect()
    }

    /// When to look what is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.asked.iter().filter_map(|ask| ask.asked).map(|(_, until)| until).min()
    }

    /// All are due again.
    pub fn forget_connection(&mut self) {
        for ask in &mut self.asked {
            (ask.asked, ask.answer_ms) = (None, ANSWER_MS_MIN);
        }
    }

    /// Changes the question of this number and asks it again, if `change` says so. `None`: it is none of these.
    pub fn ask_again(&mut self, request: u32, change: impl FnOnce(&mut Q) -> bool) -> Option<bool> {
        let ask = self.asked.iter_mut().find(|ask| ask.is(request))?;
        let again = change(&mut ask.question);
        if again {
            ask.asked = None;
        }
        Some(again)
    }

    /// The question of this number, and who waits for its answer.
    pub fn take(&mut self, request: u32) -> Option<(Q, Answer<T>)> {
        let at = self.asked.iter().position(|ask| ask.is(request))?;
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

impl<Q, T> Ask<Q, T> {
    fn is(&self, of: u32) -> bool {
        self.asked.is_some_and(|(request, _)| request == of)
    }
}

/// An answer that has not come by then is taken for lost, as the inbox does ([`crate::inbox::Limits::answer_ms_max`]).
const ANSWER_MS_MIN: u64 = 5_000;
/// Longest that one is waited for.
const ANSWER_MS_MAX: u64 = 40_000;

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
        due_at(asks, Instant::now())
    }

    fn due_at(asks: &mut Asks<char, u32>, now: Instant) -> Vec<(char, u32)> {
        asks.due(2, now, |question, request| (*question, request))
    }

    #[test]
    fn what_is_not_answered_is_asked_again_more_and_more_rarely() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut asks = Asks::new(100..200);
        let mut told = ask(&mut asks, 'a');
        assert_eq!((due_at(&mut asks, at(0)), asks.next_deadline()), (vec![('a', 101)], Some(at(5_000))));
        assert_eq!(due_at(&mut asks, at(4_999)), []);
        assert_eq!(
            (due_at(&mut asks, at(5_000)), asks.next_deadline()),
            (vec![('a', 102)], Some(at(15_000)))
        );
        assert!(asks.take(101).is_none(), "the other answer is on its way");
        assert_eq!(due_at(&mut asks, at(15_000)), [('a', 103)]);
        assert_eq!(due_at(&mut asks, at(35_000)), [('a', 104)]);
        assert_eq!(asks.next_deadline(), Some(at(75_000)));
        asks.forget_connection();
        assert_eq!(asks.next_deadline(), None);
        assert_eq!(
            (due_at(&mut asks, at(40_000)), asks.next_deadline()),
            (vec![('a', 105)], Some(at(45_000)))
        );
        let (_, answer) = asks.take(105).unwrap();
        answer.send(Ok(7)).unwrap();
        assert_eq!((told.try_recv().unwrap().ok(), asks.next_deadline()), (Some(7), None));
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
