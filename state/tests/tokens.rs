//! Tokens against real processes: who is let in, until when, and how operators put somebody out.
//!
//! Trap: nothing here may wait for a time to pass. What must happen is waited for, and a token that is to live through a test lives
//! for an hour.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command as Shell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use client::{Client, ConnectError, Ended, Event, Events, Keep, Options, Status, Target, Token};
use crpc::token::{KeyAlgorithm, KeyConfig, NewToken, Signer};
use loadtest::supervisor::{Cluster, ClusterOptions, binary, http_get};
use proto::Command;
use proto::command::ServerFrame;
use proto::state::EndRequest;
use proto::state::state_client::StateClient;
use proto::wire::{self, Code};

const PATIENCE: Duration = Duration::from_secs(60);
const HOUR_S: u64 = 3_600;

const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIOqWaMTX+HeD+ntljGAO4CYmMyA27Y/m7t24oOY8LS5a
-----END PRIVATE KEY-----
";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAk+7i4lGgGF6KKDjquPxBq304Uty+DQVmxCPkK9Ujo/8=
-----END PUBLIC KEY-----
";

/// Keys in files of a folder.
struct Keys(tempfile::TempDir);

impl Keys {
    fn make() -> Keys {
        let keys = Keys(tempfile::tempdir().unwrap());
        for (name, text) in [
            ("old", "an old secret, which is as long as it must be"),
            ("new", "a new secret, which is just as long as the old"),
            ("stolen", "a secret that no server has ever heard of, at all"),
            ("private", PRIVATE),
            ("public", PUBLIC),
        ] {
            std::fs::write(keys.path(name), text).unwrap();
        }
        keys
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn secret(&self, kid: &str, name: &str) -> Signer {
        self.signer(kid, KeyAlgorithm::HS256, name)
    }

    fn signer(&self, kid: &str, algorithm: KeyAlgorithm, name: &str) -> Signer {
        Signer::open(&KeyConfig { kid: kid.into(), algorithm, file: self.path(name) }).unwrap()
    }

    fn config(&self, kid: &str, algorithm: &str, name: &str) -> String {
        let file = self.path(name);
        format!("{{ kid = \"{kid}\", algorithm = \"{algorithm}\", file = \"{}\" }}", file.display())
    }

    /// `auth.*` of a server that knows both secrets and the public key.
    fn all(&self) -> Vec<String> {
        let keys = [
            self.config("old", "HS256", "old"),
            self.config("new", "HS256", "new"),
            self.config("ed", "EdDSA", "public"),
        ];
        vec![
            format!("auth.keys=[{}]", keys.join(", ")),
            "auth.issuer=test".to_owned(),
            // These clocks are one.
            "auth.leeway_s=0".to_owned(),
        ]
    }

    fn cluster(&self, options: ClusterOptions) -> Cluster {
        let state_sets = self.all().into_iter().chain(options.state_sets).collect();
        Cluster::start(ClusterOptions { state_sets, ..options }).unwrap()
    }
}

fn embedded() -> ClusterOptions {
    ClusterOptions { embedded: true, ..ClusterOptions::default() }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Of a minute ago, for an hour.
fn claims(user: &str) -> NewToken<'_> {
    NewToken {
        user,
        device: None,
        issuer: "test",
        audience: "",
        issued_s: now_s() - 60,
        expires_s: now_s() + HOUR_S,
    }
}

fn token(signer: &Signer, user: &str) -> Token {
    Token::fixed(signer.sign(&claims(user)).unwrap())
}

fn options(cluster: &Cluster, user: &str, device: &str, token: Token) -> Options {
    let target = Target::Gateway(cluster.gateways.iter().map(|gateway| gateway.client.to_string()).collect());
    Options { keep: Keep::Memory, token, ..Options::new(user, device, target) }
}

async fn connect(options: Options) -> Result<(Client, Events), ConnectError> {
    tokio::time::timeout(PATIENCE, Client::connect(options)).await.expect("a login is answered")
}

/// How a login was refused.
async fn refused(options: Options) -> (Code, String) {
    match connect(options).await {
        Err(ConnectError::Ended(Ended::LoginRefused { code, text })) => (code, text),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was let in"),
    }
}

async fn next(events: &mut Events) -> Event {
    tokio::time::timeout(PATIENCE, events.next()).await.expect("something happens").expect("an event")
}

async fn ended(events: &mut Events) -> Ended {
    loop {
        if let Event::Ended(ended) = next(events).await {
            return ended;
        }
    }
}

/// A `state` command: exit code, stdout, stderr. The sessions of this test go on meanwhile.
async fn state(args: &[&str]) -> (i32, String, String) {
    let output = tokio::process::Command::new(binary("state").unwrap()).args(args).output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn a_token_of_any_key_lets_in_and_nothing_else_does() {
    let keys = Keys::make();
    let mut cluster = keys.cluster(embedded());
    let (old, new) = (keys.secret("old", "old"), keys.secret("new", "new"));
    let ed = keys.signer("ed", KeyAlgorithm::EdDSA, "private");
    for (device, signer) in [("a", &old), ("b", &new), ("c", &ed)] {
        let (alice, _events) =
            connect(options(&cluster, "alice", device, token(signer, "alice"))).await.unwrap();
        alice.send("bob", "hello").await.unwrap();
    }
    let phone = old.sign(&NewToken { device: Some("phone"), ..claims("alice") }).unwrap();
    connect(options(&cluster, "alice", "phone", Token::fixed(phone.clone()))).await.unwrap();

    let of = |signer: &Signer, claims: NewToken<'_>| Token::fixed(signer.sign(&claims).unwrap());
    // The public key is no secret: who takes it for one proves nothing.
    let confused = keys.secret("ed", "public");
    let unsigned = {
        let signed = old.sign(&claims("alice")).unwrap();
        let claims = signed.split('.').nth(1).unwrap();
        // {"alg":"none","kid":"old"}
        format!("eyJhbGciOiJub25lIiwia2lkIjoib2xkIn0.{claims}.")
    };
    let wrong = [
        ("no token", Token::none()),
        ("no JWT", Token::fixed("hunter2")),
        ("another key", token(&keys.secret("old", "stolen"), "alice")),
        ("an unknown key", token(&keys.secret("stolen", "stolen"), "alice")),
        ("a public key as a secret", token(&confused, "alice")),
        ("no signature", Token::fixed(unsigned)),
        ("another issuer", of(&old, NewToken { issuer: "them", ..claims("alice") })),
        ("another user's", token(&old, "eve")),
        ("another device's", Token::fixed(phone)),
        ("too long", of(&old, NewToken { expires_s: now_s() + 31 * 86_400, ..claims("alice") })),
    ];
    for (what, token) in wrong {
        let (code, text) = refused(options(&cluster, "alice", "desk", token)).await;
        assert_eq!(code, Code::LoginRefused, "{what}: {text}");
    }
    let expired = of(&old, NewToken { expires_s: now_s() - 1, ..claims("alice") });
    assert_eq!(refused(options(&cluster, "alice", "desk", expired)).await.0, Code::TokenExpired);

    // A script is told by its exit code.
    let file = keys.path("token");
    std::fs::write(&file, new.sign(&claims("alice")).unwrap()).unwrap();
    let (gateway, file) = (cluster.gateways[0].client.to_string(), file.display().to_string());
    let send = |user: &str, file: &str| {
        let mut shell = Shell::new(binary("client").unwrap());
        shell.env("XDG_STATE_HOME", keys.path("state-home"));
        let args = ["send", "--user", user, "--to", "bob", "x", "--gateway", &gateway, "--token-file", file];
        let output = shell.args(args).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(send("alice", &file), (0, String::new()));
    let (code, stderr) = send("eve", &file);
    assert!(code == 64 && stderr.contains("LOGIN_REFUSED"), "{code} {stderr}");
    let (code, stderr) = send("alice", "/nowhere");
    assert!(code == 64 && stderr.contains("cannot read the token"), "{code} {stderr}");

    // The old key is taken away.
    let only = format!("auth.keys=[{}]", keys.config("new", "HS256", "new"));
    cluster.states[0].process.args_mut().extend(["--set".to_owned(), only]);
    cluster.states[0].process.restart().unwrap();
    assert_eq!(refused(options(&cluster, "alice", "a", token(&old, "alice"))).await.0, Code::LoginRefused);
    connect(options(&cluster, "alice", "b", token(&new, "alice"))).await.unwrap();
    let log = std::fs::read_to_string(cluster.states[0].process.log_path()).unwrap();
    assert!(log.contains("a login needs a token"), "{log}");
    assert!(!log.contains("secret"), "no key is shown");
}

#[tokio::test]
async fn expiry_ends_a_live_connection_and_a_new_token_brings_it_back() {
    let keys = Keys::make();
    let cluster = keys.cluster(embedded());
    let short = |signer: &Signer| {
        // As long as a login may take on a busy machine, and little more.
        let token = NewToken { issued_s: now_s(), expires_s: now_s() + 5, ..claims("alice") };
        signer.sign(&token)
    };
    // Short ones until one has ended a connection.
    let long = Arc::new(AtomicBool::new(false));
    let (signer, wanted) = (keys.secret("new", "new"), long.clone());
    let asked = Token::from_fn(move || match wanted.load(Ordering::Relaxed) {
        true => signer.sign(&claims("alice")),
        false => short(&signer),
    });
    let (alice, mut events) = connect(options(&cluster, "alice", "phone", asked)).await.unwrap();
    loop {
        if matches!(next(&mut events).await, Event::Disconnected { reason } if reason.contains("TOKEN_EXPIRED"))
        {
            break;
        }
    }
    long.store(true, Ordering::Relaxed);
    tokio::time::timeout(PATIENCE, alice.send("bob", "back again")).await.expect("an answer").unwrap();

    // Who has only that one token has come to an end. It may come before the login does.
    let signer = keys.secret("new", "new");
    let fixed = Options {
        user: "alice".into(),
        ..options(&cluster, "alice", "desk", Token::fixed(short(&signer).unwrap()))
    };
    let (_desk, mut events) = Client::start(fixed).unwrap();
    let Ended::LoginRefused { code, .. } = ended(&mut events).await else { panic!("another end") };
    assert_eq!(code, Code::TokenExpired);
}

/// Who is put out, and comes back or does not.
async fn kick_and_revoke(cluster: Cluster, keys: &Keys) {
    let signer = keys.secret("old", "old");
    let targets: Vec<String> = cluster.states.iter().map(|state| state.rpc.to_string()).collect();
    let (first, last) = (targets.first().unwrap().as_str(), targets.last().unwrap().as_str());
    let log_in = |user: &'static str, device: &'static str| {
        connect(options(&cluster, user, device, token(&signer, user)))
    };
    let (_phone, mut phone) = log_in("alice", "phone").await.unwrap();
    let (desk, mut desk_events) = log_in("alice", "desk").await.unwrap();
    let (bob, _bob_events) = log_in("bob", "phone").await.unwrap();

    let kick = ["ctl", "kick", "--user", "alice", "--device", "phone", "--target", last];
    assert_eq!(state(&kick).await, (0, "ended 1\n".into(), String::new()));
    let Ended::Kicked { code, .. } = ended(&mut phone).await else { panic!("another end") };
    assert_eq!(code, Code::Ended);
    desk.send("bob", "still here").await.unwrap();
    assert_eq!(state(&kick).await.1, "ended 0\n", "nobody is there any more");
    let (_phone, mut phone) = log_in("alice", "phone").await.expect("the token is as good as before");

    let revoke = ["ctl", "revoke", "--user", "alice", "--target", first];
    assert_eq!(state(&revoke).await, (0, "ended 2\n".into(), String::new()));
    for events in [&mut phone, &mut desk_events] {
        let Ended::Kicked { code, .. } = ended(events).await else { panic!("another end") };
        assert_eq!(code, Code::TokenRevoked);
    }
    for device in ["phone", "desk", "another"] {
        let options = options(&cluster, "alice", device, token(&signer, "alice"));
        assert_eq!(refused(options).await.0, Code::TokenRevoked);
    }
    bob.send("alice", "they put you out?").await.unwrap();
    // A newer token is taken, once the second of the revocation is over.
    let newer = || Token::fixed(signer.sign(&NewToken { issued_s: now_s(), ..claims("alice") }).unwrap());
    let begin = std::time::Instant::now();
    loop {
        match connect(options(&cluster, "alice", "phone", newer())).await {
            Ok((alice, _)) => break drop(alice.send("bob", "here again").await.unwrap()),
            Err(ConnectError::Ended(Ended::LoginRefused { code: Code::TokenRevoked, .. })) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(begin.elapsed() < PATIENCE, "a newer token is not taken");
    }
    // Somebody who has never been here.
    let never = ["ctl", "revoke", "--user", "carol", "--device", "phone", "--target", last];
    assert_eq!(state(&never).await, (0, "ended 0\n".into(), String::new()));
    assert_eq!(
        refused(options(&cluster, "carol", "phone", token(&signer, "carol"))).await.0,
        Code::TokenRevoked
    );
    log_in("carol", "desk").await.expect("another device");

    let (code, _, stderr) = state(&["ctl", "kick", "--user", "a:b", "--target", first]).await;
    assert!(code == 64 && stderr.contains("no ':'"), "{code} {stderr}");
    let (code, _, stderr) = state(&["ctl", "kick", "--user", "bob", "--target", "127.0.0.1:1"]).await;
    assert_eq!((code, stderr.contains("127.0.0.1:1")), (69, true), "{stderr}");
}

#[tokio::test]
async fn operators_put_people_out_embedded() {
    let keys = Keys::make();
    kick_and_revoke(keys.cluster(embedded()), &keys).await;
}

#[tokio::test]
async fn operators_put_people_out_through_any_of_two_state_servers() {
    let keys = Keys::make();
    let options = ClusterOptions { gateways: 2, states: 2, ..ClusterOptions::default() };
    kick_and_revoke(keys.cluster(options), &keys).await;
}

/// Thirty devices log in while their tokens are revoked, each round at another moment: whoever got in is put out, and nobody
/// gets in behind it.
#[tokio::test]
async fn nobody_slips_through_a_revocation() {
    let keys = Keys::make();
    let cluster = keys.cluster(ClusterOptions { gateways: 2, states: 2, ..ClusterOptions::default() });
    let signer = keys.secret("old", "old");
    for (round, online) in [0usize, 1, 5, 15, 29].into_iter().enumerate() {
        let user = format!("user{round}");
        let token = Token::fixed(signer.sign(&claims(&user)).unwrap());
        let devices: Vec<(Client, Events)> = (0..30)
            .map(|n| Client::start(options(&cluster, &user, &format!("d{n}"), token.clone())).unwrap())
            .collect();
        let begin = std::time::Instant::now();
        let in_now = || devices.iter().filter(|(client, _)| client.status() == Status::Online).count();
        while in_now() < online {
            assert!(begin.elapsed() < PATIENCE, "{} of {online} are in", in_now());
            tokio::task::yield_now().await;
        }
        let target = format!("http://{}", cluster.states[round % 2].rpc);
        let request = EndRequest { user: user.clone(), revoke: true, ..EndRequest::default() };
        let reply = StateClient::connect(target).await.unwrap().end(request).await.unwrap().into_inner();
        assert_eq!(reply.left, 0, "{reply:?}");
        for (_client, mut events) in devices {
            match ended(&mut events).await {
                Ended::Kicked { code: Code::TokenRevoked, .. }
                | Ended::LoginRefused { code: Code::TokenRevoked, .. } => {}
                other => panic!("{other}"),
            }
        }
    }
}

/// A Login and its answer, over a connection of its own.
fn try_login(gateway: SocketAddr, token: &str) -> wire::Error {
    let login = wire::Login {
        wire_min: 1,
        wire_max: 1,
        user: "alice".into(),
        device: "raw".into(),
        attempt: 1,
        token: token.into(),
        agent: "test".into(),
    };
    let mut stream = TcpStream::connect(gateway).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut out = BytesMut::new();
    proto::frame::put(Command::Login, &login, &mut out);
    stream.write_all(&out).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    let frame = proto::frame::cut(&got, proto::FRAME_BYTES_MAX).unwrap().expect("an answer");
    match ServerFrame::decode(frame.command, Bytes::copy_from_slice(frame.body)).unwrap() {
        ServerFrame::Error(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn guesses_are_capped_by_address_and_expired_tokens_are_none() {
    let keys = Keys::make();
    let cluster = keys.cluster(ClusterOptions {
        gateway_sets: vec!["limits.refused_logins_per_address_max=20".into()],
        ..embedded()
    });
    let gateway = cluster.gateways[0].client;
    let expired = NewToken { expires_s: now_s() - 1, ..claims("alice") };
    let expired = keys.secret("old", "old").sign(&expired).unwrap();
    for _ in 0..30 {
        assert_eq!(try_login(gateway, &expired).code(), Code::TokenExpired);
    }
    let guess = keys.secret("old", "stolen").sign(&claims("alice")).unwrap();
    for _ in 0..20 {
        assert_eq!(try_login(gateway, &guess).code(), Code::LoginRefused);
    }
    // Whatever it brings now.
    for token in [&guess, &expired] {
        let error = try_login(gateway, token);
        assert_eq!((error.code(), error.closing), (Code::RateLimited, true), "{error:?}");
        assert!((1..=60_000).contains(&error.retry_after_ms), "{error:?}");
    }
    let refused = metric(cluster.gateways[0].admin, "rookery_gateway_logins_guessing_refused_total");
    assert_eq!(refused, 2.0);
    assert_eq!(metric(cluster.states[0].admin, "rookery_state_logins_refused_total"), 50.0);
}

fn metric(admin: SocketAddr, name: &str) -> f64 {
    let text = http_get(admin, "/metrics", PATIENCE).unwrap().body;
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("{name} in\n{text}")).trim().parse().unwrap()
}

#[tokio::test]
async fn who_sends_too_fast_waits_and_everything_arrives_in_order() {
    let sets = [
        "limits.device_messages_per_s=100",
        "limits.device_messages_burst=10",
        "limits.user_messages_per_s=150",
    ];
    let state_sets = sets.map(str::to_owned).to_vec();
    let cluster = Cluster::start(ClusterOptions { state_sets, ..embedded() }).unwrap();
    let (_bob, mut events) = connect(options(&cluster, "bob", "phone", Token::none())).await.unwrap();
    let (alice, _events) = connect(options(&cluster, "alice", "phone", Token::none())).await.unwrap();
    let mut pending = Vec::new();
    for n in 1..=200 {
        pending.push(alice.enqueue("bob", n.to_string()).await.unwrap());
    }
    for (n, answer) in (1..=200).zip(pending) {
        let sent = tokio::time::timeout(PATIENCE, answer).await.expect("an answer").unwrap();
        assert_eq!(sent.seq, n);
    }
    for n in 1..=200 {
        let message = loop {
            if let Event::Message(message) = next(&mut events).await {
                break message;
            }
        };
        events.confirm(&message);
        assert_eq!((message.seq, &message.body[..]), (n, n.to_string().as_bytes()));
    }
    assert!(metric(cluster.states[0].admin, "rookery_state_sends_rate_limited_total") > 0.0);
}

#[tokio::test]
async fn a_token_for_development_is_one_command_away() {
    let keys = Keys::make();
    let cluster = keys.cluster(embedded());
    let config = keys.path("state.toml");
    let sets = keys.all().into_iter().map(|set| {
        let (key, value) = set.split_once('=').unwrap();
        let key = key.strip_prefix("auth.").unwrap();
        if value.starts_with(['[', '0']) {
            format!("{key} = {value}\n")
        } else {
            format!("{key} = \"{value}\"\n")
        }
    });
    std::fs::write(&config, format!("[auth]\n{}", sets.collect::<String>())).unwrap();
    let made = async |more: &[&str]| {
        let args = ["token", "--user", "alice", "--device", "phone", "--ttl", "1d"];
        let (code, stdout, stderr) = state(&[&args[..], &["--config", path(&config)], more].concat()).await;
        assert_eq!((code, &*stderr), (0, ""));
        Token::fixed(stdout.trim())
    };
    let (new, private) = (keys.path("new"), keys.path("private"));
    let by_config = made(&[]).await;
    for token in [
        by_config.clone(),
        made(&["--key", path(&new), "--kid", "new"]).await,
        made(&["--key", path(&private), "--kid", "ed", "--eddsa"]).await,
    ] {
        connect(options(&cluster, "alice", "phone", token)).await.unwrap();
    }
    assert_eq!(refused(options(&cluster, "alice", "desk", by_config)).await.0, Code::LoginRefused);
    let (code, _, stderr) = state(&["token", "--user", "alice", "--set", "auth.keys=[]"]).await;
    assert!(code == 64 && stderr.contains("has no HS256 key"), "{code} {stderr}");
    let both = ["--check", "--config", path(&config), "--set", "auth.insecure=true"];
    let (code, _, stderr) = state(&both).await;
    assert!(code == 64 && stderr.contains("set only one"), "{code} {stderr}");
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
