//! Questions about who is in a group, page by page. Owned by the session's task.
//!
//! Trap: pages of two versions are not one list. When the version changes in between, the list begins anew.

use std::time::Instant;

use proto::wire;

use super::asks::{Answer, Asks, MEMBERS};
use crate::answer::Group;

/// Lists that are being asked for.
#[derive(Debug)]
pub(super) struct Lists(Asks<List, Group>);

#[derive(Debug)]
struct List {
    chat: String,
    group: Group,
    after: String,
}

impl Default for Lists {
    fn default() -> Self {
        Lists(Asks::new(MEMBERS))
    }
}

impl Lists {
    pub fn ask(&mut self, chat: String, answer: Answer<Group>) {
        let group = Group { version: 0, title: String::new(), history: 0, members: Vec::new() };
        self.0.ask(List { chat, group, after: String::new() }, answer);
    }

    /// The frames that are due now.
    pub fn due(&mut self, now: Instant) -> Vec<wire::Members> {
        self.0.due(usize::MAX, now, |List { chat, after, .. }, request| wire::Members {
            request,
            chat: chat.clone(),
            after: after.clone(),
        })
    }

    /// When to look what is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.0.next_deadline()
    }

    pub fn forget_connection(&mut self) {
        self.0.forget_connection();
    }

    pub fn take(&mut self, ack: wire::MembersAck) {
        let request = ack.request;
        if self.0.ask_again(request, |list| list.takes(ack)) == Some(false)
            && let Some((List { group, .. }, answer)) = self.0.take(request)
        {
            let _ = answer.send(Ok(group));
        }
    }

    /// Whether the error was about one of these.
    pub fn refused(&mut self, error: &wire::Error) -> bool {
        self.0.refused(error)
    }
}

impl List {
    /// One more page. Whether another one is to follow.
    fn takes(&mut self, ack: wire::MembersAck) -> bool {
        let List { group, after, .. } = self;
        if !after.is_empty() && (group.history, group.version) != (ack.history, ack.version) {
            group.members.clear();
            after.clear();
            return true;
        }
        (group.history, group.version, group.title) = (ack.history, ack.version, ack.title);
        group.members.extend(ack.members);
        let has_more = ack.has_more && ack.next > *after;
        if has_more {
            *after = ack.next;
        }
        has_more
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

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
        let (mut lists, now) = (Lists::default(), Instant::now());
        let (answer, mut told) = oneshot::channel();
        lists.ask("#7".to_owned(), answer);
        let first = lists.due(now).remove(0);
        assert!(lists.due(now).is_empty());
        lists.take(ack(&first, 3, "a", true));
        let second = lists.due(now).remove(0);
        assert_eq!(second.after, "a");
        lists.take(ack(&second, 4, "b", true));
        let anew = lists.due(now).remove(0);
        assert_eq!(anew.after, "");
        lists.take(ack(&anew, 4, "a", true));
        lists.forget_connection();
        let last = lists.due(now).remove(0);
        assert_eq!(last.after, "a");
        lists.take(ack(&first, 3, "late", false));
        assert!(told.try_recv().is_err());
        lists.take(ack(&last, 4, "b", false));
        let group = told.try_recv().unwrap().unwrap();
        let names: Vec<_> = group.members.iter().map(|member| member.user.as_str()).collect();
        assert_eq!((group.version, names), (4, vec!["a", "b"]));
    }
}
