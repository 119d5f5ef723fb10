//! Connections to which no route leads: what a store lost, or a Kick that never arrived, leaves behind. Pure.
//!
//! Trap: routes that were read before the connection's frame came here prove nothing.

use proto::link::{DownFrame, UpFrame};
use proto::wire::Code;

use crate::answer;
use crate::store::Route;

/// The connection that sent a message. It is not pushed to: its SendAck stands for the message.
#[derive(Debug, Clone, Copy, Default)]
pub struct From {
    /// Its id; 0: the message did not come over a connection.
    pub connection: u64,
    /// Its device, within the sender.
    pub device: u32,
    /// The attempt that bound it.
    pub binding: u64,
}

impl From {
    /// Of a frame.
    pub fn of(frame: &UpFrame) -> From {
        From { connection: frame.connection, device: frame.device, binding: frame.binding }
    }
}

/// Who sends or Syncs though no route leads to it is never pushed anything: another connection of its device has taken its place and its
/// Kick was lost, or the route was. The routes were read behind what it sent, and stood before its login was answered.
pub fn end_of_ghost(from: &From, user: u64, routes: &[Route]) -> Option<DownFrame> {
    if from.connection == 0 || routes.iter().any(|route| route.connection == from.connection) {
        return None;
    }
    let newer = routes.iter().any(|route| route.device == from.device && route.attempt > from.binding);
    Some(if newer {
        answer::kick(from.connection, user, Code::Replaced)
    } else {
        answer::end(from.connection, user)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_sends_without_a_route_is_ended_in_the_right_way() {
        let from = From { connection: 10, device: 1, binding: 5 };
        let route = |device, attempt, connection| Route { device, attempt, connection };
        let ends =
            |routes: &[Route]| end_of_ghost(&from, 7, routes).map(|frame| (frame.connection, frame.user));
        assert_eq!(ends(&[route(2, 9, 20), route(1, 5, 10)]), None);
        assert_eq!(end_of_ghost(&From::default(), 7, &[]), None, "it came by a call");
        let replaced = end_of_ghost(&from, 7, &[route(1, 6, 11)]).unwrap();
        assert_eq!(replaced, answer::kick(10, 7, Code::Replaced));
        for lost in [&[][..], &[route(2, 9, 20)], &[route(1, 4, 11)]] {
            assert_eq!(ends(lost), Some((10, 7)));
            assert_ne!(end_of_ghost(&from, 7, lost), Some(answer::kick(10, 7, Code::Replaced)));
        }
    }
}
