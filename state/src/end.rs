//! Ends a user's connections for an operator, and refuses the tokens that led to them. On the state server's thread.
//!
//! First the revocation is written, then the routes are read. A login binds its route and looks for a revocation in one step of
//! the store; so it comes before, and its route is seen here, or behind, and is refused. The gateway holds an end that is
//! faster than the answer to its login until that answer is there.
//!
//! It is over when the routes are gone: gateways report every connection that has closed. Until then those that are left are
//! told again, and the other state servers are asked to tell those that have no stream here.
//!
//! Trap: a gateway that died leaves routes behind that lead nowhere, and one that is out of reach looks just the same. They are
//! counted as left, never assumed gone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proto::name;
use proto::state::{DeleteRequest, EndReply, EndRequest};
use proto::wire::Code;
use tonic::Status;

use crate::core::Core;
use crate::peers::Peers;
use crate::store::{Answer, Op, StoreError, read};
use crate::users::device_number;
use crate::{answer, fan_out};

/// Longest that one request waits for gateways to close.
pub const WAIT_MAX: Duration = Duration::from_secs(10);

/// Between two looks at the routes.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Looks until those that are left are told again: a second.
const TELL_EVERY: u32 = 20;

/// Looks until the other servers are asked.
const ASK_OTHERS_AT: u32 = 4;

/// Longest that another server may take to tell.
const OTHERS_MAX: Duration = Duration::from_secs(2);

/// Does it.
pub async fn end(core: Arc<Core>, request: EndRequest) -> Result<EndReply, Status> {
    let named = |what: &str, text: &str| {
        name::check(text).map_err(|error| Status::invalid_argument(format!("{what}: {error}")))
    };
    named("user", &request.user)?;
    let device = (!request.device.is_empty()).then_some(&request.device);
    device.map(|device| named("device", device)).transpose()?;
    let device = device.map(|device| device_number(device));
    let Some(user) = number(&core, &request).await.map_err(status)? else {
        return Ok(EndReply::default());
    };
    if request.revoke && !request.relayed {
        revoke(&core, user, device).await.map_err(status)?;
    }
    let there = connections(&core, user, device).await.map_err(status)?;
    let code = if request.revoke { Code::TokenRevoked } else { Code::Ended };
    let tell = |connections: &BTreeSet<u64>| {
        for connection in connections {
            fan_out::tell(&core, answer::kick(*connection, user, code));
        }
    };
    tell(&there);
    if request.relayed {
        return Ok(EndReply { ended: 0, left: there.len() as u32 });
    }
    tracing::info!(
        request.user,
        request.device,
        request.revoke,
        connections = there.len(),
        "ended by an operator"
    );
    let (until, mut left, mut looks) = (core.clock.now() + WAIT_MAX, there.clone(), 0);
    while !left.is_empty() && core.clock.now() < until {
        core.clock.pause(LOOK_EVERY).await;
        looks += 1;
        // A store that does not answer now is asked again.
        if let Ok(now) = connections(&core, user, device).await {
            left.retain(|connection| now.contains(connection));
        }
        if looks % TELL_EVERY == 0 {
            tell(&left.iter().copied().filter(|connection| is_reached(&core, *connection)).collect());
        }
        if looks == ASK_OTHERS_AT && !left.is_empty() {
            let relayed = Relayed::End(EndRequest { relayed: true, ..request.clone() });
            tokio::spawn(ask_others(core.clone(), relayed));
        }
    }
    let (ended, left) = ((there.len() - left.len()) as u32, left.len() as u32);
    core.metrics.connections_ended.inc_by(ended.into());
    Ok(EndReply { ended, left })
}

/// What a caller is told of a store that did not do it.
pub fn status(error: StoreError) -> Status {
    match error {
        StoreError::Corrupt(text) => Status::data_loss(text),
        error => Status::unavailable(error.to_string()),
    }
}

/// The number of a user, who gets one when there is something to be kept of him.
async fn number(core: &Core, request: &EndRequest) -> Result<Option<u64>, StoreError> {
    let name = request.user.clone();
    if !request.revoke {
        return read::user(core.apply(&[Op::User { name }]).await.swap_remove(0));
    }
    let generation = core.generation();
    let candidate = core.users.candidates(&*core.store, generation, 1).await?[0];
    read::user(core.apply_as(generation, &[Op::Register { name, candidate }]).await.swap_remove(0))
}

/// Refuses the tokens that were issued until now.
pub async fn revoke(core: &Core, user: u64, device: Option<u32>) -> Result<(), StoreError> {
    let auth = &core.config.auth;
    // Tokens of this second too; and the clock of whoever issues them may be ahead.
    let before_s = core.unix_ms() / 1_000 + 1 + auth.leeway_s;
    let revoke = Op::Revoke { user, device, before_s, keep_s: auth.revoked_s() };
    core.apply(&[revoke]).await.swap_remove(0).map(drop)
}

async fn connections(core: &Core, user: u64, device: Option<u32>) -> Result<BTreeSet<u64>, StoreError> {
    let routes = match core.apply(&[Op::Routes { user }]).await.swap_remove(0) {
        // Of a user who is being deleted: they are to end all the more.
        Ok(Answer::Retired(routes)) => routes,
        outcome => read::routes(outcome)?,
    };
    let meant = routes.into_iter().filter(|route| device.is_none_or(|device| route.device == device));
    Ok(meant.map(|route| route.connection).collect())
}

fn is_reached(core: &Core, connection: u64) -> bool {
    core.gateways.is_open(proto::incarnation_of(connection))
}

/// What the other state servers are asked to do as well.
pub enum Relayed {
    /// To tell whom they reach. What comes of it is seen in the routes.
    End(EndRequest),
    /// To forget a user's number.
    Forget(DeleteRequest),
}

/// Asks them all, one by one. Who does not do it stands in the log.
pub async fn ask_others(core: Arc<Core>, ask: Relayed) {
    let what = match &ask {
        Relayed::End(_) => "end connections",
        Relayed::Forget(_) => "forget a user",
    };
    let mut peers = Peers::default();
    if let Err(error) = peers.find(&core).await {
        return tracing::warn!(%error, what, "the other state servers are not asked");
    }
    for (addr, mut peer) in peers.iter() {
        let asked = async {
            match &ask {
                Relayed::End(request) => peer.end(request.clone()).await.map(drop),
                Relayed::Forget(request) => peer.delete(request.clone()).await.map(drop),
            }
        };
        match tokio::time::timeout(OTHERS_MAX, asked).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(addr, what, error = error.message(), "could not be asked"),
            Err(_) => tracing::warn!(addr, what, "did not answer when asked"),
        }
    }
}
