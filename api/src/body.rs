//! Bodies of requests, read whole before anybody looks at them, within bounds of bytes and time. On the server's tokio
//! runtime.
//!
//! Trap: a server that answers and closes while more of a request is on its way resets the connection, and the sender may
//! lose the answer with it. So what is too large is read on for a while, and thrown away, before it is refused.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};

use crate::refusal::refuse_and_close;

/// Of a body that is too large, bytes that are read on.
const DRAINED_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// And for how long.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// The whole body, or the answer that refuses it.
pub async fn read(
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
    within: Duration,
) -> Result<Bytes, Response> {
    let announced = announced_bytes(headers);
    if announced.is_some_and(|bytes| bytes > bytes_max as u64) {
        // Who asks before sending has not sent it.
        if !headers.contains_key(header::EXPECT) {
            drain(body).await;
        }
        return Err(too_large(bytes_max));
    }
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    match tokio::time::timeout(within, whole(body, bytes_max)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(Some(rest))) => {
            drain(rest).await;
            Err(too_large(bytes_max))
        }
        Ok(Err(None)) => Err(refuse_and_close(StatusCode::BAD_REQUEST, "the body ends before its end")),
        Err(_) => Err(refuse_and_close(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    }
}

/// `Err(Some(_))`: it is larger, and this is what has not been read of it. `Err(None)`: it broke off.
async fn whole(mut body: Body, bytes_max: usize) -> Result<Bytes, Option<Body>> {
    let mut all = BytesMut::new();
    while let Some(data) = next(&mut body).await.map_err(|()| None)? {
        if data.len() > bytes_max - all.len() {
            return Err(Some(body));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

/// The next piece; trailers are passed over.
async fn next(body: &mut Body) -> Result<Option<Bytes>, ()> {
    loop {
        let frame = std::future::poll_fn(|cx| std::pin::Pin::new(&mut *body).poll_frame(cx)).await;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => return Err(()),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

async fn drain(mut body: Body) {
    let mut left = DRAINED_BYTES_MAX;
    let draining = async {
        while let Ok(Some(data)) = next(&mut body).await {
            let Some(rest) = left.checked_sub(data.len() as u64) else { return };
            left = rest;
        }
    };
    // What is left after that is lost to a reset.
    let _ = tokio::time::timeout(DRAIN_MAX, draining).await;
}

fn too_large(bytes_max: usize) -> Response {
    refuse_and_close(StatusCode::PAYLOAD_TOO_LARGE, &format!("the body is larger than {bytes_max} bytes"))
}

fn announced_bytes(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
