//! Clients of the gateway in this process, as tests want them, and what they are told.

use std::path::Path;
use std::time::Duration;

use client::{Ended, Event, Events, Keep, Message, Options, Target};

use super::Fake;

/// Without a store, and impatient.
pub fn options(fake: &Fake, user: &str) -> Options {
    let target = Target::Gateway(vec![fake.address.to_string()]);
    let mut options = Options { keep: Keep::Memory, ..Options::new(user, "test", target) };
    options.outbox.resend_ms = 300;
    options.inbox.answer_ms_max = 300;
    (options.backoff_ms_min, options.backoff_ms_max) = (2, 50);
    options
}

/// With a store.
pub fn kept(fake: &Fake, user: &str, root: &Path) -> Options {
    Options { keep: Keep::Under(root.to_owned()), ..options(fake, user) }
}

/// The next message.
pub async fn message(events: &mut Events) -> Message {
    let next = async {
        loop {
            match events.next().await.expect("the session goes on") {
                Event::Message(message) => return message,
                Event::Ended(ended) => panic!("{ended}"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), next).await.expect("a message")
}

/// How it ended.
pub async fn ended(events: &mut Events) -> Ended {
    loop {
        if let Event::Ended(ended) = events.next().await.expect("an end") {
            return ended;
        }
    }
}

/// The next gap, lost history or message.
pub async fn told(events: &mut Events) -> Event {
    let next = async {
        loop {
            match events.next().await.expect("the session goes on") {
                Event::Connected { .. } | Event::Disconnected { .. } | Event::Synced => {}
                Event::Delivered { .. }
                | Event::Read { .. }
                | Event::Unread { .. }
                | Event::Presence { .. }
                | Event::Typing { .. }
                | Event::WatchRefused { .. } => {}
                event => return event,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), next).await.expect("an event")
}
