//! One TCP connection to a gateway: frames in, frames out. Owned by the session's task.
//!
//! Trap: [`Connection::next`] is dropped half way all the time (it stands in a `select!`); all that it has read or has
//! yet to write stays in the two buffers.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use proto::Command;
use proto::command::{DecodeError, ServerFrame};
use proto::frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

#[derive(Debug)]
pub(crate) struct Connection {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    input: BytesMut,
    output: BytesMut,
    address: String,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("closed by the gateway")]
    Closed,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the gateway breaks the protocol: {0}")]
    TooLarge(#[from] frame::TooLarge),
    #[error("the gateway breaks the protocol: {0}")]
    Decode(#[from] DecodeError),
    #[error("no connection within {0:?}")]
    Timeout(Duration),
}

impl Connection {
    pub async fn open(address: &str, within: Duration) -> Result<Self, ConnectionError> {
        let stream = tokio::time::timeout(within, TcpStream::connect(address))
            .await
            .map_err(|_| ConnectionError::Timeout(within))??;
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        let address = address.to_owned();
        Ok(Connection { reader, writer, input: BytesMut::new(), output: BytesMut::new(), address })
    }

    /// As it was asked for.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Queues a frame; [`Connection::next`] writes it.
    pub fn put<M: Message>(&mut self, command: Command, body: &M) {
        frame::put(command, body, &mut self.output);
    }

    /// Bytes not written yet.
    pub fn output_bytes(&self) -> usize {
        self.output.len()
    }

    /// Writes and reads until there is a frame. May be dropped at any time.
    pub async fn next(&mut self) -> Result<ServerFrame, ConnectionError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(frame);
            }
            self.input.reserve(READ_BYTES);
            tokio::select! {
                read = self.reader.read_buf(&mut self.input) => {
                    if read? == 0 {
                        return Err(ConnectionError::Closed);
                    }
                }
                written = self.writer.write_buf(&mut self.output), if !self.output.is_empty() => {
                    if written? == 0 {
                        return Err(ConnectionError::Closed);
                    }
                }
            }
        }
    }

    /// A frame that was read already.
    pub fn take(&mut self) -> Result<Option<ServerFrame>, ConnectionError> {
        while let Some(cut) = frame::cut(&self.input, proto::FRAME_BYTES_MAX)? {
            // A buffer of its own: what the application keeps must not pin the receive buffer.
            let (command, body, used) = (cut.command, Bytes::copy_from_slice(cut.body), cut.wire_bytes());
            self.input.advance(used);
            match ServerFrame::decode(command, body) {
                // A newer server may tell more than we understand.
                Err(DecodeError::Command(command)) => tracing::debug!(command, "unknown frame ignored"),
                frame => return Ok(Some(frame?)),
            }
        }
        Ok(None)
    }

    /// Writes what is queued, says goodbye, and waits for the other side to have read it.
    pub async fn close(mut self, within: Duration) {
        let goodbye = async {
            self.writer.write_all_buf(&mut self.output).await?;
            self.writer.shutdown().await?;
            // Closing with unread input resets the connection, and a reset may overtake our last frames.
            loop {
                self.input.clear();
                self.input.reserve(READ_BYTES);
                if self.reader.read_buf(&mut self.input).await? == 0 {
                    return std::io::Result::Ok(());
                }
            }
        };
        let _ = tokio::time::timeout(within, goodbye).await;
    }
}

const READ_BYTES: usize = 16 * 1024;
