//! The rules for names of users, devices and chats. Pure; any thread.
//!
//! Trap: names are exact bytes. Nothing is folded, trimmed or normalised, so `é` composed and decomposed are two users.

/// Longest name of a user or device, bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// A name or chat that breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum NameError {
    #[error("a name is 1 to {NAME_BYTES_MAX} bytes long")]
    Length,
    #[error("a name holds no ':' and no control character")]
    Character,
    #[error("a name does not start with '#'")]
    Group,
    #[error("a chat is two names joined by ':', or '#' and a number")]
    Chat,
}

/// Checks the name of a user or device: 1 to 64 bytes, no `:`, no control character, not starting with `#`.
pub fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(NameError::Length);
    }
    if name.starts_with('#') {
        return Err(NameError::Group);
    }
    if name.chars().any(|c| c == ':' || c.is_control()) {
        return Err(NameError::Character);
    }
    Ok(())
}

/// A chat, in the one form that is stored and answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Chat {
    /// Two users, the smaller name (by bytes) first. Both may be the same: notes to oneself.
    Pair(String, String),
    /// A group by its number.
    Group(u64),
}

impl Chat {
    /// Reads `a:b` in either order, or `#17`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if let Some(digits) = text.strip_prefix('#') {
            let number: u64 = digits.parse().map_err(|_| NameError::Chat)?;
            // One spelling a group: no sign, no leading zero.
            return if number.to_string() == digits { Ok(Chat::Group(number)) } else { Err(NameError::Chat) };
        }
        let (one, other) = text.split_once(':').ok_or(NameError::Chat)?;
        Chat::pair(one, other)
    }

    /// The chat of two users, named in either order.
    pub fn pair(one: &str, other: &str) -> Result<Self, NameError> {
        check(one)?;
        check(other)?;
        let (low, high) = if one.as_bytes() <= other.as_bytes() { (one, other) } else { (other, one) };
        Ok(Chat::Pair(low.to_owned(), high.to_owned()))
    }

    /// The two users of a one-to-one chat (twice the same in `a:a`); none for a group.
    pub fn pair_members(&self) -> Option<(&str, &str)> {
        match self {
            Chat::Pair(low, high) => Some((low, high)),
            Chat::Group(_) => None,
        }
    }
}

impl std::fmt::Display for Chat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Chat::Pair(low, high) => write!(f, "{low}:{high}"),
            Chat::Group(number) => write!(f, "#{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_follow_the_rules() {
        for good in ["a", "Ä", "alice smith", "x#y", &"n".repeat(64)] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("", NameError::Length),
            (&*"n".repeat(65), NameError::Length),
            ("a:b", NameError::Character),
            ("a\nb", NameError::Character),
            ("a\u{85}b", NameError::Character),
            ("#7", NameError::Group),
        ] {
            assert_eq!(check(bad), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn a_chat_has_one_spelling() {
        assert_eq!(Chat::parse("bob:alice").unwrap().to_string(), "alice:bob");
        assert_eq!(Chat::parse("a:a").unwrap().to_string(), "a:a");
        assert_eq!(Chat::parse("#17").unwrap(), Chat::Group(17));
        for bad in
            ["", "alice", ":", "a:", ":b", "a:b:c", "#", "#017", "#+1", "#x", "#99999999999999999999", "a:#b"]
        {
            assert!(Chat::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_what_was_written_gives_the_same(one in "\\PC{1,16}", other in "\\PC{1,16}") {
            if let Ok(chat) = Chat::pair(&one, &other) {
                prop_assert_eq!(Chat::parse(&chat.to_string()).unwrap(), chat.clone());
                prop_assert_eq!(Chat::pair(&other, &one).unwrap(), chat);
            }
        }
    }
}
