//! What a seed draws before it begins: how many of everything, how bad the network is, which faults come how often. Pure.
//!
//! Trap: a parameter drawn later shifts every draw behind it; a new one goes to the end, or old seeds mean other runs.

use super::draw::Draw;

/// A fault that is planted on purpose, to see whether it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Plant {
    /// The store stores an id again that it has stored.
    DedupeOff,
    /// The store answers before it has persisted.
    AckBeforePersist,
    /// The store binds whoever comes last, whatever the attempt.
    BindingUnchecked,
    /// A client stores its cursor before the application has confirmed.
    CursorEarly,
    /// A final refusal does not use its id up.
    RefusalKeepsId,
    /// State servers remember who is offline.
    OfflineCached,
    /// No marks, no takeover, nothing pushed a second time.
    RecencyOff,
}

/// See the head of this file. Times in virtual microseconds.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Plan {
    pub seed: u64,
    pub plant: Option<Plant>,
    pub users: usize,
    pub devices_per_user: Vec<usize>,
    pub gateways: usize,
    pub servers: usize,
    /// Faults are injected until then; then everything heals.
    pub faults_us: u64,
    /// Mean time between two messages of a device.
    pub send_every_us: u64,
    /// Mean time between two faults.
    pub fault_every_us: u64,
    /// How often each kind of fault is drawn against the others; see `faults`.
    pub fault_weights: [u64; FAULT_KINDS],
    /// Usual one-way time of the network.
    pub network_us: u64,
    pub network_slow_us: u64,
    /// Usual time of a store call.
    pub store_us: u64,
    /// Of a thousand store calls: the answer is lost; the call is lost; the call is done long after it was given up.
    pub call_reply_lost: u64,
    pub call_lost: u64,
    pub call_late: u64,
    /// Of a thousand appends: the server dies within milliseconds; its streams are cut.
    pub crash_after_append: u64,
    pub cut_after_append: u64,
    /// Of a thousand logins: the call that binds arrives seconds later.
    pub late_bind: u64,
    /// Of a thousand messages: too large for some servers; to a group; to somebody else's chat.
    pub too_large: u64,
    pub to_group: u64,
    pub to_strangers: u64,
    pub confirm_us: u64,
    pub heartbeat_ms: u32,
    /// Of a thousand calls with a message that another server refuses: it is done seconds after it was given up.
    pub late_large: u64,
}

/// Kinds of faults.
pub const FAULT_KINDS: usize = 13;

impl Plan {
    /// Of this seed.
    pub fn new(seed: u64, plant: Option<Plant>) -> (Plan, Draw) {
        let mut draw = Draw::new(seed);
        let users = draw.between(2, 5) as usize;
        let devices_per_user = (0..users).map(|_| 1 + usize::from(draw.permille(300))).collect();
        let calm = draw.permille(50);
        let often = |draw: &mut Draw, most: u64| if calm { 0 } else { draw.between(0, most) };
        let mut fault_weights = [0; FAULT_KINDS];
        for weight in &mut fault_weights {
            *weight = if draw.permille(650) { draw.between(1, 10) } else { 0 };
        }
        let plan = Plan {
            seed,
            plant,
            users,
            devices_per_user,
            gateways: draw.between(1, 3) as usize,
            servers: draw.between(1, 3) as usize,
            faults_us: draw.between(4_000, 12_000) * MS,
            send_every_us: draw.between(40, 600) * MS,
            fault_every_us: if calm { u64::MAX / 4 } else { draw.between(150, 2_000) * MS },
            fault_weights,
            network_us: draw.between(50, 3_000),
            network_slow_us: draw.between(1, 400) * MS,
            store_us: draw.between(50, 4_000),
            call_reply_lost: often(&mut draw, 8),
            call_lost: often(&mut draw, 8),
            call_late: often(&mut draw, 8),
            crash_after_append: often(&mut draw, 30),
            cut_after_append: often(&mut draw, 30),
            late_bind: often(&mut draw, 60),
            too_large: if draw.permille(400) { draw.between(100, 400) } else { draw.between(0, 60) },
            to_group: draw.between(0, 30),
            to_strangers: draw.between(0, 15),
            confirm_us: draw.between(0, 300) * MS,
            heartbeat_ms: draw.between(1_000, 4_000) as u32,
            late_large: often(&mut draw, 60),
        };
        (plan, draw)
    }

    /// Whether this fault is planted.
    pub fn has(&self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }
}

/// A millisecond.
pub const MS: u64 = 1_000;

/// What every server takes, bytes; some refuse longer ones for ever.
pub const SMALL_BYTES_MAX: usize = 64;
