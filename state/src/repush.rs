//! Pushing again what others, or an earlier stream, may not have brought: for servers whose mark stands still, and for gateways
//! that were away. A task of its own; the queue of what is to be done is pure and bounded.
//!
//! From the recency index come the chats that had messages since then, bucket by bucket; of each chat the messages since
//! then are read and go through the normal fan-out, oldest first.
//!
//! Trap: this runs beside live traffic in the same thread and store. It takes a little at a time and rests as long as it
//! worked, so that what people wait for goes first.

mod job;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use proto::name::Chat;
use tokio::sync::Notify;

use crate::core::Core;
use crate::fan_out::{self, Accepted};
use crate::store::{Op, Page, Recent, StoreError, Stored, read};
use crate::takeover::{Buckets, Life, Takeover};
use job::{CHATS_PER_BUCKET, Job, Walk};

/// What is to be pushed again.
#[derive(Debug, Default)]
pub struct Repush {
    queue: Mutex<Queue>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    /// Gateways that were away.
    replays: BTreeMap<u32, Missing>,
    takeovers: VecDeque<Takeover>,
    /// Chats in which something may stand that was not pushed, and since when.
    doubted: BTreeMap<String, u64>,
    /// Replays that were begun, each for gateways of its own, or for all: then of doubted chats.
    replaying: VecDeque<Job>,
    /// The takeover that was begun.
    taking: Option<Job>,
    /// Whose takeover a step is at now.
    at: Option<Life>,
    /// The last step was one of a replay: a takeover goes first now.
    replayed: bool,
}

/// What a gateway misses: pushes of messages that are newer than the one store time, and not newer than the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Exclusive.
    pub from_us: u64,
    /// `u64::MAX`: all until now.
    pub upto_us: u64,
}

/// What there is to do.
enum Next {
    Job(Box<Job>),
    /// Only for gateways that have no room now.
    Full,
    Nothing,
}

/// Takeovers that may wait; others stay where they are until there is room.
const TAKEOVERS_MAX: usize = 256;

/// Chats that are read at a time: each may bring [`crate::store::PULL_BYTES_MAX`].
const CHATS_PER_STEP: usize = 16;

/// Messages of a chat that are read at a time.
const MESSAGES_PER_PULL: usize = 100;

/// What is this much later than the end of a job was not stored since: the store's clock was put back, and a chat that was written to before
/// that goes on with times in the future. Behind a smaller step the last takeover, minutes later, sees them.
const AHEAD_US: u64 = 60_000_000;

/// Longest rest between two steps, while gateways have no room, and while the store does not answer.
const REST_MAX: Duration = Duration::from_millis(50);
const FULL_PAUSE: Duration = Duration::from_millis(50);
const STORE_PAUSE: Duration = Duration::from_millis(250);

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stepped {
    /// There is nothing to do.
    Idle,
    /// There may be more.
    More,
    /// There is more, for gateways that have no room now.
    Full,
    /// The store did not answer; the same is to be tried again.
    Failed,
}

impl Repush {
    /// A gateway is back that misses pushes.
    pub fn replay(&self, incarnation: u32, missing: Missing) {
        let mut queue = self.queue.lock();
        let all = queue.replays.entry(incarnation).or_insert(missing);
        all.from_us = missing.from_us.min(all.from_us);
        all.upto_us = missing.upto_us.max(all.upto_us);
        drop(queue);
        self.wake.notify_one();
    }

    /// A chat in which something newer than this may stand that was not pushed.
    pub fn look_again(&self, chat: String, from_us: u64) {
        let mut queue = self.queue.lock();
        let all = queue.doubted.entry(chat).or_insert(from_us);
        *all = from_us.min(*all);
        drop(queue);
        self.wake.notify_one();
    }

    /// Whether another takeover may be put in.
    pub fn has_room(&self) -> bool {
        self.queue.lock().takeovers.len() < TAKEOVERS_MAX
    }

    /// Buckets of a server whose mark stands still.
    pub fn take_over(&self, takeover: Takeover) {
        self.queue.lock().takeovers.push_back(takeover);
        self.wake.notify_one();
    }

    /// Whether something of this life is still to be pushed again.
    pub fn is_busy_with(&self, life: &Life) -> bool {
        let queue = self.queue.lock();
        queue.takeovers.iter().any(|takeover| takeover.of == *life)
            || queue.taking.as_ref().is_some_and(|job| job.of.as_ref() == Some(life))
            || queue.at.as_ref() == Some(life)
    }

    /// Replays and takeovers take turns: neither waits until the other is through. `is_full` says of a gateway that it is to
    /// be waited for.
    fn next(&self, is_full: impl Fn(u32) -> bool) -> Next {
        let mut queue = self.queue.lock();
        queue.at = None;
        let replayed = std::mem::take(&mut queue.replayed);
        let takeover = if replayed { queue.takeover() } else { None };
        if let Some(job) = takeover.or_else(|| queue.replay(is_full)).or_else(|| queue.takeover()) {
            queue.at.clone_from(&job.of);
            queue.replayed = job.of.is_none();
            return Next::Job(Box::new(job));
        }
        if queue.replaying.is_empty() { Next::Nothing } else { Next::Full }
    }

    fn put_back(&self, job: Job) {
        let mut queue = self.queue.lock();
        queue.at = None;
        if job.of.is_some() { queue.taking = Some(job) } else { queue.replaying.push_back(job) }
    }

    fn done(&self) {
        self.queue.lock().at = None;
    }
}

impl Queue {
    fn takeover(&mut self) -> Option<Job> {
        if let Some(job) = self.taking.take() {
            return Some(job);
        }
        let Takeover { of, from_us, upto_us, buckets } = self.takeovers.pop_front()?;
        Some(Job::new(from_us, upto_us, buckets, BTreeMap::new(), Some(of)))
    }

    /// The next replay whose gateways have room. One that is for others as well is done for these alone, and stays for the
    /// others where it is.
    fn replay(&mut self, is_full: impl Fn(u32) -> bool) -> Option<Job> {
        // What a gateway misses that is served already waits, and becomes one: else jobs for it would pile up, each with what the others have.
        let is_served = |incarnation: &u32| self.replaying.iter().any(|job| job.to.contains_key(incarnation));
        let (served, missing): (BTreeMap<_, _>, BTreeMap<_, _>) = std::mem::take(&mut self.replays)
            .into_iter()
            .partition(|(incarnation, _)| is_served(incarnation));
        self.replays = served;
        if !missing.is_empty() {
            let from_us = missing.values().map(|missing| missing.from_us).min().unwrap_or(0);
            let upto_us = missing.values().map(|missing| missing.upto_us).max().unwrap_or(u64::MAX);
            let to =
                missing.into_iter().map(|(incarnation, missing)| (incarnation, missing.from_us)).collect();
            self.replaying.push_back(Job::new(from_us, upto_us, Buckets::all(), to, None));
        }
        if !self.doubted.is_empty() {
            let doubted = std::mem::take(&mut self.doubted);
            let from_us = doubted.values().min().copied().unwrap_or(0);
            let chats = doubted.into_keys().map(|chat| Recent { chat, time_us: from_us }).collect();
            let job = Job::new(from_us, u64::MAX, Buckets::default(), BTreeMap::new(), None);
            self.replaying.push_back(Job { chats, ..job });
        }
        for _ in 0..self.replaying.len() {
            let mut job = self.replaying.pop_front()?;
            if job.to.is_empty() {
                return Some(job);
            }
            let (full, room): (BTreeMap<_, _>, _) =
                std::mem::take(&mut job.to).into_iter().partition(|(incarnation, _)| is_full(*incarnation));
            if !full.is_empty() {
                self.replaying.push_back(Job { to: full, ..job.clone() });
            }
            job.to = room;
            if !job.to.is_empty() {
                return Some(job);
            }
        }
        None
    }
}

/// Pushes again, for ever.
pub async fn run(core: Arc<Core>) {
    loop {
        let began = core.clock.now();
        match step(&core).await {
            Stepped::Idle => core.repush.wake.notified().await,
            Stepped::More => {
                let worked = core.clock.now().saturating_duration_since(began);
                core.clock.pause(worked.min(REST_MAX)).await;
            }
            Stepped::Full => core.clock.pause(FULL_PAUSE).await,
            Stepped::Failed => core.clock.pause(STORE_PAUSE).await,
        }
    }
}

/// A little of what is to be done.
pub async fn step(core: &Core) -> Stepped {
    let is_full = |incarnation| core.gateways.is_open(incarnation) && !core.gateways.has_room(incarnation);
    let mut job = match core.repush.next(is_full) {
        Next::Job(job) => *job,
        Next::Full => return Stepped::Full,
        Next::Nothing => return Stepped::Idle,
    };
    if !job.to.is_empty() {
        leave_out_the_departed(core, &mut job);
        if job.to.is_empty() {
            return Stepped::More;
        }
    }
    let done =
        if job.chats.is_empty() { look(core, &mut job).await } else { push_some(core, &mut job).await };
    match done {
        // Going up or down the chat in front: another try will not read it either.
        Err(StoreError::Corrupt(text)) if !job.chats.is_empty() => {
            let chat = job.chats.pop_front().map(|recent| recent.chat);
            tracing::error!(chat, text, "not pushed again");
            job.at = None;
            core.repush.put_back(job);
            Stepped::More
        }
        Ok(true) => {
            let pushed = job.pushed;
            core.repush.done();
            match &job.of {
                Some((server, life)) => {
                    tracing::info!(server, life, pushed, "pushed again for another server")
                }
                None if job.to.is_empty() => tracing::info!(pushed, "looked again for what was in doubt"),
                None => tracing::info!(gateways = job.to.len(), pushed, "pushed again what gateways missed"),
            }
            Stepped::More
        }
        Ok(false) => {
            core.repush.put_back(job);
            Stepped::More
        }
        Err(error) => {
            core.store_failed(&error);
            core.repush.put_back(job);
            Stepped::Failed
        }
    }
}

/// Gateways whose stream has ended meanwhile get theirs when they are back.
fn leave_out_the_departed(core: &Core, job: &mut Job) {
    job.to.retain(|incarnation, since_us| {
        let here = core.gateways.is_open(*incarnation);
        if !here {
            core.gateways.missed().note(*incarnation, *since_us, &[]);
        }
        here
    });
}

/// Asks the recency index. `true`: there is nothing left.
async fn look(core: &Core, job: &mut Job) -> Result<bool, StoreError> {
    let asked = job.ask();
    if asked.is_empty() {
        return Ok(true);
    }
    let ask = |(bucket, after_us): &(u32, u64)| Op::Recent {
        bucket: *bucket,
        after_us: *after_us,
        limit: CHATS_PER_BUCKET,
    };
    let ops: Vec<Op> = asked.iter().map(ask).collect();
    let found = core.apply(&ops).await.into_iter().map(read::recent).collect::<Result<Vec<_>, _>>()?;
    job.found(&asked, found);
    Ok(false)
}

/// Pushes what fits one step: the newest page of several chats, or some more of one that has many.
async fn push_some(core: &Core, job: &mut Job) -> Result<bool, StoreError> {
    if job.at.is_some() {
        go_up(core, job).await?;
        return Ok(false);
    }
    let some: Vec<Recent> = job.chats.iter().take(CHATS_PER_STEP).cloned().collect();
    let wanted = with_readers(core, job, &some).await?;
    let newest = |recent: &&Recent| Op::Pull {
        chat: recent.chat.clone(),
        reader: String::new(),
        cursor: 0,
        limit: MESSAGES_PER_PULL,
        reverse: true,
    };
    let ops: Vec<Op> = wanted.iter().map(newest).collect();
    let pages = core.apply(&ops).await;
    let mut round = Vec::new();
    let mut long = Vec::new();
    for (recent, page) in wanted.iter().zip(pages) {
        let page = match read::page(page) {
            // Another try will not read it either.
            Err(StoreError::Corrupt(text)) => {
                tracing::error!(chat = recent.chat, text, "not pushed again");
                continue;
            }
            page => page?,
        };
        if reaches_back(&page, job.from_us) {
            round.extend(accepted(&recent.chat, page, job));
        } else {
            long.push((*recent).clone());
        }
    }
    // Only now that all is read: whatever failed above is tried again as a whole.
    job.chats.drain(..some.len());
    push(core, job, round).await;
    let begun = long.first().map(|recent| recent.chat.clone());
    for recent in long.into_iter().rev() {
        job.chats.push_front(recent);
    }
    if let Some(chat) = begun {
        job.at = go_down(core, job.from_us, &chat).await?;
    }
    Ok(job.chats.is_empty() && job.ask().is_empty())
}

/// Those of the chats that somebody reads at the gateways meant.
async fn with_readers<'a>(
    core: &Core,
    job: &Job,
    chats: &'a [Recent],
) -> Result<Vec<&'a Recent>, StoreError> {
    if job.to.is_empty() {
        return Ok(chats.iter().collect());
    }
    let names: Vec<Option<Chat>> = chats.iter().map(|recent| Chat::parse(&recent.chat).ok()).collect();
    let routes = fan_out::routes_of_members(core, names.iter().flatten()).await;
    let is_read = |chat: &Chat| {
        // Who reads a group is looked for when it is pushed.
        let Some((low, high)) = chat.pair_members() else { return true };
        [low, high]
            .iter()
            .filter_map(|name| routes.get(*name))
            .flatten()
            .any(|route| job.to.contains_key(&proto::incarnation_of(route.connection)))
    };
    let read = chats.iter().zip(&names).filter(|(_, chat)| chat.as_ref().is_some_and(is_read));
    Ok(read.map(|(recent, _)| recent).collect())
}

/// Finds where the messages begin that are newer than that, in a chat where they are more than a page.
async fn go_down(core: &Core, from_us: u64, chat: &str) -> Result<Option<Walk>, StoreError> {
    let mut cursor = 0;
    let mut head = 0;
    loop {
        let (chat, reader) = (chat.to_owned(), String::new());
        let op = Op::Pull { chat, reader, cursor, limit: MESSAGES_PER_PULL, reverse: true };
        let page = read::page(core.apply(&[op]).await.swap_remove(0))?;
        head = page.head.max(head);
        if reaches_back(&page, from_us) {
            let oldest = page.messages.iter().rev().find(|message| message.time_us > from_us);
            let below = oldest.map_or(cursor, |oldest| oldest.seq);
            return Ok(Some(Walk { cursor: below.saturating_sub(1), head }));
        }
        cursor = page.read_to;
    }
}

/// Pushes the next page of the chat in front.
async fn go_up(core: &Core, job: &mut Job) -> Result<(), StoreError> {
    let (Some(walk), Some(recent)) = (&job.at, job.chats.front()) else { return Ok(()) };
    let chat = recent.chat.clone();
    let op = Op::Pull {
        chat: chat.clone(),
        reader: String::new(),
        cursor: walk.cursor,
        limit: MESSAGES_PER_PULL,
        reverse: false,
    };
    let page = read::page(core.apply(&[op]).await.swap_remove(0))?;
    // Nothing was there to look at: the chat ends here.
    let (head, last) = (walk.head, if page.read_to == 0 { u64::MAX } else { page.read_to });
    let mut round =
        accepted(&chat, Page { messages: page.messages.into_iter().rev().collect(), ..page }, job);
    round.retain(|accepted| accepted.message.seq <= head);
    push(core, job, round).await;
    if last >= head {
        job.at = None;
        job.chats.pop_front();
    } else if let Some(walk) = &mut job.at {
        walk.cursor = last;
    }
    Ok(())
}

/// Whether nothing newer than that lies below this page.
fn reaches_back(page: &Page, from_us: u64) -> bool {
    // What is damaged tells no time; what lies below it may be newer.
    let is_older = |last: &Stored| last.time_us <= from_us;
    page.read_to <= page.first.max(1) || page.messages.last().is_some_and(is_older)
}

/// The messages of a page, newest first, that the job means; oldest first.
fn accepted(chat: &str, page: Page, job: &Job) -> Vec<Accepted> {
    let meant = |message: &Stored| {
        let is_ahead = message.time_us > job.upto_us.saturating_add(AHEAD_US);
        message.time_us > job.from_us && (message.time_us <= job.upto_us || is_ahead)
    };
    page.messages
        .into_iter()
        .rev()
        .filter(meant)
        .map(|stored| Accepted::pushed_again(chat.to_owned(), page.history, stored.into()))
        .collect()
}

async fn push(core: &Core, job: &mut Job, round: Vec<Accepted>) {
    if round.is_empty() {
        return;
    }
    job.pushed += round.len() as u64;
    core.metrics.pushed_again.inc_by(round.len() as u64);
    fan_out::push_all(core, &round, &job.to).await;
}

#[cfg(test)]
mod tests;
