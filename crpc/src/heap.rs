//! Whether the allocator of gateway and state was built as they need it. Macros, because whatever depends on jemalloc runs it, and no
//! other program is to.
//!
//! Trap: its settings come from `.cargo/config.toml`, which Cargo reads only when it is called within the source tree.

/// Whether jemalloc runs with our settings. The caller depends on `tikv-jemalloc-ctl`.
#[macro_export]
macro_rules! heap_is_ours {
    () => {
        tikv_jemalloc_ctl::opt::narenas::read() == Ok(1)
            && tikv_jemalloc_ctl::opt::tcache::read() == Ok(false)
            && tikv_jemalloc_ctl::opt::background_thread::read() == Ok(true)
    };
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
