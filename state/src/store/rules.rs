//! What all stores do alike: where a chat lives, what a checksum is over, how much one answer holds. Pure.
//!
//! Trap: buckets and checksums are part of every layout; a change here is another layout.

use proto::wire::Kind;
use sha2::Digest;

/// What is left of [`super::Head::first`] for whoever may see only what is behind `since`.
pub fn first_behind(since: u64, first: u64) -> u64 {
    if since == 0 { first } else { first.max(since + 1) }
}

/// The bucket that a chat lives in: the same for ever, for every store and build.
pub fn chat_bucket(chat: &str) -> u32 {
    crc32c::crc32c(chat.as_bytes()) % CHAT_BUCKETS
}

/// The other user of a one-to-one chat; of a chat with oneself, and of a group, there is none.
pub fn peer<'a>(chat: &'a str, user: &str) -> Option<&'a str> {
    let (low, high) = chat.split_once(':')?;
    [low, high].into_iter().find(|name| *name != user).filter(|_| low == user || high == user)
}

/// Buckets of chats. Part of the layout.
pub const CHAT_BUCKETS: u32 = 1024;

/// A Pull stops behind the message whose body brings it to so many bytes, whatever its limit: no answer holds more.
pub const PULL_BYTES_MAX: usize = proto::FRAME_BYTES_MAX;

/// A chat that keeps so many messages may keep fewer than so many more: what is due is looked for at seqs that this divides.
/// So most messages pay nothing for retention.
pub fn retention_step(messages_max: u64) -> u64 {
    if messages_max == 0 { 64 } else { (messages_max / 64).clamp(1, 64) }
}

/// What a named id remembers of its body: two bodies that share it are not found by chance, nor by trying.
pub fn body_digest(body: &[u8]) -> [u8; 16] {
    let digest: [u8; 32] = sha2::Sha256::digest(body).into();
    std::array::from_fn(|at| digest[at])
}

/// Checksum of a stored message: what a reader compares before it shows it. Text has no kind in it, as before there were kinds.
pub fn message_crc(chat: &str, sender: &str, kind: Kind, body: &[u8]) -> u32 {
    let crc = crc32c::crc32c(chat.as_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, sender.as_bytes()), body);
    if kind == Kind::Text { crc } else { crc32c::crc32c_append(crc, &[kind as u8]) }
}
