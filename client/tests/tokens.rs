//! Where a session gets its token from, and what it does when one has expired, against a gateway in this process.

mod fake;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use client::{Client, ConnectError, Ended, Keep, Options, Status, Target, Token};
use fake::Fake;
use proto::wire::{self, Code};

fn options(fake: &Fake, token: Token) -> Options {
    let target = Target::Gateway(vec![fake.address.to_string()]);
    let mut options = Options { keep: Keep::Memory, token, ..Options::new("alice", "test", target) };
    (options.backoff_ms_min, options.backoff_ms_max) = (2, 50);
    options
}

fn refusal(code: Code) -> wire::Error {
    wire::Error { code: code as i32, closing: true, ..Default::default() }
}

/// A token for each time that it is asked for.
fn counted() -> Token {
    let count = Arc::new(AtomicUsize::new(0));
    Token::from_async(move || {
        let number = count.fetch_add(1, Ordering::Relaxed);
        async move { if number == 0 { Err("nobody is there yet") } else { Ok(format!("token {number}")) } }
    })
}

fn told(fake: &Fake) -> Vec<String> {
    fake.world().logins.iter().map(|login| login.token.clone()).collect()
}

#[tokio::test]
async fn a_token_is_asked_for_at_each_login_and_an_expired_one_is_replaced() {
    let fake = Fake::start().await;
    fake.world().refuse.push_back(refusal(Code::TokenExpired));
    let (_alice, _events) = Client::connect(options(&fake, counted())).await.unwrap();
    assert_eq!(told(&fake), ["token 1", "token 2"], "and a function that fails is asked again");
    fake.break_all();
    fake.until(|world| world.logins.len() == 3 && world.online("alice") == 1).await;
    assert_eq!(told(&fake)[2], "token 3");
}

#[tokio::test]
async fn a_file_that_is_renewed_late_is_waited_for() {
    let fake = Fake::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "old").unwrap();
    fake.world().refuse.push_back(refusal(Code::TokenExpired));
    let (client, _events) = Client::start(options(&fake, Token::file(&file))).unwrap();
    let waits = |status: &Status| matches!(status, Status::Connecting { problem: Some(problem) } if problem.contains("no newer one yet"));
    let mut status = client.status();
    while !waits(&status) {
        status = client.status_changed(&status).await;
    }
    std::fs::write(&file, "new").unwrap();
    client.online().await.unwrap();
    assert_eq!(told(&fake), ["old", "new"]);
}

#[tokio::test]
async fn who_has_no_newer_token_is_told() {
    let fake = Fake::start().await;
    fake.world().refuse.extend([refusal(Code::TokenExpired), refusal(Code::TokenExpired)]);
    let ended = Client::connect(options(&fake, Token::fixed("old"))).await.unwrap_err();
    let ConnectError::Ended(Ended::LoginRefused { code, .. }) = ended else { panic!("{ended}") };
    assert_eq!((code, told(&fake).len()), (Code::TokenExpired, 1), "it is not tried twice");
    for code in [Code::LoginRefused, Code::TokenRevoked] {
        fake.world().refuse.clear();
        fake.world().refuse.push_back(refusal(code));
        let ended = Client::connect(options(&fake, counted())).await.unwrap_err();
        assert!(
            matches!(ended, ConnectError::Ended(Ended::LoginRefused { code: told, .. }) if told == code),
            "{ended}"
        );
    }
}
