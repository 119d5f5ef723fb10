//! What ipconf counts. Shared; atomics.
//!
//! Trap: the label `code` takes only the few status codes that this server answers with.

use crpc::metrics::Metrics as Registry;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// The metrics of this server.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Requests answered, by status code.
    pub requests: Family<Code, Counter>,
    /// From a request for a list to its answer.
    pub list: Histogram,
    /// Gateways registered.
    pub gateways: Gauge,
    /// Those of them that may be handed out.
    pub gateways_usable: Gauge,
}

/// An HTTP status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Code {
    /// As a number.
    pub code: u16,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            list: registry.latency("list", "From a request for a list to its answer"),
            gateways: Gauge::default(),
            gateways_usable: Gauge::default(),
        };
        registry.register("requests", "Requests answered, by status code", metrics.requests.clone());
        registry.register("gateways", "Gateways registered", metrics.gateways.clone());
        registry.register(
            "gateways_usable",
            "Gateways that may be handed out: not draining, not full, with a stream to a state server",
            metrics.gateways_usable.clone(),
        );
        metrics
    }
}
