//! Messages of web services: named by their sender, or not at all.

use bytes::Bytes;
use proto::wire::Code;
use state::store::{Append, Appended, MessageId, Op, Store, read};

use super::{append, appended, one, pull, seqs};

fn named(chat: &str, sender: &str, name: &str, body: &str) -> Append {
    let id = MessageId::Named(name.into());
    Append {
        chat: chat.into(),
        sender: sender.into(),
        id,
        body: Bytes::from(body.to_owned()),
        ..Append::default()
    }
}

/// Seq, and whether it had been answered before.
async fn stored(store: &dyn Store, append: Append) -> (u64, bool) {
    match appended(store, Op::Append(append)).await {
        Appended::Stored { seq, again, .. } => (seq, again),
        other => panic!("{other:?}"),
    }
}

pub async fn a_name_is_bound_to_its_body(store: &dyn Store) {
    let chat = "name:other";
    let first = appended(store, Op::Append(named(chat, "name", "x", "1"))).await;
    let Appended::Stored { seq: 1, time_us, history, again: false, .. } = first else { panic!("{first:?}") };
    let again = Appended::Stored { seq: 1, time_us, history, version: 0, again: true };
    assert_eq!(appended(store, Op::Append(named(chat, "name", "x", "1"))).await, again);
    for body in ["2", "", "1 "] {
        assert_eq!(appended(store, Op::Append(named(chat, "name", "x", body))).await, Appended::Conflict);
    }
    // Names are of a chat and a sender, and nothing in them is special.
    assert_eq!(stored(store, named(chat, "other", "x", "2")).await, (2, false));
    assert_eq!(stored(store, named("name:name", "name", "x", "3")).await, (1, false));
    let longest = "ü".repeat(state::store::MESSAGE_NAME_BYTES_MAX / 2);
    let names = ["-", "=", "1", "x:y", ":", " ", "\0", "x ", "name:x", "日本", &longest];
    for (name, seq) in names.iter().zip(3..) {
        assert_eq!(stored(store, named(chat, "name", name, name)).await, (seq, false), "{name:?}");
    }
    for (name, seq) in names.iter().zip(3..) {
        assert_eq!(stored(store, named(chat, "name", name, name)).await, (seq, true), "{name:?}");
    }
    // The same name twice in one call is one message, and two bodies are told apart.
    let ops = ["a", "a", "b"].map(|body| Op::Append(named(chat, "name", "twice", body)));
    let answers: Vec<_> =
        store.apply(&ops).await.into_iter().map(|outcome| read::appended(outcome).unwrap()).collect();
    assert!(
        matches!(
            answers[..],
            [
                Appended::Stored { seq: 14, again: false, .. },
                Appended::Stored { seq: 14, again: true, .. },
                Appended::Conflict
            ]
        ),
        "{answers:?}"
    );
    assert_eq!(seqs(store, pull(chat, 0, 100, false)).await, (1..=14).collect::<Vec<_>>());
    // Whoever bears the sender's name behind its deletion has said nothing yet.
    let chat = "gone:other";
    assert_eq!(stored(store, named(chat, "gone", "x", "1")).await, (1, false));
    assert_eq!(stored(store, named(chat, "other", "x", "1")).await, (2, false));
    one(store, Op::Vacate { chat: chat.into(), user: "gone".into() }).await.unwrap();
    for again in [false, true] {
        assert_eq!(stored(store, named(chat, "gone", "x", "2")).await, (3, again));
        assert_eq!(stored(store, named(chat, "other", "x", "1")).await, (2, true));
    }
}

pub async fn a_refusal_leaves_its_name(store: &dyn Store) {
    let refused = Append { refusal: Some(Code::MessageTooLarge), ..named("left:name", "name", "x", "long") };
    for _ in 0..2 {
        let answer = appended(store, Op::Append(refused.clone())).await;
        assert_eq!(answer, Appended::Refused(Code::MessageTooLarge));
    }
    let unnamed = Append { id: MessageId::Unnamed, ..refused.clone() };
    assert_eq!(appended(store, Op::Append(unnamed)).await, Appended::Refused(Code::MessageTooLarge));
    assert_eq!(stored(store, named("left:name", "name", "x", "short")).await, (1, false));
    assert_eq!(appended(store, Op::Append(refused.clone())).await, Appended::Conflict, "another body");
    let same = Append { refusal: refused.refusal, ..named("left:name", "name", "x", "short") };
    assert_eq!(stored(store, same).await, (1, true), "what was accepted stays so");
}

/// Each is another message, and numbers go on beside them.
pub async fn what_has_no_name_is_always_new(store: &dyn Store) {
    let chat = "none:name";
    let unnamed = Append { id: MessageId::Unnamed, ..named(chat, "name", "", "1") };
    for seq in 1..=3 {
        assert_eq!(stored(store, unnamed.clone()).await, (seq, false));
    }
    let ops = [Op::Append(unnamed.clone()), append(chat, "name", 1, 1), Op::Append(unnamed.clone())];
    let seqs_of = |outcomes: Vec<_>| -> Vec<u64> {
        let seq = |outcome| match read::appended(outcome).unwrap() {
            Appended::Stored { seq, again: false, .. } => seq,
            other => panic!("{other:?}"),
        };
        outcomes.into_iter().map(seq).collect()
    };
    assert_eq!(seqs_of(store.apply(&ops).await), [4, 5, 6]);
    let page = read::page(one(store, pull(chat, 0, 100, false)).await).unwrap();
    assert_eq!(page.messages.iter().filter(|message| &message.body[..] == b"1").count(), 5);
    assert!(page.messages.windows(2).all(|two| two[0].time_us < two[1].time_us));
}

pub async fn names_are_there_after_reopening(store: &dyn Store) {
    assert_eq!(stored(store, named("name:other", "name", "x", "1")).await, (1, true));
    assert_eq!(appended(store, Op::Append(named("name:other", "name", "x", "2"))).await, Appended::Conflict);
}
