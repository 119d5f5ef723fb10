//! Questions about who is in a group, on their way: page by page, asked again on a new connection. Owned by the session's task.
//!
//! Trap: pages of two versions are not one list. When the version changes in between, the list begins anew.

use proto::wire;
use tokio::sync::oneshot;

use super::pulls;
use crate::answer::{AskError, Group};

/// Who waits for the list.
pub(super) type Answer = oneshot::Sender<Result<Group, AskError>>;

/// Lists that are being asked for.
#[derive(Debug, Default)]
pub(super) struct Lists {
    request: u32,
    asked: Vec<List>,
}

#[derive(Debug)]
struct List {
    request: u32,
    chat: String,
    answer: Answer,
    group: Group,
    after: String,
    /// On this connection.
    sent: bool,
}

/// Numbers of requests from here on, so that none is one of the inbox's; those of an application's Pulls are above them.
const REQUESTS_FROM: u32 = 1 << 31;

impl Lists {
    pub fn ask(&mut self, chat: String, answer: Answer) {
        let group = Group { version: 0, title: String::new(), history: 0, members: Vec::new() };
        self.asked.push(List { request: 0, chat, answer, group, after: String::new(), sent: false });
    }

    /// The frames that are due now.
    pub fn due(&mut self) -> Vec<wire::Members> {
        self.asked.retain(|list| !list.answer.is_closed());
        let mut due = Vec::new();
        for list in self.asked.iter_mut().filter(|list| !list.sent) {
            self.request = (self.request + 1) % (pulls::REQUESTS_FROM - REQUESTS_FROM);
            (list.request, list.sent) = (REQUESTS_FROM + self.request, true);
            let (chat, after) = (list.chat.clone(), list.after.clone());
            due.push(wire::Members { request: list.request, chat, after });
        }
        due
    }

    pub fn forget_connection(&mut self) {
        self.asked.iter_mut().for_each(|list| list.sent = false);
    }

    pub fn take(&mut self, ack: wire::MembersAck) {
        let Some(at) = self.asked.iter().position(|list| list.sent && list.request == ack.request) else {
            return;
        };
        let list = &mut self.asked[at];
        let is_same = (list.group.history, list.group.version) == (ack.history, ack.version);
        if !list.after.is_empty() && !is_same {
            list.group.members.clear();
            (list.after, list.sent) = (String::new(), false);
            return;
        }
        (list.group.history, list.group.version, list.group.title) = (ack.history, ack.version, ack.title);
        list.group.members.extend(ack.members);
        if ack.has_more && ack.next > list.after {
            (list.after, list.sent) = (ack.next, false);
        } else {
            let List { answer, group, .. } = self.asked.swap_remove(at);
            let _ = answer.send(Ok(group));
        }
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        let Some(at) = self.asked.iter().position(|list| list.sent && list.request == error.request) else {
            return (REQUESTS_FROM..pulls::REQUESTS_FROM).contains(&error.request);
        };
        let List { answer, .. } = self.asked.swap_remove(at);
        let _ = answer.send(Err(AskError::Refused { code: error.code(), text: error.text.clone() }));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::wire::Code;

    fn ack(asked: &wire::Members, version: u64, user: &str, more: bool) -> wire::MembersAck {
        let member = wire::Member { user: user.to_owned(), ..Default::default() };
        wire::MembersAck {
            request: asked.request,
            version,
            members: vec![member],
            has_more: more,
            next: if more { user.to_owned() } else { String::new() },
            ..Default::default()
        }
    }

    #[test]
    fn a_list_is_of_one_version() {
        let mut lists = Lists::default();
        let (answer, mut told) = oneshot::channel();
        lists.ask("#7".to_owned(), answer);
        let first = lists.due().remove(0);
        assert!(lists.due().is_empty());
        lists.take(ack(&first, 3, "a", true));
        let second = lists.due().remove(0);
        assert_eq!(second.after, "a");
        lists.take(ack(&second, 4, "b", true));
        let anew = lists.due().remove(0);
        assert_eq!(anew.after, "");
        lists.take(ack(&anew, 4, "a", true));
        lists.forget_connection();
        let last = lists.due().remove(0);
        assert_eq!(last.after, "a");
        lists.take(ack(&first, 3, "late", false));
        assert!(told.try_recv().is_err());
        lists.take(ack(&last, 4, "b", false));
        let group = told.try_recv().unwrap().unwrap();
        let names: Vec<_> = group.members.iter().map(|member| member.user.as_str()).collect();
        assert_eq!((group.version, names), (4, vec!["a", "b"]));
    }

    #[test]
    fn a_refusal_is_told_and_a_late_one_is_nobody_elses() {
        let mut lists = Lists::default();
        let (answer, mut told) = oneshot::channel();
        lists.ask("#7".to_owned(), answer);
        let asked = lists.due().remove(0);
        let error =
            wire::Error { request: asked.request, code: Code::NotAMember as i32, ..Default::default() };
        assert!(lists.refused(&error) && lists.refused(&error));
        assert!(matches!(told.try_recv(), Ok(Err(AskError::Refused { code: Code::NotAMember, .. }))));
        assert!(!lists.refused(&wire::Error { request: 5, ..Default::default() }));
    }
}
