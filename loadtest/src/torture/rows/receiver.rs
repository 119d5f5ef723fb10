//! Receivers that die, come and go, or lose what they kept. Main thread, with a runtime of its own.
//!
//! Trap: these devices are no [`crate::torture::Load`]'s, so each row writes its own history.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use client::{Client, Event, Events, Keep, Options, Target};
use rand::Rng;

use super::common::{PATIENCE, pairs};
use crate::supervisor::{Process, Ready, Spec, binary};
use crate::torture::child;
use crate::torture::history::{Device, Journal, MessageId, Place, To, What};
use crate::torture::load::{body, id_in};
use crate::torture::tool::wait_until;
use crate::torture::{Round, Row, TortureError, World};

/// F14: the receiving program dies between receiving and confirming.
fn dies(round: &mut Round) -> Result<(), TortureError> {
    let world = round.world(pairs())?;
    let names = [world.user("a"), world.user("b")];
    let (journal, scribe) = world.journal(devices(&names, &[0, 1]), true)?;
    let folder = tempfile::tempdir().map_err(|error| TortureError::io("cannot make a temp dir", error))?;
    let messages = folder.path().join("messages");
    let mut program = receiver(&world, &names[1], folder.path(), &messages)?;
    let has = || child::read(&messages).map_or(0, |all| all.len());
    let runtime = runtime()?;
    let talk = Talk::begin(&journal, &names, world.addresses());
    // The receiver's first login has to come before the first message, or it is a new device that may begin later.
    let sending = runtime.spawn(talk.clone().send_all(vec![1; MESSAGES as usize], Duration::from_millis(2)));
    for _ in 0..KILLS {
        let more = has() + round.random.random_range(5..MESSAGES as usize / 8);
        if !wait_until(PATIENCE, || has() >= more) {
            return Err(TortureError::Late { what: "message at the receiving program", waited: PATIENCE });
        }
        journal.add(None, What::FaultBegin { fault: "receiver SIGKILL".into() });
        round.facts.faults += 1;
        program.restart()?;
    }
    let sent = runtime.block_on(sending).map_err(|error| TortureError::Load(error.to_string()))?;
    sent?;
    let began = Instant::now();
    // A missing one is for the verdict to say.
    wait_until(PATIENCE, || has() >= MESSAGES as usize);
    round.worst("caught_up_s", began.elapsed().as_secs_f64());
    std::thread::sleep(Duration::from_millis(100));
    program.kill()?;
    for (place, body) in child::read(&messages)? {
        journal.add(Some(1), What::Shown { id: id_in(&names[0], body.as_bytes()), place, liar: None });
    }
    runtime.block_on(talk.end());
    drop(runtime);
    round.judge(&scribe.finish()?.0);
    round.keep(world)
}

fn receiver(world: &World, user: &str, folder: &Path, messages: &Path) -> Result<Process, TortureError> {
    let here =
        std::env::current_exe().map_err(|error| TortureError::io("cannot find this program", error))?;
    let is_us = here.file_name().is_some_and(|name| name.to_string_lossy().ends_with("loadtest"));
    let program = if is_us { here } else { binary("loadtest")? };
    let path = |path: &Path| path.display().to_string();
    let args = [
        "torture-client".to_owned(),
        format!("--gateways={}", world.addresses().join(",")),
        format!("--user={user}"),
        format!("--folder={}", path(&folder.join("state"))),
        format!("--messages={}", path(messages)),
    ];
    let (label, folder) = ("receiver".to_owned(), folder.to_owned());
    Ok(Process::start(Spec { label, program, args: args.into(), ready: Ready::AtOnce, folder })?)
}

/// F26: devices log in and out while they are written to.
fn logs_in(round: &mut Round) -> Result<(), TortureError> {
    let world = round.world(pairs())?;
    let names: Vec<String> = (0..=RECEIVERS).map(|number| world.user(&number.to_string())).collect();
    let users: Vec<u32> = (0..=RECEIVERS).collect();
    let (journal, scribe) = world.journal(devices(&names, &users), true)?;
    let folder = tempfile::tempdir().map_err(|error| TortureError::io("cannot make a temp dir", error))?;
    let runtime = runtime()?;
    let talk = Talk::begin(&journal, &names, world.addresses());
    let (logins, deaf) = runtime.block_on(async {
        let mut comers = Vec::new();
        for number in 1..=RECEIVERS {
            let stays: Vec<u64> = (0..LOGINS).map(|_| round.random.random_range(20..250)).collect();
            comers.push(tokio::spawn(talk.clone().come_and_go(number, folder.path().to_owned(), stays)));
        }
        let stop = talk.clone();
        let to: Vec<u32> = (0..MESSAGES * 20).map(|n| n % RECEIVERS + 1).collect();
        let sending = tokio::spawn(talk.clone().send_all(to, Duration::from_millis(2)));
        let mut deaf = Duration::ZERO;
        let mut stayed = Vec::new();
        for comer in comers {
            let (longest, session) = comer.await.map_err(|error| TortureError::Load(error.to_string()))??;
            deaf = deaf.max(longest);
            stayed.push(session);
        }
        stop.stop.store(true, Ordering::Relaxed);
        sending.await.map_err(|error| TortureError::Load(error.to_string()))??;
        let until = Instant::now() + PATIENCE;
        while (1..=RECEIVERS).any(|n| talk.shown(n) < talk.acked(n)) && Instant::now() < until {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        for session in stayed {
            session.end().await;
        }
        talk.clone().end().await;
        Ok::<_, TortureError>((u64::from(RECEIVERS) * LOGINS as u64, deaf))
    })?;
    drop(runtime);
    round.facts.faults += 1;
    round.worst("logins", logins as f64);
    let verdict = round.judge(&scribe.finish()?.0);
    // Being away counts too, but nobody is for long.
    let deaf = deaf.as_secs_f64().max(verdict.push_ms.max / 1_000.0);
    round.worst("deaf_s", deaf);
    round.expect(deaf <= DEAF_S_MAX, || format!("somebody was deaf for {deaf:.1} s"));
    round.keep(world)
}

/// F27: a program of a user loses its folder between two runs, while another one of the same user stays.
fn loses_folder(round: &mut Round) -> Result<(), TortureError> {
    let world = round.world(pairs())?;
    let names = [world.user("a"), world.user("b")];
    let mut all = devices(&names, &[0, 1]);
    all[0].device = "listen".into();
    let (journal, scribe) = world.journal(all, true)?;
    let runtime = runtime()?;
    let runs = if round.gate { 3 } else { 10 };
    let talk = Talk::begin(&journal, &names, world.addresses());
    runtime.block_on(async {
        let listening = talk.open(0, "listen", Keep::Memory, Some(0))?;
        let bob = talk.open(1, "phone", Keep::Memory, Some(1))?;
        for session in [&listening, &bob] {
            talk.wait_synced(session).await?;
        }
        for _ in 0..runs {
            // Gone at the end of this turn, with every number that was given.
            let folder =
                tempfile::tempdir().map_err(|error| TortureError::io("cannot make a temp dir", error))?;
            let sender = talk.open(0, "send", Keep::Under(folder.path().to_owned()), None)?;
            for _ in 0..20 {
                talk.clone().send(&sender.client, 1).await?;
            }
            talk.answered().await?;
            sender.end().await;
            round.facts.faults += 1;
            journal.add(None, What::FaultBegin { fault: "state folder lost".into() });
        }
        let until = Instant::now() + PATIENCE;
        while (talk.shown(0) < talk.acked(1) || talk.shown(1) < talk.acked(1)) && Instant::now() < until {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        for session in [listening, bob] {
            session.end().await;
        }
        Ok::<_, TortureError>(())
    })?;
    drop(runtime);
    round.judge(&scribe.finish()?.0);
    round.keep(world)
}

fn devices(names: &[String], users: &[u32]) -> Vec<Device> {
    let device = |user: &u32| Device {
        user: *user,
        name: names[*user as usize].clone(),
        device: "phone".into(),
        away: false,
    };
    users.iter().map(device).collect()
}

fn runtime() -> Result<tokio::runtime::Runtime, TortureError> {
    // Two threads, so that it also goes on while the row waits on the main one.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| TortureError::io("cannot start a runtime", error))
}

/// User 0 writes to the others, who note what they are shown. Bodies carry the name of user 0 as their run.
struct Talk {
    journal: Journal,
    names: Vec<String>,
    addresses: Vec<String>,
    /// By number of the user: acknowledged to it, shown to it.
    counts: Vec<(AtomicU32, AtomicU32)>,
    sent: AtomicU32,
    pending: AtomicU32,
    stop: AtomicBool,
    sender: parking_lot::Mutex<Option<Session>>,
}

/// A session, and whether it is we who end it.
struct Session {
    client: Client,
    leaving: Arc<AtomicBool>,
    synced: Arc<AtomicBool>,
}

impl Session {
    async fn end(self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.client.close().await;
    }
}

impl Talk {
    fn begin(journal: &Journal, names: &[String], addresses: Vec<String>) -> Arc<Talk> {
        Arc::new(Talk {
            journal: journal.clone(),
            names: names.to_vec(),
            addresses,
            counts: names.iter().map(|_| (AtomicU32::new(0), AtomicU32::new(0))).collect(),
            sent: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            sender: parking_lot::Mutex::new(None),
        })
    }

    fn acked(&self, user: u32) -> u32 {
        self.counts[user as usize].0.load(Ordering::Relaxed)
    }

    fn shown(&self, user: u32) -> u32 {
        self.counts[user as usize].1.load(Ordering::Relaxed)
    }

    /// Starts a session; `number`: the device of the history, none if it has none.
    fn open(
        self: &Arc<Talk>,
        user: u32,
        device: &str,
        keep: Keep,
        number: Option<u32>,
    ) -> Result<Session, TortureError> {
        let mut addresses = self.addresses.clone();
        addresses.rotate_left(rand::random_range(0..self.addresses.len()));
        let target = Target::Gateway(addresses);
        let options = Options {
            keep,
            receive: number.is_some(),
            backoff_ms_max: 1_000,
            ..Options::new(&*self.names[user as usize], device, target)
        };
        let (client, events) = Client::start(options)?;
        let (leaving, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        tokio::spawn(self.clone().note(user, number, events, leaving.clone(), synced.clone()));
        Ok(Session { client, leaving, synced })
    }

    async fn note(
        self: Arc<Talk>,
        user: u32,
        number: Option<u32>,
        mut events: Events,
        leaving: Arc<AtomicBool>,
        synced: Arc<AtomicBool>,
    ) {
        while let Some(event) = events.next().await {
            if leaving.load(Ordering::Relaxed) {
                continue;
            }
            let what = match event {
                Event::Message(message) => {
                    let id = id_in(&self.names[0], &message.body);
                    let (chat, history, seq) = (message.chat.clone(), message.history, message.seq);
                    self.journal
                        .add(number, What::Shown { id, place: Place { chat, history, seq }, liar: None });
                    events.confirm(&message);
                    self.counts[user as usize].1.fetch_add(1, Ordering::Relaxed);
                    continue;
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
                    synced.store(true, Ordering::Relaxed);
                    continue;
                }
                Event::Connected { address, .. } => What::Connected { address },
                Event::Disconnected { reason } => What::Disconnected { reason },
                Event::Ended(ended) => What::Ended { reason: ended.to_string() },
                Event::Gap { chat, history, from, to } => {
                    What::Gap { place: Place { chat, history, seq: from }, to }
                }
                Event::HistoryLost { chat, history, from_seq } => {
                    What::HistoryLost { place: Place { chat, history, seq: from_seq } }
                }
            };
            self.journal.add(number, what);
        }
    }

    async fn wait_synced(&self, session: &Session) -> Result<(), TortureError> {
        let until = Instant::now() + PATIENCE;
        while !session.synced.load(Ordering::Relaxed) {
            if Instant::now() > until {
                return Err(TortureError::Late { what: "Sync", waited: PATIENCE });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// User 0's phone writes one message to each of these, in this order, until it is told to stop; all are answered then.
    async fn send_all(self: Arc<Talk>, to: Vec<u32>, every: Duration) -> Result<(), TortureError> {
        let session = self.open(0, "phone", Keep::Memory, Some(0))?;
        self.wait_synced(&session).await?;
        let mut tick = tokio::time::interval(every);
        for to in to {
            tick.tick().await;
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            self.clone().send(&session.client, to).await?;
        }
        self.answered().await?;
        *self.sender.lock() = Some(session);
        Ok(())
    }

    async fn send(self: Arc<Talk>, client: &Client, to: u32) -> Result<(), TortureError> {
        let id = MessageId { from: 0, n: self.sent.fetch_add(1, Ordering::Relaxed) + 1 };
        self.journal.add(Some(0), What::Sent { id, to: To::User(to) });
        let text = body(&self.names[0], id, 0);
        let sent = client.enqueue(&self.names[to as usize], text).await;
        let pending = sent.map_err(|error| TortureError::Load(error.to_string()))?;
        self.pending.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let what = match pending.await {
                Ok(sent) => {
                    self.counts[to as usize].0.fetch_add(1, Ordering::Relaxed);
                    What::Acked { id, place: Place { chat: sent.chat, history: sent.history, seq: sent.seq } }
                }
                Err(_) => What::Unknown { id },
            };
            self.journal.add(Some(0), what);
            self.pending.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(())
    }

    /// Waits until everything is answered.
    async fn answered(&self) -> Result<(), TortureError> {
        let until = Instant::now() + PATIENCE;
        while self.pending.load(Ordering::Relaxed) > 0 {
            if Instant::now() > until {
                return Err(TortureError::Late { what: "answer to every message", waited: PATIENCE });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Logs in, waits until it has been shown all that was acknowledged when it had logged in, stays a moment, leaves; and
    /// so on. The longest wait, and the last session, which stays.
    async fn come_and_go(
        self: Arc<Talk>,
        user: u32,
        folder: std::path::PathBuf,
        stays_ms: Vec<u64>,
    ) -> Result<(Duration, Session), TortureError> {
        let mut longest = Duration::ZERO;
        let mut last: Option<Session> = None;
        for stay_ms in stays_ms {
            if let Some(session) = last.take() {
                session.end().await;
            }
            let session = self.open(user, "phone", Keep::Under(folder.clone()), Some(user))?;
            let in_time = tokio::time::timeout(PATIENCE, session.client.online()).await;
            if in_time.is_err() {
                return Err(TortureError::Late { what: "login", waited: PATIENCE });
            }
            let (online, wanted) = (Instant::now(), self.acked(user));
            while self.shown(user) < wanted && online.elapsed() < PATIENCE {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            longest = longest.max(online.elapsed());
            tokio::time::sleep(Duration::from_millis(stay_ms)).await;
            last = Some(session);
        }
        last.map(|session| (longest, session)).ok_or_else(|| TortureError::Load("nobody came".into()))
    }

    /// Ends the sender's session.
    async fn end(self: Arc<Talk>) {
        let session = self.sender.lock().take();
        if let Some(session) = session {
            session.end().await;
        }
    }
}

/// Of one round.
const MESSAGES: u32 = 400;
const KILLS: u32 = 3;
const RECEIVERS: u32 = 10;
const LOGINS: usize = 5;
/// Of promises.
const DEAF_S_MAX: f64 = 5.0;
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F14",
        fault: "receiving program killed between receiving and confirming (SIGKILL), three times",
        full_rounds: 100,
        gate: true,
        run: dies,
    },
    Row {
        name: "F26",
        fault: "fifty logins while messages come, on two state servers",
        full_rounds: 20,
        gate: true,
        run: logs_in,
    },
    Row {
        name: "F27",
        fault: "a program loses its state folder, another of the same user stays",
        full_rounds: 10,
        gate: true,
        run: loses_folder,
    },
];
