//! Who else is in a group, and how far they have it: for the counts beside our own messages. Pure.
//!
//! Trap: cursors come by two ways, as receipts and with the members, and in no order. They only rise, within one history.

use std::collections::BTreeMap;

use client::Group;

/// See the head of this file. Of one group.
#[derive(Debug, Default)]
pub struct Circle {
    /// The others and the seqs of what brought them in; `None`: not known yet.
    members: Option<Vec<(String, u64)>>,
    cursors: BTreeMap<String, Cursors>,
    asking: Asking,
}

/// (history, seq) each.
#[derive(Debug, Default, Clone, Copy)]
struct Cursors {
    delivered: (u64, u64),
    read: (u64, u64),
}

/// Whether the members are being asked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Asking {
    #[default]
    No,
    Asked,
    /// And what comes may be old by then.
    Again,
}

impl Circle {
    /// The group may have changed, or receipts may be missing: whether its members are to be asked for now.
    pub fn want(&mut self) -> bool {
        let now = self.asking == Asking::No;
        self.asking = if now { Asking::Asked } else { Asking::Again };
        now
    }

    /// What was asked for has come, if it could be had. Whether it is to be asked for again.
    pub fn told(&mut self, me: &str, group: Option<&Group>) -> bool {
        if let Some(group) = group {
            for member in group.members.iter().filter(|member| member.user != me) {
                self.delivered(&member.user, (group.history, member.delivered.max(member.read)));
                self.read(&member.user, (group.history, member.read));
            }
            let others = group.members.iter().filter(|member| member.user != me);
            self.members = Some(others.map(|member| (member.user.clone(), member.joined)).collect());
        }
        std::mem::take(&mut self.asking) == Asking::Again && self.want()
    }

    /// Somebody has it up to here.
    pub fn delivered(&mut self, user: &str, id: (u64, u64)) {
        raise(&mut self.cursors.entry(user.to_owned()).or_default().delivered, id);
    }

    /// Somebody has read up to here.
    pub fn read(&mut self, user: &str, id: (u64, u64)) {
        raise(&mut self.cursors.entry(user.to_owned()).or_default().read, id);
    }

    /// Of a message: how many it is for (as far as that is known), have it, have read it.
    pub fn reached(&self, id: (u64, u64)) -> (Option<usize>, usize, usize) {
        let reaches = |cursor: (u64, u64)| cursor.0 == id.0 && cursor.1 >= id.1;
        let count = |users: &mut dyn Iterator<Item = &str>| {
            users.filter_map(|user| self.cursors.get(user)).fold((0, 0), |(delivered, read), at| {
                (delivered + usize::from(reaches(at.delivered)), read + usize::from(reaches(at.read)))
            })
        };
        let Some(members) = &self.members else {
            let (delivered, read) = count(&mut self.cursors.keys().map(String::as_str));
            return (None, delivered, read);
        };
        let addressed =
            || members.iter().filter(|(_, joined)| *joined <= id.1).map(|(user, _)| user.as_str());
        let (delivered, read) = count(&mut addressed());
        (Some(addressed().count()), delivered, read)
    }
}

fn raise(cursor: &mut (u64, u64), id: (u64, u64)) {
    if cursor.0 != id.0 || cursor.1 < id.1 {
        *cursor = id;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::wire::Member;

    #[test]
    fn receipts_and_members_add_up() {
        let mut circle = Circle::default();
        circle.delivered("bob", (7, 5));
        assert_eq!(circle.reached((7, 5)), (None, 1, 0));
        assert!(circle.want() && !circle.want());
        let member = |user: &str, joined, delivered, read| Member {
            user: user.to_owned(),
            joined,
            delivered,
            read,
            ..Default::default()
        };
        let members = vec![
            member("alice", 1, 9, 9),
            member("bob", 1, 4, 4),
            member("cy", 1, 6, 0),
            member("dan", 6, 6, 6),
        ];
        let group = Group { version: 6, title: "t".to_owned(), history: 7, members };
        assert!(circle.told("alice", Some(&group)), "wanted once more meanwhile");
        assert_eq!(circle.reached((7, 5)), (Some(2), 2, 0));
        assert_eq!(circle.reached((7, 4)), (Some(2), 2, 1));
        assert_eq!(circle.reached((7, 6)), (Some(3), 2, 1));
        assert_eq!(circle.reached((8, 4)), (Some(2), 0, 0), "of another history");
        assert!(!circle.told("alice", None) && circle.want());
        circle.read("cy", (7, 5));
        assert_eq!(circle.reached((7, 5)), (Some(2), 2, 1));
    }
}
