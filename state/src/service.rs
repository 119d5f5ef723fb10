//! The gRPC side: the link to gateways, and single calls of other servers. On the state server's thread.
//!
//! Trap: pings are answered while the store stands still. The task of a stream therefore never waits for a turn; turns
//! run beside it, and their answers are passed on in the order of their batches. Batches of logins are an order of their
//! own, so that live frames never wait for the answers of a storm.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, FuturesOrdered, Stream, StreamExt};
use proto::Command;
use proto::link::link_server::Link;
use proto::link::{
    Down, DownBatch, DownDone, DownHello, IncarnateReply, IncarnateRequest, LinkPing, Stored, Up, UpBatch,
    UpHello, down, up,
};
use tonic::{Request, Response, Status, Streaming};

use crate::core::Core;
use crate::gateways::{GatewayStream, Outgoing, Waiting, push_to};
use crate::lane::{Lane, Place};
use crate::marks;
use crate::store::{Op, read};
use crate::turn::{self, Gateway, Outcomes};
use crate::unplaced::{Pushes, Returned, Unplaced};
use crate::{backlog, fan_out};

/// Implements the link over the core.
pub struct LinkService {
    core: Arc<Core>,
}

/// Turns of one stream under way; gateways keep to two, and two of logins, by themselves.
const TURNS_MAX: usize = 16;

/// Bytes after which nothing more is merged into one message on the way down; far below the message limit.
const MERGED_BYTES_MAX: usize = 2 * 1024 * 1024;

/// A gateway pings four times a second. One that is silent for so long is paused or cut off: what is unplaced there must not
/// hold this server's mark any longer, and is pushed again when it is back.
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// Until a store that does not answer is compared again with what a gateway has heard of it, and how often.
const COMPARED_EVERY: Duration = Duration::from_secs(1);
const COMPARED_MAX: usize = 60;

/// How long a stopping server waits for its last pushes to be placed.
const LAST_PUSHES_MAX: Duration = Duration::from_secs(1);

type Downs = Pin<Box<dyn Stream<Item = Result<Down, Status>> + Send>>;

impl LinkService {
    /// Over the core.
    pub fn new(core: Arc<Core>) -> Self {
        LinkService { core }
    }
}

#[tonic::async_trait]
impl Link for LinkService {
    type OpenStream = Downs;

    async fn open(&self, request: Request<Streaming<Up>>) -> Result<Response<Downs>, Status> {
        let mut ups = request.into_inner();
        let hello = match ups.message().await?.and_then(|up| up.kind) {
            Some(up::Kind::Hello(hello)) => hello,
            _ => return Err(Status::invalid_argument("the first message of a link is a hello")),
        };
        if !(hello.version_min..=hello.version_max).contains(&proto::LINK_VERSION) {
            return Err(Status::failed_precondition(format!(
                "this server speaks link version {}",
                proto::LINK_VERSION
            )));
        }
        if hello.incarnation == 0 || hello.incarnation >= 1 << 24 {
            return Err(Status::invalid_argument("incarnation is 1 to 2^24-1"));
        }
        let core = self.core.clone();
        let (sender, waiting) = core.gateways.open(hello.incarnation);
        core.metrics.gateways.set(core.gateways.count() as i64);
        core.presence.gateway_changed(hello.incarnation, core.clock.now());
        tracing::info!(gateway = hello.gateway_id, incarnation = hello.incarnation, "stream open");
        let replay = Some(hello.replay_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
        marks::catch_up(&core, hello.incarnation, replay);
        if let Some(heard) = hello.stored {
            let ago = Duration::from_millis(hello.stored_ms);
            tokio::spawn(compare(core.clone(), heard, ago));
        }
        let downs = down_stream(core.clone(), waiting);
        tokio::spawn(serve(core, gateway(hello), sender, ups));
        Ok(Response::new(downs))
    }

    async fn incarnate(
        &self,
        request: Request<IncarnateRequest>,
    ) -> Result<Response<IncarnateReply>, Status> {
        let outcome = self.core.apply(&[Op::Incarnate]).await.swap_remove(0);
        let incarnation =
            read::incarnation(outcome).map_err(|error| Status::unavailable(error.to_string()))?;
        tracing::info!(gateway = request.get_ref().gateway_id, incarnation, "a gateway begins a life");
        Ok(Response::new(IncarnateReply { incarnation }))
    }
}

/// Holds the store against what a gateway has heard of it, once it can be asked.
async fn compare(core: Arc<Core>, heard: Stored, ago: Duration) {
    let asked = core.clock.now();
    for _ in 0..COMPARED_MAX {
        let ago = ago + core.clock.now().saturating_duration_since(asked);
        match core.store.compare(heard, ago).await {
            Ok(()) => return,
            Err(error) => {
                tracing::debug!(%error, "the store cannot be compared with what a gateway has heard")
            }
        }
        core.clock.pause(COMPARED_EVERY).await;
    }
}

pub(crate) fn gateway(hello: UpHello) -> Gateway {
    Gateway {
        id: hello.gateway_id,
        incarnation: hello.incarnation,
        loopback: hello.loopback,
        heartbeat_ms: hello.heartbeat_ms,
        frame_bytes_max: hello.frame_bytes_max.clamp(4_096, proto::FRAME_BYTES_MAX as u32),
        takes_read: hello.features.iter().any(|feature| feature == proto::FEATURE_READ),
        takes_presence: hello.features.iter().any(|feature| feature == proto::FEATURE_PRESENCE),
    }
}

pub(crate) fn first_down(core: &Core) -> Down {
    let hello = DownHello {
        version: proto::LINK_VERSION,
        state_id: core.config.id(),
        credit_bytes: core.config.limits.link_credit_bytes,
        features: Vec::new(),
    };
    Down { kind: Some(down::Kind::Hello(hello)), stored: Some(core.store.stored()), ..Down::default() }
}

/// Reads one stream until it ends.
async fn serve(core: Arc<Core>, gateway: Gateway, down: GatewayStream, mut ups: Streaming<Up>) {
    let mut turns = FuturesOrdered::new();
    let mut logins = FuturesOrdered::new();
    // Of their own, so that logins do not wait for live turns, nor these for them.
    let (mut lane, mut login_lane) = (Lane::default(), Lane::default());
    let mut looks = tokio::time::interval(marks::TICK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut quiet_looks = 0;
    let mut closing = std::pin::pin!(core.time_to_close());
    let reason = loop {
        tokio::select! {
            () = &mut closing => break "this server stops".to_owned(),
            up = ups.message(), if turns.len() + logins.len() < TURNS_MAX => match up {
                Ok(Some(up)) => match up.kind.inspect(|_| quiet_looks = 0) {
                    Some(up::Kind::Batch(batch)) => {
                        if has_logins(&batch) {
                            logins.push_back(turn(core.clone(), gateway.clone(), batch, login_lane.next()));
                        } else {
                            turns.push_back(turn(core.clone(), gateway.clone(), batch, lane.next()));
                        }
                    }
                    Some(up::Kind::Ping(ping)) => {
                        if !down.send(Outgoing::Pong(ping.nonce)).await { break "its answers end".to_owned() }
                    }
                    Some(up::Kind::Done(done)) => {
                        let gone = placed(&down, done);
                        if !gone.is_empty() {
                            tokio::spawn(after_gone(core.clone(), gone));
                        }
                    }
                    Some(up::Kind::Hello(_)) | None => {}
                },
                Ok(None) => break "closed by the gateway".to_owned(),
                Err(status) => break status.message().to_owned(),
            },
            Some((number, outcomes)) = turns.next(), if !turns.is_empty() => {
                if !pass_on(&core, &down, number, outcomes).await { break "its answers end".to_owned() }
            }
            Some((number, outcomes)) = logins.next(), if !logins.is_empty() => {
                if !pass_on(&core, &down, number, outcomes).await { break "its answers end".to_owned() }
            }
            _ = looks.tick() => {
                if down.is_over(gateway.incarnation, &core.gateways) { break "another one has its place".to_owned() }
                // Counted in looks, so that a pause of this server does not count.
                quiet_looks += u32::from(turns.len() + logins.len() < TURNS_MAX);
                if marks::TICK * quiet_looks > SILENCE_MAX { break "the gateway is silent".to_owned() }
            }
        }
    };
    // What was begun is finished: the messages are stored, and others are waiting for their pushes.
    let mut rest = turns.chain(logins);
    while let Some((number, outcomes)) = rest.next().await {
        pass_on(&core, &down, number, outcomes).await;
    }
    if core.shutdown.is_begun() {
        crpc::failpoint::here("state_drain");
        let _ = tokio::time::timeout(LAST_PUSHES_MAX, last_pushes(&core, &down, &mut ups)).await;
    }
    core.gateways.close(gateway.incarnation, &down);
    core.metrics.gateways.set(core.gateways.count() as i64);
    core.presence.gateway_changed(gateway.incarnation, core.clock.now());
    tracing::info!(gateway = gateway.id, incarnation = gateway.incarnation, reason, "stream ended");
}

/// Gateways put logins into batches of their own, with at most what one of these connections sent right behind.
pub(crate) fn has_logins(batch: &UpBatch) -> bool {
    batch.frames.iter().any(|frame| frame.command == Command::Login as u32)
}

/// Does a batch, at its place among those of its lane.
pub(crate) async fn turn(core: Arc<Core>, gateway: Gateway, batch: UpBatch, place: Place) -> (u64, Outcomes) {
    core.metrics.batches.inc();
    core.metrics.frames.inc_by(batch.frames.len() as u64);
    (batch.number, turn::run(&core, &gateway, batch.frames, place).await)
}

/// Listens until everything that this server accepted is pushed and placed, or the gateway has gone. Nothing new is taken.
async fn last_pushes(core: &Core, down: &GatewayStream, ups: &mut Streaming<Up>) {
    let mut looks = tokio::time::interval(Duration::from_millis(20));
    while !core.ledger.is_clear() {
        tokio::select! {
            _ = looks.tick() => {}
            up = ups.message() => match up {
                Ok(Some(Up { kind: Some(up::Kind::Done(done)) })) => drop(placed(down, done)),
                Ok(Some(Up { kind: Some(up::Kind::Ping(ping)) })) => drop(down.send(Outgoing::Pong(ping.nonce)).await),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            },
        }
    }
}

/// What others wait for first: handing it over needs nothing of this gateway, which may not be reading.
pub(crate) async fn pass_on(core: &Core, down: &GatewayStream, number: u64, mut outcomes: Outcomes) -> bool {
    let frames = std::mem::take(&mut outcomes.answers);
    fan_out(core, outcomes).await;
    down.send(Outgoing::Answers { frames, acked: number }).await
}

async fn fan_out(core: &Core, outcomes: Outcomes) {
    for frame in outcomes.elsewhere {
        fan_out::tell(core, frame);
    }
    for accepted in outcomes.accepted {
        backlog::enter(core, accepted).await;
    }
}

/// Connections that were not there, and what was pushed to them and is to be tried once more.
#[derive(Debug, Default)]
pub(crate) struct Gone {
    /// User and connection.
    connections: Vec<(u64, u64)>,
    returned: Vec<Returned>,
}

impl Gone {
    pub(crate) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }
}

/// Notes what a gateway has placed. What it gives back must be passed to [`after_gone`].
pub(crate) fn placed(down: &GatewayStream, done: DownDone) -> Gone {
    let returned = down.unplaced().gone(&done.gone);
    down.unplaced().placed(done.number);
    done.also.iter().for_each(|number| down.unplaced().may_follow(*number));
    let stale = done.gone.iter().filter(|gone| gone.user != 0);
    Gone { connections: stale.map(|gone| (gone.user, gone.connection)).collect(), returned }
}

/// Removes the routes that led nowhere, if they are still those, reads where these users are now, and pushes there what came
/// back. Once: what comes back again waits for the next login.
pub(crate) async fn after_gone(core: Arc<Core>, gone: Gone) {
    let Gone { connections, returned } = gone;
    let left: BTreeSet<u64> = connections.iter().map(|(_, connection)| *connection).collect();
    marks::unbind(&core, connections).await;
    if returned.is_empty() || crpc::failpoint::switch("recency_off") {
        return;
    }
    let routes = fan_out::routes_of(&core, returned.iter().map(|back| back.user).collect()).await;
    let mut per_gateway: BTreeMap<u32, Pushes> = BTreeMap::new();
    for back in returned {
        let targets =
            routes.get(&back.user).into_iter().flatten().filter(|route| !left.contains(&route.connection));
        let mut by_gateway: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for route in targets {
            let incarnation = proto::incarnation_of(route.connection);
            by_gateway.entry(incarnation).or_default().push((route.connection, back.user));
        }
        for (incarnation, targets) in by_gateway {
            core.metrics.second_pushes.inc_by(targets.len() as u64);
            let first =
                || Pushes { since_us: u64::MAX, held: back.held.clone(), second: true, ..Pushes::default() };
            let pushes = per_gateway.entry(incarnation).or_insert_with(first);
            pushes.pushes.push(push_to(back.frame.clone(), &targets, false));
            pushes.since_us = back.since_us.min(pushes.since_us);
        }
    }
    for (incarnation, pushes) in per_gateway {
        fan_out::hand_over(&core, incarnation, pushes);
    }
}

/// What goes down: hello, then whatever waits, merged.
fn down_stream(core: Arc<Core>, waiting: Waiting) -> Downs {
    let first = first_down(&core);
    let begin = (core, waiting, 1u64, Answered::default());
    let rest = stream::unfold(begin, |(core, mut waiting, number, mut answered)| async move {
        let some = waiting.take(MERGED_BYTES_MAX).await;
        if some.is_empty() {
            return None;
        }
        let (mut downs, number) = merge(some, number, &mut answered, waiting.unplaced());
        for pong in downs.iter_mut().filter(|down| matches!(down.kind, Some(down::Kind::Pong(_)))) {
            pong.stored = Some(core.store.stored());
        }
        Some((stream::iter(downs), (core, waiting, number, answered)))
    });
    Box::pin(stream::iter([first]).chain(rest.flatten()).map(Ok))
}

/// Which up batches are answered: all up to one, and some beyond it.
#[derive(Default)]
pub(crate) struct Answered {
    upto: u64,
    beyond: BTreeSet<u64>,
}

impl Answered {
    fn add(&mut self, number: u64) {
        self.beyond.insert(number);
        while self.beyond.remove(&(self.upto + 1)) {
            self.upto += 1;
        }
    }
}

/// Everything that waited in one batch, behind the pongs. Its pushes are noted as unplaced.
pub(crate) fn merge(
    some: Vec<Outgoing>,
    mut number: u64,
    all: &mut Answered,
    unplaced: &Unplaced,
) -> (Vec<Down>, u64) {
    let mut downs = Vec::with_capacity(2);
    let mut batch = DownBatch::default();
    let (upto, mut acked_also) = (all.upto, Vec::new());
    for outgoing in some {
        match outgoing {
            Outgoing::Pong(nonce) => {
                downs.push(Down { kind: Some(down::Kind::Pong(LinkPing { nonce })), ..Down::default() });
            }
            Outgoing::Answers { frames, acked } => {
                batch.frames.extend(frames);
                if acked > 0 {
                    all.add(acked);
                    acked_also.push(acked);
                }
            }
            Outgoing::Pushes(pushes) => {
                unplaced.leaves(number, &pushes);
                batch.awaited |= pushes.turn.is_some();
                batch.pushes.extend(pushes.pushes);
            }
            Outgoing::Hints(pushes) => batch.pushes.extend(pushes),
        }
    }
    let kind = if batch.frames.is_empty() && batch.pushes.is_empty() {
        None
    } else {
        batch.number = number;
        number += 1;
        Some(down::Kind::Batch(batch))
    };
    let acked = if all.upto > upto { all.upto } else { 0 };
    acked_also.retain(|number| *number > all.upto);
    if kind.is_some() || acked > 0 || !acked_also.is_empty() {
        downs.push(Down { kind, acked, acked_also, ..Down::default() });
    }
    (downs, number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::missed::Missed;
    use proto::link::{DownFrame, Push};

    fn unplaced() -> Unplaced {
        Unplaced::new(1, Arc::new(Missed::default()))
    }

    #[test]
    fn waiting_messages_become_one_batch_with_the_highest_acknowledgement() {
        let answers = |acked| Outgoing::Answers { frames: vec![DownFrame::default()], acked };
        let pushes = Pushes { pushes: vec![Push::default()], ..Pushes::default() };
        let some = vec![answers(1), Outgoing::Pong(9), Outgoing::Pushes(pushes), answers(2)];
        let (downs, next) = merge(some, 7, &mut Answered::default(), &unplaced());
        assert_eq!((downs.len(), next), (2, 8));
        assert!(matches!(downs[0].kind, Some(down::Kind::Pong(LinkPing { nonce: 9 }))));
        let Some(down::Kind::Batch(batch)) = &downs[1].kind else { panic!("{downs:?}") };
        assert_eq!((batch.number, batch.frames.len(), batch.pushes.len(), downs[1].acked), (7, 2, 1, 2));
    }

    #[test]
    fn an_acknowledgement_alone_takes_no_batch_number() {
        let alone = vec![Outgoing::Answers { frames: Vec::new(), acked: 1 }];
        let (downs, next) = merge(alone, 7, &mut Answered::default(), &unplaced());
        assert_eq!((downs.len(), downs[0].acked, next), (1, 1, 7));
        assert!(downs[0].kind.is_none());
    }

    #[test]
    fn what_is_answered_early_is_named_and_counts_once_the_gap_is_closed() {
        let mut all = Answered::default();
        let mut told = |numbers: &[u64]| {
            let some = numbers.iter().map(|n| Outgoing::Answers { frames: Vec::new(), acked: *n }).collect();
            let mut downs = merge(some, 1, &mut all, &unplaced()).0;
            let down = downs.pop().unwrap();
            (down.acked, down.acked_also)
        };
        assert_eq!(told(&[1]), (1, vec![]));
        assert_eq!(told(&[3, 4]), (0, vec![3, 4]));
        assert_eq!(told(&[6, 2]), (4, vec![6]));
        assert_eq!(told(&[5]), (6, vec![]));
        assert!(all.beyond.is_empty());
    }
}
