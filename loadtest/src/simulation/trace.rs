//! What a run prints about itself when it is asked to. Pure.

use bytes::Bytes;
use proto::Command;
use proto::command::ServerFrame;
use proto::frame;
use proto::link::{down, up};

use super::event::Event;
use super::net::{Host, Net, Packet};

/// One line about an event; `None`: too common to be worth one.
pub fn line(event: &Event, net: &Net) -> Option<String> {
    match event {
        Event::Arrives { pipe, side, packet } => {
            let what = packet_line(packet)?;
            let (from, to) = (net.host(*pipe, side.across()), net.host(*pipe, *side));
            let void = if net.is_open(*pipe, *side) { "" } else { " (nobody there)" };
            Some(format!("{} -> {} pipe {pipe}: {what}{void}", name(from), name(to)))
        }
        Event::Ended { pipe, side } if net.is_open(*pipe, *side) => {
            Some(format!("{} hears that pipe {pipe} has ended", name(net.host(*pipe, *side))))
        }
        Event::Confirms { device, chat, seq, .. } => Some(format!("device {device} confirms {chat} {seq}")),
        Event::CallExpires { .. }
        | Event::Ended { .. }
        | Event::Ticks { .. }
        | Event::Pumps { .. }
        | Event::Pings { .. }
        | Event::Marks { .. }
        | Event::Flushes { .. }
        | Event::HelloExpires { .. }
        | Event::Persists
        | Event::CallArrives { .. }
        | Event::CallAnswered { .. }
        | Event::Start(_)
        | Event::Breaks
        | Event::LoginExpires { .. } => None,
        event => Some(format!("{event:?}").chars().take(200).collect()),
    }
}

fn name(host: Host) -> String {
    match host {
        Host::Device(at) => format!("device {at}"),
        Host::Gateway(at) => format!("gateway {at}"),
        Host::Server(at) => format!("server {at}"),
    }
}

fn packet_line(packet: &Packet) -> Option<String> {
    let text = match packet {
        Packet::Frames(bytes) => frames_line(bytes),
        Packet::Up(up) => match &up.kind {
            Some(up::Kind::Ping(_)) | None => return None,
            Some(up::Kind::Batch(batch)) => {
                let commands: Vec<String> = batch
                    .frames
                    .iter()
                    .map(|frame| format!("{}@{:x}", command(frame.command as u8), frame.connection))
                    .collect();
                format!("batch {}: {}", batch.number, commands.join(" "))
            }
            Some(kind) => format!("{kind:?}"),
        },
        Packet::Down(down) => match &down.kind {
            Some(down::Kind::Pong(_)) => return None,
            Some(down::Kind::Batch(batch)) => {
                let frames =
                    batch.frames.iter().map(|f| format!("{}@{:x}", frames_line(&f.frames), f.connection));
                let pushes =
                    batch.pushes.iter().map(|p| format!("{}@{:x?}", frames_line(&p.frame), p.connections));
                let parts: Vec<String> = frames.chain(pushes).collect();
                format!(
                    "batch {} acked {} {:?}: {}",
                    batch.number,
                    down.acked,
                    down.acked_also,
                    parts.join(" ")
                )
            }
            Some(kind) => format!("{kind:?} acked {} {:?}", down.acked, down.acked_also),
            None => format!("acked {} {:?}", down.acked, down.acked_also),
        },
    };
    Some(text.chars().take(600).collect())
}

fn command(byte: u8) -> String {
    match byte {
        0 => "Closed".to_owned(),
        byte => Command::try_from(byte).map_or(byte.to_string(), |command| format!("{command:?}")),
    }
}

fn frames_line(bytes: &Bytes) -> String {
    let (mut rest, mut lines) = (&bytes[..], Vec::new());
    while let Ok(Some(found)) = frame::cut(rest, proto::FRAME_BYTES_MAX) {
        rest = &rest[found.wire_bytes()..];
        let body = Bytes::copy_from_slice(found.body);
        let text = match ServerFrame::decode(found.command, body.clone()) {
            Ok(ServerFrame::Push(push)) => {
                let message = push.message.unwrap_or_default();
                format!("Push {} {} {:?}", push.chat, message.seq, message.body)
            }
            Ok(ServerFrame::LoginAck(_)) => "LoginAck".to_owned(),
            Ok(frame) => format!("{frame:?}"),
            Err(_) => client_line(found.command, &body),
        };
        lines.push(text.chars().take(160).collect::<String>());
    }
    lines.join(", ")
}

fn client_line(byte: u8, body: &Bytes) -> String {
    use proto::wire;
    fn read<M: prost::Message + Default + std::fmt::Debug>(body: &Bytes) -> String {
        M::decode(body.clone()).map_or_else(|error| error.to_string(), |message| format!("{message:?}"))
    }
    match Command::try_from(byte) {
        Ok(Command::Login) => read::<wire::Login>(body),
        Ok(Command::Send) => read::<wire::Send>(body),
        Ok(Command::Sync) => read::<wire::Sync>(body),
        Ok(Command::Pull) => read::<wire::Pull>(body),
        Ok(Command::PushAck) => read::<wire::PushAck>(body),
        Ok(Command::Members) => read::<wire::Members>(body),
        Ok(Command::Read) => read::<wire::Read>(body),
        Ok(Command::Watch) => read::<wire::Watch>(body),
        Ok(Command::Typing) => read::<wire::Typing>(body),
        Ok(Command::Settings) => read::<wire::Settings>(body),
        _ => command(byte),
    }
}
