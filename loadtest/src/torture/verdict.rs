//! What was promised against what a history shows. Pure: a history goes in, counts and the first cases come out.
//!
//! A message is addressed to every device of its receiver, or of a group's members as of its place there, and of its sender. It is **lost**
//! when its sender holds the acknowledgement and one of these was never shown it; **doubled** when one was shown it twice, or two places were given
//! to one id or one place to two; **reordered** when a seq, or the counter of one sender, came behind a higher one;
//! **phantom** when nobody sent it, or not to there, or when it stands in a group that its sender was not in. A **gap** is a seq that a device passed over, or was told is missing.
//!
//! Trap: this looks at what applications got, behind the client library. A push that comes twice over the wire is no
//! double.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use proto::wire::Code;

use super::audience::Audience;
use super::history::{Change, History, MessageId, Place, To, What};

/// What a fault is allowed to do to a history, because it destroys what lies below us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Excuses {
    /// Messages of a history may be missing at devices that were told it is lost, or had nothing of it, and come again under the new one.
    pub history_lost: bool,
    /// Messages may stay without an answer.
    pub unknown: bool,
    /// The servers may tell of gaps.
    pub gaps: bool,
}

/// What came out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// Messages that applications asked to be sent.
    pub sent: u64,
    /// Accepted, by what their senders were told.
    pub acked: u64,
    /// Refused for good, by what their senders were told.
    pub refused: u64,
    /// Of these, for another reason than that they are too large, which is all that ever is wrong with one.
    pub refused_wrongly: u64,
    /// Neither.
    pub unknown: u64,
    /// Shown to an application, each device counted.
    pub shown: u64,
    /// Accepted, and not shown to a device that it is addressed to.
    pub lost: u64,
    /// Shown again, or stored twice.
    pub doubled: u64,
    /// Shown behind a later one.
    pub reordered: u64,
    /// Shown, and never sent to there, or stored in a group that its sender was not in.
    pub phantom: u64,
    /// Passed over, or told to be missing.
    pub gaps: u64,
    /// Refused, and shown all the same.
    pub refused_delivered: u64,
    /// Connections that ended, if no gateway was hurt.
    pub connections_dropped: u64,
    /// Chats that devices were told have lost their history.
    pub histories_lost: u64,
    /// Lost with a history, if that is excused.
    pub cut: u64,
    /// From asking to the acknowledgement, longest and 99 %, ms.
    pub ack_ms: Times,
    /// From the acknowledgement to the last device that was not away, longest and 99 %, ms. Not below zero: a push may
    /// overtake it.
    pub push_ms: Times,
    /// The first cases of each kind, in words.
    pub cases: Vec<String>,
}

/// How long something took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Times {
    /// 99 %.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Verdict {
    /// Judges a history.
    pub fn of(history: &History, excuses: Excuses) -> Verdict {
        let audience = Audience::new(&history.devices);
        let mut judge = Judge { excuses, audience, ..Judge::default() };
        for (number, device) in history.devices.iter().enumerate() {
            judge.away.extend(device.away.then_some(number as u32));
        }
        judge.seen = history.devices.iter().map(|_| Seen::default()).collect();
        judge.learn(history);
        judge.read(history);
        judge.compare();
        judge.verdict
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.wrong() == 0
    }

    /// How much is wrong.
    pub fn wrong(&self) -> u64 {
        self.lost
            + self.doubled
            + self.reordered
            + self.phantom
            + self.gaps
            + self.refused_delivered
            + self.connections_dropped
    }

    fn case(&mut self, case: impl FnOnce() -> String) {
        if self.cases.len() < CASES_MAX {
            self.cases.push(case());
        }
    }
}

#[derive(Default)]
struct Judge {
    verdict: Verdict,
    excuses: Excuses,
    audience: Audience,
    away: HashSet<u32>,
    messages: HashMap<MessageId, Fate>,
    /// Where the messages stand that made them.
    groups: Vec<Place>,
    /// Changes of groups, and the devices that were shown them. Whoever asked for one may be shown it first.
    told: BTreeMap<Place, HashSet<u32>>,
    /// When a user may have been out of a group, by (group, user): from when somebody asked for it until it was surely back.
    absences: HashMap<(u32, u32), Vec<(u64, u64)>>,
    /// Each message that was refused because its sender is in no such group: the group, and from when to when it was under way.
    turned_away: Vec<(u32, u32, u64, u64)>,
    /// Who stands where.
    places: HashMap<Place, MessageId>,
    seen: Vec<Seen>,
    /// Histories that devices were told of as new: chat → the numbers.
    new_histories: HashMap<Arc<str>, HashSet<u64>>,
}

/// What is known of one message.
#[derive(Default)]
struct Fate {
    sent: Option<(To, u64)>,
    acked: Option<(Place, u64)>,
    refused: bool,
    stands: Option<Place>,
    shown_to: Vec<u32>,
    last_shown_us: u64,
}

/// What is known of one device.
#[derive(Default)]
struct Seen {
    /// Last seq of a chat and history.
    seqs: HashMap<(Arc<str>, u64), u64>,
    /// Last counter of a chat, history and sender.
    counters: HashMap<(Arc<str>, u64, u32), u32>,
    messages: HashMap<MessageId, u64>,
    /// Chats of which it was told that their history is lost.
    lost: HashSet<Arc<str>>,
}

impl Judge {
    /// Who was in which group, and when: that has to be known before anything is judged.
    fn learn(&mut self, history: &History) {
        for record in &history.records {
            if let What::Made { place, members } = &record.what {
                self.audience.add_group(place, members.clone());
                self.groups.push(place.clone());
                self.change(place, &Change { joins: members.clone(), leaves: Vec::new() });
            }
        }
        for record in &history.records {
            match &record.what {
                What::Asked { group, change } => {
                    for user in &change.leaves {
                        let absences = self.absences.entry((*group, *user)).or_default();
                        absences.push((record.at_us, u64::MAX));
                    }
                }
                What::Changed { place, change } => {
                    self.change(place, change);
                    let group = self.groups.iter().position(|made| made.chat == place.chat);
                    for user in &change.joins {
                        let absences = group.and_then(|group| self.absences.get_mut(&(group as u32, *user)));
                        if let Some((_, until)) = absences.and_then(|absences| absences.last_mut()) {
                            *until = record.at_us;
                        }
                    }
                }
                What::Told { place, change } => self.change(place, change),
                _ => {}
            }
        }
    }

    /// One place; one change.
    fn change(&mut self, place: &Place, change: &Change) {
        self.takes(CHANGE, place);
        self.told.entry(place.clone()).or_default();
        if self.audience.learn(place, change) {
            return;
        }
        if let Some(known) = self.audience.change_at(place).filter(|known| *known != change) {
            self.verdict.doubled += 1;
            let case = format!("{known:?} and {change:?} both stand at {place:?}");
            self.verdict.case(|| case);
        }
    }

    fn read(&mut self, history: &History) {
        for record in &history.records {
            let who = record.who.unwrap_or(u32::MAX);
            match &record.what {
                What::Sent { id, to } => {
                    self.messages.entry(*id).or_default().sent = Some((*to, record.at_us));
                }
                What::Told { place, .. } => {
                    self.pass(who, place);
                    if !self.audience.sees_at(who, place) {
                        self.verdict.phantom += 1;
                        self.verdict.case(|| {
                            format!(
                                "device {who} was shown the change at {place:?}, and was not in that group"
                            )
                        });
                    }
                    self.told.entry(place.clone()).or_default().insert(who);
                }
                What::Unchanged { group, code } => {
                    self.verdict.refused_wrongly += 1;
                    self.verdict.case(|| format!("a change of group {group} was refused: {code}"));
                }
                What::Acked { id, place } => {
                    self.messages.entry(*id).or_default().acked = Some((place.clone(), record.at_us));
                    self.stands(*id, place);
                }
                What::Refused { id, code } => {
                    let fate = self.messages.entry(*id).or_default();
                    fate.refused = true;
                    match (fate.sent, code.as_str()) {
                        (_, code) if code == Code::MessageTooLarge.as_str_name() => {}
                        (Some((To::Group(group), sent_us)), code)
                            if code == Code::NotAMember.as_str_name() =>
                        {
                            self.turned_away.push((group, id.from, sent_us, record.at_us));
                        }
                        _ => self.verdict.refused_wrongly += 1,
                    }
                }
                What::Shown { id, place, liar } => self.shown(who, *id, place, liar.as_deref(), record.at_us),
                What::Disconnected { reason } if history.gateways_live => {
                    self.verdict.connections_dropped += 1;
                    self.verdict.case(|| format!("device {who} was disconnected: {reason}"));
                }
                What::Ended { reason } if history.gateways_live => {
                    self.verdict.connections_dropped += 1;
                    self.verdict.case(|| format!("the session of device {who} ended: {reason}"));
                }
                What::HistoryLost { place } => {
                    if self.new_histories.entry(place.chat.clone()).or_default().insert(place.history) {
                        self.verdict.histories_lost += 1;
                    }
                    // What follows begins anew.
                    if let Some(seen) = self.seen.get_mut(who as usize) {
                        seen.lost.insert(place.chat.clone());
                        seen.seqs.insert((place.chat.clone(), place.history), place.seq.saturating_sub(1));
                    }
                }
                What::Gap { place, to } => {
                    if let Some(seen) = self.seen.get_mut(who as usize) {
                        seen.seqs.insert((place.chat.clone(), place.history), *to);
                    }
                    if !self.excuses.gaps {
                        self.verdict.gaps += 1 + to.saturating_sub(place.seq);
                        self.verdict.case(|| format!("device {who} was told of a gap: {place:?} to {to}"));
                    }
                }
                What::Made { .. }
                | What::Asked { .. }
                | What::Changed { .. }
                | What::Unknown { .. }
                | What::Confirmed { .. }
                | What::Connected { .. }
                | What::Disconnected { .. }
                | What::Ended { .. }
                | What::FaultBegin { .. }
                | What::FaultEnd { .. } => {}
            }
        }
    }

    /// One id, one place; one place, one id. Under a new history an id may stand elsewhere.
    fn stands(&mut self, id: MessageId, place: &Place) {
        let fate = self.messages.entry(id).or_default();
        match &fate.stands {
            None => fate.stands = Some(place.clone()),
            Some(other) if other == place => {}
            Some(other) if self.excuses.history_lost && other.history != place.history => {
                fate.stands = Some(place.clone());
            }
            Some(other) => {
                self.verdict.doubled += 1;
                let case = format!("{id} stands at {other:?} and at {place:?}");
                self.verdict.case(|| case);
            }
        }
        self.takes(id, place);
    }

    /// One place; one message.
    fn takes(&mut self, id: MessageId, place: &Place) {
        let first = *self.places.entry(place.clone()).or_insert(id);
        if first != id {
            self.verdict.doubled += 1;
            self.verdict.case(|| format!("{first} and {id} both stand at {place:?}"));
        }
    }

    fn shown(&mut self, who: u32, id: Option<MessageId>, place: &Place, liar: Option<&str>, at_us: u64) {
        self.verdict.shown += 1;
        self.pass(who, place);
        let sent = id.and_then(|id| Some((id, self.messages.get(&id)?.sent?.0)));
        let Some((id, to)) = sent else {
            self.verdict.phantom += 1;
            self.verdict.case(|| format!("device {who} was shown {id:?} at {place:?}, which nobody sent"));
            return;
        };
        let addressed = self.audience.may_see(who, id.from, to, place);
        if !addressed || liar.is_some() || !self.audience.is_chat_of(&place.chat, id.from, to) {
            self.verdict.phantom += 1;
            self.verdict.case(|| {
                format!(
                    "device {who} was shown {id} at {place:?} from {liar:?}; it went from {} to {to:?}",
                    id.from
                )
            });
            return;
        }
        self.stands(id, place);
        let Some(seen) = self.seen.get_mut(who as usize) else { return };
        let again = seen.messages.insert(id, place.history);
        if let Some(history) = again {
            if !(self.excuses.history_lost && history != place.history) {
                self.verdict.doubled += 1;
                self.verdict.case(|| format!("device {who} was shown {id} twice, last at {place:?}"));
            }
            return;
        }
        let counter = seen.counters.entry((place.chat.clone(), place.history, id.from)).or_default();
        if id.n <= *counter {
            let before = *counter;
            self.verdict.reordered += 1;
            self.verdict.case(|| format!("device {who} was shown {id} behind {}-{before}", id.from));
        }
        *counter = (*counter).max(id.n);
        if let Some(fate) = self.messages.get_mut(&id) {
            fate.shown_to.push(who);
            if !self.away.contains(&who) {
                fate.last_shown_us = fate.last_shown_us.max(at_us);
            }
        }
    }

    /// A device's seqs rise by one.
    fn pass(&mut self, who: u32, place: &Place) {
        let Some(seen) = self.seen.get_mut(who as usize) else { return };
        let key = (place.chat.clone(), place.history);
        // A device that is new to a chat may begin in its middle; that nothing it should have is missing, the
        // comparison of sets says. In a group, one that was out goes on where it came back.
        let last = *seen.seqs.entry(key.clone()).or_insert(place.seq.saturating_sub(1));
        let last = self.audience.next(who, last, place).map_or(last, |next| last.max(next - 1));
        if place.seq <= last {
            self.verdict.reordered += 1;
            self.verdict.case(|| format!("device {who} was shown {place:?} behind seq {last}"));
        } else if place.seq > last + 1 {
            self.verdict.gaps += place.seq - last - 1;
            self.verdict.case(|| format!("device {who} passed from seq {last} to {place:?}"));
        }
        seen.seqs.insert(key, place.seq.max(last));
    }

    /// The store may have lost a group as a whole: its history is another, and nothing stands in that.
    fn is_lost(&self, chat: &Arc<str>) -> bool {
        let is_new = |history: &u64| self.new_histories.get(chat).is_some_and(|new| new.contains(history));
        let stands = |place: &Place| place.chat == *chat && is_new(&place.history);
        self.excuses.history_lost && self.new_histories.contains_key(chat) && !self.places.keys().any(stands)
    }

    fn compare_groups(&mut self) {
        for (group, user, sent_us, refused_us) in std::mem::take(&mut self.turned_away) {
            let absences = self.absences.get(&(group, user)).map_or(&[][..], Vec::as_slice);
            let was_out = absences.iter().any(|(from, until)| *from <= refused_us && sent_us <= *until);
            let is_lost = self.groups.get(group as usize).is_some_and(|made| self.is_lost(&made.chat));
            if !was_out && !is_lost {
                self.verdict.refused_wrongly += 1;
                self.verdict
                    .case(|| format!("user {user} was refused as no member of group {group}, and was one"));
            }
        }
        for (place, told) in std::mem::take(&mut self.told) {
            let addressed = self.audience.owed_at(&place);
            let missing: Vec<u32> = addressed.into_iter().filter(|device| !told.contains(device)).collect();
            if !missing.is_empty() && !self.is_lost(&place.chat) {
                self.verdict.lost += 1;
                self.verdict
                    .case(|| format!("devices {missing:?} never saw the change of a group at {place:?}"));
            }
        }
    }

    fn compare(&mut self) {
        self.compare_groups();
        let (mut acks, mut pushes) = (Vec::new(), Vec::new());
        let mut messages: Vec<(MessageId, Fate)> = std::mem::take(&mut self.messages).into_iter().collect();
        messages.sort_by_key(|(id, _)| *id);
        for (id, fate) in messages {
            let Some((to, sent_us)) = fate.sent else { continue };
            let verdict = &mut self.verdict;
            verdict.sent += 1;
            if fate.refused {
                verdict.refused += 1;
                if !fate.shown_to.is_empty() {
                    verdict.refused_delivered += 1;
                    verdict.case(|| format!("{id} was refused, and shown to {:?}", fate.shown_to));
                }
            }
            let outside = |place: &&Place| matches!(to, To::Group(_)) && !self.audience.sees(id.from, place);
            if let Some(place) = fate.stands.as_ref().filter(outside) {
                verdict.phantom += 1;
                verdict
                    .case(|| format!("{id} stands at {place:?}, and its sender was not in that group then"));
            }
            let Some((place, acked_us)) = &fate.acked else {
                verdict.unknown += u64::from(!fate.refused);
                continue;
            };
            verdict.acked += 1;
            acks.push(acked_us.saturating_sub(sent_us));
            let addressed = self.audience.owed(id.from, to, place);
            let missing: Vec<u32> =
                addressed.into_iter().filter(|device| !fate.shown_to.contains(device)).collect();
            if missing.is_empty() {
                pushes.push(fate.last_shown_us.saturating_sub(*acked_us));
            } else if self.excuses.history_lost
                && self
                    .new_histories
                    .get(&place.chat)
                    .is_some_and(|new| new.iter().any(|h| *h != place.history))
                && missing.iter().all(|device| {
                    let seen = &self.seen[*device as usize];
                    let had = seen.seqs.contains_key(&(place.chat.clone(), place.history));
                    !had || seen.lost.contains(&place.chat)
                })
            {
                verdict.cut += 1;
            } else {
                verdict.lost += 1;
                verdict
                    .case(|| format!("{id} was acknowledged at {place:?}; devices {missing:?} never saw it"));
            }
        }
        self.verdict.ack_ms = Times::of(acks);
        self.verdict.push_ms = Times::of(pushes);
    }
}

impl Times {
    fn of(mut times_us: Vec<u64>) -> Times {
        times_us.sort_unstable();
        let at = |quantile: f64| {
            let place = (times_us.len() as f64 * quantile).ceil() as usize;
            times_us.get(place.saturating_sub(1)).map_or(0.0, |us| *us as f64 / 1_000.0)
        };
        Times { p99: at(0.99), max: at(1.0) }
    }
}

/// Stands for any change of a group: no message of anybody's has its place.
const CHANGE: MessageId = MessageId { from: u32::MAX, n: 0 };
/// More than these help nobody; the history has them all.
const CASES_MAX: usize = 10;

#[cfg(test)]
mod tests;
