//! A client of bare bytes: what tests use to say what the client library never would.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::BytesMut;
use prost::Message;
use proto::Command;
use proto::command::ServerFrame;
use proto::wire;

/// Longest that an answer may take before it counts as missing.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Raw {
    stream: TcpStream,
    received: Vec<u8>,
}

/// One frame as bytes.
pub fn frame<M: Message>(command: Command, body: &M) -> Vec<u8> {
    let mut out = BytesMut::new();
    proto::frame::put(command, body, &mut out);
    out.to_vec()
}

impl Raw {
    pub fn connect(address: SocketAddr) -> Raw {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream, received: Vec::new() }
    }

    pub fn send<M: Message>(&mut self, command: Command, body: &M) {
        self.stream.write_all(&frame(command, body)).unwrap();
    }

    // Each test binary compiles this file; not all of them log in.
    #[allow(dead_code)]
    pub fn login(&mut self, login: &wire::Login) -> wire::LoginAck {
        self.send(Command::Login, login);
        match self.next() {
            ServerFrame::LoginAck(ack) => ack,
            other => panic!("{other:?}"),
        }
    }

    /// The next frame from the server.
    pub fn next(&mut self) -> ServerFrame {
        loop {
            if let Some(frame) = proto::frame::cut(&self.received, proto::FRAME_BYTES_MAX).unwrap() {
                let used = frame.wire_bytes();
                let decoded = ServerFrame::decode(frame.command, frame.body.to_vec().into()).unwrap();
                self.received.drain(..used);
                return decoded;
            }
            let mut buffer = [0; 65_536];
            let count = self.stream.read(&mut buffer).expect("an answer comes");
            assert!(count > 0, "closed without an answer");
            self.received.extend_from_slice(&buffer[..count]);
        }
    }

    /// The next frame, which must be an Error.
    pub fn error(&mut self) -> wire::Error {
        match self.next() {
            ServerFrame::Error(error) => error,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the server ends the connection with nothing more to say.
    pub fn is_closed(&mut self) -> bool {
        self.received.is_empty() && matches!(self.stream.read(&mut [0; 1]), Ok(0))
    }
}

impl Write for Raw {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
