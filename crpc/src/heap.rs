//! The allocator of gateway and state: whether it was built as they need it, and what it has given out. Macros, because
//! whatever depends on jemalloc runs it, and no other program is to.
//!
//! Trap: its settings come from `.cargo/config.toml`, which Cargo reads only when it is called within the source tree.

use std::sync::OnceLock;

/// Whether jemalloc runs with our settings. The caller depends on `tikv-jemalloc-ctl`.
#[macro_export]
macro_rules! heap_is_ours {
    () => {
        tikv_jemalloc_ctl::opt::narenas::read() == Ok(1)
            && tikv_jemalloc_ctl::opt::tcache::read() == Ok(false)
            && tikv_jemalloc_ctl::opt::background_thread::read() == Ok(true)
    };
}

/// Lets the calling thread keep small blocks for itself from now on, which the settings deny to all: for the one thread of a
/// server that allocates most, and holds the arena's locks else. A sixth of the CPU of state at 5,000 messages/s.
#[macro_export]
macro_rules! heap_cached {
    () => {{
        use tikv_jemalloc_ctl::{Access, AsName};
        "thread.tcache.enabled\0".name().write(true).is_ok()
    }};
}

/// Reads the bytes that jemalloc has given out and not got back, for [`tell`].
#[macro_export]
macro_rules! heap_in_use {
    () => {
        || {
            tikv_jemalloc_ctl::epoch::advance().ok()?;
            tikv_jemalloc_ctl::stats::allocated::read().ok()
        }
    };
}

/// Tests of both, for the program that runs it.
#[macro_export]
macro_rules! heap_tests {
    () => {
        #[test]
        fn the_heap_is_built_as_it_should_be() {
            assert!($crate::heap_is_ours!());
        }

        #[test]
        fn a_thread_may_cache_what_others_may_not() {
            use tikv_jemalloc_ctl::{Access, AsName};
            let is_cached = || -> bool { "thread.tcache.enabled\0".name().read().unwrap() };
            let on_another = || std::thread::spawn(is_cached).join().unwrap();
            assert!(!is_cached());
            assert!($crate::heap_cached!());
            assert_eq!((is_cached(), on_another()), (true, false));
        }

        #[test]
        fn the_heap_counts_what_it_gives_out() {
            let in_use = $crate::heap_in_use!();
            let before = in_use().unwrap();
            let block = std::hint::black_box(vec![1u8; 64 << 20]);
            assert!(in_use().unwrap() >= before + block.len() / 2);
        }
    };
}

type InUse = fn() -> Option<usize>;

static IN_USE: OnceLock<InUse> = OnceLock::new();

/// Metrics tell from now on what `in_use` reads: what this process keeps, to the byte, where resident memory counts pages.
pub fn tell(in_use: InUse) {
    let _ = IN_USE.set(in_use);
}

/// What is given out, bytes, if this program tells.
pub(crate) fn in_use() -> Option<u64> {
    IN_USE.get().and_then(|read| read()).map(|bytes| bytes as u64)
}

/// Says so on standard error if it does not: the server works, but keeps what a busy second needed.
pub fn warn_unless(is_ours: bool, server: &str) {
    if !is_ours {
        eprintln!(
            "{server}: jemalloc runs with other settings than .cargo/config.toml has, so what a storm needed may not be given back: build \
             within the source tree, and leave _RJEM_MALLOC_CONF alone"
        );
    }
}
