//! Where a device's folder is. Pure but for the environment.
//!
//! Trap: names are any bytes of UTF-8, also `..` and `/`; a file name holds letters, digits and `-_`, the rest as `%2F`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::StoreError;

/// `$XDG_STATE_HOME/rookery`, else `~/.local/state/rookery`.
pub fn default_root() -> Result<PathBuf, StoreError> {
    let set =
        |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    let root = set("XDG_STATE_HOME").filter(|path| path.is_absolute());
    let root = root.or_else(|| Some(set("HOME")?.join(".local/state")));
    Ok(root.ok_or(StoreError::NoHome)?.join("rookery"))
}

/// The folder of a user's device under a root.
pub fn device_folder(root: &Path, user: &str, device: &str) -> PathBuf {
    root.join(file_name(user)).join(file_name(device))
}

/// A safe file name, another one for every name.
pub fn file_name(name: &str) -> String {
    let mut safe = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            safe.push(byte.into());
        } else {
            safe.push_str(&format!("%{byte:02X}"));
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leaves_its_folder() {
        assert_eq!(file_name("send-12_x"), "send-12_x");
        assert_eq!(file_name(".."), "%2E%2E");
        assert_eq!(file_name("a/b c"), "a%2Fb%20c");
        assert_eq!(file_name("é"), "%C3%A9");
        assert!(file_name(&"é".repeat(32)).len() < 255);
    }
}
