//! What can happen next. Plain data.
//!
//! Trap: whoever is named may have died and come back meanwhile; `life` tells.

use std::sync::Arc;

use gateway::batch::DownItem;
use gateway::link::StreamKey;

use super::net::{Host, Packet, Side};

/// One thing that happens at one instant.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Event {
    /// At this end of a pipe.
    Arrives { pipe: usize, side: Side, packet: Packet },
    /// This end hears that the pipe is no more.
    Ended { pipe: usize, side: Side },
    /// A program starts, or starts again.
    Start(Host),
    /// A program that was stopped goes on.
    Resumes(Host),
    /// The application of a device sends something.
    Submits { device: usize },
    /// The application has a message in its own store.
    Confirms { device: usize, life: u64, chat: Arc<str>, history: u64, seq: u64 },
    /// Something is due at a device.
    Ticks { device: usize, life: u64 },
    /// A device connects.
    Connects { device: usize, life: u64 },
    /// A login was not answered.
    LoginExpires { device: usize, pipe: usize },
    /// A gateway hands to its streams what waits.
    Pumps { gateway: usize, life: u64 },
    /// A gateway pings its state servers.
    Pings { gateway: usize, life: u64 },
    /// A gateway opens a stream to a state server.
    Follows { gateway: usize, life: u64, server: usize },
    /// A state server has not said hello.
    HelloExpires { gateway: usize, pipe: usize },
    /// A worker places deliveries.
    Places { gateway: usize, life: u64, items: Vec<DownItem>, ticket: Option<(StreamKey, u64)> },
    /// A connection reads again.
    Reads { gateway: usize, life: u64, connection: u64 },
    /// A store call reaches the store.
    CallArrives { call: u64 },
    /// Its answer reaches the server.
    CallAnswered { call: u64 },
    /// It is given up.
    CallExpires { call: u64 },
    /// A pause of a task of a server is over.
    Wakes { server: usize, life: u64, task: u64 },
    /// A server writes its mark.
    Marks { server: usize, life: u64 },
    /// A server writes delivered cursors.
    Flushes { server: usize, life: u64 },
    /// What the store answered becomes durable, where it does not at once.
    Persists,
    /// The store is back.
    StoreBack,
    /// Something breaks.
    Breaks,
    /// This server dies, if it is still that life.
    Dies { server: usize, life: u64 },
}

impl Event {
    /// Whose thread does it; none: the network's, or the store's.
    pub fn host(&self, of_pipe: impl Fn(usize, Side) -> Host) -> Option<Host> {
        match self {
            Event::Arrives { pipe, side, .. } | Event::Ended { pipe, side } => Some(of_pipe(*pipe, *side)),
            Event::Submits { device }
            | Event::Confirms { device, .. }
            | Event::Ticks { device, .. }
            | Event::Connects { device, .. }
            | Event::LoginExpires { device, .. } => Some(Host::Device(*device)),
            Event::Pumps { gateway, .. }
            | Event::Pings { gateway, .. }
            | Event::Follows { gateway, .. }
            | Event::HelloExpires { gateway, .. }
            | Event::Places { gateway, .. }
            | Event::Reads { gateway, .. } => Some(Host::Gateway(*gateway)),
            Event::Wakes { server, .. } | Event::Marks { server, .. } | Event::Flushes { server, .. } => {
                Some(Host::Server(*server))
            }
            Event::CallAnswered { .. } | Event::CallExpires { .. } => None,
            Event::Start(_)
            | Event::Resumes(_)
            | Event::CallArrives { .. }
            | Event::Persists
            | Event::StoreBack
            | Event::Breaks
            | Event::Dies { .. } => None,
        }
    }
}
