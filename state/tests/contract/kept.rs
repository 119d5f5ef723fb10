//! What a store keeps and for how long, what was lately, and how far the servers are.
//!
//! Trap: times are the store's own, so a test takes them from what the store answered.

use state::store::{Appended, CHAT_BUCKETS, Head, Mark, Moved, Op, Page, Store, chat_bucket, read};

use super::{Fixture, append, appended, one, pull, refuse, seqs};

/// Everything in here.
pub async fn keeps_what_it_must<F: Fixture>() {
    let fixture = F::start();
    let store = fixture.open().await;
    marks(&*store).await;
    recency_keeps_every_chat(&*store).await;
    a_history_is_lost_once(&*store).await;
    old_messages_go_and_heads_stay(&*store).await;
    every_chat_has_its_turn(&*store).await;
    who_fell_silent_has_its_turn_among_others(&*store).await;
    cursors_of_many_chats(&*store).await;
    drop(store);
    let store = fixture.open().await;
    reopened(&*store).await;
    drop(store);
    let store = fixture.open_keeping(10).await;
    the_newest_are_kept(&*store).await;
    a_batch_counts_like_its_messages(&*store).await;
    drop(store);
    many_go_at_once(&*fixture.open_keeping(128).await).await;
}

/// So many chats of one bucket, by a name that they begin with.
fn neighbours(name: &str, count: usize) -> Vec<String> {
    let bucket = chat_bucket(&format!("{name}:z"));
    let all = (0..).map(|n| format!("{name}{n}:z"));
    all.filter(|chat| chat_bucket(chat) == bucket).take(count).collect()
}

/// Delivered cursors of many chats in one call, each by its own head.
async fn cursors_of_many_chats(store: &dyn Store) {
    let chats: Vec<String> = (0..200).map(|n| format!("many{n}:v")).collect();
    let sends: Vec<Op> = chats.iter().map(|chat| append(chat, "v", 1, 1)).collect();
    assert!(store.apply(&sends).await.iter().all(Result::is_ok));
    let cursor = |(chat, n): (&String, u64)| Op::Delivered {
        chat: chat.clone(),
        user: "v".into(),
        seq: n % 3,
        read: n % 5,
    };
    let cursors: Vec<Op> = chats.iter().zip(0..).map(cursor).collect();
    for (outcome, n) in store.apply(&cursors).await.into_iter().zip(0..) {
        let at = |seq: u64| u64::min(seq, 1);
        let moved = Moved { delivered: at(n % 3), read: at(n % 5), is_news: n % 15 != 0 };
        assert_eq!(read::moved(outcome).unwrap(), moved);
    }
    for (chat, n) in chats.iter().zip(0..) {
        let at = read::head(one(store, Op::Head { chat: chat.clone(), user: "v".into() }).await).unwrap();
        assert_eq!((at.delivered, at.read), (u64::min(n % 3, 1), u64::min(n % 5, 1)), "{chat}");
    }
}

async fn head(store: &dyn Store, chat: &str) -> Head {
    read::head(one(store, Op::Head { chat: chat.into(), user: "z".into() }).await).unwrap()
}

async fn page(store: &dyn Store, chat: &str) -> Page {
    read::page(one(store, pull(chat, 0, 1000, false)).await).unwrap()
}

/// The time of the new message.
async fn say(store: &dyn Store, chat: &str, n: u64) -> u64 {
    match appended(store, append(chat, "z", 1, n)).await {
        Appended::Stored { time_us, .. } => time_us,
        other => panic!("{other:?}"),
    }
}

/// Those of the bucket that begin so.
async fn recent(store: &dyn Store, name: &str, after_us: u64, limit: usize) -> Vec<(String, u64)> {
    let bucket = chat_bucket(&format!("{name}:z"));
    let found = read::recent(one(store, Op::Recent { bucket, after_us, limit }).await).unwrap();
    let found = found.into_iter().map(|recent| (recent.chat, recent.time_us));
    found.filter(|(chat, _)| chat.starts_with(name)).collect()
}

async fn expire(store: &dyn Store, name: &str, before_us: u64, limit: usize) {
    let bucket = chat_bucket(&format!("{name}:z"));
    one(store, Op::Expire { bucket, before_us, limit }).await.unwrap();
}

async fn marks(store: &dyn Store) {
    let mark = async |server: &str, life, pushed_us| {
        let op = Op::Mark { server: server.into(), life, pushed_us };
        let mut marks = read::marks(one(store, op).await).unwrap();
        marks.marks.sort_by_key(|mark| (mark.server.clone(), mark.life));
        marks
    };
    let of =
        |server: &str, life, pushed_us, beat_us| Mark { server: server.into(), life, pushed_us, beat_us };
    let now_us = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros();
    let first = mark("s-1", 7, 0).await;
    assert!((first.now_us as u128).abs_diff(now_us) < 600_000_000, "{}", first.now_us);
    assert_eq!(first.marks, [of("s-1", 7, first.now_us, first.now_us)], "not known yet: the store's time");
    let second = mark("s-2", u64::MAX, 5).await;
    assert!(second.now_us >= first.now_us);
    let of_2 = of("s-2", u64::MAX, 5, second.now_us);
    assert_eq!(second.marks, [of("s-1", 7, first.now_us, first.now_us), of_2.clone()]);
    assert_eq!(mark("s-1", 8, 9).await.marks.len(), 3, "another life is another mark");
    one(store, Op::DropMark { server: "s-1".into(), life: 7 }).await.unwrap();
    one(store, Op::DropMark { server: "nobody".into(), life: 7 }).await.unwrap();
    let last = mark("s-1", 8, 11).await;
    assert_eq!(last.marks, [of("s-1", 8, 11, last.now_us), of_2]);
    let beat = mark("s-1", 8, 11).await;
    assert!(beat.now_us >= last.now_us);
    assert_eq!(beat.marks[0], of("s-1", 8, 11, beat.now_us), "it beats, though it has not moved");
}

async fn recency_keeps_every_chat(store: &dyn Store) {
    let chats = neighbours("recent", 3);
    let mut times = Vec::new();
    for chat in &chats {
        times.push(say(store, chat, 1).await);
    }
    let expected: Vec<_> = chats.iter().cloned().zip(times.iter().copied()).collect();
    assert_eq!(recent(store, "recent", 0, 100).await, expected, "oldest first");
    assert_eq!(recent(store, "recent", times[0], 100).await, expected[1..], "exclusive");
    assert_eq!(recent(store, "recent", 0, 2).await, expected[..2]);
    assert_eq!(recent(store, "recent", times[2], 100).await, []);
    assert_eq!(recent(store, "recent", u64::MAX, 100).await, []);
    // A message moves its chat, also within one call; a refusal does not.
    let bucket = chat_bucket(&chats[0]);
    let ops = [
        append(&chats[0], "z", 1, 2),
        refuse(&chats[1], "z", 1, 2),
        Op::Recent { bucket, after_us: times[0], limit: 9 },
    ];
    let found = read::recent(store.apply(&ops).await.swap_remove(2)).unwrap();
    let order: Vec<&str> = found.iter().map(|recent| recent.chat.as_str()).collect();
    assert_eq!(order, [&chats[1], &chats[2], &chats[0]]);
    assert!(found[2].time_us > times[2]);
}

async fn a_history_is_lost_once(store: &dyn Store) {
    let (chat, other) = ("lost:z", "other:z");
    say(store, chat, 1).await;
    say(store, other, 1).await;
    let (before, others) = (head(store, chat).await.history, head(store, other).await.history);
    assert!(before != 0 && chat_bucket(chat) != chat_bucket(other));
    let lose = async |history| {
        one(store, Op::LoseHistory { bucket: chat_bucket(chat), history }).await.unwrap();
        head(store, chat).await.history
    };
    assert_eq!(lose(before ^ 1).await, before, "somebody else's");
    let after = lose(before).await;
    assert!(after != before && after != 0);
    assert_eq!(lose(before).await, after, "lost already");
    assert_eq!(head(store, other).await.history, others);
    assert_eq!((page(store, chat).await.history, page(store, chat).await.head), (after, 1));
    let answer = appended(store, append(chat, "z", 1, 2)).await;
    assert!(matches!(answer, Appended::Stored { history, seq: 2, .. } if history == after), "{answer:?}");
    // What the call changed holds for the rest of it.
    let ops = [Op::LoseHistory { bucket: chat_bucket(chat), history: after }, pull(chat, 0, 9, false)];
    let last = read::page(store.apply(&ops).await.swap_remove(1)).unwrap().history;
    assert!(last != after);
    assert_eq!(head(store, chat).await.history, last);
}

async fn old_messages_go_and_heads_stay(store: &dyn Store) {
    let chat = "expire:z";
    assert_eq!((head(store, chat).await.first, page(store, chat).await.first), (1, 1), "nothing was there");
    let mut times = vec![0];
    for n in 1..=40 {
        times.push(say(store, chat, n).await);
    }
    let history = head(store, chat).await.history;
    for (before_us, first) in
        [(times[1], 1), (times[2], 2), (times[2], 2), (times[29] + 1, 30), (times[3], 30), (times[40], 40)]
    {
        expire(store, "expire", before_us, 100).await;
        assert_eq!(head(store, chat).await, Head { history, seq: 40, first, ..Head::default() });
        assert_eq!(seqs(store, pull(chat, 0, 100, false)).await, (first..=40).collect::<Vec<_>>());
        assert_eq!(page(store, chat).await.first, first);
    }
    for _ in 0..2 {
        expire(store, "expire", u64::MAX >> 11, 100).await;
        let (at, page) = (head(store, chat).await, page(store, chat).await);
        assert_eq!((at.seq, at.first, at.history), (40, 41, history), "no seq is given twice");
        assert_eq!((page.head, page.first, page.messages.len()), (40, 41, 0));
    }
    assert_eq!(recent(store, "expire", 0, 100).await, [(chat.to_owned(), times[40])]);
    let again = appended(store, append(chat, "z", 1, 40)).await;
    assert!(matches!(again, Appended::Stored { seq: 40, again: true, .. }), "its id is remembered");
    one(store, Op::Delivered { chat: chat.into(), user: "z".into(), seq: 40, read: 39 }).await.unwrap();
    let time = say(store, chat, 41).await;
    assert!(time > times[40]);
    assert_eq!(
        head(store, chat).await,
        Head { history, seq: 41, delivered: 40, read: 39, first: 41, ..Head::default() }
    );
    assert_eq!(seqs(store, pull(chat, 0, 100, false)).await, [41]);
    expire(store, "expire", time, 100).await;
    assert_eq!(head(store, chat).await.first, 41);
}

/// However few are looked at in a call, and also when those looked at first have nothing that is due.
async fn every_chat_has_its_turn(store: &dyn Store) {
    let chats = neighbours("turn", 5);
    let mut last = 0;
    for n in 1..=2 {
        for chat in &chats {
            last = say(store, chat, n).await;
        }
    }
    // A whole round with nothing to do.
    for _ in 0..7 {
        expire(store, "turn", 1, 1).await;
    }
    for _ in 0..12 {
        expire(store, "turn", last, 1).await;
    }
    for chat in &chats {
        let first = if *chat == chats[4] { 2 } else { 3 };
        assert_eq!((head(store, chat).await.seq, head(store, chat).await.first), (2, first), "{chat}");
    }
    assert_eq!(recent(store, "turn", 0, 100).await.len(), 5);
    // Nothing there, nothing done.
    let empty = (0..CHAT_BUCKETS).find(|bucket| *bucket == (chat_bucket("turn:z") + 1) % CHAT_BUCKETS);
    let op = Op::Expire { bucket: empty.unwrap(), before_us: 1 << 52, limit: 10 };
    one(store, op).await.unwrap();
}

/// Others are written to before each call, as many as are looked at in one.
async fn who_fell_silent_has_its_turn_among_others(store: &dyn Store) {
    let chats = neighbours("silent", 4);
    let (silent, others) = chats.split_first().unwrap();
    say(store, silent, 1).await;
    // Now this is behind it, and nothing of it is due yet.
    for n in 1..=10 {
        for other in others {
            say(store, other, n).await;
        }
        expire(store, "silent", 1, 2).await;
    }
    let due = say(store, silent, 2).await;
    let mut first = 1;
    for n in 11..=40 {
        for other in others {
            say(store, other, n).await;
        }
        expire(store, "silent", due, 2).await;
        first = head(store, silent).await.first;
        if first == 2 {
            return;
        }
    }
    panic!("{first} is still the first");
}

async fn reopened(store: &dyn Store) {
    let marks = Op::Mark { server: "s-3".into(), life: 1, pushed_us: 1 };
    let marks = read::marks(one(store, marks).await).unwrap().marks;
    let kept = |mark: &Mark| (&*mark.server, mark.life, mark.pushed_us) == ("s-2", u64::MAX, 5);
    assert!(marks.iter().any(kept), "{marks:?}");
    let (lost, other) = (head(store, "lost:z").await, head(store, "other:z").await);
    assert_eq!((lost.seq, lost.first, other.seq), (2, 1, 1));
    assert_eq!(head(store, "lost:z").await.history, page(store, "lost:z").await.history);
    assert_eq!((head(store, "expire:z").await.first, recent(store, "turn", 0, 100).await.len()), (41, 5));
}

async fn the_newest_are_kept(store: &dyn Store) {
    let chat = "count:z";
    for n in 1..=35 {
        say(store, chat, n).await;
        let first = n.saturating_sub(9).max(1);
        assert_eq!((head(store, chat).await.seq, head(store, chat).await.first), (n, first));
        assert_eq!(seqs(store, pull(chat, 0, 100, false)).await, (first..=n).collect::<Vec<_>>());
    }
    let again = appended(store, append(chat, "z", 1, 4)).await;
    assert!(
        matches!(again, Appended::Stored { seq: 4, again: true, .. }),
        "gone, and still answered: {again:?}"
    );
    assert_eq!(seqs(store, pull(chat, 0, 3, false)).await, [26, 27, 28]);
    assert_eq!(seqs(store, pull(chat, 27, 9, true)).await, [26], "downwards too");
    assert!(matches!(appended(store, refuse(chat, "z", 1, 36)).await, Appended::Refused(_)));
    assert_eq!(head(store, chat).await.first, 26);
}

async fn a_batch_counts_like_its_messages(store: &dyn Store) {
    let ops: Vec<Op> = (1..=30).map(|n| append("batch:z", "z", 1, n)).collect();
    let ops = [ops, vec![pull("batch:z", 0, 100, false)]].concat();
    let page = read::page(store.apply(&ops).await.pop().unwrap()).unwrap();
    assert_eq!((page.head, page.first, page.messages.len()), (30, 21, 10));
    assert_eq!(seqs(store, pull("batch:z", 0, 100, false)).await, (21..=30).collect::<Vec<_>>());
}

async fn many_go_at_once(store: &dyn Store) {
    let mut firsts = Vec::new();
    for n in 1..=200 {
        say(store, "slack:z", n).await;
        let at = head(store, "slack:z").await;
        let kept = at.seq + 1 - at.first;
        assert!(n <= 128 && kept == n || (128..=130).contains(&kept), "{at:?}");
        firsts.push(at.first);
    }
    firsts.dedup();
    assert!(firsts.len() <= 40, "two go at once: {firsts:?}");
}

/// A damaged message is told as such, not shown; what else the call asked is answered.
pub async fn tells_of_a_flipped_body<F: Fixture>() {
    let fixture = F::start();
    let store = fixture.open().await;
    for n in 1..=3 {
        appended(&*store, append("crc:q", "q", 1, n)).await;
    }
    drop(store);
    fixture.damage("crc:q", b"q/1/9").await;
    let store = fixture.open().await;
    let page = read::page(one(&*store, pull("crc:q", 0, 5, false)).await).unwrap();
    let left: Vec<u64> = page.messages.iter().map(|message| message.seq).collect();
    assert_eq!((left, page.head), (vec![2, 3], 3), "it is left out, and its neighbours are not");
    // A page tells how far it read, so that what is behind a damaged message is reached by who asks for one at a time.
    for reverse in [false, true] {
        let (mut cursor, mut reached) = (0, Vec::new());
        for _ in 0..4 {
            let page = read::page(one(&*store, pull("crc:q", cursor, 1, reverse)).await).unwrap();
            reached.extend(page.messages.iter().map(|message| message.seq));
            assert!(page.messages.last().is_none_or(|last| last.seq <= page.read_to || reverse), "{page:?}");
            if page.read_to == 0 {
                break;
            }
            assert!(if reverse && cursor > 0 { page.read_to < cursor } else { page.read_to > cursor });
            cursor = page.read_to;
        }
        assert_eq!(reached, if reverse { vec![3, 2] } else { vec![2, 3] });
    }
}
