//! One device's application: it notes what it is shown and confirms it at once. A task of the load's thread.
//!
//! Trap: what the library tells while we close it ourselves is no fault.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use client::{Client, Content, Event, Events, Keep, Message, Options, Target, Token};
use proto::wire::{GroupAction, GroupChange};

use super::super::history::{Change, MessageId, Place, What};
use super::{Shared, body, id_in};

/// A device that is there.
pub(super) struct Session {
    pub client: Client,
    /// We end it ourselves.
    leaving: Arc<AtomicBool>,
}

impl Session {
    /// Logs out in order, if it has not been done.
    pub async fn end(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.client.clone().close().await;
    }
}

/// Starts the session of device `number`, and its application.
pub(super) fn start(
    shared: &Arc<Shared>,
    number: u32,
    gateways: &[SocketAddr],
    keep: Keep,
) -> Result<Session, String> {
    let device = &shared.devices[number as usize];
    let mut addresses: Vec<String> = gateways.iter().map(SocketAddr::to_string).collect();
    // Second devices begin elsewhere than first ones.
    let first = (number as usize).checked_rem(addresses.len()).unwrap_or(0);
    addresses.rotate_left(first);
    let options = Options {
        keep,
        // A row waits for everybody to be back; people wait longer.
        backoff_ms_max: BACKOFF_MS_MAX,
        token: shared.plan.tokens.clone().map_or_else(Token::none, |tokens| {
            let user = device.name.clone();
            Token::from_fn(move || Ok::<_, std::convert::Infallible>(tokens.of(&user)))
        }),
        ..Options::new(device.name.clone(), device.device.clone(), Target::Gateway(addresses))
    };
    let (client, events) = Client::start(options).map_err(|error| error.to_string())?;
    let leaving = Arc::new(AtomicBool::new(false));
    tokio::spawn(listen(shared.clone(), number, events, leaving.clone()));
    Ok(Session { client, leaving })
}

async fn listen(shared: Arc<Shared>, number: u32, mut events: Events, leaving: Arc<AtomicBool>) {
    let (mut synced, mut online) = (false, false);
    while let Some(event) = events.next().await {
        let what = match event {
            // What is not confirmed before the session ends is handed out again by the next.
            Event::Message(_) if leaving.load(Ordering::Relaxed) => continue,
            Event::Message(message) => {
                let (chat, history, seq) = (message.chat.clone(), message.history, message.seq);
                let place = Place { chat, history, seq };
                let what = match message.body.content() {
                    Content::Group(change) => told(&shared, number, &message.sender, &change, place),
                    _ => shown(&shared, number, &message, place),
                };
                shared.journal.add(Some(number), what);
                events.confirm(&message);
                continue;
            }
            Event::Gap { chat, history, from, to } => {
                What::Gap { place: Place { chat, history, seq: from }, to }
            }
            Event::HistoryLost { chat, history, from_seq } => {
                shared.histories_lost.fetch_add(1, Ordering::Relaxed);
                What::HistoryLost { place: Place { chat, history, seq: from_seq } }
            }
            Event::Connected { address, .. } => {
                online = true;
                shared.online.fetch_add(1, Ordering::Relaxed);
                What::Connected { address }
            }
            Event::Delivered { .. }
            | Event::Read { .. }
            | Event::Unread { .. }
            | Event::Hidden { .. }
            | Event::Presence { .. }
            | Event::Typing { .. }
            | Event::WatchRefused { .. }
            | Event::EarlierFailed { .. }
            | Event::Trouble { .. } => continue,
            Event::Synced => {
                if !std::mem::replace(&mut synced, true) {
                    shared.synced.fetch_add(1, Ordering::Relaxed);
                }
                continue;
            }
            Event::Disconnected { reason } => What::Disconnected { reason },
            Event::Ended(ended) => What::Ended { reason: ended.to_string() },
        };
        let is_end = matches!(what, What::Ended { .. } | What::Disconnected { .. });
        if is_end && std::mem::take(&mut online) {
            shared.online.fetch_sub(1, Ordering::Relaxed);
        }
        if !(is_end && leaving.load(Ordering::Relaxed)) {
            shared.journal.add(Some(number), what);
        }
    }
}

fn shown(shared: &Shared, number: u32, message: &Message, place: Place) -> What {
    // All of it must be what was sent, and not just the id in it.
    let is_whole =
        |id: &MessageId| body(&shared.run, *id, shared.plan.body_bytes).as_bytes() == *message.body;
    let id = id_in(&shared.run, &message.body).filter(is_whole);
    let sender = id.and_then(|id| shared.devices.get(id.from as usize));
    let honest = sender.is_none_or(|device| device.name == message.sender);
    shared.shown.fetch_add(1, Ordering::Relaxed);
    if id.is_some() {
        shared.track.lock().shown(number, &place);
    }
    What::Shown { id, place, liar: (!honest).then(|| message.sender.clone()) }
}

fn told(shared: &Shared, number: u32, sender: &str, change: &GroupChange, place: Place) -> What {
    let user_of =
        |name: &str| shared.devices.iter().find(|device| device.name == name).map(|device| device.user);
    let sender = user_of(sender);
    let named = change.members.iter().filter_map(|member| user_of(&member.user));
    let change = match change.action() {
        GroupAction::GroupCreate => {
            Change { joins: sender.into_iter().chain(named).collect(), ..Change::default() }
        }
        GroupAction::GroupAdd => Change { joins: named.collect(), ..Change::default() },
        GroupAction::GroupRemove => Change { leaves: named.collect(), ..Change::default() },
        GroupAction::GroupLeave => Change { leaves: sender.into_iter().collect(), ..Change::default() },
        // No load asks for these.
        _ => Change::default(),
    };
    let mut track = shared.track.lock();
    track.changed(&place, &change);
    track.shown(number, &place);
    What::Told { place, change }
}

const BACKOFF_MS_MAX: u64 = 1_000;
