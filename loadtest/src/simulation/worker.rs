//! What a worker and the bridge decide about one delivery or one frame, modelled after `deliver.rs` and `bridge.rs` there. Pure.
//!
//! Trap: the two must stay alike; a simulation of other rules shows nothing about ours.

use gateway::batch::DownItem;
use gateway::connection::Stage;
use proto::link::Gone;

/// A client's connection, as far as its worker knows it.
#[allow(missing_docs)]
pub struct Conn {
    pub pipe: usize,
    pub generation: u16,
    pub stage: Stage,
    pub user: u64,
    pub device: u32,
    pub binding: u64,
    /// It does not read: pushes are skipped until then, and a Resync follows.
    pub slow_until_us: u64,
    pub owes_resync: bool,
}

/// As the worker decides it, `deliver.rs` there.
pub fn accepts(conn: &Conn, item: &DownItem) -> bool {
    match (conn.stage, &item.bind) {
        (Stage::Closing | Stage::Fresh, _) => false,
        (Stage::LoggingIn, Some(_)) => item.login == conn.binding,
        (Stage::Bound, Some(_)) => !item.close && is_bound_by(conn, item),
        (Stage::Bound, None) => conn.user == item.user,
        (Stage::LoggingIn, None) => item.user == 0 && item.login == conn.binding,
    }
}

/// Whether it is the login that this answers by which the connection is bound.
pub fn is_bound_by(conn: &Conn, item: &DownItem) -> bool {
    let of = (conn.user, conn.binding);
    conn.stage == Stage::Bound && item.bind.is_some_and(|bind| (bind.user, bind.binding) == of)
}

/// Notes what must be told to whoever sent it.
pub fn note_gone(item: &DownItem, gone: &mut Vec<Gone>) {
    if item.push || item.bind.is_some() {
        gone.push(gone_of(item));
    }
}

/// What is told of it.
pub fn gone_of(item: &DownItem) -> Gone {
    let bind = item.bind.unwrap_or_default();
    Gone {
        connection: item.connection,
        user: item.user.max(bind.user),
        device: bind.device,
        binding: bind.binding,
        pushed: item.push,
    }
}
