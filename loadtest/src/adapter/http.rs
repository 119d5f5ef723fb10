//! HTTP/1.1 as a client sees it that asks once and keeps the connection: the request, and a decoder for the answer.
//! Pure; any thread.
//!
//! Trap: what is not plain is refused, not guessed at. An answer without exactly one Content-Length, or with a
//! Transfer-Encoding, has an end that two readers may see in two places; and a server that closes is no keepalive.

/// An answer that was read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// 200 and so on.
    pub status: u16,
    /// Head and body together.
    pub wire_bytes: usize,
}

/// What is no answer that keeps the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a plain HTTP/1.1 answer that keeps the connection")]
pub struct Malformed;

/// The request.
pub fn request(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

/// The answer at the front of `bytes`; `None`: there is not all of it yet.
pub fn cut(bytes: &[u8]) -> Result<Option<Answer>, Malformed> {
    let Some(head_bytes) = head_bytes(bytes)? else {
        return if begins_like_an_answer(bytes) { Ok(None) } else { Err(Malformed) };
    };
    let (status, body_bytes) = head(&bytes[..head_bytes])?;
    let wire_bytes = head_bytes + body_bytes;
    Ok((bytes.len() >= wire_bytes).then_some(Answer { status, wire_bytes }))
}

/// Up to and with the empty line, as far as it is there.
fn head_bytes(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let within = &bytes[..bytes.len().min(HEAD_BYTES_MAX)];
    match within.windows(4).position(|four| four == b"\r\n\r\n") {
        Some(at) => Ok(Some(at + 4)),
        None if bytes.len() >= HEAD_BYTES_MAX => Err(Malformed),
        None => Ok(None),
    }
}

/// So that a server of another protocol is named at once and not after a timeout.
fn begins_like_an_answer(bytes: &[u8]) -> bool {
    let common = bytes.len().min(VERSION.len());
    bytes[..common] == VERSION[..common]
}

/// Status and body length.
fn head(head: &[u8]) -> Result<(u16, usize), Malformed> {
    // Nothing beyond ASCII is needed, and a stray byte is a sign that this is something else.
    let head = std::str::from_utf8(head).ok().filter(|head| head.is_ascii()).ok_or(Malformed)?;
    let mut lines = head.strip_suffix("\r\n\r\n").ok_or(Malformed)?.split("\r\n");
    let status = status(lines.next().ok_or(Malformed)?)?;
    let mut body_bytes = None;
    for line in lines {
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case("content-length") {
            if body_bytes.replace(content_length(value)?).is_some() {
                return Err(Malformed);
            }
        } else if name.eq_ignore_ascii_case("transfer-encoding")
            || (name.eq_ignore_ascii_case("connection") && closes(value))
        {
            return Err(Malformed);
        }
    }
    Ok((status, body_bytes.ok_or(Malformed)?))
}

/// `HTTP/1.1 200 OK`. An interim answer (1xx) was not asked for; 204 and 304 have no body whatever they say.
fn status(line: &str) -> Result<u16, Malformed> {
    let rest = line.strip_prefix("HTTP/1.1 ").ok_or(Malformed)?;
    let (digits, reason) = rest.split_once(' ').unwrap_or((rest, ""));
    if digits.len() != 3 || !digits.bytes().all(|byte| byte.is_ascii_digit()) || has_controls(reason) {
        return Err(Malformed);
    }
    let status = digits.parse().map_err(|_| Malformed)?;
    if (200..=599).contains(&status) && status != 204 && status != 304 { Ok(status) } else { Err(Malformed) }
}

fn field(line: &str) -> Result<(&str, &str), Malformed> {
    let (name, value) = line.split_once(':').ok_or(Malformed)?;
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(token) || has_controls(value) {
        return Err(Malformed);
    }
    Ok((name, value.trim_matches([' ', '\t'])))
}

fn content_length(value: &str) -> Result<usize, Malformed> {
    if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Malformed);
    }
    value.parse().ok().filter(|bytes| *bytes <= BODY_BYTES_MAX).ok_or(Malformed)
}

fn closes(value: &str) -> bool {
    value.split(',').any(|option| option.trim().eq_ignore_ascii_case("close"))
}

fn has_controls(text: &str) -> bool {
    text.bytes().any(|byte| byte.is_ascii_control() && byte != b'\t')
}

const VERSION: &[u8] = b"HTTP/1.1 ";
/// As much as most servers allow themselves.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// A page for setting up connections is some bytes long; this bounds what one of them may hold here.
const BODY_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str =
        "HTTP/1.1 200 OK\r\nServer: nginx\r\ncontent-LENGTH: \t3 \r\nConnection: keep-alive\r\n\r\nok\n";

    #[test]
    fn an_answer_ends_where_it_says() {
        let answer = Answer { status: 200, wire_bytes: GOOD.len() };
        assert_eq!(cut(GOOD.as_bytes()), Ok(Some(answer)));
        assert_eq!(cut(format!("{GOOD}HTTP").as_bytes()), Ok(Some(answer)));
        let busy = "HTTP/1.1 503\r\nContent-Length: 0\r\n\r\n";
        assert_eq!(cut(busy.as_bytes()), Ok(Some(Answer { status: 503, wire_bytes: busy.len() })));
        assert_eq!(request("127.0.0.1:80"), "GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n");
    }

    #[test]
    fn split_at_every_byte_it_waits() {
        for end in 0..GOOD.len() {
            assert_eq!(cut(&GOOD.as_bytes()[..end]), Ok(None), "{end}");
        }
    }

    #[test]
    fn what_is_not_plain_is_refused() {
        for bad in [
            "SSH-2.0",
            "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 65537\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: x, Close\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n folded: x\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nA: \u{1}\r\nContent-Length: 1\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nA: é\r\nContent-Length: 1\r\n\r\nx",
            "HTTP/1.1 200 OK\nContent-Length: 1\r\n\r\nx",
        ] {
            assert_eq!(cut(bad.as_bytes()), Err(Malformed), "{bad:?}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\nA: {}", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(cut(endless.as_bytes()), Err(Malformed));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = cut(&bytes);
        }

        #[test]
        fn nearly_an_answer_is_survived(at in 0..GOOD.len(), byte in any::<u8>(), end in 0..GOOD.len()) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[at] = byte;
            if let Ok(Some(answer)) = cut(&bytes) {
                prop_assert!(answer.wire_bytes <= bytes.len());
                prop_assert_eq!(cut(&bytes[..answer.wire_bytes]), Ok(Some(answer)));
            }
            // Less of it is never another answer, only no answer yet, or none ever.
            if let Ok(Some(less)) = cut(&bytes[..end]) {
                prop_assert_eq!(cut(&bytes), Ok(Some(less)));
            }
        }

        #[test]
        fn a_body_of_any_length_is_waited_for(length in 0_usize..2_000) {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
            let whole = head.clone() + &"x".repeat(length);
            for end in [head.len() - 1, head.len(), whole.len().saturating_sub(1)] {
                if end < whole.len() {
                    prop_assert_eq!(cut(&whole.as_bytes()[..end]), Ok(None));
                }
            }
            prop_assert_eq!(cut(whole.as_bytes()), Ok(Some(Answer { status: 200, wire_bytes: whole.len() })));
        }
    }
}
