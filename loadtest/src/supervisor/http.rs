//! One blocking HTTP GET, for readiness and metrics of servers on loopback. Any thread.
//!
//! Trap: no TLS, no redirects, no chunked bodies decoded. It is for our own admin ports, and for etcd's health page.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Status and body of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAnswer {
    /// 200 and so on.
    pub status: u16,
    /// What follows the headers, as text.
    pub body: String,
}

/// Asks `address` for `path`, and waits at most `timeout` for each step.
pub fn http_get(address: SocketAddr, path: &str, timeout: Duration) -> std::io::Result<HttpAnswer> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "not an HTTP answer"))
}

fn parse(answer: &str) -> Option<HttpAnswer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.lines().next()?.split(' ').nth(1)?.parse().ok()?;
    Some(HttpAnswer { status, body: body.to_owned() })
}

/// `/metrics` of a busy server is some tens of kB.
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read() {
        let answer = parse("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno").unwrap();
        assert_eq!(answer, HttpAnswer { status: 503, body: "no".into() });
        assert_eq!(parse("SSH-2.0"), None);
    }
}
