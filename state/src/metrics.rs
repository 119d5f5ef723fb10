//! What the state server counts.
//!
//! Trap: no label here is anything that a client can choose.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// All metrics of the server.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Metrics {
    pub login: Histogram,
    pub store: Histogram,
    pub acknowledge: Histogram,
    pub deliver: Histogram,
    pub logins: Counter,
    pub logins_refused: Counter,
    pub sends_rate_limited: Counter,
    pub connections_ended: Counter,
    pub sends: Counter,
    pub pushes: Counter,
    pub pushes_dropped: Counter,
    pub receipts: Counter,
    pub presence_changes: Counter,
    pub typing_notes: Counter,
    pub typing_notes_hidden: Counter,
    pub pushed_again: Counter,
    pub left_behind: Counter,
    pub second_pushes: Counter,
    pub takeovers: Counter,
    pub histories_redrawn: Counter,
    pub proofs_refused: Counter,
    pub batches: Counter,
    pub frames: Counter,
    pub store_ops: Counter,
    pub store_errors: Counter,
    pub gateways: Gauge,
}

impl Metrics {
    /// Registers everything.
    pub fn new(registry: &mut crpc::metrics::Metrics) -> Self {
        let metrics = Metrics {
            login: registry.latency("login", "Arrival of a Login to its answer"),
            store: registry.latency("store", "One store call, whatever its number of operations"),
            acknowledge: registry.latency("acknowledge", "Arrival of a batch to all of its answers"),
            deliver: registry
                .latency("deliver", "Acceptance of a message to its pushes being handed to gateways"),
            logins: Counter::default(),
            logins_refused: Counter::default(),
            sends_rate_limited: Counter::default(),
            connections_ended: Counter::default(),
            sends: Counter::default(),
            pushes: Counter::default(),
            pushes_dropped: Counter::default(),
            receipts: Counter::default(),
            presence_changes: Counter::default(),
            typing_notes: Counter::default(),
            typing_notes_hidden: Counter::default(),
            pushed_again: Counter::default(),
            left_behind: Counter::default(),
            second_pushes: Counter::default(),
            takeovers: Counter::default(),
            histories_redrawn: Counter::default(),
            proofs_refused: Counter::default(),
            batches: Counter::default(),
            frames: Counter::default(),
            store_ops: Counter::default(),
            store_errors: Counter::default(),
            gateways: Gauge::default(),
        };
        for (name, help, counter) in [
            ("logins", "Logins that bound a device", &metrics.logins),
            ("logins_refused", "Logins refused for their token, or for want of one", &metrics.logins_refused),
            (
                "sends_rate_limited",
                "Sends told to come later, by user or device",
                &metrics.sends_rate_limited,
            ),
            ("connections_ended", "Connections that operators have ended", &metrics.connections_ended),
            ("sends", "Sends acknowledged, resends included", &metrics.sends),
            ("pushes", "Pushes handed to gateways, one per connection", &metrics.pushes),
            (
                "pushes_dropped",
                "Pushes whose gateway has no stream here or does not read, to be pushed again when it is back",
                &metrics.pushes_dropped,
            ),
            ("receipts", "Receipts handed to gateways, one per connection", &metrics.receipts),
            (
                "presence_changes",
                "News of who came and went handed to gateways, one per connection",
                &metrics.presence_changes,
            ),
            (
                "typing_notes",
                "Notes of who is writing handed to gateways, one per connection",
                &metrics.typing_notes,
            ),
            (
                "typing_notes_hidden",
                "Notes of who is writing that went to nobody, because their user does not want to be told of",
                &metrics.typing_notes_hidden,
            ),
            (
                "pushed_again",
                "Messages pushed again for another server or for a gateway that was away",
                &metrics.pushed_again,
            ),
            (
                "left_behind",
                "Messages of groups that found no room in their lane, to be read from the store again and pushed later",
                &metrics.left_behind,
            ),
            (
                "second_pushes",
                "Pushes that came back because the connection was gone, and went out anew",
                &metrics.second_pushes,
            ),
            (
                "takeovers",
                "Marks of other servers, or earlier lives, found standing still",
                &metrics.takeovers,
            ),
            (
                "histories_redrawn",
                "Histories of buckets drawn anew because a client holds what the store has not",
                &metrics.histories_redrawn,
            ),
            (
                "proofs_refused",
                "Cursors above the head that drew no new history: their bucket had one within the hour",
                &metrics.proofs_refused,
            ),
            ("batches", "Batches of frames from gateways", &metrics.batches),
            ("frames", "Frames from gateways", &metrics.frames),
            ("store_ops", "Operations asked of the store", &metrics.store_ops),
            ("store_errors", "Operations that the store did not answer or refused", &metrics.store_errors),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register("gateway_streams", "Gateways with an open stream", metrics.gateways.clone());
        metrics
    }
}
