//! Which endpoint a call goes to, how often, and what becomes of those that fail. No sockets but those that nobody listens on.

use super::*;

fn channels(ids: &[&str]) -> (watch::Sender<Arc<Table>>, Channels) {
    let (sender, receiver) = watch::channel(Arc::new(table(ids)));
    (sender, Channels::new(receiver, ChannelOptions::default()))
}

fn table(ids: &[&str]) -> Table {
    // Nobody listens there; these tests never connect.
    Table::new(
        ids.iter().map(|id| Arc::new(Endpoint::new("state", *id, format!("127.0.0.1:{}", 1 + id.len())))),
    )
}

const SAFE: CallOptions = CallOptions { deadline: Duration::from_secs(60), idempotent: true };

#[tokio::test]
async fn unavailable_is_tried_elsewhere_when_safe() {
    let (_table, channels) = channels(&["a", "bb", "ccc"]);
    let seen = Mutex::new(Vec::new());
    let fail_first = |attempt: Attempt| {
        let mut seen = seen.lock();
        seen.push(attempt.endpoint.id.clone());
        let first = seen.len() == 1;
        async move { if first { Err(Status::unavailable("x")) } else { Ok(()) } }
    };
    channels.call(Pick::Hash(7), SAFE, fail_first).await.unwrap();
    let tried = seen.lock().clone();
    assert_eq!(tried.len(), 2);
    assert_ne!(tried[0], tried[1]);
    seen.lock().clear();
    let unsafe_call = CallOptions { idempotent: false, ..SAFE };
    assert_eq!(
        channels.call(Pick::RoundRobin, unsafe_call, fail_first).await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(seen.lock().len(), 1);
}

#[tokio::test]
async fn what_was_not_sent_is_tried_elsewhere_also_when_it_is_not_safe() {
    let unsafe_call = CallOptions { idempotent: false, ..SAFE };
    let (_table, channels) = channels(&["a", "bb", "ccc"]);
    let tries = Mutex::new(0u32);
    // Nobody listens at these addresses, so no connection is made; what fails behind that is not tried again.
    let call = |attempt: Attempt| {
        *tries.lock() += 1;
        async move {
            let mut client = tonic_health::pb::health_client::HealthClient::new(attempt.channel.clone());
            client.check(attempt.request(tonic_health::pb::HealthCheckRequest::default())).await
        }
    };
    let status = channels.call(Pick::RoundRobin, unsafe_call, call).await.unwrap_err();
    assert!(was_not_sent(&status), "{status:?}");
    assert_eq!(*tries.lock(), 3);
    let broken = |_| async {
        let mut status = Status::unavailable("the connection broke");
        status.set_source(Arc::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        Err::<(), _>(status)
    };
    let status = channels.call(Pick::RoundRobin, unsafe_call, broken).await.unwrap_err();
    assert!(!was_not_sent(&status) && broke(&status));
    let (_table, nobody) = self::channels(&[]);
    let status = nobody.call(Pick::RoundRobin, unsafe_call, broken).await.unwrap_err();
    assert!(was_not_sent(&status));
}

#[tokio::test]
async fn retries_end_with_their_budget() {
    let (_table, channels) = channels(&["a", "bb", "ccc"]);
    let tries = Mutex::new(0u32);
    for _ in 0..100 {
        let fail = |_| {
            *tries.lock() += 1;
            async { Err::<(), _>(Status::unavailable("x")) }
        };
        channels.call(Pick::RoundRobin, SAFE, fail).await.unwrap_err();
    }
    assert!((110..=122).contains(&*tries.lock()), "{} tries for 100 calls", tries.lock());
}

#[tokio::test]
async fn a_caller_that_is_gone_blames_nobody_and_frees_the_try() {
    let (_table, channels) = channels(&["a"]);
    let never = |_| std::future::pending::<Result<(), Status>>();
    let mut call = Box::pin(channels.call(Pick::RoundRobin, SAFE, never));
    assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(call.as_mut().poll(cx).is_pending())).await);
    drop(call);
    let addr = &channels.table()[0].addr;
    assert!(!channels.inner.open.lock().outages.is_out(addr, Instant::now()));
}

#[tokio::test]
async fn a_deadline_ends_the_call() {
    let (_table, channels) = channels(&["a"]);
    let short = CallOptions { deadline: Duration::from_millis(20), ..SAFE };
    let never = |_| std::future::pending::<Result<(), Status>>();
    assert_eq!(
        channels.call(Pick::RoundRobin, short, never).await.unwrap_err().code(),
        Code::DeadlineExceeded
    );
}

#[tokio::test]
async fn channels_of_those_who_left_are_dropped() {
    let (sender, channels) = channels(&["a", "bb"]);
    for turn in 0..4 {
        channels.pick(Pick::RoundRobin, turn, &[]).unwrap();
    }
    assert_eq!(channels.inner.open.lock().channels.len(), 2);
    sender.send(Arc::new(table(&["bb"]))).unwrap();
    assert_eq!(channels.pick(Pick::Hash(1), 0, &[]).unwrap().0.id, "bb");
    assert_eq!(channels.inner.open.lock().channels.len(), 1);
    sender.send(Arc::new(table(&[]))).unwrap();
    assert!(channels.pick(Pick::RoundRobin, 0, &[]).is_none());
}

fn refused() -> Status {
    let mut status = Status::unavailable("connection refused");
    status.set_source(Arc::new(NoServer));
    status
}

#[tokio::test]
async fn who_is_not_there_costs_no_call() {
    let unsafe_call = CallOptions { idempotent: false, ..SAFE };
    let (_table, channels) = channels(&["a", "bb"]);
    let asked = Mutex::new(0u32);
    let call = |attempt: Attempt| {
        let is_a = attempt.endpoint.id == "a";
        *asked.lock() += u32::from(is_a);
        async move { if is_a { Err(refused()) } else { Ok(attempt.endpoint.id.clone()) } }
    };
    let began = Instant::now();
    for _ in 0..500 {
        assert_eq!(channels.call(Pick::RoundRobin, unsafe_call, call).await.unwrap(), "bb");
    }
    // Once, and once more for each pause that went by.
    assert!(u64::from(*asked.lock()) <= 1 + began.elapsed().as_secs(), "{}", asked.lock());
}

#[tokio::test]
async fn when_nobody_answers_everybody_is_asked() {
    let (_table, channels) = channels(&["a", "bb"]);
    let asked = Mutex::new(HashMap::new());
    for _ in 0..100 {
        let call = |attempt: Attempt| {
            *asked.lock().entry(attempt.endpoint.id.clone()).or_insert(0) += 1;
            async { Err::<(), _>(refused()) }
        };
        assert!(was_not_sent(&channels.call(Pick::RoundRobin, SAFE, call).await.unwrap_err()));
    }
    assert_eq!(*asked.lock(), HashMap::from([("a".to_owned(), 100), ("bb".to_owned(), 100)]));
}
