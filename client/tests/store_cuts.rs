//! The state log, cut and flipped at every byte: what was promised is still there, and no id is given twice.
//!
//! Trap: a log that lost whole records, and ends where one began, reads as an older log. Nothing that was synced is lost
//! so when a process or a machine dies, but whoever puts an old copy of the folder back has one.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use client::outbox::{Action, Limits, Outbox, StoredChat};
use client::store::{Store, device_folder};

const CHATS: [(&str, u64); 2] = [("a:b", 77), ("a:c", 88)];

/// What may be relied on when the log is as long as `bytes`.
#[derive(Clone)]
struct Promise {
    bytes: usize,
    attempt: u64,
    cursors: Vec<(String, u64, u64)>,
    chats: Vec<StoredChat>,
}

/// A log as a session writes it, with what it promises after each write; and every id that was given.
fn write_log(root: &Path) -> (Vec<u8>, Vec<Promise>, BTreeSet<(u64, u64)>) {
    let path = device_folder(root, "a", "x").join("log");
    let mut store = Store::open(root, "a", "x").unwrap();
    let (mut promises, mut ids) = (Vec::new(), BTreeSet::new());
    let mut commit = |store: &mut Store| {
        store.write().unwrap();
        promises.push(Promise {
            bytes: std::fs::metadata(&path).unwrap().len() as usize,
            attempt: store.attempt(),
            cursors: store.cursors().map(|(chat, history, seq, _)| (chat.to_owned(), history, seq)).collect(),
            chats: store.outbox(),
        });
    };
    commit(&mut store);
    store.put_attempt(5);
    commit(&mut store);
    store.put_complete();
    for (chat, stream) in CHATS {
        store.put_cursor(chat, 9, 0, 0);
        store.put_stream(chat, stream);
        for n in 1..=3 {
            store.put_message(chat, n, Bytes::from(format!("{chat} {n}")), 1);
            ids.insert((stream, n));
            if n == 2 {
                commit(&mut store);
                store.put_answered(chat, 1);
            }
            store.put_cursor(chat, 9, n, 0);
        }
        commit(&mut store);
    }
    store.put_attempt(6);
    commit(&mut store);
    drop(store);
    (std::fs::read(&path).unwrap(), promises, ids)
}

fn open(root: &Path, log: &[u8]) -> Store {
    let folder = device_folder(root, "a", "x");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("log"), log).unwrap();
    Store::open(root, "a", "x").unwrap()
}

/// The ids that a session on this store gives to new messages, once all that is unanswered is answered.
fn next_ids(store: &Store) -> Vec<(u64, u64)> {
    let now = Instant::now();
    let mut outbox = Outbox::restore(Limits::default(), 1, store.outbox());
    outbox.connected(32, now);
    for (ticket, (chat, _)) in CHATS.iter().enumerate() {
        outbox.submit(ticket as u64, chat, Bytes::from_static(b"new"), now).unwrap();
    }
    let mut given = Vec::new();
    while let Some(action) = outbox.next_action() {
        match action {
            Action::Store { stream, n, .. } => given.push((stream, n)),
            Action::Send(send) if send.body != b"new"[..] => outbox.ack(
                proto::wire::SendAck {
                    stream: send.stream,
                    n: send.n,
                    chat: send.chat,
                    ..Default::default()
                },
                now,
            ),
            _ => {}
        }
    }
    assert_eq!(given.len(), CHATS.len());
    given
}

#[test]
fn cut_at_every_byte_nothing_that_was_promised_is_forgotten() {
    let root = tempfile::tempdir().unwrap();
    let (log, promises, ids) = write_log(root.path());
    assert!(log.len() > 300 && promises.len() > 5);
    for cut in promises[0].bytes..=log.len() {
        let store = open(root.path(), &log[..cut]);
        let promise = promises.iter().rfind(|promise| promise.bytes <= cut).unwrap();
        assert!(store.attempt() >= promise.attempt);
        let cursors: Vec<_> = store.cursors().collect();
        for (chat, history, seq) in &promise.cursors {
            assert!(cursors.iter().any(|found| found.0 == chat && found.1 == *history && found.2 >= *seq));
        }
        let found = store.outbox();
        for chat in &promise.chats {
            let found = found.iter().find(|found| found.chat == chat.chat).unwrap();
            assert!(found.stream == chat.stream && found.next_n >= chat.next_n);
            for message in &chat.unanswered {
                // Answered by a record behind the promise, or still to be sent.
                assert!(found.unanswered.contains(message) || message.0 == 1, "{message:?} at {cut}");
            }
        }
        // The log ends with a record or within one: no id that was given before is given again.
        let given = next_ids(&store);
        assert!(given.iter().all(|id| !ids.contains(id)), "{given:?} at {cut}");
    }
}

#[test]
fn a_bit_flipped_anywhere_leads_to_no_id_that_was_given_before() {
    let root = tempfile::tempdir().unwrap();
    let (log, _, ids) = write_log(root.path());
    for at in 0..log.len() {
        let mut flipped = log.clone();
        flipped[at] ^= 1 << (at % 8);
        let store = open(root.path(), &flipped);
        let given = next_ids(&store);
        assert!(given.iter().all(|id| !ids.contains(id)), "{given:?}, flipped at {at}");
        drop(store);
        // The new life, too, knows that it must not.
        let store = Store::open(root.path(), "a", "x").unwrap();
        assert!(next_ids(&store).iter().all(|id| !ids.contains(id)), "flipped at {at}, opened again");
    }
}
