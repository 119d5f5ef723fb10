//! A network and mounts of the torture process's own, so that no rule, queue or mount ever touches the machine. Called once,
//! on the main thread, before any other thread starts.
//!
//! Trap: unshare works on the calling thread alone, and later threads and children inherit from it. Called with other threads
//! about, those would stay outside, and half of the process would not reach the other half's servers.

use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::ToolError;

/// What came of [`enter`]; not set: it was never called.
static ENTERED: OnceLock<Result<(), String>> = OnceLock::new();

/// Tries to leave the machine's network and mounts for own ones. What came of it is remembered for [`need`].
pub fn enter() {
    ENTERED.get_or_init(|| try_enter().map_err(|error| format!("needs root (own namespaces: {error})")));
}

/// Whether rules and mounts may be made.
pub fn need() -> Result<(), ToolError> {
    match ENTERED.get() {
        Some(Ok(())) => Ok(()),
        Some(Err(why)) => Err(ToolError::Missing(why.clone())),
        None => Err(ToolError::Missing("needs namespaces of its own".into())),
    }
}

fn try_enter() -> Result<(), nix::Error> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    // What is mounted from here on must not show outside.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    loopback_up()
}

/// A new network has a loopback that is down. Asked for by rtnetlink, so that no program has to be there for it.
fn loopback_up() -> Result<(), nix::Error> {
    let fd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    send(fd.as_raw_fd(), &up_request(), MsgFlags::empty())?;
    let mut answer = [0; 256];
    let got = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // An acknowledgement is an error message with the number 0 behind its header.
    match answer[..got].get(HEADER_BYTES..HEADER_BYTES + 4) {
        Some(&[a, b, c, d]) => match i32::from_ne_bytes([a, b, c, d]) {
            0 => Ok(()),
            number => Err(nix::Error::from_raw(-number)),
        },
        _ => Err(nix::Error::EBADMSG),
    }
}

/// `struct nlmsghdr` and `struct ifinfomsg` of rtnetlink(7), for interface 1, which the loopback of a new network always is.
fn up_request() -> Vec<u8> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const LOOPBACK: i32 = 1;
    const IFF_UP: u32 = 1;
    let mut out = Vec::with_capacity(2 * HEADER_BYTES);
    out.extend((2 * HEADER_BYTES as u32).to_ne_bytes());
    out.extend(RTM_NEWLINK.to_ne_bytes());
    out.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    out.extend(1u32.to_ne_bytes()); // sequence number
    out.extend(0u32.to_ne_bytes()); // to the kernel
    out.extend([0; 4]); // family and type: any
    out.extend(LOOPBACK.to_ne_bytes());
    out.extend(IFF_UP.to_ne_bytes());
    out.extend(IFF_UP.to_ne_bytes()); // which flags to change
    out
}

/// Both structures are as long.
const HEADER_BYTES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_length_it_says() {
        let request = up_request();
        assert_eq!(request.len(), 32);
        assert_eq!(u32::from_ne_bytes([request[0], request[1], request[2], request[3]]), 32);
    }

    #[test]
    fn nothing_may_be_broken_outside() {
        // Tests never enter: rules of theirs would be the machine's.
        assert!(matches!(need(), Err(ToolError::Missing(_))));
    }
}
