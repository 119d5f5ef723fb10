//! The state server: sessions, messages, delivery. It holds no truth in memory; the store does.
//!
//! A batch of frames enters through `service`, is decided and answered in `turn`, and leaves as pushes through
//! `fan_out`. Everything durable goes through the [`store::Store`] trait.
//!
//! Trap: all tasks share one thread. A computation that takes milliseconds delays every gateway.

mod answer;
mod backlog;
mod calls;
mod circle;
mod clock;
pub mod config;
pub mod core;
pub mod ctl;
mod delete;
mod delivered;
mod doubts;
mod end;
mod fan_out;
mod gateways;
mod ghost;
pub mod group;
mod lane;
mod ledger;
mod losses;
mod marks;
mod metrics;
mod missed;
mod pace;
mod peers;
mod presence;
mod rate;
mod receipts;
mod relay;
mod repush;
mod roster;
pub mod server;
mod service;
mod settle;
pub mod simulation;
pub mod store;
pub mod store_memory;
mod store_memory_chat;
pub mod store_redb;
mod store_redb_append;
mod store_redb_file;
mod store_redb_group;
mod store_redb_history;
mod store_redb_marks;
mod store_redb_migrate;
mod store_redb_named;
mod store_redb_read;
mod store_redb_retain;
mod store_redb_row;
mod store_redb_step;
mod store_redb_writer;
pub mod store_redis;
mod store_redis_command;
mod store_redis_connection;
mod store_redis_key;
mod store_redis_layout;
mod store_redis_read;
mod store_redis_record;
mod store_redis_round;
mod store_redis_script;
mod takeover;
mod turn;
mod unplaced;
mod users;
mod visible;
