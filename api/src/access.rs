//! What every request goes through: an id, limits on body and time, a count, and one log line. On the server's tokio
//! runtime.
//!
//! Trap: what stands in the log comes from strangers, so it is cut, and the query, which may hold what is secret, is left
//! out. A request whose sender goes away before the answer is dropped with its connection, without a line.

use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::Response;
use crpc::http::Peer;

use crate::body;
use crate::config::HttpConfig;
use crate::metrics::{Answered, Class, Metrics, Route, Routed};
use crate::refusal;

/// The limits, and what is counted.
#[derive(Debug, Clone)]
pub struct Access {
    /// Largest body of a request.
    pub body_bytes_max: usize,
    /// Longest that an answer may take.
    pub request_max: Duration,
    /// What is counted.
    pub metrics: Metrics,
}

impl Access {
    /// As configured.
    pub fn new(config: &HttpConfig, metrics: Metrics) -> Self {
        let request_max = Duration::from_millis(config.request_ms_max);
        Self { body_bytes_max: config.body_bytes_max, request_max, metrics }
    }
}

/// Puts it around all routes, those that do not exist included.
pub fn around(routes: Router, access: Access) -> Router {
    routes.layer(middleware::from_fn_with_state(access, pass))
}

async fn pass(State(access): State<Access>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let path: String = request.uri().path().chars().take(LOGGED_CHARS_MAX).collect();
    let route = Route::of(request.uri().path());
    let peer = request.extensions().get::<ConnectInfo<Peer>>().map(|ConnectInfo(peer)| peer.0.to_string());

    let mut response = answer(&access, request, next).await;

    let (took, status) = (began.elapsed(), response.status().as_u16());
    access.metrics.requests.get_or_create(&Answered { route, class: Class(status / 100) }).inc();
    access.metrics.request.get_or_create(&Routed { route }).observe(took.as_secs_f64());
    tracing::info!(
        request_id = id.to_str().unwrap_or_default(),
        peer,
        method = method.as_str().get(..METHOD_BYTES_MAX).unwrap_or(method.as_str()),
        path,
        status,
        ms = took.as_micros() as f64 / 1_000.0,
        "request"
    );
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

async fn answer(access: &Access, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let body = match body::read(&head.headers, body, access.body_bytes_max, access.request_max).await {
        Ok(body) => body,
        Err(refused) => return refused,
    };
    let answer = next.run(Request::from_parts(head, Body::from(body)));
    match tokio::time::timeout(access.request_max, answer).await {
        Ok(response) => response,
        Err(_) => refusal::unknown(),
    }
}

/// The sender's own id when it is a harmless one, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|value| {
        let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@".contains(byte);
        (1..=REQUEST_ID_BYTES_MAX).contains(&value.len()) && value.as_bytes().iter().all(fits)
    });
    let made = || HeaderValue::try_from(format!("{:032x}", rand::random::<u128>()));
    given.cloned().or_else(|| made().ok()).unwrap_or(HeaderValue::from_static("-"))
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;
const LOGGED_CHARS_MAX: usize = 200;
const METHOD_BYTES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::post;
    use crpc::config::ShutdownConfig;
    use crpc::{Shutdown, listen};
    use std::io::{Read, Write};

    #[test]
    fn harmless_ids_are_kept_and_others_replaced() {
        let id = |given: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(given).unwrap());
            request_id(&headers).to_str().unwrap().to_owned()
        };
        for good in ["7", "a-b_c.d:e/f+g=h@i", &"x".repeat(128)] {
            assert_eq!(id(good), good);
        }
        for bad in ["", "a b", "a\"b", "a{b", &"x".repeat(129)] {
            let made = id(bad);
            assert!(made.len() == 32 && made.bytes().all(|byte| byte.is_ascii_hexdigit()), "{bad}: {made}");
        }
        assert_ne!(id(""), id(""));
    }

    /// What a server with these limits answers to a request, with a route that never ends and one that reads its body.
    async fn ask(request: &'static str) -> (String, Metrics) {
        let metrics = Metrics::new(&mut crpc::metrics::Metrics::new("test"));
        let config = HttpConfig { body_bytes_max: 10, request_ms_max: 50, ..Default::default() };
        let routes = Router::new()
            .route("/never", post(std::future::pending::<()>))
            .route("/read", post(async |body: String| body));
        let router = around(routes, Access::new(&config, metrics.clone()));
        let (listener, addr) = listen::bind_known("127.0.0.1:0".parse().unwrap(), "x").await.unwrap();
        let (shutdown, limits) = (Shutdown::new(), config.limits());
        let stop = shutdown.clone();
        let serving = tokio::spawn(async move {
            let config = ShutdownConfig { drain_ms: 0, hard_ms: 5_000 };
            crpc::http::serve(listener, router, limits, &stop, &config).await
        });
        let asking = tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(addr).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let answer = asking.await.unwrap();
        shutdown.begin();
        serving.await.unwrap().unwrap();
        (answer, metrics)
    }

    #[tokio::test]
    async fn an_answer_that_takes_too_long_is_given_up() {
        let (answer, metrics) =
            ask("POST /never HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: 7\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
        assert!(
            answer.contains("\r\nx-request-id: 7\r\n") && answer.contains(r#"{"error":"no answer in time"#)
        );
        let counted = Answered { route: Route::Other, class: Class(5) };
        assert_eq!(metrics.requests.get_or_create(&counted).get(), 1);
    }

    #[tokio::test]
    async fn bodies_are_limited_whether_or_not_they_say_how_long_they_are() {
        for (head, body, status) in [
            ("content-length: 10", "0123456789", "200"),
            ("content-length: 11", "", "413"),
            ("content-length: 99999999999999999999", "", "400"),
            ("transfer-encoding: chunked", "a\r\n0123456789\r\n0\r\n\r\n", "200"),
            ("transfer-encoding: chunked", "b\r\n0123456789a\r\n0\r\n\r\n", "413"),
        ] {
            let request =
                format!("POST /read HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{head}\r\n\r\n{body}");
            let (answer, _) = ask(request.leak()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head} {body}: {answer}");
        }
    }
}
