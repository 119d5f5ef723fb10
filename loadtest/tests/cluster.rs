//! storm and chat against real processes: Redis, etcd, state server, gateways. Needs `cargo build --bins`.

use std::time::Duration;

use loadtest::chat::{self, ChatOptions};
use loadtest::storm::{self, StormOptions};
use loadtest::supervisor::{Cluster, ClusterOptions};
use loadtest::target::Target;

#[test]
fn sessions_and_messages_cross_a_real_cluster() {
    let options = ClusterOptions { gateways: 2, ipconf: true, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).unwrap();
    let url = cluster.ipconf.as_ref().unwrap().url();
    let targets = format!("ipconf={url}").parse::<Target>().unwrap().resolve().unwrap();
    let storm = storm::run(&StormOptions {
        targets: targets.clone(),
        connections: 500,
        rate: None,
        window: 64,
        hold: Duration::ZERO,
        timeout: Duration::from_secs(60),
        pid: Some(cluster.gateways[0].process.pid().unwrap()),
        quiet: true,
        ..StormOptions::default()
    })
    .unwrap();
    assert_eq!((storm.connections, storm.failed), (500, 0), "{:?}", storm.errors);
    let chat = chat::run(&ChatOptions {
        targets,
        connections: 100,
        senders: 10,
        rate_per_s: 500.0,
        seconds: 2.0,
        seed: 1,
        window: 64,
        timeout: Duration::from_secs(60),
        quiet: true,
        hdr_log: None,
    })
    .unwrap();
    assert!(chat.is_clean(), "{chat:?}");
    assert_eq!(
        (chat.report.sent, chat.report.acked, chat.report.delivered),
        (1_000, 1_000, 1_000),
        "{chat:?}"
    );
}
