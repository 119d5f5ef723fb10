//! Answers that say what was wrong: one line of JSON, with the field where one is to blame. Pure.
//!
//! Trap: the keys are a contract with every service that was ever written against them: add, never rename.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// 400: this field is wrong, as the text says.
    Field(&'static str, String),
    /// 400: the request as a whole is.
    Malformed(String),
    /// 401: there is no token, or it proves nothing.
    Unproven(&'static str),
    /// 403: the token is somebody else's.
    NotTheirs(&'static str),
    /// 409: the same ClientMsgId has been given to another message.
    Conflict,
    /// 415: neither JSON nor nothing.
    NotJson,
    /// 429: too many, for so many milliseconds.
    TooMany(u32),
    /// 503: surely not done; to be tried again after so many milliseconds.
    Unavailable(u32),
    /// 504: it may have been done or not.
    Unknown,
    /// 500: what is stored cannot be read.
    Damaged,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Refusal::Field(field, why) => {
                let body = json!({ "error": format!("{field}: {why}"), "field": field });
                (StatusCode::BAD_REQUEST, Json(body)).into_response()
            }
            Refusal::Malformed(why) => refuse(StatusCode::BAD_REQUEST, &why),
            Refusal::Unproven(why) => {
                let mut response = refuse(StatusCode::UNAUTHORIZED, why);
                response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                response
            }
            Refusal::NotTheirs(why) => refuse(StatusCode::FORBIDDEN, why),
            Refusal::Conflict => {
                let body = json!({
                    "error": "ClientMsgId: it was given to another message of this sender in this chat",
                    "field": "ClientMsgId",
                });
                (StatusCode::CONFLICT, Json(body)).into_response()
            }
            Refusal::NotJson => refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the body must be JSON; say so with Content-Type: application/json",
            ),
            Refusal::TooMany(after_ms) => later(
                StatusCode::TOO_MANY_REQUESTS,
                "too many messages; wait as the header Retry-After says",
                after_ms,
            ),
            Refusal::Unavailable(after_ms) => later(
                StatusCode::SERVICE_UNAVAILABLE,
                "not now, and nothing was done; send it again",
                after_ms,
            ),
            Refusal::Unknown => unknown(),
            Refusal::Damaged => refuse(StatusCode::INTERNAL_SERVER_ERROR, "what is stored cannot be read"),
        }
    }
}

/// An answer that says in one line what was wrong.
pub fn refuse(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}

/// The same, and the connection ends behind it: what else the sender wrote is not read.
pub fn refuse_and_close(status: StatusCode, message: &str) -> Response {
    let mut response = refuse(status, message);
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// 504. Not 408, which invites to send it again: it may have done its work.
pub fn unknown() -> Response {
    let error = "no answer in time; whether it was done is not known";
    (StatusCode::GATEWAY_TIMEOUT, Json(json!({ "error": error, "status": "unknown" }))).into_response()
}

fn later(status: StatusCode, message: &str, after_ms: u32) -> Response {
    let mut response = refuse(status, message);
    let seconds = after_ms.div_ceil(1_000).max(1);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_to_wait_is_told_whole_seconds() {
        for (ms, seconds) in [(0, "1"), (250, "1"), (1_000, "1"), (1_001, "2"), (60_000, "60")] {
            let response = Refusal::Unavailable(ms).into_response();
            assert_eq!(response.headers()[header::RETRY_AFTER], seconds);
        }
    }
}
