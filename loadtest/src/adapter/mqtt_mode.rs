//! Sessions at an MQTT broker: CONNECT, perhaps one SUBSCRIBE, then PINGREQ for ever. Owned by one engine thread.
//!
//! Trap: with a subscription a connection is ready at SUBACK, without one at CONNACK. Two runs compare only if both have
//! it or both have not.

use bytes::BytesMut;

use super::heartbeat::Heartbeats;
use super::mqtt::{self, Packet};
use crate::engine::{Io, Mode, Share};
use crate::fault::Fault;

/// What an MQTT session does beyond CONNECT.
#[derive(Debug, Clone, Default)]
pub struct MqttOptions {
    /// User and password, the same for all.
    pub user: Option<(String, String)>,
    /// Whether each subscribes a topic of its own, `lt/CLIENT`.
    pub subscribe: bool,
}

pub(super) struct MqttMode {
    run: String,
    first: u32,
    options: MqttOptions,
    stages: Vec<Stage>,
    heartbeats: Heartbeats,
    out: BytesMut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    Subscribing,
    Ready,
}

impl MqttMode {
    pub fn new(run: &str, share: Share, options: MqttOptions) -> MqttMode {
        MqttMode {
            run: run.to_owned(),
            first: share.first,
            options,
            stages: vec![Stage::Connecting; share.count as usize],
            // A tenth early leaves room for the way.
            heartbeats: Heartbeats::new(u64::from(KEEPALIVE_S) * 900_000, &mqtt::PING),
            out: BytesMut::new(),
        }
    }

    fn hear(&mut self, index: u32, packet: Packet, io: &mut Io) -> Result<(), Fault> {
        let stage = &mut self.stages[index as usize];
        match (packet, *stage) {
            (Packet::ConnAck { code: 0 }, Stage::Connecting) if self.options.subscribe => {
                *stage = Stage::Subscribing;
                self.out.clear();
                mqtt::put_subscribe(&format!("lt/{}", client(&self.run, self.first + index)), &mut self.out);
                io.send(index, &self.out);
            }
            (Packet::ConnAck { code: 0 }, Stage::Connecting)
            | (Packet::SubAck { refused: false }, Stage::Subscribing) => {
                *stage = Stage::Ready;
                io.ready(index);
                self.heartbeats.begin(index, io);
            }
            (Packet::ConnAck { code }, Stage::Connecting) => {
                return Err(Fault::Refused { by: "connack", code: u16::from(code) });
            }
            (Packet::SubAck { refused: true }, Stage::Subscribing) => {
                return Err(Fault::Refused { by: "suback", code: 0x80 });
            }
            (Packet::PingResp, Stage::Ready) => {}
            (Packet::Publish, Stage::Subscribing | Stage::Ready) if self.options.subscribe => {}
            _ => return Err(Fault::BadFrame),
        }
        Ok(())
    }
}

impl Mode for MqttMode {
    type Part = ();

    fn greet(&mut self, index: u32, _: u64, out: &mut BytesMut) {
        self.stages[index as usize] = Stage::Connecting;
        let user = self.options.user.as_ref().map(|(name, password)| (&**name, &**password));
        let client = client(&self.run, self.first + index);
        mqtt::put_connect(&mqtt::Login { client: &client, user, keepalive_s: KEEPALIVE_S }, out);
    }

    fn ready_at_once(&self) -> bool {
        false
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some((packet, length)) = mqtt::cut(&bytes[used..]).map_err(|_| Fault::BadFrame)? {
            used += length;
            self.hear(index, packet, io)?;
        }
        Ok(used)
    }

    fn lost(&mut self, _: u32, _: &Fault, _: &mut Io) -> Option<u64> {
        None
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        self.heartbeats.tick(io)
    }

    fn finish(self) {}
}

/// Letters and digits only, because that is what every broker must take.
fn client(run: &str, number: u32) -> String {
    format!("lt{run}x{number}")
}

const KEEPALIVE_S: u16 = 60;

#[cfg(test)]
mod tests {
    #[test]
    fn every_broker_must_take_our_client_ids() {
        let client = super::client(&crate::session::random_run(), 999_999_999);
        assert!(client.len() <= 23 && client.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{client}");
    }
}
