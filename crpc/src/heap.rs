//! The allocator of gateway and state, and whether it was built as they need it.
//!
//! Trap: its settings come from `.cargo/config.toml`, which Cargo reads only when it is called within the source tree.

pub use tikv_jemallocator::Jemalloc;

/// Says so on standard error if jemalloc runs with other settings than ours: the server works, but keeps what a busy second needed.
pub fn warn_unless_ours(server: &str) {
    if !is_ours() {
        eprintln!(
            "{server}: jemalloc runs with other settings than .cargo/config.toml has, so what a storm needed may not be given back: build \
             within the source tree, and leave _RJEM_MALLOC_CONF alone"
        );
    }
}

fn is_ours() -> bool {
    use tikv_jemalloc_ctl::opt;
    opt::narenas::read() == Ok(1)
        && opt::tcache::read() == Ok(false)
        && opt::background_thread::read() == Ok(true)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_heap_is_built_as_it_should_be() {
        assert!(super::is_ours());
    }
}
