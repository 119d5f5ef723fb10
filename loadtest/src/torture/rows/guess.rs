//! A6: somebody guesses at tokens, a thousand a second from one address, beside people who have theirs. Main thread.
//!
//! Trap: guesses that are on their way when the cap is reached are still answered, so what is allowed is the cap and those.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::Command;
use proto::wire::{self, Code};

use super::common::Beside;
use super::crowd::{BURST_BYTES_MAX, attacked, with};
use crate::supervisor::ClusterOptions;
use crate::tokens::Tokens;
use crate::torture::tool::horde::Horde;
use crate::torture::tool::process::memory;
use crate::torture::tool::raw::{encode, login};
use crate::torture::{Plan, Round, Row, TortureError};

/// The rows of this file.
pub const ROWS: &[Row] =
    &[Row { name: "A6", fault: "password or token guessing", full_rounds: 3, gate: false, run: guessing }];

fn guessing(round: &mut Round) -> Result<(), TortureError> {
    let keys = tempfile::tempdir().map_err(attacked)?;
    let (secret, other) = (keys.path().join("secret"), keys.path().join("other"));
    std::fs::write(&secret, [b's'; 48]).map_err(attacked)?;
    std::fs::write(&other, [b'o'; 48]).map_err(attacked)?;
    let key =
        format!("auth.keys=[{{ kid = \"t\", algorithm = \"HS256\", file = \"{}\" }}]", secret.display());
    let mut world = round.world(ClusterOptions { state_sets: vec![key], ..with(&[]) })?;
    let tokens = Arc::new(Tokens::open(&secret, "t", "")?);
    let guesses = Tokens::open(&other, "t", "")?;
    let gateway = world.cluster.gateways[0].client;
    let pids = [world.cluster.gateways[0].process.pid()?, world.cluster.states[0].process.pid()?];
    let plan = Plan { tokens: Some(tokens), ..Plan::default() };
    let beside = Beside::start_with(round, &mut world, "guessing", plan)?;
    let used = || pids.iter().map(|pid| memory(*pid).unwrap_or(0)).sum::<u64>();
    let before = used();

    let seconds = if round.gate || round.tenth { 3 } else { 20 };
    let source = Some(IpAddr::V4(Ipv4Addr::new(127, 16, 0, 1)));
    let mut horde = Horde::new(gateway, 1, None).map_err(attacked)?;
    let user = world.user("victim");
    let (began, mut tried, mut most) = (Instant::now(), 0u64, 0);
    let mut told = Told::default();
    while began.elapsed() < Duration::from_secs(seconds) {
        let due = (began.elapsed().as_secs_f64() * GUESSES_PER_S) as u64;
        while tried < due {
            tried += 1;
            let guess = wire::Login { token: guesses.of(&user), ..login(&user, "raw", tried) };
            horde.open_from(source, &encode(Command::Login, &guess)).map_err(attacked)?;
        }
        horde.pump();
        told.take(&mut horde);
        most = most.max(used());
        std::thread::sleep(Duration::from_millis(2));
    }
    horde.pump_until(PATIENCE, |horde| horde.alive() == 0);
    let unanswered = horde.alive();
    told.take(&mut horde);
    round.worst("guesses_per_s", tried as f64 / seconds as f64);
    round.worst("guesses_answered_by_state", told.refused as f64);
    round.worst("memory_grown_mib", most.saturating_sub(before) as f64 / MIB);
    round.expect(told.let_in == 0, || format!("{} guesses were let in", told.let_in));
    round.expect(unanswered == 0, || format!("{unanswered} guesses were not answered"));
    round.expect(told.refused <= CAP + ON_THEIR_WAY_MAX, || {
        format!("{} guesses of one minute were looked at, {CAP} are allowed", told.refused)
    });
    round.expect(told.told_to_wait > 0, || "nobody was told to wait".into());
    round.expect(most.saturating_sub(before) <= BURST_BYTES_MAX, || {
        format!("gateway and state grew by {} MiB", (most - before) >> 20)
    });
    beside.end(round)?;
    // The keys go with this round, and with them a world that could log anybody in.
    Ok(())
}

/// What guesses were answered.
#[derive(Default)]
struct Told {
    refused: u64,
    told_to_wait: u64,
    let_in: u64,
}

impl Told {
    fn take(&mut self, horde: &mut Horde) {
        self.let_in += horde.all().filter(|member| member.is_logged_in()).count() as u64;
        for member in horde.take_ended() {
            match member.code() {
                Some(Code::RateLimited) => self.told_to_wait += 1,
                Some(_) => self.refused += 1,
                None => {}
            }
        }
    }
}

const GUESSES_PER_S: f64 = 1_000.0;
/// `limits.refused_logins_per_address_max` by default.
const CAP: u64 = 600;
/// A few turns of the link, at this rate.
const ON_THEIR_WAY_MAX: u64 = 300;
/// For what must be answered.
const PATIENCE: Duration = Duration::from_secs(30);
const MIB: f64 = 1_048_576.0;
