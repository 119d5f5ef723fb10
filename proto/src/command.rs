//! The command byte of a frame and what it means. Pure; any thread.
//!
//! Trap: numbers are on the wire for ever. A command is added, never renumbered.

use bytes::Bytes;
use prost::Message;

use crate::wire;

/// What a frame asks or tells. Client commands are odd where they have an even answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Command {
    Login = 1,
    LoginAck = 2,
    Ping = 3,
    Pong = 4,
    Send = 5,
    SendAck = 6,
    Sync = 7,
    SyncAck = 8,
    Pull = 9,
    PullAck = 10,
    PushAck = 11,
    Push = 12,
    Read = 13,
    Resync = 14,
    Settings = 15,
    Kick = 16,
    Watch = 17,
    GoAway = 18,
    Typing = 19,
    Error = 20,
    Members = 21,
    MembersAck = 22,
    Receipt = 24,
    Presence = 26,
    TypingNote = 28,
    SettingsAck = 30,
}

impl Command {
    /// Every command, in the order of its number.
    pub const ALL: [Command; 26] = [
        Command::Login,
        Command::LoginAck,
        Command::Ping,
        Command::Pong,
        Command::Send,
        Command::SendAck,
        Command::Sync,
        Command::SyncAck,
        Command::Pull,
        Command::PullAck,
        Command::PushAck,
        Command::Push,
        Command::Read,
        Command::Resync,
        Command::Settings,
        Command::Kick,
        Command::Watch,
        Command::GoAway,
        Command::Typing,
        Command::Error,
        Command::Members,
        Command::MembersAck,
        Command::Receipt,
        Command::Presence,
        Command::TypingNote,
        Command::SettingsAck,
    ];

    /// Whether a client may send it.
    pub fn is_from_client(self) -> bool {
        use Command::*;
        matches!(
            self,
            Login | Ping | Send | Sync | Pull | PushAck | Members | Read | Settings | Watch | Typing
        )
    }
}

impl TryFrom<u8> for Command {
    type Error = u8;

    /// The byte itself is the error: nobody knows that command.
    fn try_from(byte: u8) -> Result<Self, u8> {
        Command::ALL.into_iter().find(|command| *command as u8 == byte).ok_or(byte)
    }
}

/// A frame that a client received, decoded.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum ServerFrame {
    LoginAck(wire::LoginAck),
    Pong(wire::Pong),
    SendAck(wire::SendAck),
    SyncAck(wire::SyncAck),
    PullAck(wire::PullAck),
    Push(wire::Push),
    Resync(wire::Resync),
    Kick(wire::Kick),
    GoAway(wire::GoAway),
    Error(wire::Error),
    MembersAck(wire::MembersAck),
    Receipt(wire::Receipt),
    Presence(wire::Presence),
    TypingNote(wire::TypingNote),
    SettingsAck(wire::SettingsAck),
}

/// Why a frame from a server could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DecodeError {
    /// The command byte is not one that a server sends.
    #[error("command {0} is not one that a server sends")]
    Command(u8),
    /// The body is not the protobuf message of that command.
    #[error("body of command {0} cannot be decoded: {1}")]
    Body(u8, prost::DecodeError),
}

impl ServerFrame {
    /// Decodes the body of a frame that a server sent. `Bytes` inside are slices of `body`.
    pub fn decode(command: u8, body: Bytes) -> Result<Self, DecodeError> {
        fn read<M: Message + Default>(command: u8, body: Bytes) -> Result<M, DecodeError> {
            M::decode(body).map_err(|error| DecodeError::Body(command, error))
        }
        Ok(match Command::try_from(command).map_err(DecodeError::Command)? {
            Command::LoginAck => Self::LoginAck(read(command, body)?),
            Command::Pong => Self::Pong(read(command, body)?),
            Command::SendAck => Self::SendAck(read(command, body)?),
            Command::SyncAck => Self::SyncAck(read(command, body)?),
            Command::PullAck => Self::PullAck(read(command, body)?),
            Command::Push => Self::Push(read(command, body)?),
            Command::Resync => Self::Resync(read(command, body)?),
            Command::Kick => Self::Kick(read(command, body)?),
            Command::GoAway => Self::GoAway(read(command, body)?),
            Command::Error => Self::Error(read(command, body)?),
            Command::MembersAck => Self::MembersAck(read(command, body)?),
            Command::Receipt => Self::Receipt(read(command, body)?),
            Command::Presence => Self::Presence(read(command, body)?),
            Command::TypingNote => Self::TypingNote(read(command, body)?),
            Command::SettingsAck => Self::SettingsAck(read(command, body)?),
            Command::Login
            | Command::Ping
            | Command::Send
            | Command::Sync
            | Command::Pull
            | Command::PushAck
            | Command::Members
            | Command::Read
            | Command::Settings
            | Command::Watch
            | Command::Typing => return Err(DecodeError::Command(command)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_a_command_or_is_refused() {
        let known = (0..=255).filter(|byte| Command::try_from(*byte).is_ok()).count();
        assert_eq!(known, Command::ALL.len());
        for command in Command::ALL {
            assert_eq!(Command::try_from(command as u8), Ok(command));
        }
    }

    #[test]
    fn client_commands_do_not_decode_as_answers() {
        for command in Command::ALL.into_iter().filter(|c| c.is_from_client()) {
            assert!(matches!(ServerFrame::decode(command as u8, Bytes::new()), Err(DecodeError::Command(_))));
        }
    }
}
