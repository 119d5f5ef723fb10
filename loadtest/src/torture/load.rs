//! The workload: users with the real client library who write to each other while something breaks. One thread with a
//! runtime of its own; the row that broke something holds a [`Load`].
//!
//! Every message has an id in its body, and every device's application notes what it is shown. Messages leave at a fixed
//! rate in a seeded order, whether answers come or not, until a sender has too many unanswered.
//!
//! Trap: a new device is only told of what comes after its first Sync, so nobody sends before all devices have synced.

mod device;
mod members;
mod sender;
mod track;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::{Client, Keep, Sent};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::TortureError;
use super::history::{Device, History, Journal, MessageId, Place, Scribe, What};
use crate::monitor::interrupted;
use crate::tokens::Tokens;
use track::Track;

/// Who writes how much to whom.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many users.
    pub users: u32,
    /// So many of them have a second device.
    pub second_devices: u32,
    /// So many of these leave before the first message, and come back when nobody sends any more.
    pub away: u32,
    /// To how many others each writes, and as many write to it.
    pub partners: u32,
    /// A user is also a member of one group, of about so many users, to which it writes as often as to one of those; 0: there are
    /// none.
    pub group_users: u32,
    /// In each group somebody comes or goes about every so many ms; 0: groups keep their members.
    pub change_every_ms: u32,
    /// Messages a second, all together; 0: what the run's `--per-s` says.
    pub per_s: u32,
    /// Bytes of a body, at least those of the id in it.
    pub body_bytes: usize,
    /// The first user's every so many-th message is too large for the store, so that it is refused for good; 0: none.
    pub too_large_every: u32,
    /// Messages of one user without an answer, beyond which it waits.
    pub unanswered_max: u32,
    /// Where devices keep their state.
    pub keep: KeepIn,
    /// Where to connect; none: to all gateways of the cluster, each user to another one first.
    pub gateways: Option<Vec<SocketAddr>>,
    /// No gateway is hurt: every connection that ends was dropped.
    pub gateways_live: bool,
    /// What everybody logs in with; none: development logins.
    pub tokens: Option<Arc<Tokens>>,
}

/// Where devices keep their state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepIn {
    /// In memory: quick.
    Memory,
    /// In a temp folder, with all that the library does for durability.
    Folder,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            users: 24,
            second_devices: 6,
            away: 2,
            partners: 3,
            group_users: 6,
            change_every_ms: 300,
            per_s: 0,
            body_bytes: 64,
            too_large_every: 16,
            unanswered_max: 128,
            keep: KeepIn::Memory,
            gateways: None,
            gateways_live: true,
            tokens: None,
        }
    }
}

/// A workload that runs. Dropped, it ends without a verdict.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
    /// Whether those who are away come back.
    back: watch::Sender<bool>,
    scribe: Option<Scribe>,
    thread: Option<JoinHandle<()>>,
    _folder: Option<tempfile::TempDir>,
}

/// What the thread is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Send,
    Hold,
    /// One more message to everybody, and then none.
    Last,
    Close,
}

/// What all tasks of a load share.
#[derive(Debug)]
struct Shared {
    plan: Plan,
    seed: u64,
    journal: Journal,
    devices: Vec<Device>,
    /// In bodies: tells our messages from those of other loads.
    run: String,
    track: Mutex<Track>,
    sent: AtomicU64,
    acked: AtomicU64,
    /// By user: when the latest message left that is acknowledged.
    acked_from_us: Vec<AtomicU64>,
    refused: AtomicU64,
    unanswered: AtomicU64,
    shown: AtomicU64,
    histories_lost: AtomicU64,
    synced: AtomicU32,
    online: AtomicU32,
    /// Everybody is there, and those who go away are gone.
    begun: AtomicBool,
    /// Everybody has said a last word.
    closed: AtomicBool,
    /// Those who were away are back; also when there are none.
    returned: AtomicBool,
    failed: Mutex<Option<String>>,
}

impl Load {
    /// Logs everybody in and begins to send. `run` is in user names and bodies; the history goes to `path`.
    pub(super) fn start(
        plan: Plan,
        gateways: &[SocketAddr],
        run: &str,
        seed: u64,
        path: &Path,
    ) -> Result<Load, TortureError> {
        let devices = devices(&plan, run);
        let (journal, scribe) = Journal::begin(path, devices.clone(), plan.gateways_live)?;
        let folder = match plan.keep {
            // Who comes back must find what it had.
            KeepIn::Memory if plan.away == 0 => None,
            _ => Some(tempfile::tempdir().map_err(|e| TortureError::io("cannot make a temp dir", e))?),
        };
        let keep = folder.as_ref().map(|folder| folder.path().to_owned());
        let gateways = plan.gateways.clone().unwrap_or_else(|| gateways.to_owned());
        let track = Mutex::new(Track::new(&devices));
        let users = plan.users;
        let shared = Arc::new(Shared {
            plan,
            seed,
            journal,
            devices,
            run: run.to_owned(),
            track,
            sent: AtomicU64::new(0),
            acked: AtomicU64::new(0),
            acked_from_us: (0..users).map(|_| AtomicU64::new(0)).collect(),
            refused: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            shown: AtomicU64::new(0),
            histories_lost: AtomicU64::new(0),
            synced: AtomicU32::new(0),
            online: AtomicU32::new(0),
            begun: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            returned: AtomicBool::new(false),
            failed: Mutex::new(None),
        });
        let (phase, phases) = watch::channel(Phase::Send);
        let (back, backs) = watch::channel(false);
        let own = shared.clone();
        let live = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let result = match runtime {
                Ok(runtime) => runtime.block_on(live(own.clone(), gateways, keep, phases, backs)),
                Err(error) => Err(error.to_string()),
            };
            if let Err(problem) = result {
                *own.failed.lock() = Some(problem);
            }
        };
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(live)
            .map_err(|error| TortureError::io("cannot start a thread", error))?;
        let load = Load { shared, phase, back, scribe: Some(scribe), thread: Some(thread), _folder: folder };
        load.wait("login of all devices", LOGIN_MAX, |load| load.shared.begun.load(Ordering::Acquire))?;
        Ok(load)
    }

    /// Messages that applications asked to be sent so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Messages acknowledged so far.
    pub fn acked(&self) -> u64 {
        self.shared.acked.load(Ordering::Relaxed)
    }

    /// Messages refused for good so far, but for those that are too large and those whose sender may not be in the group.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Messages shown to applications so far.
    pub fn shown(&self) -> u64 {
        self.shared.shown.load(Ordering::Relaxed)
    }

    /// Devices that are logged in now.
    pub fn online(&self) -> u32 {
        self.shared.online.load(Ordering::Relaxed)
    }

    /// Waits until everybody who is not away is logged in.
    pub fn wait_online(&self, within: Duration) -> Result<(), TortureError> {
        let everybody = self.shared.devices.iter().filter(|device| !device.away).count() as u32;
        self.wait("login of everybody", within, |load| load.online() >= everybody)
    }

    /// Deliveries that are still owed: an acknowledged message to a device.
    pub fn owed(&self) -> u64 {
        self.shared.track.lock().owed()
    }

    /// Waits until so many more messages are acknowledged.
    pub fn wait_acked(&self, more: u64, within: Duration) -> Result<(), TortureError> {
        let until = self.acked() + more;
        self.wait("acknowledgements", within, |load| load.acked() >= until)
    }

    /// Waits until everybody has an acknowledgement of a message that left at that time or later.
    pub fn wait_everybody_acked(&self, from_us: u64, within: Duration) -> Result<(), TortureError> {
        self.wait("acknowledgements of everybody", within, |load| {
            load.shared.acked_from_us.iter().all(|last| last.load(Ordering::Relaxed) >= from_us)
        })
    }

    /// Waits until some device was told that a chat's history is lost.
    pub fn wait_history_lost(&self, within: Duration) -> Result<(), TortureError> {
        self.wait("lost history", within, |load| load.shared.histories_lost.load(Ordering::Relaxed) > 0)
    }

    /// Waits until everything acknowledged so far has been shown to everybody. Who was away comes back for it.
    pub fn wait_shown(&self, within: Duration) -> Result<(), TortureError> {
        self.come_back();
        self.wait("deliveries", within, |load| {
            load.shared.returned.load(Ordering::Acquire) && load.owed() == 0
        })
    }

    /// Those who are away log in again.
    pub fn come_back(&self) {
        self.back.send_replace(true);
    }

    /// Notes in the history that a fault begins.
    pub fn fault(&self, fault: impl Into<String>) {
        self.shared.journal.add(None, What::FaultBegin { fault: fault.into() });
    }

    /// Notes in the history that a fault ends.
    pub fn healed(&self, fault: impl Into<String>) {
        self.shared.journal.add(None, What::FaultEnd { fault: fault.into() });
    }

    /// The time that records of now carry, microseconds.
    pub fn now_us(&self) -> u64 {
        self.shared.journal.now_us()
    }

    /// Nobody sends any more until [`Load::resume`].
    pub fn hold(&self) {
        self.phase.send_replace(Phase::Hold);
    }

    /// Everybody sends again.
    pub fn resume(&self) {
        self.phase.send_replace(Phase::Send);
    }

    /// Stops sending; waits until all is answered and everything acknowledged is shown to everybody, at most for `quiet`. Then everybody
    /// says a last word in every chat: what stands behind the last acknowledged message, a double or a refused one, would else be shown to
    /// nobody. Ends all sessions. What is then missing is for the verdict to say.
    pub fn finish(mut self, quiet: Duration) -> Result<History, TortureError> {
        self.hold();
        // Not to reach it is no error here. But a word more would then bring what was passed over in silence.
        if self.wait_quiet(quiet).is_ok() {
            self.phase.send_replace(Phase::Last);
            let closed = self.wait("last words", quiet, |load| load.shared.closed.load(Ordering::Acquire));
            let _ = closed.and_then(|()| self.wait_quiet(quiet));
        }
        // What comes late must not come unseen: a double, or a refused one.
        std::thread::sleep(LINGER);
        self.end();
        if let Some(problem) = self.shared.failed.lock().take() {
            return Err(TortureError::Load(problem));
        }
        let scribe = self.scribe.take().ok_or_else(|| TortureError::Load("finished twice".into()))?;
        Ok(scribe.finish()?.0)
    }

    /// Waits until all is answered and shown.
    fn wait_quiet(&self, within: Duration) -> Result<(), TortureError> {
        let until = Instant::now() + within;
        self.wait("answers", within, |load| load.shared.unanswered.load(Ordering::Relaxed) == 0)?;
        self.wait_shown(until.saturating_duration_since(Instant::now()))
    }

    fn wait(
        &self,
        what: &'static str,
        within: Duration,
        done: impl Fn(&Load) -> bool,
    ) -> Result<(), TortureError> {
        let until = Instant::now() + within;
        while !done(self) {
            if let Some(problem) = self.shared.failed.lock().clone() {
                return Err(TortureError::Load(problem));
            }
            if Instant::now() > until || interrupted() {
                return Err(TortureError::Late { what, waited: within });
            }
            std::thread::sleep(POLL_EVERY);
        }
        Ok(())
    }

    fn end(&mut self) {
        self.phase.send_replace(Phase::Close);
        if let Some(thread) = self.thread.take() {
            // Its panic was printed, and what it would have recorded is missing from the history.
            let _ = thread.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

/// Everybody's devices: the first of each user, then the second ones, of which the last are away.
fn devices(plan: &Plan, run: &str) -> Vec<Device> {
    let seconds = plan.second_devices.min(plan.users);
    let device = |user: u32, device: &str, away: bool| Device {
        user,
        name: format!("{run}-{user}"),
        device: device.into(),
        away,
    };
    let firsts = (0..plan.users).map(|user| device(user, "phone", false));
    firsts.chain((0..seconds).map(|user| device(user, "desk", user + plan.away >= seconds))).collect()
}

/// The whole life of a load.
async fn live(
    shared: Arc<Shared>,
    gateways: Vec<SocketAddr>,
    keep: Option<PathBuf>,
    mut phases: watch::Receiver<Phase>,
    mut backs: watch::Receiver<bool>,
) -> Result<(), String> {
    let start = |number: usize| {
        let away = shared.devices[number].away;
        let in_folder = away || shared.plan.keep == KeepIn::Folder;
        let keep = keep.clone().filter(|_| in_folder).map_or(Keep::Memory, Keep::Under);
        device::start(&shared, number as u32, &gateways, keep)
    };
    let mut sessions = Vec::with_capacity(shared.devices.len());
    for number in 0..shared.devices.len() {
        sessions.push(start(number)?);
    }
    let mut look = tokio::time::interval(POLL_EVERY);
    while (shared.synced.load(Ordering::Relaxed) as usize) < sessions.len() {
        if *phases.borrow() == Phase::Close {
            return Ok(());
        }
        look.tick().await;
    }
    let clients: Vec<Client> = sessions.iter().map(|session| session.client.clone()).collect();
    let groups = members::make(&shared, &clients).await?;
    for (number, session) in sessions.iter().enumerate() {
        if shared.devices[number].away {
            session.end().await;
        }
    }
    let mut working = JoinSet::new();
    if shared.plan.change_every_ms > 0 {
        for number in 0..groups.len() {
            let (shared, clients, phases) = (shared.clone(), clients.clone(), phases.clone());
            working.spawn(members::come_and_go(shared, clients, groups.clone(), number, phases));
        }
    }
    working.spawn(sender::run(shared.clone(), clients, groups, phases.clone()));
    shared.begun.store(true, Ordering::Release);
    // Errors: whoever holds the load is gone.
    let mut closing = phases.clone();
    let back = tokio::select! {
        _ = closing.wait_for(|phase| *phase == Phase::Close) => false,
        _ = backs.wait_for(|back| *back) => true,
    };
    if back {
        for (number, session) in sessions.iter_mut().enumerate() {
            if shared.devices[number].away {
                *session = start(number)?;
            }
        }
        shared.returned.store(true, Ordering::Release);
        let _ = phases.wait_for(|phase| *phase == Phase::Close).await;
    }
    working.abort_all();
    let closing: Vec<_> =
        sessions.into_iter().map(|session| tokio::spawn(async move { session.end().await })).collect();
    for close in closing {
        let _ = close.await;
    }
    Ok(())
}

fn place_of(sent: Sent) -> Place {
    Place { chat: sent.chat, history: sent.history, seq: sent.seq }
}

/// `RUN FROM-N ` and then dots.
pub(super) fn body(run: &str, id: MessageId, bytes: usize) -> String {
    let mut body = format!("{run} {id} ");
    while body.len() < bytes {
        body.push('.');
    }
    body
}

/// The id in a body, if it is one of this run.
pub(super) fn id_in(run: &str, body: &[u8]) -> Option<MessageId> {
    let text = std::str::from_utf8(body).ok()?;
    let mut words = text.split(' ');
    if words.next()? != run {
        return None;
    }
    let (from, n) = words.next()?.split_once('-')?;
    Some(MessageId { from: from.parse().ok()?, n: n.parse().ok()? })
}

/// Generous: some rows log in while something is away.
const LOGIN_MAX: Duration = Duration::from_secs(30);
const POLL_EVERY: Duration = Duration::from_millis(2);
/// Longer than a push takes.
const LINGER: Duration = Duration::from_millis(150);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_tells_its_message() {
        let id = MessageId { from: 3, n: 1_234 };
        let body = body("f1-77", id, 64);
        assert_eq!(body.len(), 64);
        assert_eq!(id_in("f1-77", body.as_bytes()), Some(id));
        assert_eq!(id_in("f1-78", body.as_bytes()), None);
        assert_eq!(id_in("f1-77", b"hello"), None);
    }

    #[test]
    fn some_users_have_two_devices() {
        let plan = Plan { users: 2, second_devices: 2, away: 1, ..Plan::default() };
        let devices = devices(&plan, "r");
        let named: Vec<_> = devices.iter().map(|one| (&*one.name, &*one.device, one.away)).collect();
        let all =
            [("r-0", "phone", false), ("r-1", "phone", false), ("r-0", "desk", false), ("r-1", "desk", true)];
        assert_eq!(named, all);
    }
}
