//! What api counts. Shared; atomics.
//!
//! Trap: labels are types with few values. A path that somebody made up is `other`, and a method is no label at all.

use crpc::metrics::{Metrics as Registry, Unit, latency_histogram};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// The metrics of this server.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Requests answered, by route and class of status.
    pub requests: Family<Answered, Counter>,
    /// From a request to its answer, by route.
    pub request: Family<Routed, Histogram, fn() -> Histogram>,
    /// State servers registered.
    pub state_servers: Gauge,
}

/// Where a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// `/ping`, with whatever method.
    Ping,
    /// `/api/send`, with whatever method.
    Send,
    /// `/api/pull`, with whatever method.
    Pull,
    /// `/openapi.json`, with whatever method.
    OpenApi,
    /// Nowhere that exists.
    Other,
}

/// The hundreds of a status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Class(pub u16);

/// Labels of a request that was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Answered {
    /// Where it went.
    pub route: Route,
    /// `2xx`, `4xx`, …
    pub class: Class,
}

/// Labels of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Routed {
    /// Where it went.
    pub route: Route,
}

impl Route {
    /// The route of a path.
    pub fn of(path: &str) -> Self {
        match path {
            crate::http::PING => Route::Ping,
            crate::http::SEND => Route::Send,
            crate::http::PULL => Route::Pull,
            crate::http::OPENAPI => Route::OpenApi,
            _ => Route::Other,
        }
    }
}

impl EncodeLabelValue for Route {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        let name = match self {
            Route::Ping => crate::http::PING,
            Route::Send => crate::http::SEND,
            Route::Pull => crate::http::PULL,
            Route::OpenApi => crate::http::OPENAPI,
            Route::Other => "other",
        };
        name.encode(encoder)
    }
}

impl EncodeLabelValue for Class {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        let name = match self.0 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        };
        name.encode(encoder)
    }
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            request: Family::new_with_constructor(latency_histogram),
            state_servers: Gauge::default(),
        };
        registry.register(
            "requests",
            "Requests answered, by route and class of status",
            metrics.requests.clone(),
        );
        registry.register_with_unit(
            "request",
            "From a request to its answer",
            Unit::Seconds,
            metrics.request.clone(),
        );
        registry.register("state_servers", "State servers registered", metrics.state_servers.clone());
        metrics
    }
}
