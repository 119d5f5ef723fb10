//! The gRPC side: the link to gateways, and single calls of other servers. On the state server's thread.
//!
//! Trap: pings are answered while the store stands still. The task of a stream therefore never waits for a turn; turns
//! run beside it, and their answers are passed on in the order of their batches. Batches of logins are an order of their
//! own, so that live frames never wait for the answers of a storm.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::{self, FuturesOrdered, Stream, StreamExt};
use proto::Command;
use proto::link::link_server::Link;
use proto::link::{
    Down, DownBatch, DownDone, DownHello, IncarnateReply, IncarnateRequest, LinkPing, Up, UpBatch, UpHello,
    down, up,
};
use tonic::{Request, Response, Status, Streaming};

use crate::gateways::{GatewayStream, Outgoing, Waiting};
use crate::server::Core;
use crate::store::{Op, read};
use crate::turn::{self, Gateway, Outcomes};

/// Implements the link over the core.
pub struct LinkService {
    core: Arc<Core>,
}

/// Turns of one stream under way; gateways keep to two, and two of logins, by themselves.
const TURNS_MAX: usize = 16;

/// Bytes after which nothing more is merged into one message on the way down; far below the message limit.
const MERGED_BYTES_MAX: usize = 2 * 1024 * 1024;

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
        tracing::info!(gateway = hello.gateway_id, incarnation = hello.incarnation, "stream open");
        let downs = down_stream(first_down(&core), waiting);
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

fn gateway(hello: UpHello) -> Gateway {
    Gateway {
        id: hello.gateway_id,
        incarnation: hello.incarnation,
        loopback: hello.loopback,
        heartbeat_ms: hello.heartbeat_ms,
        frame_bytes_max: hello.frame_bytes_max.clamp(4_096, proto::FRAME_BYTES_MAX as u32),
    }
}

fn first_down(core: &Core) -> Down {
    let hello = DownHello {
        version: proto::LINK_VERSION,
        state_id: core.config.id(),
        credit_bytes: core.config.limits.link_credit_bytes,
        features: Vec::new(),
    };
    Down { kind: Some(down::Kind::Hello(hello)), ..Down::default() }
}

/// Reads one stream until it ends.
async fn serve(core: Arc<Core>, gateway: Gateway, down: GatewayStream, mut ups: Streaming<Up>) {
    let mut turns = FuturesOrdered::new();
    let mut logins = FuturesOrdered::new();
    let mut closing = std::pin::pin!(core.time_to_close());
    let reason = loop {
        tokio::select! {
            () = &mut closing => break "this server stops".to_owned(),
            up = ups.message(), if turns.len() + logins.len() < TURNS_MAX => match up {
                Ok(Some(up)) => match up.kind {
                    Some(up::Kind::Batch(batch)) => {
                        let lane = if has_logins(&batch) { &mut logins } else { &mut turns };
                        lane.push_back(turn(core.clone(), gateway.clone(), batch));
                    }
                    Some(up::Kind::Ping(ping)) => {
                        if !down.send(Outgoing::Pong(ping.nonce)).await { break "its answers end".to_owned() }
                    }
                    Some(up::Kind::Done(done)) => drop(tokio::spawn(forget_gone(core.clone(), done))),
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
        }
    };
    // What was begun is finished: the messages are stored, and others are waiting for their pushes.
    let mut rest = turns.chain(logins);
    while let Some((number, outcomes)) = rest.next().await {
        pass_on(&core, &down, number, outcomes).await;
    }
    core.gateways.close(gateway.incarnation, &down);
    core.metrics.gateways.set(core.gateways.count() as i64);
    tracing::info!(gateway = gateway.id, incarnation = gateway.incarnation, reason, "stream ended");
}

/// Gateways put logins into batches of their own, with at most what one of these connections sent right behind.
fn has_logins(batch: &UpBatch) -> bool {
    batch.frames.iter().any(|frame| frame.command == Command::Login as u32)
}

async fn turn(core: Arc<Core>, gateway: Gateway, batch: UpBatch) -> (u64, Outcomes) {
    core.metrics.batches.inc();
    core.metrics.frames.inc_by(batch.frames.len() as u64);
    (batch.number, turn::run(&core, &gateway, batch.frames).await)
}

/// What others wait for first: handing it over needs nothing of this gateway, which may not be reading.
async fn pass_on(core: &Core, down: &GatewayStream, number: u64, mut outcomes: Outcomes) -> bool {
    let frames = std::mem::take(&mut outcomes.answers);
    fan_out(core, outcomes).await;
    down.send(Outgoing::Answers { frames, acked: number }).await
}

async fn fan_out(core: &Core, outcomes: Outcomes) {
    for frame in outcomes.elsewhere {
        let incarnation = proto::incarnation_of(frame.connection);
        if core.gateways.try_send(incarnation, Outgoing::Answers { frames: vec![frame], acked: 0 }).is_err() {
            tracing::debug!(incarnation, "a replaced connection could not be told");
        }
    }
    for accepted in outcomes.accepted {
        if core.accepted.send(accepted).await.is_err() {
            return;
        }
    }
}

/// Removes the routes that led nowhere, if they are still those.
async fn forget_gone(core: Arc<Core>, done: DownDone) {
    let stale = done.gone.iter().filter(|gone| gone.user != 0);
    let ops: Vec<Op> =
        stale.map(|gone| Op::Unbind { user: gone.user, connection: gone.connection }).collect();
    if !ops.is_empty() {
        core.apply(&ops).await;
    }
}

/// What goes down: hello, then whatever waits, merged.
fn down_stream(first: Down, waiting: Waiting) -> Downs {
    let begin = (waiting, 1u64, Answered::default());
    let rest = stream::unfold(begin, |(mut waiting, number, mut answered)| async move {
        let some = waiting.take(MERGED_BYTES_MAX).await;
        if some.is_empty() {
            return None;
        }
        let (downs, number) = merge(some, number, &mut answered);
        Some((stream::iter(downs), (waiting, number, answered)))
    });
    Box::pin(stream::iter([first]).chain(rest.flatten()).map(Ok))
}

/// Which up batches are answered: all up to one, and some beyond it.
#[derive(Default)]
struct Answered {
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

/// Everything that waited in one batch, behind the pongs.
fn merge(some: Vec<Outgoing>, mut number: u64, all: &mut Answered) -> (Vec<Down>, u64) {
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
            Outgoing::Pushes(pushes) => batch.pushes.extend(pushes),
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
        downs.push(Down { kind, acked, acked_also, credit_bytes: 0 });
    }
    (downs, number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::link::{DownFrame, Push};

    #[test]
    fn waiting_messages_become_one_batch_with_the_highest_acknowledgement() {
        let answers = |acked| Outgoing::Answers { frames: vec![DownFrame::default()], acked };
        let some = vec![answers(1), Outgoing::Pong(9), Outgoing::Pushes(vec![Push::default()]), answers(2)];
        let (downs, next) = merge(some, 7, &mut Answered::default());
        assert_eq!((downs.len(), next), (2, 8));
        assert!(matches!(downs[0].kind, Some(down::Kind::Pong(LinkPing { nonce: 9 }))));
        let Some(down::Kind::Batch(batch)) = &downs[1].kind else { panic!("{downs:?}") };
        assert_eq!((batch.number, batch.frames.len(), batch.pushes.len(), downs[1].acked), (7, 2, 1, 2));
    }

    #[test]
    fn an_acknowledgement_alone_takes_no_batch_number() {
        let alone = vec![Outgoing::Answers { frames: Vec::new(), acked: 1 }];
        let (downs, next) = merge(alone, 7, &mut Answered::default());
        assert_eq!((downs.len(), downs[0].acked, next), (1, 1, 7));
        assert!(downs[0].kind.is_none());
    }

    #[test]
    fn what_is_answered_early_is_named_and_counts_once_the_gap_is_closed() {
        let mut all = Answered::default();
        let mut told = |numbers: &[u64]| {
            let some = numbers.iter().map(|n| Outgoing::Answers { frames: Vec::new(), acked: *n }).collect();
            let mut downs = merge(some, 1, &mut all).0;
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
