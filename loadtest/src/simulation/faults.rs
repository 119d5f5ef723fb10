//! What breaks, when, and how it comes back.
//!
//! Trap: everything that is broken here must mend by itself or in `World::heal`, or the seed never becomes quiet.

use std::collections::btree_map::Entry;

use super::event::Event;
use super::net::Host;
use super::plan::MS;
use super::world::World;

impl World {
    /// Something breaks, as the plan's weights have it; and the next time is drawn.
    pub(super) fn breaks(&mut self) {
        if self.is_healed {
            return;
        }
        let every_us = self.plan.fault_every_us;
        let wait_us = self.net.draw.between(1, 2 * every_us);
        self.net.after(wait_us, Event::Breaks);
        let weights = self.plan.fault_weights;
        let sum: u64 = weights.iter().sum();
        if sum == 0 {
            return;
        }
        let mut at = self.net.draw.between(0, sum - 1);
        let kind = weights.iter().position(|weight| {
            let hit = at < *weight;
            at = at.saturating_sub(*weight);
            hit
        });
        self.faults += 1;
        let server = self.net.draw.index(self.servers.len());
        let gateway = self.net.draw.index(self.gateways.len());
        let device = self.net.draw.index(self.devices.len());
        match kind.unwrap_or(0) {
            0 => self.server_dies(server),
            1 => self.pauses(Host::Server(server)),
            2 => self.gateway_dies(gateway),
            3 => self.pauses(Host::Gateway(gateway)),
            4 => self.device_dies(device),
            5 => self.pauses(Host::Device(device)),
            6 | 7 => self.hurts_pipe(true),
            8 | 9 => self.hurts_pipe(false),
            10 => self.store_dies(),
            11 => {
                let until_us = self.net.now_us + self.net.draw.between(10 * MS, 4_000 * MS);
                self.storage.cut(server, until_us);
                self.note(|| format!("server {server} is cut from the store"));
            }
            _ => {
                let until_us = self.net.now_us + self.net.draw.between(10 * MS, 2_000 * MS);
                self.gateways[gateway].slows(until_us, &mut self.net);
            }
        }
    }

    pub(super) fn server_dies(&mut self, server: usize) {
        if self.servers[server].is_up() {
            let between = self.servers[server].die(&mut self.storage, &mut self.net);
            self.crashes += 1;
            self.crashes_between += u64::from(between);
            self.note(|| format!("server {server} dies, between append and push: {between}"));
            self.comes_back(Host::Server(server), 3_000 * MS);
        }
    }

    /// All streams of a server are cut, or one.
    pub(super) fn links_break(&mut self, server: usize) {
        let one = self.net.draw.permille(500);
        for pipe in self.net.living() {
            if self.net.host(pipe, super::net::Side::Other) == Host::Server(server) {
                self.net.cut(pipe);
                if one {
                    return;
                }
            }
        }
    }

    fn gateway_dies(&mut self, gateway: usize) {
        if self.gateways[gateway].is_up() {
            self.gateways[gateway].die(&mut self.net);
            self.note(|| format!("gateway {gateway} dies"));
            self.comes_back(Host::Gateway(gateway), 2_000 * MS);
        }
    }

    fn device_dies(&mut self, device: usize) {
        if self.devices[device].is_up {
            // Rarely the machine is a new one of the same name.
            let lost = self.net.draw.permille(60);
            self.devices[device].die(lost, &mut self.net);
            self.note(|| format!("device {device} dies, and everything it kept is lost: {lost}"));
            self.comes_back(Host::Device(device), 2_000 * MS);
        }
    }

    fn store_dies(&mut self) {
        if !self.storage.is_down() {
            self.storage.crash();
            self.note(|| "the store dies".to_owned());
            let wait_us = self.net.draw.between(1, 1_500 * MS);
            self.net.after(wait_us, Event::StoreBack);
        }
    }

    fn comes_back(&mut self, host: Host, within_us: u64) {
        // Whoever was stopped is dead now: what waited for it finds nobody.
        for event in self.held.remove(&host).unwrap_or_default() {
            self.net.after(1, event);
        }
        let wait_us = self.net.draw.between(1, within_us);
        self.net.after(wait_us, Event::Start(host));
    }

    fn pauses(&mut self, host: Host) {
        if let Entry::Vacant(free) = self.held.entry(host) {
            free.insert(Vec::new());
            let for_us = self.net.draw.delay(1_500 * MS, 3, 6_000 * MS);
            self.net.after(for_us, Event::Resumes(host));
            self.note(|| format!("{host:?} is stopped for {} ms", for_us / MS));
        }
    }

    /// A pipe between servers, or to a client, is cut or stalls.
    fn hurts_pipe(&mut self, link: bool) {
        let pipes: Vec<usize> =
            self.net.living().into_iter().filter(|pipe| self.net.is_link(*pipe) == link).collect();
        if pipes.is_empty() {
            return;
        }
        let pipe = pipes[self.net.draw.index(pipes.len())];
        if self.net.draw.permille(500) {
            self.net.cut(pipe);
            self.note(|| format!("pipe {pipe} is cut"));
        } else {
            let for_us = self.net.draw.delay(800 * MS, 4, 4_000 * MS);
            self.net.stall(pipe, for_us);
            self.note(|| format!("pipe {pipe} stalls for {} ms", for_us / MS));
        }
    }
}
