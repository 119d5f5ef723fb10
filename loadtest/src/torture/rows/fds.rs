//! A10: the gateway has no file descriptors left. Main thread.
//!
//! Trap: the limit is lowered under the running gateway; at its start it would plan with it and never meet it.

use std::process::Command as Shell;
use std::time::{Duration, Instant};

use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};

use super::common::PATIENCE;
use super::crowd::{attacked, with};
use crate::torture::tool::ToolError;
use crate::torture::tool::process::{cpu, first_free_fd};
use crate::torture::tool::raw::{Raw, encode, login};
use crate::torture::{Plan, Round, Row, TortureError};

/// The rows of this file.
pub const ROWS: &[Row] =
    &[Row { name: "A10", fault: "file descriptors exhausted", full_rounds: 3, gate: true, run: no_fds }];

fn no_fds(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(with(&["workers.count=1".into(), "limits.connections_max=1000".into()]))?;
    let gateway = world.cluster.gateways[0].client;
    let pid = world.cluster.gateways[0].process.pid()?;
    let load = world.load(Plan { per_s: 300, ..Plan::default() })?;
    load.wait_acked(100, PATIENCE)?;
    let given = soft_limit(pid)?;
    round.fault(&load, "the gateway may open few more files");
    set_soft_limit(pid, &(first_free_fd(pid)? + 10).to_string())?;
    let run = || -> Result<(), TortureError> {
        let mut held = Vec::new();
        while let Ok(Entry::Let(raw)) = try_enter(gateway, &world.user(&format!("n{}", held.len()))) {
            held.push(raw);
            if held.len() > 100 {
                break;
            }
        }
        round.expect(held.len() <= 20, || format!("{} were let in with 10 fds", held.len()));
        // Refusing is all that it does: the load beside it costs little.
        let (began, before, mut told, mut refused) = (Instant::now(), cpu(pid)?, 0u32, 0u32);
        let acked = load.acked();
        while began.elapsed() < Duration::from_secs(2) {
            refused += 1;
            if let Ok(Entry::Refused(Code::TooManyConnections)) = try_enter(gateway, &world.user("extra")) {
                told += 1;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let busy = (cpu(pid)? - before).as_secs_f64() / began.elapsed().as_secs_f64();
        round.worst("gateway_cores_while_full", busy);
        round.expect(busy < 0.5, || format!("the gateway uses {busy:.2} cores while it refuses"));
        round.expect(told == refused, || format!("{told} of {refused} were told why"));
        round.expect(load.acked() > acked, || "live users were not served".into());
        // Some leave, and as many find room, without a restart.
        held.truncate(held.len().saturating_sub(2));
        for user in ["late", "later"] {
            let until = Instant::now() + PATIENCE;
            let user = world.user(user);
            loop {
                if let Ok(Entry::Let(raw)) = try_enter(gateway, &user) {
                    held.push(raw);
                    break;
                }
                if Instant::now() > until {
                    round.expect(false, || "room that came free was not used".into());
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }();
    // Whatever came of it: a gateway that is kept has its limit back.
    set_soft_limit(pid, &given)?;
    run?;
    load.healed("the limit");
    let more =
        (0..20).filter(|at| matches!(try_enter(gateway, &world.user(&format!("m{at}"))), Ok(Entry::Let(_))));
    let more = more.count();
    round.expect(more == 20, || format!("{more} of 20 were let in once there was room"));
    super::common::settle(round, load, PATIENCE)?;
    round.keep(world)
}

enum Entry {
    Let(Raw),
    Refused(Code),
}

/// Connects and logs in with an attempt that was never used.
fn try_enter(gateway: std::net::SocketAddr, user: &str) -> Result<Entry, TortureError> {
    let attempt = std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_millis() as u64);
    let mut raw = Raw::connect(gateway).map_err(attacked)?;
    // Turned away before it was written: the reason is there to be read.
    let _ = raw.write(&encode(Command::Login, &login(user, "raw", attempt)));
    match raw.next(PATIENCE).map_err(attacked)? {
        Some(ServerFrame::LoginAck(_)) => Ok(Entry::Let(raw)),
        Some(ServerFrame::Error(wire::Error { code, .. })) => {
            Ok(Entry::Refused(Code::try_from(code).unwrap_or(Code::Unspecified)))
        }
        other => Err(TortureError::Load(format!("a Login was answered {other:?}"))),
    }
}

fn soft_limit(pid: u32) -> Result<String, ToolError> {
    let path = format!("/proc/{pid}/limits");
    let limits = std::fs::read_to_string(&path).map_err(ToolError::io(path))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next()).map(str::to_owned);
    soft.ok_or_else(|| ToolError::Failed("the kernel names no limit of open files".into()))
}

fn set_soft_limit(pid: u32, limit: &str) -> Result<(), ToolError> {
    let args = ["--pid".to_owned(), pid.to_string(), format!("--nofile={limit}:")];
    match Shell::new("prlimit").args(&args).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(ToolError::Failed(format!("prlimit ended with {status}"))),
        Err(_) => Err(ToolError::Missing("needs prlimit, of the package util-linux".into())),
    }
}
