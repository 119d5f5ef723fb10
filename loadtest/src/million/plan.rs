//! How long the phases wait, and how many people do what in them: the numbers that the definition of each figure fixes. Plain
//! constants.
//!
//! Trap: together they must leave room in ten minutes for two storms and four floors of a million.

use std::time::Duration;

/// What gateways tell clients, who beat a tenth earlier: every 60 s.
pub const HEARTBEAT_MS: u32 = 66_667;
/// Beside the crowd: those who chat, and the probe.
pub const EXTRA: u32 = 4_000;
/// Who chat during the storm, and were there before.
pub const LIVE_PEOPLE: u32 = 1_000;
/// Their messages a second.
pub const LIVE_PER_S: f64 = 1_000.0;
/// Who chat among the idle.
pub const TALK_PEOPLE: u32 = 2_000;
/// Their messages a second.
pub const TALK_PER_S: f64 = 5_000.0;
/// For how long.
pub const TALK: Duration = Duration::from_secs(20);
/// Until every chat of those who talk has had its first message.
pub const WARM_UP: Duration = Duration::from_secs(3);
/// Everybody idle: one round of heartbeats. More or less than whole rounds would count those of a quick storm too often or too
/// rarely.
pub const HOLD: Duration = Duration::from_secs(60);
/// In which a dropped connection counts.
pub const AFTER_KILL: Duration = Duration::from_secs(90);
/// When nobody waits for state any more.
pub const BACK_MAX: Duration = Duration::from_secs(20);
/// From the return of state until there are only heartbeats again.
pub const CALM_AFTER: Duration = Duration::from_secs(5);
/// From the last close to the look at memory.
pub const AFTER_LEAVE: Duration = Duration::from_secs(30);
/// For state to forget who has left.
pub const ROUTES_MAX: Duration = Duration::from_secs(30);
/// Of a gateway just started.
pub const FRESH_REST: Duration = Duration::from_secs(1);
/// In which engine threads hand in what they counted.
pub const COLLECT: Duration = Duration::from_millis(400);
/// Left at the end, for stopping everything.
pub const SPARE: Duration = Duration::from_secs(10);
/// Between two looks at the clock.
pub const NAP_STEP: Duration = Duration::from_millis(50);
