//! A crowd of the client library's sessions that do nothing but stay, and come back when they are cut off. One thread with
//! a runtime of its own.
//!
//! Trap: each is a socket of this process's one fd table.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use client::{Client, Event, Events, Keep, Options, Target};
use gateway::sys;
use tokio::sync::watch;

use super::TortureError;
use super::tool::wait_until;

/// See the head of this file. Dropped, they are gone.
#[derive(Debug)]
pub struct Idlers {
    counts: Arc<Counts>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    online: AtomicU32,
    dropped: AtomicU32,
    failed: AtomicBool,
}

impl Idlers {
    /// Logs in so many users named `NAME-NUMBER`, who try the addresses in this order.
    pub fn start(
        count: u32,
        addresses: &[SocketAddr],
        name: &str,
        within: Duration,
    ) -> Result<Idlers, TortureError> {
        sys::raise_fd_limit()
            .map_err(|error| TortureError::io("cannot raise the limit of open files", error))?;
        let counts = Arc::new(Counts::default());
        let (stop, stopped) = watch::channel(false);
        let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        let (own, name) = (counts.clone(), name.to_owned());
        let live = move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(live(own, count, addresses, name, stopped)),
            Err(_) => own.failed.store(true, Ordering::Relaxed),
        };
        let thread = std::thread::Builder::new()
            .name("idlers".into())
            .spawn(live)
            .map_err(|error| TortureError::io("cannot start a thread", error))?;
        let idlers = Idlers { counts, stop, thread: Some(thread) };
        match idlers.wait_online(count, within) {
            true => Ok(idlers),
            false => Err(TortureError::Late { what: "login of the crowd", waited: within }),
        }
    }

    /// How many are logged in.
    pub fn online(&self) -> u32 {
        self.counts.online.load(Ordering::Relaxed)
    }

    /// How often one was cut off.
    pub fn dropped(&self) -> u32 {
        self.counts.dropped.load(Ordering::Relaxed)
    }

    /// Waits until so many are logged in. Whether they are.
    pub fn wait_online(&self, count: u32, within: Duration) -> bool {
        wait_until(within, || self.online() >= count || self.counts.failed.load(Ordering::Relaxed))
            && self.online() >= count
    }

    /// Waits until all but so many have been cut off at least once.
    pub fn wait_below(&self, rest: u32, within: Duration) -> bool {
        wait_until(within, || self.dropped() + rest >= self.online().max(rest))
    }
}

impl Drop for Idlers {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed.
            let _ = thread.join();
        }
    }
}

async fn live(
    counts: Arc<Counts>,
    count: u32,
    addresses: Vec<String>,
    name: String,
    mut stop: watch::Receiver<bool>,
) {
    let mut clients = Vec::new();
    for number in 0..count {
        let target = Target::Gateway(addresses.clone());
        let options =
            Options { keep: Keep::Memory, ..Options::new(format!("{name}-{number}"), "phone", target) };
        let Ok((client, events)) = Client::start(options) else {
            return counts.failed.store(true, Ordering::Relaxed);
        };
        tokio::spawn(watch_one(counts.clone(), events));
        clients.push(client);
        // So many at once would wait in the listener's queue and time out there.
        while number + 1 >= counts.online.load(Ordering::Relaxed) + LOGINS_AT_ONCE && !*stop.borrow() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    // An error: whoever holds them is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn watch_one(counts: Arc<Counts>, mut events: Events) {
    while let Some(event) = events.next().await {
        match event {
            Event::Connected { .. } => drop(counts.online.fetch_add(1, Ordering::Relaxed)),
            Event::Disconnected { .. } => {
                counts.online.fetch_sub(1, Ordering::Relaxed);
                counts.dropped.fetch_add(1, Ordering::Relaxed);
            }
            Event::Message(message) => events.confirm(&message),
            Event::Delivered { .. }
            | Event::Read { .. }
            | Event::Unread { .. }
            | Event::Hidden { .. }
            | Event::Presence { .. }
            | Event::Typing { .. }
            | Event::WatchRefused { .. }
            | Event::EarlierFailed { .. }
            | Event::Trouble { .. } => {}
            Event::Synced | Event::Gap { .. } | Event::HistoryLost { .. } | Event::Ended(_) => {}
        }
    }
}

const LOGINS_AT_ONCE: u32 = 256;
const LOOK_EVERY: Duration = Duration::from_millis(1);
